"""Sweeps of operations without a table: other launches compute the same; one is recommended only if clearly faster."""

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"
sys.path.insert(0, str(BENCH))

import tune_plans  # noqa: E402

from internvl_rt.bench.kernel_cases import Work, small_work  # noqa: E402
from internvl_rt.bench.timing import Timing  # noqa: E402
from internvl_rt.kernels._gemv_plan import GemvPlan, choose_gemv_plan  # noqa: E402
from internvl_rt.kernels._launch import TARGETS  # noqa: E402
from internvl_rt.kernels.catalogue import discover_specs  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SPECS = discover_specs()
H200 = TARGETS[90]


def timing(us: float) -> Timing:
    return Timing(us, 0.99 * us, 1.01 * us, 100, None, graphed=True)


def small(op: str, case: str, **changes: Any) -> Work:
    found = next(work for work in small_work(SPECS[op]) if work.case.name == case)
    return replace(found, spec=replace(found.spec, **changes))


@pytest.fixture(autouse=True)
def no_time_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_plans, "time_variants", lambda variants, *_, **__: dict.fromkeys(variants, timing(1)))


@pytest.mark.parametrize(
    ("op", "case"), [("gemv", "matrix_2_norm"), ("gemv_qkv", "rows_2"), ("decode_attention", "many_splits")]
)
def test_other_launches_of_gemv_and_attention_are_right_too(op: str, case: str) -> None:
    timings, wrong = tune_plans._time_plans(small(op, case), DEVICE)
    assert "chosen" in timings
    assert wrong == {}
    assert len(timings) >= 5


def test_a_launch_is_recommended_only_beyond_the_noise() -> None:
    timings = {"chosen": timing(100), "8 warps": timing(90), "4 warps": timing(95)}
    assert tune_plans.recommend("gemv/x", timings) == "gemv/x: 8 warps is 1.11x as fast, 90.00 us for 100.00 us"
    assert "within the noise" in tune_plans.recommend("gemv/x", {"chosen": timing(100), "other": timing(99)})


@pytest.mark.parametrize(("rows", "n", "k"), [(1, 9728, 896), (8, 9728, 896), (8, 896, 896), (8, 896, 4864)])
def test_neighbours_of_a_gemv_plan_are_plans(rows: int, n: int, k: int) -> None:
    chosen = choose_gemv_plan(rows, n, k, torch.bfloat16, H200)
    plans = tune_plans.gemv_plans(rows, chosen)
    assert plans["chosen"] == chosen
    assert len(set(plans.values())) == len(plans) >= 6
    assert all(isinstance(plan, GemvPlan) and plan.matrix == chosen.matrix for plan in plans.values())


def test_a_launch_that_is_wrong_is_named_and_the_others_are_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, plans = SPECS["gemv"].launcher, list[GemvPlan]()

    def second_is_wrong(*args: Any, **how: Any) -> Any:
        if how["plan"] not in plans:
            plans.append(how["plan"])
        return how["out"].zero_() if plans.index(how["plan"]) == 1 else real(*args, **how)

    work = small("gemv", "matrix_2_norm", launcher=second_is_wrong)
    monkeypatch.setattr(tune_plans, "real_work", lambda spec: [work])
    monkeypatch.setattr(tune_plans, "MOST_IMPORTANT", 9)
    rows, left_out = tune_plans.sweep_launches(["gemv"], DEVICE, time.monotonic() + 600)
    assert left_out == []
    assert [row["plan"].partition("x")[0] for row in rows if "problem" in row] == [str(plans[1].block_n)]
    assert len([row for row in rows if "median_us" in row]) == len(plans) - 1 > 3
    assert " is wrong: the result: rms error" in capsys.readouterr().err

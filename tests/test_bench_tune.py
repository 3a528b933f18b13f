"""The plan tuner: cuBLAS stays wherever a fused kernel is not ahead beyond doubt, and the kernels read what it writes.

The times are invented, or say nothing.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "bench"
sys.path.insert(0, str(BENCH))

import tune_plans  # noqa: E402
from kernel_cases import Work, small_work  # noqa: E402
from timing import Timing  # noqa: E402
from tune import (  # noqa: E402
    DeviceTimer,
    Sweep,
    build_entries,
    candidates,
    choose,
    invented_times,
    measured_on,
    product_works,
    sweep_products,
    write_table,
)

from internvl_rt.kernels._gemv_plan import GemvPlan, choose_gemv_plan  # noqa: E402
from internvl_rt.kernels._launch import TARGETS  # noqa: E402
from internvl_rt.kernels._plans import CUBLAS, FOLDER, GemmPlan, check_plan, choose_plan, load_table  # noqa: E402
from support.specs import discover_specs  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SPECS = discover_specs()
H200 = TARGETS[90]
PLANS = candidates(H200)
WIDE, LOW = PLANS["wide"], PLANS["low"]
MEASURED = {"date": "2026-01-01", "gpu": "none", "triton": "3.7.1", "torch": "2.13.0"}


def timing(us: float, spread: float = 0.01, *, graphed: bool = True) -> Timing:
    return Timing(us, (1 - spread) * us, (1 + spread) * us, 100, None, graphed)


def small(op: str, case: str, **changes: Any) -> Work:
    found = next(work for work in small_work(SPECS[op]) if work.case.name == case)
    return replace(found, spec=replace(found.spec, **changes))


@pytest.mark.parametrize(
    ("timings", "name"),
    [
        ({"cublas": timing(100), "wide": timing(90)}, "wide"),
        ({"cublas": timing(100), "wide": timing(90), "low": timing(80)}, "low"),
        ({"cublas": timing(100), "wide": timing(100)}, "cublas"),
        ({"cublas": timing(100), "wide": timing(110)}, "cublas"),
        ({"cublas": timing(100), "wide": timing(90, spread=0.2)}, "cublas"),
        ({"cublas": timing(100, spread=0.2), "wide": timing(90)}, "cublas"),
        ({"cublas": timing(100, spread=0.001), "wide": timing(99, spread=0.001)}, "cublas"),
        ({"cublas": timing(100), "wide": timing(50, graphed=False)}, "cublas"),
        ({"cublas": timing(100, graphed=False), "wide": timing(50)}, "cublas"),
        ({"cublas": timing(100), "wide": timing(90), "low": timing(90)}, "low"),
        ({"cublas": timing(100)}, "cublas"),
    ],
)
def test_a_fused_plan_is_chosen_only_beyond_the_noise(timings: dict[str, Timing], name: str) -> None:
    assert choose(timings) == name
    assert choose(dict(reversed(timings.items()))) == name


def test_a_lucky_sweep_is_not_enough() -> None:
    """The fastest of many noisy plans looks faster than it is: the second run of the two decides."""
    asked: list[list[str]] = []

    def lucky_once(work: Work, plans: Mapping[str, GemmPlan], budget_s: float) -> dict[str, Timing]:
        asked.append(list(plans))
        return {name: timing(80 if name == "low" and len(asked) == 1 else 100) for name in plans}

    work = product_works()[0]
    found = sweep_products([work], PLANS, lucky_once, time.monotonic() + 60)
    assert asked == [list(PLANS), ["cublas", "low"]]
    assert [*found.chosen.values()] == [{work.case["R"]: CUBLAS}]
    assert [row["plan"] for row in found.rows if row["chosen"]] == ["cublas"]


def test_a_plan_that_fails_spoils_nothing_but_its_product() -> None:
    works = product_works()[:3]

    def fails_on_the_second(work: Work, plans: Mapping[str, GemmPlan], budget_s: float) -> dict[str, Timing]:
        if work is works[1]:
            raise RuntimeError("no")
        return {name: timing(100 if name == "cublas" else 50) for name in plans}

    found = sweep_products(works, PLANS, fails_on_the_second, time.monotonic() + 60)
    assert [row["name"] for row in found.rows if "problem" in row] == [works[1].name]
    assert sum(map(len, found.chosen.values())) == 2


def test_products_that_the_time_does_not_reach_are_named_and_get_no_entry() -> None:
    works = product_works()
    found = sweep_products(works, PLANS, invented_times, time.monotonic() - 1)
    assert found == Sweep(left_out=[work.name for work in works])
    assert build_entries(found.chosen) == []


def test_the_kernels_choose_what_was_measured(tmp_path: Path) -> None:
    """Down to half of the fewest rows, and not above the most."""
    chosen = {
        (3072, 1024, "none"): {1025: CUBLAS, 4100: WIDE, 13325: LOW},
        (4096, 1024, "gelu"): {13325: WIDE, 1025: WIDE},
        (896, 896, "residual"): {64: LOW, 3392: CUBLAS},
        (512, 512, "rows"): {64: CUBLAS},
        (256, 256, "none"): {1: LOW},
    }
    entries = build_entries(chosen)
    assert entries == build_entries(dict(reversed(chosen.items())))
    write_table(tmp_path / "sm_90.json", entries, MEASURED, H200)

    def plan(rows: int, n: int, k: int, epilogue: str) -> GemmPlan:
        return choose_plan(rows, n, k, epilogue, torch.bfloat16, H200, folder=tmp_path)

    for (n, k, epilogue), by_rows in chosen.items():
        for rows, expected in by_rows.items():
            assert plan(rows, n, k, epilogue) == expected
    assert [plan(rows, 3072, 1024, "none") for rows in (1, 1026, 4101, 13326)] == [CUBLAS, WIDE, LOW, CUBLAS]
    assert [plan(rows, 4096, 1024, "gelu") for rows in (512, 513, 5000, 13326)] == [CUBLAS, WIDE, WIDE, CUBLAS]
    assert [plan(rows, 896, 896, "residual") for rows in (32, 33, 65)] == [CUBLAS, LOW, CUBLAS]
    assert len(entries) == 3 + 2 + 2 + 1


def test_a_table_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "sm_90.json"
    write_table(path, [], MEASURED, H200)
    before = path.read_bytes()
    assert load_table(path, H200) == {}
    too_large = {(64, 64, "none"): {64: replace(WIDE, num_stages=8)}}
    with pytest.raises(ValueError, match="shared memory"):
        write_table(path, build_entries(too_large), MEASURED, H200)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["sm_90.json"]


@pytest.mark.parametrize("capability", TARGETS)
def test_every_candidate_can_be_built_for_its_target(capability: int) -> None:
    plans = candidates(TARGETS[capability])
    assert plans["cublas"] == CUBLAS
    assert len(plans) >= 5
    for plan in plans.values():
        check_plan(plan, 2, TARGETS[capability])
        assert not plan.use_tma or capability >= 90


def test_products_are_those_of_towers_and_decoders_each_once() -> None:
    works = product_works()
    keys = [(work.case["N"], work.case["K"], work.case["epilogue"], work.case["R"]) for work in works]
    assert len(set(keys)) == len(keys)
    assert {(4096, 1024, "gelu", 13325), (1024, 4096, "none", 13325), (9728, 896, "none", 64)} <= set(keys)
    assert all("implementation" not in work.case.sizes for work in works)


def test_a_file_says_device_date_commit_and_tools() -> None:
    said = measured_on(DEVICE)
    assert said.keys() == MEASURED.keys()
    assert " at commit " in said["date"]
    assert said["torch"] == torch.__version__


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """As on a machine without a GPU."""
    command, hidden = [sys.executable, "bench/tune.py", *arguments], {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=hidden, capture_output=True, text=True)


def test_a_dry_run_shows_everything_and_writes_nothing() -> None:
    before = {path: path.read_bytes() for path in FOLDER.iterdir()}
    done = run("--dry-run")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["dry_run"] is True
    assert {row["name"] for row in document["rows"]} == {work.name for work in product_works()}
    assert {row["plan"] for row in document["rows"]} == PLANS.keys()
    assert {path: path.read_bytes() for path in FOLDER.iterdir()} == before


def test_without_a_gpu_nothing_is_tuned() -> None:
    done = run()
    assert done.returncode == 2
    assert "expected a machine with a CUDA device" in done.stderr


def test_plans_are_compared_with_the_reference_before_they_are_timed() -> None:
    plans = {"cublas": CUBLAS, "fused": GemmPlan("fused", 32, 32, 16, group_m=2, num_warps=4, num_stages=2)}
    work = small("gemm_epilogue", "gelu_fused")
    assert DeviceTimer(DEVICE)(work, plans, 0.01).keys() == plans.keys()

    def wrong(x: Tensor, weight_NK: Tensor, bias_N: Tensor, *, out: Tensor, **how: Any) -> Tensor:
        return work.spec.launcher(x, weight_NK, bias_N if how["plan"] == CUBLAS else 1.1 * bias_N, out=out, **how)

    found = sweep_products([small("gemm_epilogue", "gelu_fused", launcher=wrong)], plans, DeviceTimer(DEVICE), 1e12)
    assert [row["problem"].partition(":")[0] for row in found.rows] == ["WrongResultError"]
    assert found.chosen == {}


def test_a_plan_that_cannot_be_built_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    plans = {"cublas": CUBLAS, "huge": replace(WIDE, num_stages=8)}
    assert DeviceTimer(DEVICE)(small("gemm_epilogue", "gelu_fused"), plans, 0.01).keys() == {"cublas"}
    assert "not huge: ValueError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("op", "case"), [("gemv", "matrix_2_norm"), ("gemv_qkv", "rows_2"), ("decode_attention", "many_splits")]
)
def test_other_launches_of_gemv_and_attention_are_right_too(
    op: str, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune_plans, "time_variants", lambda variants, *_, **__: dict.fromkeys(variants, timing(1)))
    timings = tune_plans._time_plans(small(op, case), DEVICE)
    assert "chosen" in timings
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

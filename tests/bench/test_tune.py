"""The plan tuner keeps cuBLAS unless a fused kernel is faster beyond doubt, and the kernels read the table it writes.

The times are invented, or those of a CPU, which mean nothing.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "bench"
sys.path.insert(0, str(BENCH))

import tune  # noqa: E402
from tune import DeviceTimer, Measured, Sweep, choose, entries_of, invented_times, sweep  # noqa: E402
from tune_candidates import (  # noqa: E402
    TUNED,
    Plans,
    attention_plans,
    attention_works,
    product_plans,
    product_works,
    projection_plans,
    projection_works,
)
from tune_table import write_table  # noqa: E402

from internvl_rt.bench.kernel_cases import Work, small_work  # noqa: E402
from internvl_rt.bench.timing import Timing  # noqa: E402
from internvl_rt.kernels._launch import TARGETS  # noqa: E402
from internvl_rt.kernels._plans import (  # noqa: E402
    APART,
    CUBLAS,
    FOLDER,
    AttentionPlan,
    GemmPlan,
    check_attention_plan,
    check_plan,
    choose_attention_plan,
    choose_projection_plan,
    load_tables,
)
from internvl_rt.kernels.catalogue import discover_specs  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SPECS = discover_specs()
H200 = TARGETS[90]
PRODUCTS, PROJECTION, ATTENTION = (TUNED[name] for name in ("gemm_epilogue", "unshuffle_project", "vit_attention"))
PLANS = product_plans(H200)
SMALL = GemmPlan("fused", 32, 32, 16, group_m=2, num_warps=4, num_stages=2)  # it suits the small cases of tests
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
    assert choose(timings, "cublas") == name
    assert choose(dict(reversed(timings.items())), "cublas") == name


def sweep_with(works: list[Work], timer: Any, tuned: Any = PRODUCTS, seconds: float = 60) -> Sweep:
    return sweep(tuned, works, H200, timer, time.monotonic() + seconds)


def test_a_lucky_sweep_is_not_enough() -> None:
    """The fastest of many noisy plans looks faster than it is, so a second run of that plan and cuBLAS decides."""
    asked: list[list[str]] = []

    def lucky_once(work: Work, plans: Plans, baseline: str, budget_s: float) -> Measured:
        asked.append(list(plans))
        return Measured({name: timing(80 if name == "low" and len(asked) == 1 else 100) for name in plans}, {})

    work = product_works()[0]
    found = sweep_with([work], lucky_once)
    assert asked == [list(PLANS), ["cublas", "low"]]
    assert [*found.chosen("cublas").values()] == [{work.case["R"]: CUBLAS}]
    assert [row["plan"] for row in found.rows if row["chosen"]] == ["cublas"]


def all_fused_are_fast(work: Work, plans: Plans, baseline: str, budget_s: float) -> Measured:
    return Measured({name: timing(100 if name == baseline else 50) for name in plans}, {})


def test_a_work_that_fails_leaves_out_its_key_alone_at_every_size() -> None:
    works = product_works()
    broken = PRODUCTS.key(works[0])
    of_broken = [work for work in works if PRODUCTS.key(work) == broken]
    others = [work for work in works if PRODUCTS.key(work) != broken][:3]
    assert len(of_broken) == 3

    def fails_once(work: Work, plans: Plans, baseline: str, budget_s: float) -> Measured:
        if work is of_broken[1]:
            raise RuntimeError("no")
        return all_fused_are_fast(work, plans, baseline, budget_s)

    found = sweep_with([*of_broken, *others], fails_once)
    assert [row["name"] for row in found.rows if "problem" in row] == [of_broken[1].name]
    assert found.chosen("cublas").keys() == {PRODUCTS.key(work) for work in others}
    entries = entries_of({"gemm_epilogue": found})["gemm_epilogue"]
    assert {(each["n"], each["k"], each["epilogue"]) for each in entries} == {PRODUCTS.key(work) for work in others}


def test_a_plan_that_is_wrong_is_named_and_chosen_at_no_size_of_its_key(capsys: pytest.CaptureFixture[str]) -> None:
    """The plan is wrong at the second of three sizes: it is not measured at the third, and the first keeps cuBLAS."""
    works = product_works()
    works = [work for work in works if PRODUCTS.key(work) == PRODUCTS.key(works[0])] + [works[1]]
    fast = next(name for name in sorted(PLANS) if name != "cublas")
    asked: list[bool] = []

    def wrong_at_the_second(work: Work, plans: Plans, baseline: str, budget_s: float) -> Measured:
        asked.append(fast in plans)
        timings = all_fused_are_fast(work, plans, baseline, budget_s).timings
        if work is works[1]:
            timings.pop(fast, None)
            return Measured(timings, {fast: "rms error 1"} if fast in plans else {})
        return Measured(timings, {})

    found = sweep_with(works, wrong_at_the_second)
    assert asked == [True, True, True, False, False, False, True, True]
    assert [row for row in found.rows if "problem" in row] == [
        {"name": works[1].name, "plan": fast, "problem": "rms error 1"}
    ]
    assert f"{works[1].name}: {fast} is wrong: rms error 1" in capsys.readouterr().err
    chosen = found.chosen("cublas")
    assert chosen[PRODUCTS.key(works[0])][works[0].case["R"]] == CUBLAS
    assert PLANS[fast] not in chosen[PRODUCTS.key(works[0])].values()
    assert set(chosen[PRODUCTS.key(works[3])].values()) == {PLANS[fast]}


def test_works_that_the_time_does_not_reach_are_named_and_get_no_entry() -> None:
    works = product_works()
    found = sweep_with(works, invented_times, seconds=-1)
    assert found == Sweep(left_out=[work.name for work in works])
    assert entries_of({"gemm_epilogue": found}) == {
        "gemm_epilogue": [],
        "unshuffle_project": [],
        "vit_attention": [],
    }


def test_ctrl_c_keeps_what_was_found() -> None:
    works = product_works()[:3]

    def stopped_at_the_second(work: Work, plans: Plans, baseline: str, budget_s: float) -> Measured:
        if work is works[1]:
            raise KeyboardInterrupt
        return all_fused_are_fast(work, plans, baseline, budget_s)

    found = sweep_with(works, stopped_at_the_second)
    assert [*found.chosen("cublas")] == [PRODUCTS.key(works[0])]
    assert found.left_out == [work.name for work in works[1:]]


def test_attention_is_launched_as_it_was_measured(tmp_path: Path) -> None:
    """One plan is fastest at 13 tiles and another at one tile; the 6B vision tower keeps its default."""
    fast = {13: "128x128, 8 warps, 2 stages", 1: "64x64, 4 warps, 3 stages"}

    def timer(work: Work, plans: Plans, baseline: str, budget_s: float) -> Measured:
        best = fast[work.case["I"]] if work.case["C"] == 64 else baseline
        return Measured({name: timing(50 if name == best else 100) for name in plans}, {})

    entries = entries_of({"vit_attention": sweep_with(attention_works(), timer, ATTENTION)})
    path = tmp_path / "sm_90.json"
    write_table(path, entries, MEASURED, H200)
    assert [(each["tiles_max"], each["channels"]) for each in entries["vit_attention"]] == [(1, 64), (13, 64)]

    def plan(tiles: int, heads: int, channels: int) -> AttentionPlan | None:
        return choose_attention_plan(tiles, 1024, heads, channels, torch.bfloat16, H200, folder=tmp_path)

    assert [plan(tiles, 16, 64) for tiles in (1, 2, 13, 40)] == [
        AttentionPlan(64, 64, num_warps=4, num_stages=3),
        *[AttentionPlan(128, 128, num_warps=8, num_stages=2)] * 3,
    ]
    assert plan(13, 25, 128) is None


def test_the_projector_is_launched_as_it_was_measured(tmp_path: Path) -> None:
    """A fused plan is fastest for 13 tiles of the 1B and for one tile of the 38B; everything else stays apart."""
    works = projection_works()
    assert [(work.case["I"], *PROJECTION.key(work)) for work in works] == [
        (tiles, n, k)
        for tiles in (13, 1, 4)
        for n, k in ((896, 4096), (3584, 4096), (5120, 12800), (8192, 16384), (10240, 51200))
    ]
    fast = {works[0].name: "wide", works[7].name: "low"}

    def timer(work: Work, plans: Plans, baseline: str, budget_s: float) -> Measured:
        best = fast.get(work.name, baseline)
        return Measured({name: timing(50 if name == best else 100) for name in plans}, {})

    entries = entries_of({"unshuffle_project": sweep_with(works, timer, PROJECTION)})
    write_table(tmp_path / "sm_90.json", entries, MEASURED, H200)
    plans = projection_plans(H200)

    def plan(tiles: int, n: int, k: int) -> GemmPlan:
        return choose_projection_plan(256 * tiles, n, k, torch.bfloat16, H200, folder=tmp_path)

    assert [plan(tiles, 896, 4096) for tiles in (1, 4, 5, 13, 14)] == [
        APART,
        APART,
        plans["wide"],
        plans["wide"],
        APART,
    ]
    assert [plan(tiles, 5120, 12800) for tiles in (1, 2, 13)] == [plans["low"], APART, APART]
    assert plan(13, 3584, 4096) == APART


@pytest.mark.parametrize("capability", TARGETS)
def test_every_candidate_can_be_built_for_its_target(capability: int) -> None:
    plans = product_plans(TARGETS[capability])
    assert plans["cublas"] == CUBLAS
    assert len(plans) >= 5
    for plan in plans.values():
        check_plan(plan, 2, TARGETS[capability])
        assert not plan.use_tma or capability >= 90
    plans = projection_plans(TARGETS[capability])
    assert plans["apart"] == APART
    assert len(plans) >= 4
    for plan in plans.values():
        check_plan(plan, 2, TARGETS[capability], unfused=(APART,))
        assert not plan.use_tma or capability >= 90
    for work in attention_works():
        found = attention_plans(work, TARGETS[capability])
        assert next(iter(found)) == "default"
        assert len(set(found.values())) == len(found) >= 5
        assert capability >= 90 or not any(plan.host_descriptor for plan in found.values())
        for plan in found.values():
            check_attention_plan(plan, work.case["C"], 2, TARGETS[capability])
    if capability == 90:
        found = attention_plans(attention_works()[0], H200)
        assert {(p.block_m, p.block_n) for p in found.values()} == {(m, n) for m in (64, 128, 256) for n in (64, 128)}
        assert found["default, host"] == replace(found["default"], host_descriptor=True)


def test_products_are_those_of_towers_and_decoders_each_once() -> None:
    works = product_works()
    keys = [(work.case["N"], work.case["K"], work.case["epilogue"], work.case["R"]) for work in works]
    assert len(set(keys)) == len(keys)
    assert {(4096, 1024, "gelu", 13325), (1024, 4096, "none", 13325), (9728, 896, "none", 64)} <= set(keys)
    assert set(keys[:12]) == {  # the products of a layer of InternViT-300M
        (n, k, epilogue, 1025 * tiles)
        for n, k, epilogue in ((3072, 1024, "none"), (4096, 1024, "gelu"), (1024, 1024, "none"), (1024, 4096, "none"))
        for tiles in (1, 4, 13)
    }
    assert keys[12:15] == [(896, 4096, "gelu", 3328), (3584, 4096, "gelu", 3328), (896, 896, "rows", 3328)]
    assert (9728, 896, "none", 3392) in keys[24:32]
    assert all("implementation" not in work.case.sizes for work in works)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs bench/tune.py as on a machine without a GPU."""
    command, hidden = [sys.executable, "bench/tune.py", *arguments], {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=hidden, capture_output=True, text=True)


def test_a_dry_run_shows_everything_and_writes_nothing() -> None:
    before = {path: path.read_bytes() for path in FOLDER.iterdir()}
    done = run("--dry-run")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["dry_run"] is True
    works = *product_works(), *projection_works(), *attention_works()
    assert {row["name"] for row in document["rows"]} == {work.name for work in works}
    plans = {row["plan"] for row in document["rows"] if row["name"].startswith("gemm_epilogue/")}
    assert plans == PLANS.keys()
    assert {path: path.read_bytes() for path in FOLDER.iterdir()} == before


def test_the_table_is_written_with_the_rest_and_the_exit_code_says_that_something_was_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command runs as on a GPU, with invented times and one work that fails."""
    broken, path = product_works()[0], tmp_path / "sm_90.json"

    def timer(work: Work, plans: Plans, baseline: str, budget_s: float) -> Measured:
        if work.name == broken.name:
            raise RuntimeError("no")
        return all_fused_are_fast(work, plans, baseline, budget_s)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "target_of", lambda device: H200)
    monkeypatch.setattr(tune, "DeviceTimer", lambda device: timer)
    monkeypatch.setattr(tune, "measured_on", lambda device, commit=None: MEASURED)
    monkeypatch.setattr(tune, "result_document", lambda part, rows, device: {"part": part, "rows": rows})
    monkeypatch.setattr(sys, "argv", ["tune.py", "--only=gemm_epilogue", "--only=vit_attention", f"--out={path}"])
    assert tune.main() == 1
    tables = load_tables(path, H200)
    assert tables.gemm_epilogue.keys() == {PRODUCTS.key(work) for work in product_works()} - {PRODUCTS.key(broken)}
    assert tables.vit_attention.keys() == {ATTENTION.key(work) for work in attention_works()}
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row for row in rows if "problem" in row] == [{"name": broken.name, "problem": "RuntimeError: no"}]


def test_without_a_gpu_nothing_is_tuned() -> None:
    done = run()
    assert done.returncode == 2
    assert "expected a machine with a CUDA device" in done.stderr


def wrong_where(work: Work, is_wrong: Any) -> Work:
    """Returns the same work with a launcher that computes something else for the plans that `is_wrong` names."""

    def launcher(x: Tensor, weight_NK: Tensor, bias_N: Tensor, *, out: Tensor, **how: Any) -> Tensor:
        bias_N = 1.1 * bias_N if is_wrong(how["plan"]) else bias_N
        return work.spec.launcher(x, weight_NK, bias_N, out=out, **how)

    return replace(work, spec=replace(work.spec, launcher=launcher))


def test_plans_are_compared_with_the_reference_before_they_are_timed() -> None:
    plans = {"cublas": CUBLAS, "fused": SMALL, "pieces": replace(SMALL, block_n=256)}
    tuned = replace(PRODUCTS, plans=lambda work, target: plans)
    work = small("gemm_epilogue", "gelu_fused")
    measured = DeviceTimer(DEVICE)(work, plans, "cublas", 0.01)
    assert (measured.timings.keys(), measured.wrong) == (plans.keys(), {})

    found = sweep_with([wrong_where(work, lambda plan: plan == SMALL)], DeviceTimer(DEVICE), tuned)
    assert [row["plan"] for row in found.rows if "problem" in row] == ["fused"]
    assert [row["plan"] for row in found.rows if "median_us" in row] == ["cublas", "pieces"]
    assert [*found.chosen("cublas")] == [PRODUCTS.key(work)]

    found = sweep_with([wrong_where(work, lambda plan: plan == CUBLAS)], DeviceTimer(DEVICE), tuned)
    assert [row["problem"].partition(":")[0] for row in found.rows] == ["WrongResultError"]
    assert found.chosen("cublas") == {}


@pytest.mark.slow
def test_plans_of_attention_are_compared_too() -> None:
    plans = {"default": AttentionPlan(32, 16, 8, 1), "other": AttentionPlan(16, 32, 4, 1)}
    work = small("vit_attention", "several_heads_and_tiles")
    assert DeviceTimer(DEVICE)(work, plans, "default", 0.01).timings.keys() == plans.keys()


def test_a_plan_that_cannot_be_built_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    plans = {"cublas": CUBLAS, "huge": replace(WIDE, num_stages=8)}
    measured = DeviceTimer(DEVICE)(small("gemm_epilogue", "gelu_fused"), plans, "cublas", 0.01)
    assert (measured.timings.keys(), measured.wrong) == ({"cublas"}, {})
    assert "not huge: ValueError" in capsys.readouterr().err

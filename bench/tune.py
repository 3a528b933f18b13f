"""Which launch plan is fastest on this GPU: writes the table of products that the kernels load.

    python bench/tune.py [--only OP]... [--budget-s 300] [--out FILE]      FILE: kernels/plans/sm_90.json or its like
    python bench/tune.py --dry-run                                          invented times; nothing is written

A product gets a fused plan only where that is faster than cuBLAS and an element-wise kernel beyond doubt: in a sweep
and in a second run of the two alone, its slow samples (90th percentile) are below the fast ones of cuBLAS (10th), and
its median by LEAST_GAIN. Every plan is compared with the reference before it is timed. A measurement speaks for the
rows down to the next smaller that was measured, or to half; above the largest, cuBLAS stays.

The table holds what this run measured and nothing older, so give it time for everything. For gemv, gemv_qkv and the
attentions, whose plans are functions and no tables, the fastest is only printed.
"""

import argparse
import json
import os
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kernel_cases import Work, compare, make_rotated_inputs, poisoned_like, real_work, run_reference
from kernel_cases import importance as importance_of
from kernel_table import first_line
from timing import Timing, result_document, time_variants
from tune_plans import RECOMMENDED, sweep_launches

from internvl_rt.bench.record import environment
from internvl_rt.kernels._launch import TARGETS, Target, target_of
from internvl_rt.kernels._plans import CUBLAS, FOLDER, GemmPlan, check_plan, load_table, tilings
from support.specs import discover_specs

LEAST_GAIN = 0.02  # of cuBLAS's time: less is not worth a kernel to compile
BUDGET_S = 0.03  # of a plan's samples in the sweep
CONFIRM_S = 0.3  # of the two that are left
Key = tuple[int, int, str]  # n, k, epilogue, as in the table
Timer = Callable[[Work, Mapping[str, GemmPlan], float], dict[str, Timing]]


@dataclass(slots=True)
class Sweep:
    """What was found: plans by key and rows, and a row for the document of every timing."""

    chosen: dict[Key, dict[int, GemmPlan]] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


class WrongResultError(Exception):
    """A plan computes something else than the reference."""


def candidates(target: Target) -> dict[str, GemmPlan]:
    """cuBLAS, the named tilings, and their neighbours, as far as `target` can run them in 16 bits."""
    tma = target.capability >= 90
    further = {
        "tall": GemmPlan("fused", 256, 128, 64, group_m=4, num_warps=8, num_stages=4, use_tma=tma),
        "wide_3": GemmPlan("fused", 128, 256, 64, group_m=8, num_warps=8, num_stages=3, use_tma=tma),
        "square_8": GemmPlan("fused", 128, 128, 64, group_m=8, num_warps=8, num_stages=4, use_tma=tma),
        "square_deep": GemmPlan("fused", 128, 128, 128, group_m=8, num_warps=8, num_stages=3, use_tma=tma),
        "low_wide": GemmPlan("fused", 64, 256, 64, group_m=8, num_warps=4, num_stages=4, use_tma=tma),
        "low_deep": GemmPlan("fused", 64, 128, 128, group_m=8, num_warps=4, num_stages=4, use_tma=tma),
        "small": GemmPlan("fused", 64, 64, 64, group_m=8, num_warps=4, num_stages=5, use_tma=tma),
    }
    plans = {"cublas": CUBLAS, **tilings(target), **further}
    return {name: plan for name, plan in plans.items() if _fits(plan, target)}


def _fits(plan: GemmPlan, target: Target) -> bool:
    try:
        check_plan(plan, 2, target)
    except ValueError:
        return False
    return True


def is_ahead(new: Timing, old: Timing) -> bool:
    """Beyond the noise of both. Eager timings prove nothing: they may be the host's."""
    apart = new.high_us < old.low_us and new.median_us < (1 - LEAST_GAIN) * old.median_us
    return apart and new.graphed and old.graphed


def choose(timings: Mapping[str, Timing]) -> str:
    """The fastest plan's name if it is ahead of cuBLAS, of equal ones the first by name; else "cublas"."""
    fused = sorted(name for name in timings if name != "cublas")
    best = min(fused, key=lambda name: timings[name].median_us, default="cublas")
    return best if best != "cublas" and is_ahead(timings[best], timings["cublas"]) else "cublas"


def key_of(work: Work) -> Key:
    return work.case["N"], work.case["K"], work.case["epilogue"]


def product_works() -> list[Work]:
    """One of each key and number of rows, the most important first."""
    works = sorted(real_work(discover_specs()["gemm_epilogue"]), key=importance_of)
    found: dict[tuple[Key, int], Work] = {}
    for work in works:
        if "implementation" not in work.case.sizes:
            found.setdefault((key_of(work), work.case["R"]), work)
    return list(found.values())


def sweep_products(works: Sequence[Work], plans: Mapping[str, GemmPlan], timer: Timer, end: float) -> Sweep:
    found = Sweep()
    for index, work in enumerate(works):
        if time.monotonic() >= end:
            found.left_out = [each.name for each in works[index:]]
            break
        try:
            timings = timer(work, plans, BUDGET_S * len(plans))
            name = choose(timings)
            if name != "cublas":
                again = timer(work, {"cublas": CUBLAS, name: plans[name]}, CONFIRM_S)
                timings |= again
                name = choose(again)
        except Exception as error:
            found.rows.append({"name": work.name, "problem": first_line(error)})
            print(f"{work.name}: {first_line(error)}", flush=True)
            continue
        found.chosen.setdefault(key_of(work), {})[work.case["R"]] = plans[name]
        for each, timing in timings.items():
            row = {"name": work.name, "plan": each, "chosen": each == name, "median_us": timing.median_us}
            found.rows.append({**row, "low_us": timing.low_us, "high_us": timing.high_us})
        cublas, best = timings["cublas"].median_us, timings[name].median_us
        print(f"{work.name:<50} {name:<12} {best:9.2f} us, cublas {cublas:9.2f} us, {cublas / best:5.2f}x", flush=True)
    return found


def build_entries(chosen: Mapping[Key, Mapping[int, GemmPlan]]) -> list[dict[str, Any]]:
    """The table's, in order; as few as say the same. None for what stays with cuBLAS, which is what no entry means."""
    entries = []
    for (n, k, epilogue), by_rows in sorted(chosen.items()):
        steps = sorted(by_rows.items())
        if steps[0][0] > 1:
            steps.insert(0, (steps[0][0] // 2, CUBLAS))
        while steps and steps[-1][1] == CUBLAS:
            steps.pop()
        for index, (m_max, plan) in enumerate(steps):
            if plan not in [following for _, following in steps[index + 1 : index + 2]]:
                shown = {"kind": "cublas"} if plan == CUBLAS else asdict(plan)
                entries.append({"m_max": m_max, "n": n, "k": k, "epilogue": epilogue, "plan": shown})
    return entries


def write_table(path: Path, entries: Sequence[Mapping[str, Any]], measured: Mapping[str, str], target: Target) -> None:
    """Whole or not at all, and only what the kernels can load; raises ValueError for anything else."""
    lines = ",\n  ".join(json.dumps(entry) for entry in entries)
    listed = f"[\n  {lines}\n ]" if entries else "[]"
    draft = path.with_name(f"{path.name}.new")
    draft.write_text(f'{{\n "measured": {json.dumps(measured)},\n "gemm_epilogue": {listed}\n}}\n', encoding="utf-8")
    try:
        load_table(draft, target)
    except ValueError:
        draft.unlink()
        raise
    os.replace(draft, path)


def measured_on(device: torch.device) -> dict[str, str]:
    found = environment(device)
    where = f"{found['device']}, driver {found['driver']}"
    return {
        "date": f"{found['date']} at commit {found['commit']}",
        "gpu": where,
        "triton": str(found["triton"]),
        "torch": str(found["torch"]),
    }


class DeviceTimer:
    """Times plans on a GPU, after each was compared with the reference."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._name = ""
        self._sets: list[dict[str, Any]] = []
        self._outs: list[torch.Tensor] = []
        self._expected: torch.Tensor | None = None

    def __call__(self, work: Work, plans: Mapping[str, GemmPlan], budget_s: float) -> dict[str, Timing]:
        if work.name != self._name:
            self._name, self._sets, self._outs, self._expected = "", [], [], None  # what was there makes room
            self._sets = make_rotated_inputs(work, self._device)
            self._expected, _ = run_reference(work, self._sets[0])
            assert self._expected is not None
            self._outs = [poisoned_like(self._expected, work.dtype) for _ in self._sets]
            self._name = work.name
        variants: dict[str, list[Callable[[], Any]]] = {}
        for name, plan in plans.items():
            try:
                variants[name] = self._calls(work, plan)
            except Exception as error:  # a compiler that gives up on a tiling
                if name == "cublas" or isinstance(error, WrongResultError):
                    raise
                print(f"  {work.name}: not {name}: {first_line(error)}", file=sys.stderr)
                if self._device.type == "cuda":
                    torch.cuda.synchronize(self._device)  # raises if the device takes no more work
        return time_variants(variants, self._device, budget_s=budget_s)

    def _calls(self, work: Work, plan: GemmPlan) -> list[Callable[[], Any]]:
        assert self._expected is not None
        pairs = zip(self._sets, self._outs, strict=True)
        calls = [partial(work.spec.launcher, **{**inputs, "plan": plan}, out=out) for inputs, out in pairs]
        self._outs[0].fill_(torch.nan)
        calls[0]()
        verdict = compare("the result", self._outs[0], self._expected, work.spec.tolerances[work.dtype])
        if verdict.problem:
            raise WrongResultError(f"{plan}: {verdict.problem}")
        return calls


def invented_times(work: Work, plans: Mapping[str, GemmPlan], budget_s: float) -> dict[str, Timing]:
    """The same for the same names, a tenth around what 500 TFLOP/s would take, and certain to a hundredth."""
    base = work.spec.cost(work.case, work.dtype).flops / 500e6
    times = {name: base * (0.9 + zlib.crc32(f"{work.name} {name}".encode()) % 200 / 1000) for name in plans}
    return {name: Timing(us, 0.99 * us, 1.01 * us, 100, None, graphed=True) for name, us in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    operations = ("gemm_epilogue", *RECOMMENDED)
    parser.add_argument("--only", action="append", choices=operations, metavar="OP", help=", ".join(operations))
    parser.add_argument("--budget-s", type=float, default=300, help="for everything (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="the table (default: kernels/plans/sm_XX.json of this GPU)")
    parser.add_argument("--dry-run", action="store_true", help="invented times, without a GPU; nothing is written")
    args = parser.parse_args()
    if args.dry_run and args.out:
        parser.error("--out: expected none with --dry-run, because invented times belong in no table")
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("expected a machine with a CUDA device, found none; --dry-run shows what would be measured")
    if args.budget_s <= 0:
        parser.error(f"--budget-s: expected seconds above 0, got {args.budget_s:g}")
    only, end = args.only or operations, time.monotonic() + args.budget_s
    device = torch.device("cpu" if args.dry_run else "cuda")
    target = TARGETS[90] if args.dry_run else target_of(device)
    timer: Timer = invented_times if args.dry_run else DeviceTimer(device)

    with torch.inference_mode():
        found = Sweep()
        if "gemm_epilogue" in only:
            found = sweep_products(product_works(), candidates(target), timer, end)
        if not args.dry_run:
            rest = [name for name in only if name in RECOMMENDED]
            rows, left_out = sweep_launches(rest, device, end)
            found = replace(found, rows=[*found.rows, *rows], left_out=[*found.left_out, *left_out])
    if "gemm_epilogue" in only:
        entries = build_entries(found.chosen)
        path = args.out or FOLDER / f"sm_{target.capability}.json"
        if args.dry_run:
            print(f"{len(entries)} entries from invented times; {path.name} stays as it is")
        elif any(row["name"].startswith("gemm_epilogue/") for row in found.rows if "problem" in row):
            print(f"{path} stays as it is, because of what failed above")
        else:
            write_table(path, entries, measured_on(device), target)
            print(f"{path}: {len(entries)} entries")
    if found.left_out:
        print(f"left out, {len(found.left_out)}, for want of time: {', '.join(found.left_out)}")
    document = result_document("tune", found.rows, device)
    print(json.dumps(document | {"dry_run": args.dry_run, "left_out": found.left_out}, allow_nan=False))
    return int(any("problem" in row for row in found.rows))


if __name__ == "__main__":
    sys.exit(main())

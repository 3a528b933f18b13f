"""Finds the fastest launch plans on this GPU and writes the table of plans that the kernels load.

    python bench/tune.py [--only OP]... [--budget-s 300] [--out FILE]      FILE: kernels/plans/sm_90.json or its like
    python bench/tune.py --dry-run                                          invented times; nothing is written

`python bench/prebuild.py --what tune` compiles all candidates beforehand, in many processes; without it most of the
time goes to compiling them here, one after the other.

A plan other than the baseline is chosen only if it is faster beyond doubt: in a sweep, and in a second run of only
these two, its slow samples (90th percentile) are below the baseline's fast ones (10th), and its median is lower by
LEAST_GAIN. A product's baseline is cuBLAS and an element-wise kernel, that of unshuffle_project is `unshuffle_norm` and
the product's plan of the table as it was, that of vit_attention its default plan.

Every plan is compared with the reference before it is timed. A plan that is wrong is never chosen for that key of the
table; a key whose baseline is wrong, or whose measurement fails, gets no entry. Both are named, the exit code is 1, and
the rest of the table is written. It holds only what this run measured, so give it time for everything. For gemv,
gemv_qkv and the other attentions, whose plans are functions, the fastest plan is only printed.
"""

import argparse
import json
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from options import seconds
from tune_candidates import TUNED, Key, Plans, Tuned
from tune_plans import RECOMMENDED, sweep_launches
from tune_table import attention_entries, measured_on, product_entries, projection_entries, write_table

from internvl_rt.bench.kernel_cases import Work, compare, first_line, make_rotated_inputs, poisoned_like, run_reference
from internvl_rt.bench.record import result_document
from internvl_rt.bench.timing import Timing, time_variants
from internvl_rt.kernels._launch import TARGETS, Target, target_of
from internvl_rt.kernels._plans import FOLDER

LEAST_GAIN = 0.02  # of the baseline's time; a smaller gain is not worth compiling another kernel
BUDGET_S = 0.03  # seconds of a plan's samples in the sweep
CONFIRM_S = 0.3  # seconds for the two plans of the second run


class Measured(NamedTuple):
    """By the plans' names: the times, and what is wrong with plans whose result differs from the reference."""

    timings: dict[str, Timing]
    wrong: dict[str, str]


Timer = Callable[[Work, Plans, str, float], Measured]  # takes the name of the baseline, and the seconds for all samples


@dataclass(slots=True)
class Sweep:
    """The findings for one operation, and the document's row for every timing and every problem."""

    names: dict[Key, dict[int, str]] = field(default_factory=dict)  # the chosen plan, by size
    plans: dict[Key, Plans] = field(default_factory=dict)
    wrong: set[tuple[Key, str]] = field(default_factory=set)
    failed: set[Key] = field(default_factory=set)
    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def chosen(self, baseline: str) -> dict[Key, dict[int, Any]]:
        """Plans by key and size: the baseline instead of a wrong plan, and no key whose measurement failed."""
        return {
            key: {
                size: self.plans[key][baseline if (key, name) in self.wrong else name] for size, name in by_size.items()
            }
            for key, by_size in self.names.items()
            if key not in self.failed
        }


class WrongResultError(Exception):
    """The result of the baseline differs from the reference."""


def is_ahead(new: Timing, old: Timing) -> bool:
    """Whether `new` is faster beyond the noise of both. Eager timings prove nothing: they may be the host's."""
    apart = new.high_us < old.low_us and new.median_us < (1 - LEAST_GAIN) * old.median_us
    return apart and new.graphed and old.graphed


def choose(timings: Mapping[str, Timing], baseline: str) -> str:
    """Returns the fastest plan's name (of equal ones the first by name) if it is ahead of the baseline's, else that."""
    others = sorted(name for name in timings if name != baseline)
    best = min(others, key=lambda name: timings[name].median_us, default=baseline)
    return best if best != baseline and is_ahead(timings[best], timings[baseline]) else baseline


def sweep(tuned: Tuned, works: Sequence[Work], target: Target, timer: Timer, end: float) -> Sweep:
    """Measures until the time is up or Ctrl-C; keeps what was found by then."""
    found = Sweep()
    try:
        for work in works:
            if time.monotonic() >= end:
                break
            _sweep_one(tuned, work, target, timer, found)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    reached = {row["name"] for row in found.rows}
    found.left_out = [work.name for work in works if work.name not in reached]
    return found


def _sweep_one(tuned: Tuned, work: Work, target: Target, timer: Timer, found: Sweep) -> None:
    key, baseline = tuned.key(work), tuned.baseline
    plans = tuned.plans(work, target)
    found.plans[key] = plans

    def measure(names: Sequence[str], budget_s: float) -> dict[str, Timing]:
        right = {name: plans[name] for name in names if (key, name) not in found.wrong}
        timings, wrong = timer(work, right, baseline, budget_s)
        for each, problem in wrong.items():
            found.wrong.add((key, each))
            found.rows.append({"name": work.name, "plan": each, "problem": problem})
            print(f"{work.name}: {each} is wrong: {problem}", file=sys.stderr, flush=True)
        return timings

    try:
        timings = measure(list(plans), BUDGET_S * len(plans))
        name = choose(timings, baseline)
        if name != baseline:
            again = measure([baseline, name], CONFIRM_S)
            timings |= again
            name = choose(again, baseline)
    except Exception as error:
        found.failed.add(key)
        found.rows.append({"name": work.name, "problem": first_line(error)})
        print(f"{work.name}: {first_line(error)}", file=sys.stderr, flush=True)
        return
    found.names.setdefault(key, {})[tuned.size(work)] = name
    for each, timing in timings.items():
        row = {"name": work.name, "plan": each, "chosen": each == name, "median_us": timing.median_us}
        found.rows.append({**row, "low_us": timing.low_us, "high_us": timing.high_us})
    old, best = timings[baseline].median_us, timings[name].median_us
    print(f"{work.name:<50} {name:<27} {best:9.2f} us, {baseline} {old:9.2f} us, {old / best:5.2f}x", flush=True)


class DeviceTimer:
    """Times plans on a GPU, after comparing each with the reference."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._name = ""
        self._sets: list[dict[str, Any]] = []
        self._outs: list[torch.Tensor] = []
        self._expected: torch.Tensor | None = None

    def __call__(self, work: Work, plans: Plans, baseline: str, budget_s: float) -> Measured:
        if work.name != self._name:
            self._name, self._sets, self._outs, self._expected = "", [], [], None  # frees the old tensors
            self._sets = make_rotated_inputs(work, self._device)
            self._expected, _ = run_reference(work, self._sets[0])
            assert self._expected is not None
            self._outs = [poisoned_like(self._expected, work.dtype) for _ in self._sets]
            self._name = work.name
        variants: dict[str, list[Callable[[], Any]]] = {}
        wrong: dict[str, str] = {}
        for name, plan in plans.items():
            pairs = zip(self._sets, self._outs, strict=True)
            calls = [partial(work.spec.launcher, **{**inputs, "plan": plan}, out=out) for inputs, out in pairs]
            try:
                problem = self._problem(work, calls[0])
            except Exception as error:  # for example a compiler that fails on a tiling
                if name == baseline:
                    raise
                print(f"  {work.name}: not {name}: {first_line(error)}", file=sys.stderr)
                if self._device.type == "cuda":
                    torch.cuda.synchronize(self._device)  # raises if the device takes no more work
                continue
            if not problem:
                variants[name] = calls
            elif name == baseline:
                raise WrongResultError(f"{name}: {problem}")
            else:
                wrong[name] = problem
        return Measured(time_variants(variants, self._device, budget_s=budget_s), wrong)

    def _problem(self, work: Work, call: Callable[[], Any]) -> str:
        """What is wrong with the result of a call on the first set of inputs, or ''."""
        assert self._expected is not None
        self._outs[0].fill_(torch.nan)
        call()
        return compare("the result", self._outs[0], self._expected, work.spec.tolerances[work.dtype]).problem


def invented_times(work: Work, plans: Plans, baseline: str, budget_s: float) -> Measured:
    """Invents times from the names alone: within a tenth of the time at 500 TFLOP/s, with percentiles 1 % away."""
    base = work.spec.cost(work.case, work.dtype).flops / 500e6
    times = {name: base * (0.9 + zlib.crc32(f"{work.name} {name}".encode()) % 200 / 1000) for name in plans}
    return Measured({name: Timing(us, 0.99 * us, 1.01 * us, 100, None, graphed=True) for name, us in times.items()}, {})


def entries_of(found: Mapping[str, Sweep]) -> dict[str, list[dict[str, Any]]]:
    """The table's lists by operation; the list of an operation that was not swept is empty."""
    chosen = {name: found.get(name, Sweep()).chosen(tuned.baseline) for name, tuned in TUNED.items()}
    attention, baseline = found.get("vit_attention", Sweep()), TUNED["vit_attention"].baseline
    defaults = {key: plans[baseline] for key, plans in attention.plans.items()}
    return {
        "gemm_epilogue": product_entries(chosen["gemm_epilogue"]),
        "unshuffle_project": projection_entries(chosen["unshuffle_project"]),
        "vit_attention": attention_entries(chosen["vit_attention"], defaults),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    operations = (*TUNED, *RECOMMENDED)
    parser.add_argument("--only", action="append", choices=operations, metavar="OP", help=", ".join(operations))
    parser.add_argument("--budget-s", type=seconds, default=300, help="for everything (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="the table (default: kernels/plans/sm_XX.json of this GPU)")
    parser.add_argument("--commit", help="what is measured, where git does not say so")
    parser.add_argument("--dry-run", action="store_true", help="invented times, without a GPU; nothing is written")
    args = parser.parse_args()
    if args.dry_run and args.out:
        parser.error("--out: expected none with --dry-run, because invented times belong in no table")
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("expected a machine with a CUDA device, found none; --dry-run shows what would be measured")
    only, end = args.only or operations, time.monotonic() + args.budget_s
    device = torch.device("cpu" if args.dry_run else "cuda")
    target = TARGETS[90] if args.dry_run else target_of(device)
    timer: Timer = invented_times if args.dry_run else DeviceTimer(device)
    path = args.out or FOLDER / f"sm_{target.capability}.json"

    found: dict[str, Sweep] = {}
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    with torch.inference_mode():
        for name, tuned in TUNED.items():
            if name not in only:
                continue
            found[name] = sweep(tuned, tuned.works(), target, timer, end)
            rows += found[name].rows
            left_out += found[name].left_out
            entries = entries_of(found)
            counts = ", ".join(f"{len(each)} entries for {each_name}" for each_name, each in entries.items())
            if args.dry_run:
                print(f"{counts} from invented times; {path.name} stays as it is")
            else:  # after each operation, so that what was found is kept if the rest is cut off
                write_table(path, entries, measured_on(device, args.commit), target)
                print(f"{path}: {counts}", flush=True)
        if not args.dry_run:
            more_rows, more_left_out = sweep_launches([name for name in only if name in RECOMMENDED], device, end)
            rows += more_rows
            left_out += more_left_out
    if left_out:
        print(f"left out, {len(left_out)}, for want of time: {', '.join(left_out)}")
    document = result_document("tune", rows, device)
    print(json.dumps(document | {"dry_run": args.dry_run, "left_out": left_out}, allow_nan=False))
    return int(any("problem" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())

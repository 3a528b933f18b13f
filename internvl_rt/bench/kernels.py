"""`internvl-rt bench kernels` measures kernels at real sizes: time, rates, share of the measured roof, and what a user
would run instead.

The roof is measured in the same run: the time that the bytes take at the rate of a large copy, or the operations at the
rate of a large product, whichever is longer. An operation that writes little can be somewhat faster than a copy and so
exceed 100 %. `copy us` is the time of a copy of as many bytes; a kernel near it waits for latency, not for bandwidth.

Each kernel is compared with its reference before it is timed, and the result of its graph once more afterwards. A
kernel that is wrong or fails has a row without a time, and the exit code is 1. The most important cases come first;
cases for which no time is left are named.

Without a GPU the references run, on small cases: this shows that the bench works, and says nothing about kernels. With
TRITON_INTERPRET=1 the kernels are checked as well.
"""

import argparse
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import Any

import numpy as np
import torch

from internvl_rt.bench.attention_baselines import Alternative
from internvl_rt.bench.kernel_baselines import alternatives, forget_compiled
from internvl_rt.bench.kernel_cases import (
    Work,
    build_launch,
    check_kernel,
    dtype_name,
    first_line,
    make_rotated_inputs,
    plan_work,
    relative_error,
)
from internvl_rt.bench.record import check_plots, print_document
from internvl_rt.bench.roofline import measure_roofline, rows_of_roofline
from internvl_rt.bench.timing import Timing, time_variants
from internvl_rt.engine.loading import choose_device
from internvl_rt.errors import RequestError
from internvl_rt.kernels._contract import Cost
from internvl_rt.kernels._launch import is_interpreted

Row = dict[str, Any]
BUDGET_S = {"cuda": 0.06, "cpu": 0.02}  # seconds of samples for each variant
SLOW_START_S = 25.0  # seconds that one alternative may take to compile
SLOW_START_SHARE = 0.25  # share of the budget that all of them together may take
NEAR = 0.05  # a relative RMS difference, small enough to see that an alternative computes the same thing
PARTIAL = "cublas alone"  # an alternative that does less than the kernel
TIMED = "what is asked for"  # a name for the timer, which may print it


@dataclass(slots=True)
class Limits:
    """When to stop, how much may still be spent on compiling alternatives, and which of them are wanted."""

    end: float  # by time.monotonic()
    slow_start_s: float
    baselines: tuple[str, ...] = ()  # parts of the names of the alternatives that are measured; empty is all

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self.end

    def includes(self, baseline: str) -> bool:
        return not self.baselines or any(part in baseline for part in self.baselines)


@dataclass(slots=True)
class Table:
    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    num_problems: int = 0


def roof_us(cost: Cost, dtype: torch.dtype, roofline: Mapping[str, Any]) -> tuple[float, str]:
    """The least possible time, and what limits it."""
    by_bytes = cost.bytes / max(roofline["copy_gb_s"].values()) / 1e3
    rate = roofline["tflops"].get(dtype_name(dtype))
    by_flops = cost.flops / rate / 1e6 if rate else 0.0
    return (by_flops, "compute") if by_flops > by_bytes else (by_bytes, "bandwidth")


def copy_us(num_bytes: int, roofline: Mapping[str, Any]) -> float:
    """The time of a copy that moves `num_bytes`, interpolated between the measured copies."""
    sizes = sorted((int(size), rate) for size, rate in roofline["copy_gb_s"].items())
    largest, rate = sizes[-1]
    if num_bytes >= largest:
        return float(num_bytes / rate / 1e3)
    return float(np.interp(num_bytes, [size for size, _ in sizes], [size / each / 1e3 for size, each in sizes]))


def build_row(work: Work, timing: Timing, roofline: Mapping[str, Any], **more: Any) -> Row:
    cost = work.spec.cost(work.case, work.dtype)
    roof, kind = roof_us(cost, work.dtype, roofline)
    row: Row = {
        "name": work.name,
        "median_us": timing.median_us,
        "low_us": timing.low_us,
        "high_us": timing.high_us,
        "num_samples": timing.num_samples,
        "graphed": timing.graphed,
        "bytes": cost.bytes,
        "flops": cost.flops,
        "gb_s": cost.bytes / timing.median_us / 1e3,
        "tflops": cost.flops / timing.median_us / 1e6,
        "roof_us": roof,
        "roof_percent": 100 * roof / timing.median_us,
        "roof_kind": kind,
        "copy_us": copy_us(cost.bytes, roofline),
    }
    if timing.sm_clock_mhz is not None:
        row["sm_clock_mhz"] = timing.sm_clock_mhz
    return row | more


def measure_reference(work: Work, device: torch.device, roofline: Mapping[str, Any]) -> list[Row]:
    """For runs without a GPU: times the reference. The kernel is checked if Triton interprets it, but never timed."""
    inputs = make_rotated_inputs(work, device)[0]
    more: Row = {"baseline": "reference"}
    if is_interpreted():
        verdict, _ = check_kernel(work, inputs, device)
        if verdict.problem:
            return [{"name": work.name, "problem": f"wrong: {verdict.problem}"}]
        more["rms_error"] = verdict.rms_error
    timing = time_variants({TIMED: partial(work.spec.reference, **inputs)}, device, budget_s=BUDGET_S["cpu"])[TIMED]
    return [build_row(work, timing, roofline, **more)]


def measure_kernel(work: Work, device: torch.device, roofline: Mapping[str, Any], limits: Limits) -> list[Row]:
    """A row for the kernel, then a row for each alternative that takes these inputs and computes the same."""
    sets = make_rotated_inputs(work, device)
    verdict, check = check_kernel(work, sets[0], device)
    if verdict.problem:
        return [{"name": work.name, "problem": f"wrong: {verdict.problem}"}]
    expected = check.expected
    outs = [check.out, *(check.make_out() for _ in sets[1:])]
    variants: dict[str, list[Callable[[], Any]]] = {
        TIMED: [build_launch(work, inputs, out, device) for inputs, out in zip(sets, outs, strict=True)]
    }
    for alternative in alternatives(work.spec.name):
        if not limits.includes(alternative.name):
            continue
        try:
            variants[alternative.name] = prepare_alternative(alternative, sets, expected, limits)
        except Exception as error:  # of any library; an alternative that cannot run is left out, and this says why
            print(f"  {work.name}: not {alternative.name}: {first_line(error)}", file=sys.stderr)
        check.restore()
    last = {TIMED: check.restore}
    timings = time_variants(variants, device, budget_s=BUDGET_S["cuda"] * len(variants), before_last=last)
    again = check.verdict()
    if again.problem:
        return [{"name": work.name, "problem": f"wrong when it is replayed: {again.problem}"}]
    rows = [build_row(work, timings.pop(TIMED), roofline, rms_error=verdict.rms_error)]
    for name, timing in timings.items():
        rows.append(build_row(work, timing, roofline, baseline=name, **{"partial": True} if name == PARTIAL else {}))
    return rows


def prepare_alternative(
    alternative: Alternative, sets: list[dict[str, Any]], expected: Any, limits: Limits
) -> list[Callable[[], Any]]:
    """The alternative's call for each set of inputs; raises what it raises, and ValueError if its result differs."""
    start = time.monotonic()
    if alternative.slow_start and limits.slow_start_s <= 0:
        raise TimeoutError("no time is left for compiling")
    try:
        with time_limit(SLOW_START_S if alternative.slow_start else 0):
            if alternative.slow_start:
                forget_compiled()
            run, as_reference = alternative.prepare(sets[0])
            result = run()
    finally:
        if alternative.slow_start:
            limits.slow_start_s -= time.monotonic() - start
    if expected is not None and as_reference is not None:
        error = relative_error(as_reference(result), expected)
        if not error <= NEAR:
            raise ValueError(f"its result differs by {error:.2g}")
    return [run, *(alternative.prepare(inputs)[0] for inputs in sets[1:])]


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the code inside once it has taken `seconds`, as soon as Python runs again; 0: no limit."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not ready after {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def measure_all(works: Sequence[Work], device: torch.device, roofline: Mapping[str, Any], limits: Limits) -> Table:
    """Measures until the time is up or Ctrl-C; keeps what was measured by then."""
    table = Table()
    try:
        for work in works:
            if limits.is_over:
                break
            rows = measure(work, device, roofline, limits)
            table.rows += rows
            table.num_problems += sum("problem" in row for row in rows)
            if rows:
                print(render(rows), flush=True)
            if device.type == "cuda" and not is_alive(device):
                print("the device takes no more work: what is left is left out", file=sys.stderr)
                break
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    measured = {row["name"] for row in table.rows}
    table.left_out = [work.name for work in works if work.name not in measured]
    return table


def measure(work: Work, device: torch.device, roofline: Mapping[str, Any], limits: Limits) -> list[Row]:
    """Never raises for what a kernel does, so that the others are measured. Returns no rows if memory is too small."""
    try:
        with torch.inference_mode():
            if device.type == "cuda":
                return measure_kernel(work, device, roofline, limits)
            return measure_reference(work, device, roofline)
    except torch.OutOfMemoryError as error:
        print(f"  {work.name}: left out: {first_line(error)}", file=sys.stderr)
        return []
    except Exception as error:
        return [{"name": work.name, "problem": f"failed: {first_line(error)}"}]


def is_alive(device: torch.device) -> bool:
    """Whether the device still works: after an illegal access every further call fails."""
    try:
        torch.cuda.synchronize(device)
        if torch.cuda.memory_reserved(device) > torch.cuda.get_device_properties(device).total_memory // 2:
            torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


HEAD = (
    f"{'operation/case/dtype':<58} {'us':>9} {'low':>9} {'high':>9} {'GB/s':>7} {'TFLOP/s':>8} {'roof':>6}"
    f" {'copy us':>8}  alternatives, and how many times as long"
)


def render(rows: Sequence[Row]) -> str:
    """One line for a case and its alternatives."""
    first, *others = rows
    if "problem" in first:
        return f"{first['name']:<58} {first['problem']}"
    times = "  ".join(f"{row['baseline']} {row['median_us'] / first['median_us']:.2f}" for row in others)
    what = f"({first['baseline']}) " if "baseline" in first else ""
    return (
        f"{first['name']:<58} {first['median_us']:9.2f} {first['low_us']:9.2f} {first['high_us']:9.2f}"
        f" {first['gb_s']:7.0f} {first['tflops']:8.2f} {first['roof_percent']:5.1f}% {first['copy_us']:8.2f}"
        f"  {what}{times}"
    )


def furthest(rows: Sequence[Row]) -> str:
    """The kernel with most to gain."""
    own = [row for row in rows if "roof_percent" in row and "baseline" not in row]
    if not own:
        return "no kernel was timed"
    row = min(own, key=lambda each: each["roof_percent"])
    return f"furthest from its roof ({row['roof_kind']}): {row['name']}, {row['roof_percent']:.1f}%"


def run(args: argparse.Namespace) -> int:
    """Takes the arguments of `internvl-rt bench kernels`. Raises InternVLError; returns 1 where a kernel was wrong."""
    start_s, device = time.monotonic(), choose_device(args.device)
    check_plots(args.plots)
    works = plan_work(device, args.patterns, quick=args.quick)
    if not works:
        asked = " ".join(map(repr, args.patterns))
        raise RequestError(f"no case matches {asked}; internvl-rt kernels lists the operations and their cases")
    check_baselines(args.baseline, {work.spec.name for work in works})
    may_compile = not (args.quick or args.no_compile)
    limits = Limits(
        start_s + args.budget_s, SLOW_START_SHARE * args.budget_s if may_compile else 0, tuple(args.baseline)
    )
    print(HEAD)
    roofline = measure_roofline(device, quick=True)
    table = measure_all(works, device, roofline, limits)
    print(furthest(table.rows))
    if table.left_out:
        print(f"left out, {len(table.left_out)}, for want of time or memory: {', '.join(table.left_out)}")
    files: dict[str, Any] = {"file": args.json, "plots": args.plots, "roofline": rows_of_roofline(roofline)}
    print_document("kernels", table.rows, device, **files, left_out=table.left_out)
    return int(table.num_problems > 0)


def check_baselines(asked: Sequence[str], operations: Collection[str]) -> None:
    """Raises RequestError for a part of a name that no alternative to these operations has; "none" is none of them."""
    known = sorted({each.name for operation in operations for each in alternatives(operation)})
    for part in asked:
        if part != "none" and not any(part in name for name in known):
            raise RequestError(f"no baseline {part!r} here; known are {', '.join(known)}, and none for none of them")

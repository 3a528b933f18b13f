"""Compiles kernels in many processes into Triton's cache on disk; later runs would compile them one after the other.

    python bench/prebuild.py [--what models,contract,tune] [--only OP]... [--workers N] [--budget-s S] [--target 90]

models: every kernel of a real model, in bfloat16; contract: those of the test cases, in every dtype; tune: every plan
that bench/tune.py tries. Kernels that do not differ are compiled once. The first process plans every launch on tensors
of the device "meta" and asks Triton for the key of each; the others do all that a launch does but the launch itself.
So the GPU is only asked which one it is; without a GPU `--target` says it.

A tuner's candidate that cannot be compiled is only reported; any other failure gives exit code 1. Kernels for which no
time is left are compiled when they are launched. The last line is a document of part "build".
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

import torch
import triton
from options import count, seconds
from triton.backends.nvidia.driver import CudaDriver
from tune_candidates import TUNED

from internvl_rt.bench.kernel_cases import Work, dtype_name, first_line, real_work
from internvl_rt.bench.record import result_document
from internvl_rt.kernels._check import arguments_of
from internvl_rt.kernels._contract import Case
from internvl_rt.kernels._launch import TARGETS, Launch, Target, options_of, target_of
from internvl_rt.kernels.catalogue import discover_specs

WHAT = ("models", "contract", "tune")
META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class Build:
    """One kernel: launch `index` of the plan of an operation's case, as a value that can be sent to another process."""

    what: str
    operation: str
    case: Case
    dtype: torch.dtype
    index: int = 0
    plan: Any = None  # a plan of the tuner instead of the table's

    @property
    def name(self) -> str:
        how = "" if self.plan is None else f" by {self.plan}"
        return f"{self.operation}/{self.case.name}/{dtype_name(self.dtype)}[{self.index}]{how}"


class PlanningDriver(CudaDriver):
    """Triton's driver without a device: it names the device that is planned for and cannot launch."""

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.get_device_capability = lambda *_: divmod(target.capability, 10)
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda *_: 0


def wanted(what: Sequence[str], only: Sequence[str], target: Target) -> Iterator[Build]:
    """Yields all cases of the kinds in `what`, each with index 0; if `only` names operations, only theirs."""
    specs = {name: spec for name, spec in discover_specs().items() if not only or name in only}
    for spec in specs.values() if "models" in what else ():
        yield from (_of("models", work) for work in real_work(spec, target.capability))
    for name, tuned in TUNED.items() if "tune" in what else ():
        for work in tuned.works() if name in specs else ():
            yield from (_of("tune", work, plan) for plan in tuned.plans(work, target).values())
    for spec in specs.values() if "contract" in what else ():
        for dtype in spec.tolerances:
            yield from (_of("contract", Work(spec, case, dtype)) for case in spec.test_cases)


def _of(what: str, work: Work, plan: Any = None) -> Build:
    return Build(what, work.spec.name, work.case, work.dtype, plan=plan)


def launches_of(build: Build, target: Target) -> tuple[Launch, ...]:
    """The launches of the plan whose grid is not empty."""
    spec = discover_specs()[build.operation]
    arguments = arguments_of(spec, build.case, build.dtype, META)
    if build.plan is not None:
        arguments["plan"] = build.plan
    return tuple(launch for launch in spec.plan(**arguments, target=target) if 0 not in launch.grid)


def compile_launch(launch: Launch) -> Any:
    """Compiles as a launch does; returns None if a hook of Triton's prevented it."""
    return launch.kernel.warmup(grid=launch.grid, **launch.args, **launch.constexprs, **options_of(launch))


def distinct(builds: Iterable[Build], target: Target, seen: set[object]) -> Iterator[Build]:
    """Yields in order one build of each kernel that is not in `seen`, told apart by Triton's keys; compiles nothing."""
    triton.runtime.driver.set_active(PlanningDriver(target))
    asked: list[object] = []

    def note(*, key: object, fn: Any, **_: object) -> bool:
        asked.append((fn.module, fn.name, key))
        return True  # tells Triton that there is nothing to compile

    triton.knobs.runtime.jit_cache_hook = note
    try:
        for build in builds:
            for index, launch in enumerate(launches_of(build, target)):
                compile_launch(launch)
                kernel = asked.pop()
                if kernel not in seen:
                    seen.add(kernel)
                    yield replace(build, index=index)
    finally:
        triton.knobs.runtime.jit_cache_hook = None


def start_worker(target: Target) -> None:
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(PlanningDriver(target))


def run_build(build: Build, target: Target) -> str:
    """Compiles the kernel; returns what went wrong, or ''."""
    try:
        kernel = compile_launch(launches_of(build, target)[build.index])
        triton.runtime.driver.active.launcher_cls(kernel.src, kernel.metadata)  # triton 3.6 compiles its launcher too
    except Exception as error:
        return first_line(error)
    return ""


def run_all(builds: Iterable[Build], target: Target, workers: int, end: float | None) -> list[tuple[Build, str | None]]:
    """Each build with what went wrong ('': nothing; None: it was not begun before `end`, by time.monotonic())."""
    context = get_context("forkserver")  # a fork of this process could copy locks that its threads hold
    context.set_forkserver_preload(["torch", "triton.backends.nvidia.compiler"])
    with ProcessPoolExecutor(workers, context, initializer=start_worker, initargs=(target,)) as pool:
        try:
            futures = [(build, pool.submit(run_build, build, target)) for build in builds]  # started while planning
            wait([future for _, future in futures], timeout=None if end is None else max(0.0, end - time.monotonic()))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return [(build, None if future.cancelled() else problem_of(future)) for build, future in futures]


def problem_of(future: Future[str]) -> str:
    error = future.exception()  # set for a build whose process died
    return first_line(error) if error else future.result()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", default=",".join(WHAT), help="separated by commas (default: %(default)s)")
    parser.add_argument("--only", action="append", default=[], choices=sorted(discover_specs()), metavar="OP")
    parser.add_argument("--workers", type=count, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    parser.add_argument("--budget-s", type=seconds, help="after which none is begun (default: no limit)")
    parser.add_argument("--target", type=int, choices=TARGETS, help="compute capability, without a GPU")
    args = parser.parse_args()
    what = args.what.split(",")
    if unknown := sorted(set(what) - set(WHAT)):
        parser.error(f"--what: expected some of {', '.join(WHAT)}, got {unknown[0]!r}")
    if triton.knobs.runtime.interpret:
        parser.error("expected Triton's compiler, got its interpreter: unset TRITON_INTERPRET")
    if args.target is None and not torch.cuda.is_available():
        parser.error("expected a machine with a CUDA device, found none; --target says what to compile for")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # then the workers are ended as well
    start = time.monotonic()
    target = target_of(torch.device("cuda")) if args.target is None else TARGETS[args.target]
    end = None if args.budget_s is None else start + args.budget_s
    done = run_all(distinct(wanted(what, args.only, target), target, set()), target, args.workers, end)
    wall_s = time.monotonic() - start

    rows: list[dict[str, Any]] = []
    for each in what:
        problems = [(build, problem) for build, problem in done if build.what == each]
        for build, problem in problems:
            if problem:
                print(f"{each}: {build.name}: {problem}", file=sys.stderr)
        counts = {"kernels": len(problems), "failed": sum(bool(problem) for _, problem in problems)}
        counts["left_out"] = sum(problem is None for _, problem in problems)
        rows.append({"what": each, **counts, "workers": args.workers, "wall_s": wall_s})
    built = sum(problem == "" for _, problem in done)
    print(f"{built} of {len(done)} kernels for sm_{target.capability} are in Triton's cache after {wall_s:.1f} s")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps(result_document("build", rows, device), allow_nan=False))
    return int(any(row["failed"] for row in rows if row["what"] != "tune"))


if __name__ == "__main__":
    sys.exit(main())

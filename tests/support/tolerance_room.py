"""Measures how much of its tolerances each operation uses, over many seeds.

    python tests/support/tolerance_room.py --seeds 1000 [--operations gemv swiglu] [--dtypes bfloat16] [--interpreter]

Prints, for each operation and data type, the largest share of the elements' limit and of the rms limit that a test
case used, with the case and the seed, and how many of the runs failed. The random numbers are those of CUDA and the
roundings those of the kernel (support/emulated.py); `--interpreter` runs the kernels themselves, which takes a hundred
times longer. A mark shows a row that uses more than 80 % of a tolerance: widen the tolerance, with the reason on its
line, or make the kernel more exact. Exits with 1 when a run failed.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads this when it is imported
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from internvl_rt.kernels._check import deviation
from internvl_rt.kernels._contract import Case
from internvl_rt.kernels.catalogue import discover_specs
from support.contract import clone, draw_inputs, expected_results, run_case
from support.emulated import EMULATED
from support.hardware_arithmetic import hardware_arithmetic

SPECS = discover_specs()
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ENOUGH = 0.8  # share of a tolerance; what uses more is marked
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Used:
    """The largest share of one limit that was used, and in which case and seed."""

    share: float
    place: str


@dataclass(frozen=True, slots=True)
class Room:
    element: Used
    rms: Used
    runs: int
    failures: int

    def row(self, name: str) -> str:
        marked = " <--" if max(self.element.share, self.rms.share) > ENOUGH else ""
        used = " ".join(f"{each.share:9.2f} {each.place:32}" for each in (self.element, self.rms))
        return f"{name:28} {used} {self.runs:8} {self.failures:8}{marked}"


HEADER = f"{'operation':28} {'element':>9} {'case, seed':32} {'rms':>9} {'case, seed':32} {'runs':>8} {'failed':>8}"


def room_of_case(operation: str, case: Case, dtype: torch.dtype, seeds: range, interpreter: bool) -> Room:
    spec = SPECS[operation]
    element = rms = Used(0.0, "")
    failures = 0
    for seed in seeds:
        inputs = draw_inputs(spec, case, dtype, CPU, seed)
        if interpreter:
            with hardware_arithmetic():
                pairs = run_case(spec, inputs, dtype)
        else:
            expected = expected_results(spec, inputs, dtype)
            pairs = list(zip(EMULATED[operation](**clone(inputs)), expected, strict=True))
        shares = [deviation(actual, wanted, spec.tolerance_of(actual, dtype)) for actual, wanted in pairs]
        place = f"{case.name}, {seed}"
        element = max(element, *(Used(each.element, place) for each in shares), key=lambda used: used.share)
        rms = max(rms, *(Used(each.rms, place) for each in shares), key=lambda used: used.share)
        failures += any(each.share > 1 for each in shares)
    return Room(element, rms, len(seeds), failures)


def room_of(rooms: Sequence[Room]) -> Room:
    """Combines the rooms of all cases into one."""
    return Room(
        max((room.element for room in rooms), key=lambda used: used.share),
        max((room.rms for room in rooms), key=lambda used: used.share),
        sum(room.runs for room in rooms),
        sum(room.failures for room in rooms),
    )


def report(options: argparse.Namespace, run_all: Callable[..., Iterable[Room]]) -> int:
    """Prints each row as soon as it is known and returns how many runs failed; `run_all` is map or a pool's map."""
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    print(HEADER, flush=True)
    failures = 0
    for operation in options.operations:
        cases = [case for case in SPECS[operation].test_cases if case.name.startswith(options.cases)]
        for name in options.dtypes if cases else ():
            of_case = partial(room_of_case, operation, dtype=DTYPES[name], seeds=seeds, interpreter=options.interpreter)
            room = room_of(list(run_all(of_case, cases)))
            print(room.row(f"{operation} {name}"), flush=True)
            failures += room.failures
    return failures


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--operations", nargs="*", choices=EMULATED, default=list(EMULATED))
    parser.add_argument("--dtypes", nargs="*", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--cases", default="", help="only those whose name begins like this")
    parser.add_argument("--interpreter", action="store_true", help="the kernels themselves, in Triton's interpreter")
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args(arguments)
    if options.processes == 1:
        return int(report(options, map) > 0)
    with ProcessPoolExecutor(options.processes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return int(report(options, pool.map) > 0)


if __name__ == "__main__":
    sys.exit(main())

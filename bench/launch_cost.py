"""Measures what launching each operation costs the host: checks, plan and Triton's launcher. It needs no GPU.

    python bench/launch_cost.py [OPERATION ...]

Triton's own launcher runs on a stand-in for the driver, which launches nothing and returns at once (a real driver takes
2 to 3 us more). CUDA graphs avoid these costs; prefills of more than 2,048 tokens pay them in every layer. Each time is
the least of five means, because other work of the machine can only add to it. `gemm_epilogue` is left out: without a
plan in a table its product is torch's, which would run here.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from internvl_rt.kernels._check import arguments_of
from internvl_rt.kernels._launch import run
from internvl_rt.kernels.catalogue import discover_specs
from support.fake_driver import TARGET, fake_environment, use_fake_driver
from support.specs import smallest_model_case

ROUNDS, CALLS = 5, 200


def microseconds(call: Callable[[], object]) -> float:
    for _ in range(CALLS):  # so that everything is compiled and in the caches
        call()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - start) / CALLS)
    return 1e6 * min(times)


def measure(names: list[str]) -> None:
    use_fake_driver()
    print(f"{'operation':22}{'launches':>9}{'whole, us':>11}{'checks':>8}{'plan':>8}{'launcher':>10}")
    for name, spec in discover_specs().items():
        arguments = arguments_of(spec, *smallest_model_case(spec), torch.device("cpu"))
        if name == "gemm_epilogue" or (names and name not in names):
            continue
        launches = spec.plan(**arguments, target=TARGET)
        whole = microseconds(partial(spec.launcher, **arguments))
        plan = microseconds(partial(spec.plan, **arguments, target=TARGET))
        launched = microseconds(partial(run, launches))
        print(f"{name:22}{len(launches):9}{whole:11.1f}{whole - plan - launched:8.1f}{plan:8.1f}{launched:10.1f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operations", nargs="*", metavar="OPERATION", help="default: all")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # the stand-in is in place
    args = parser.parse_args()
    unknown = sorted(set(args.operations) - discover_specs().keys())
    if unknown:
        parser.error(f"expected some of {', '.join(discover_specs())}, got {unknown[0]!r}")
    if args.here:
        measure(args.operations)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--here", *args.operations]
        return subprocess.run(command, env=fake_environment(Path(folder)), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

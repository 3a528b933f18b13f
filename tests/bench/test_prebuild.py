"""A launch finds the kernels that were compiled beforehand, and compiles nothing itself.

Triton's own launcher runs with a stand-in for the driver, so each test starts processes of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.fake_driver import fake_environment

ROOT = Path(__file__).parents[2]
PRELUDE = """
import sys
sys.path[:0] = ["bench", "tests"]
import torch
from support.fake_driver import TARGET, use_fake_driver
use_fake_driver()
from internvl_rt.bench.kernel_cases import Work
from internvl_rt.kernels._check import arguments_of
from internvl_rt.kernels.catalogue import discover_specs
from support.specs import smallest_model_case
"""
# This program launches, as on a GPU, the smallest case that a real model has of each named operation.
LAUNCH = """
for name in sys.argv[1:]:
    spec = discover_specs()[name]
    spec.launcher(**arguments_of(spec, *smallest_model_case(spec), torch.device("cpu")))
"""
# This program prints the kernels that launches ask for and no plan has. It compiles and launches nothing.
ASK = """
import triton
from prebuild import WHAT, distinct, wanted
from tune_candidates import TUNED
asked = set()
def note(*, key, fn, **_):
    asked.add((fn.module, fn.name, key))
    return True
specs = discover_specs()
def calls():
    for spec in specs.values():
        yield "models", spec, *smallest_model_case(spec), {}
        for case in spec.test_cases:
            for dtype in spec.tolerances:
                yield "contract", spec, case, dtype, {}
    for name, tuned in TUNED.items():
        work = min(tuned.works(), key=lambda work: specs[name].cost(work.case, work.dtype).bytes)
        for plan in tuned.plans(work, TARGET).values():
            yield "tune", specs[name], work.case, work.dtype, {"plan": plan}
planned = {}
for what in WHAT:
    planned[what] = set()
    builds = list(distinct(wanted([what], [], TARGET), TARGET, seen=planned[what]))
    assert len(builds) == len(planned[what])
use_fake_driver()
triton.knobs.runtime.jit_cache_hook = note
asked_in_all = 0
for what, spec, case, dtype, given in calls():
    spec.launcher(**{**arguments_of(spec, case, dtype, torch.device("cpu")), **given})
    for kernel in asked - planned[what]:
        print(f"{what}: {spec.name}/{case.name}/{dtype}: {kernel}")
    asked_in_all += len(asked)
    asked.clear()
assert asked_in_all > 700, asked_in_all
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Environment variables with an empty cache of the test's own, and the stand-in for the driver."""
    (tmp_path / "driver").mkdir()
    return {**fake_environment(tmp_path / "driver"), "TRITON_CACHE_DIR": str(tmp_path / "cache")}


def prebuild(environment: dict[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "bench/prebuild.py", *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def rows_of(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["part"] == "build"
    return {row["what"]: row for row in document["rows"]}


def cached(environment: dict[str, str]) -> set[str]:
    return {str(path) for path in Path(environment["TRITON_CACHE_DIR"]).rglob("*") if path.is_file()}


def run_python(environment: dict[str, str], source: str, *arguments: str) -> str:
    command = [sys.executable, "-c", PRELUDE + source, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_a_launch_finds_what_was_compiled(environment: dict[str, str]) -> None:
    done = prebuild(environment, "--target=90", "--workers=2", "--what=models", "--only=rms_norm", "--only=swiglu")
    assert done.returncode == 0, done.stderr[-4000:]
    row = rows_of(done)["models"]
    assert row["kernels"] > 2
    assert (row["failed"], row["left_out"]) == (0, 0)
    before = cached(environment)
    assert sum(path.endswith(".cubin") for path in before) == row["kernels"]
    run_python(environment, LAUNCH, "rms_norm", "swiglu")
    assert cached(environment) == before
    run_python(environment, LAUNCH, "copy_blocks")  # it was not compiled beforehand
    assert sum(path.endswith(".cubin") for path in cached(environment) - before) == 1


@pytest.mark.slow
def test_every_kernel_that_a_launch_asks_for_was_planned(environment: dict[str, str]) -> None:
    """The plans for models, contract and tuning hold every kernel, by Triton's own key, that their launches ask for."""
    assert run_python(environment, ASK) == ""


@pytest.mark.slow
def test_what_the_time_does_not_reach_is_counted(environment: dict[str, str]) -> None:
    done = prebuild(environment, "--target=90", "--workers=1", "--what=models", "--only=rms_norm", "--budget-s=0.001")
    assert done.returncode == 0, done.stderr[-4000:]
    row = rows_of(done)["models"]
    assert row["left_out"] > 0
    assert row["left_out"] + sum(path.endswith(".cubin") for path in cached(environment)) == row["kernels"]


@pytest.mark.fast("target")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--what=models,everything",), "--what: expected some of models, contract, tune, got 'everything'"),
        (("--workers=0",), "--workers: expected a number from 1 to a million, got '0'"),
        (("--budget-s=0",), "--budget-s: expected seconds above 0 and at most a million, got '0'"),
        (("--target=70",), "--target: invalid choice: 70"),
        ((), "expected a machine with a CUDA device, found none"),
    ],
    ids=["what", "workers", "budget", "target", "device"],
)
def test_what_cannot_be_compiled_for_is_refused(options: tuple[str, ...], message: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = prebuild({**environment, "CUDA_VISIBLE_DEVICES": ""}, *options)
    assert done.returncode == 2
    assert message in done.stderr


def test_the_interpreter_compiles_nothing_and_is_refused() -> None:
    done = prebuild({**os.environ, "TRITON_INTERPRET": "1"}, "--target=90")
    assert done.returncode == 2
    assert "unset TRITON_INTERPRET" in done.stderr

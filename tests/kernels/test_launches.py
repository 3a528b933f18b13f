"""Tests what Triton's own launcher asks of the CUDA driver, with a stand-in for the driver."""

import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from internvl_rt.kernels.catalogue import discover_specs
from internvl_rt.quantize import quantise
from support.fake_driver import fake_environment

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return fake_environment(tmp_path_factory.mktemp("driver"))


@pytest.fixture(scope="module")
def launches(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Rows:
    log = tmp_path_factory.mktemp("launches") / "log"
    return launch({**environment, "FAKE_DRIVER_LOG": str(log)}, "models")


def launch(environment: dict[str, str], *arguments: object) -> Rows:
    command = [sys.executable, Path(__file__).parents[1] / "support" / "fake_launches.py", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_operation_is_launched_as_planned(launches: Rows) -> None:
    assert {row["operation"] for row in launches} == set(discover_specs())
    for row in launches:
        assert {name: row["asked"][name] for name in row["plan"]} == row["plan"], row
        assert row["asked"]["shared_bytes"] <= 227 * 1024
        assert row["launches"] == sum(other["operation"] == row["operation"] for other in launches)


def test_the_kernels_that_are_launched_are_those_of_the_audit(launches: Rows) -> None:
    """The launch and the audit treat the same arguments as constants and the same ones as multiples of 16."""
    assert not [row for row in launches if not row["audited"]]


@pytest.mark.slow
@pytest.mark.timeout(3600)  # some thousand kernels are built
def test_every_call_of_the_contract_is_built_and_launched(environment: dict[str, str]) -> None:
    """Covers every dtype as on an H200; a run on a GPU makes these calls first and ends if one fails."""
    parts = os.cpu_count() or 1
    with ThreadPoolExecutor(parts) as pool:
        found = [
            row
            for rows in pool.map(lambda part: launch(environment, "contract", part, parts), range(parts))
            for row in rows
        ]
    assert not [row for row in found if "error" in row]
    calls = sum(len(spec.test_cases) * len(spec.tolerances) for spec in discover_specs().values())
    assert sum(row["calls"] for row in found) == calls > 1000


VARIANTS = {  # the kernels that are built more than once, and how often
    "_embed_tokens_kernel": 2,  # with and without visual tokens
    "gemv_kernel": 9,  # for one row, two rows and up to 16 rows, for each of three products
    "gemv_qkv_kernel": 3,  # for one row, two rows and up to 16 rows
    "epilogue_kernel": 3,  # for each of three products
    "prefill_attention_kernel": 4,  # blocks of 64 and of 128 rows; blocks whose keys are split, of one and of more rows
    "row_peaks_kernel": 2,  # with and without penalties
    "draw_kernel": 2,  # with and without penalties
}


@pytest.mark.slow
def test_an_engine_builds_each_kernel_once(environment: dict[str, str]) -> None:
    """No start of a tensor and no number of rows makes Triton build a kernel again, which would delay a request."""
    built = launch(environment, "engine")
    assert not [row for row in built if row["late"]]
    counts = Counter(row["kernel"] for row in built)
    assert len(counts) > 15
    assert {name: count for name, count in counts.items() if count > 1} == VARIANTS


@pytest.mark.slow
def test_an_engine_with_graphs_builds_every_kernel_before_the_first_request(environment: dict[str, str]) -> None:
    built = launch(environment, "captured")
    assert len({row["kernel"] for row in built}) > 15
    assert not [row for row in built if row["late"]]


QUANTISED = {  # options of an engine, and the kernels that multiply few and many rows then
    "fp8": (("quantization=fp8", "kv_cache_dtype=fp8"), {"gemv_kernel": 12, "gemm_fp8_kernel": 6}),
    "int8": (("quantization=int8", "kv_cache_dtype=int8"), {"gemv_kernel": 12, "_dequantise_kernel": 1}),
    "4 bits": ((), {"gemv_kernel": 3, "gemv_4bit_kernel": 6, "_dequantise_kernel": 1}),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", ["engine", "captured"])
@pytest.mark.parametrize("kind", QUANTISED)
def test_a_quantised_engine_builds_each_kernel_before_it_is_late(
    kind: str, what: str, environment: dict[str, str], tmp_path: Path
) -> None:
    options, expected = QUANTISED[kind]
    if kind == "4 bits":
        quantise("tiny", tmp_path / "model", "w4a16", group_size=32, compare=False, device="cpu")
        options = (f"model={tmp_path / 'model'}",)
    built = launch(environment, what, *options)
    assert not [row for row in built if row["late"]]
    counts = Counter(row["kernel"] for row in built)
    assert {name: counts[name] for name in expected} == expected


@pytest.mark.fast("swigul-2")
@pytest.mark.parametrize(("operation", "exit_code"), [("swiglu", 0), ("swigul", 2)])
def test_the_cost_of_a_launch_can_be_measured(operation: str, exit_code: int) -> None:
    script = Path(__file__).parents[2] / "bench" / "launch_cost.py"
    done = subprocess.run([sys.executable, script, operation], capture_output=True, text=True)
    assert done.returncode == exit_code, done.stderr[-4000:]
    if exit_code:
        assert "expected some of add_norm, " in done.stderr
    else:
        name, launches, *times = done.stdout.splitlines()[1].split()
        assert (name, launches) == ("swiglu", "1")
        whole, _, plan, launcher = map(float, times)  # the time of the checks, left out, may be noise
        assert min(whole, plan, launcher) > 0

"""Runs every kernel under pytest-benchmark.

    pytest bench/test_kernels.py --benchmark-only [-k gemv] [--benchmark-save NAME]

pytest-benchmark's own columns show the wall time of one eager launch with the wait for its end: what a caller in Python
sees. `extra_info` has what `internvl-rt bench kernels` measures: the device's time, rates, the share of the measured
roof and the alternatives. Without a GPU the references run, on small cases.
"""

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from internvl_rt.bench.kernel_cases import Work, build_launch, make_rotated_inputs, plan_work
from internvl_rt.bench.kernels import Limits, measure
from internvl_rt.bench.roofline import measure_roofline

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COMPILING_S = 300.0  # seconds for the alternatives of all tests together


@pytest.fixture(scope="session")
def roofline() -> dict[str, Any]:
    return measure_roofline(DEVICE, quick=True)


@pytest.fixture(scope="session")
def limits() -> Limits:
    return Limits(end=time.monotonic() + 86400, slow_start_s=COMPILING_S)


def launch_and_wait(call: partial[Any]) -> None:
    call()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("work", plan_work(DEVICE), ids=lambda work: work.name)
def test_kernel(benchmark: Any, work: Work, roofline: dict[str, Any], limits: Limits) -> None:
    rows = measure(work, DEVICE, roofline, limits)
    assert rows, "it does not fit this device's memory"
    assert "problem" not in rows[0], rows[0]["problem"]
    benchmark.group = work.spec.name
    benchmark.extra_info.update(rows[0])
    benchmark.extra_info["alternatives_us"] = {row["baseline"]: row["median_us"] for row in rows[1:]}
    with torch.inference_mode():
        inputs = make_rotated_inputs(work, DEVICE)[0]
        call = (
            build_launch(work, inputs, None, DEVICE)
            if DEVICE.type == "cuda"
            else partial(work.spec.reference, **inputs)
        )
        benchmark.pedantic(launch_and_wait, args=(call,), rounds=20, warmup_rounds=2)

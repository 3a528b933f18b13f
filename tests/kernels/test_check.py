"""Tests the check that compares a result, or one call of an operation, with its reference."""

import math
from dataclasses import replace

import pytest
import torch

from internvl_rt.kernels._check import check_call, deviation
from internvl_rt.kernels._contract import KernelSpec, Tolerance
from internvl_rt.kernels.catalogue import discover_specs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = Tolerance(rtol=0.1, atol=0.0, rms=0.1, reason="of a test")


@pytest.mark.parametrize(
    ("actual", "expected", "share"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.05, 2.0], [1.0, 2.0], 0.5),
        ([1.3, 2.0], [1.0, 2.0], 3.0),
        ([0.0, 1.0], [1e-30, 1.0], 10.0),
        ([math.nan, 2.0], [1.0, 2.0], math.inf),
        ([math.inf, 2.0], [1.0, 2.0], math.inf),
        ([math.inf, math.nan], [math.inf, math.nan], 0.0),
        ([1.0, 1e-9], [1.0, 0.0], math.inf),
        ([], [], 0.0),
    ],
)
def test_a_deviation_is_a_share_of_the_tolerance(actual: list[float], expected: list[float], share: float) -> None:
    found = deviation(torch.tensor(actual), torch.tensor(expected, dtype=torch.float64), TOLERANCE)
    assert found.share == pytest.approx(share, rel=1e-4)


def test_a_deviation_everywhere_counts_though_no_element_is_far_off() -> None:
    expected = torch.ones(100, dtype=torch.float64)
    strict = Tolerance(rtol=0.1, atol=0.0, rms=0.01, reason="of a test")
    assert deviation(1.05 * expected, expected, strict).share == pytest.approx(5.0 / 1.2)  # 100 elements: 1.2 rms
    exact = Tolerance(0.0, 0.0, 0.0, "of a test")
    assert deviation(expected, expected, exact).share == 0
    assert deviation(expected + 1, expected, exact).share == math.inf


@pytest.mark.parametrize("spec", discover_specs().values(), ids=lambda spec: spec.name)
def test_a_kernel_that_does_nothing_is_wrong(spec: KernelSpec) -> None:
    dtype = next(iter(spec.tolerances))
    case = max(spec.test_cases, key=lambda case: spec.cost(case, dtype).bytes)
    idle = replace(spec, launcher=lambda **arguments: None)
    assert check_call(idle, case, dtype, DEVICE).share > 1


def test_of_what_an_operation_writes_in_place_the_worst_counts() -> None:
    spec = discover_specs()["gemv_qkv"]
    case = next(case for case in spec.test_cases if case.name == "channels_64")
    assert 0 < check_call(spec, case, torch.float32, DEVICE).share <= 1

    def and_spoil_values(*, v_cache_BGPC: torch.Tensor, **arguments: object) -> object:
        q_THC = spec.launcher(v_cache_BGPC=v_cache_BGPC, **arguments)
        v_cache_BGPC[0] += 1
        return q_THC

    assert check_call(replace(spec, launcher=and_spoil_values), case, torch.float32, DEVICE).share > 1

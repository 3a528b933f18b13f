"""Compares every kernel with its reference: each SPEC x test case x dtype, with poisoned outputs.

Without a GPU the kernels run in Triton's interpreter (tests/conftest.py), with a GPU's roundings and random numbers
(support/hardware_arithmetic.py, support/cuda_draws.py), so a kernel that a GPU's roundings would fail also fails here.
The reference runs in float64 on the same rounded inputs. `make room` does the same with many seeds.

`make test` runs the smallest case of each operation in each dtype; the other cases are slow.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from internvl_rt.kernels._check import deviation
from internvl_rt.kernels._contract import Case, KernelSpec, map_result, results_of
from internvl_rt.kernels._launch import target_of
from internvl_rt.kernels.catalogue import discover_specs
from support.contract import clone, draw_inputs, poisoned, run_case
from support.hardware_arithmetic import hardware_arithmetic
from support.specs import smallest_test_case

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.uint8, torch.float32, torch.float16, torch.bfloat16)
SPECS = discover_specs()
RUNS = [
    pytest.param(
        *(spec, case, dtype),
        id=f"{spec.name}/{case.name}/{str(dtype).removeprefix('torch.')}",
        marks=() if case is smallest_test_case(spec, dtype) else pytest.mark.slow,
    )
    for spec in SPECS.values()
    for case in spec.test_cases
    for dtype in DTYPES
    if dtype in spec.tolerances and case.min_capability <= target_of(DEVICE).capability
]


@pytest.fixture(autouse=True)
def arithmetic() -> Iterator[None]:
    if DEVICE.type == "cuda":
        yield
    else:
        with hardware_arithmetic():
            yield


def assert_equal_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("spec", "case", "dtype"), RUNS)
def test_kernel_equals_its_reference(spec: KernelSpec, case: Case, dtype: torch.dtype) -> None:
    for actual, expected in run_case(spec, draw_inputs(spec, case, dtype, DEVICE, seed=0), dtype):
        if spec.exact:
            assert_equal_bits(actual, expected.to(actual.dtype))
        else:
            shares = deviation(actual, expected, spec.tolerance_of(actual, dtype))
            assert shares.element <= 1, shares.text
            assert shares.rms <= 1, shares.text


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_launcher_allocates_its_own_output(spec: KernelSpec) -> None:
    if spec.test_cases[0].min_capability > target_of(DEVICE).capability:
        pytest.skip("the GPU does not have the types of its operands")
    inputs = draw_inputs(spec, spec.test_cases[0], next(iter(spec.tolerances)), DEVICE, seed=0)
    expected = spec.reference(**clone(inputs))
    if expected is None:
        assert spec.in_place
        assert spec.launcher(**inputs) is None
    else:
        out = map_result(lambda like: poisoned(like.shape, like.dtype, DEVICE)[0], expected)
        results = spec.launcher(**clone(inputs)), spec.launcher(**clone(inputs), out=out)
        for own, given in zip(*(results_of(each).values() for each in results), strict=True):
            assert_equal_bits(own, given)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_spec_has_cases_of_real_models_and_counts_their_cost(spec: KernelSpec) -> None:
    assert spec.test_cases
    assert spec.model_cases
    names = [case.name for case in (*spec.test_cases, *spec.model_cases)]
    assert len(set(names)) == len(names)
    for case in spec.model_cases:
        cost = spec.cost(case, torch.bfloat16)
        assert cost.bytes > 0
        assert cost.flops >= 0

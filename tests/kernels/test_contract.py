"""Every kernel against its reference: each SPEC x test case x dtype, from poisoned outputs.

Without a GPU the kernels run in Triton's interpreter (tests/conftest.py), in float32 and float16; bfloat16 products are
wrong there, so bfloat16 runs on a GPU only. The reference runs in float64 on the same rounded inputs.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from internvl_rt.kernels._contract import Case, KernelSpec, Tolerance
from support.specs import discover_specs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.uint8, torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
SPECS = discover_specs()
GUARD = 64  # elements before and behind an output that nobody may write
RUNS = [
    pytest.param(spec, case, dtype, id=f"{spec.name}/{case.name}/{str(dtype).removeprefix('torch.')}")
    for spec in SPECS.values()
    for case in spec.test_cases
    for dtype in DTYPES
    if dtype in spec.tolerances
]


def upcast(value: Any, dtype: torch.dtype) -> Any:
    floating = isinstance(value, Tensor) and value.dtype == dtype and dtype.is_floating_point
    return value.double() if floating else value


def clone(inputs: dict[str, Any]) -> dict[str, Any]:
    """Copies that keep every stride, so that a view of a larger tensor stays one."""

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        return copy.copy_(value)

    return {name: one(value) for name, value in inputs.items()}


def poisoned(shape: torch.Size, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A tensor of NaN (or 0x5A bytes) and the larger buffer that it lies in."""
    count = math.prod(shape)
    poison = math.nan if dtype.is_floating_point else 0x5A
    buffer = torch.full((GUARD + count + GUARD,), poison, dtype=dtype, device=DEVICE)
    return buffer[GUARD : GUARD + count].view(shape), buffer


def assert_close(actual: Tensor, expected: Tensor, tolerance: Tolerance) -> None:
    """Names the worst element on failure; NaN and infinity never pass, unless expected."""
    assert actual.shape == expected.shape
    if actual.numel() == 0:
        return
    actual64, expected64 = actual.double().cpu(), expected.double().cpu()
    error = torch.where(actual64 == expected64, 0.0, (actual64 - expected64).abs())
    excess = torch.nan_to_num(error - tolerance.atol - tolerance.rtol * expected64.abs(), nan=math.inf)
    worst = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
    rms = float(error.norm() / expected64.norm().clamp_min(1e-30))
    message = f"worst at {worst}: got {actual64[worst]}, expected {expected64[worst]}; rms error {rms:.3g}"
    assert excess.max() <= 0, message
    assert rms <= tolerance.rms, message


def assert_equal_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("spec", "case", "dtype"), RUNS)
def test_kernel_equals_its_reference(spec: KernelSpec, case: Case, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = spec.make_inputs(case, dtype, DEVICE)
    expected_inputs = clone({name: upcast(value, dtype) for name, value in inputs.items()})
    expected = spec.reference(**expected_inputs)
    before = clone(inputs)

    results = [(inputs[name], expected_inputs[name]) for name in spec.in_place]
    if expected is None:
        spec.launcher(**inputs)
    else:
        out_dtype = dtype if expected.dtype.is_floating_point else expected.dtype
        out, buffer = poisoned(expected.shape, out_dtype)
        guard = buffer.clone()
        returned = spec.launcher(**inputs, out=out)
        assert returned.data_ptr() == out.data_ptr()
        edges = (slice(0, GUARD), slice(len(buffer) - GUARD, len(buffer)))
        assert all(torch.equal(buffer[edge].view(torch.uint8), guard[edge].view(torch.uint8)) for edge in edges)
        results.append((out, expected))

    for actual, wanted in results:
        if spec.exact:
            assert_equal_bits(actual, wanted.to(actual.dtype))
        else:
            assert_close(actual, wanted, spec.tolerances[dtype])
    for name, value in inputs.items():
        if isinstance(value, Tensor) and name not in spec.in_place:
            torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True, msg=f"{name} was written")


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_launcher_allocates_its_own_output(spec: KernelSpec) -> None:
    torch.manual_seed(0)
    inputs = spec.make_inputs(spec.test_cases[0], next(iter(spec.tolerances)), DEVICE)
    expected = spec.reference(**clone(inputs))
    if expected is None:
        assert spec.in_place
        assert spec.launcher(**inputs) is None
    else:
        out, _ = poisoned(expected.shape, expected.dtype)
        assert_equal_bits(spec.launcher(**clone(inputs)), spec.launcher(**clone(inputs), out=out))


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

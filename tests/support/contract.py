"""One run of an operation on a test case: what it wrote beside what the reference says, and how far they are apart."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from internvl_rt.kernels._contract import Case, KernelSpec, Tolerance
from support.cuda_draws import CudaDraws

GUARD = 64  # elements before and behind an output that nobody may write


def draw_inputs(spec: KernelSpec, case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> dict[str, Any]:
    """As a GPU draws them, on any device."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 5 ms, for all devices that there might be
        with CudaDraws(seed):
            return spec.make_inputs(case, dtype, device)
    torch.manual_seed(seed)
    return spec.make_inputs(case, dtype, device)


def clone(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Copies that keep every stride, so that a view of a larger tensor stays one."""

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        return copy.copy_(value)

    return {name: one(value) for name, value in inputs.items()}


def upcast(inputs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Copies; what is of `dtype`, and floating point, in float64."""

    def one(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.dtype == dtype and dtype.is_floating_point
        return value.double() if floating else value

    return clone({name: one(value) for name, value in inputs.items()})


def poisoned(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """A tensor of NaN (or 0x5A bytes) and the larger buffer that it lies in."""
    count = math.prod(shape)
    poison = math.nan if dtype.is_floating_point else 0x5A
    buffer = torch.full((GUARD + count + GUARD,), poison, dtype=dtype, device=device)
    return buffer[GUARD : GUARD + count].view(shape), buffer


def expected_results(spec: KernelSpec, inputs: Mapping[str, Any], dtype: torch.dtype) -> list[Tensor]:
    """What the reference writes, in float64: the arguments that are `in_place`, then the result if there is one."""
    inputs = upcast(inputs, dtype)
    result = spec.reference(**inputs)
    return [inputs[name] for name in spec.in_place] + ([] if result is None else [result])


def run_case(spec: KernelSpec, inputs: dict[str, Any], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Runs the launcher on `inputs`, into poisoned memory; pairs of what it wrote and what the reference says.

    Fails when the launcher writes what it must not: an argument that is not `in_place`, or memory around its output.
    """
    expected, before = expected_results(spec, inputs, dtype), clone(inputs)
    actual = [inputs[name] for name in spec.in_place]
    if len(expected) == len(actual):
        spec.launcher(**inputs)
    else:
        like = expected[-1]
        out, buffer = poisoned(like.shape, dtype if like.dtype.is_floating_point else like.dtype, like.device)
        guard = buffer.clone()
        returned = spec.launcher(**inputs, out=out)
        assert returned.data_ptr() == out.data_ptr()
        edges = (slice(0, GUARD), slice(len(buffer) - GUARD, len(buffer)))
        assert all(torch.equal(buffer[edge].view(torch.uint8), guard[edge].view(torch.uint8)) for edge in edges)
        actual.append(out)
    for name, value in inputs.items():
        if isinstance(value, Tensor) and name not in spec.in_place:
            torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True, msg=f"{name} was written")
    return list(zip(actual, expected, strict=True))


@dataclass(frozen=True, slots=True)
class Shares:
    """How much of a tolerance was used, of the elements' limit and of the rms limit; 1 is all of it."""

    element: float
    rms: float
    message: str  # the worst element and the rms error

    @property
    def worst(self) -> float:
        return max(self.element, self.rms)


def shares_of(actual: Tensor, expected: Tensor, tolerance: Tolerance) -> Shares:
    """NaN and infinity use infinitely much, unless expected."""
    assert actual.shape == expected.shape
    if actual.numel() == 0:
        return Shares(0.0, 0.0, "no elements")
    actual64, expected64 = actual.double().cpu(), expected.double().cpu()
    error = torch.where(actual64 == expected64, 0.0, (actual64 - expected64).abs())
    limit = tolerance.atol + tolerance.rtol * expected64.abs()
    share = torch.nan_to_num(torch.where(error == 0, 0.0, error / limit), nan=math.inf, posinf=math.inf)
    worst = tuple(int(i) for i in np.unravel_index(int(share.argmax()), share.shape))
    norm, limit_of_norm = float(error.norm()), tolerance.norm_limit(expected64)
    rms = norm / float(expected64.norm().clamp_min(1e-30))
    message = f"worst at {worst}: got {actual64[worst]}, expected {expected64[worst]}; rms error {rms:.3g}"
    rms_share = 0.0 if norm == 0 else norm / limit_of_norm if limit_of_norm else math.inf
    return Shares(float(share.max()), math.inf if math.isnan(rms_share) else rms_share, message)

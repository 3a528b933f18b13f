"""Runs an operation on a test case and pairs what it wrote with the reference's results."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from internvl_rt.kernels._contract import Case, KernelSpec, map_result, results_of
from support.cuda_draws import CudaDraws

GUARD = 64  # elements before and after an output, which the kernel must not write


def draw_inputs(spec: KernelSpec, case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> dict[str, Any]:
    """Draws the same random inputs on any device as on a GPU."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 5 ms, as it seeds every kind of device
        with CudaDraws(seed):
            return spec.make_inputs(case, dtype, device)
    torch.manual_seed(seed)
    return spec.make_inputs(case, dtype, device)


def clone(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns copies that keep every stride, so that a view of a larger tensor stays strided."""

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        return copy.copy_(value)

    return {name: one(value) for name, value in inputs.items()}


def upcast(inputs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Returns copies in which floating-point tensors of `dtype` have become float64."""

    def one(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.dtype == dtype and dtype.is_floating_point
        return value.double() if floating else value

    return clone({name: one(value) for name, value in inputs.items()})


def poisoned(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns a tensor full of NaN (of 0x5A for integers) and the larger buffer that it is a view of."""
    count = math.prod(shape)
    poison = math.nan if dtype.is_floating_point else 0x5A
    buffer = torch.full((GUARD + count + GUARD,), poison, dtype=dtype, device=device)
    return buffer[GUARD : GUARD + count].view(shape), buffer


def expected_results(spec: KernelSpec, inputs: Mapping[str, Any], dtype: torch.dtype) -> list[Tensor]:
    """Returns what the reference writes, in float64: the `in_place` arguments, then the result if there is one."""
    inputs = upcast(inputs, dtype)
    result = spec.reference(**inputs)
    return [inputs[name] for name in spec.written(inputs)] + [*results_of(result).values()]


def run_case(spec: KernelSpec, inputs: dict[str, Any], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Runs the launcher into poisoned memory; returns pairs of (what the launcher wrote, what the reference wrote).

    Fails when the launcher writes an argument that is not `in_place`, or memory around its output.
    """
    expected, before = expected_results(spec, inputs, dtype), clone(inputs)
    actual = [inputs[name] for name in spec.written(inputs)]
    if len(expected) == len(actual):
        spec.launcher(**inputs)
    else:
        buffers: list[Tensor] = []

        def guarded(like: Tensor) -> Tensor:
            out, buffer = poisoned(like.shape, like.dtype, expected[-1].device)
            buffers.append(buffer)
            return out

        out = map_result(guarded, spec.result_like(inputs))
        guards = [buffer.clone() for buffer in buffers]
        returned = results_of(spec.launcher(**inputs, out=out))
        assert [each.data_ptr() for each in returned.values()] == [each.data_ptr() for each in results_of(out).values()]
        for buffer, guard in zip(buffers, guards, strict=True):
            edges = (slice(0, GUARD), slice(len(buffer) - GUARD, len(buffer)))
            assert all(torch.equal(buffer[edge].view(torch.uint8), guard[edge].view(torch.uint8)) for edge in edges)
        actual += results_of(out).values()
    for name, value in inputs.items():
        if isinstance(value, Tensor) and name not in spec.in_place:
            torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True, msg=f"{name} was written")
    return list(zip(actual, expected, strict=True))

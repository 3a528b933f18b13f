"""Rows in FP8 (e4m3): a number for each element and a float32 scale for each row.

    scale  = max(largest |x| of the row, 1e-30) / 448, or a given scale
    number = x / scale, to the nearest, ties to even, and at most 448 in size

A row with a value that is not finite gets the scale NaN, so that what is computed from it is NaN, as without FP8.
The first GPUs that convert to FP8 and multiply it have compute capability 8.9.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from internvl_rt.kernels._contract import Tolerance, require, require_tensor
from internvl_rt.kernels._launch import next_power_of_2, target_of

FP8 = torch.float8_e4m3fn
MIN_CAPABILITY = 89
IN_FP8: dict[str, Any] = {"min_capability": MIN_CAPABILITY}  # of every case
LARGEST: tl.constexpr = tl.constexpr(448.0)
TINY: tl.constexpr = tl.constexpr(1e-30)
MAX_WIDTH = 32768
STORED_TOLERANCES = {  # of numbers and scales of a row that was rounded to 16 bits before
    FP8: Tolerance(0.16, 2**-8, 0.04, "the row's rounding moves a number to the next one, by up to an eighth"),
    torch.float32: Tolerance(1.6e-2, 1e-30, 1e-2, "the largest value is rounded twice to 8 bits"),
}


def quantise(x: Tensor, static_scale_1: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns numbers [R, K] and scales [R] of rows [R, K]; static_scale_1: float32, a scale for all rows."""
    values = x.float()
    largest = values.abs().amax(-1)
    scale = largest.clamp_min(TINY.value) / LARGEST.value if static_scale_1 is None else static_scale_1.float()
    finite = largest < torch.inf
    scale = scale.expand_as(largest).where(finite, torch.nan)
    numbers = (values / scale[:, None]).where(finite[:, None], 0).clamp(-LARGEST.value, LARGEST.value)
    return numbers.to(FP8), scale


def require_fp8(device: torch.device) -> None:
    """Raises ValueError if the GPU `device` has no FP8."""
    has = target_of(device).capability
    if has < MIN_CAPABILITY:
        raise ValueError(
            f"device: expected compute capability {MIN_CAPABILITY / 10} or newer for products in FP8, got {has / 10}; "
            "round only the weights (gemv_8bit, dequantise)"
        )


def require_scales_of_rows(name: str, scale: Tensor, static_scale_1: Tensor | None, x: Tensor) -> None:
    """Raises ValueError unless there is room for a scale of each row of x, and a static scale is one number."""
    require_tensor(name, scale, (len(x),), torch.float32, x.device)
    if static_scale_1 is not None:
        require_tensor("static_scale_1", static_scale_1, (1,), torch.float32, x.device)


def room_for(out: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Returns `out`, or memory for numbers. Raises ValueError if `out` does not fit or the device has no FP8."""
    require_fp8(device)
    require(shape[-1] <= MAX_WIDTH, "width", f"at most {MAX_WIDTH}", shape[-1])
    if out is None:
        out = torch.empty(shape, dtype=FP8, device=device)
    require_tensor("out", out, shape, FP8, device)
    return out


def warps_of_row(width: int) -> int:
    """Counts the warps that hold a row of values in registers: a thread has 16 to 64 of them."""
    return min(16, max(1, next_power_of_2(width) // 512))


@triton.jit
def largest_size(values):
    """Returns the largest size of values [BLOCK]; infinity if one is NaN, which a maximum may drop."""
    size = tl.abs(values)
    infinity = float("inf")
    return tl.max(tl.where(size < infinity, size, infinity), axis=0)


@triton.jit
def scale_of(largest, static_scale):
    return tl.load(static_scale) if static_scale is not None else tl.div_rn(tl.maximum(largest, TINY), LARGEST)


@triton.jit
def write_numbers(values, s, largest, at, inside):
    """Writes the numbers of float32 values with the scale s; zeros if the `largest` of their row is not finite."""
    # The quotient is corrected by its rest: as exact as a division, and half as long.
    inverse = tl.div_rn(1.0, s)
    y = values * inverse
    y = tl.minimum(tl.maximum(y, -LARGEST - 1), LARGEST + 1)  # a quotient that is infinite has no rest
    y = tl.fma(tl.fma(-y, tl.zeros_like(y) + s, values), tl.zeros_like(y) + inverse, y)
    y = tl.minimum(tl.maximum(y, -LARGEST), LARGEST)
    tl.store(at, tl.where(largest < float("inf"), y, 0.0).to(at.dtype.element_ty), mask=inside)


@triton.jit
def write_scale(scale, row, s, largest):
    tl.store(scale + row, tl.where(largest < float("inf"), s, float("nan")))


@triton.jit
def write_row(values, numbers, scale, static_scale, row, numbers_stride, column, inside):
    """Writes the numbers and the scale of a row of float32 values, which are 0 where they are not `inside`."""
    largest = largest_size(values)
    s = scale_of(largest, static_scale)
    write_numbers(values, s, largest, numbers + row * numbers_stride + column, inside)
    write_scale(scale, row, s, largest)

"""Rows to FP8 (e4m3): number = x / scale, scale = max(largest |x| of the row, 1e-30) / 448, or a given scale.

Numbers are rounded to the nearest, ties to even, and are at most 448 in size. The scale is float32. A row with a value
that is not finite gets the scale NaN. It takes a GPU with FP8: compute capability 8.9 or newer.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from internvl_rt.kernels._contract import Case, Cost, KernelSpec, Tolerance, require, require_one_of, require_tensor
from internvl_rt.kernels._fp8_rows import (
    IN_FP8,
    quantise,
    require_scales_of_rows,
    room_for,
    warps_of_row,
    write_row,
)
from internvl_rt.kernels._launch import Launch, Target, next_power_of_2, run, target_of


def quantise_rows_reference(x_RK: Tensor, scale_R: Tensor, static_scale_1: Tensor | None = None) -> Tensor:
    """Returns the numbers [R, K] and writes each row's scale."""
    numbers, scale = quantise(x_RK, static_scale_1)
    scale_R.copy_(scale)
    return numbers


@triton.jit
def _quantise_rows_kernel(x, numbers, scale, static_scale, x_stride, numbers_stride, K, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < K
    values = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    write_row(values, numbers, scale, static_scale, row, numbers_stride, column, inside)


def plan_quantise_rows(
    x_RK: Tensor, scale_R: Tensor, static_scale_1: Tensor | None = None, *, out: Tensor, target: Target
) -> tuple[Launch, ...]:
    rows, width = x_RK.shape
    args: dict[str, Any] = {"x": x_RK, "numbers": out, "scale": scale_R, "K": width}
    args |= {"x_stride": x_RK.stride(0), "numbers_stride": out.stride(0)}
    constexprs: dict[str, Any] = {"BLOCK": next_power_of_2(width)}
    if static_scale_1 is None:
        constexprs["static_scale"] = None
    else:
        args["static_scale"] = static_scale_1
    return (Launch(_quantise_rows_kernel, (rows, 1, 1), args, constexprs, num_warps=warps_of_row(width)),)


def quantise_rows(
    x_RK: Tensor, scale_R: Tensor, static_scale_1: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """Computes `quantise_rows_reference`, for rows at any stride; K is at most 32768.

    Raises ValueError naming the argument that does not fit.
    """
    require_one_of("x_RK", x_RK.dtype, SPEC.tolerances)
    require(x_RK.ndim == 2 and x_RK.shape[1] > 0, "x_RK", "rows [R, K]", tuple(x_RK.shape))
    require_tensor("x_RK", x_RK, tuple(x_RK.shape), x_RK.dtype, x_RK.device)
    require_scales_of_rows("scale_R", scale_R, static_scale_1, x_RK)
    out = room_for(out, tuple(x_RK.shape), x_RK.device)
    run(plan_quantise_rows(x_RK, scale_R, static_scale_1, out=out, target=target_of(x_RK.device)))
    return out


def _make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Makes rows, which `factor` scales, and cuts them from a tensor with `padding` more columns of NaN."""
    rows, width, padding = case["R"], case["K"], case.sizes.get("padding", 0)
    x = torch.randn(rows, width + padding, dtype=torch.float32, device=device) * case.sizes.get("factor", 1.0)
    x[:, width:] = torch.nan
    static = torch.full((1,), 1 / 200, device=device) if case.sizes.get("static") else None
    return {
        "x_RK": x.to(dtype)[:, :width],
        "scale_R": torch.zeros(rows, dtype=torch.float32, device=device),
        "static_scale_1": static,
    }


SPEC = KernelSpec(
    name="quantise_rows",
    used_by="every decoder with FP8 weights: inputs of products of more than 16 rows that no norm or SwiGLU precedes",
    reference=quantise_rows_reference,
    plan=plan_quantise_rows,
    launcher=quantise_rows,
    make_inputs=_make_inputs,
    cost=lambda case, dtype: Cost(
        bytes=case["R"] * ((dtype.itemsize + 1) * case["K"] + 4), flops=3 * case["R"] * case["K"]
    ),
    test_cases=(
        *(Case(f"width_{k}", {"R": 3, "K": k, **IN_FP8}) for k in (1, 2, 15, 127, 129, 896, 4864, 29568)),
        Case("no_rows", {"R": 0, "K": 64, **IN_FP8}),
        Case("strided", {"R": 5, "K": 100, "padding": 28, **IN_FP8}),
        Case("zeros", {"R": 2, "K": 100, "factor": 0.0, **IN_FP8}),
        Case("tiny", {"R": 4, "K": 300, "factor": 1e-7, **IN_FP8}),
        Case("huge", {"R": 4, "K": 300, "factor": 1e4, **IN_FP8}),
        Case("static", {"R": 4, "K": 300, "static": True, **IN_FP8}),  # some numbers are too large
    ),
    model_cases=tuple(
        Case(f"width_{width}_{rows}_rows{'_static' * static}", {"R": rows, "K": width, "static": static, **IN_FP8})
        for width in (896, 3584, 8192)
        for rows in (64, 3392)
        for static in (False, True)
    ),
    tolerances={
        dtype: Tolerance(0.0, 0.0, 0.0, "both divide in float32 and round once")
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    },
    in_place=("scale_R",),
    exact=True,
)

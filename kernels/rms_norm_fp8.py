"""RMSNorm to FP8 (e4m3) rows: y = w * cast(x / sqrt(mean(x^2) + eps)) as in rms_norm, then number = y / scale.

y is rounded to the dtype of x, as rms_norm writes it. Numbers and scales are those of quantise_rows: a float32 scale a
row, the largest |y| / 448, or a given one. It takes a GPU with FP8: compute capability 8.9 or newer.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from internvl_rt.kernels._contract import Case, Cost, KernelSpec, Tolerance, require, require_one_of, require_tensor
from internvl_rt.kernels._fp8_rows import (
    IN_FP8,
    STORED_TOLERANCES,
    quantise,
    require_scales_of_rows,
    room_for,
    warps_of_row,
    write_row,
)
from internvl_rt.kernels._launch import Launch, Target, next_power_of_2, run, target_of
from internvl_rt.kernels.rms_norm import rms_norm_reference, rms_norm_row


def rms_norm_fp8_reference(
    x_RD: Tensor, weight_D: Tensor, eps: float, scale_R: Tensor, static_scale_1: Tensor | None = None
) -> Tensor:
    """Returns the numbers [R, D] and writes each row's scale."""
    numbers, scale = quantise(rms_norm_reference(x_RD, weight_D, eps), static_scale_1)
    scale_R.copy_(scale)
    return numbers


@triton.jit
def _rms_norm_fp8_kernel(
    x, weight, numbers, scale, static_scale, x_stride, numbers_stride, eps, D, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    values = tl.load(x + row * x_stride + column, mask=inside, other=0.0)
    w = tl.load(weight + column, mask=inside, other=0.0)  # loaded before the reduction waits for the row
    quotient = rms_norm_row(values.to(tl.float32), D, eps).to(values.dtype).to(tl.float32)
    y = (quotient * w.to(tl.float32)).to(values.dtype).to(tl.float32)
    write_row(y, numbers, scale, static_scale, row, numbers_stride, column, inside)


def plan_rms_norm_fp8(
    x_RD: Tensor,
    weight_D: Tensor,
    eps: float,
    scale_R: Tensor,
    static_scale_1: Tensor | None = None,
    *,
    out: Tensor,
    target: Target,
) -> tuple[Launch, ...]:
    rows, width = x_RD.shape
    args: dict[str, Any] = {"x": x_RD, "weight": weight_D, "numbers": out, "scale": scale_R, "eps": eps, "D": width}
    args |= {"x_stride": x_RD.stride(0), "numbers_stride": out.stride(0)}
    constexprs: dict[str, Any] = {"BLOCK": next_power_of_2(width)}
    if static_scale_1 is None:
        constexprs["static_scale"] = None
    else:
        args["static_scale"] = static_scale_1
    return (Launch(_rms_norm_fp8_kernel, (rows, 1, 1), args, constexprs, num_warps=warps_of_row(width)),)


def rms_norm_fp8(
    x_RD: Tensor,
    weight_D: Tensor,
    eps: float,
    scale_R: Tensor,
    static_scale_1: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Computes `rms_norm_fp8_reference`, for rows at any stride; D is at most 32768.

    Raises ValueError naming the argument that does not fit.
    """
    require_one_of("x_RD", x_RD.dtype, SPEC.tolerances)
    require(x_RD.ndim == 2 and x_RD.shape[1] > 0, "x_RD", "rows [R, D]", tuple(x_RD.shape))
    require_tensor("x_RD", x_RD, tuple(x_RD.shape), x_RD.dtype, x_RD.device)
    require_tensor("weight_D", weight_D, (x_RD.shape[1],), x_RD.dtype, x_RD.device)
    require_scales_of_rows("scale_R", scale_R, static_scale_1, x_RD)
    out = room_for(out, tuple(x_RD.shape), x_RD.device)
    run(plan_rms_norm_fp8(x_RD, weight_D, eps, scale_R, static_scale_1, out=out, target=target_of(x_RD.device)))
    return out


def _make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Makes rows, which `factor` scales, and cuts them from a tensor with `padding` more columns of NaN."""
    rows, width, padding = case["R"], case["D"], case.sizes.get("padding", 0)
    x = torch.randn(rows, width + padding, dtype=torch.float32, device=device) * case.sizes.get("factor", 1.0)
    x[:, width:] = torch.nan
    return {
        "x_RD": x.to(dtype)[:, :width],
        "weight_D": torch.randn(width, dtype=torch.float32, device=device).to(dtype),
        "eps": 1e-6,
        "scale_R": torch.zeros(rows, dtype=torch.float32, device=device),
        "static_scale_1": torch.full((1,), 1 / 150, device=device) if case.sizes.get("static") else None,
    }


SPEC = KernelSpec(
    name="rms_norm_fp8",
    used_by="every decoder with FP8 weights: before q, k, v and before gate and up of more than 16 rows",
    reference=rms_norm_fp8_reference,
    plan=plan_rms_norm_fp8,
    launcher=rms_norm_fp8,
    make_inputs=_make_inputs,
    cost=lambda case, dtype: Cost(
        bytes=case["R"] * ((dtype.itemsize + 1) * case["D"] + 4) + dtype.itemsize * case["D"],
        flops=7 * case["R"] * case["D"],
    ),
    test_cases=(
        *(Case(f"width_{width}", {"R": 3, "D": width, **IN_FP8}) for width in (1, 2, 15, 127, 129, 896, 8192)),
        Case("no_rows", {"R": 0, "D": 64, **IN_FP8}),
        Case("strided", {"R": 5, "D": 100, "padding": 28, **IN_FP8}),
        Case("zeros", {"R": 2, "D": 100, "factor": 0.0, **IN_FP8}),
        Case("huge", {"R": 4, "D": 1024, "factor": 1e4, **IN_FP8}),  # the squares do not fit into float16
        Case("static", {"R": 4, "D": 300, "static": True, **IN_FP8}),  # some numbers are too large
    ),
    model_cases=tuple(
        Case(f"decoder_{width}_{rows}_rows", {"R": rows, "D": width, **IN_FP8})
        for width in (896, 1536, 3584, 4096, 5120, 8192)
        for rows in (64, 3392)  # a large decode step; the prompt of a picture of 13 tiles
    ),
    tolerances={
        torch.float32: Tolerance(1e-5, 1e-6, 2e-6, "scales of sums in another order"),
        torch.float16: Tolerance(1.25e-3, 1e-6, 5e-4, "no result has this type"),
        torch.bfloat16: Tolerance(1e-2, 1e-6, 4e-3, "no result has this type"),
    },
    in_place=("scale_R",),
    stored=STORED_TOLERANCES,
)

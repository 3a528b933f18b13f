"""SwiGLU to FP8 (e4m3) rows: y = cast(silu(g)) * u as in swiglu, then number = y / scale.

y is rounded to the dtype of g, as swiglu writes it. Numbers and scales are those of quantise_rows: a float32 scale a
row, the largest |y| / 448, or a given one. It takes a GPU with FP8: compute capability 8.9 or newer.

A program takes a whole row, because its scale needs every value of it. No multiprocessor has the registers for the
longest rows, so it computes them twice; the second time it finds gate and up in a cache.
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
    largest_size,
    quantise,
    require_scales_of_rows,
    room_for,
    scale_of,
    warps_of_row,
    write_numbers,
    write_scale,
)
from internvl_rt.kernels._launch import Launch, Target, next_power_of_2, run, target_of
from internvl_rt.kernels.swiglu import swiglu_reference

MAX_BLOCK = 4096  # columns that a program computes at a time


def swiglu_fp8_reference(gate_up_T2F: Tensor, scale_T: Tensor, static_scale_1: Tensor | None = None) -> Tensor:
    """Returns the numbers [T, F] and writes each row's scale."""
    numbers, scale = quantise(swiglu_reference(gate_up_T2F), static_scale_1)
    scale_T.copy_(scale)
    return numbers


@triton.jit
def _swiglu_of(gate_at, up_at, inside):
    """Returns SwiGLU rounded as swiglu does, in float32."""
    gate = tl.load(gate_at, mask=inside, other=0.0)
    up = tl.load(up_at, mask=inside, other=0.0).to(tl.float32)
    g = gate.to(tl.float32)
    silu = (g / (1.0 + tl.exp(-g))).to(gate.dtype).to(tl.float32)
    return (silu * up).to(gate.dtype).to(tl.float32)


@triton.jit
def _swiglu_fp8_kernel(gate_up, numbers, scale, static_scale, gate_up_stride, numbers_stride, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    gate_up += row * gate_up_stride
    largest = 0.0
    for first in range(0, F, BLOCK):
        column = first + tl.arange(0, BLOCK)
        y = _swiglu_of(gate_up + column, gate_up + F + column, column < F)
        largest = tl.maximum(largest, largest_size(y))
    s = scale_of(largest, static_scale)
    for first in range(0, F, BLOCK):
        column = first + tl.arange(0, BLOCK)
        y = _swiglu_of(gate_up + column, gate_up + F + column, column < F)
        write_numbers(y, s, largest, numbers + row * numbers_stride + column, column < F)
    write_scale(scale, row, s, largest)


def plan_swiglu_fp8(
    gate_up_T2F: Tensor, scale_T: Tensor, static_scale_1: Tensor | None = None, *, out: Tensor, target: Target
) -> tuple[Launch, ...]:
    rows, width = out.shape
    args: dict[str, Any] = {"gate_up": gate_up_T2F, "numbers": out, "scale": scale_T, "F": width}
    args |= {"gate_up_stride": gate_up_T2F.stride(0), "numbers_stride": out.stride(0)}
    block = min(MAX_BLOCK, next_power_of_2(width))
    constexprs: dict[str, Any] = {"BLOCK": block}
    if static_scale_1 is None:
        constexprs["static_scale"] = None
    else:
        args["static_scale"] = static_scale_1
    return (Launch(_swiglu_fp8_kernel, (rows, 1, 1), args, constexprs, num_warps=warps_of_row(block)),)


def swiglu_fp8(
    gate_up_T2F: Tensor, scale_T: Tensor, static_scale_1: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """Computes `swiglu_fp8_reference`, for rows at any stride; F is at most 32768.

    Raises ValueError naming the argument that does not fit.
    """
    x = gate_up_T2F
    require_one_of("gate_up_T2F", x.dtype, SPEC.tolerances)
    require(x.ndim == 2, "gate_up_T2F", "rows [T, 2F]", tuple(x.shape))
    require(x.shape[1] > 0 and x.shape[1] % 2 == 0, "gate_up_T2F", "an even width of 2 or more", x.shape[1])
    require_tensor("gate_up_T2F", x, tuple(x.shape), x.dtype, x.device)
    require_scales_of_rows("scale_T", scale_T, static_scale_1, x)
    out = room_for(out, (len(x), x.shape[1] // 2), x.device)
    run(plan_swiglu_fp8(x, scale_T, static_scale_1, out=out, target=target_of(x.device)))
    return out


def _make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Makes rows, which `factor` scales, and cuts them from a tensor with `padding` more columns of NaN."""
    rows, width = case["T"], 2 * case["F"]
    x = torch.randn(rows, width + case.sizes.get("padding", 0), dtype=torch.float32, device=device)
    x *= case.sizes.get("factor", 1.0)
    x[:, width:] = torch.nan
    return {
        "gate_up_T2F": x.to(dtype)[:, :width],
        "scale_T": torch.zeros(rows, dtype=torch.float32, device=device),
        "static_scale_1": torch.full((1,), 1 / 400, device=device) if case.sizes.get("static") else None,
    }


SPEC = KernelSpec(
    name="swiglu_fp8",
    used_by="every decoder with FP8 weights: before the down projection of more than 16 rows",
    reference=swiglu_fp8_reference,
    plan=plan_swiglu_fp8,
    launcher=swiglu_fp8,
    make_inputs=_make_inputs,
    cost=lambda case, dtype: Cost(
        bytes=case["T"] * ((2 * dtype.itemsize + 1) * case["F"] + 4), flops=8 * case["T"] * case["F"]
    ),
    test_cases=(
        *(Case(f"width_{width}", {"T": 3, "F": width, **IN_FP8}) for width in (1, 2, 15, 127, 1025, 4864)),
        Case("widest", {"T": 2, "F": 29568, **IN_FP8}),
        Case("no_rows", {"T": 0, "F": 64, **IN_FP8}),
        Case("strided", {"T": 5, "F": 100, "padding": 28, **IN_FP8}),
        Case("saturated", {"T": 4, "F": 512, "factor": 40.0, **IN_FP8}),  # exp(-g) overflows float32: g / inf is -0
        Case("zeros", {"T": 2, "F": 100, "factor": 0.0, **IN_FP8}),
        Case("static", {"T": 4, "F": 300, "static": True, **IN_FP8}),  # some numbers are too large
    ),
    model_cases=tuple(
        Case(f"width_{width}_{rows}_rows", {"T": rows, "F": width, **IN_FP8})
        for width in (4864, 8960, 18944, 29568)
        for rows in (64, 3392)  # a large decode step; the prompt of a picture of 13 tiles
    ),
    tolerances={
        torch.float32: Tolerance(1e-5, 1e-30, 2e-6, "the exponential differs in its last bits"),
        torch.float16: Tolerance(1.25e-3, 6e-6, 5e-4, "no result has this type"),
        torch.bfloat16: Tolerance(1e-2, 1e-30, 4e-3, "no result has this type"),
    },
    in_place=("scale_T",),
    stored=STORED_TOLERANCES,
)

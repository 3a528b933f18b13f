"""RMSNorm: y = w * cast(x / sqrt(mean(x^2) + eps)) over the last dimension.

The quotient is computed in float32 and cast back to x's dtype before the weight is applied, as in Qwen2, InternLM2 and,
without apex, InternViT-6B.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from internvl_rt.kernels._contract import (
    Case,
    Cost,
    KernelSpec,
    Tolerance,
    require,
    require_one_of,
    require_tensor,
    rows_of,
)
from internvl_rt.kernels._launch import Launch, Target, next_power_of_2, run, target_of
from internvl_rt.kernels.layer_norm import MAX_WIDTH, row_warps


def rms_norm_reference(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    return weight_D * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


@triton.jit
def rms_norm_row(values, D, eps):
    """Normalises one row without the weight, for every kernel with an RMSNorm; `values` are 0 from column D on."""
    return values * (1.0 / tl.sqrt_rn(tl.sum(values * values, axis=0) / D + eps))


@triton.jit
def _rms_norm_kernel(x, weight, y, x_stride, y_stride, eps, D, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    values = tl.load(x + row * x_stride + column, mask=inside, other=0.0)
    w = tl.load(weight + column, mask=inside, other=0.0)  # loaded before the reduction waits for the row
    quotient = rms_norm_row(values.to(tl.float32), D, eps).to(values.dtype).to(tl.float32)
    tl.store(y + row * y_stride + column, (quotient * w.to(tl.float32)).to(y.dtype.element_ty), mask=inside)


def plan_rms_norm(x: Tensor, weight_D: Tensor, eps: float, *, out: Tensor, target: Target) -> tuple[Launch, ...]:
    """Plans a launch whose width is an argument, so that widths with the same next power of two share one kernel."""
    width = x.shape[-1]
    x_RD, out_RD = rows_of("x", x), rows_of("out", out)
    return (
        Launch(
            _rms_norm_kernel,
            (x_RD.shape[0], 1, 1),
            {
                "x": x_RD,
                "weight": weight_D,
                "y": out_RD,
                "x_stride": x_RD.stride(0),
                "y_stride": out_RD.stride(0),
                "eps": eps,
                "D": width,
            },
            {"BLOCK": next_power_of_2(width)},
            num_warps=row_warps(width),
        ),
    )


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, *, out: Tensor | None = None) -> Tensor:
    """Computes `rms_norm_reference`, for `x` [..., D] whose rows lie at one stride; D is at most MAX_WIDTH.

    Raises ValueError naming the argument that does not fit.
    """
    width = x.shape[-1]
    require_one_of("x", x.dtype, SPEC.tolerances)
    require(1 <= width <= MAX_WIDTH, "x", f"a width from 1 to {MAX_WIDTH}", width)
    require_tensor("x", x, tuple(x.shape), x.dtype, x.device)
    require_tensor("weight_D", weight_D, (width,), x.dtype, x.device)
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    require_tensor("out", out, tuple(x.shape), x.dtype, x.device)
    run(plan_rms_norm(x, weight_D, eps, out=out, target=target_of(x.device)))
    return out


def _make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor | float]:
    """Makes rows, which `factor` scales, and cuts them from a tensor with `padding` more columns of NaN."""
    rows, width, padding = case["R"], case["D"], case.sizes.get("padding", 0)
    x = torch.randn(rows, width + padding, dtype=torch.float32, device=device) * case.sizes.get("factor", 1.0)
    x[:, width:] = torch.nan
    weight = torch.randn(width, dtype=torch.float32, device=device).to(dtype)
    return {"x": x.to(dtype)[:, :width], "weight_D": weight, "eps": 1e-6}


SPEC = KernelSpec(
    name="rms_norm",
    used_by="every decoder: prompts, and the norm before lm_head; InternViT-6B: the first norm of the tower",
    reference=rms_norm_reference,
    plan=plan_rms_norm,
    launcher=rms_norm,
    make_inputs=_make_inputs,
    cost=lambda case, dtype: Cost(
        bytes=dtype.itemsize * (2 * case["R"] + 1) * case["D"], flops=4 * case["R"] * case["D"]
    ),
    test_cases=(
        *(Case(f"width_{width}", {"R": 3, "D": width}) for width in (1, 2, 15, 17, 127, 128, 129, 896, 3200, 16384)),
        Case("no_rows", {"R": 0, "D": 64}),
        Case("one_row", {"R": 1, "D": 64}),
        Case("strided", {"R": 5, "D": 100, "padding": 28}),
        Case("zeros", {"R": 2, "D": 100, "factor": 0.0}),
        Case("huge", {"R": 4, "D": 1024, "factor": 1e4}),  # the squares do not fit into float16
        Case("tiny", {"R": 4, "D": 1024, "factor": 1e-3}),  # the mean square is as small as eps
    ),
    model_cases=(
        *(Case(f"vit_6b_{tiles}_tiles", {"R": 1025 * tiles, "D": 3200}) for tiles in (1, 13)),
        *(
            Case(f"decoder_{width}_{rows}_rows", {"R": rows, "D": width})
            for width in (896, 1536, 3584, 4096, 5120, 8192)
            for rows in (1, 3392)  # a decode step; the prompt of a picture of 13 tiles
        ),
    ),
    tolerances={
        torch.float32: Tolerance(1e-5, 1e-6, 2e-6, "sums over 16384 values in another order"),
        # Two roundings add up to two half units at most: 9.8e-4 or 7.8e-3 of a value just above a power of two.
        torch.float16: Tolerance(1.25e-3, 1e-6, 5e-4, "quotient and output are each rounded to 11 bits"),
        torch.bfloat16: Tolerance(1e-2, 1e-6, 4e-3, "quotient and output are each rounded to 8 bits"),
    },
)

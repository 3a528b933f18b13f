"""LayerNorm: y = (x - mean(x)) / sqrt(var(x) + eps) * w + b over the last dimension, statistics in float32.

The variance is computed from centred values, which costs little because they are in registers: E[x^2] - E[x]^2 in
float32 loses all digits when the mean is much larger than the deviation. The mean itself loses some, so values are
centred twice.
"""

import torch
import torch.nn.functional as F
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

MAX_WIDTH = 16384  # one program holds a row in registers


def layer_norm_reference(x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, weight_D.shape, weight_D, bias_D, eps)


@triton.jit
def layer_norm_row(values, inside, D, eps):
    """Normalises one row without weight and bias, for every kernel with a LayerNorm. `values` are 0 if not `inside`."""
    centred = tl.where(inside, values - tl.sum(values, axis=0) / D, 0.0)
    centred = tl.where(inside, centred - tl.sum(centred, axis=0) / D, 0.0)  # removes what rounding the mean left
    return centred * (1.0 / tl.sqrt_rn(tl.sum(centred * centred, axis=0) / D + eps))


@triton.jit
def _layer_norm_kernel(x, weight, bias, y, x_stride, y_stride, eps, D, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    values = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=inside, other=0.0)  # loaded before the reductions wait for the row
    b = tl.load(bias + column, mask=inside, other=0.0)
    normed = layer_norm_row(values, inside, D, eps) * w.to(tl.float32) + b.to(tl.float32)
    tl.store(y + row * y_stride + column, normed.to(y.dtype.element_ty), mask=inside)


def row_warps(width: int) -> int:
    """Counts the warps that hold one row in registers: a thread has 8 (16 bytes of bf16) to 32 values."""
    return min(16, max(1, next_power_of_2(width) // 512))


def plan_layer_norm(
    x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float, *, out: Tensor, target: Target
) -> tuple[Launch, ...]:
    width = x.shape[-1]
    x_RD, out_RD = rows_of("x", x), rows_of("out", out)
    return (
        Launch(
            _layer_norm_kernel,
            (x_RD.shape[0], 1, 1),
            {
                "x": x_RD,
                "weight": weight_D,
                "bias": bias_D,
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


def layer_norm(x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float, *, out: Tensor | None = None) -> Tensor:
    """Computes `layer_norm_reference`, for `x` [..., D] whose rows lie at one stride; D is at most MAX_WIDTH.

    Raises ValueError naming the argument that does not fit.
    """
    width = x.shape[-1]
    require_one_of("x", x.dtype, SPEC.tolerances)
    require(1 <= width <= MAX_WIDTH, "x", f"a width from 1 to {MAX_WIDTH}", width)
    require_tensor("x", x, tuple(x.shape), x.dtype, x.device)
    require_tensor("weight_D", weight_D, (width,), x.dtype, x.device)
    require_tensor("bias_D", bias_D, (width,), x.dtype, x.device)
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    require_tensor("out", out, tuple(x.shape), x.dtype, x.device)
    run(plan_layer_norm(x, weight_D, bias_D, eps, out=out, target=target_of(x.device)))
    return out


def _make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor | float]:
    """Makes rows of the kind that `fill` chooses; they are cut from a tensor with `padding` more columns."""
    rows, width = case["R"], case["D"]
    x = torch.randn(rows, width + case.sizes.get("padding", 0), dtype=torch.float32, device=device)
    fill = case.sizes.get("fill", "normal")
    if fill == "shifted":  # the mean is much larger than the deviation
        x = 0.1 * x + 1000
    elif fill == "constant":
        x = torch.full_like(x, 3.0)
    elif fill == "huge":
        x = 1e4 * x
    weight, bias = (torch.randn(width, dtype=torch.float32, device=device).to(dtype) for _ in range(2))
    return {"x": x.to(dtype)[:, :width], "weight_D": weight, "bias_D": bias, "eps": 1e-6}


SPEC = KernelSpec(
    name="layer_norm",
    used_by="InternViT-300M: the first norm of the tower",
    reference=layer_norm_reference,
    plan=plan_layer_norm,
    launcher=layer_norm,
    make_inputs=_make_inputs,
    cost=lambda case, dtype: Cost(
        bytes=dtype.itemsize * (2 * case["R"] + 2) * case["D"], flops=8 * case["R"] * case["D"]
    ),
    test_cases=(
        *(Case(f"width_{width}", {"R": 3, "D": width}) for width in (1, 2, 15, 17, 127, 128, 1024, 3200, 12800)),
        Case("no_rows", {"R": 0, "D": 64}),
        Case("strided", {"R": 5, "D": 100, "padding": 28}),
        *(Case(fill, {"R": 4, "D": 1024, "fill": fill}) for fill in ("shifted", "constant", "huge")),
    ),
    model_cases=tuple(
        Case(f"{name}_{tiles}_tiles", {"R": rows, "D": width})
        for name, width, per_tile in (
            ("vit_300m", 1024, 1025),
            ("projector_300m", 4096, 256),
            ("projector_6b", 12800, 256),
        )
        for tiles, rows in ((1, per_tile), (13, 13 * per_tile))
    ),
    tolerances={
        torch.float32: Tolerance(1e-5, 1e-5, 2e-6, "sums over 12800 values in another order"),
        torch.float16: Tolerance(1e-3, 1e-3, 5e-4, "the output is rounded once to 11 bits"),
        torch.bfloat16: Tolerance(8e-3, 8e-3, 4e-3, "the output is rounded once to 8 bits"),
    },
)

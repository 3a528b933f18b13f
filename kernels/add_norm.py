"""Adds a residual and normalises in one pass: x <- x + s * (y + b), and norm(x) of the stored x.

b is the bias of the product y, s is LayerScale (ViT); both may be missing. The norm is a LayerNorm if it has a bias and
an RMSNorm otherwise. It sees x as rounded to its dtype, as a separate norm kernel would, but need not fetch x again:
the pass makes 2 reads and 2 writes of the rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from internvl_rt.kernels._contract import Case, Cost, KernelSpec, Tolerance, require, require_one_of, require_tensor
from internvl_rt.kernels._launch import Launch, Target, next_power_of_2, run, target_of
from internvl_rt.kernels.layer_norm import MAX_WIDTH, layer_norm_reference, layer_norm_row, row_warps
from internvl_rt.kernels.rms_norm import rms_norm_reference, rms_norm_row


def add_norm_reference(
    x_RD: Tensor,
    y_RD: Tensor,
    bias_D: Tensor | None,
    scale_D: Tensor | None,
    weight_D: Tensor,
    norm_bias_D: Tensor | None,
    eps: float,
) -> Tensor:
    """Writes the sum into `x_RD` and returns the normalised rows."""
    update_RD = y_RD if bias_D is None else y_RD + bias_D
    x_RD.add_(update_RD if scale_D is None else scale_D * update_RD)
    if norm_bias_D is None:
        return rms_norm_reference(x_RD, weight_D, eps)
    return layer_norm_reference(x_RD, weight_D, norm_bias_D, eps)


@triton.jit
def _add_norm_kernel(
    x, y, bias, scale, weight, norm_bias, out, x_stride, y_stride, out_stride, eps, D, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    old = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    update = tl.load(y + row * y_stride + column, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=inside, other=0.0)  # loaded before the reductions wait for the row
    if bias is not None:
        update += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    if scale is not None:
        update *= tl.load(scale + column, mask=inside, other=0.0).to(tl.float32)
    new = (old + update).to(x.dtype.element_ty)
    tl.store(x + row * x_stride + column, new, mask=inside)

    values = new.to(tl.float32)
    if norm_bias is not None:
        b = tl.load(norm_bias + column, mask=inside, other=0.0)
        normed = layer_norm_row(values, inside, D, eps) * w.to(tl.float32) + b.to(tl.float32)
    else:
        normed = rms_norm_row(values, D, eps).to(new.dtype).to(tl.float32) * w.to(tl.float32)
    tl.store(out + row * out_stride + column, normed.to(out.dtype.element_ty), mask=inside)


def plan_add_norm(
    x_RD: Tensor,
    y_RD: Tensor,
    bias_D: Tensor | None,
    scale_D: Tensor | None,
    weight_D: Tensor,
    norm_bias_D: Tensor | None,
    eps: float,
    *,
    out: Tensor,
    target: Target,
) -> tuple[Launch, ...]:
    rows, width = x_RD.shape
    vectors = {"bias": bias_D, "scale": scale_D, "norm_bias": norm_bias_D}
    return (
        Launch(
            _add_norm_kernel,
            (rows, 1, 1),
            {
                "x": x_RD,
                "y": y_RD,
                "weight": weight_D,
                "out": out,
                "x_stride": x_RD.stride(0),
                "y_stride": y_RD.stride(0),
                "out_stride": out.stride(0),
                "eps": eps,
                "D": width,
                **{name: vector for name, vector in vectors.items() if vector is not None},
            },
            # a missing vector is None at compile time
            {"BLOCK": next_power_of_2(width), **{name: None for name in vectors if vectors[name] is None}},
            num_warps=row_warps(width),
        ),
    )


def add_norm(
    x_RD: Tensor,
    y_RD: Tensor,
    bias_D: Tensor | None,
    scale_D: Tensor | None,
    weight_D: Tensor,
    norm_bias_D: Tensor | None,
    eps: float,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Computes `add_norm_reference`; D at most MAX_WIDTH. `out` may be `y_RD`: a program reads a row, then writes it.

    Raises ValueError naming the argument that does not fit.
    """
    require_one_of("x_RD", x_RD.dtype, SPEC.tolerances)
    require(x_RD.ndim == 2, "x_RD", "rows [R, D]", tuple(x_RD.shape))
    rows, width = x_RD.shape
    require(1 <= width <= MAX_WIDTH, "x_RD", f"a width from 1 to {MAX_WIDTH}", width)
    require_tensor("x_RD", x_RD, (rows, width), x_RD.dtype, x_RD.device)
    require(rows <= 1 or x_RD.stride(0) >= width, "x_RD", "rows that do not overlap", f"strides {x_RD.stride()}")
    require_tensor("y_RD", y_RD, (rows, width), x_RD.dtype, x_RD.device)
    require_tensor("weight_D", weight_D, (width,), x_RD.dtype, x_RD.device)
    for name, vector in (("bias_D", bias_D), ("scale_D", scale_D), ("norm_bias_D", norm_bias_D)):
        if vector is not None:
            require_tensor(name, vector, (width,), x_RD.dtype, x_RD.device)
    if out is None:
        out = torch.empty((rows, width), dtype=x_RD.dtype, device=x_RD.device)
    require_tensor("out", out, (rows, width), x_RD.dtype, x_RD.device)
    target = target_of(x_RD.device)
    run(plan_add_norm(x_RD, y_RD, bias_D, scale_D, weight_D, norm_bias_D, eps, out=out, target=target))
    return out


def _make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor | float | None]:
    """Makes the vectors that `vectors` names; `mean` shifts the rows of x; `padding` is as in rms_norm, for x and y."""
    rows, width, padding = case["R"], case["D"], case.sizes.get("padding", 0)
    x, y = (torch.randn(rows, width + padding, dtype=torch.float32, device=device) for _ in range(2))
    x += case.sizes.get("mean", 0.0)
    x[:, width:] = y[:, width:] = torch.nan
    weight, bias, scale, norm_bias = (torch.randn(width, dtype=torch.float32, device=device).to(dtype) for _ in "wbsn")
    vectors = {"bias_D": bias, "scale_D": scale, "norm_bias_D": norm_bias}
    given = {name: vector if name in case["vectors"] else None for name, vector in vectors.items()}
    return {"x_RD": x.to(dtype)[:, :width], "y_RD": y.to(dtype)[:, :width], "weight_D": weight, "eps": 1e-6, **given}


PLAIN, VIT_300M, VIT_6B = (), ("bias_D", "scale_D", "norm_bias_D"), ("bias_D", "scale_D")


def _cost(case: Case, dtype: torch.dtype) -> Cost:
    vectors = 1 + len(case["vectors"])
    return Cost(dtype.itemsize * (4 * case["R"] + vectors) * case["D"], flops=11 * case["R"] * case["D"])


SPEC = KernelSpec(
    name="add_norm",
    used_by="every vision tower: after both residual branches of a layer",
    reference=add_norm_reference,
    plan=plan_add_norm,
    launcher=add_norm,
    make_inputs=_make_inputs,
    cost=_cost,
    test_cases=(
        *(
            Case(f"{norm}_width_{width}", {"R": 3, "D": width, "vectors": vectors})
            for norm, vectors in (("layer", VIT_300M), ("rms", VIT_6B))
            for width in (1, 2, 15, 129, 1024, 3200, 16384)
        ),
        *(
            Case("_and_".join(vectors) or "no_vectors", {"R": 2, "D": 96, "vectors": vectors})
            for vectors in (PLAIN, ("bias_D",), ("scale_D",), ("norm_bias_D",), ("scale_D", "norm_bias_D"))
        ),
        Case("no_rows", {"R": 0, "D": 64, "vectors": VIT_300M}),
        Case("one_row", {"R": 1, "D": 64, "vectors": PLAIN}),
        Case("strided", {"R": 5, "D": 100, "vectors": VIT_6B, "padding": 28}),
        Case("rms_huge", {"R": 4, "D": 1024, "vectors": VIT_6B, "mean": 1e4}),
    ),
    model_cases=(
        *(
            Case(f"{name}_{tiles}_tiles", {"R": 1025 * tiles, "D": width, "vectors": vectors})
            for name, width, vectors in (("vit_300m", 1024, VIT_300M), ("vit_6b", 3200, VIT_6B))
            for tiles in (1, 13)
        ),
        *(
            Case(f"decoder_{width}_{rows}_rows", {"R": rows, "D": width, "vectors": PLAIN})
            for width in (896, 1536, 3584, 4096, 5120, 8192)
            for rows in (1, 3392)  # a decode step; the prompt of a picture of 13 tiles
        ),
    ),
    tolerances={
        torch.float32: Tolerance(1e-5, 1e-5, 2e-6, "sums over 16384 values in another order"),
        # The float64 reference does not round x. The normalised row, up to 4 deviations wide, inherits x's rounding
        # times a weight of up to 4, and the bias of a LayerNorm can cancel the value but not the error: 16 half units.
        torch.float16: Tolerance(1e-3, 8e-3, 1e-3, "x, quotient and output are each rounded to 11 bits"),
        torch.bfloat16: Tolerance(8e-3, 6.4e-2, 8e-3, "x, quotient and output are each rounded to 8 bits"),
    },
    in_place=("x_RD",),
)

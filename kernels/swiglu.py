"""SwiGLU: y = cast(silu(g)) * u for the packed rows (g | u) of one product.

silu(g) = g / (1 + exp(-g)) is computed in float32 and cast back to g's dtype before the product with u, as in the
official model.
"""

from typing import Literal

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
from internvl_rt.kernels._launch import Launch, Target, cdiv, run, target_of

Gate = Literal["silu", "clamped"]  # silu(gate) up, or `clamped_swiglu_reference`
GATE_ALPHA, GATE_LIMIT = 1.702, 7.0
BLOCK = 1024  # columns of one program: 8 values of each half for each of its 128 threads


def swiglu_reference(gate_up_T2F: Tensor) -> Tensor:
    gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
    return F.silu(gate_TF) * up_TF


def clamped_swiglu_reference(gate_up_T2F: Tensor) -> Tensor:
    """Computes (up + 1) gate sigmoid(1.702 gate), gate at most 7 and up within 7: the gate of GPT-OSS's experts."""
    gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
    gate_TF, up_TF = gate_TF.clamp(max=GATE_LIMIT), up_TF.clamp(-GATE_LIMIT, GATE_LIMIT)
    return (up_TF + 1) * (gate_TF * torch.sigmoid(gate_TF * GATE_ALPHA))


@triton.jit
def _swiglu_kernel(gate_up, y, gate_up_stride, y_stride, F, BLOCK: tl.constexpr):
    num_blocks = tl.cdiv(F, BLOCK)
    row = (tl.program_id(0) // num_blocks).to(tl.int64)
    column = tl.program_id(0) % num_blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    gate = tl.load(gate_up + row * gate_up_stride + column, mask=inside, other=0.0)
    up = tl.load(gate_up + row * gate_up_stride + F + column, mask=inside, other=0.0).to(tl.float32)
    g = gate.to(tl.float32)
    silu = (g / (1.0 + tl.exp(-g))).to(gate.dtype).to(tl.float32)
    tl.store(y + row * y_stride + column, (silu * up).to(y.dtype.element_ty), mask=inside)


def plan_swiglu(gate_up_T2F: Tensor, *, out: Tensor, target: Target) -> tuple[Launch, ...]:
    x_RK, out_RF = rows_of("gate_up_T2F", gate_up_T2F), rows_of("out", out)
    rows, width = out_RF.shape
    return (
        Launch(
            _swiglu_kernel,
            (rows * cdiv(width, BLOCK), 1, 1),  # in one dimension, because the second holds 65535 programs only
            {
                "gate_up": x_RK,
                "y": out_RF,
                "gate_up_stride": x_RK.stride(0),
                "y_stride": out_RF.stride(0),
                "F": width,
            },
            {"BLOCK": BLOCK},
        ),
    )


def swiglu(gate_up_T2F: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Computes `swiglu_reference`, for [..., 2F] whose rows lie at one stride.

    Raises ValueError naming the argument that does not fit.
    """
    x = gate_up_T2F
    require_one_of("gate_up_T2F", x.dtype, SPEC.tolerances)
    require(x.shape[-1] > 0 and x.shape[-1] % 2 == 0, "gate_up_T2F", "an even width of 2 or more", x.shape[-1])
    require_tensor("gate_up_T2F", x, tuple(x.shape), x.dtype, x.device)
    shape = (*x.shape[:-1], x.shape[-1] // 2)
    if out is None:
        out = torch.empty(shape, dtype=x.dtype, device=x.device)
    require_tensor("out", out, shape, x.dtype, x.device)
    run(plan_swiglu(x, out=out, target=target_of(x.device)))
    return out


def _make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Makes rows, which `factor` scales, and cuts them from a tensor with `padding` more columns of NaN."""
    rows, width = case["T"], 2 * case["F"]
    x = torch.randn(rows, width + case.sizes.get("padding", 0), dtype=torch.float32, device=device)
    x *= case.sizes.get("factor", 1.0)
    x[:, width:] = torch.nan
    return {"gate_up_T2F": x.to(dtype)[:, :width]}


SPEC = KernelSpec(
    name="swiglu",
    used_by="every decoder: each layer of a prompt's chunk, and of a step of more than 16 rows",
    reference=swiglu_reference,
    plan=plan_swiglu,
    launcher=swiglu,
    make_inputs=_make_inputs,
    cost=lambda case, dtype: Cost(bytes=dtype.itemsize * 3 * case["T"] * case["F"], flops=5 * case["T"] * case["F"]),
    test_cases=(
        *(Case(f"width_{width}", {"T": 3, "F": width}) for width in (1, 2, 15, 16, 1023, 1024, 1025, 4864)),
        Case("widest", {"T": 2, "F": 29568}),
        Case("no_rows", {"T": 0, "F": 64}),
        Case("one_row", {"T": 1, "F": 64}),
        Case("strided", {"T": 5, "F": 100, "padding": 28}),
        Case("saturated", {"T": 4, "F": 512, "factor": 40.0}),  # exp(-g) overflows float32: g / inf is -0
        Case("zeros", {"T": 2, "F": 100, "factor": 0.0}),
    ),
    model_cases=tuple(
        Case(f"width_{width}_{rows}_rows", {"T": rows, "F": width})
        for width in (4864, 8960, 18944, 29568)
        for rows in (1, 3392)  # a decode step; the prompt of a picture of 13 tiles
    ),
    tolerances={
        torch.float32: Tolerance(1e-5, 1e-30, 2e-6, "the exponential differs in its last bits"),
        # Two roundings add up to two half units at most: 9.8e-4 or 7.8e-3 of a value just above a power of two.
        torch.float16: Tolerance(1.25e-3, 6e-6, 5e-4, "silu and output are each rounded to 11 bits, or to subnormals"),
        torch.bfloat16: Tolerance(1e-2, 1e-30, 4e-3, "silu and output are each rounded to 8 bits"),
    },
)

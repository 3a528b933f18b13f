"""Products of the few rows of a decode step with a weight in 8 bits, and what comes before and after them.

    y = act(norm(x) W^T + b) + residual      W[n, k] = number[n, k] * scale[n, k // 128], or times scale[n, 0]

It is `gemv`, and its kernel, but the weight is FP8 (e4m3) or int8 and takes half the time to read. x is not rounded to
8 bits. Numbers become operands as they are read (_numbers_8bit.py); a row's scale multiplies its sum, a scale of 128
columns their partial sum, in float32. No number may be NaN.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from internvl_rt.kernels._contract import Case, Cost, KernelSpec, require, require_one_of
from internvl_rt.kernels._gemv_plan import GemvPlan, GemvWorkspace, choose_8bit_plan
from internvl_rt.kernels._launch import Launch, Target, cdiv, run, target_of
from internvl_rt.kernels._numbers_8bit import BLOCK, KINDS, operand_constants, require_scales
from internvl_rt.kernels.dequantise import dequantise_reference
from internvl_rt.kernels.gemv import (
    MODELS,
    TOLERANCES,
    Activation,
    gemv_reference,
    plan_gemv,
    require_operands,
    result_of,
)
from internvl_rt.kernels.gemv import SPEC as GEMV


def gemv_8bit_reference(
    x_RK: Tensor,
    weight_NK: Tensor,
    scale_NG: Tensor,
    bias_N: Tensor | None,
    norm_weight_K: Tensor | None,
    eps: float,
    *,
    activation: Activation = "none",
    residual_RN: Tensor | None = None,
    plan: GemvPlan | None = None,  # does not change the result
    early_trigger: bool = False,  # nor does this
) -> Tensor:
    """Computes `gemv_reference` with the weight multiplied out and rounded to the dtype of x."""
    dense_NK = dequantise_reference(weight_NK, scale_NG, None, weight_NK.shape[1], dtype=x_RK.dtype)
    return gemv_reference(x_RK, dense_NK, bias_N, norm_weight_K, eps, activation=activation, residual_RN=residual_RN)


def plan_gemv_8bit(
    x_RK: Tensor,
    weight_NK: Tensor,
    scale_NG: Tensor,
    bias_N: Tensor | None,
    norm_weight_K: Tensor | None,
    eps: float,
    *,
    activation: Activation = "none",
    residual_RN: Tensor | None = None,
    plan: GemvPlan | None = None,
    workspace: GemvWorkspace | None = None,
    programmatic_launch: bool = True,
    early_trigger: bool = False,
    out: Tensor,
    target: Target,
) -> tuple[Launch, ...]:
    """Plans the launch of gemv, with the numbers' bits as the weight and their scales besides."""
    normed = norm_weight_K is not None
    plan = plan or choose_8bit_plan(len(x_RK), *weight_NK.shape, x_RK.dtype, target, normed=normed)
    if scale_NG.shape[1] > 1 and plan.matrix:
        columns = plan.block_k // (1 if plan.num_stages else plan.num_warps)
        require(columns <= BLOCK, "plan", f"at most {BLOCK} columns in a part of a chunk, with a scale each", columns)
    places = weight_NK.shape[1], weight_NK.stride(0), weight_NK.storage_offset()
    in_words = not plan.num_stages and all(place % 4 == 0 for place in places)
    bits_NK = weight_NK.view(torch.int32 if in_words else torch.int8)
    (launch,) = plan_gemv(
        *(x_RK, bits_NK, bias_N, norm_weight_K, eps),
        activation=activation,
        residual_RN=residual_RN,
        plan=plan,
        workspace=workspace,
        programmatic_launch=programmatic_launch,
        early_trigger=early_trigger,
        out=out,
        target=target,
    )
    operand = torch.float32 if launch.constexprs["WIDE"] or not plan.matrix else x_RK.dtype
    constexprs = {name: value for name, value in launch.constexprs.items() if name not in ("scale", "scale_stride")}
    constexprs |= {"WORD": 4 if in_words else 1, "BLOCKS": scale_NG.shape[1] > 1}
    constexprs |= operand_constants(weight_NK.dtype, operand, target, in_words=in_words)
    args = {**launch.args, "scale": scale_NG, "scale_stride": scale_NG.stride(0)}
    return (replace(launch, args=args, constexprs=constexprs),)


def gemv_8bit(
    x_RK: Tensor,
    weight_NK: Tensor,
    scale_NG: Tensor,
    bias_N: Tensor | None,
    norm_weight_K: Tensor | None,
    eps: float,
    *,
    activation: Activation = "none",
    residual_RN: Tensor | None = None,
    out: Tensor | None = None,
    plan: GemvPlan | None = None,
    workspace: GemvWorkspace | None = None,
    programmatic_launch: bool = True,
    early_trigger: bool = False,
) -> Tensor:
    """Computes `gemv_8bit_reference`, but with unrounded products of numbers and scales; for |x| below 2^64.

    The weight is float8_e4m3fn or int8, with float32 scales [N, 1] or [N, ceil(K / 128)]. All else is as in `gemv`,
    whose workspaces serve this too. It runs from compute capability 8.0 on.
    Raises ValueError naming the argument that does not fit.
    """
    require_one_of("weight_NK", weight_NK.dtype, KINDS)
    operands = {"x_RK": x_RK, "weight_NK": weight_NK, "bias_N": bias_N, "norm_weight_K": norm_weight_K}
    _, (n, k) = require_operands(operands, plan, numbers=weight_NK.dtype)
    require_scales("scale_NG", scale_NG, n, k, x_RK.device)
    out = result_of(x_RK, n, activation, residual_RN, out)
    run(
        plan_gemv_8bit(
            *(x_RK, weight_NK, scale_NG, bias_N, norm_weight_K, eps),
            activation=activation,
            residual_RN=residual_RN,
            plan=plan,
            workspace=workspace,
            programmatic_launch=programmatic_launch,
            early_trigger=early_trigger,
            out=out,
            target=target_of(x_RK.device),
        )
    )
    return out


def draw_numbers(case: Case, n: int, k: int, device: torch.device, padding: int = 0) -> tuple[Tensor, Tensor]:
    """Draws a weight of 8-bit numbers, about normal, in rows of `padding` more, and scales; elements are about K^-1/2.

    `kind` of the case is "float8" or "int8"; with `blocks` there is a scale for every 128 columns.
    """
    largest, dtype = {"float8": (448.0, torch.float8_e4m3fn), "int8": (127.0, torch.int8)}[case["kind"]]
    values = torch.randn(n, k + padding, dtype=torch.float32, device=device) * (largest / 4)
    numbers = values.clamp(-largest, largest)
    numbers = (numbers if case["kind"] == "float8" else numbers.round()).to(dtype)[:, :k]
    groups = cdiv(k, BLOCK) if case.sizes.get("blocks") else 1
    scale = (1 + torch.rand(n, groups, dtype=torch.float32, device=device)) * (2 / largest * k**-0.5)
    return numbers, scale


def _make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Draws what gemv is tested with, and in the place of its weight 8-bit numbers and scales."""
    inputs = GEMV.make_inputs(case, dtype, device)
    numbers, scale = draw_numbers(case, case["N"], case["K"], device, case.sizes.get("padding", 0))
    return {**inputs, "weight_NK": numbers, "scale_NG": scale}


def _cost(case: Case, dtype: torch.dtype) -> Cost:
    dense = GEMV.cost(case, dtype)
    n, k = case["N"], case["K"]
    scales = 4 * n * (cdiv(k, BLOCK) if case.sizes.get("blocks") else 1)
    return replace(dense, bytes=dense.bytes - (dtype.itemsize - 1) * n * k + scales)


_NORM: dict[str, Any] = {"norm": True}
_SWIGLU: dict[str, Any] = {"norm": True, "activation": "swiglu"}
_RESIDUAL: dict[str, Any] = {"residual": True}
_PLANS = (
    *(("rows", 1), ("rows", 2), ("split_rows", 2), ("matrix", 2), ("split", 5), ("stages", 16), ("split_stages", 5)),
)


def _test_cases() -> Iterator[Case]:
    def case(name: str, rows: int, n: int, k: int, **more: object) -> Case:
        return Case(name, {"R": rows, "N": n, "K": k, **more})

    for kind in ("float8", "int8"):
        for rows in (0, 1, 2, 3, 16):
            yield case(f"{kind}_rows_{rows}", rows, 40, 72, kind=kind, bias=True, **_NORM)
            yield case(f"{kind}_swiglu_{rows}", rows, 48, 64, kind=kind, **_SWIGLU)
            yield case(f"{kind}_residual_{rows}", rows, 24, 300, kind=kind, blocks=True, **_RESIDUAL)
        for plan, rows in _PLANS:
            name, how = f"{kind}_{plan}_{rows}", {"kind": kind, "plan": plan}
            yield case(f"{name}_plain", rows, 33, 300, **how)
            yield case(f"{name}_norm", rows, 16, 192, bias=True, padding=8, **how, **_NORM)
            yield case(
                f"{name}_blocks", rows, 34, 330, blocks=True, bias=True, padding=3, **how, **_SWIGLU, **_RESIDUAL
            )
            yield case(f"{name}_huge", rows, 16, 128, factor=1e4, **how, **_NORM)  # squares beyond float16
            yield case(f"{name}_tiny", rows, 16, 256, factor=1e-3, blocks=True, **how, **_RESIDUAL)
        for plan, k in (("rows", 1100), ("split_rows", 300)):
            more = {"plan": plan, "kind": kind, "early": True, "blocks": True, "bias": True}
            yield case(f"{kind}_early_{plan}_{k}", 2, 34, k, **more, **_SWIGLU, **_RESIDUAL)
        for rows in (1, 3):
            yield case(f"{kind}_one_by_one_{rows}", rows, 1, 1, kind=kind, **_NORM)
            yield case(f"{kind}_wide_{rows}", rows, 20, 1100, kind=kind, **_NORM)
            yield case(f"{kind}_zeros_{rows}", rows, 16, 64, kind=kind, factor=0.0, **_NORM)


def _model_cases() -> Iterator[Case]:
    for model, (width, mlp, _, _, _, _) in MODELS.items():
        for rows in (1, 2, 8, 16):
            products: tuple[tuple[str, int, int, dict[str, Any]], ...] = (
                ("o", width, width, _RESIDUAL),
                ("gate_up", 2 * mlp, width, _SWIGLU),
                ("down", width, mlp, _RESIDUAL),
            )
            for name, n, k, more in products:
                sizes = {"R": rows, "N": n, "K": k, **more}
                yield Case(f"{model}_{name}_{rows}", {**sizes, "kind": "float8"})
                if model == "8b" and rows in (1, 8):
                    yield Case(f"{model}_{name}_{rows}_blocks", {**sizes, "kind": "float8", "blocks": True})
                    yield Case(f"{model}_{name}_{rows}_int8", {**sizes, "kind": "int8"})


SPEC = KernelSpec(
    name="gemv_8bit",
    used_by="every decoder with 8-bit weights: products of a step of up to 16 rows",
    reference=gemv_8bit_reference,
    plan=plan_gemv_8bit,
    launcher=gemv_8bit,
    make_inputs=_make_inputs,
    cost=_cost,
    test_cases=tuple(_test_cases()),
    model_cases=tuple(_model_cases()),
    tolerances=TOLERANCES,
)

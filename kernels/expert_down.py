"""The second product of chosen experts, and the weighted sum of what a token's experts give.

x[t] = residual[t] + sum over j of weight[t, j] * (y[t * J + j] W_e^T)               e: the j-th expert of token t
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from internvl_rt.kernels._contract import Case, Cost, KernelSpec, require, require_tensor
from internvl_rt.kernels._expert_cases import (
    MODEL_CASES,
    TEST_CASES,
    TOLERANCES,
    draw_matrix,
    draw_routing,
    draw_weight,
    touched_bytes,
)
from internvl_rt.kernels._expert_plan import block_of, experts_of, plan_expert_product, require_product, result_of
from internvl_rt.kernels._expert_product_body import sum_pairs_kernel
from internvl_rt.kernels._launch import Launch, Target, cdiv, run, target_of
from internvl_rt.kernels._numbers_8bit import BLOCK

SUM_BLOCK = 512  # columns of a program that adds up parts: 8 for each of its 64 threads
# From blocks of so many pairs on parts are rounded to 16 bits: of a prompt they are many, and writing and reading them
# takes time. With fewer, float32 parts cost less than the weights.
ROUNDED_FROM = 64


def expert_down_reference(
    y_QF: Tensor,
    weight: Tensor,
    scale_NG: Tensor | None,
    zero_NG: Tensor | None,
    expert_id_TJ: Tensor,
    weight_TJ: Tensor,
    pair_W: Tensor,
    block_expert_B: Tensor,
    *,
    num_experts: int,
    first: int = 0,
    group: int = BLOCK,
    bias_N: Tensor | None = None,
    residual_TD: Tensor | None = None,
) -> Tensor:
    """Adds in float32, or in float64, the parts of all pairs in `pair_W`, with the weight in y's dtype."""
    wide = torch.float64 if y_QF.dtype == torch.float64 else torch.float32
    (tokens, num_chosen), width = weight_TJ.shape, len(weight) // num_experts
    z_QD = torch.zeros(len(y_QF), width, dtype=wide, device=y_QF.device)
    of_weight = weight, scale_NG, zero_NG, bias_N, num_experts, y_QF.shape[1], group, y_QF.dtype
    for pairs, dense, bias in experts_of(pair_W, block_expert_B, *of_weight):
        bias = None if bias is None else bias.to(wide)
        z_QD[pairs] = F.linear(y_QF[pairs].to(wide), dense.to(wide), bias) * weight_TJ.flatten()[pairs, None].to(wide)
    x_TD = z_QD.view(tokens, num_chosen, width).sum(1)
    return (x_TD if residual_TD is None else residual_TD + x_TD).to(y_QF.dtype)


def plan_expert_down(
    y_QF: Tensor,
    weight: Tensor,
    scale_NG: Tensor | None,
    zero_NG: Tensor | None,
    expert_id_TJ: Tensor,
    weight_TJ: Tensor,
    pair_W: Tensor,
    block_expert_B: Tensor,
    *,
    num_experts: int,
    first: int = 0,
    group: int = BLOCK,
    bias_N: Tensor | None = None,
    residual_TD: Tensor | None = None,
    programmatic_launch: bool = True,
    out: Tensor,
    target: Target,
) -> tuple[Launch, ...]:
    """Plans the products of all pairs into new memory, and their sums."""
    (tokens, num_chosen), width = expert_id_TJ.shape, out.shape[1]
    few = block_of(pair_W, block_expert_B) < ROUNDED_FROM
    part_QD = torch.empty(len(y_QF), width, dtype=torch.float32 if few else y_QF.dtype, device=y_QF.device)
    product = plan_expert_product(
        *(y_QF, weight, scale_NG, zero_NG, pair_W, block_expert_B),
        pairs_per_row=1,
        num_chosen=num_chosen,
        num_experts=num_experts,
        group=group,
        bias_N=bias_N,
        gate=None,
        pair_weight=weight_TJ,
        programmatic_launch=programmatic_launch,
        out=part_QD,
        target=target,
    )
    pdl = programmatic_launch and target.has_programmatic_launch
    args: dict[str, Any] = {
        "part": part_QD,
        "expert_id": expert_id_TJ,
        "out": out,
        "first": first,
        "num_experts": num_experts,
        "D": width,
        "part_stride": part_QD.stride(0),
        "residual_stride": 0 if residual_TD is None else residual_TD.stride(0),
        "out_stride": out.stride(0),
    }
    constexprs: dict[str, Any] = {"NUM_CHOSEN": num_chosen, "BLOCK": SUM_BLOCK, "PDL": pdl}
    (constexprs if residual_TD is None else args)["residual"] = residual_TD
    grid = (tokens * cdiv(width, SUM_BLOCK), 1, 1)
    return product, Launch(sum_pairs_kernel, grid, args, constexprs, num_warps=2, pdl=pdl)


def expert_down(
    y_QF: Tensor,
    weight: Tensor,
    scale_NG: Tensor | None,
    zero_NG: Tensor | None,
    expert_id_TJ: Tensor,
    weight_TJ: Tensor,
    pair_W: Tensor,
    block_expert_B: Tensor,
    *,
    num_experts: int,
    first: int = 0,
    group: int = BLOCK,
    bias_N: Tensor | None = None,
    residual_TD: Tensor | None = None,
    programmatic_launch: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """Computes `expert_down_reference` [T, D] of the pairs whose experts are `first` to `first + num_experts - 1`.

    y_QF: of `expert_gate_up`; its other rows are not read
    expert_id_TJ, weight_TJ, pair_W, block_expert_B: of `route_experts` for these tokens
    num_experts: how many experts have their weights here; expert first + e has rows e * D to (e + 1) * D - 1
    weight, scale_NG, zero_NG, group, bias_N, programmatic_launch: as in `expert_gate_up`

    `out` may be the residual. For one size of blocks, a row has the same bits whatever the others are, and every call
    gives the same. The parts of a row lie in memory before they are added: in float32, or rounded to y's dtype where
    blocks have 64 pairs or more.
    Raises ValueError naming the argument that does not fit.
    """
    require_product("y_QF", y_QF, weight, scale_NG, zero_NG, pair_W, block_expert_B, bias_N, num_experts, group)
    require(weight_TJ.ndim == 2 and weight_TJ.shape[1] > 0, "weight_TJ", "shape (T, J)", tuple(weight_TJ.shape))
    (tokens, num_chosen), device = weight_TJ.shape, y_QF.device
    require(len(y_QF) == tokens * num_chosen, "y_QF", f"{tokens} * {num_chosen} rows", len(y_QF))
    require_tensor("weight_TJ", weight_TJ, (tokens, num_chosen), torch.float32, device)
    require_tensor("expert_id_TJ", expert_id_TJ, (tokens, num_chosen), torch.int32, device)
    for name, tensor in (("weight_TJ", weight_TJ), ("expert_id_TJ", expert_id_TJ)):
        require(tensor.is_contiguous(), name, "a contiguous tensor", f"strides {tensor.stride()}")
    shape = tokens, len(weight) // num_experts
    out = result_of(shape, y_QF, out)
    if residual_TD is not None:
        require_tensor("residual_TD", residual_TD, shape, y_QF.dtype, device)
        if out.data_ptr() == residual_TD.data_ptr():
            same = out.stride() == residual_TD.stride()
            require(same, "out", "all of the residual or memory of its own", "a part of it")
    run(
        plan_expert_down(
            *(y_QF, weight, scale_NG, zero_NG, expert_id_TJ, weight_TJ, pair_W, block_expert_B),
            num_experts=num_experts,
            first=first,
            group=group,
            bias_N=bias_N,
            residual_TD=residual_TD,
            programmatic_launch=programmatic_launch,
            out=out,
            target=target_of(device),
        )
    )
    return out


def _make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Draws rows of pairs about as large as SwiGLU's; those of experts held elsewhere are NaN."""
    first, experts = case.sizes.get("held", (0, case["X"]))
    tokens, padding = case["T"], case.sizes.get("padding", 0)
    routing = draw_routing(case, device)
    elsewhere = (routing.expert_id_TJ < first) | (routing.expert_id_TJ >= first + experts)
    y_QF = draw_matrix(tokens * case["J"], case["F"], padding, dtype, device)
    y_QF.masked_fill_(elsewhere.view(-1, 1), torch.nan)
    residual = draw_matrix(tokens, case["D"], padding, dtype, device) if case.sizes.get("residual", True) else None
    return {
        "y_QF": y_QF,
        **routing._asdict(),
        "first": first,
        "residual_TD": residual,
        **draw_weight(case, experts * case["D"], case["F"], dtype, device),
    }


def _cost(case: Case, dtype: torch.dtype) -> Cost:
    tokens, pairs, width, inputs = case["T"], case["T"] * case["J"], case["D"], case["F"]
    read = touched_bytes(case, width, inputs, dtype) + 8 * pairs
    rows = pairs * inputs + tokens * width * (1 + case.sizes.get("residual", True))
    return Cost(bytes=read + dtype.itemsize * rows, flops=2 * pairs * width * inputs)


SPEC = KernelSpec(
    name="expert_down",
    used_by="every decoder with experts: each layer",
    reference=expert_down_reference,
    plan=plan_expert_down,
    launcher=expert_down,
    make_inputs=_make_inputs,
    cost=_cost,
    test_cases=TEST_CASES,
    model_cases=MODEL_CASES,
    tolerances=TOLERANCES,
)

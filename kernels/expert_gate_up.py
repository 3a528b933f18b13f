"""The first product of chosen experts: gate and up of each pair (token, expert), and SwiGLU of them.

y[q] = SwiGLU(x[q // J] W_e^T + b_e)      q: pairs of J for each token; e: the expert of pair q; W_e = (gate | up)
"""

from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from internvl_rt.kernels._contract import Case, Cost, KernelSpec, Tolerance, require, require_one_of
from internvl_rt.kernels._expert_cases import (
    MODEL_CASES,
    TEST_CASES,
    TOLERANCES,
    draw_matrix,
    draw_routing,
    draw_weight,
    touched_bytes,
)
from internvl_rt.kernels._expert_plan import experts_of, plan_expert_product, require_product, result_of
from internvl_rt.kernels._launch import Launch, Target, run, target_of
from internvl_rt.kernels._numbers_8bit import BLOCK
from internvl_rt.kernels.swiglu import Gate, clamped_swiglu_reference, swiglu_reference


def expert_gate_up_reference(
    x_TD: Tensor,
    weight: Tensor,
    scale_NG: Tensor | None,
    zero_NG: Tensor | None,
    pair_W: Tensor,
    block_expert_B: Tensor,
    num_chosen: int,
    *,
    num_experts: int,
    group: int = BLOCK,
    bias_N: Tensor | None = None,
    gate: Gate = "silu",
) -> Tensor:
    """Computes the rows of all pairs in `pair_W`, with the weight in x's dtype; the other rows are 0."""
    (tokens, width), rows = x_TD.shape, len(weight) // num_experts
    y_QF = x_TD.new_zeros(tokens * num_chosen, rows // 2)
    of_weight = weight, scale_NG, zero_NG, bias_N, num_experts, width, group, x_TD.dtype
    activation = swiglu_reference if gate == "silu" else clamped_swiglu_reference
    for pairs, dense, bias in experts_of(pair_W, block_expert_B, *of_weight):
        y_QF[pairs] = activation(F.linear(x_TD[pairs // num_chosen], dense, bias))
    return y_QF


def plan_expert_gate_up(
    x_TD: Tensor,
    weight: Tensor,
    scale_NG: Tensor | None,
    zero_NG: Tensor | None,
    pair_W: Tensor,
    block_expert_B: Tensor,
    num_chosen: int,
    *,
    num_experts: int,
    group: int = BLOCK,
    bias_N: Tensor | None = None,
    gate: Gate = "silu",
    programmatic_launch: bool = True,
    out: Tensor,
    target: Target,
) -> tuple[Launch, ...]:
    return (
        plan_expert_product(
            *(x_TD, weight, scale_NG, zero_NG, pair_W, block_expert_B),
            pairs_per_row=num_chosen,
            num_chosen=num_chosen,
            num_experts=num_experts,
            group=group,
            bias_N=bias_N,
            gate=gate,
            programmatic_launch=programmatic_launch,
            out=out,
            target=target,
        ),
    )


def expert_gate_up(
    x_TD: Tensor,
    weight: Tensor,
    scale_NG: Tensor | None,
    zero_NG: Tensor | None,
    pair_W: Tensor,
    block_expert_B: Tensor,
    num_chosen: int,
    *,
    num_experts: int,
    group: int = BLOCK,
    bias_N: Tensor | None = None,
    gate: Gate = "silu",
    programmatic_launch: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """Computes `expert_gate_up_reference` [T * J, F], but writes nothing to the rows of pairs that are not in `pair_W`.

    pair_W, block_expert_B: of `route_experts` for these tokens; a block is 16, 32, 64 or 128 pairs
    num_chosen: J, the experts that a token has
    num_experts: how many experts have their weights here; expert e has rows e * 2F to (e + 1) * 2F - 1, gate and up
    weight: of x's dtype with no scales; float8_e4m3fn or int8 with float32 scales [N, 1] or [N, ceil(D / 128)]; or
        int32 words of 4-bit numbers with scales [N, ceil(D / group)] in any dtype and uint8 zeros or None, which is 8
    bias_N: of all rows of the weight, if there is one. gate: "silu", or "clamped" as in GPT-OSS

    x may have rows at any stride. For one size of blocks, a row has the same bits whatever the others are. From sm_90
    on the kernel may start before the previous one has ended, and then waits for it; `programmatic_launch` says so.
    Raises ValueError naming the argument that does not fit.
    """
    require(num_chosen > 0, "num_chosen", "1 or more", num_chosen)
    require_one_of("gate", gate, get_args(Gate))
    require_product("x_TD", x_TD, weight, scale_NG, zero_NG, pair_W, block_expert_B, bias_N, num_experts, group)
    rows = len(weight) // num_experts
    require(rows % 2 == 0, "weight", "an even number of rows for each expert", rows)
    out = result_of((len(x_TD) * num_chosen, rows // 2), x_TD, out)
    run(
        plan_expert_gate_up(
            *(x_TD, weight, scale_NG, zero_NG, pair_W, block_expert_B, num_chosen),
            num_experts=num_experts,
            group=group,
            bias_N=bias_N,
            gate=gate,
            programmatic_launch=programmatic_launch,
            out=out,
            target=target_of(x_TD.device),
        )
    )
    return out


def _make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    experts = case.sizes.get("held", (0, case["X"]))[1]
    x_TD = draw_matrix(case["T"], case["D"], case.sizes.get("padding", 0), dtype, device, case.sizes.get("factor", 1.0))
    routing = draw_routing(case, device)
    return {
        "x_TD": x_TD,
        "pair_W": routing.pair_W,
        "block_expert_B": routing.block_expert_B,
        "num_chosen": case["J"],
        **({"gate": case["gate"]} if "gate" in case.sizes else {}),
        **draw_weight(case, experts * 2 * case["F"], case["D"], dtype, device),
    }


def _cost(case: Case, dtype: torch.dtype) -> Cost:
    tokens, pairs, width, outputs = case["T"], case["T"] * case["J"], case["D"], case["F"]
    read = touched_bytes(case, 2 * outputs, width, dtype)
    return Cost(bytes=read + dtype.itemsize * (tokens * width + pairs * outputs), flops=4 * pairs * width * outputs)


_FLOAT32 = Tolerance(1e-5, 4e-5, 2e-6, "sums in another order, which a clamped gate of up to 7 multiplies")
SPEC = KernelSpec(
    name="expert_gate_up",
    used_by="every decoder with experts: each layer",
    reference=expert_gate_up_reference,
    plan=plan_expert_gate_up,
    launcher=expert_gate_up,
    make_inputs=_make_inputs,
    cost=_cost,
    # Of experts held elsewhere there are rows that nobody writes; tests/kernels/test_expert_products.py has those.
    test_cases=tuple(case for case in TEST_CASES if "held" not in case.sizes),
    model_cases=MODEL_CASES,
    tolerances=TOLERANCES | {torch.float32: _FLOAT32},
)

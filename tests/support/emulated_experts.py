"""Emulates the products of a layer's experts (see emulated.py)."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from internvl_rt.kernels._expert_plan import block_of, experts_of
from internvl_rt.kernels._int4 import unpack_int4
from internvl_rt.kernels.expert_down import ROUNDED_FROM
from internvl_rt.kernels.swiglu import GATE_ALPHA, GATE_LIMIT
from support.emulated_arithmetic import product, rounded


def _numbers(weight: Tensor, zero_NG: Tensor | None, num_columns: int, group: int) -> Tensor:
    """Returns what the matrix units multiply with, in float32."""
    if weight.dtype != torch.int32:
        return weight.float()
    zero = 8 if zero_NG is None else zero_NG.float().repeat_interleave(group, 1)[:, :num_columns]
    return unpack_int4(weight, num_columns).float() - zero


def _products(
    x: Tensor, pairs_per_row: int, weight: Tensor, scale_NG: Tensor | None, zero_NG: Tensor | None, pair_W: Tensor,
    block_expert_B: Tensor, num_experts: int, group: int, bias_N: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Yields the pairs of each expert and their sums; the sums of each group of columns are scaled, then added up."""
    (_, k), size = x.shape, len(weight) // num_experts
    numbers_NK = _numbers(weight, zero_NG, k, group)
    scale = torch.ones(len(weight), 1) if scale_NG is None else scale_NG.float()
    width = k if scale.shape[1] == 1 else group
    row_N1 = torch.arange(len(weight))[:, None]
    for pairs, rows, _ in experts_of(pair_W, block_expert_B, row_N1, None, None, None, num_experts, 1, group, x.dtype):
        part, x_rows = slice(int(rows[0, 0]), int(rows[0, 0]) + size), x[pairs // pairs_per_row]
        y = torch.zeros(len(pairs), size)
        for scale_N, start in zip(scale[part].T, range(0, k, width), strict=True):
            columns = slice(start, start + width)
            y = y + product(x_rows[:, columns], numbers_NK[part, columns], x.dtype) * scale_N
        yield pairs, y if bias_N is None else y + bias_N[part].float()


def expert_gate_up(x_TD: Tensor, num_chosen: int, gate: str = "silu", **of_weight: Any) -> list[Tensor]:
    width = len(of_weight["weight"]) // of_weight["num_experts"] // 2
    out = torch.zeros(len(x_TD) * num_chosen, width, dtype=x_TD.dtype)
    for pairs, sums in _products(x_TD, num_chosen, **of_weight):
        gates, up = sums.chunk(2, dim=1)
        if gate == "clamped":
            gates, up = gates.clamp(max=GATE_LIMIT), up.clamp(-GATE_LIMIT, GATE_LIMIT) + 1
        alpha = GATE_ALPHA if gate == "clamped" else 1.0
        out[pairs] = (gates / (1 + (-alpha * gates).exp()) * up).to(out.dtype)
    return [out]


def expert_down(
    y_QF: Tensor,
    expert_id_TJ: Tensor,
    weight_TJ: Tensor,
    first: int,
    residual_TD: Tensor | None,
    **of_weight: Any,
) -> list[Tensor]:
    """Rounds the parts where blocks are large, and adds them in the order of the experts chosen."""
    dtype, (tokens, chosen) = y_QF.dtype, weight_TJ.shape
    width = len(of_weight["weight"]) // of_weight["num_experts"]
    is_rounded = block_of(of_weight["pair_W"], of_weight["block_expert_B"]) >= ROUNDED_FROM
    part_QD = torch.zeros(len(y_QF), width)
    for pairs, sums in _products(y_QF, 1, **of_weight):
        part = sums * weight_TJ.flatten()[pairs, None]
        part_QD[pairs] = rounded(part, dtype) if is_rounded else part
    x = torch.zeros(tokens, width) if residual_TD is None else residual_TD.float()
    for part in part_QD.view(tokens, chosen, width).unbind(1):
        x = x + part
    return [x.to(dtype)]

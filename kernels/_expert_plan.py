"""Decides how the products of a layer's experts are split among programs, and launches them.

The weights of all experts are one weight: expert e has rows e * R to (e + 1) * R - 1 of it. A weight is dense, of 8-bit
numbers (`_numbers_8bit.py`) or of 4-bit numbers in words (`_int4.py`), with their scales.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from internvl_rt.kernels._contract import require, require_one_of, require_tensor
from internvl_rt.kernels._expert_4bit_body import expert_product_4bit_kernel, few_pairs_4bit_kernel
from internvl_rt.kernels._expert_product_body import expert_product_kernel
from internvl_rt.kernels._int4 import CHUNK, PLANE
from internvl_rt.kernels._launch import Launch, Target, cdiv
from internvl_rt.kernels._numbers_8bit import KINDS, require_scales
from internvl_rt.kernels.dequantise import GROUPS, dequantise_reference
from internvl_rt.kernels.swiglu import Gate

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCKS = (16, 32, 64, 128)  # places of a block of pairs, which are the columns of a tile
# Pairs of an expert, on average, from which on a block has so many places. A block's weight is read once for all of its
# places, but on average half a block of each expert stays empty. Not measured.
PAIRS_FOR_BLOCK = ((192, 128), (48, 64), (12, 32), (0, 16))
GROUP_B = 4  # blocks that are computed together, so that those of one expert find the weight in L2
WARPS = 4  # of a program of 16 pairs with 4-bit numbers: each takes chunks of 128 columns of its own
PROGRAMS = 1.5  # for each multiprocessor, that a step of one token should have


def choose_block(num_tokens: int, num_chosen: int, num_experts: int) -> int:
    """Returns how many places a block of pairs has, for tokens that choose `num_chosen` of all `num_experts`."""
    pairs = num_tokens * num_chosen / num_experts
    return next(block for least, block in PAIRS_FOR_BLOCK if pairs >= least)


def block_of(pair_W: Tensor, block_expert_B: Tensor) -> int:
    """Returns how many places a block has; the smallest number if there are no blocks."""
    return len(pair_W) // len(block_expert_B) if len(block_expert_B) else BLOCKS[0]


def experts_of(
    pair_W: Tensor, block_expert_B: Tensor, weight: Tensor, scale_NG: Tensor | None, zero_NG: Tensor | None,
    bias_N: Tensor | None, num_experts: int, num_columns: int, group: int, dtype: torch.dtype,
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:  # fmt: skip
    """Yields the pairs of each expert that has some, its weight in `dtype`, and its bias; nothing on "meta"."""
    if pair_W.is_meta:
        return
    pair_BP, size = pair_W.view(-1, block_of(pair_W, block_expert_B)), len(weight) // num_experts
    for expert in block_expert_B[block_expert_B >= 0].unique().tolist():
        rows = slice(expert * size, (expert + 1) * size)
        pairs = pair_BP[block_expert_B == expert].flatten()
        if scale_NG is None:
            dense = weight[rows]
        else:
            zero = None if zero_NG is None else zero_NG[rows]
            dense = dequantise_reference(weight[rows], scale_NG[rows], zero, num_columns, group=group, dtype=dtype)
        yield pairs[pairs >= 0].long(), dense, None if bias_N is None else bias_N[rows]


@dataclass(frozen=True, slots=True)
class ExpertPlan:
    """A program takes `block_n` rows of an expert's weight, and K in steps of `block_k`."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@lru_cache(1024)
def choose_expert_plan(
    block: int, rows: int, num_chosen: int, weight: torch.dtype, group: int, dtype: torch.dtype, target: Target
) -> ExpertPlan:
    """Returns the plan for blocks of pairs, and experts with `rows` rows of a weight in `weight` each. Not measured.

    group: how many 4-bit numbers of a row share a scale

    It depends on no number of tokens, so neither does the order of a row's sum. Blocks of 16 pairs are for the few rows
    of a decode step, which take as long as reading the weights: a program takes 64 rows, or 32 where a single token's
    programs would be too few. On sm_90 it also takes 32 of 8-bit numbers, as the units that take 64 rows at a time
    would have them read 8 bytes at a time. Larger blocks are matrix products with tiles that fill shared memory.
    """
    if weight == torch.int32 and block == 16:
        return ExpertPlan(32, CHUNK * WARPS, WARPS, 1)
    if dtype == torch.float32:  # it has no matrix units
        return ExpertPlan(32, CHUNK if weight == torch.int32 else 32, 4, 2)
    deep = 4 if target.shared_bytes > 128 * 1024 else 3
    if weight == torch.int32:
        # Elsewhere all of x is in registers, too. Triton 3.9 keeps the products of all groups of a chunk in the tensor
        # memory of sm_100, which has no room for four.
        tall = block < 128 or target.capability == 90 or (target.capability in (100, 103) and group > GROUPS[0])
        return ExpertPlan(64, CHUNK, 4, deep) if block == 32 else ExpertPlan(64 if tall else 32, CHUNK, 8, 3)
    if block == 16:
        many = num_chosen * cdiv(rows, 64) >= PROGRAMS * target.num_sms
        tall = many and not (target.capability == 90 and weight.itemsize == 1)
        return ExpertPlan(64 if tall else 32, 128, 4, deep)
    if block == 32:
        return ExpertPlan(64, 128, 4, deep)
    return ExpertPlan(128, 64, 4, deep) if block == 64 else ExpertPlan(128, 64, 8, 3)


def plan_expert_product(
    x: Tensor,
    weight: Tensor,
    scale_NG: Tensor | None,
    zero_NG: Tensor | None,
    pair_W: Tensor,
    block_expert_B: Tensor,
    *,
    pairs_per_row: int,
    num_chosen: int,
    num_experts: int,
    group: int,
    bias_N: Tensor | None,
    gate: Gate | None,
    pair_weight: Tensor | None = None,
    programmatic_launch: bool,
    out: Tensor,
    target: Target,
) -> Launch:
    """Plans the product of each pair; `pairs_per_row`: how many share a row of x, 1 or `num_chosen`.

    gate: what SwiGLU of gate and up is, if that comes behind the product
    """
    block, blocks, dtype = block_of(pair_W, block_expert_B), len(block_expert_B), x.dtype
    k, n = x.shape[1], out.shape[1]
    plan = choose_expert_plan(block, len(weight) // num_experts, num_chosen, weight.dtype, group, dtype, target)
    pdl = programmatic_launch and target.has_programmatic_launch
    args: dict[str, Any] = {
        "x": x,
        "weight": weight.view(torch.int8) if weight.dtype == torch.float8_e4m3fn else weight,
        "pair": pair_W,
        "block_expert": block_expert_B,
        "out": out,
        "num_blocks": blocks,
        "pairs_per_row": pairs_per_row,
        "N": n,
        "K": k,
        "x_stride": x.stride(0),
        "weight_stride": weight.stride(0),
        "out_stride": out.stride(0),
    }
    constexprs: dict[str, Any] = {
        "BLOCK": block,
        "BLOCK_N": plan.block_n,
        "GROUP_B": GROUP_B,
        "SWIGLU": gate is not None,
        "CLAMPED": gate == "clamped",
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",  # 16 bits have one precision only
        "PDL": pdl,
    }
    kernel, most = expert_product_kernel, None if dtype == torch.float32 else 255
    optional = {"scale": scale_NG, "bias": bias_N, "pair_weight": pair_weight}
    if scale_NG is not None and weight.dtype == torch.int32:
        args["G"] = scale_NG.shape[1]
        constexprs |= {"GROUP": group, "ASM": not target.interpreted}  # the interpreter has no inline assembly
        optional["zero"] = zero_NG
        if block == 16:
            kernel = few_pairs_4bit_kernel
            constexprs |= {"BLOCK_K": plan.block_k, "WARPS": plan.num_warps}
            most = _most_registers(group, zero_NG is not None, dtype, target)
        else:
            kernel = expert_product_4bit_kernel
            constexprs |= {"PART": min(group, plan.block_k), "EVEN_K": k % CHUNK == 0}
    else:
        args["scale_stride"] = 0 if scale_NG is None else scale_NG.stride(0)
        constexprs |= {"BLOCK_K": plan.block_k, "EVEN_K": k % plan.block_k == 0, "FEW": block <= 32}
        constexprs |= {"KIND": KINDS.get(weight.dtype), "SCALES": scale_NG is not None and scale_NG.shape[1] > 1}
    args |= {name: tensor for name, tensor in optional.items() if tensor is not None}
    constexprs |= {name: None for name, tensor in optional.items() if tensor is None}
    return Launch(
        kernel,
        (blocks * cdiv(n, plan.block_n // 2 if gate else plan.block_n), 1, 1),
        args,
        constexprs,
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
        max_registers=most,
        pdl=pdl,
        matrix_units=plan.block_n >= 64 and dtype != torch.float32,  # those of a warpgroup and tcgen05 need 64 rows
    )


def _most_registers(group: int, has_zeros: bool, dtype: torch.dtype, target: Target) -> int | None:
    """Returns the most with which nothing spills of few_pairs_4bit_kernel, and three programs run at once if they can.

    gemv_4bit, whose loop it is, says the same of 16 rows.
    """
    if dtype == torch.float32:
        return None
    return 255 if group == GROUPS[0] or (has_zeros and target.capability in (100, 103)) else 168


def require_product(
    x_name: str,
    x: Tensor,
    weight: Tensor,
    scale_NG: Tensor | None,
    zero_NG: Tensor | None,
    pair_W: Tensor,
    block_expert_B: Tensor,
    bias_N: Tensor | None,
    num_experts: int,
    group: int,
) -> None:
    """Checks the operands of a product. Raises ValueError naming the one that does not fit."""
    dtype, device = x.dtype, x.device
    require_one_of(x_name, dtype, DTYPES)
    require(x.ndim == 2 and x.shape[1] > 0, x_name, "two dimensions and 1 column or more", tuple(x.shape))
    require_tensor(x_name, x, tuple(x.shape), dtype, device)
    k = x.shape[1]
    require(weight.ndim == 2 and len(weight) > 0, "weight", "two dimensions, none 0", tuple(weight.shape))
    n = len(weight)
    whole = num_experts > 0 and n % num_experts == 0
    require(whole, "num_experts", f"a part of the weight's {n} rows for each", num_experts)
    if bias_N is not None:
        require_tensor("bias_N", bias_N, (n,), dtype, device)
    if scale_NG is None:
        require_tensor("weight", weight, (n, k), dtype, device)
    elif weight.dtype == torch.int32:
        require_tensor("weight", weight, (n, PLANE * cdiv(k, CHUNK)), torch.int32, device)
        require_one_of("group", group, GROUPS)
        require_one_of("scale_NG", scale_NG.dtype, DTYPES)
        require_tensor("scale_NG", scale_NG, (n, cdiv(k, group)), scale_NG.dtype, device)
        require(scale_NG.is_contiguous(), "scale_NG", "a contiguous tensor", f"strides {scale_NG.stride()}")
    else:
        require_one_of("weight", weight.dtype, [*KINDS, torch.int32])
        require_tensor("weight", weight, (n, k), weight.dtype, device)
        require_scales("scale_NG", scale_NG, n, k, device)
    if zero_NG is not None:
        require(weight.dtype == torch.int32, "zero_NG", "None but with 4-bit numbers", "zeros")
        assert scale_NG is not None  # words are no dense weight
        require_tensor("zero_NG", zero_NG, tuple(scale_NG.shape), torch.uint8, device)
        require(zero_NG.is_contiguous(), "zero_NG", "a contiguous tensor", f"strides {zero_NG.stride()}")
    require(n // num_experts * weight.stride(0) < 2**31, "weight", "places in an expert that 32 bits can tell", n)
    block = block_of(pair_W, block_expert_B)
    require_one_of("pair_W", block, BLOCKS)
    require_tensor("block_expert_B", block_expert_B, (len(block_expert_B),), torch.int32, device)
    require_tensor("pair_W", pair_W, (block * len(block_expert_B),), torch.int32, device)


def result_of(shape: tuple[int, int], x: Tensor, out: Tensor | None) -> Tensor:
    """Returns `out`, or memory of x's dtype. Raises ValueError if it does not fit."""
    if out is None:
        out = torch.empty(shape, dtype=x.dtype, device=x.device)
    require_tensor("out", out, shape, x.dtype, x.device)
    require(out.numel() == 0 or out.data_ptr() != x.data_ptr(), "out", "memory of its own", "the input")
    return out

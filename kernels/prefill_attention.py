"""Causal attention of a batch of prefill chunks of any lengths over a paged KV cache.

    o[t, h] = softmax(q[t, h] . k[: p + 1, g] / sqrt(C)) v[: p + 1, g]      g = h // (H / G)

t is the query at index p of its sequence. A row's queries are the last of its seq_len tokens, after the cached prefix,
and their own keys and values are in the cache already. A program reads all keys of a block of queries for one kv head.
Where blocks are few, as for a question behind a long prefix, several programs share a block: see _prefill_plan.py.
Rows with one query work too, but decode_attention, which knows that every row has one, has less to do for them.

A head may have a sink, a learned logit whose exponential is added to the sum by which the softmax divides; whoever
writes the result adds it. With a window a query sees the last `window` keys up to its own; its program begins there.
"""

import math
from typing import Any

import torch
from torch import Tensor

from internvl_rt.kernels._contract import KernelSpec, Tolerance, require, require_tensor
from internvl_rt.kernels._kv_numbers import scale_arguments
from internvl_rt.kernels._launch import Launch, Target, cdiv, run, target_of
from internvl_rt.kernels._paged_attention import paged_attention_reference
from internvl_rt.kernels._prefill_attention_body import prefill_attention_kernel
from internvl_rt.kernels._prefill_attention_cases import MODEL_CASES, TEST_CASES, cost, make_inputs
from internvl_rt.kernels._prefill_plan import (
    MAX_FLAT_ROWS,
    PrefillWorkspace,
    SplitRule,
    build_prefill_workspace,
    choose_tiling,
    most_blocks,
    padded_rows,
    require_room,
    split_rule,
    sum_pairs,
)
from internvl_rt.kernels.decode_attention import check_queries_and_cache, require_index


def prefill_attention_reference(
    q_THC: Tensor,
    k_cache_BGPC: Tensor,
    v_cache_BGPC: Tensor,
    block_table_SN: Tensor,
    query_start_S1: Tensor,
    seq_len_S: Tensor,
    max_query_len: int,
    scale_BGP2: Tensor | None = None,
    splits: SplitRule | None = None,
    *,
    sinks_H: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Computes attention [T, H, C]; row s has queries query_start[s] to query_start[s + 1], max_query_len at most.

    `splits` has no effect.
    scale_BGP2: the scales of caches in 8 bits
    sinks_H: a logit of each query head, float32 or in the type of q
    window: how many keys up to its own a query sees; None: all
    """
    if q_THC.is_meta:  # a meta tensor has no lengths
        return torch.empty_like(q_THC)
    rows = block_table_SN, query_start_S1, seq_len_S
    operands = q_THC, k_cache_BGPC, v_cache_BGPC, *rows, scale_BGP2
    return paged_attention_reference(*operands, sinks_H=sinks_H, window=window)


def plan_prefill_attention(
    q_THC: Tensor,
    k_cache_BGPC: Tensor,
    v_cache_BGPC: Tensor,
    block_table_SN: Tensor,
    query_start_S1: Tensor,
    seq_len_S: Tensor,
    max_query_len: int,
    scale_BGP2: Tensor | None = None,
    splits: SplitRule | None = None,
    *,
    sinks_H: Tensor | None = None,
    window: int | None = None,
    workspace: PrefillWorkspace | None = None,
    out: Tensor,
    target: Target,
) -> tuple[Launch, ...]:
    num_tokens, num_heads, head_dim = q_THC.shape
    num_blocks, num_kv_heads, block_size, _ = k_cache_BGPC.shape
    num_rows, group = block_table_SN.shape[0], num_heads // num_kv_heads
    rule = splits or split_rule(head_dim)
    sizes = num_tokens, max_query_len, block_table_SN, k_cache_BGPC, group
    tiling = choose_tiling(*sizes, rule, target, q_THC.dtype, window)
    block_m, block_n, num_warps, num_stages, num_items, max_registers = tiling
    # The copy engine (TMA) reads the caches as [B * G * P, C], so a box of block_n slots must lie in one block. It
    # needs addresses at multiples of 16 bytes and counts rows in 32 bits.
    num_lines = num_blocks * num_kv_heads * block_size
    boxes = block_size % block_n == 0 and k_cache_BGPC.is_contiguous() and 0 < num_lines < 2**31
    aligned = k_cache_BGPC.data_ptr() % 16 == 0 and v_cache_BGPC.data_ptr() % 16 == 0
    use_tma = target.capability in (90, 100, 103) and boxes and aligned and window is None
    args: dict[str, Tensor | int | float] = {
        "q": q_THC,
        "k_cache": k_cache_BGPC,
        "v_cache": v_cache_BGPC,
        "y": out,
        "block_table": block_table_SN,
        "query_start": query_start_S1,
        "seq_len": seq_len_S,
        "q_stride": q_THC.stride(0),
        "block_stride": k_cache_BGPC.stride(0),
        "head_stride": k_cache_BGPC.stride(1),
        "slot_stride": k_cache_BGPC.stride(2),
        "table_stride": block_table_SN.stride(0),
        "group": group,
        "num_lines": num_lines,
        "scale_log2": math.log2(math.e) / math.sqrt(head_dim),
    }
    constexprs: dict[str, Any] = {
        "P": block_size,
        "C": head_dim,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "USE_TMA": use_tma,
        "PRECISION": "ieee" if q_THC.dtype == torch.float32 else None,
        "INLINE": not target.interpreted,
        "FLAT": 0,
        "SPLIT": padded_rows(num_rows) if num_items else 0,
        "SUM_PAIRS": sum_pairs(block_m, head_dim, target) if num_items else 0,
        "WINDOW": window,
    }
    optional = {"sinks": sinks_H} | scale_arguments(scale_BGP2)
    args |= {name: value for name, value in optional.items() if value is not None}
    constexprs |= {name: None for name, value in optional.items() if value is None}
    if num_items:
        grid = (num_items, num_kv_heads, 1)
        programs = num_items * num_kv_heads
        workspace = workspace or build_prefill_workspace(q_THC.device, programs, head_dim)
        require_room(workspace, programs, block_m, head_dim, q_THC.device)
        args |= {"partial_acc": workspace.parts, "partial_stats": workspace.stats, "arrived": workspace.arrived}
        args |= {"num_rows": num_rows, "num_splits": rule.num_splits or 0, "min_keys": rule.min_keys}
    else:
        # A graph does not know which row is the longest, so each might be.
        grid = (cdiv(max_query_len, block_m // group), num_kv_heads, num_rows)
        most = most_blocks(num_rows, num_tokens, max_query_len, block_m // group)
        if num_rows <= MAX_FLAT_ROWS and most < grid[0] * num_rows:
            grid = (most, num_kv_heads, 1)
            constexprs["FLAT"] = padded_rows(num_rows)
            args["num_rows"] = num_rows
        none = {"partial_acc", "partial_stats", "arrived", "num_rows", "num_splits", "min_keys"}
        constexprs |= dict.fromkeys(none - args.keys())
    return (
        Launch(
            prefill_attention_kernel,
            grid,
            args,
            constexprs,
            num_warps=num_warps,
            num_stages=num_stages,
            descriptors=use_tma,
            max_registers=max_registers,
            matrix_units=True,
        ),
    )


def prefill_attention(
    q_THC: Tensor,
    k_cache_BGPC: Tensor,
    v_cache_BGPC: Tensor,
    block_table_SN: Tensor,
    query_start_S1: Tensor,
    seq_len_S: Tensor,
    max_query_len: int,
    scale_BGP2: Tensor | None = None,
    splits: SplitRule | None = None,
    *,
    sinks_H: Tensor | None = None,
    window: int | None = None,
    workspace: PrefillWorkspace | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Computes `prefill_attention_reference`, for q with rows at any stride; the integer tensors are int32.

    No row may have more than max_query_len queries, which determines the grid. Queries before query_start[0] and from
    query_start[S] on belong to no sequence; their result is not written. Table entries and slots beyond a length are
    not used. Caches in 8 bits are float8_e4m3fn (from compute capability 8.9 on) or int8, and have `scale_BGP2`,
    bfloat16. With a window nothing is used of blocks that no query sees, and each window is a kernel of its own.
    splits: how the keys are split where there are few blocks of queries; None: as `split_rule` says. With its
    `num_splits` the keys of a sequence are split alike in every batch. The same lengths in the same order, with the
    same max_query_len, always give the same bits. A call that may split keys needs a workspace: without one it is made
    for this call, which takes one more launch.
    Raises ValueError naming the argument that does not fit.
    """
    require(query_start_S1.ndim == 1, "query_start_S1", "one dimension", query_start_S1.ndim)
    num_rows, device = query_start_S1.shape[0] - 1, q_THC.device
    require(0 <= num_rows < 2**16, "query_start_S1", "1 to 65536 elements", num_rows + 1)
    caches = k_cache_BGPC, v_cache_BGPC
    table = block_table_SN, seq_len_S
    check_queries_and_cache("q_THC", q_THC, *caches, *table, scale_BGP2, num_rows, sinks_H=sinks_H, window=window)
    require_index("query_start_S1", query_start_S1, (num_rows + 1,), device)
    require(0 <= max_query_len <= len(q_THC), "max_query_len", f"0 to {len(q_THC)} tokens", max_query_len)
    if out is None:
        out = torch.empty(q_THC.shape, dtype=q_THC.dtype, device=device)
    require_tensor("out", out, tuple(q_THC.shape), q_THC.dtype, device)
    require(out.is_contiguous(), "out", "a contiguous tensor", f"strides {out.stride()}")
    rows = (block_table_SN, query_start_S1, seq_len_S, max_query_len)
    operands = (q_THC, *caches, *rows, scale_BGP2, splits)
    how: dict[str, Any] = {"sinks_H": sinks_H, "window": window, "workspace": workspace}
    run(plan_prefill_attention(*operands, **how, out=out, target=target_of(device)))
    return out


SPEC = KernelSpec(
    name="prefill_attention",
    used_by="every decoder: each layer of a prompt's chunk; with batch_invariant every step",
    reference=prefill_attention_reference,
    plan=plan_prefill_attention,
    launcher=prefill_attention,
    make_inputs=make_inputs,
    cost=cost,
    test_cases=TEST_CASES,
    model_cases=MODEL_CASES,
    tolerances={
        torch.float32: Tolerance(2e-5, 2e-5, 4e-6, "scores of up to 50 are right to 4e-6, and so are probabilities"),
        torch.float16: Tolerance(2e-3, 2e-3, 1e-3, "probabilities and output are rounded to 11 bits"),
        torch.bfloat16: Tolerance(1.6e-2, 1.6e-2, 5e-3, "probabilities and output are rounded to 8 bits"),
    },
)

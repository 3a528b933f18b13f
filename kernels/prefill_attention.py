"""Causal attention of a batch of prefill chunks of any lengths over a paged KV cache.

    o[t, h] = softmax(q[t, h] . k[: p + 1, g] / sqrt(C)) v[: p + 1, g]      g = h // (H / G)

t is the query at index p of its sequence. A row's queries are the last of its seq_len tokens, after the cached prefix,
and their own keys and values are in the cache already. A program reads all keys of a block of queries for one kv head.
Where blocks are few, as for a question behind a long prefix, several programs share a block: see _prefill_plan.py.
Rows with one query work too, but decode_attention, which knows that every row has one, has less to do for them.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from internvl_rt.kernels._contract import Case, Cost, KernelSpec, Tolerance, require, require_tensor
from internvl_rt.kernels._kv_numbers import KV_FORMATS, in_8_bits, scale_arguments
from internvl_rt.kernels._launch import Launch, Target, cdiv, run, target_of
from internvl_rt.kernels._paged_attention import make_paged_cache, paged_attention_reference
from internvl_rt.kernels._prefill_attention_body import prefill_attention_kernel
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
from internvl_rt.kernels.decode_attention import (
    BLOCK_SIZES,
    FILLS,
    HEAD_DIMS,
    MODEL_HEADS,
    check_queries_and_cache,
    require_index,
)


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
) -> Tensor:
    """Computes attention [T, H, C]; row s has queries query_start[s] to query_start[s + 1], max_query_len at most.

    `splits` has no effect. scale_BGP2: the scales of caches in 8 bits
    """
    if q_THC.is_meta:  # a meta tensor has no lengths
        return torch.empty_like(q_THC)
    rows = block_table_SN, query_start_S1, seq_len_S
    return paged_attention_reference(q_THC, k_cache_BGPC, v_cache_BGPC, *rows, scale_BGP2)


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
    workspace: PrefillWorkspace | None = None,
    out: Tensor,
    target: Target,
) -> tuple[Launch, ...]:
    num_tokens, num_heads, head_dim = q_THC.shape
    num_blocks, num_kv_heads, block_size, _ = k_cache_BGPC.shape
    num_rows, group = block_table_SN.shape[0], num_heads // num_kv_heads
    rule = splits or split_rule(head_dim)
    sizes = num_tokens, max_query_len, block_table_SN, k_cache_BGPC, group
    tiling = choose_tiling(*sizes, rule, target, q_THC.dtype)
    block_m, block_n, num_warps, num_stages, num_items, max_registers = tiling
    # The copy engine (TMA) reads the caches as [B * G * P, C], so a box of block_n slots must lie in one block. It
    # needs addresses at multiples of 16 bytes and counts rows in 32 bits.
    num_lines = num_blocks * num_kv_heads * block_size
    boxes = block_size % block_n == 0 and k_cache_BGPC.is_contiguous() and 0 < num_lines < 2**31
    aligned = k_cache_BGPC.data_ptr() % 16 == 0 and v_cache_BGPC.data_ptr() % 16 == 0
    use_tma = target.capability in (90, 100, 103) and boxes and aligned
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
    }
    of_scales = scale_arguments(scale_BGP2)
    args |= {name: value for name, value in of_scales.items() if value is not None}
    constexprs |= {name: None for name, value in of_scales.items() if value is None}
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
    workspace: PrefillWorkspace | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Computes `prefill_attention_reference`, for q with rows at any stride; the integer tensors are int32.

    No row may have more than max_query_len queries, which determines the grid. Queries before query_start[0] and from
    query_start[S] on belong to no sequence; their result is not written. Table entries and slots beyond a length are
    not used. Caches in 8 bits are float8_e4m3fn (from compute capability 8.9 on) or int8, and have `scale_BGP2`,
    bfloat16.
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
    check_queries_and_cache("q_THC", q_THC, *caches, block_table_SN, seq_len_S, scale_BGP2, num_rows)
    require_index("query_start_S1", query_start_S1, (num_rows + 1,), device)
    require(0 <= max_query_len <= len(q_THC), "max_query_len", f"0 to {len(q_THC)} tokens", max_query_len)
    if out is None:
        out = torch.empty(q_THC.shape, dtype=q_THC.dtype, device=device)
    require_tensor("out", out, tuple(q_THC.shape), q_THC.dtype, device)
    require(out.is_contiguous(), "out", "a contiguous tensor", f"strides {out.stride()}")
    rows = (block_table_SN, query_start_S1, seq_len_S, max_query_len)
    operands = (q_THC, *caches, *rows, scale_BGP2, splits)
    run(plan_prefill_attention(*operands, workspace=workspace, out=out, target=target_of(device)))
    return out


def _make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Makes a batch and its cache. `chunks` holds (cached tokens, new tokens) for each row; `splits` names a rule."""
    new_lens = [new for _, new in case["chunks"]]
    seq_lens = [cached + new for cached, new in case["chunks"]]
    starts = [sum(new_lens[:row]) for row in range(len(new_lens) + 1)]
    heads_wide = case["H"] + case.sizes.get("beside", 0)  # q is cut from wider rows, with NaN beside it
    q = torch.full((starts[-1], heads_wide, case["C"]), math.nan, dtype=dtype, device=device)
    q[:, : case["H"]] = torch.randn(starts[-1], case["H"], case["C"], dtype=torch.float32, device=device).to(dtype)
    return {
        "q_THC": q[:, : case["H"]],
        **make_paged_cache(case, seq_lens, dtype, device),
        "query_start_S1": torch.tensor(starts, dtype=torch.int32).to(device),
        "seq_len_S": torch.tensor(seq_lens, dtype=torch.int32).to(device),
        "max_query_len": max(new_lens, default=0),
        "splits": TEST_RULES.get(case.sizes.get("splits", "")),
    }


TEST_RULES = {"none": SplitRule(1, num_splits=1), "three": SplitRule(1, num_splits=3), "short": SplitRule(64)}


def _cost(case: Case, dtype: torch.dtype) -> Cost:
    tokens, new = sum(cached + new for cached, new in case["chunks"]), sum(new for _, new in case["chunks"])
    pairs = sum(new * cached + new * (new + 1) // 2 for cached, new in case["chunks"])
    read = 2 * tokens * case["G"] * (case["C"] + 2 if "cache" in case.sizes else dtype.itemsize * case["C"])
    return Cost(bytes=read + dtype.itemsize * 2 * new * case["H"] * case["C"], flops=4 * pairs * case["H"] * case["C"])


def _case(
    name: str, *chunks: tuple[int, int], heads: int = 2, kv_heads: int = 1, channels: int = 16, **more: int | str
) -> Case:
    return Case(name, {"chunks": chunks, "H": heads, "G": kv_heads, "C": channels, "P": 64} | more)


def _model_case(
    name: str, cached: int, new: int, empty_rows: int = 0, cache: str | None = None, block_size: int = 64
) -> Case:
    heads, kv_heads, channels = MODEL_HEADS[name]
    chunks = (cached, new), *[(0, 0)] * empty_rows
    among = f"_among_{empty_rows}_empty" if empty_rows else ""
    suffix, more = (f"_{cache}", in_8_bits(cache)) if cache else ("", {})
    blocks = f"_blocks_of_{block_size}" if block_size != 64 else ""
    sizes = {"heads": heads, "kv_heads": kv_heads, "channels": channels, "P": block_size, **more}
    return _case(f"{name}_{new}_behind_{cached}{among}{suffix}{blocks}", *chunks, **sizes)


def _several(name: str, *chunks: tuple[int, int]) -> Case:
    heads, kv_heads, channels = MODEL_HEADS[name]
    return _case(f"{name}_{len(chunks)}_rows", *chunks, heads=heads, kv_heads=kv_heads, channels=channels)


BEHIND_A_PREFIX = ((64, 1), (63, 1), (64, 64), (1, 63), (100, 30), (128, 65), (200, 3))
PREFIXES = (3392, 8192, 32704)  # cached tokens before a question: a picture of 13 tiles, and long ones


def _cases_of(cache: str) -> Iterator[Case]:
    """Returns the test cases of caches in 8 bits."""
    how = in_8_bits(cache)
    yield _case(f"{cache}_lengths", *((0, new) for new in (1, 2, 15, 16, 17, 63, 64, 65)), splits="none", **how)
    yield _case(f"{cache}_behind_a_prefix", *BEHIND_A_PREFIX, splits="none", **how)
    for size in BLOCK_SIZES:
        chunks = (0, size + 1), (size, size), (150, 20)
        yield _case(f"{cache}_blocks_of_{size}", *chunks, P=size, splits="none", **how)
    for channels in HEAD_DIMS:
        yield _case(f"{cache}_channels_{channels}", (70, 70), channels=channels, splits="none", **how)
        yield _case(f"{cache}_split_channels_{channels}", (170, 9), channels=channels, splits="short", **how)
    yield _case(f"{cache}_group_7", (60, 40), heads=14, kv_heads=2, splits="none", **how)
    yield _case(f"{cache}_strided", (70, 20), (0, 3), heads=4, kv_heads=2, beside=3, padding=16, splits="none", **how)
    yield _case(f"{cache}_unaligned", (70, 20), (0, 3), heads=4, kv_heads=2, padding=4, splits="none", **how)
    for fill in FILLS:
        yield _case(f"{cache}_{fill}", (70, 40), channels=32, fill=fill, splits="none", **how)
    yield _case(f"{cache}_question", (300, 20), heads=4, kv_heads=2, **how)
    yield _case(f"{cache}_empty_rows", (0, 0), (70, 0), (0, 5), (64, 3), (0, 0), **how)


SPEC = KernelSpec(
    name="prefill_attention",
    used_by="every decoder: each layer of a prompt's chunk; with batch_invariant every step",
    reference=prefill_attention_reference,
    plan=plan_prefill_attention,
    launcher=prefill_attention,
    make_inputs=_make_inputs,
    cost=_cost,
    test_cases=(
        _case("lengths", *((0, new) for new in (1, 2, 15, 16, 17, 63, 64, 65)), splits="none"),
        _case("longer", (0, 127), (0, 129), (0, 0), (0, 130), splits="none"),
        _case("behind_a_prefix", *BEHIND_A_PREFIX, splits="none"),
        _case("empty_rows", (0, 0), (70, 0), (0, 5), (0, 0), (64, 3), (0, 0), splits="none"),
        _case("all_empty", (0, 0), (3, 0)),
        _case("no_rows"),
        *(
            _case(f"blocks_of_{size}", (0, size + 1), (size, size), (150, 20), P=size, splits="none")
            for size in BLOCK_SIZES
        ),
        *(_case(f"channels_{channels}", (70, 70), channels=channels, splits="none") for channels in HEAD_DIMS),
        *(_case(f"group_{group}", (60, 40), heads=2 * group, kv_heads=2, splits="none") for group in (1, 5, 6, 7, 16)),
        _case("shared_prefix", (128, 22), (128, 3), (192, 8), heads=4, kv_heads=2, shared=2, splits="none"),
        _case("strided", (70, 20), (0, 3), heads=4, kv_heads=2, beside=3, padding=8, splits="none"),
        _case("unaligned", (70, 20), (0, 3), heads=4, kv_heads=2, padding=3, splits="none"),
        *(_case(fill, (70, 40), channels=32, fill=fill, splits="none") for fill in FILLS),
        # Keys are split.
        _case("question", (300, 20), heads=4, kv_heads=2),
        _case("question_among_empty_rows", *((0, 0),) * 3, (420, 12), *((0, 0),) * 4),
        _case("questions", (300, 9), (0, 5), (130, 0), (64, 1), (133, 40)),
        _case("many_questions", *((30 * row, 1) for row in range(9))),
        _case("across_splits", (100, 120), splits="short"),
        _case("many_splits", (2111, 3), splits="short"),
        _case("three_splits", (300, 20), (5, 3), (0, 70), (0, 0), (63, 1), splits="three"),
        *(_case(f"split_blocks_of_{size}", (size, size), (150, 20), P=size) for size in BLOCK_SIZES),
        *(_case(f"split_channels_{channels}", (170, 9), channels=channels, splits="short") for channels in HEAD_DIMS),
        *(_case(f"split_group_{group}", (150, 9), heads=2 * group, kv_heads=2) for group in (1, 5, 6, 7, 16)),
        _case("split_strided", (140, 20), (0, 3), heads=4, kv_heads=2, beside=3, padding=8),
        _case("split_unaligned", (140, 20), (0, 3), heads=4, kv_heads=2, padding=3),
        *(_case(f"split_{fill}", (170, 20), channels=32, fill=fill, splits="short") for fill in FILLS),
        *(case for cache in KV_FORMATS for case in _cases_of(cache)),
    ),
    model_cases=(
        *(_model_case(name, cached, new) for name in MODEL_HEADS for cached, new in ((0, 3392), (8192, 512))),
        *(_model_case(name, cached, 64) for name in ("1b", "8b") for cached in PREFIXES),
        *(_model_case(name, 3392, 64, empty_rows=7) for name in ("1b", "8b")),
        *(
            _several(name, (0, 1024), (3392, 64), *((0, new) for new in (512, 256, 100, 50, 30, 12)))
            for name in ("1b", "8b")
        ),
        *(
            _model_case(name, cached, new, cache=cache)
            for cache in KV_FORMATS
            for name in ("1b", "8b")
            for cached, new in ((0, 3392), (3392, 64), (8192, 512))
        ),
        *(
            _model_case("8b", *chunk, cache="int8", block_size=size)
            for size in (16, 32, 128)
            for chunk in ((0, 3392), (3392, 64))
        ),
    ),
    tolerances={
        torch.float32: Tolerance(2e-5, 2e-5, 4e-6, "scores of up to 50 are right to 4e-6, and so are probabilities"),
        torch.float16: Tolerance(2e-3, 2e-3, 1e-3, "probabilities and output are rounded to 11 bits"),
        torch.bfloat16: Tolerance(1.6e-2, 1.6e-2, 5e-3, "probabilities and output are rounded to 8 bits"),
    },
)

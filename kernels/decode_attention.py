"""Attention of one new token of each sequence over a paged KV cache; its keys are split over the chip's programs.

    o[s, h] = softmax(q[s, h] . k[:n, g] / sqrt(C)) v[:n, g]      n = seq_len[s], g = h // (H / G)

The time goes to reading keys and values, so the work is divided by them: the split plan (csrc/paged_kv_cache.h,
StepBuffers) lists items (row, first block, end block) of about equal size, whatever the sequences' lengths. A program
takes one item for one kv head. The last program of a row and kv head to finish adds up the row's parts in the plan's
order, so the result does not depend on which one was last. The grid has a program for each item that the plan has room
for, so one CUDA graph serves any lengths.

A head may have a sink, a learned logit whose exponential is added to the sum by which the softmax divides; whoever
writes the result adds it. With a window only the last `window` keys are seen. The plan is that of all keys, so that one
serves layers of both kinds; programs of items before the window end at once.
"""

import math
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from internvl_rt.kernels._contract import KernelSpec, Tolerance, require, require_one_of, require_tensor
from internvl_rt.kernels._decode_attention_body import ROWS, decode_attention_kernel
from internvl_rt.kernels._decode_attention_cases import MODEL_CASES, TEST_CASES, cost, make_inputs
from internvl_rt.kernels._kv_numbers import check_scales, scale_arguments
from internvl_rt.kernels._launch import Launch, Target, run, target_of
from internvl_rt.kernels._paged_attention import BLOCK_SIZES, HEAD_DIMS, paged_attention_reference
from internvl_rt.kernels._split_plan import build_splits as build_splits

# The most bytes of the following kernels' weights that are brought to L2. An H100's and an H200's L2 of 50 MB is two
# halves, and a multiprocessor reads through the half that is near to it, so that either may come to hold all of them:
# 20 MB leave some of the 25 MB to keys, values and activations. The 1B's `o` and `gate_up` have 19.04 MB.
L2_PREFETCH_BYTES = 19 * 2**20
# Where weights are brought to L2: H100 and H200, B200, B300. One instruction brings a whole chunk there, and memory
# brings some 20 MB in the time of an attention. Not on 120, though it has the instruction: memory brings 4 to 10 MB in
# that time, and L2 has 32 to 128 MB, depending on the chip. Before 90 a kernel does not start before the previous one
# has ended, so what is brought takes bandwidth from keys and values.
PREFETCHES_WEIGHTS = (90, 100, 103)
LINE_BYTES = 128
# Of a thread, for the parts that are added at once. Without a limit the compiler aims at three or four programs on a
# multiprocessor, and spills a little where that is just missed.
REGISTERS = 184
MAX_GROUP = ROWS.value  # the most query heads that may share a kv head


def decode_attention_reference(
    q_SHC: Tensor,
    k_cache_BGPC: Tensor,
    v_cache_BGPC: Tensor,
    block_table_SN: Tensor,
    seq_len_S: Tensor,
    split_start_S1: Tensor,
    split_W3: Tensor,
    scale_BGP2: Tensor | None = None,
    counters_SG: Tensor | None = None,
    *,
    sinks_H: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Computes attention [S, H, C]; zeros for rows of length 0, which pad a batch. The split plan has no effect.

    scale_BGP2: the scales of caches in 8 bits
    sinks_H: a logit of each query head, float32 or in the type of q
    window: how many of a sequence's last keys are seen; None: all
    """
    out_SHC = torch.zeros_like(q_SHC)
    if q_SHC.is_meta:  # a meta tensor has no lengths
        return out_SHC
    used = seq_len_S.nonzero().flatten()
    query_start = torch.arange(len(used) + 1, dtype=torch.int32, device=q_SHC.device)
    operands = q_SHC[used], k_cache_BGPC, v_cache_BGPC, block_table_SN[used], query_start, seq_len_S[used], scale_BGP2
    out_SHC[used] = paged_attention_reference(*operands, sinks_H=sinks_H, window=window)
    return out_SHC


def plan_decode_attention(
    q_SHC: Tensor,
    k_cache_BGPC: Tensor,
    v_cache_BGPC: Tensor,
    block_table_SN: Tensor,
    seq_len_S: Tensor,
    split_start_S1: Tensor,
    split_W3: Tensor,
    scale_BGP2: Tensor | None = None,
    counters_SG: Tensor | None = None,
    *,
    sinks_H: Tensor | None = None,
    window: int | None = None,
    upcoming: Sequence[Tensor] = (),
    programmatic_launch: bool = True,
    prefetch_keys: bool = False,
    early_trigger: bool = False,
    out: Tensor,
    target: Target,
) -> tuple[Launch, ...]:
    num_rows, num_heads, head_dim = q_SHC.shape
    _, num_kv_heads, block_size, _ = k_cache_BGPC.shape
    num_items, device = split_W3.shape[0], q_SHC.device
    single = q_SHC.dtype == torch.float32  # float32 is for tests only
    block = 32 if single else 64  # the matrix units of sm_90 take at least 64 keys
    stages = 1 if single else 4 if head_dim < 128 else 3
    partial_acc = torch.empty((num_kv_heads, num_items, MAX_GROUP, head_dim), dtype=torch.float32, device=device)
    partial_stats = torch.empty((num_kv_heads, num_items, 2, MAX_GROUP), dtype=torch.float32, device=device)
    pdl = programmatic_launch and target.has_programmatic_launch
    if counters_SG is None:
        counters_SG = torch.zeros(num_rows, num_kv_heads, dtype=torch.int32, device=device)
    optional = {"sinks": sinks_H} | scale_arguments(scale_BGP2) | plan_prefetch(upcoming, target)
    return (
        Launch(
            decode_attention_kernel,
            (num_items, num_kv_heads, 1),
            {
                "q": q_SHC,
                "k_cache": k_cache_BGPC,
                "v_cache": v_cache_BGPC,
                "y": out,
                "block_table": block_table_SN,
                "seq_len": seq_len_S,
                "split_start": split_start_S1,
                "split_items": split_W3,
                "counters": counters_SG,
                "partial_acc": partial_acc,
                "partial_stats": partial_stats,
                "q_stride": q_SHC.stride(0),
                "block_stride": k_cache_BGPC.stride(0),
                "head_stride": k_cache_BGPC.stride(1),
                "slot_stride": k_cache_BGPC.stride(2),
                "table_stride": block_table_SN.stride(0),
                "group": num_heads // num_kv_heads,
                "num_rows": num_rows,
                "scale_log2": math.log2(math.e) / math.sqrt(head_dim),
                **{name: value for name, value in optional.items() if value is not None},
            },
            {
                **{name: None for name, value in optional.items() if value is None},
                "P": block_size,
                "C": head_dim,
                "BLOCK": block,
                "SWAP": target.capability in (90, 100, 103),
                "PDL": pdl,
                "EARLY": pdl and early_trigger,
                "PREFETCH_KEYS": pdl and prefetch_keys,
                "PRECISION": "ieee" if single else None,
                "INLINE": not target.interpreted,
                "WINDOW": window,
            },
            num_stages=stages,
            max_registers=REGISTERS,
            pdl=pdl,
            matrix_units=True,
        ),
    )


def plan_prefetch(upcoming: Sequence[Tensor], target: Target) -> dict[str, Tensor | int | None]:
    """Returns the kernel's arguments about weights for L2, the first of `upcoming` first; None are left out.

    They are whole lines within a weight, and no more than L2_PREFETCH_BYTES together.
    """
    names, room = [("next_weight", "next_bytes"), ("later_weight", "later_bytes")], L2_PREFETCH_BYTES
    require(len(upcoming) <= len(names), "upcoming", f"at most {len(names)} weights", len(upcoming))
    arguments: dict[str, Tensor | int | None] = dict.fromkeys(chain.from_iterable(names))
    if target.interpreted or target.capability not in PREFETCHES_WEIGHTS:
        return arguments
    for weight in upcoming:
        num_bytes = min(weight.nbytes, room) // LINE_BYTES * LINE_BYTES
        if num_bytes > 0 and weight.is_contiguous() and weight.data_ptr() % 16 == 0:
            arguments |= zip(names.pop(0), (weight, num_bytes), strict=True)
            room -= num_bytes
    return arguments


def check_queries_and_cache(
    name: str,
    q: Tensor,
    k_cache_BGPC: Tensor,
    v_cache_BGPC: Tensor,
    block_table_SN: Tensor,
    seq_len_S: Tensor,
    scale_BGP2: Tensor | None,
    num_rows: int | None = None,
    *,
    sinks_H: Tensor | None,
    window: int | None,
) -> None:
    """Checks the arguments that decode and prefill have in common; raises ValueError naming the one that does not fit.

    num_rows: the rows of the index tensors; None: as many as q has.
    """
    require_one_of(name, q.dtype, SPEC.tolerances)
    require(q.ndim == 3, name, "three dimensions", q.ndim)
    num_heads, head_dim = q.shape[1:]
    require(head_dim in HEAD_DIMS, name, f"channels of a head one of {HEAD_DIMS}", head_dim)
    require(q.stride(2) == 1 and q.stride(1) == head_dim, name, "heads side by side", f"strides {q.stride()}")
    require(k_cache_BGPC.ndim == 4, "k_cache_BGPC", "four dimensions", k_cache_BGPC.ndim)
    num_blocks, num_kv_heads, block_size, _ = k_cache_BGPC.shape
    group = num_heads // max(num_kv_heads, 1)
    fits = 1 <= group <= MAX_GROUP and num_heads == group * num_kv_heads
    require(fits, "k_cache_BGPC", f"a kv head for each 1 to {MAX_GROUP} of {num_heads} heads", num_kv_heads)
    require(block_size in BLOCK_SIZES, "k_cache_BGPC", f"slots of a block one of {BLOCK_SIZES}", block_size)
    shape = (num_blocks, num_kv_heads, block_size, head_dim)
    dtype = check_scales(k_cache_BGPC, scale_BGP2, None, q.dtype, q.device)
    require_tensor("k_cache_BGPC", k_cache_BGPC, shape, dtype, q.device)
    require_tensor("v_cache_BGPC", v_cache_BGPC, shape, dtype, q.device)
    strides = k_cache_BGPC.stride()
    require(strides[2] < 2**24, "k_cache_BGPC", "slots fewer than 2**24 elements apart", strides[2])
    require(v_cache_BGPC.stride() == strides, "v_cache_BGPC", f"strides {strides} of k", v_cache_BGPC.stride())
    if dtype != q.dtype:  # numbers in 8 bits are read in words of four
        for cache_name, cache in (("k_cache_BGPC", k_cache_BGPC), ("v_cache_BGPC", v_cache_BGPC)):
            words = cache.data_ptr() % 4 == 0 and all(stride % 4 == 0 for stride in strides[:3])
            require(words, cache_name, "addresses of slots that 4 divides", f"strides {strides}")
    rows = q.shape[0] if num_rows is None else num_rows
    require(block_table_SN.ndim == 2, "block_table_SN", "two dimensions", block_table_SN.ndim)
    require_tensor("block_table_SN", block_table_SN, (rows, block_table_SN.shape[1]), torch.int32, q.device)
    require_index("seq_len_S", seq_len_S, (rows,), q.device)
    if sinks_H is not None:
        require_one_of("sinks_H", sinks_H.dtype, (torch.float32, q.dtype))
        require_tensor("sinks_H", sinks_H, (num_heads,), sinks_H.dtype, q.device)
    require(window is None or window > 0, "window", "1 key or more", window)


def require_index(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    require_tensor(name, tensor, shape, torch.int32, device)
    require(tensor.is_contiguous(), name, "a contiguous tensor", f"strides {tensor.stride()}")


def decode_attention(
    q_SHC: Tensor,
    k_cache_BGPC: Tensor,
    v_cache_BGPC: Tensor,
    block_table_SN: Tensor,
    seq_len_S: Tensor,
    split_start_S1: Tensor,
    split_W3: Tensor,
    scale_BGP2: Tensor | None = None,
    counters_SG: Tensor | None = None,
    *,
    sinks_H: Tensor | None = None,
    window: int | None = None,
    upcoming: Sequence[Tensor] = (),
    programmatic_launch: bool = True,
    prefetch_keys: bool = False,
    early_trigger: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Computes `decode_attention_reference`, for q with rows at any stride; the integer tensors are int32.

    `build_splits` makes split_start_S1 and split_W3 of the sequences' lengths.
    split_W3 has items for all blocks of every row whose length is not 0: those of a row in order, from split_start[row]
    to split_start[row + 1]; (-1, -1, -1) after the last; and W >= S. Rows without an item give zeros. Table entries
    and slots beyond a length are not used. The same plan gives the same bits, another plan rounds differently.
    Caches in 8 bits are float8_e4m3fn (from compute capability 8.9 on) or int8, and have `scale_BGP2`, bfloat16.
    With a window nothing of the blocks before it is used, and each window is a kernel of its own.
    counters_SG, int32 zeros, counts the parts that have arrived. The call leaves it as zeros, so that one tensor serves
    all calls that follow each other on a stream; None: every call makes one, which takes one more launch.
    From sm_90 on, table, lengths and items are read while the previous kernel still runs, so that kernel must not write
    them. Without `programmatic_launch` nothing is read before the previous kernel has ended. Three things that are not
    measured yet, and change no result, are for the kernels there: with `prefetch_keys` a program brings its first keys
    and values to L2 while the previous kernel runs; programs without an item do so with `upcoming`, at most two
    weights, which the following kernels read in this order; with `early_trigger` the next kernel may start as soon as
    all programs of this one have.
    Raises ValueError naming the argument that does not fit.
    """
    caches = k_cache_BGPC, v_cache_BGPC
    table = block_table_SN, seq_len_S
    check_queries_and_cache("q_SHC", q_SHC, *caches, *table, scale_BGP2, sinks_H=sinks_H, window=window)
    (num_rows, num_heads, head_dim), device = q_SHC.shape, q_SHC.device
    require_index("split_start_S1", split_start_S1, (num_rows + 1,), device)
    require(split_W3.ndim == 2, "split_W3", "two dimensions", split_W3.ndim)
    require(split_W3.shape[0] >= num_rows, "split_W3", f"at least {num_rows} items", split_W3.shape[0])
    require_index("split_W3", split_W3, (split_W3.shape[0], 3), device)
    if counters_SG is not None:
        require_index("counters_SG", counters_SG, (num_rows, k_cache_BGPC.shape[1]), device)
    if out is None:
        out = torch.empty(num_rows, num_heads, head_dim, dtype=q_SHC.dtype, device=device)
    require_tensor("out", out, (num_rows, num_heads, head_dim), q_SHC.dtype, device)
    require(out.is_contiguous(), "out", "a contiguous tensor", f"strides {out.stride()}")
    plan = (block_table_SN, seq_len_S, split_start_S1, split_W3, scale_BGP2, counters_SG)
    launches = plan_decode_attention(
        *(q_SHC, *caches, *plan),
        sinks_H=sinks_H,
        window=window,
        upcoming=upcoming,
        programmatic_launch=programmatic_launch,
        prefetch_keys=prefetch_keys,
        early_trigger=early_trigger,
        out=out,
        target=target_of(device),
    )
    run(launches)
    return out


SPEC = KernelSpec(
    name="decode_attention",
    used_by="every decoder: each layer of a decode step",
    reference=decode_attention_reference,
    plan=plan_decode_attention,
    launcher=decode_attention,
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

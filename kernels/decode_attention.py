"""Attention of one new token of each sequence over a paged KV cache; its keys are split over the chip's programs.

    o[s, h] = softmax(q[s, h] . k[:n, g] / sqrt(C)) v[:n, g]      n = seq_len[s], g = h // (H / G)

The time goes to reading keys and values, so the work is divided by them: the split plan (csrc/paged_kv_cache.h,
StepBuffers) lists items (row, first block, end block) of about equal size, whatever the sequences' lengths. A program
takes one item for one kv head. The last program of a row and kv head to finish adds up the row's parts in the plan's
order, so the result does not depend on which one was last. The grid has a program for each item that the plan has room
for, so one CUDA graph serves any lengths.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from internvl_rt.kernels._contract import Case, Cost, KernelSpec, Tolerance, require, require_one_of, require_tensor
from internvl_rt.kernels._decode_attention_body import ROWS, decode_attention_kernel
from internvl_rt.kernels._kv_numbers import KV_FORMATS, check_scales, in_8_bits, scale_arguments
from internvl_rt.kernels._launch import Launch, Target, run, target_of
from internvl_rt.kernels._paged_attention import make_paged_cache, paged_attention_reference
from internvl_rt.kernels._split_plan import build_splits as build_splits
from internvl_rt.kernels._split_plan import num_split_items, plan_splits, split_tensors

HEAD_DIMS = (16, 32, 64, 128)
BLOCK_SIZES = (16, 32, 64, 128)
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
FILLS = ("equal", "one_huge", "huge")  # kinds of keys in test cases, see make_paged_cache
MAX_GROUP = ROWS.value  # the most query heads that may share a kv head
MODEL_HEADS = {  # query heads, kv heads, channels
    "1b": (14, 2, 64),
    "2b": (12, 2, 128),
    "8b": (28, 4, 128),
    "9b": (32, 2, 128),
    "14b": (40, 8, 128),
    "38b": (40, 8, 128),
    "78b": (64, 8, 128),
}


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
) -> Tensor:
    """Computes attention [S, H, C]; zeros for rows of length 0, which pad a batch. The split plan has no effect.

    scale_BGP2: the scales of caches in 8 bits
    """
    out_SHC = torch.zeros_like(q_SHC)
    if q_SHC.is_meta:  # a meta tensor has no lengths
        return out_SHC
    used = seq_len_S.nonzero().flatten()
    query_start = torch.arange(len(used) + 1, dtype=torch.int32, device=q_SHC.device)
    out_SHC[used] = paged_attention_reference(
        q_SHC[used], k_cache_BGPC, v_cache_BGPC, block_table_SN[used], query_start, seq_len_S[used], scale_BGP2
    )
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
    optional = scale_arguments(scale_BGP2) | plan_prefetch(upcoming, target)
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
    check_queries_and_cache("q_SHC", q_SHC, k_cache_BGPC, v_cache_BGPC, block_table_SN, seq_len_S, scale_BGP2)
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
    operands = (q_SHC, k_cache_BGPC, v_cache_BGPC, *plan)
    launches = plan_decode_attention(
        *operands,
        upcoming=upcoming,
        programmatic_launch=programmatic_launch,
        prefetch_keys=prefetch_keys,
        early_trigger=early_trigger,
        out=out,
        target=target_of(device),
    )
    run(launches)
    return out


def _make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor | None]:
    """Makes the inputs of a case. `room`: the plan is the engine's, with room for so many items. Otherwise an item has
    `split` blocks, and `spare` items more are left empty.
    """
    seq_lens, block_size = case["seq_lens"], case["P"]
    heads_wide = case["H"] + case.sizes.get("beside", 0)  # q is cut from wider rows, with NaN beside it
    q = torch.full((len(seq_lens), heads_wide, case["C"]), math.nan, dtype=dtype, device=device)
    q[:, : case["H"]] = torch.randn(len(seq_lens), case["H"], case["C"], dtype=torch.float32, device=device).to(dtype)
    num_blocks = [-(-length // block_size) for length in seq_lens]
    if "room" in case.sizes:
        rows = plan_splits(num_blocks, case["room"])
    else:
        split = case["split"]
        rows = [[[row, i, min(i + split, n)] for i in range(0, n, split)] for row, n in enumerate(num_blocks)]
    num_items = sum(map(len, rows))
    spare = max(0, len(seq_lens) - num_items) + case.sizes.get("spare", 0)
    split_start_S1, split_W3 = split_tensors(rows, case.sizes.get("room", num_items + spare), device)
    return {
        "q_SHC": q[:, : case["H"]],
        **make_paged_cache(case, seq_lens, dtype, device),
        "seq_len_S": torch.tensor(seq_lens, dtype=torch.int32).to(device),
        "split_start_S1": split_start_S1,
        "split_W3": split_W3,
    }


def _cost(case: Case, dtype: torch.dtype) -> Cost:
    tokens, rows = sum(case["seq_lens"]), len(case["seq_lens"])
    read = 2 * tokens * case["G"] * (case["C"] + 2 if "cache" in case.sizes else dtype.itemsize * case["C"])
    return Cost(
        bytes=read + dtype.itemsize * 2 * rows * case["H"] * case["C"], flops=4 * tokens * case["H"] * case["C"]
    )


def _case(
    name: str, seq_lens: list[int], heads: int = 2, kv_heads: int = 1, channels: int = 16, **more: int | str
) -> Case:
    sizes = {"seq_lens": seq_lens, "H": heads, "G": kv_heads, "C": channels, "P": 64, "split": 1}
    return Case(name, sizes | more)


def _model_case(name: str, batch: int, context: int, cache: str | None = None) -> Case:
    heads, kv_heads, channels = MODEL_HEADS[name]
    room = num_split_items(batch, kv_heads, num_sms=132)
    suffix, more = (f"_{cache}", in_8_bits(cache)) if cache else ("", {})
    return _case(f"{name}_{batch}_x_{context}{suffix}", [context] * batch, heads, kv_heads, channels, room=room, **more)


def _cases_of(cache: str) -> Iterator[Case]:
    """Returns the test cases of caches in 8 bits."""
    how = in_8_bits(cache)
    yield _case(f"{cache}_lengths", [1, 2, 15, 16, 17, 63, 64, 65], split=2, spare=3, **how)
    for size in BLOCK_SIZES:
        yield _case(f"{cache}_blocks_of_{size}", [1, size, size + 1, 150], P=size, split=2, **how)
    yield from (_case(f"{cache}_channels_{channels}", [193], 2, 1, channels, split=2, **how) for channels in HEAD_DIMS)
    yield _case(f"{cache}_group_7", [70], 14, 2, 32, **how)
    yield _case(f"{cache}_many_splits", [1170], 7, 1, 64, split=1, **how)
    yield _case(f"{cache}_empty_rows", [0, 5, 0, 0, 129, 0], 4, 2, 32, spare=2, **how)
    yield _case(f"{cache}_strided", [150, 3], 4, 2, 32, beside=3, padding=16, **how)
    yield _case(f"{cache}_unaligned", [150, 3], 4, 2, 32, padding=4, **how)
    yield from (_case(f"{cache}_{fill}", [150, 3], 4, 2, 32, fill=fill, split=2, **how) for fill in FILLS)


SPEC = KernelSpec(
    name="decode_attention",
    used_by="every decoder: each layer of a decode step",
    reference=decode_attention_reference,
    plan=plan_decode_attention,
    launcher=decode_attention,
    make_inputs=_make_inputs,
    cost=_cost,
    test_cases=(
        _case("lengths", [1, 2, 15, 16, 17, 63, 64, 65], split=2, spare=3),
        _case("longer", [127, 128, 129, 191, 257], split=2),
        *(_case(f"blocks_of_{size}", [1, size, size + 1, 3 * size - 1, 150], P=size, split=2) for size in BLOCK_SIZES),
        *(_case(f"channels_{channels}", [193], 2, 1, channels, split=2) for channels in HEAD_DIMS),
        *(_case(f"group_{group}", [70], 2 * group, 2, 32) for group in (1, 5, 6, 7, 16)),
        _case("one_split_each", [130, 64, 7], 4, 2, split=99),
        _case("many_splits", [1170], 7, 1, 64, split=1),
        _case("very_many_splits", [1130, 20], 7, 1, 64, P=16, split=1),
        _case("empty_rows", [0, 5, 0, 0, 129, 0], 4, 2, 32, spare=2),
        _case("all_empty", [0, 0], 4, 2, 32),
        _case("no_rows", []),
        _case("shared_prefix", [150, 200, 128], 4, 2, 32, shared=2),
        _case("strided", [150, 3], 4, 2, 32, beside=3, padding=8),
        _case("unaligned", [150, 3], 4, 2, 32, padding=3),
        *(_case(fill, [150, 3], 4, 2, 32, fill=fill, split=2) for fill in FILLS),
        *(case for cache in KV_FORMATS for case in _cases_of(cache)),
    ),
    model_cases=(
        *(
            _model_case(name, batch, context)
            for name in MODEL_HEADS
            for context in (2048, 32768)
            for batch in (1, 8, 64)
        ),
        *(
            _model_case(name, batch, context, cache)
            for cache in KV_FORMATS
            for name in ("1b", "8b")
            for context in (8192, 32768)
            for batch in (1, 64)
        ),
    ),
    tolerances={
        torch.float32: Tolerance(2e-5, 2e-5, 4e-6, "scores of up to 50 are right to 4e-6, and so are probabilities"),
        torch.float16: Tolerance(2e-3, 2e-3, 1e-3, "probabilities and output are rounded to 11 bits"),
        torch.bfloat16: Tolerance(1.6e-2, 1.6e-2, 5e-3, "probabilities and output are rounded to 8 bits"),
    },
)

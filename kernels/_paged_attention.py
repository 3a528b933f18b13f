"""Causal attention of a batch of sequences of any lengths over a paged KV cache: of prefill chunks and decodes alike.

    o[t, h] = softmax(q[t, h] . k[: p + 1, g] / sqrt(C)) v[: p + 1, g]      g = h // (H / G)

t is the query at index p of its sequence. The last `query_len` of a sequence's `seq_len` tokens are this step's
queries; their keys and values are in the cache already. Slots beyond a sequence's length are never read. Keys and
values in 8 bits are numbers times scales (_kv_numbers.py).

A sink s[h] of a head is a learned logit without a value: e^s[h] is added to the sum by which the softmax divides. With
a window, a query at index p sees the keys from max(0, p - window + 1) to p. Keys that none of a sequence's queries sees
are never read, nor are the blocks that hold only such keys.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from internvl_rt.kernels._contract import Case
from internvl_rt.kernels._kv_numbers import KV_FORMATS, dequantise_heads, quantise_heads

NAN_FP8 = 0x7F  # the bits of a NaN in float8_e4m3fn
AT_ONCE = 1 << 24  # scores that the reference writes, where it writes any
BLOCK_SIZES = (16, 32, 64, 128)
HEAD_DIMS = (16, 32, 64, 128)
FILLS = ("equal", "one_huge", "huge")  # kinds of keys in test cases, see make_paged_cache
SINKS = {"own": 0.0, "normal": 0.0, "low": -10.0, "high": 10.0}  # kinds of sinks, see make_sinks
MODEL_HEADS = {  # query heads, kv heads, channels
    "1b": (14, 2, 64),
    "2b": (12, 2, 128),
    "8b": (28, 4, 128),
    "9b": (32, 2, 128),
    "14b": (40, 8, 128),
    "38b": (40, 8, 128),
    "78b": (64, 8, 128),
}
GPT_OSS_HEADS, GPT_OSS_WINDOW = (64, 8, 64), 128  # every head of the 20B has a sink, every other layer the window

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, int | None], Tensor]


def first_seen(seq_len: int, num_queries: int, window: int | None) -> int:
    """Returns the first key that any of a sequence's last `num_queries` tokens sees."""
    return 0 if window is None else max(0, seq_len - num_queries - window + 1)


def attend_by_torch(
    q_HLC: Tensor, k_GSC: Tensor, v_GSC: Tensor, sinks_H: Tensor | None = None, window: int | None = None
) -> Tensor:
    """Computes causal attention [L, H, C] of the last L of a sequence's S tokens."""
    if sinks_H is not None or window is not None:
        return _attend_by_scores(q_HLC, k_GSC, v_GSC, sinks_H, window)
    num_queries, seq_len = q_HLC.shape[1], k_GSC.shape[1]
    whole = num_queries == seq_len
    mask = None
    if not whole and num_queries > 1:  # a prefill chunk that follows a cached prefix
        mask = torch.ones(num_queries, seq_len, dtype=torch.bool, device=q_HLC.device).tril(seq_len - num_queries)
    q, k, v = q_HLC[None], k_GSC[None], v_GSC[None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=whole, enable_gqa=True)[0].transpose(0, 1)


def _attend_by_scores(
    q_HLC: Tensor, k_GSC: Tensor, v_GSC: Tensor, sinks_H: Tensor | None, window: int | None
) -> Tensor:
    """Computes what `attend_by_torch` does, for a few queries at once, by a softmax with the sink as one more key."""
    (num_heads, num_queries, head_dim), (num_groups, seq_len, _) = q_HLC.shape, k_GSC.shape
    wide = torch.promote_types(q_HLC.dtype, torch.float32)
    y_LHC = q_HLC.new_empty(num_queries, num_heads, head_dim)
    size = max(1, AT_ONCE // (num_heads * seq_len))
    for first in range(0, num_queries, size):
        rows = slice(first, min(first + size, num_queries))
        end = seq_len - num_queries + rows.stop
        keys = slice(first_seen(end, rows.stop - first, window), end)
        k_G1SC, v_G1SC = k_GSC[:, None, keys].to(wide), v_GSC[:, None, keys].to(wide)
        score_GhLS = q_HLC[:, rows].to(wide).unflatten(0, (num_groups, -1)) * head_dim**-0.5 @ k_G1SC.mT
        index_L1 = torch.arange(end - (rows.stop - first), end, device=q_HLC.device)[:, None]
        behind_LS = index_L1 - torch.arange(keys.start, end, device=q_HLC.device)
        is_seen_LS = behind_LS >= 0 if window is None else (behind_LS >= 0) & (behind_LS < window)
        score_GhLS.masked_fill_(~is_seen_LS, -math.inf)
        if sinks_H is not None:
            sink_GhL1 = sinks_H.to(wide).view(num_groups, -1, 1, 1).expand(*score_GhLS.shape[:3], 1)
            score_GhLS = torch.cat((score_GhLS, sink_GhL1), dim=-1)
        share_GhLS = score_GhLS.softmax(-1)[..., : end - keys.start]
        y_LHC[rows] = (share_GhLS @ v_G1SC).flatten(0, 1).transpose(0, 1).to(q_HLC.dtype)
    return y_LHC


def paged_attention_reference(
    q_THC: Tensor,
    k_cache_BGPC: Tensor,
    v_cache_BGPC: Tensor,
    block_table_SN: Tensor,
    query_start_S1: Tensor,
    seq_len_S: Tensor,
    scale_BGP2: Tensor | None = None,
    *,
    sinks_H: Tensor | None = None,
    window: int | None = None,
    attend: Attend = attend_by_torch,
) -> Tensor:
    """Computes attention [T, H, C]. The integers are int32; a row of the table is read up to its sequence's length.

    scale_BGP2: the scales of caches in 8 bits
    sinks_H: a logit of each query head, of any floating-point type
    window: how many keys up to its own a query sees; None: all
    attend: computes what `attend_by_torch` does
    """
    block_size = k_cache_BGPC.shape[2]
    out_THC = torch.zeros_like(q_THC)
    starts, lengths = query_start_S1.tolist(), seq_len_S.tolist()
    for row, seq_len in enumerate(lengths):
        first, last = starts[row], starts[row + 1]
        if first == last or seq_len == 0:  # a row that pads the batch
            continue
        first_key = first_seen(seq_len, last - first, window)
        first_block = first_key // block_size
        blocks = block_table_SN[row, first_block : -(-seq_len // block_size)].long()
        keys = slice(first_key - first_block * block_size, seq_len - first_block * block_size)
        k_GLC, v_GLC = (_tokens(cache_BGPC, blocks, keys) for cache_BGPC in (k_cache_BGPC, v_cache_BGPC))
        if scale_BGP2 is not None:
            scale_2GL = _tokens(scale_BGP2, blocks, keys).unbind(-1)
            k_GLC, v_GLC = map(dequantise_heads, (k_GLC, v_GLC), scale_2GL, (q_THC.dtype, q_THC.dtype))
        out_THC[first:last] = attend(q_THC[first:last].transpose(0, 1), k_GLC, v_GLC, sinks_H, window)
    return out_THC


def _tokens(cache_BGPx: Tensor, blocks: Tensor, tokens: slice) -> Tensor:
    """Returns [G, tokens, x] of tokens in these blocks."""
    return cache_BGPx.transpose(0, 1)[:, blocks].flatten(1, 2)[:, tokens]


def make_sinks(case: Case, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """Draws the sinks of a case, float32: of kind `sinks`, around this kind's number in SINKS; None without a kind.

    "own": in the type of the activations; "extreme": so low or so high that only the keys, or only the sink, counts
    """
    kind, num_heads = case.sizes.get("sinks"), case["H"]
    if kind is None:
        return None
    if kind == "extreme":
        return torch.tensor([-1e30, 0.0, 1e30], device=device).repeat(num_heads)[:num_heads]
    sinks_H = torch.randn(num_heads, dtype=torch.float32, device=device) + SINKS[kind]
    return sinks_H.to(dtype) if kind == "own" else sinks_H


def make_paged_cache(
    case: Case, seq_lens: list[int], query_lens: Sequence[int], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor | None]:
    """Makes keys, values and the table: blocks in any order, NaN in slots without a token, -1 after each row's blocks.

    With a `window` blocks that none of a row's queries sees are NaN too, and the table has -1 in their place.

    `shared`: how many leading blocks all rows share with the first. `fill` chooses the kind of keys. `padding`: how
    many channels, which hold NaN, lie between one slot and the next. `cache` is the format of one in 8 bits; there
    scales without a token are NaN, and integers, which cannot be that, are 101.
    """
    numbers = KV_FORMATS[case["cache"]] if "cache" in case.sizes else None
    block_size, channels = case["P"], case["C"]
    counts = [-(-length // block_size) for length in seq_lens]
    num_blocks, table_shape = sum(counts) + 2, (len(seq_lens), max(counts, default=0) + 1)
    shape = (num_blocks, case["G"], block_size, channels + case.sizes.get("padding", 0))
    if device.type == "meta":
        k, v = (torch.empty(shape, dtype=numbers or dtype, device=device)[..., :channels] for _ in range(2))
        scale = torch.empty((*shape[:3], 2), dtype=torch.bfloat16, device=device) if numbers else None
        return _named(k, v, torch.empty(table_shape, dtype=torch.int32, device=device), scale)

    free = torch.randperm(num_blocks)
    table_SN = torch.full(table_shape, -1, dtype=torch.int32)
    written = torch.zeros(num_blocks * block_size, dtype=torch.bool)
    for row, (length, query_len) in enumerate(zip(seq_lens, query_lens, strict=True)):
        blocks, free = free[: counts[row]], free[counts[row] :]
        shared = min(case.sizes.get("shared", 0), counts[row], counts[0]) if row else 0
        blocks[:shared] = table_SN[0, :shared]
        unseen = first_seen(length, query_len, case.sizes.get("window")) // block_size
        table_SN[row, unseen : counts[row]] = blocks[unseen:]
        slots = (blocks[:, None] * block_size + torch.arange(block_size)).flatten()
        written[slots[unseen * block_size : length]] = True
    unused = ~written.view(num_blocks, 1, block_size, 1).to(device)

    k, v = (torch.randn(shape, dtype=torch.float32, device=device).to(dtype) for _ in range(2))
    fill = case.sizes.get("fill", "normal")
    # A score has a relative error of 1e-7, and a probability's relative error is its score's absolute one: in 16 bits
    # that is less than a rounding even for scores of 1000, in float32 the largest error of all for scores of 10 to 50.
    huge = 1000.0 if dtype.itemsize == 2 else 10.0
    if fill == "equal":  # all scores are equal
        k.fill_(0.5)
    elif fill == "one_huge":  # one slot of each block has a huge score
        k[:, :, 3 % block_size] *= min(500.0, huge)
    elif fill == "huge":
        k *= huge
    scale = None
    if numbers is not None:
        (k, k_scale), (v, v_scale) = _quantised(k, numbers, channels), _quantised(v, numbers, channels)
        scale = torch.stack((k_scale, v_scale), dim=-1).masked_fill_(unused, math.nan)
    junk = math.nan if numbers is None else NAN_FP8 if numbers.is_floating_point else 101
    for cache in (k, v):
        elements = cache if numbers is None else cache.view(torch.uint8)
        elements.masked_fill_(unused, junk)
        elements[..., channels:] = junk
    return _named(k[..., :channels], v[..., :channels], table_SN.to(device), scale)


def _quantised(x: Tensor, numbers: torch.dtype, channels: int) -> tuple[Tensor, Tensor]:
    of_heads, scale = quantise_heads(x[..., :channels], numbers)
    padded = torch.empty(x.shape, dtype=numbers, device=x.device)
    padded[..., :channels] = of_heads
    return padded, scale


def _named(k: Tensor, v: Tensor, table_SN: Tensor, scale: Tensor | None) -> dict[str, Tensor | None]:
    return {"k_cache_BGPC": k, "v_cache_BGPC": v, "block_table_SN": table_SN, "scale_BGP2": scale}

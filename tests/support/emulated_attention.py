"""Emulates the attention kernels in vectorised torch (see emulated.py): online softmax over the same blocks of keys."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from internvl_rt.kernels._kv_numbers import LEAST_SCALE
from internvl_rt.kernels._launch import target_of
from internvl_rt.kernels._paged_attention import first_seen
from internvl_rt.kernels._plans import AttentionPlan
from internvl_rt.kernels._prefill_plan import SplitRule, block_splits, choose_tiling, split_lens, split_rule
from internvl_rt.kernels.vit_attention import tile_tokens
from support.emulated_arithmetic import product, rounded


def online_softmax(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    scale_log2: float,
    blocks: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    state: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns each query's maximum, sum and weighted values: q [..., M, C], keys [..., N, C], weights in `dtype`."""
    top, total, acc = state or (
        torch.full(q.shape[:-1], -math.inf), torch.zeros(q.shape[:-1]), torch.zeros(*q.shape[:-1], v.shape[-1])
    )  # fmt: skip
    if v_scale is not None:  # numbers in 8 bits; as scaled_queries in kernels/_kv_numbers.py
        power = torch.frexp(q.float().abs().amax(-1, keepdim=True).clamp_min(LEAST_SCALE.value)).exponent
        power = (power - 1).float().exp2()
        dtype = torch.float32 if dtype == torch.float32 else torch.float16
        q = rounded(q.float() / power, dtype)
    for begin, end in blocks:
        score = product(q, k[..., begin:end, :], dtype)
        if v_scale is not None:
            of_values = v_scale[..., None, begin:end]
            exponent = torch.frexp(of_values).exponent.float() - 1
            score = score * k_scale[..., None, begin:end] * (scale_log2 * power) + exponent
            score = score if visible is None else score.masked_fill(~visible[..., begin:end], -math.inf)
            new_top = torch.maximum(top, score.amax(-1))
            shrink, weight = (top - new_top).exp2(), (score - new_top[..., None]).exp2()
            total = total * shrink + (weight * (-exponent).exp2()).sum(-1)
            weight = weight * (of_values * (-exponent).exp2())
            acc = product(rounded(weight, dtype), v[..., begin:end, :].mT, dtype, acc * shrink[..., None])
            top = new_top
            continue
        if k_scale is not None:
            score = score * k_scale[..., None, begin:end]
        if visible is not None:
            score = score.masked_fill(~visible[..., begin:end], -math.inf)
        new_top = torch.maximum(top, score.amax(-1) * scale_log2)
        shrink, p = (top - new_top).exp2(), (score * scale_log2 - new_top[..., None]).exp2()
        total = total * shrink + p.sum(-1)
        acc = product(rounded(p, dtype), v[..., begin:end, :].mT, dtype, acc * shrink[..., None])
        top = new_top
    return top, total, acc


def _blocks(begin: int, end: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, end)) for start in range(begin, end, size)]


def vit_attention(
    qkv_RK: Tensor,
    num_tiles: int,
    head_dim: int,
    q_norm_E: Tensor | None,
    k_norm_E: Tensor | None,
    eps: float,
    plan: AttentionPlan | None = None,
) -> list[Tensor]:
    """Takes the class token's key first, in float32; the class token's query uses no matrix unit."""
    dtype = qkv_RK.dtype
    q, k, v = (
        tile_tokens(part, num_tiles).unflatten(2, (-1, head_dim)).transpose(1, 2).float()
        for part in qkv_RK.chunk(3, dim=-1)
    )  # [I, H, U, C]; the class token is last
    scale_log2 = math.log2(math.e) / math.sqrt(head_dim)
    class_q, k_scale = q[:, :, -1:], None
    if q_norm_E is not None and k_norm_E is not None:
        inverse = [
            1 / (part.transpose(1, 2).flatten(2).square().mean(-1) + eps).sqrt()[:, None] for part in (q, k)
        ]  # [I, 1, U]
        weight_H1C = (q_norm_E.float() * k_norm_E.float()).view(-1, 1, head_dim)
        class_q = class_q * weight_H1C * inverse[0][..., -1:, None]
        q, k_scale = rounded(q * inverse[0][..., None] * weight_H1C, dtype), inverse[1]
    class_scale = 1.0 if k_scale is None else k_scale[..., -1:]
    top = (q @ k[:, :, -1:].mT)[..., 0] * (class_scale * scale_log2)
    state = (top, torch.ones_like(top), v[:, :, -1:].expand_as(q))
    num_patches = q.shape[2] - 1
    block_n = plan.block_n if plan is not None else 16 if dtype == torch.float32 else 64
    blocks = _blocks(0, num_patches, block_n)
    _, total, acc = online_softmax(q, k, v, None, scale_log2, blocks, dtype, k_scale, None, state)
    score = class_q @ k.mT * (scale_log2 * math.log(2))
    class_y = (score if k_scale is None else score * k_scale[:, :, None]).softmax(-1) @ v
    y = torch.cat(((acc * (1 / total)[..., None])[:, :, :-1], class_y), dim=2).transpose(1, 2).flatten(2)
    return [torch.cat((y[:, :-1].flatten(0, 1), y[:, -1])).to(dtype)]


def _keys_of_row(cache_BGPC: Tensor, table_N: Tensor, seq_len: int, group: int, first_key: int) -> Tensor:
    """Returns a row's keys or values, [H, seq_len, C]; each kv head is repeated for all query heads that use it.

    Keys before `first_key`, which may be anything, are zeros.
    """
    blocks = table_N[: -(-seq_len // cache_BGPC.shape[2])].long()
    tokens = cache_BGPC[blocks].float().transpose(0, 1).flatten(1, 2)[:, :seq_len]
    tokens[:, :first_key] = 0
    return tokens.repeat_interleave(group, dim=0)


def _read_row(
    caches: tuple[Tensor, Tensor],
    scale_BGP2: Tensor | None,
    table_N: Tensor,
    seq_len: int,
    group: int,
    first_key: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Returns a row's keys and values, and their scales [H, seq_len] where they are in 8 bits."""
    k, v = (_keys_of_row(cache, table_N, seq_len, group, first_key) for cache in caches)
    if scale_BGP2 is None:
        return k, v, None, None
    k_scale, v_scale = _keys_of_row(scale_BGP2, table_N, seq_len, group, first_key).unbind(-1)
    return k, v, k_scale, v_scale


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
    sinks_H: Tensor | None = None,
    window: int | None = None,
) -> list[Tensor]:
    dtype, (num_tokens, heads, channels) = q_THC.dtype, q_THC.shape
    out, group = torch.empty_like(q_THC, memory_format=torch.contiguous_format), heads // k_cache_BGPC.shape[1]
    starts, seq_lens, rule = query_start_S1.tolist(), seq_len_S.tolist(), splits or split_rule(channels)
    query_lens = [stop - start for start, stop in itertools.pairwise(starts)]
    sizes = num_tokens, max_query_len, block_table_SN, k_cache_BGPC, group, rule
    tiling = choose_tiling(*sizes, target_of(q_THC.device), dtype, window)
    caches = k_cache_BGPC, v_cache_BGPC
    scale, queries = math.log2(math.e) / math.sqrt(channels), tiling.block_m // group
    keys_of_split = list(seq_lens)
    if tiling.num_items:
        keys_of_split = split_lens(query_lens, seq_lens, queries, tiling.num_items, tiling.block_n, rule, window)
    for row, (new, seq_len) in enumerate(zip(query_lens, seq_lens, strict=True)):
        if new == 0:
            continue
        first_key = first_seen(seq_len, new, window)
        k, v, *scales = _read_row(caches, scale_BGP2, block_table_SN[row], seq_len, group, first_key)
        visible = torch.ones(new, seq_len, dtype=torch.bool).tril(seq_len - new)
        if window is not None:
            visible = visible.triu(seq_len - new - window + 1)
        for first in range(0, new, queries):
            stop, position = min(first + queries, new), seq_len - new + first
            q = q_THC[starts[row] + first : starts[row] + stop].transpose(0, 1)
            begin = first_seen(position + 1, 1, window) // tiling.block_n * tiling.block_n
            how = visible[first:stop], scale
            parts = [
                online_softmax(q, k, v, *how, _blocks(*keys, tiling.block_n), dtype, *scales, _least(q, v))
                for keys in block_splits(position, seq_len - new + stop, keys_of_split[row], begin)
            ]
            out[starts[row] + first : starts[row] + stop] = _sum_of_parts(parts, sinks_H).transpose(0, 1).to(dtype)
    return [out]


def _least(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the state of a softmax that has no key yet; the maximum is the lowest finite number."""
    zeros = torch.zeros(q.shape[:-1])
    return zeros + torch.finfo(torch.float32).min, zeros, torch.zeros(*q.shape[:-1], v.shape[-1])


def _sum_of_parts(parts: Sequence[tuple[Tensor, Tensor, Tensor]], sinks_H: Tensor | None) -> Tensor:
    """Adds up what splits of the keys give: maxima, sums and weighted values; then the sinks."""
    tops, totals, accs = (torch.stack(each) for each in zip(*parts, strict=True))
    share = (tops - tops.amax(0)).exp2()
    total = (totals * share).sum(0)
    if sinks_H is not None:
        total = total + (sinks_H.float()[:, None] * math.log2(math.e) - tops.amax(0)).exp2()
    return (accs * share[..., None]).sum(0) * (1 / total)[..., None]


def decode_attention(
    q_SHC: Tensor,
    k_cache_BGPC: Tensor,
    v_cache_BGPC: Tensor,
    block_table_SN: Tensor,
    seq_len_S: Tensor,
    split_start_S1: Tensor,
    split_W3: Tensor,
    scale_BGP2: Tensor | None = None,
    sinks_H: Tensor | None = None,
    window: int | None = None,
) -> list[Tensor]:
    dtype, (_, heads, channels) = q_SHC.dtype, q_SHC.shape
    out, group = torch.zeros_like(q_SHC, memory_format=torch.contiguous_format), heads // k_cache_BGPC.shape[1]
    starts, block_size, caches = split_start_S1.tolist(), k_cache_BGPC.shape[2], (k_cache_BGPC, v_cache_BGPC)
    scale, size = math.log2(math.e) / math.sqrt(channels), 32 if dtype == torch.float32 else 64
    for row, seq_len in enumerate(seq_len_S.tolist()):
        if seq_len == 0:
            continue
        first_key = first_seen(seq_len, 1, window)
        k, v, *scales = _read_row(caches, scale_BGP2, block_table_SN[row], seq_len, group, first_key)
        visible = (torch.arange(seq_len) >= first_key)[None]
        begin = first_key // size * size if block_size % size == 0 else first_key
        parts = []
        for _, first, end in split_W3[starts[row] : starts[row + 1]].tolist():
            blocks = _blocks(max(begin, first * block_size), min(end * block_size, seq_len), size)
            if blocks:
                parts.append(online_softmax(q_SHC[row, :, None], k, v, visible, scale, blocks, dtype, *scales))
        out[row] = _sum_of_parts(parts, sinks_H)[:, 0].to(dtype)
    return [out]

"""Computes attention with sinks and windows query by query in float64, from keys and values that lie in a row.

It shares no code with the kernels, the references or the tables of operations. `draw` also lays the keys and values out
in blocks, and everything that no query may see is poison there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from internvl_rt.kernels._kv_numbers import dequantise_heads, quantise_heads
from internvl_rt.kernels._split_plan import plan_splits, split_tensors
from internvl_rt.model.step_inputs import Batch, LayerCache

CPU = torch.device("cpu")


def dense_attention(
    q_THC: Tensor, k_SGC: Tensor, v_SGC: Tensor, sinks_H: Tensor | None = None, window: int | None = None
) -> Tensor:
    """Computes attention [T, H, C] of the last T of S tokens."""
    q_THC, (num_new, num_heads, channels) = q_THC.double(), q_THC.shape
    seq_len, num_groups, _ = k_SGC.shape
    k_SHC, v_SHC = (x_SGC.double().repeat_interleave(num_heads // num_groups, 1) for x_SGC in (k_SGC, v_SGC))
    y_THC = torch.zeros_like(q_THC)
    for token in range(num_new):
        index = seq_len - num_new + token
        first = 0 if window is None else max(0, index - window + 1)
        score_SH = (k_SHC[first : index + 1] * q_THC[token]).sum(2) / math.sqrt(channels)
        if sinks_H is not None:
            score_SH = torch.cat((score_SH, sinks_H.double()[None]))
        weight_SH = (score_SH - score_SH.amax(0)).exp()
        weight_SH = (weight_SH / weight_SH.sum(0))[: index + 1 - first]
        y_THC[token] = (weight_SH[..., None] * v_SHC[first : index + 1]).sum(0)
    return y_THC


@dataclass(frozen=True, slots=True)
class Drawn:
    """Sequences that decode and chunks of others, with what attention to their tokens gives."""

    q_THC: Tensor
    cache: LayerCache
    batch: Batch
    sinks_H: Tensor | None
    window: int | None
    expected_THC: Tensor  # float64

    @property
    def how(self) -> dict[str, Any]:
        return {"sinks_H": self.sinks_H, "window": self.window}

    @property
    def caches(self) -> tuple[Tensor, Tensor]:
        return self.cache.k_cache_BGPC, self.cache.v_cache_BGPC


def draw(
    decodes: Sequence[int],
    chunks: Sequence[tuple[int, int]] = (),
    *,
    window: int | None = None,
    sink: float | None = None,
    block_size: int = 16,
    heads: tuple[int, int, int] = (16, 2, 64),
    dtype: torch.dtype = torch.float16,
    numbers: torch.dtype | None = None,
    device: torch.device = CPU,
) -> Drawn:
    """Draws a batch. Blocks before a sequence's window are of others by now: they hold poison, and its table may have
    any number in their place.

    decodes: the lengths of sequences that decode
    chunks: cached and new tokens of the others
    sink: around which number the sinks of heads are; None: there are none
    heads: query heads, kv heads, channels
    numbers: what a cache in 8 bits consists of
    """
    num_heads, num_groups, channels = heads
    rows = [(length - 1, 1) for length in decodes] + list(chunks)
    counts = [-(-(cached + new) // block_size) for cached, new in rows]
    num_blocks = sum(counts) + 3
    order = torch.randperm(num_blocks)
    shape = num_blocks, num_groups, block_size, channels
    k_BGPC, v_BGPC = (torch.full(shape, math.nan, dtype=dtype) for _ in range(2))
    scale_BGP2 = None
    if numbers is not None:
        poison = 0x7F if numbers.is_floating_point else 101  # NaN in FP8
        k_BGPC, v_BGPC = (torch.full(shape, poison, dtype=torch.uint8).view(numbers) for _ in range(2))
        scale_BGP2 = torch.full((*shape[:3], 2), math.nan, dtype=torch.bfloat16)
    table_SN = torch.full((len(rows), max(counts) + 1), -1, dtype=torch.int32)
    sinks_H = None if sink is None else torch.randn(num_heads) * (abs(sink) < 100) + sink
    queries, expected, used = [], [], 0
    for row, ((cached, new), count) in enumerate(zip(rows, counts, strict=True)):
        seq_len = cached + new
        q_THC = torch.randn(new, num_heads, channels).to(dtype)
        k_SGC, v_SGC = (torch.randn(seq_len, num_groups, channels).to(dtype).double() for _ in range(2))
        blocks, used = order[used : used + count], used + count
        first = 0 if window is None else max(0, cached - window + 1) // block_size
        table_SN[row, first:count] = blocks[first:].int()
        table_SN[row, :first] = (-1, int(order[-1]), 0)[row % 3]
        slot_S = torch.arange(first * block_size, seq_len)
        place_S, within_S = blocks[slot_S // block_size], slot_S % block_size
        for index, (cache_BGPC, x_SGC) in enumerate(((k_BGPC, k_SGC), (v_BGPC, v_SGC))):
            if numbers is None or scale_BGP2 is None:
                cache_BGPC[place_S, :, within_S] = x_SGC[slot_S].to(dtype)
                continue
            number_SGC, scale_SG = quantise_heads(x_SGC, numbers)
            cache_BGPC.view(torch.uint8)[place_S, :, within_S] = number_SGC.view(torch.uint8)[slot_S]
            scale_BGP2[place_S, :, within_S, index] = scale_SG[slot_S]
            x_SGC.copy_(dequantise_heads(number_SGC, scale_SG, x_SGC.dtype))
        queries.append(q_THC)
        expected.append(dense_attention(q_THC, k_SGC, v_SGC, sinks_H, window))
    n = len(decodes)
    starts = [sum(new for _, new in rows[:row]) for row in range(n, len(rows) + 1)]
    num_items = n + 11  # room for as many as the engine's would make of a small chip
    splits = split_tensors(plan_splits(counts[:n], num_items), num_items, device) if n else (None, None)
    on = {"device": device}
    scales = None if scale_BGP2 is None else scale_BGP2.to(**on)
    return Drawn(
        q_THC=torch.cat(queries).to(**on),
        cache=LayerCache(k_BGPC.to(**on), v_BGPC.to(**on), scales),
        batch=Batch(
            torch.tensor([cached + new for cached, new in rows], dtype=torch.int32, **on),
            table_SN.to(**on),
            torch.tensor(starts, dtype=torch.int32, **on),
            n,
            max((new for _, new in chunks), default=0),
            *splits,
        ),
        sinks_H=None if sinks_H is None else sinks_H.to(**on),
        window=window,
        expected_THC=torch.cat(expected).to(**on),
    )


def assert_near(actual_THC: Tensor, expected_THC: Tensor, most: float) -> None:
    """Compares each query's result by its own size, because sinks make some much smaller than others."""
    assert actual_THC.isfinite().all()
    error_T = (actual_THC.double() - expected_THC).flatten(1).norm(dim=1) / expected_THC.flatten(1).norm(dim=1)
    assert error_T.max() < most, f"relative error {error_T.max():.3g} of query {int(error_T.argmax())}"

"""Adds up the parts that programs computed of one attention result, each from its own keys.

A part is a program's state of the online softmax: for each query a maximum, a sum of weights, and a sum of weighted
values [C] in float32. The statistics of a part are [2, ROWS]: the maxima, then the sums.

Whoever adds up is alone, and what takes its time is waiting for memory. So everything that it needs first is on its way
at once: the statistics of SOME parts, from which the largest maximum and the sum of all weights follow, and the first
TOGETHER parts. From then on a thread keeps its queries and channels, computes the parts' weights itself, and waits at
no barrier. The parts are added in their order, so the result does not depend on who finishes last.
"""

import triton
import triton.language as tl

from internvl_rt.kernels._softmax import total_with_sink


@triton.jit
def _load_parts(maxima, sums, num_parts, real, ROWS: tl.constexpr, C: tl.constexpr, TOGETHER: tl.constexpr):
    """Loads the maximum and the sum of weighted values of TOGETHER parts, or as many as there are."""
    tops, parts = (), ()
    for i in tl.static_range(TOGETHER):
        held = real & (i < num_parts)
        tops += (tl.load(maxima + i * 2 * ROWS, mask=held, other=float("-inf")),)  # type: ignore[assignment]
        parts += (tl.load(sums + i * ROWS * C, mask=held, other=0.0),)  # type: ignore[assignment]
    return tops, parts


@triton.jit
def combine_parts(
    acc_parts, stats_parts, num_parts, query, real, sink, ROWS: tl.constexpr, C: tl.constexpr, SOME: tl.constexpr,
    TOGETHER: tl.constexpr,
):  # fmt: skip
    """Returns the results [queries, C] of some of the ROWS queries of `num_parts` parts, which follow each other.

    sink: of each query, by `load_sinks`; None: there are none. No part has it.
    """
    some, channel = tl.arange(0, SOME), tl.arange(0, C)
    maxima = (stats_parts + query)[:, None]
    real = real[:, None]
    sums = acc_parts + query[:, None] * C + channel[None, :]
    tops, parts = _load_parts(maxima, sums, num_parts, real, ROWS, C, TOGETHER)
    top = tl.full([query.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([query.shape[0]], tl.float32)
    for start in range(0, num_parts, SOME):
        stats = stats_parts + (start + some)[:, None] * (2 * ROWS) + query[None, :]
        held = (start + some < num_parts)[:, None]
        part_top = tl.load(stats, mask=held, other=float("-inf"))
        part_total = tl.load(stats + ROWS, mask=held, other=0.0)
        new_top = tl.maximum(top, tl.max(part_top, axis=0))
        total = total * tl.exp2(top - new_top) + tl.sum(part_total * tl.exp2(part_top - new_top[None, :]), axis=0)
        top = new_top
    if sink is not None:
        total = total_with_sink(total, top, sink)
    top = top[:, None]
    acc = tl.zeros([query.shape[0], C], tl.float32)
    for i in tl.static_range(TOGETHER):
        acc += parts[i] * tl.exp2(tops[i] - top)
    for start in range(TOGETHER, num_parts, TOGETHER):
        maxima += TOGETHER * 2 * ROWS
        sums += TOGETHER * ROWS * C
        tops, parts = _load_parts(maxima, sums, num_parts - start, real, ROWS, C, TOGETHER)
        for i in tl.static_range(TOGETHER):
            acc += parts[i] * tl.exp2(tops[i] - top)
    return acc * (1.0 / total)[:, None]

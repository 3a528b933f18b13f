"""Adds up the parts that programs computed of one attention result, each from its own keys.

A part is a program's state of the online softmax: for each query a maximum, a sum of weights, and a sum of weighted
values [C] in float32. The statistics of a part are [2, ROWS]: the maxima, then the sums.

First the weights of all parts are computed; they replace the maxima in memory. Then the sum consists of loads and
products alone: a thread keeps its queries and channels, nothing waits at a barrier, and TOGETHER parts are being loaded
at once. The parts are added in their order, so the result does not depend on who finishes last.
"""

import triton
import triton.language as tl


@triton.jit
def write_part_weights(stats_parts, num_parts, ROWS: tl.constexpr, SOME: tl.constexpr):
    """Replaces the maxima by the parts' shares of the result. It looks at SOME parts at once."""
    row_query, some = tl.arange(0, ROWS), tl.arange(0, SOME)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, num_parts, SOME):
        stats = stats_parts + (start + some)[:, None] * (2 * ROWS) + row_query[None, :]
        held = (start + some < num_parts)[:, None]
        part_top = tl.load(stats, mask=held, other=float("-inf"))
        part_total = tl.load(stats + ROWS, mask=held, other=0.0)
        new_top = tl.maximum(top, tl.max(part_top, axis=0))
        total = total * tl.exp2(top - new_top) + tl.sum(part_total * tl.exp2(part_top - new_top[None, :]), axis=0)
        top = new_top
    scale = 1.0 / total
    for start in range(0, num_parts, SOME):
        stats = stats_parts + (start + some)[:, None] * (2 * ROWS) + row_query[None, :]
        held = (start + some < num_parts)[:, None]
        weight = tl.exp2(tl.load(stats, mask=held, other=float("-inf")) - top[None, :]) * scale[None, :]
        tl.store(stats, weight, mask=held)
    tl.debug_barrier()  # other threads than those that wrote the weights read them


@triton.jit
def weighted_sum(
    acc_parts, weights, first_part, num_parts, query, real, ROWS: tl.constexpr, C: tl.constexpr, TOGETHER: tl.constexpr
):
    """Returns the results [queries, C] of some of the ROWS queries of num_parts parts, which follow each other from
    `first_part` on; `weights` are the statistics, in which the maxima have become weights.
    """
    channel = tl.arange(0, C)
    weight_rows = weights + query
    part_rows = acc_parts + query[:, None] * C + channel[None, :]
    acc = tl.zeros([query.shape[0], C], tl.float32)
    for start in range(0, num_parts, TOGETHER):
        weight, parts = (), ()  # all loads before the sum: with both mixed a load would wait for a free register
        for i in tl.static_range(TOGETHER):
            held = real & (start + i < num_parts)
            weight_row = weight_rows + first_part * 2 * ROWS + i * 2 * ROWS
            part_row = part_rows + first_part * ROWS * C + i * ROWS * C
            weight += (tl.load(weight_row, mask=held, other=0.0),)  # type: ignore[assignment]
            parts += (tl.load(part_row, mask=held[:, None], other=0.0),)  # type: ignore[assignment]
        for i in tl.static_range(TOGETHER):
            acc += parts[i] * weight[i][:, None]
        weight_rows += TOGETHER * 2 * ROWS
        part_rows += TOGETHER * ROWS * C
    return acc

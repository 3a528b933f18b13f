"""The jitted bodies of `route_experts`: one kernel for few rows, two for many.

A tile is some rows of logits, [ROWS, XP]. The J largest of each row are found one after another; `rank` says of every
expert which choice of the row it is, J if it is none. A token chooses an expert once at most, so a running sum over the
rows gives each pair its place in the run of its expert.
"""

import triton
import triton.language as tl

from internvl_rt.kernels._sample_numbers import LOWEST, key_value, order_key

UNIT: tl.constexpr = tl.constexpr(float(2**40))


@triton.jit
def _start(PDL: tl.constexpr):
    """Waits for the kernel before, as only that makes its writes visible, and lets the kernel behind start."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _clear(pair, block_expert, num_places, num_blocks, FILL: tl.constexpr):
    """Writes -1 everywhere; the programs share the work."""
    first, step = tl.program_id(0) * FILL, tl.num_programs(0) * FILL
    nothing = tl.full([FILL], -1, tl.int32)
    for begin in range(first, num_places, step):
        place = begin + tl.arange(0, FILL)
        tl.store(pair + place, nothing, mask=place < num_places)
    for begin in range(first, num_blocks, step):
        place = begin + tl.arange(0, FILL)
        tl.store(block_expert + place, nothing, mask=place < num_blocks)


@triton.jit
def _choose(
    logits, expert_id, weight, row, end, logits_stride, X: tl.constexpr, J: tl.constexpr, ROWS: tl.constexpr,
    XP: tl.constexpr, RENORMALISE: tl.constexpr,
):  # fmt: skip
    """Writes the choices of the rows below `end` and their weights. Returns `rank`, which is J in other rows."""
    column = tl.arange(0, XP)[None, :]
    source = logits + tl.minimum(row, end - 1).to(tl.int64) * logits_stride  # other rows compute what the last one does
    x = tl.load(source + column, mask=column < X, other=float("-inf")).to(tl.float32)
    key = tl.where(column < X, order_key(x), LOWEST)
    rank = tl.full([ROWS, XP], J, tl.int32)
    peak = key_value(tl.max(key, 1))[:, None]
    total = tl.zeros([ROWS, 1], tl.float32)
    for choice in range(J):
        best = tl.max(key, 1)[:, None]
        expert = tl.min(tl.where(key == best, column, XP), 1)[:, None]
        total += tl.exp(key_value(best) - peak)  # in the order of the choices, whatever the tile is
        rank = tl.where(column == expert, choice, rank)
        key = tl.where(column == expert, LOWEST, key)
    share = tl.exp(x - peak)
    if not RENORMALISE:  # a sum of integers does not depend on its order either
        parts = (tl.where(share == share, share, 0.0) * UNIT).to(tl.int64)
        total = tl.sum(parts, 1)[:, None].to(tl.float32) / UNIT + (peak - peak)  # NaN if the peak is not finite
    rank = tl.where(row < end, rank, J)
    place = row * J + rank
    tl.store(expert_id + place, column + tl.zeros([ROWS, XP], tl.int32), mask=rank < J)
    tl.store(weight + place, share / total, mask=rank < J)
    return rank


@triton.jit
def _starts(num_pairs, BLOCK: tl.constexpr):
    """Returns the place [XP] at which the run of each expert begins."""
    blocks = (num_pairs + BLOCK - 1) // BLOCK
    return (tl.cumsum(blocks, 0) - blocks) * BLOCK


@triton.jit
def _put(pair, block_expert, place, value, expert, here, BLOCK: tl.constexpr):
    """Writes pairs to their places. The one at the first place of a block, which every block in use has, names it."""
    tl.store(pair + place, value, mask=here)
    tl.store(block_expert + place // BLOCK, expert, mask=here & (place % BLOCK == 0))


@triton.jit(do_not_specialize=["num_tokens", "num_places", "num_blocks", "first", "count"])
def route_few_kernel(
    logits, expert_id, weight, pair, block_expert, num_tokens, num_places, num_blocks, first, count, logits_stride,
    X: tl.constexpr, J: tl.constexpr, ROWS: tl.constexpr, XP: tl.constexpr, BLOCK: tl.constexpr, FILL: tl.constexpr,
    RENORMALISE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Does everything in one program, for at most ROWS rows."""
    _start(PDL)
    _clear(pair, block_expert, num_places, num_blocks, FILL)
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, XP)[None, :]
    rank = _choose(logits, expert_id, weight, row, num_tokens, logits_stride, X, J, ROWS, XP, RENORMALISE)
    here = (rank < J) & (column >= first) & (column < first + count)
    taken = here.to(tl.int32)
    place = _starts(tl.sum(taken, 0), BLOCK)[None, :]
    if ROWS > 1:
        place += tl.cumsum(taken, 0) - taken
    tl.debug_barrier()  # what clears the places must not come behind what fills them
    _put(pair, block_expert, place, row * J + rank, column - first + tl.zeros([ROWS, XP], tl.int32), here, BLOCK)


@triton.jit(do_not_specialize=["num_tokens", "num_places", "num_blocks", "rows_each"])
def choose_kernel(
    logits, expert_id, weight, offset, num_pairs, pair, block_expert, num_tokens, num_places, num_blocks, rows_each,
    logits_stride, X: tl.constexpr, J: tl.constexpr, ROWS: tl.constexpr, XP: tl.constexpr, FILL: tl.constexpr,
    RENORMALISE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Chooses for `rows_each` rows, a multiple of ROWS.

    num_pairs: takes the program's number of pairs of each expert, [programs, XP].
    offset: takes for each pair how many of the program's pairs come before it in the run of its expert.
    """
    _start(PDL)
    _clear(pair, block_expert, num_places, num_blocks, FILL)
    program = tl.program_id(0)
    begin = program * rows_each
    end = tl.minimum(begin + rows_each, num_tokens)
    before = tl.zeros([XP], tl.int32)
    for start in range(begin, end, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        rank = _choose(logits, expert_id, weight, row, end, logits_stride, X, J, ROWS, XP, RENORMALISE)
        taken = (rank < J).to(tl.int32)
        tl.store(offset + row * J + rank, before[None, :] + tl.cumsum(taken, 0) - taken, mask=rank < J)
        before += tl.sum(taken, 0)
    tl.store(num_pairs + program * XP + tl.arange(0, XP), before)


@triton.jit(do_not_specialize=["num_tokens", "rows_each", "first", "count"])
def sort_kernel(
    expert_id, offset, num_pairs, start, pair, block_expert, num_tokens, rows_each, first, count, J: tl.constexpr,
    XP: tl.constexpr, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Writes the pairs of the rows for which the same program of `choose_kernel` chose.

    Every program adds up for itself where its part of each run begins, and keeps that in its row of `start`, because a
    program can look up in memory what it holds in registers, but not there.
    """
    _start(PDL)
    this, column = tl.program_id(0), tl.arange(0, XP)
    all_pairs = tl.zeros([PROGRAMS, XP], tl.int32)
    earlier_pairs = tl.zeros([PROGRAMS, XP], tl.int32)
    for begin in range(0, tl.num_programs(0), PROGRAMS):
        program = begin + tl.arange(0, PROGRAMS)[:, None]
        inside = program < tl.num_programs(0)
        found = tl.load(num_pairs + program * XP + column[None, :], mask=inside, other=0)
        all_pairs += found
        earlier_pairs += tl.where(program < this, found, 0)
    held = (column >= first) & (column < first + count)
    run = _starts(tl.where(held, tl.sum(all_pairs, 0), 0), BLOCK)
    tl.store(start + this * XP + column, run + tl.sum(earlier_pairs, 0))
    tl.debug_barrier()
    end = tl.minimum((this + 1) * rows_each, num_tokens) * J
    for begin in range(this * rows_each * J, end, CHUNK):
        value = begin + tl.arange(0, CHUNK)
        expert = tl.load(expert_id + value, mask=value < end, other=-1)
        here = (value < end) & (expert >= first) & (expert < first + count)
        place = tl.load(start + this * XP + expert, mask=here, other=0) + tl.load(offset + value, mask=here, other=0)
        _put(pair, block_expert, place, value, expert - first, here, BLOCK)

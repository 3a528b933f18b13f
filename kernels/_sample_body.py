"""The jitted bodies of `sample`: two kernels, and the passes and searches of the second.

_sample_numbers.py defines a token's key, weight and place. top_k and top_p keep the tokens from some place on, min_p
those from some weight on; the draw runs over the kept tokens by id. The place is where counts (top_k) or weights
(top_p), summed from the largest place down, reach a limit. It is found without a sort, by bisection in a list of tokens
that is held in registers. The first list holds the largest tokens. If it does not reach far enough, passes over the row
find a bracket [low, high) of places whose tokens fit another list. If the first list has all kept tokens, the draw uses
it; otherwise the draw reads the row, guided by the masses (sums of weights) of its spans of SPAN tokens. A row without
top_k and top_p needs only the spans.
"""

import triton
import triton.language as tl

from internvl_rt.kernels._sample_numbers import (
    INFINITY_KEY,
    LOWEST,
    MINUS_INFINITY_KEY,
    key_at,
    key_value,
    lowest_place,
    order_key,
    philox_word,
    place_of,
    token_at,
    token_weight,
    uniform_below,
)

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LARGEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)  # of float32: a penalty makes no infinity


@triton.jit
def _load_row(x, token, end, EDGE: tl.constexpr):
    """Loads the row's values at these tokens. Memory is read up to a multiple of EDGE; from `end` on it holds anything.

    With an EDGE of 16 the values that a thread loads at once are all inside or all outside: one load instruction.
    """
    return tl.load(x + token, mask=token < (end + EDGE - 1) // EDGE * EDGE, other=float("-inf"))


@triton.jit
def _penalise(x, listed_id, listed_count, first, last, begin, end, penalty, BLOCK: tl.constexpr):
    """Changes the row `x` at the listed tokens in [begin, end).

    Every step rounds to float32. Products are computed in float64, where they are exact, and then rounded: the compiler
    could fuse a float32 product with the subtraction that follows it.
    """
    repetition, presence, frequency = tl.load(penalty), tl.load(penalty + 1), tl.load(penalty + 2)
    for start in range(first, last, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        token = tl.load(listed_id + entry, mask=entry < last, other=-1)
        mine = (token >= begin) & (token < end)
        count = tl.load(listed_count + entry, mask=mine, other=0)
        old = tl.load(x + token, mask=mine, other=0.0)
        raised = (old.to(tl.float64) * repetition.to(tl.float64)).to(tl.float32)
        often = (frequency.to(tl.float64) * count.to(tl.float64)).to(tl.float32)
        new = tl.where(old > 0, tl.div_rn(old, tl.zeros([BLOCK], tl.float32) + repetition), raised) - presence - often
        new = tl.where(count < 0, float("-inf"), tl.minimum(new, LARGEST))
        tl.store(x + token, new, mask=mine & (old < float("inf")))  # NaN and +inf stay, to be noticed


# Not specialised, so that one kernel serves parameters at any address: it changes with the number of rows.
@triton.jit(do_not_specialize=["listed_start", "listed_id", "listed_count", "penalty"])
def row_peaks_kernel(
    logits,
    copy,
    best,
    peaks,
    arrived,
    listed_start,
    listed_id,
    listed_count,
    penalty,
    logits_stride,
    copy_stride,
    V,
    slice_len,
    SLICES: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    EDGE: tl.constexpr,
    PENALISED: tl.constexpr,
):
    """Finds the largest key of one slice of a row, with its token, and the largest keys of GROUPS groups of its tokens.

    With PENALISED the penalties are applied first, and the changed row is written to `copy`.
    """
    row = (tl.program_id(0) // SLICES).to(tl.int64)
    part = tl.program_id(0) % SLICES
    column = tl.arange(0, BLOCK)
    begin = part * slice_len
    end = tl.minimum(begin + slice_len, V)
    x = logits + row * logits_stride
    if PENALISED:
        changed = copy + row * copy_stride
        for start in range(begin, end, BLOCK):
            values = _load_row(x, start + column, end, EDGE)
            tl.store(changed + start + column, values.to(tl.float32), mask=start + column < (end + 15) // 16 * 16)
        tl.debug_barrier()
        first, last = tl.load(listed_start + row), tl.load(listed_start + row + 1)
        _penalise(changed, listed_id, listed_count, first, last, begin, end, penalty + row * 3, 128)
        tl.debug_barrier()
        x = changed
    EDGE_OF_X: tl.constexpr = 16 if PENALISED else EDGE  # the rows of `copy` are padded to it
    largest = tl.full([BLOCK], LOWEST, tl.int32)
    largest_id = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(begin, end, BLOCK, loop_unroll_factor=2):  # so that two loads are on their way at once
        token = start + column
        values = _load_row(x, token, end, EDGE_OF_X).to(tl.float32)
        key = tl.where(token < end, order_key(values), LOWEST)
        largest_id = tl.where(key > largest, token, largest_id)
        largest = tl.maximum(largest, key)
    tl.store(best + row * SLICES + part, tl.max(place_of(largest, largest_id), axis=0))
    groups = tl.max(tl.reshape(largest, [GROUPS, BLOCK // GROUPS]), axis=1)
    tl.store(peaks + (row * SLICES + part) * GROUPS + tl.arange(0, GROUPS), groups)
    if part == 0:
        tl.store(arrived + row, 0)


@triton.jit
def _largest_reaching(place, size, limit, low, high):
    """Finds the largest t such that sizes of places >= t sum to `limit` or more; `low` is such a t, `high` is not."""
    while low + 1 < high:
        middle = (low & high) + ((low ^ high) >> 1)  # (low + high) // 2 without overflow
        if tl.sum(tl.where(place >= middle, size, 0), axis=0) >= limit:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _fill_list(x, begin, end, low, high, list_id, LIST: tl.constexpr, BLOCK: tl.constexpr, EDGE: tl.constexpr):
    """Lists the tokens in [begin, end) of row `x` whose places are in [low, high), by id, as far as there is room.

    Returns how many such tokens there are.
    """
    column = tl.arange(0, BLOCK)
    length = begin * 0
    ahead = _load_row(x, begin + column, end, EDGE)
    for start in range(begin, end, BLOCK):
        token = start + column
        place = place_of(order_key(ahead.to(tl.float32)), token)
        ahead = _load_row(x, token + BLOCK, end, EDGE)  # loaded before the sum below, which waits for all warps
        listed = ((place >= low) & (place < high) & (token < end)).to(tl.int32)
        count = tl.sum(listed, axis=0)
        if count > 0:
            entry = length + tl.cumsum(listed, axis=0) - 1
            tl.store(list_id + entry, token, mask=(listed > 0) & (entry < LIST))
            length += count
    return length


@triton.jit
def _at_or_above(x, V, peak, rate, low, BLOCK: tl.constexpr, EDGE: tl.constexpr):
    """Passes over the row and returns how many tokens have at least the place `low`, and their mass."""
    column = tl.arange(0, BLOCK)
    mass, count = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int32)
    ahead = _load_row(x, column, V, EDGE)
    for start in range(0, V, BLOCK):
        token, values = start + column, ahead.to(tl.float32)
        ahead = _load_row(x, token + BLOCK, V, EDGE)
        counts = (place_of(order_key(values), token) >= low) & (token < V)
        mass += tl.where(counts, token_weight(values, peak, rate), 0)
        count += counts.to(tl.int32)
    return tl.sum(count, axis=0), tl.sum(mass, axis=0)


@triton.jit
def _read_list(x, list_id, length, peak, rate, LIST: tl.constexpr):
    """Returns places and weights of a list's tokens. Entries after its end have the weight 0 and an undefined place."""
    entry = tl.arange(0, LIST)
    token = tl.load(list_id + entry, mask=entry < length, other=0)
    values = tl.load(x + token, mask=entry < length, other=float("-inf")).to(tl.float32)
    return place_of(order_key(values), token), token_weight(values, peak, rate)


@triton.jit
def _locate(
    limit, by_count, first, row, lists,
    SLICES: tl.constexpr, LIST: tl.constexpr, BLOCK: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Finds the place down to which tokens are kept until their number, or their mass, reaches `limit` or all are kept.

    Returns this place and the mass of the tokens from it on. `first` is the lowest place, length and mass of the first
    list; `row` is the row, V, the largest logit, the rate of `token_weight` and the lowest place of any weight.
    """
    low, length, mass_first = first
    x, V, peak, rate, floor = row
    list_id = lists + SLICES * LIST
    high, count_high, mass_high = lowest_place(order_key(peak) + 1), length * 0, mass_first * 0
    reached = tl.where(by_count, length.to(tl.int64), mass_first)
    if (limit > reached) & (low > floor):
        middle, count_low, step = floor, LIST + 1, 0
        while count_low - count_high > LIST:
            count, mass = _at_or_above(x, V, peak, rate, middle, BLOCK, EDGE)
            reached = tl.where(by_count, count.to(tl.int64), mass)
            if step == 0:
                limit = tl.minimum(limit, reached)
            if reached >= limit:
                low, count_low = middle, count
            else:
                high, count_high, mass_high = middle, count, mass
            middle = (low + high) >> 1
            # The first steps halve the range of values, over which tokens are spread more evenly than over places.
            # The later ones halve the range of places, which ends in any case.
            by_value = lowest_place(order_key(0.5 * key_value(key_at(low)) + 0.5 * key_value(key_at(high))))
            if (step < 8) & (by_value > low) & (by_value < high):
                middle = by_value
            step += 1
        list_id = lists  # overwrites the slices' lists; the first list has their tokens
        tl.debug_barrier()
        length = _fill_list(x, 0, V, low, high, list_id, LIST, BLOCK, EDGE)
        tl.debug_barrier()
    else:
        limit = tl.minimum(limit, reached)
    place, weight = _read_list(x, list_id, length, peak, rate, LIST)
    size = tl.where(by_count, (tl.arange(0, LIST) < length).to(tl.int64), weight)
    limit -= tl.where(by_count, count_high.to(tl.int64), mass_high)
    lowest = _largest_reaching(place, size, limit, low, high)
    return lowest, mass_high + tl.sum(tl.where(place >= lowest, weight, 0), axis=0)


@triton.jit
def _lowest_kept(
    row, cut, lengths, lists, mass, k, p,
    SLICES: tl.constexpr, LIST: tl.constexpr, BLOCK: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Returns the lowest place that top_k and top_p keep, and the lowest place and the length of the first list.

    Each slice has a list of its largest tokens, by id; joined in order, in memory after them, they are the first list.
    """
    x, _, peak, rate, _ = row
    length = tl.sum(tl.load(lengths + tl.arange(0, SLICES)), axis=0)
    if length > LIST:  # too many tokens for a list: it becomes empty
        cut, length = lowest_place(order_key(peak) + 1), length * 0
    entry = tl.arange(0, LIST)
    source, offset = entry, 0
    for number in tl.static_range(SLICES):
        count = tl.load(lengths + number)
        source = tl.where((entry >= offset) & (entry < offset + count), number * LIST + entry - offset, source)
        offset += count
    gathered = lists + SLICES * LIST
    tl.store(gathered + entry, tl.load(lists + source, mask=entry < length), mask=entry < length)
    tl.debug_barrier()
    _, weight = _read_list(x, gathered, length, peak, rate, LIST)
    first = (cut, length, tl.sum(weight, axis=0))
    lowest = cut
    for step in range(2):  # a loop, so that the compiled kernel has the code of _locate once
        limit, needed = k.to(tl.int64), k > 0
        if step == 1:
            # A token is kept if the tokens before it have less than top_p of the mass: ceil(top_p * mass).
            bits, four = (p * 4611686018427387904.0).to(tl.uint64), (mass << 2).to(tl.uint64)  # mass <= 2^60
            limit = tl.maximum(tl.umulhi(four, bits).to(tl.int64) + (four * bits != 0).to(tl.int64), 1)
            needed = p < 1
        if needed:
            lowest, mass = _locate(limit, step == 0, first, row, lists, SLICES, LIST, BLOCK, EDGE)
    return lowest, cut, length


@triton.jit
def _kept_weight(x, token, end, peak, rate, lowest, least, EDGE: tl.constexpr):
    """Computes the weights of the tokens: 0 for those that are not kept and those from `end` on."""
    values = tl.where(token < end, _load_row(x, token, end, EDGE).to(tl.float32), float("-inf"))
    weight = token_weight(values, peak, rate)
    return tl.where((place_of(order_key(values), token) >= lowest) & (weight >= least), weight, 0)


@triton.jit
def _add_up_spans(
    x, begin, end, peak, rate, lowest, least, spans, SPAN: tl.constexpr, BLOCK: tl.constexpr, EDGE: tl.constexpr
):
    """Writes the kept mass of each span of SPAN tokens in [begin, end); one warp adds up a span."""
    for start in tl.range(begin, end, BLOCK, loop_unroll_factor=2):
        weight = _kept_weight(x, start + tl.arange(0, BLOCK), end, peak, rate, lowest, least, EDGE)
        span = start // SPAN + tl.arange(0, BLOCK // SPAN)
        mass = tl.sum(tl.reshape(weight, [BLOCK // SPAN, SPAN]), axis=1)
        tl.store(spans + span, mass, mask=span * SPAN < end)


@triton.jit
def _find(weight, target):
    """Finds the first index at which the running sum exceeds `target`, and the sum before it."""
    running = tl.cumsum(weight, axis=0)
    passed = running <= target
    return tl.sum(passed.to(tl.int32), axis=0), tl.max(tl.where(passed, running, 0), axis=0)


@triton.jit
def _hand_out(token, row, y, host, host_row, host_stride, ON_HOST: tl.constexpr):
    tl.store(y + row, token)
    if ON_HOST:
        tl.store(host + tl.load(host_row).to(tl.int64) * host_stride + row, token)


_PARAMETERS = ["temperature", "top_k", "top_p", "min_p", "seed", "counter", "host", "host_row", "host_stride"]


@triton.jit(do_not_specialize=_PARAMETERS)  # see row_peaks_kernel
def draw_kernel(
    x, y, host, host_row, kept_mass, best, peaks, spans, lengths, lists, arrived, temperature, top_k, top_p, min_p,
    seed, counter, x_stride, host_stride, V, slice_len, SLICES: tl.constexpr, GROUPS: tl.constexpr,
    LIST: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, EDGE: tl.constexpr, ON_HOST: tl.constexpr,
):  # fmt: skip
    """Adds up the weights of one slice of a row and, for top_k and top_p, lists its largest tokens.

    The last program of a row to arrive draws the row's token. With ON_HOST it also writes the token to row `host_row`
    of the host's memory.
    """
    row = (tl.program_id(0) // SLICES).to(tl.int64)
    part = tl.program_id(0) % SLICES
    peak_place = tl.max(tl.load(best + row * SLICES + tl.arange(0, SLICES)), axis=0)
    peak_key = key_at(peak_place)
    t = tl.load(temperature + row)
    is_broken = (peak_key >= INFINITY_KEY) | (peak_key <= MINUS_INFINITY_KEY)  # NaN has a key above infinity's
    if (t == 0) | is_broken:
        if part == 0:
            token = tl.where(is_broken, -1, token_at(peak_place)).to(tl.int64)
            _hand_out(token, row, y, host, host_row, host_stride, ON_HOST)
            tl.store(kept_mass + row, 0)
    else:
        x += row * x_stride
        begin = part * slice_len
        end = tl.minimum(begin + slice_len, V)
        peak = key_value(peak_key)
        rate = tl.minimum(tl.div_rn(tl.full(t.shape, LOG2_E, tl.float32), t), 3e38)
        floor = order_key(peak - 31.0 * t - 1e-36)  # weights are 0 from 29.8 t (43 octaves) below the peak on
        least = tl.ceil(tl.load(min_p + row) * 4398046511104.0).to(tl.int64)
        k, p = tl.load(top_k + row), tl.load(top_p + row)
        k = tl.where(k < V, k, 0)
        filtered = (k > 0) | (p < 1)
        lowest, cut = lowest_place(floor * 0 + LOWEST), lowest_place(floor)
        lists += row * (SLICES + 1) * LIST
        spans += row * LIST
        _add_up_spans(x, begin, end, peak, rate, lowest, tl.where(filtered, 0, least), spans, SPAN, BLOCK, EDGE)
        if filtered:
            # The list starts at a key that five groups in eight reach; with none of the tokens of the other three it
            # has about SLICES * GROUPS * ln(8 / 3) tokens.
            group = tl.load(peaks + row * SLICES * GROUPS + tl.arange(0, SLICES * GROUPS)) >> 16  # rough keys do
            low, high = tl.min(group, axis=0), tl.max(group, axis=0) + 1
            low = _largest_reaching(group, 1, SLICES * GROUPS * 5 // 8, low, high) << 16
            cut = lowest_place(tl.maximum(low, floor))
            length = _fill_list(x, begin, end, cut, lowest_place(peak_key + 1), lists + part * LIST, LIST, BLOCK, EDGE)
            tl.store(lengths + row * SLICES + part, length)
        tl.debug_barrier()
        if tl.atomic_add(arrived + row, 1) == SLICES - 1:
            entry, length = tl.arange(0, LIST), 0
            if filtered:
                state = (x, V, peak, rate, lowest_place(floor))
                mass = tl.sum(tl.load(spans + entry, mask=entry * SPAN < V, other=0), axis=0)
                lowest, cut, length = _lowest_kept(
                    state, cut, lengths + row * SLICES, lists, mass, k, p, SLICES, LIST, BLOCK, EDGE
                )
            list_has_all = filtered & (lowest >= cut)
            if list_has_all:
                place, weight = _read_list(x, lists + SLICES * LIST, length, peak, rate, LIST)
                weight = tl.where((place >= lowest) & (weight >= least), weight, 0)
            else:
                if filtered:
                    _add_up_spans(x, 0, V, peak, rate, lowest, least, spans, SPAN, BLOCK, EDGE)
                    tl.debug_barrier()
                weight = tl.load(spans + entry, mask=entry * SPAN < V, other=0)
            mass = tl.sum(weight, axis=0)
            target = uniform_below(mass, philox_word(tl.load(seed + row), tl.load(counter + row)))
            nth, before = _find(weight, target)
            if list_has_all:
                token = tl.load(lists + SLICES * LIST + nth)
            else:
                token = nth * SPAN + tl.arange(0, SPAN)
                within, _ = _find(_kept_weight(x, token, V, peak, rate, lowest, least, EDGE), target - before)
                token = nth * SPAN + within
            _hand_out(token.to(tl.int64), row, y, host, host_row, host_stride, ON_HOST)
            tl.store(kept_mass + row, mass)

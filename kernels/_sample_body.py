"""Device code of `sample`: two kernels, and the passes and searches of the second. Their numbers: `_sample_numbers`.

top_k and top_p keep what is at or above a place, min_p what has its weight; the draw runs over the kept tokens by id.
That place is where counts or weights, summed from the largest place down, reach a limit. It is found without a sort, by
bisection in a list in registers: of all tokens from a place on. The first list holds the largest tokens; where it does
not reach far enough, passes over the row find a bracket [low, high) of places that fits another. Where the first list
has all that is kept, the draw is from it; else from the row, by the masses of its spans of SPAN tokens, which is all
that a row without top_k and top_p needs.
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


@triton.jit
def _load_row(x, token, end, EDGE: tl.constexpr):
    """The row at these tokens. Memory is read up to a multiple of EDGE: what is behind `end` is anything.

    With an EDGE of 16 what a thread loads at once is inside as a whole or not at all, so that it is one instruction.
    """
    return tl.load(x + token, mask=token < (end + EDGE - 1) // EDGE * EDGE, other=float("-inf"))


@triton.jit
def _penalise(x, listed_id, listed_count, first, last, begin, end, penalty, BLOCK: tl.constexpr):
    """Changes the row `x` at the listed tokens in [begin, end).

    Every step rounds to float32. Products are rounded from float64, where they are exact: a float32 product could be
    contracted with the difference behind it.
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
        tl.store(x + token, tl.where(count < 0, float("-inf"), new), mask=mine)


# One kernel for parameters that begin at any element: where they do changes with the number of rows.
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
    """Of one slice of a row the largest key with its token, and the largest keys of GROUPS groups of tokens.

    PENALISED: of the row after its penalties, which is written to `copy`.
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
    EDGE_OF_X: tl.constexpr = 16 if PENALISED else EDGE  # the copy's rows have room
    largest = tl.full([BLOCK], LOWEST, tl.int32)
    largest_id = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(begin, end, BLOCK, loop_unroll_factor=2):  # two loads on their way
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
    """The largest t such that the sizes of all places >= t sum to `limit` or more; `low` is one, `high` is not."""
    while low + 1 < high:
        middle = (low & high) + ((low ^ high) >> 1)  # (low + high) // 2 without overflow
        if tl.sum(tl.where(place >= middle, size, 0), axis=0) >= limit:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _fill_list(x, begin, end, low, high, list_id, LIST: tl.constexpr, BLOCK: tl.constexpr, EDGE: tl.constexpr):
    """Lists the tokens in [begin, end) of row `x` with places in [low, high), by id, as far as there is room.

    Returns how many they are.
    """
    column = tl.arange(0, BLOCK)
    length = begin * 0
    ahead = _load_row(x, begin + column, end, EDGE)
    for start in range(begin, end, BLOCK):
        token = start + column
        place = place_of(order_key(ahead.to(tl.float32)), token)
        ahead = _load_row(x, token + BLOCK, end, EDGE)  # the sums wait for all warps
        listed = ((place >= low) & (place < high) & (token < end)).to(tl.int32)
        count = tl.sum(listed, axis=0)
        if count > 0:
            entry = length + tl.cumsum(listed, axis=0) - 1
            tl.store(list_id + entry, token, mask=(listed > 0) & (entry < LIST))
            length += count
    return length


@triton.jit
def _at_or_above(x, V, peak, rate, low, BLOCK: tl.constexpr, EDGE: tl.constexpr):
    """A pass over the row: how many tokens have at least this place, and their mass."""
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
    """Places and weights of the tokens of a list; behind its end those of nothing."""
    entry = tl.arange(0, LIST)
    token = tl.load(list_id + entry, mask=entry < length, other=0)
    values = tl.load(x + token, mask=entry < length, other=float("-inf")).to(tl.float32)
    return place_of(order_key(values), token), token_weight(values, peak, rate)


@triton.jit
def _locate(
    limit, by_count, first, row, lists,
    SLICES: tl.constexpr, LIST: tl.constexpr, BLOCK: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """The place where `limit` tokens, or `limit` of mass, are reached, or all the weight is; and the mass up to there.

    `first` is the lowest place, the length and the mass of the first list.
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
            # Tokens are spread over values more evenly than over places; halving these ends in any case.
            by_value = lowest_place(order_key(0.5 * key_value(key_at(low)) + 0.5 * key_value(key_at(high))))
            if (step < 8) & (by_value > low) & (by_value < high):
                middle = by_value
            step += 1
        list_id = lists  # in place of the slices' lists, which the first has
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
    """The lowest place that top_k and top_p keep, and the lowest of the first list.

    That one is made here, behind the slices' lists, by moving them behind one another: by id, as they are.
    """
    x, _, peak, rate, _ = row
    length = tl.sum(tl.load(lengths + tl.arange(0, SLICES)), axis=0)
    if length > LIST:  # too long for a list: an empty one
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
    for step in range(2):  # a loop, so that the code of _locate is there once
        limit, needed = k.to(tl.int64), k > 0
        if step == 1:
            # ceil(top_p * mass): a token stays where those before it have less than top_p of the mass
            bits, four = (p * 4611686018427387904.0).to(tl.uint64), (mass << 2).to(tl.uint64)  # mass <= 2^60
            limit = tl.maximum(tl.umulhi(four, bits).to(tl.int64) + (four * bits != 0).to(tl.int64), 1)
            needed = p < 1
        if needed:
            lowest, mass = _locate(limit, step == 0, first, row, lists, SLICES, LIST, BLOCK, EDGE)
    return lowest, cut, length


@triton.jit
def _kept_weight(x, token, end, peak, rate, lowest, least, EDGE: tl.constexpr):
    """The weights of the tokens below `end` that are kept, 0 for the others."""
    values = tl.where(token < end, _load_row(x, token, end, EDGE).to(tl.float32), float("-inf"))
    weight = token_weight(values, peak, rate)
    return tl.where((place_of(order_key(values), token) >= lowest) & (weight >= least), weight, 0)


@triton.jit
def _add_up_spans(
    x, begin, end, peak, rate, lowest, least, spans, SPAN: tl.constexpr, BLOCK: tl.constexpr, EDGE: tl.constexpr
):
    """Writes the kept mass of every SPAN tokens in [begin, end), which one warp adds up."""
    for start in tl.range(begin, end, BLOCK, loop_unroll_factor=2):
        weight = _kept_weight(x, start + tl.arange(0, BLOCK), end, peak, rate, lowest, least, EDGE)
        span = start // SPAN + tl.arange(0, BLOCK // SPAN)
        mass = tl.sum(tl.reshape(weight, [BLOCK // SPAN, SPAN]), axis=1)
        tl.store(spans + span, mass, mask=span * SPAN < end)


@triton.jit
def _find(weight, target):
    """The first index at which the running sum exceeds `target`, and the sum before it."""
    running = tl.cumsum(weight, axis=0)
    passed = running <= target
    return tl.sum(passed.to(tl.int32), axis=0), tl.max(tl.where(passed, running, 0), axis=0)


@triton.jit(do_not_specialize=["temperature", "top_k", "top_p", "min_p", "seed", "counter"])  # as above
def draw_kernel(
    x,
    y,
    kept_mass,
    best,
    peaks,
    spans,
    lengths,
    lists,
    arrived,
    temperature,
    top_k,
    top_p,
    min_p,
    seed,
    counter,
    x_stride,
    V,
    slice_len,
    SLICES: tl.constexpr,
    GROUPS: tl.constexpr,
    LIST: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Slices of a row add up their weights and, for top_k and top_p, list their largest; the last to arrive draws."""
    row = (tl.program_id(0) // SLICES).to(tl.int64)
    part = tl.program_id(0) % SLICES
    peak_place = tl.max(tl.load(best + row * SLICES + tl.arange(0, SLICES)), axis=0)
    peak_key = key_at(peak_place)
    t = tl.load(temperature + row)
    if (t == 0) | (peak_key >= INFINITY_KEY) | (peak_key <= MINUS_INFINITY_KEY):
        if part == 0:
            tl.store(y + row, token_at(peak_place))
            tl.store(kept_mass + row, 0)
    else:
        x += row * x_stride
        begin = part * slice_len
        end = tl.minimum(begin + slice_len, V)
        peak = key_value(peak_key)
        rate = tl.minimum(tl.div_rn(tl.full(t.shape, LOG2_E, tl.float32), t), 3e38)
        floor = order_key(peak - 31.0 * t - 1e-36)  # 43 octaves are 29.8 t; the rest is for the rounding
        least = tl.ceil(tl.load(min_p + row) * 4398046511104.0).to(tl.int64)
        k, p = tl.load(top_k + row), tl.load(top_p + row)
        k = tl.where(k < V, k, 0)
        filtered = (k > 0) | (p < 1)
        lowest, cut = lowest_place(floor * 0 + LOWEST), lowest_place(floor)
        lists += row * (SLICES + 1) * LIST
        spans += row * LIST
        _add_up_spans(x, begin, end, peak, rate, lowest, tl.where(filtered, 0, least), spans, SPAN, BLOCK, EDGE)
        if filtered:
            # Three groups in eight have no token in the list, so it is about SLICES * GROUPS * ln(8 / 3) long.
            group = tl.load(peaks + row * SLICES * GROUPS + tl.arange(0, SLICES * GROUPS)) >> 16  # roughly is enough
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
            tl.store(y + row, token.to(tl.int64))
            tl.store(kept_mass + row, mass)

"""Device code of `sample`. Everything that decides is an integer, so that no order of summation shows in a result.

A row's logits x become int32 keys in the same order, and weights: 2^42 times the probability over the largest one,
rounded down. The sorted order (largest first, ties by index) is only ever looked at through its prefixes:
top_k, top_p and min_p each keep a prefix, so the kept set is the shortest of the three and its mass says which that is.
A prefix is found by bisection for the key at which counts or weights, summed from the largest key down, reach a limit.

The bisection runs on a short list in registers: the tokens whose keys lie in a bracket [low, high). A bracket is six
scalars: low, high, and the tokens and mass at or above either. The first list holds the largest tokens; where it
turns out not to reach far enough, passes over the row find a bracket that does.
"""

import triton
import triton.language as tl

LOWEST: tl.constexpr = tl.constexpr(-(2**31))  # below the key of any logit
INFINITY_KEY: tl.constexpr = tl.constexpr(0x7F800000)
MINUS_INFINITY_KEY: tl.constexpr = tl.constexpr(-0x7F800001)
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def order_key(x):
    """int32 in the order of float32 `x`; -0 is 0, NaN is above infinity."""
    bits = x.to(tl.int32, bitcast=True)
    key = tl.where(x == 0, 0, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return tl.where(x == x, key, 0x7FFFFFFF)


@triton.jit
def key_value(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def token_weight(x, peak, rate):
    """int64: 2^42 * 2^(-(peak - x) * rate), 0 from 43 octaves below the peak on.

    The two float32 operations round once each and nothing can contract them; the rest, a polynomial for 2^-f at 24
    bits of f, are integers. So every machine gets the same weights.
    """
    octaves = tl.minimum((peak - x) * rate, 43.0)
    fixed = (octaves * 16777216.0).to(tl.int32)
    f = (fixed << 8).to(tl.uint32, bitcast=True)  # the fraction, times 2^32
    q = 0x53A2D4 - tl.umulhi(f, tl.full(f.shape, 0x72C75, tl.uint32))
    q = 0x273E53D - tl.umulhi(f, q)
    q = 0xE34B488 - tl.umulhi(f, q)
    q = 0x3D7F5BFB - tl.umulhi(f, q)
    q = 0xB1721652 - tl.umulhi(f, q)
    power = 0x80000000 - (tl.umulhi(f, q) >> 1)  # 2^31 * 2^-f
    return (power.to(tl.int64) << 11) >> (fixed >> 24).to(tl.int64)


@triton.jit
def philox_word(seed, counter):
    """The first uint64 that numpy's Philox(key=seed, counter=counter) gives: Philox4x64-10, which counts up first."""
    c0 = counter.to(tl.uint64, bitcast=True) + 1
    c1, c2, c3, k1 = c0 * 0, c0 * 0, c0 * 0, c0 * 0
    k0 = seed.to(tl.uint64, bitcast=True)
    m0 = tl.full(c0.shape, 0xD2E7470EE14C6C93, tl.uint64)
    m1 = tl.full(c0.shape, 0xCA5A826395121157, tl.uint64)
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, m0), c0 * m0
        high1, low1 = tl.umulhi(c2, m1), c2 * m1
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += 0x9E3779B97F4A7C15
        k1 += 0xBB67AE8584CAA73B
    return c0


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


@triton.jit
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
    if part == 0:
        tl.store(arrived + row, 0)
    x = logits + row * logits_stride
    if PENALISED:
        changed = copy + row * copy_stride
        for start in range(begin, end, BLOCK):
            inside = start + column < end
            values = tl.load(x + start + column, mask=inside, other=0.0)
            tl.store(changed + start + column, values.to(tl.float32), mask=inside)
        tl.debug_barrier()
        first, last = tl.load(listed_start + row), tl.load(listed_start + row + 1)
        _penalise(changed, listed_id, listed_count, first, last, begin, end, penalty + row * 3, 128)
        tl.debug_barrier()
        x = changed
    largest = tl.full([BLOCK], LOWEST, tl.int32)
    largest_id = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(begin, end, BLOCK, loop_unroll_factor=2):  # two loads on their way
        token = start + column
        values = tl.load(x + token, mask=token < end, other=0.0).to(tl.float32)
        key = tl.where(token < end, order_key(values), LOWEST)
        largest_id = tl.where(key > largest, token, largest_id)
        largest = tl.maximum(largest, key)
    packed = (largest.to(tl.int64) << 32) | (0x7FFFFFFF - largest_id).to(tl.int64)  # of equal keys the first token
    tl.store(best + row * SLICES + part, tl.max(packed, axis=0))
    groups = tl.max(tl.reshape(largest, [GROUPS, BLOCK // GROUPS]), axis=1)
    tl.store(peaks + (row * SLICES + part) * GROUPS + tl.arange(0, GROUPS), groups)


@triton.jit
def _largest_reaching(key, size, limit, low, high):
    """The largest key t such that the sizes of all keys >= t sum to `limit` or more; `low` is one, `high` is not."""
    while low + 1 < high:
        middle = (low & high) + ((low ^ high) >> 1)  # (low + high) // 2 without overflow
        if tl.sum(tl.where(key >= middle, size, 0), axis=0) >= limit:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _fill_list(x, begin, end, peak, rate, low, high, list_key, list_id, LIST: tl.constexpr, BLOCK: tl.constexpr):
    """Lists the tokens in [begin, end) of row `x` with keys in [low, high), as far as there is room.

    Returns how many they are, and the mass of all tokens in [begin, end).
    """
    column = tl.arange(0, BLOCK)
    mass = tl.zeros([BLOCK], tl.int64)
    num_listed = begin * 0
    ahead = tl.load(x + begin + column, mask=begin + column < end, other=float("-inf"))
    for start in range(begin, end, BLOCK):
        token, values = start + column, ahead.to(tl.float32)
        ahead = tl.load(x + token + BLOCK, mask=token + BLOCK < end, other=float("-inf"))  # the sums wait for all warps
        mass += token_weight(values, peak, rate)
        key = order_key(values)
        listed = ((key >= low) & (key < high)).to(tl.int32)
        count = tl.sum(listed, axis=0)
        if count > 0:
            place = num_listed + tl.cumsum(listed, axis=0) - 1
            room = (listed > 0) & (place < LIST)
            tl.store(list_key + place, key, mask=room)
            tl.store(list_id + place, token, mask=room)
            num_listed += count
    return num_listed, tl.sum(mass, axis=0)


@triton.jit
def _at_or_above(x, V, peak, rate, key, least, BLOCK: tl.constexpr):
    """A pass over the row: how many tokens have at least this key, and the mass of those with a weight of `least`."""
    column = tl.arange(0, BLOCK)
    mass, count = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, V, BLOCK, loop_unroll_factor=2):  # two loads on their way
        values = tl.load(x + start + column, mask=start + column < V, other=float("-inf")).to(tl.float32)
        weight, counts = token_weight(values, peak, rate), order_key(values) >= key
        mass += tl.where(counts & (weight >= least), weight, 0)
        count += counts.to(tl.int32)
    return tl.sum(count, axis=0), tl.sum(mass, axis=0)


@triton.jit
def _locate(limit, by_count, bracket, row, lists, LIST: tl.constexpr, BLOCK: tl.constexpr):
    """Where the sorted order reaches `limit` tokens, or `limit` of mass.

    Returns the key there, the tokens and the mass above that key, and the bracket that the list now holds. A bracket
    of one key may have more tokens than the list, which then holds the first.
    """
    low, high, count_low, mass_low, count_high, mass_high = bracket
    x, V, peak, rate, floor, count_all, mass_all = row
    list_key, list_id = lists
    reached_low = tl.where(by_count, count_low.to(tl.int64), mass_low)
    reached_high = tl.where(by_count, count_high.to(tl.int64), mass_high)
    if (limit <= reached_high) | (limit > reached_low):
        if limit > reached_low:
            high, count_high, mass_high = low, count_low, mass_low
            low, count_low, mass_low = floor, count_all, mass_all
        else:
            low, count_low, mass_low = high, count_high, mass_high
            high, count_high, mass_high = order_key(peak) + 1, count_high * 0, mass_high * 0
        step = 0
        while (low + 1 < high) & (count_low - count_high > LIST):
            middle = (low & high) + ((low ^ high) >> 1)
            # Tokens are spread over values more evenly than over keys; halving keys ends in any case.
            by_value = order_key(0.5 * key_value(low) + 0.5 * key_value(high))
            if (step < 8) & (by_value > low) & (by_value < high):
                middle = by_value
            count, mass = _at_or_above(x, V, peak, rate, middle, 0, BLOCK)
            if tl.where(by_count, count.to(tl.int64), mass) >= limit:
                low, count_low, mass_low = middle, count, mass
            else:
                high, count_high, mass_high = middle, count, mass
            step += 1
        tl.debug_barrier()
        num_listed, _ = _fill_list(x, 0, V, peak, rate, low, high, list_key, list_id, LIST, BLOCK)
        count_low = count_high + num_listed
        tl.debug_barrier()
    entry = tl.arange(0, LIST)
    filled = entry < count_low - count_high
    key = tl.load(list_key + entry, mask=filled, other=MINUS_INFINITY_KEY)
    weight = token_weight(key_value(key), peak, rate)
    size = tl.where(by_count, filled.to(tl.int64), weight)
    here = _largest_reaching(key, size, limit - tl.where(by_count, count_high.to(tl.int64), mass_high), low, high)
    count = count_high + tl.sum((key > here).to(tl.int32), axis=0)
    mass = mass_high + tl.sum(tl.where(key > here, weight, 0), axis=0)
    return here, count, mass, (low, high, count_low, mass_low, count_high, mass_high)


@triton.jit
def _gather_lists(list_key, list_id, num_listed, SLICES: tl.constexpr, LIST: tl.constexpr):
    """Moves the lists of a row's slices, LIST apart, behind one another: still by index."""
    entry = tl.arange(0, LIST)
    source, offset = entry, 0
    for part in tl.static_range(SLICES):
        count = tl.load(num_listed + part * 2).to(tl.int32)
        source = tl.where((entry >= offset) & (entry < offset + count), part * LIST + entry - offset, source)
        offset += count
    key = tl.load(list_key + source, mask=entry < offset, other=MINUS_INFINITY_KEY)
    token = tl.load(list_id + source, mask=entry < offset, other=0)
    tl.debug_barrier()
    tl.store(list_key + entry, key, mask=entry < offset)
    tl.store(list_id + entry, token, mask=entry < offset)
    tl.debug_barrier()
    return key


@triton.jit
def _draw_row(
    row, cut, least, totals, lists, top_k, top_p, word, SLICES: tl.constexpr, LIST: tl.constexpr, BLOCK: tl.constexpr
):
    """The token of a row and the mass that was kept, from what all its slices left in `totals` and the lists."""
    x, V, peak, rate, floor = row
    list_key, list_id = lists
    part = 2 * tl.arange(0, SLICES)
    mass_all = tl.sum(tl.load(totals + part), axis=0)
    num_listed = tl.sum(tl.load(totals + part + 1), axis=0).to(tl.int32)
    none, nothing = num_listed * 0, mass_all * 0
    low, high, count_low, mass_low = order_key(peak) + 1, order_key(peak) + 1, none, nothing  # an empty bracket
    count_all, mass_least = none + V, mass_all
    if num_listed <= LIST:
        key = _gather_lists(list_key, list_id, totals + 1, SLICES, LIST)
        weight = token_weight(key_value(key), peak, rate)
        low, count_low, mass_low = cut, num_listed, tl.sum(weight, axis=0)
        mass_least = tl.sum(tl.where(weight >= least, weight, 0), axis=0)
    short = token_weight(key_value(tl.minimum(low, order_key(peak))), peak, rate) >= least  # tokens below may have it
    if (short & (least > 0)) | ((top_k > count_low) & (top_k < V)):
        count_all, mass_least = _at_or_above(x, V, peak, rate, floor, least, BLOCK)
    mass_least = tl.where(least > 0, mass_least, mass_all)
    row = (x, V, peak, rate, floor, count_all, mass_all)
    bracket = (low, high, count_low, mass_low, none, nothing)

    kept, here, nth = mass_all, low, nothing
    for step in range(3):  # a loop, so that the code of _locate is there once
        limit, needed = top_k, (top_k > 0) & (top_k < count_all)
        if step == 1:
            # ceil(top_p * kept): a token stays where those before it have less than top_p of the mass
            p, four = (top_p * 4611686018427387904.0).to(tl.uint64), (kept << 2).to(tl.uint64)  # kept < 2^60
            limit = tl.maximum(tl.umulhi(four, p).to(tl.int64) + (four * p != 0).to(tl.int64), 1)
            needed = top_p < 1
        elif step == 2:
            kept = tl.minimum(kept, mass_least)
            random = word & 0xFFFFFFFFFFFFF800  # 53 bits, as numpy's random()
            limit = tl.umulhi(random, kept.to(tl.uint64)).to(tl.int64) + 1
            needed = limit > 0
        if needed:
            here, count, mass, bracket = _locate(limit, step == 0, bracket, row, lists, LIST, BLOCK)
            weight = token_weight(key_value(here), peak, rate)
            nth = limit - count if step == 0 else (limit - mass + weight - 1) // weight  # of the tokens with this key
            if step < 2:
                kept = mass + nth * weight
    return _nth_token(x, V, here, nth - 1, list_key, list_id, bracket[2] - bracket[4], LIST, BLOCK), kept


@triton.jit
def _nth_token(x, V, key, nth, list_key, list_id, num_listed, LIST: tl.constexpr, BLOCK: tl.constexpr):
    """The nth token, from 0 and by index, whose key is `key`; from the list where it is that long."""
    entry = tl.arange(0, LIST)
    equal = tl.load(list_key + entry, mask=entry < num_listed, other=LOWEST) == key
    rank = tl.cumsum(equal.to(tl.int32), axis=0) - 1
    token = tl.max(tl.where(equal & (rank == nth), tl.load(list_id + entry, mask=equal), -1), axis=0)
    if token < 0:
        seen = 0
        for start in range(0, V, BLOCK):
            column = start + tl.arange(0, BLOCK)
            values = tl.load(x + column, mask=column < V, other=float("nan")).to(tl.float32)
            same = order_key(values) == key
            place = seen + tl.cumsum(same.to(tl.int32), axis=0) - 1
            token = tl.maximum(token, tl.max(tl.where(same & (place == nth), column, -1), axis=0))
            seen += tl.sum(same.to(tl.int32), axis=0)
    return token


@triton.jit
def draw_kernel(
    x,
    y,
    kept_mass,
    best,
    peaks,
    totals,
    arrived,
    list_key,
    list_id,
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
    BLOCK: tl.constexpr,
):
    """Every slice of a row lists its largest tokens and adds up its weights; the last to arrive draws."""
    row = (tl.program_id(0) // SLICES).to(tl.int64)
    part = tl.program_id(0) % SLICES
    packed = tl.max(tl.load(best + row * SLICES + tl.arange(0, SLICES)), axis=0)
    peak_key = (packed >> 32).to(tl.int32)
    t = tl.load(temperature + row)
    if (t == 0) | (peak_key >= INFINITY_KEY) | (peak_key <= MINUS_INFINITY_KEY):
        if part == 0:
            tl.store(y + row, 0x7FFFFFFF - (packed & 0x7FFFFFFF))
            tl.store(kept_mass + row, 0)
    else:
        x += row * x_stride
        begin = part * slice_len
        end = tl.minimum(begin + slice_len, V)
        peak = key_value(peak_key)
        rate = tl.minimum(tl.div_rn(tl.full(t.shape, LOG2_E, tl.float32), t), 3e38)
        floor = order_key(peak - 31.0 * t - 1e-36)  # 43 octaves are 29.8 t; the rest is for the rounding
        # Three groups in eight have no token in the list, so it is about SLICES * GROUPS * ln(8 / 3) long.
        group = tl.load(peaks + row * SLICES * GROUPS + tl.arange(0, SLICES * GROUPS)) >> 16  # roughly is enough
        lowest, highest = tl.min(group, axis=0), tl.max(group, axis=0)
        cut = _largest_reaching(group, 1, SLICES * GROUPS * 5 // 8, lowest, highest + 1) << 16
        cut = tl.maximum(cut, floor)
        my_list = (row * SLICES + part) * LIST
        num_listed, mass = _fill_list(
            x, begin, end, peak, rate, cut, peak_key + 1, list_key + my_list, list_id + my_list, LIST, BLOCK
        )
        mine = totals + (row * SLICES + part) * 2
        tl.store(mine, mass)
        tl.store(mine + 1, num_listed.to(tl.int64))
        tl.debug_barrier()
        if tl.atomic_add(arrived + row, 1) == SLICES - 1:
            word = philox_word(tl.load(seed + row), tl.load(counter + row))
            state = (x, V, peak, rate, floor)
            lists = (list_key + row * SLICES * LIST, list_id + row * SLICES * LIST)
            least = tl.ceil(tl.load(min_p + row) * 4398046511104.0).to(tl.int64)
            k, p = tl.load(top_k + row).to(tl.int64), tl.load(top_p + row)
            token, kept = _draw_row(
                state, cut, least, totals + row * SLICES * 2, lists, k, p, word, SLICES, LIST, BLOCK
            )
            tl.store(y + row, token.to(tl.int64))
            tl.store(kept_mass + row, kept)

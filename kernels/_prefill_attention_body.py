"""The jitted body of prefill_attention.

A block of queries holds (query, head) pairs for one kv head, in which the head changes fastest, so that every key and
value that is read serves all query heads that share it. The softmax is the online one: it keeps a running maximum, a
running sum and a running sum of weighted values.

With a window, no query of a block sees more than a few blocks of keys. All of them are read through a mask, in one
loop, so that their copies are on their way together and a query adds up its keys in the same order in any chunk.

With SPLIT the keys of a block are shared among programs, by the rule of _prefill_plan.py. The last of them to finish
adds up what all have found.
"""

import triton
import triton.language as tl

from internvl_rt.kernels._decode_attention_body import slot_rows, table_blocks
from internvl_rt.kernels._kv_numbers import load_scales, numbers_of, scaled_queries, word_rows
from internvl_rt.kernels._prefill_plan import MAX_SPLITS
from internvl_rt.kernels._softmax import load_sinks, probability, total_with_sink
from internvl_rt.kernels._split_combine import combine_parts

MOST_SPLITS: tl.constexpr = tl.constexpr(MAX_SPLITS)
# What maxima begin with where a query may see no key of a block or of a split: the lowest finite number, because the
# difference of two infinities is NaN.
LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _are_visible(key, position, WINDOW: tl.constexpr):
    """Says which queries see which keys, [queries, keys]."""
    visible = key[None, :] <= position[:, None]
    if WINDOW is not None:
        visible = visible & (key[None, :] > position[:, None] - WINDOW)
    return visible


@triton.jit
def _attend(q, k, v, visible, top, total, acc, scale_log2, PRECISION: tl.constexpr):
    """Returns the online softmax's state after one more block of keys; `visible` None: every query sees all of them."""
    score = tl.dot(q, k.T, input_precision=PRECISION)
    if visible is not None:
        score = tl.where(visible, score, float("-inf"))
    new_top = tl.maximum(top, tl.max(score, axis=1) * scale_log2)
    shrink, p = tl.exp2(top - new_top), probability(score * scale_log2 - new_top[:, None], v.dtype)
    total = total * shrink + tl.sum(p, axis=1)
    return new_top, total, tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)


@triton.jit
def _attend_numbers(q, k, v, scales, visible, top, total, acc, scale_log2, PRECISION: tl.constexpr):
    """Returns the state after one more block of keys and values in 8 bits. `scales` are of `load_scales`.

    As in decode attention, the maximum is that of a probability times the power of 2 in its value's scale.
    """
    k_scale, v_exponent, v_inverse, v_rest = scales
    score = tl.dot(q, k.T, input_precision=PRECISION) * k_scale[None, :]
    score = score * scale_log2[:, None] + v_exponent[None, :]
    if visible is not None:
        score = tl.where(visible, score, float("-inf"))
    new_top = tl.maximum(top, tl.max(score, axis=1))
    shrink, weight = tl.exp2(top - new_top), tl.exp2(score - new_top[:, None])
    total = total * shrink + tl.sum(weight * v_inverse[None, :], axis=1)
    of_values = (weight * v_rest[None, :]).to(v.dtype)
    return new_top, total, tl.dot(of_values, v, acc * shrink[:, None], input_precision=PRECISION)


@triton.jit
def _write(y, acc, top, total, sink, block_row, y_stride, query, pair_channel, real):
    if sink is not None:
        total = total_with_sink(total, top, sink)
    out = acc * (1.0 / total)[:, None]
    y_block = y + block_row * y_stride + ((query * y_stride)[:, None] + pair_channel)
    tl.store(y_block, out.to(y.dtype.element_ty), mask=real[:, None])


@triton.jit
def own_block(query_start, num_rows, queries, ROWS: tl.constexpr):
    """Returns which block of which row this program computes: the rows' blocks follow each other. Programs beyond the
    last one get block -1.
    """
    row, item = tl.arange(0, ROWS), tl.program_id(0)
    held = row < num_rows
    first = tl.load(query_start + row, mask=held, other=0)
    blocks = tl.cdiv(tl.load(query_start + row + 1, mask=held, other=0) - first, queries)
    ends = tl.cumsum(blocks, 0)
    own = tl.sum((ends <= item).to(tl.int32))
    block = item - tl.sum(tl.where(row == own, ends - blocks, 0))
    return tl.minimum(own, num_rows - 1), tl.where(own < num_rows, block, -1)


@triton.jit
def own_item(
    query_start, seq_len, num_rows, queries, num_splits, min_keys, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
    WINDOW: tl.constexpr = None,
):  # fmt: skip
    """Returns which split of which block of which row this program computes, and the keys of a split by `split_lens`.

    A row has its blocks' items one after another, as many for each block as the last one has splits, and the rows
    follow each other. Programs beyond the last item get block -1. num_splits: of each row, 0: as many as are best.
    """
    row, item = tl.arange(0, ROWS), tl.program_id(0)
    held = row < num_rows
    first = tl.load(query_start + row, mask=held, other=0)
    blocks = tl.cdiv(tl.load(query_start + row + 1, mask=held, other=0) - first, queries)
    keys = tl.load(seq_len + row, mask=held, other=0)
    if WINDOW is not None:
        keys = tl.minimum(keys, WINDOW + BLOCK_N - 1)  # as `keys_to_split`
    if num_splits > 0:
        split_len = tl.cdiv(keys, num_splits)
    else:
        total = tl.sum(blocks)
        work, longest = tl.sum(blocks * keys), tl.max(tl.where(blocks > 0, keys, 0))
        spare = tl.num_programs(0) - total
        each = tl.minimum(tl.maximum(tl.num_programs(0) // tl.maximum(total, 1), 1), MOST_SPLITS)
        common = tl.cdiv(longest, each)
        common = tl.where(spare > 0, tl.minimum(common, tl.cdiv(work, tl.maximum(spare, 1))), common)
        common = tl.maximum(tl.maximum(common, tl.cdiv(longest, MOST_SPLITS)), min_keys)
        split_len = tl.zeros_like(keys) + common
    split_len = tl.cdiv(tl.maximum(split_len, 1), BLOCK_N) * BLOCK_N
    splits = tl.cdiv(keys, split_len)
    ends = tl.cumsum(blocks * splits, 0)
    own = tl.sum((ends <= item).to(tl.int32))  # the row of this item
    is_own = row == own
    in_row = item - tl.sum(tl.where(is_own, ends - blocks * splits, 0))
    num_splits = tl.maximum(tl.sum(tl.where(is_own, splits, 0)), 1)
    block = tl.where(own < num_rows, in_row // num_splits, -1)
    split_len = tl.maximum(tl.sum(tl.where(is_own, split_len, 0)), 1)
    return tl.minimum(own, num_rows - 1), block, in_row % num_splits, split_len


@triton.jit
def _combine(
    y_head, partial_acc, partial_stats, first_item, num_splits, num_pairs, sinks, first_head, group, y_stride,
    BLOCK_M: tl.constexpr, C: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Writes the output of a block's `num_pairs` pairs, PAIRS at once: the weighted sum of its splits' results."""
    acc_parts, stats_parts = partial_acc + first_item * (BLOCK_M * C), partial_stats + first_item * (2 * BLOCK_M)
    channel = tl.arange(0, C)
    for first_pair in range(0, num_pairs, PAIRS):
        pair = first_pair + tl.arange(0, PAIRS)
        real = pair < num_pairs
        sink = None
        if sinks is not None:
            sink = load_sinks(sinks, first_head + pair % group, real)
        out = combine_parts(acc_parts, stats_parts, num_splits, pair, real, sink, BLOCK_M, C, SOME=64, TOGETHER=8)
        y_rows = y_head + (pair // group * y_stride + pair % group * C)[:, None] + channel[None, :]
        tl.store(y_rows, out.to(y_head.dtype.element_ty), mask=real[:, None])


# Not specialised: one kernel serves any batch and any model with these channels, and index tensors at any address.
INDICES = ["block_table", "query_start", "seq_len", "table_stride", "group", "num_lines"]
INDICES += ["num_rows", "num_splits", "min_keys", "sinks"]


@triton.jit(do_not_specialize=INDICES)
def prefill_attention_kernel(
    q, k_cache, v_cache, y, block_table, query_start, seq_len, q_stride, block_stride, head_stride, slot_stride,
    table_stride, group, num_lines, scale_log2, partial_acc, partial_stats, arrived, num_rows, num_splits, min_keys,
    scale, scale_block_stride, scale_head_stride, sinks,
    P: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr, FLAT: tl.constexpr, SPLIT: tl.constexpr, SUM_PAIRS: tl.constexpr, INLINE: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """Computes one block of queries. Programs take the last queries first: these see the most keys, and the programs
    that start last should be short. Neighbouring programs share a kv head, whose keys and values stay in the L2 cache.

    All queries of the block see the keys before its first query, so whole blocks of these keys need no mask. The other
    keys are read through a mask, because memory beyond the sequence may hold anything, NaN too.

    FLAT: the grid has the blocks of all rows, up to FLAT, one row after another; without it, as many for each row.
    SPLIT: computes one split of a block, of a batch with up to SPLIT rows. Without a window each split begins with a
    key that all queries see, so no query has a maximum of -inf. The last split goes on to the last key that any query
    sees. The last program of a block to finish adds up the splits, SUM_PAIRS pairs at once.
    scale: of caches in 8 bits; its strides count words of two scales. INLINE: inline assembly may be used.
    sinks: a logit of each query head, see _softmax.py. WINDOW: how many keys up to its own a query sees; None: all.
    """
    head = tl.program_id(1)
    if SPLIT:
        row, block, split, split_len = own_item(
            query_start, seq_len, num_rows, BLOCK_M // group, num_splits, min_keys, BLOCK_N, SPLIT, WINDOW
        )
    elif FLAT:
        row, block = own_block(query_start, num_rows, BLOCK_M // group, FLAT)
    else:
        row, block = tl.program_id(2), tl.program_id(0)
    first_row = tl.load(query_start + row)
    num_queries = tl.load(query_start + row + 1) - first_row
    length = tl.load(seq_len + row)
    block_stride = tl.cast(block_stride, tl.int64)
    queries = BLOCK_M // group  # queries of a block
    first_query = (tl.cdiv(num_queries, queries) - 1 - block) * queries
    begin, masked_begin, window_begin = 0, 0, 0
    is_item = (block >= 0) & (first_query >= 0)
    if WINDOW is not None:
        first_key = tl.maximum(length - num_queries + first_query - (WINDOW - 1), 0)  # that the first query sees
        window_begin = first_key // BLOCK_N * BLOCK_N
        begin = window_begin
    if SPLIT:
        begin = window_begin + tl.multiple_of(split * split_len, BLOCK_N)
        is_item = is_item & (begin <= length - num_queries + first_query)
    if is_item:
        pair, channel = tl.arange(0, BLOCK_M), tl.arange(0, C)
        query = first_query + pair // group
        real = (pair < queries * group) & (query < num_queries)
        first_position = length - num_queries + first_query
        whole_end = (first_position + 1) // BLOCK_N * BLOCK_N
        end = tl.minimum(first_position + queries, length)
        position = tl.minimum(first_position + pair // group, end - 1)  # a row without a query gets a position as well
        if SPLIT:
            splits = (first_position - window_begin) // split_len + 1
            end = tl.where(split == splits - 1, end, begin + split_len)
            whole_end = tl.minimum(whole_end, end)
            masked_begin = whole_end
        if WINDOW is not None:
            whole_end, masked_begin = begin, begin
        table = block_table + row.to(tl.int64) * table_stride
        k_head = k_cache + head.to(tl.int64) * head_stride
        v_head = v_cache + head.to(tl.int64) * head_stride
        block_row = (first_row + first_query).to(tl.int64)
        pair_channel = ((head * group + pair % group) * C)[:, None] + channel[None, :]
        q_rows = q + block_row * q_stride + (pair // group).to(tl.int64) * q_stride
        q_block = tl.load(q_rows[:, None] + pair_channel, mask=real[:, None], other=0.0)
        sink = None
        if sinks is not None:
            sink = load_sinks(sinks, head * group + pair % group, real)
        if scale is not None:
            scale_words = scale.to(tl.pointer_type(tl.int32)) + head.to(tl.int64) * scale_head_stride
            q_block, power = scaled_queries(q_block)
            row_log2 = scale_log2 * power
        if USE_TMA:  # each cache is read as a tensor [B * G * P, C]
            if scale is not None:  # of words of four numbers
                WORDS: tl.constexpr = C // 4
                k_words, v_words = k_cache.to(tl.pointer_type(tl.int32)), v_cache.to(tl.pointer_type(tl.int32))
                k_lines = tl.make_tensor_descriptor(k_words, [num_lines, WORDS], [WORDS, 1], [BLOCK_N, WORDS])
                v_lines = tl.make_tensor_descriptor(v_words, [num_lines, WORDS], [WORDS, 1], [BLOCK_N, WORDS])
            else:
                k_lines = tl.make_tensor_descriptor(k_cache, [num_lines, C], [C, 1], [BLOCK_N, C])
                v_lines = tl.make_tensor_descriptor(v_cache, [num_lines, C], [C, 1], [BLOCK_N, C])

        top = tl.full([BLOCK_M], float("-inf") if WINDOW is None else LOWEST, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, C], tl.float32)
        blocks = table_blocks(table, begin, end, P, BLOCK_N)
        if WINDOW is None:
            # With SPLIT both loops count from 0: none that begins at a number from a sum over a tensor is pipelined.
            for offset in range(0, whole_end - begin, BLOCK_N):
                start = begin + offset
                if USE_TMA:
                    line = (blocks.to(tl.int32) * tl.num_programs(1) + head) * P + start % P
                    k = k_lines.load([line, 0])
                    v = v_lines.load([line, 0])
                else:
                    k_rows = slot_rows(k_head, blocks, start, block_stride, slot_stride, P, BLOCK_N)
                    v_rows = slot_rows(v_head, blocks, start, block_stride, slot_stride, P, BLOCK_N)
                    if scale is not None:
                        k, v = tl.load(word_rows(k_rows, C)), tl.load(word_rows(v_rows, C))
                    else:
                        k = tl.load(k_rows[:, None] + channel[None, :])
                        v = tl.load(v_rows[:, None] + channel[None, :])
                state = top, total, acc
                if scale is not None:
                    k = numbers_of(k, k_cache.dtype.element_ty, q_block.dtype, C, INLINE)
                    v = numbers_of(v, v_cache.dtype.element_ty, q_block.dtype, C, INLINE)
                    scales = load_scales(slot_rows(scale_words, blocks, start, scale_block_stride, 1, P, BLOCK_N), None)
                    blocks = table_blocks(table, start + BLOCK_N, end, P, BLOCK_N)
                    top, total, acc = _attend_numbers(q_block, k, v, scales, None, *state, row_log2, PRECISION)
                else:
                    # The table's entries are loaded one turn ahead, so that no copy waits for the table.
                    blocks = table_blocks(table, start + BLOCK_N, end, P, BLOCK_N)
                    top, total, acc = _attend(q_block, k, v, None, *state, scale_log2, PRECISION)
        for offset in range(whole_end - masked_begin, end - masked_begin, BLOCK_N):
            start = masked_begin + offset
            key = start + tl.arange(0, BLOCK_N)
            inside = key < end  # beyond `end` memory may not be read; `visible` is narrower
            if WINDOW is not None:
                inside = inside & (key >= first_key)
            k_rows = slot_rows(k_head, blocks, start, block_stride, slot_stride, P, BLOCK_N)
            v_rows = slot_rows(v_head, blocks, start, block_stride, slot_stride, P, BLOCK_N)
            state = top, total, acc
            if scale is not None:
                k = tl.load(word_rows(k_rows, C), mask=inside[:, None], other=0)
                v = tl.load(word_rows(v_rows, C), mask=inside[:, None], other=0)
                k = numbers_of(k, k_cache.dtype.element_ty, q_block.dtype, C, INLINE)
                v = numbers_of(v, v_cache.dtype.element_ty, q_block.dtype, C, INLINE)
                scales = load_scales(slot_rows(scale_words, blocks, start, scale_block_stride, 1, P, BLOCK_N), inside)
                blocks = table_blocks(table, start + BLOCK_N, end, P, BLOCK_N)
                visible = _are_visible(key, position, WINDOW)
                top, total, acc = _attend_numbers(q_block, k, v, scales, visible, *state, row_log2, PRECISION)
            else:
                k = tl.load(k_rows[:, None] + channel[None, :], mask=inside[:, None], other=0.0)
                v = tl.load(v_rows[:, None] + channel[None, :], mask=inside[:, None], other=0.0)
                blocks = table_blocks(table, start + BLOCK_N, end, P, BLOCK_N)
                visible = _are_visible(key, position, WINDOW)
                top, total, acc = _attend(q_block, k, v, visible, *state, scale_log2, PRECISION)
        y_stride = tl.num_programs(1) * group * C
        if SPLIT:
            if splits > 1:
                item = (head * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
                own_part = partial_acc + item * (BLOCK_M * C)
                own_stats = partial_stats + item * (2 * BLOCK_M)
                tl.store(own_part + pair[:, None] * C + channel[None, :], acc)
                tl.store(own_stats + pair, top)
                tl.store(own_stats + BLOCK_M + pair, total)
                # As in decode attention: the barrier and the release put the partial results of all threads before the
                # count, the acquire puts the reads of the last program to arrive after the writes of all others.
                tl.debug_barrier()
                first_item = item - split
                counter = arrived + first_item
                if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == splits - 1:
                    num_pairs = tl.minimum(queries, num_queries - first_query) * group
                    y_head = y + block_row * y_stride + head * group * C
                    parts = partial_acc, partial_stats, first_item, splits
                    heads = sinks, head * group, group
                    _combine(y_head, *parts, num_pairs, *heads, y_stride, BLOCK_M, C, SUM_PAIRS)
                    tl.store(counter, 0)  # for the next call
            else:
                _write(y, acc, top, total, sink, block_row, y_stride, pair // group, pair_channel, real)
        else:
            _write(y, acc, top, total, sink, block_row, y_stride, pair // group, pair_channel, real)

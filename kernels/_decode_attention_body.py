"""The jitted body of decode_attention.

A program reads one item of the split plan, which is a run of a sequence's blocks, for one kv head and all query heads
that share it, so every key and value is read once. It takes BLOCK keys at a time: a piece. Pipelined copies of 16 bytes
a thread bring them, and write zeros for keys beyond the sequence, where memory may hold anything, NaN too. The copy
engine (TMA) cannot write these zeros, and every program would have to make its descriptors before its first load,
though an item may be as short as four blocks.

With a window, only the last few items of a row have keys that its query sees. The programs of the others do nothing,
and the parts of a row are those of the last few.
"""

import triton
import triton.language as tl

from internvl_rt.kernels._kv_numbers import load_scales, numbers_of, scaled_queries, word_rows
from internvl_rt.kernels._softmax import load_sinks, probability, total_with_sink
from internvl_rt.kernels._split_combine import combine_parts

ROWS: tl.constexpr = tl.constexpr(16)  # query heads of a kv head, padded to the 16 rows that matrix units take
CHUNK_BYTES: tl.constexpr = tl.constexpr(4096)  # of a weight that one instruction brings to L2; not measured
# The most that a program without an item brings to L2, so that a few of them do not run longer than those with items.
IDLE_BYTES: tl.constexpr = tl.constexpr(128 * 1024)


@triton.jit
def _attend(q_RC, k, v, inside, top, total, acc, scale_log2, SWAP: tl.constexpr, PRECISION: tl.constexpr):
    """Returns the state of the online softmax after one more piece of keys and values.

    A query has one maximum for all keys but a sum for each place in a piece: one sum would make all warps wait here.
    """
    if SWAP:
        score = tl.where(inside[:, None], tl.dot(k, q_RC.T, input_precision=PRECISION), float("-inf"))
        new_top = tl.maximum(top, tl.max(score, axis=0) * scale_log2)
        shrink, p = tl.exp2(top - new_top), probability(score * scale_log2 - new_top[None, :], v.dtype)
        acc = tl.dot(v.T, p.to(v.dtype), acc * shrink[None, :], input_precision=PRECISION)
        total = total * shrink[None, :] + p
    else:
        score = tl.where(inside[None, :], tl.dot(q_RC, k.T, input_precision=PRECISION), float("-inf"))
        new_top = tl.maximum(top, tl.max(score, axis=1) * scale_log2)
        shrink, p = tl.exp2(top - new_top), probability(score * scale_log2 - new_top[:, None], v.dtype)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        total = total * shrink[:, None] + p
    return new_top, total, acc


@triton.jit
def _attend_numbers(
    q_RC, k, v, scales, inside, top, total, acc, scale_log2, SWAP: tl.constexpr, PRECISION: tl.constexpr
):
    """Returns the state after one more piece of keys and values in 8 bits. `scales` are of `load_scales`.

    The maximum is that of a probability times the power of 2 in its value's scale, so that the largest weight is from 1
    to 2 in float16, whatever the scales are.
    """
    k_scale, v_exponent, v_inverse, v_rest = scales
    if SWAP:
        score = tl.dot(k, q_RC.T, input_precision=PRECISION) * k_scale[:, None]
        score = tl.where(inside[:, None], score * scale_log2[None, :] + v_exponent[:, None], float("-inf"))
        new_top = tl.maximum(top, tl.max(score, axis=0))
        shrink, weight = tl.exp2(top - new_top), tl.exp2(score - new_top[None, :])
        of_values = (weight * v_rest[:, None]).to(v.dtype)
        acc = tl.dot(v.T, of_values, acc * shrink[None, :], input_precision=PRECISION)
        total = total * shrink[None, :] + weight * v_inverse[:, None]
    else:
        score = tl.dot(q_RC, k.T, input_precision=PRECISION) * k_scale[None, :]
        score = tl.where(inside[None, :], score * scale_log2[:, None] + v_exponent[None, :], float("-inf"))
        new_top = tl.maximum(top, tl.max(score, axis=1))
        shrink, weight = tl.exp2(top - new_top), tl.exp2(score - new_top[:, None])
        of_values = (weight * v_rest[None, :]).to(v.dtype)
        acc = tl.dot(of_values, v, acc * shrink[:, None], input_precision=PRECISION)
        total = total * shrink[:, None] + weight * v_inverse[None, :]
    return new_top, total, acc


@triton.jit
def table_blocks(table, start, stop, P: tl.constexpr, BLOCK: tl.constexpr):
    """Loads the block of the piece at `start`, or of each key if BLOCK does not divide P. Reads none from `stop` on."""
    if P % BLOCK == 0:
        blocks = tl.load(table + start // P, mask=start < stop, other=0)
    else:
        key = start + tl.arange(0, BLOCK)
        blocks = tl.load(table + key // P, mask=key < stop, other=0)
    return blocks.to(tl.int64)


@triton.jit
def slot_rows(head_cache, blocks, start, block_stride, slot_stride, P: tl.constexpr, BLOCK: tl.constexpr):
    """Returns pointers to the rows of the piece at `start` in one head's cache; `blocks` is from `table_blocks`."""
    lane = tl.arange(0, BLOCK)
    if P % BLOCK == 0:  # consecutive slots: all threads share everything but `lane * slot_stride`
        return head_cache + blocks * block_stride + start % P * slot_stride + lane * slot_stride
    else:
        return head_cache + blocks * block_stride + (start + lane) % P * slot_stride


@triton.jit
def _prefetch(rows, C: tl.constexpr):
    """Asks the memory to bring these rows of a cache to L2. The rows may be any of the pool's.

    Later stores of other programs land in L2 as well, so the program still reads what they write.
    """
    STEP: tl.constexpr = 512 // rows.dtype.element_ty.primitive_bitwidth  # 64 bytes
    lines = rows[:, None] + tl.arange(0, max(C // STEP, 1))[None, :] * STEP
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [lines.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _prefetch_weight(weight, num_bytes, index, count):
    """Asks the memory to bring the first `num_bytes` of a weight to L2: every count-th chunk, from the index-th on.

    One thread asks for a whole chunk. Sizes and addresses must be multiples of 16 bytes, and CHUNK_BYTES is.
    """
    for at in range(index * CHUNK_BYTES, num_bytes, count * CHUNK_BYTES):
        size = tl.minimum(num_bytes - at, CHUNK_BYTES)
        tl.inline_asm_elementwise(
            """
            {
                .reg .pred first;
                .reg .b32 thread;
                mov.u32 thread, %tid.x;
                setp.eq.u32 first, thread, 0;
                @first cp.async.bulk.prefetch.L2.global [$1], $2;
                mov.b32 $0, 0;
            }
            """,
            "=r,l,r", [weight.to(tl.int64) + at, size], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _kept_splits(split_items, first_split, num_splits, first_block, WINDOW: tl.constexpr, P: tl.constexpr):
    """Returns which of a row's splits hold blocks from `first_block` on: the first one, and how many there are."""
    MOST: tl.constexpr = triton.next_power_of_2((WINDOW + P - 1) // P + 1)
    from_end = tl.arange(0, MOST)
    last = split_items + 3 * (first_split + num_splits - 1)
    ends = tl.load(last - 3 * from_end + 2, mask=from_end < num_splits, other=0)
    num_kept = tl.sum((ends > first_block).to(tl.int32))
    return first_split + num_splits - num_kept, num_kept


@triton.jit
def _combine(y_head, acc_parts, stats_parts, num_splits, sinks, first_head, group, C: tl.constexpr):
    """Writes the output of the `group` queries that share a kv head: the weighted sum of the results of a row's splits.
    A thread has one query and four channels at a time.
    """
    QUERIES: tl.constexpr = min(512 // C, ROWS)
    TOGETHER: tl.constexpr = 20  # 18 parts are those of 3,400 tokens, a picture of 13 tiles
    channel = tl.arange(0, C)
    for first_query in range(0, group, QUERIES):
        query = first_query + tl.arange(0, QUERIES)
        real = query < group
        sink = None
        if sinks is not None:
            sink = load_sinks(sinks, first_head + query, real)
        acc = combine_parts(acc_parts, stats_parts, num_splits, query, real, sink, ROWS, C, SOME=64, TOGETHER=TOGETHER)
        y_rows = y_head + query[:, None] * C + channel[None, :]
        tl.store(y_rows, acc.to(y_head.dtype.element_ty), mask=real[:, None])


# Not specialised: one kernel serves any batch and any model with these channels, and index tensors at any address.
INDICES = ["block_table", "seq_len", "split_start", "split_items", "counters", "table_stride", "group", "num_rows"]
INDICES += ["sinks"]


@triton.jit(do_not_specialize=INDICES)
def decode_attention_kernel(
    q, k_cache, v_cache, y, block_table, seq_len, split_start, split_items, counters, partial_acc, partial_stats,
    next_weight, later_weight, q_stride, block_stride, head_stride, slot_stride, table_stride, group, num_rows,
    next_bytes, later_bytes, scale_log2, scale, scale_block_stride, scale_head_stride, sinks,
    P: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, SWAP: tl.constexpr, PDL: tl.constexpr, EARLY: tl.constexpr,
    PREFETCH_KEYS: tl.constexpr, PRECISION: tl.constexpr, INLINE: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Computes attention for one item of the split plan.

    PREFETCH_KEYS: the item's first keys and values are brought to L2 while the kernel before this one runs. Only the
    newest token's are not written by then, and that cannot make those stale.
    next_weight, later_weight: what the following kernels read first. Programs without an item bring `next_bytes` and
    `later_bytes` of them to L2 before they wait. No step writes a weight.
    EARLY: the kernel after this one may start once all programs of this one have; _gemv_body.py says why it may.
    SWAP: S^T = K q^T and O^T = V^T P^T. Then the tall side of both products is the keys or the channels, and 16 query
    rows are enough for matrix units that work on at least 64 rows (sm_90, sm_100).
    scale: of caches in 8 bits; its strides count words of two scales. INLINE: inline assembly may be used.
    sinks: a logit of each query head, see _softmax.py. WINDOW: how many of the last keys a query sees; None: all.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    item, head = tl.program_id(0), tl.program_id(1)
    query, channel = tl.arange(0, ROWS), tl.arange(0, C)
    real = query[:, None] < group
    offset_RC = (head * group + query)[:, None] * C + channel[None, :]
    y_stride = tl.num_programs(1).to(tl.int64) * group * C
    # A step's plan and tables were written before the previous kernel began, so they are read while it still runs. With
    # EARLY, kernels before it may run too. All of them began after the step's first kernel, embed_tokens, had ended: it
    # is launched in the ordinary way and triggers nothing.
    row = tl.load(split_items + 3 * item)
    first_block = tl.load(split_items + 3 * item + 1)
    end_block = tl.load(split_items + 3 * item + 2)
    # There are at least as many items as rows. Program i also writes the zeros of row i if that row has no split.
    no_split = tl.load(split_start + item, mask=item < num_rows, other=0)
    no_split_end = tl.load(split_start + item + 1, mask=item < num_rows, other=1)
    first_split = tl.load(split_start + row, mask=row >= 0, other=0)
    num_splits = tl.load(split_start + row + 1, mask=row >= 0, other=0) - first_split
    begin, planned_stop = first_block * P, end_block * P
    length = tl.load(seq_len + row, mask=row >= 0, other=0)
    stop = tl.minimum(planned_stop, length)
    has_keys = row >= 0
    if WINDOW is not None:
        first_key = tl.maximum(length - WINDOW, 0)
        has_keys = has_keys & (planned_stop > first_key)
        first_split, num_splits = _kept_splits(split_items, first_split, num_splits, first_key // P, WINDOW, P)
        STEP: tl.constexpr = BLOCK if P % BLOCK == 0 else 1  # so that no piece with one table entry lies in two blocks
        begin = tl.maximum(begin, first_key // STEP * STEP)
    table = block_table + row.to(tl.int64) * table_stride
    blocks = table_blocks(table, begin, planned_stop, P, BLOCK)  # waits for the length only with a window
    k_head = k_cache + head.to(tl.int64) * head_stride
    v_head = v_cache + head.to(tl.int64) * head_stride
    if next_weight is not None:
        num_items = tl.load(split_start + num_rows)
        if row < 0:
            index = (item - num_items) * tl.num_programs(1) + head
            count = (tl.num_programs(0) - num_items) * tl.num_programs(1)
            _prefetch_weight(next_weight, tl.minimum(next_bytes, count * IDLE_BYTES), index, count)
            if later_weight is not None:
                room = count * IDLE_BYTES - next_bytes
                _prefetch_weight(later_weight, tl.minimum(later_bytes, room), index, count)
    if PREFETCH_KEYS:
        second = begin + BLOCK
        if has_keys:
            _prefetch(slot_rows(k_head, blocks, begin, block_stride, slot_stride, P, BLOCK), C)
            _prefetch(slot_rows(v_head, blocks, begin, block_stride, slot_stride, P, BLOCK), C)
        if second < planned_stop:
            later = table_blocks(table, second, planned_stop, P, BLOCK)
            _prefetch(slot_rows(k_head, later, second, block_stride, slot_stride, P, BLOCK), C)
            _prefetch(slot_rows(v_head, later, second, block_stride, slot_stride, P, BLOCK), C)
    if PDL:
        tl.extra.cuda.gdc_wait()
        if not EARLY:
            tl.extra.cuda.gdc_launch_dependents()

    if no_split == no_split_end:
        zeros_RC = tl.zeros([ROWS, C], y.dtype.element_ty)
        tl.store(y + item.to(tl.int64) * y_stride + offset_RC, zeros_RC, mask=real)

    if has_keys:
        q_RC = tl.load(q + row.to(tl.int64) * q_stride + offset_RC, mask=real, other=0.0)
        if sinks is not None:
            sink = load_sinks(sinks, head * group + query, query < group)
        if scale is not None:
            scale_words = scale.to(tl.pointer_type(tl.int32)) + head.to(tl.int64) * scale_head_stride
            q_RC, power = scaled_queries(q_RC)
            row_log2 = scale_log2 * power

        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK, ROWS] if SWAP else [ROWS, BLOCK], tl.float32)
        acc = tl.zeros([C, ROWS] if SWAP else [ROWS, C], tl.float32)
        for start in range(begin, stop, BLOCK):
            inside = start + tl.arange(0, BLOCK) < stop
            if WINDOW is not None:
                inside = inside & (start + tl.arange(0, BLOCK) >= first_key)
            k_rows = slot_rows(k_head, blocks, start, block_stride, slot_stride, P, BLOCK)
            v_rows = slot_rows(v_head, blocks, start, block_stride, slot_stride, P, BLOCK)
            state = top, total, acc
            if scale is not None:
                k = tl.load(word_rows(k_rows, C), mask=inside[:, None], other=0)
                v = tl.load(word_rows(v_rows, C), mask=inside[:, None], other=0)
                k = numbers_of(k, k_cache.dtype.element_ty, q_RC.dtype, C, INLINE)
                v = numbers_of(v, v_cache.dtype.element_ty, q_RC.dtype, C, INLINE)
                scales = load_scales(slot_rows(scale_words, blocks, start, scale_block_stride, 1, P, BLOCK), inside)
                blocks = table_blocks(table, start + BLOCK, stop, P, BLOCK)
                top, total, acc = _attend_numbers(q_RC, k, v, scales, inside, *state, row_log2, SWAP, PRECISION)
            else:
                k = tl.load(k_rows[:, None] + channel[None, :], mask=inside[:, None], other=0.0)
                v = tl.load(v_rows[:, None] + channel[None, :], mask=inside[:, None], other=0.0)
                blocks = table_blocks(table, start + BLOCK, stop, P, BLOCK)  # ahead, so that no copy waits for it
                top, total, acc = _attend(q_RC, k, v, inside, *state, scale_log2, SWAP, PRECISION)

        acc_RC = acc.T if SWAP else acc
        total = tl.sum(total, axis=0 if SWAP else 1)
        y_head = y + row.to(tl.int64) * y_stride + head * group * C
        if num_splits == 1:
            if sinks is not None:
                total = total_with_sink(total, top, sink)
            out_RC = acc_RC * (1.0 / total)[:, None]
            tl.store(y_head + query[:, None] * C + channel[None, :], out_RC.to(y.dtype.element_ty), mask=real)
        else:
            acc_parts = partial_acc + head * tl.num_programs(0) * ROWS * C  # this kv head's, item after item
            stats_parts = partial_stats + head * tl.num_programs(0) * 2 * ROWS
            tl.store(acc_parts + (item * ROWS + query)[:, None] * C + channel[None, :], acc_RC, mask=real)
            tl.store(stats_parts + item * 2 * ROWS + query, top)
            tl.store(stats_parts + item * 2 * ROWS + ROWS + query, total)
            # The barrier puts the partial results of all threads before one thread's atomic. Its release makes them
            # visible to every program that sees the new count. Its acquire and the barrier after it put the reads of
            # the last program to arrive after the writes of all others.
            tl.debug_barrier()
            counter = counters + row * tl.num_programs(1) + head
            if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == num_splits - 1:
                acc_parts += first_split * ROWS * C
                stats_parts += first_split * 2 * ROWS
                _combine(y_head, acc_parts, stats_parts, num_splits, sinks, head * group, group, C)
                # The counter is zero again for the next call; every program of this row has been counted.
                tl.store(counter, 0)

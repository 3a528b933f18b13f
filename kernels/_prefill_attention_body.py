"""The jitted body of prefill_attention.

A block of queries holds (query, head) pairs for one kv head, in which the head changes fastest, so that every key and
value that is read serves all query heads that share it. The softmax is the online one: it keeps a running maximum, a
running sum and a running sum of weighted values.
"""

import triton
import triton.language as tl

from internvl_rt.kernels._decode_attention_body import slot_rows, table_blocks
from internvl_rt.kernels._softmax import probability


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


# Not specialised: one kernel serves any batch and any model with these channels, and index tensors at any address.
INDICES = ["block_table", "query_start", "seq_len", "table_stride", "group", "num_lines"]


@triton.jit(do_not_specialize=INDICES)
def prefill_attention_kernel(
    q, k_cache, v_cache, y, block_table, query_start, seq_len, q_stride, block_stride, head_stride, slot_stride,
    table_stride, group, num_lines, scale_log2,
    P: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes one block of queries. Programs take the last queries first: these see the most keys, and the programs
    that start last should be short. Neighbouring programs share a kv head, whose keys and values stay in the L2 cache.

    All queries of the block see the keys before its first query, so whole blocks of these keys need no mask. The other
    keys are read through a mask, because memory beyond the sequence may hold anything, NaN too.
    """
    head, row = tl.program_id(1), tl.program_id(2)
    first_row = tl.load(query_start + row)
    num_queries = tl.load(query_start + row + 1) - first_row
    length = tl.load(seq_len + row)
    block_stride = tl.cast(block_stride, tl.int64)
    queries = BLOCK_M // group  # queries of a block
    first_query = (tl.cdiv(num_queries, queries) - 1 - tl.program_id(0)) * queries
    if first_query >= 0:
        pair, channel = tl.arange(0, BLOCK_M), tl.arange(0, C)
        query = first_query + pair // group
        real = (pair < queries * group) & (query < num_queries)
        first_position = length - num_queries + first_query
        whole_end = (first_position + 1) // BLOCK_N * BLOCK_N
        end = tl.minimum(first_position + queries, length)
        position = tl.minimum(first_position + pair // group, end - 1)  # a row without a query gets a position as well
        table = block_table + row.to(tl.int64) * table_stride
        k_head = k_cache + head.to(tl.int64) * head_stride
        v_head = v_cache + head.to(tl.int64) * head_stride
        block_row = (first_row + first_query).to(tl.int64)
        pair_channel = ((head * group + pair % group) * C)[:, None] + channel[None, :]
        q_rows = q + block_row * q_stride + (pair // group).to(tl.int64) * q_stride
        q_block = tl.load(q_rows[:, None] + pair_channel, mask=real[:, None], other=0.0)
        if USE_TMA:  # each cache is read as a tensor [B * G * P, C]
            k_lines = tl.make_tensor_descriptor(k_cache, [num_lines, C], [C, 1], [BLOCK_N, C])
            v_lines = tl.make_tensor_descriptor(v_cache, [num_lines, C], [C, 1], [BLOCK_N, C])

        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, C], tl.float32)
        blocks = table_blocks(table, 0, end, P, BLOCK_N)
        for start in range(0, whole_end, BLOCK_N):
            if USE_TMA:
                line = (blocks.to(tl.int32) * tl.num_programs(1) + head) * P + start % P
                k = k_lines.load([line, 0])
                v = v_lines.load([line, 0])
            else:
                k_rows = slot_rows(k_head, blocks, start, block_stride, slot_stride, P, BLOCK_N)
                v_rows = slot_rows(v_head, blocks, start, block_stride, slot_stride, P, BLOCK_N)
                k = tl.load(k_rows[:, None] + channel[None, :])
                v = tl.load(v_rows[:, None] + channel[None, :])
            # The table's entries are loaded one turn ahead, so that no copy waits for the table.
            blocks = table_blocks(table, start + BLOCK_N, end, P, BLOCK_N)
            top, total, acc = _attend(q_block, k, v, None, top, total, acc, scale_log2, PRECISION)
        for start in range(whole_end, end, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            inside = key < end  # beyond `end` memory may not be read; `visible` is narrower
            k_rows = slot_rows(k_head, blocks, start, block_stride, slot_stride, P, BLOCK_N)
            v_rows = slot_rows(v_head, blocks, start, block_stride, slot_stride, P, BLOCK_N)
            k = tl.load(k_rows[:, None] + channel[None, :], mask=inside[:, None], other=0.0)
            v = tl.load(v_rows[:, None] + channel[None, :], mask=inside[:, None], other=0.0)
            blocks = table_blocks(table, start + BLOCK_N, end, P, BLOCK_N)
            visible = key[None, :] <= position[:, None]
            top, total, acc = _attend(q_block, k, v, visible, top, total, acc, scale_log2, PRECISION)
        out = acc * (1.0 / total)[:, None]
        y_stride = tl.num_programs(1) * group * C
        y_block = y + block_row * y_stride + ((pair // group * y_stride)[:, None] + pair_channel)
        tl.store(y_block, out.to(y.dtype.element_ty), mask=real[:, None])

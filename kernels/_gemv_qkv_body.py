"""The jitted body of gemv_qkv: RMSNorm, the product with the weight of q, k and v, rotary embedding and the writes.

The product is that of _gemv_body.py.
"""

import triton
import triton.language as tl

from internvl_rt.kernels._gemv_body import (
    _across_threads,
    _add_partial_sums,
    _leave_partial_sums,
    _load_ahead,
    _load_norm,
    _paired_rows,
    _pairs_of,
    _part_of_k,
    _row_sums,
)
from internvl_rt.kernels._gemv_pipelined import pipelined_sums, prefetch_weight
from internvl_rt.kernels._rope import rotate, sin_cos


@triton.jit
def _store_halves(base, offset, inside, channel, first, second, HALF: tl.constexpr):
    at = base + offset[:, None] + channel[None, :]
    tl.store(at, first.to(base.dtype.element_ty), mask=inside[:, None])
    tl.store(at + HALF, second.to(base.dtype.element_ty), mask=inside[:, None])


# Not specialised: one kernel serves every batch and cache, and index tensors that begin at any address.
@triton.jit(do_not_specialize=["last_row", "k_head", "v_head", "num_slots", "position", "slot"])
def gemv_qkv_kernel(
    x, norm_weight, weight, bias, position, inv_freq, k_cache, v_cache, slot, q, partial, arrived, last_row,
    k_head, v_head, num_slots, K, split_len, eps, x_stride, weight_stride, q_stride, q_head_stride, block_stride,
    group_stride, place_stride, P: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, WARPS: tl.constexpr, MATRIX: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr, PDL: tl.constexpr, PREFETCH: tl.constexpr, EARLY: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """Computes BLOCK_N / 2 channels of the first half of one head, and their partners in the second half.

    The first heads are queries, those from `k_head` on are keys, and those from `v_head` on are values.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    HALF: tl.constexpr = C // 2
    PAIRS: tl.constexpr = BLOCK_N // 2
    head = tl.program_id(0) // (HALF // PAIRS)
    first_channel = tl.program_id(0) % (HALF // PAIRS) * PAIRS
    channel = first_channel + tl.arange(0, PAIRS)
    weight_row = _paired_rows(0, HALF, BLOCK_N)
    weight += (head * C + first_channel).to(tl.int64) * weight_stride
    begin, end = _part_of_k(split_len, K, SPLIT)
    if STAGES:
        if PREFETCH:
            prefetch_weight(weight, weight_row, begin, end, weight_stride, PREFETCH)
    else:
        ws = _load_ahead(weight, weight_row, None, begin, end, K, weight_stride, BLOCK_K, AHEAD)
        n = _load_norm(norm_weight, begin, end, K, ROWS, BLOCK_K)
    if bias is not None:
        bias_first = tl.load(bias + head * C + channel)
        bias_second = tl.load(bias + head * C + HALF + channel)
    if PDL:  # as in gemv_kernel
        tl.extra.cuda.gdc_wait()
        if not EARLY:
            tl.extra.cuda.gdc_launch_dependents()
    if STAGES:
        sums, squares = pipelined_sums(
            x, norm_weight, weight, None, weight_row, last_row, begin, end, K, x_stride, weight_stride, 0, ROWS,
            BLOCK_K, WIDE, PRECISION, None, 1.0,
        )  # fmt: skip
    else:
        sums, squares = _row_sums(
            x, norm_weight, weight, None, weight_row, None, ws, n, last_row, begin, end, K, x_stride, weight_stride, 0,
            ROWS, BLOCK_K, WARPS, MATRIX, WIDE, PRECISION, AHEAD, None, False, 1.0,
        )  # fmt: skip
    row = tl.arange(0, ROWS)
    inside = row <= last_row
    r_slot = tl.load(slot + row, mask=inside, other=-1)
    angle = tl.load(position + row, mask=inside, other=0.0)[:, None] * tl.load(inv_freq + channel)[None, :]
    if not STAGES:
        sums, squares = _across_threads(sums, squares, MATRIX)
    is_last = True
    if SPLIT:
        is_last = _leave_partial_sums(sums, squares, partial, arrived, last_row)
    if is_last:
        if SPLIT:
            sums, squares = _add_partial_sums(partial, arrived, last_row, ROWS, BLOCK_N)
        first, second = _pairs_of(sums * (1.0 / tl.sqrt_rn(squares / K + eps))[:, None])
        if bias is not None:
            first += bias_first.to(tl.float32)[None, :]
            second += bias_second.to(tl.float32)[None, :]
        if head < v_head:  # only queries and keys are rotated
            sin, cos = sin_cos(angle)
            first, second = rotate(first, second, sin, cos)
        has_slot = (r_slot >= 0) & (r_slot < num_slots)
        place = r_slot.to(tl.int64)
        in_cache = place // P * block_stride + place % P * place_stride
        if head < k_head:
            first = tl.where(has_slot[:, None], first, 0.0)
            second = tl.where(has_slot[:, None], second, 0.0)
            in_q = row.to(tl.int64) * q_stride + head.to(tl.int64) * q_head_stride
            _store_halves(q, in_q, inside, channel, first, second, HALF)
        elif head < v_head:
            keys = k_cache + (head - k_head).to(tl.int64) * group_stride
            _store_halves(keys, in_cache, has_slot, channel, first, second, HALF)
        else:
            values = v_cache + (head - v_head).to(tl.int64) * group_stride
            _store_halves(values, in_cache, has_slot, channel, first, second, HALF)

"""The jitted bodies of gemv and gemv_qkv: products of a few rows with a weight that is read once, from device memory.

A program computes the products of BLOCK_N rows of the weight with all rows of x, over all of K or over one split of it.
It takes chunks of BLOCK_K. On matrix units the next chunk is loaded to registers while the present one is multiplied;
with STAGES several chunks are on their way to shared memory (_gemv_pipelined.py). On the CUDA cores the compiler does
without this, which saves registers, so more programs run at once. A program loads its first AHEAD chunks, and whatever
else no other kernel computes, before it waits for the kernel before it (PDL).

EARLY says when the kernel after this one may start: as soon as all programs of this one have (True), or once all have
waited (False). Both are safe. A kernel that may start early reads nothing that a step computes, and writes nothing at
all, the memory that splits share included, before it has waited for its predecessor's end. Every program of it waits,
so it ends only after its predecessor has ended, and so do all kernels of the step before it.

RMSNorm is y = rstd * ((x * w_norm) W^T): the same loop adds up the squares of a row, and the sums are multiplied by
rstd at the end. So x is read once, and a split computes only its own part of the squares.
"""

import triton
import triton.language as tl

from internvl_rt.kernels._gemv_pipelined import pipelined_sums, prefetch_weight, rounded_to_tf32
from internvl_rt.kernels._rope import rotate, sin_cos


@triton.jit
def _pairs_of(sums):
    """Parts sums of rows in the order of `_paired_rows`: those of each pair's first row, those of its second row."""
    return tl.split(tl.reshape(sums, (sums.shape[0], sums.shape[1] // 2, 2)))


@triton.jit
def _paired_rows(first, distance, BLOCK_N: tl.constexpr):
    """Returns the rows in pairs: first, first + distance, first + 1, ...: gate and up rows alternate."""
    place = tl.arange(0, BLOCK_N)
    return (first + place // 2 + place % 2 * distance).to(tl.int64)


@triton.jit
def _load_weight(weight, weight_row, inside, k, end, K, weight_stride, BLOCK_K: tl.constexpr):
    """Loads a chunk of the weight, zero from `end` on; no other program reads it. `inside` None: every row exists."""
    inner = k + tl.arange(0, BLOCK_K)
    at = weight + weight_row[:, None] * weight_stride + inner[None, :]
    mask = (k < end) & (inner < K)[None, :]
    if inside is not None:
        mask &= inside[:, None]
    return tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _load_ahead(
    weight, weight_row, inside, begin, end, K, weight_stride, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr
):  # fmt: skip
    """Loads the first AHEAD chunks of the weight."""
    chunks = ()
    for i in tl.static_range(AHEAD):
        chunk = _load_weight(weight, weight_row, inside, begin + i * BLOCK_K, end, K, weight_stride, BLOCK_K)
        chunks += (chunk,)  # type: ignore[assignment]
    return chunks


@triton.jit
def _load_rows(x, last_row, k, end, K, x_stride, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    inner = k + tl.arange(0, BLOCK_K)
    row = tl.arange(0, ROWS)[:, None]
    at = x + row.to(tl.int64) * x_stride + inner[None, :]
    return tl.load(at, mask=(row <= last_row) & (k < end) & (inner < K)[None, :], other=0.0)


@triton.jit
def _load_norm(norm_weight, k, end, K, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Loads the chunk once for each row of x: L1 does that faster than threads hand the values to each other."""
    return _load_rows(norm_weight, ROWS - 1, k, end, K, 0, ROWS, BLOCK_K)


@triton.jit
def _part_of_k(split_len, K, SPLIT: tl.constexpr):
    """Returns where this program's part of K begins and ends."""
    if SPLIT:
        begin = tl.program_id(1) * split_len
        return begin, tl.minimum(begin + split_len, K)
    else:
        return 0, K


@triton.jit
def _add_chunk(
    w, v, n, sums, squares, WARPS: tl.constexpr, MATRIX: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Adds the products of a chunk to `sums` and, where there is a norm, x's squares to `squares`; see `_row_sums`."""
    ROWS: tl.constexpr = v.shape[0]
    BLOCK_K: tl.constexpr = v.shape[1]
    GROUP: tl.constexpr = 128 // w.dtype.primitive_bitwidth  # elements that one load brings a thread
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    a = v
    if n is not None:
        a = v.to(tl.float32)
        squares += tl.sum(tl.reshape(a * a, (ROWS, GROUPS, GROUP)), axis=2)
        a *= n.to(tl.float32)
    b = w
    if MATRIX:
        if WIDE:
            a = rounded_to_tf32(a)
            b = b.to(tl.float32)
        a = tl.permute(tl.reshape(a.to(b.dtype), (ROWS, WARPS, BLOCK_K // WARPS)), (1, 0, 2))
        b = tl.permute(tl.reshape(b, (b.shape[0], WARPS, BLOCK_K // WARPS)), (1, 2, 0))
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
    else:
        a = tl.reshape(a.to(tl.float32), (ROWS, 1, GROUPS, GROUP))
        b = tl.reshape(b.to(tl.float32), (1, b.shape[0], GROUPS, GROUP))
        sums += tl.sum(a * b, axis=3)
    return sums, squares


@triton.jit
def _row_sums(
    x, norm_weight, weight, weight_row, weight_inside, ws, n, last_row, begin, end, K, x_stride, weight_stride,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, WARPS: tl.constexpr, MATRIX: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Computes (x * w_norm) W^T and x's squares, both yet to be added across threads.

    `ws` are the weight's first AHEAD chunks, `n` is the norm's first one; the others are loaded one chunk ahead.
    With MATRIX each warp takes a part of a chunk's K and all rows, so that no two warps read the same operand.
    Otherwise each thread has 16 bytes of every row of the chunk and keeps its sums in registers.
    """
    BLOCK_N: tl.constexpr = weight_row.shape[0]
    GROUPS: tl.constexpr = BLOCK_K * weight.dtype.element_ty.primitive_bitwidth // 128
    w = ws[0]
    v = _load_rows(x, last_row, begin, end, K, x_stride, ROWS, BLOCK_K)
    sums = tl.zeros((WARPS, ROWS, BLOCK_N) if MATRIX else (ROWS, BLOCK_N, GROUPS), tl.float32)
    squares = tl.zeros((ROWS, GROUPS) if norm_weight is not None else (ROWS, 1), tl.float32)
    for i in tl.static_range(1, AHEAD):
        next_v = _load_rows(x, last_row, begin + i * BLOCK_K, end, K, x_stride, ROWS, BLOCK_K)
        if norm_weight is not None:
            next_n = _load_norm(norm_weight, begin + i * BLOCK_K, end, K, ROWS, BLOCK_K)
        sums, squares = _add_chunk(w, v, n, sums, squares, WARPS, MATRIX, WIDE, PRECISION)
        w = ws[i]
        v = next_v
        if norm_weight is not None:
            n = next_n
    for k in range(begin + (AHEAD - 1) * BLOCK_K, end, BLOCK_K):
        next_w = _load_weight(weight, weight_row, weight_inside, k + BLOCK_K, end, K, weight_stride, BLOCK_K)
        next_v = _load_rows(x, last_row, k + BLOCK_K, end, K, x_stride, ROWS, BLOCK_K)
        if norm_weight is not None:
            next_n = _load_norm(norm_weight, k + BLOCK_K, end, K, ROWS, BLOCK_K)
        sums, squares = _add_chunk(w, v, n, sums, squares, WARPS, MATRIX, WIDE, PRECISION)
        w = next_w
        v = next_v
        if norm_weight is not None:
            n = next_n
    return sums, squares


@triton.jit
def _across_threads(sums, squares, MATRIX: tl.constexpr):
    """Adds across threads what `_row_sums` left in them; returns sums [ROWS, BLOCK_N] and squares [ROWS]."""
    return tl.sum(sums, axis=0 if MATRIX else 2), tl.sum(squares, axis=1)


@triton.jit
def _partial_sums(partial, split, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Returns pointers to where a split of this program's tile stores its sums [ROWS, BLOCK_N] and squares [ROWS]."""
    at = partial + (split * tl.num_programs(0) + tl.program_id(0)) * (ROWS * (BLOCK_N + 1))
    row = tl.arange(0, ROWS)
    return at + row[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :], at + ROWS * BLOCK_N + row


@triton.jit
def _leave_partial_sums(sums, squares, partial, arrived, last_row):
    """Stores this split's sums and squares in `partial`. Returns whether it is the last split of its tile to do so."""
    sums_at, squares_at = _partial_sums(partial, tl.program_id(1), sums.shape[0], sums.shape[1])
    inside = tl.arange(0, sums.shape[0]) <= last_row
    tl.store(sums_at, sums, mask=inside[:, None])
    tl.store(squares_at, squares, mask=inside)
    # The barrier puts the stores of all threads before one thread's atomic. Its release makes them visible to every
    # program that sees the new count; its acquire puts the reads of the last program after all other programs' stores.
    tl.debug_barrier()
    return tl.atomic_add(arrived + tl.program_id(0), 1, sem="acq_rel", scope="gpu") == tl.num_programs(1) - 1


@triton.jit
def _add_partial_sums(partial, arrived, last_row, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Adds the parts in the splits' order, so that the bits do not depend on who is last. Loads four at a time."""
    sums = tl.zeros((ROWS, BLOCK_N), tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    splits = tl.num_programs(1)
    row_inside = tl.arange(0, ROWS) <= last_row
    for first in range(0, splits, 4):
        for index in tl.static_range(4):
            sums_at, squares_at = _partial_sums(partial, first + index, ROWS, BLOCK_N)
            inside = row_inside & (first + index < splits)
            # Read from L2, because other multiprocessors wrote these values.
            sums += tl.load(sums_at, mask=inside[:, None], other=0.0, cache_modifier=".cg")
            squares += tl.load(squares_at, mask=inside, other=0.0, cache_modifier=".cg")
    tl.store(arrived + tl.program_id(0), 0)  # the counter is zero again for the next call; every split has been counted
    return sums, squares


@triton.jit(do_not_specialize=["last_row"])  # one kernel for every batch
def gemv_kernel(
    x, norm_weight, weight, bias, residual, out, partial, arrived, last_row, N, K, split_len, eps,
    x_stride, weight_stride, residual_stride, out_stride, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, WARPS: tl.constexpr, MATRIX: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr, SWIGLU: tl.constexpr, PDL: tl.constexpr, PREFETCH: tl.constexpr,
    EARLY: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Computes N outputs a row. With SWIGLU each output comes from two rows of the weight, which lie N rows apart."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    WIDTH: tl.constexpr = BLOCK_N // 2 if SWIGLU else BLOCK_N
    tile = tl.program_id(0)
    column = tile * WIDTH + tl.arange(0, WIDTH)
    if SWIGLU:
        weight_row = _paired_rows(tile * WIDTH, N, BLOCK_N)
        weight_inside = tile * WIDTH + tl.arange(0, BLOCK_N) // 2 < N
    else:
        weight_row = column.to(tl.int64)
        weight_inside = column < N
    begin, end = _part_of_k(split_len, K, SPLIT)
    if STAGES:
        weight_row = tl.where(weight_inside, weight_row, 0)  # the sums of rows that do not exist are not stored
        if PREFETCH:
            prefetch_weight(weight, weight_row, begin, end, weight_stride, PREFETCH)
    else:
        ws = _load_ahead(weight, weight_row, weight_inside, begin, end, K, weight_stride, BLOCK_K, AHEAD)
        n = None
        if norm_weight is not None:
            n = _load_norm(norm_weight, begin, end, K, ROWS, BLOCK_K)
    if bias is not None:
        bias_N = tl.load(bias + column, mask=column < N, other=0.0)
        if SWIGLU:
            bias_up = tl.load(bias + N + column, mask=column < N, other=0.0)
    if PDL:  # only the wait makes other kernels' writes visible
        tl.extra.cuda.gdc_wait()
        if not EARLY:
            tl.extra.cuda.gdc_launch_dependents()
    if STAGES:
        sums, squares = pipelined_sums(
            x, norm_weight, weight, weight_row, last_row, begin, end, K, x_stride, weight_stride, ROWS, BLOCK_K,
            WIDE, PRECISION,
        )  # fmt: skip
    else:
        sums, squares = _row_sums(
            x, norm_weight, weight, weight_row, weight_inside, ws, n, last_row, begin, end, K, x_stride, weight_stride,
            ROWS, BLOCK_K, WARPS, MATRIX, WIDE, PRECISION, AHEAD,
        )  # fmt: skip
    row = tl.arange(0, ROWS)[:, None].to(tl.int64)
    inside = (row <= last_row) & (column < N)[None, :]
    if residual is not None:  # loaded while threads add their sums; during the loop it would take registers
        r = tl.load(residual + row * residual_stride + column[None, :], mask=inside, other=0.0)
    if not STAGES:
        sums, squares = _across_threads(sums, squares, MATRIX)
    is_last = True
    if SPLIT:
        is_last = _leave_partial_sums(sums, squares, partial, arrived, last_row)
    if is_last:
        if SPLIT:
            sums, squares = _add_partial_sums(partial, arrived, last_row, ROWS, BLOCK_N)
        if norm_weight is not None:
            sums *= (1.0 / tl.sqrt_rn(squares / K + eps))[:, None]
        if SWIGLU:
            gate, up = _pairs_of(sums)
            if bias is not None:
                gate += bias_N.to(tl.float32)[None, :]
                up += bias_up.to(tl.float32)[None, :]
            y = gate / (1.0 + tl.exp(-gate)) * up
        else:
            y = sums
            if bias is not None:
                y += bias_N.to(tl.float32)[None, :]
        if residual is not None:
            y += r.to(tl.float32)
        tl.store(out + row * out_stride + column[None, :], y.to(out.dtype.element_ty), mask=inside)


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
            x, norm_weight, weight, weight_row, last_row, begin, end, K, x_stride, weight_stride, ROWS, BLOCK_K,
            WIDE, PRECISION,
        )  # fmt: skip
    else:
        sums, squares = _row_sums(
            x, norm_weight, weight, weight_row, None, ws, n, last_row, begin, end, K, x_stride, weight_stride,
            ROWS, BLOCK_K, WARPS, MATRIX, WIDE, PRECISION, AHEAD,
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

"""The jitted body of gemv and gemv_8bit, and the parts that gemv_qkv and gemv_4bit share with it.

Products of a few rows with a weight that is read once, from device memory.

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

KIND, ASM, LIFT and LOWER say what 8-bit numbers become (_numbers_8bit.py); KIND None: the weight is dense. BLOCKS: a
row has a scale for every 128 columns, which multiplies their sums, and not one scale, which multiplies the whole sum.
"""

import triton
import triton.language as tl

from internvl_rt.kernels._gemv_pipelined import pipelined_sums, prefetch_weight, rounded_to_tf32
from internvl_rt.kernels._numbers_8bit import lifted, operand_of, operands_of_words


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
def _load_weight(weight, weight_row, inside, k, end, K, weight_stride, BLOCK_K: tl.constexpr, WORD: tl.constexpr):
    """Loads a chunk of the weight, zero from `end` on; no other program reads it. `inside` None: every row exists.

    WORD: how many columns lie in an element of it, 4 with words of 8-bit numbers.
    """
    inner = k // WORD + tl.arange(0, BLOCK_K // WORD)
    at = weight + weight_row[:, None] * weight_stride + inner[None, :]
    mask = (k < end) & (inner < K // WORD)[None, :]
    if inside is not None:
        mask &= inside[:, None]
    return tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _load_ahead(
    weight, weight_row, inside, begin, end, K, weight_stride, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr,
    WORD: tl.constexpr = 1,
):  # fmt: skip
    """Loads the first AHEAD chunks of the weight."""
    chunks = ()
    for i in tl.static_range(AHEAD):
        chunk = _load_weight(weight, weight_row, inside, begin + i * BLOCK_K, end, K, weight_stride, BLOCK_K, WORD)
        chunks += (chunk,)  # type: ignore[assignment]
    return chunks


@triton.jit
def _load_rows(
    x, last_row, k, end, K, x_stride, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr = 1
):  # fmt: skip
    """Loads a chunk of x [ROWS, BLOCK_K].

    With PIECES it is [ROWS, PIECES, BLOCK_K / PIECES], for a weight of which a load brings a thread 16 columns: the
    thread gets the same columns of x, and a piece has what one load brings of them.
    """
    if PIECES == 1:
        inner = k + tl.arange(0, BLOCK_K)
        row = tl.arange(0, ROWS)[:, None]
        at = x + row.to(tl.int64) * x_stride + inner[None, :]
        return tl.load(at, mask=(row <= last_row) & (k < end) & (inner < K)[None, :], other=0.0)
    else:
        WIDTH: tl.constexpr = 16 // PIECES
        place = tl.arange(0, BLOCK_K // PIECES)
        inner = k + (WIDTH * tl.arange(0, PIECES))[:, None] + (place // WIDTH * 16 + place % WIDTH)[None, :]
        row = tl.arange(0, ROWS)[:, None, None]
        at = x + row.to(tl.int64) * x_stride + inner[None, :, :]
        return tl.load(at, mask=(row <= last_row) & (k < end) & (inner < K)[None, :, :], other=0.0)


@triton.jit
def _load_norm(norm_weight, k, end, K, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr = 1):
    """Loads the chunk once for each row of x: L1 does that faster than threads hand the values to each other."""
    return _load_rows(norm_weight, ROWS - 1, k, end, K, 0, ROWS, BLOCK_K, PIECES)


@triton.jit
def _load_scales(
    scale, weight_row, inside, k, end, K, scale_stride, BLOCK_K: tl.constexpr, WARPS: tl.constexpr, MATRIX: tl.constexpr
):  # fmt: skip
    """Loads the scales of the parts of a chunk that `_add_chunk` adds up: of every warp, or of every 16 columns."""
    if MATRIX:
        inner = k + BLOCK_K // WARPS * tl.arange(0, WARPS)[:, None, None]
        at = scale + weight_row[None, None, :] * scale_stride + inner // 128
        return tl.load(at, mask=inside[None, None, :] & (inner < tl.minimum(end, K)), other=0.0)
    else:
        inner = k + 16 * tl.arange(0, BLOCK_K // 16)[None, None, :]
        at = scale + weight_row[None, :, None] * scale_stride + inner // 128
        return tl.load(at, mask=inside[None, :, None] & (inner < tl.minimum(end, K)), other=0.0)


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
    w, v, n, s, sums, squares, WARPS: tl.constexpr, MATRIX: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    KIND: tl.constexpr, ASM: tl.constexpr, LIFT: tl.constexpr, WORD: tl.constexpr,
):  # fmt: skip
    """Adds the products of a chunk to `sums` and, where there is a norm, x's squares to `squares`; see `_row_sums`."""
    ROWS: tl.constexpr = v.shape[0]
    BLOCK_K: tl.constexpr = w.shape[1] * WORD
    GROUP: tl.constexpr = 128 // v.dtype.primitive_bitwidth  # elements that one load brings a thread
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    a = v
    if n is not None:
        a = v.to(tl.float32)
        squares += tl.sum(tl.reshape(a * a, (ROWS, GROUPS, GROUP)), axis=2)
        a *= n.to(tl.float32)
    b = w
    if KIND is not None:
        TYPE: tl.constexpr = v.dtype if MATRIX and not WIDE else tl.float32
        b = operand_of(w, KIND, TYPE) if WORD == 1 else operands_of_words(w, KIND, ASM, TYPE)
        if not MATRIX:
            a = a.to(tl.float32)
        a = lifted(a, LIFT)
    if MATRIX:
        if WIDE:
            a = rounded_to_tf32(a)
            b = b.to(tl.float32)
        a = tl.permute(tl.reshape(a.to(b.dtype), (ROWS, WARPS, BLOCK_K // WARPS)), (1, 0, 2))
        b = tl.permute(tl.reshape(b, (b.shape[0], WARPS, BLOCK_K // WARPS)), (1, 2, 0))
        if s is not None:
            sums += tl.dot(a, b, input_precision=PRECISION) * s
        else:
            sums = tl.dot(a, b, sums, input_precision=PRECISION)
    elif KIND is not None:
        PIECES: tl.constexpr = 16 // GROUP
        a = tl.reshape(a, (ROWS, 1, PIECES, BLOCK_K // 16, GROUP))
        b = tl.permute(tl.reshape(b, (1, b.shape[0], BLOCK_K // 16, PIECES, GROUP)), (0, 1, 3, 2, 4))
        products = tl.sum(tl.sum(a * b, axis=4), axis=2)
        sums += products if s is None else products * s
    else:
        a = tl.reshape(a.to(tl.float32), (ROWS, 1, GROUPS, GROUP))
        b = tl.reshape(b.to(tl.float32), (1, b.shape[0], GROUPS, GROUP))
        sums += tl.sum(a * b, axis=3)
    return sums, squares


@triton.jit
def _row_sums(
    x, norm_weight, weight, scale, weight_row, weight_inside, ws, n, last_row, begin, end, K, x_stride, weight_stride,
    scale_stride, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, WARPS: tl.constexpr, MATRIX: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, AHEAD: tl.constexpr, KIND: tl.constexpr, ASM: tl.constexpr,
    LIFT: tl.constexpr, WORD: tl.constexpr = 1,
):  # fmt: skip
    """Computes (x * w_norm) W^T and x's squares, both yet to be added across threads.

    `ws` are the weight's first AHEAD chunks, `n` is the norm's first one; the others are loaded one chunk ahead.
    With MATRIX each warp takes a part of a chunk's K and all rows, so that no two warps read the same operand.
    Otherwise each thread has 16 bytes of every row of the chunk and keeps its sums in registers.
    `scale`: of every 128 columns, or None.
    """
    BLOCK_N: tl.constexpr = weight_row.shape[0]
    GROUPS: tl.constexpr = BLOCK_K * weight.dtype.element_ty.primitive_bitwidth // WORD // 128
    NORM_GROUPS: tl.constexpr = BLOCK_K * x.dtype.element_ty.primitive_bitwidth // 128
    PIECES: tl.constexpr = 1 if MATRIX or KIND is None else NORM_GROUPS // GROUPS
    w = ws[0]
    v = _load_rows(x, last_row, begin, end, K, x_stride, ROWS, BLOCK_K, PIECES)
    sums = tl.zeros((WARPS, ROWS, BLOCK_N) if MATRIX else (ROWS, BLOCK_N, GROUPS), tl.float32)
    squares = tl.zeros((ROWS, NORM_GROUPS) if norm_weight is not None else (ROWS, 1), tl.float32)
    for i in tl.static_range(1, AHEAD):
        next_v = _load_rows(x, last_row, begin + i * BLOCK_K, end, K, x_stride, ROWS, BLOCK_K, PIECES)
        if norm_weight is not None:
            next_n = _load_norm(norm_weight, begin + i * BLOCK_K, end, K, ROWS, BLOCK_K, PIECES)
        at = begin + (i - 1) * BLOCK_K
        s = None
        if scale is not None:
            s = _load_scales(scale, weight_row, weight_inside, at, end, K, scale_stride, BLOCK_K, WARPS, MATRIX)
        sums, squares = _add_chunk(w, v, n, s, sums, squares, WARPS, MATRIX, WIDE, PRECISION, KIND, ASM, LIFT, WORD)
        w = ws[i]
        v = next_v
        if norm_weight is not None:
            n = next_n
    for k in range(begin + (AHEAD - 1) * BLOCK_K, end, BLOCK_K):
        next_w = _load_weight(weight, weight_row, weight_inside, k + BLOCK_K, end, K, weight_stride, BLOCK_K, WORD)
        next_v = _load_rows(x, last_row, k + BLOCK_K, end, K, x_stride, ROWS, BLOCK_K, PIECES)
        if norm_weight is not None:
            next_n = _load_norm(norm_weight, k + BLOCK_K, end, K, ROWS, BLOCK_K, PIECES)
        s_k = None
        if scale is not None:
            s_k = _load_scales(scale, weight_row, weight_inside, k, end, K, scale_stride, BLOCK_K, WARPS, MATRIX)
        sums, squares = _add_chunk(w, v, n, s_k, sums, squares, WARPS, MATRIX, WIDE, PRECISION, KIND, ASM, LIFT, WORD)
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


@triton.jit
def _store_outputs(
    out, sums, squares, norm_weight, bias_N, bias_up, r, row, column, inside, K, eps, out_stride, SWIGLU: tl.constexpr
):  # fmt: skip
    """Makes outputs of complete sums and stores them: the norm's rstd, the bias, SwiGLU, and the residual `r`."""
    if norm_weight is not None:
        sums *= (1.0 / tl.sqrt_rn(squares / K + eps))[:, None]
    if SWIGLU:
        gate, up = _pairs_of(sums)
        if bias_N is not None:
            gate += bias_N.to(tl.float32)[None, :]
            up += bias_up.to(tl.float32)[None, :]
        y = gate / (1.0 + tl.exp(-gate)) * up
    else:
        y = sums
        if bias_N is not None:
            y += bias_N.to(tl.float32)[None, :]
    if r is not None:
        y += r.to(tl.float32)
    tl.store(out + row * out_stride + column[None, :], y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["last_row"])  # one kernel for every batch
def gemv_kernel(
    x, norm_weight, weight, scale, bias, residual, out, partial, arrived, last_row, N, K, split_len, eps,
    x_stride, weight_stride, scale_stride, residual_stride, out_stride, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, WARPS: tl.constexpr, MATRIX: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr, SWIGLU: tl.constexpr, PDL: tl.constexpr, PREFETCH: tl.constexpr,
    EARLY: tl.constexpr, AHEAD: tl.constexpr, KIND: tl.constexpr, ASM: tl.constexpr,
    BLOCKS: tl.constexpr, LIFT: tl.constexpr, LOWER: tl.constexpr, WORD: tl.constexpr,
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
        ws = _load_ahead(weight, weight_row, weight_inside, begin, end, K, weight_stride, BLOCK_K, AHEAD, WORD)
        n = None
        if norm_weight is not None:
            WIDTH_8: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth
            PIECES: tl.constexpr = 1 if MATRIX or KIND is None else 16 // WIDTH_8
            n = _load_norm(norm_weight, begin, end, K, ROWS, BLOCK_K, PIECES)
    bias_N = None
    bias_up = None
    if bias is not None:
        bias_N = tl.load(bias + column, mask=column < N, other=0.0)
        if SWIGLU:
            bias_up = tl.load(bias + N + column, mask=column < N, other=0.0)
    if KIND is not None and not BLOCKS:
        row_scale = tl.load(scale + weight_row * scale_stride, mask=weight_inside, other=0.0)
    block_scale = scale if BLOCKS else None
    if PDL:  # only the wait makes other kernels' writes visible
        tl.extra.cuda.gdc_wait()
        if not EARLY:
            tl.extra.cuda.gdc_launch_dependents()
    if STAGES:
        sums, squares = pipelined_sums(
            x, norm_weight, weight, block_scale, weight_row, last_row, begin, end, K, x_stride, weight_stride,
            scale_stride, ROWS, BLOCK_K, WIDE, PRECISION, KIND, LIFT,
        )  # fmt: skip
    else:
        sums, squares = _row_sums(
            x, norm_weight, weight, block_scale, weight_row, weight_inside, ws, n, last_row, begin, end, K, x_stride,
            weight_stride, scale_stride, ROWS, BLOCK_K, WARPS, MATRIX, WIDE, PRECISION, AHEAD, KIND, ASM, LIFT,
            WORD,
        )  # fmt: skip
    row = tl.arange(0, ROWS)[:, None].to(tl.int64)
    inside = (row <= last_row) & (column < N)[None, :]
    r = None
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
        if KIND is not None:
            if not BLOCKS:
                sums *= row_scale[None, :]
            sums *= LOWER
        _store_outputs(
            out, sums, squares, norm_weight, bias_N, bias_up, r, row, column, inside, K, eps, out_stride, SWIGLU
        )  # fmt: skip

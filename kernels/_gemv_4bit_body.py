"""The jitted body of gemv_4bit: products of a few rows with a weight of 4-bit numbers in words (`_int4.py`).

A program computes BLOCK_N rows of the weight, over all of K or one split of it, in chunks of BLOCK_K; the words and
scales of the next chunk are on their way while the present one is multiplied. What comes before and behind the product
is as in _gemv_body.py, which says how splits, the wait for the kernel before (PDL) and the norm work.

No number is converted: its 4 bits become the last bits of a floating-point number, which is then 128 + n (1024 + n in
float16). One or two rows of x are multiplied on the CUDA cores, in float32, with these sums themselves, and the offset
is taken off once a group of columns: scale * (sum of x (128 + n) - (128 + zero) * sum of x). On matrix units it is
taken off two numbers at a time, which is exact, and the products of a group are scaled in float32.

With MATRIX each warp has a chunk of 128 columns of its own, and a thread loads the words and the columns of x that it
also feeds to the matrix units. For that the shapes of the loaded tensors say where the threads are: 4 times 4 words (or
columns) along the last dimension, 8 rows along one of the others, the warps along the second. Loads that are arranged
otherwise are right, too, but what they bring passes through shared memory.
"""

import triton
import triton.language as tl

from internvl_rt.kernels._gemv_body import (
    _add_partial_sums,
    _leave_partial_sums,
    _paired_rows,
    _part_of_k,
    _store_outputs,
)
from internvl_rt.kernels._gemv_pipelined import rounded_to_tf32

# Among dimensions without contiguous elements Triton gives threads to the last one first; before 3.7 to the first one.
FIRST = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7))


@triton.constexpr_function
def _asm_of_offset_plane(i):
    """Writes PTX for one number: the compiler makes two operations of the last one, as it has two constants."""
    shift = f"shl.b32 n, $1, {16 - 4 * i}" if i < 4 else f"shr.b32 n, $1, {4 * i - 16}"
    return f"{{ .reg .b32 n; {shift}; lop3.b32 $0, n, 0xF0000, 0x43000000, 0xEA; }}"


@triton.jit
def _offset_plane(words, i: tl.constexpr, ASM: tl.constexpr):
    """Returns 128 + n in float32 for nibble i of each word: a shift and a bitwise operation of three operands."""
    if ASM:
        bits = tl.inline_asm_elementwise(_asm_of_offset_plane(i), "=r,r", [words], tl.int32, True, 1)
    else:
        bits = (words << (16 - 4 * i) if i < 4 else words >> (4 * i - 16)) & 0xF0000 | 0x43000000
    return bits.to(tl.float32, bitcast=True)


@triton.constexpr_function
def _asm_of_plane(i, half, has_zero):
    """Writes PTX for two numbers, from the low and the high halves ($1, $2) of two words, and minus 128 + zero ($3)."""
    magic, one, eight = (
        ("0x64006400", "0x3C003C00", "0xE408E408") if half else ("0x43004300", "0x3F803F80", "0xC308C308")
    )
    operand = "$1" if i < 4 else "$2"
    shift = f"shr.b32 n, {operand}, {i % 4 * 4}; " if i % 4 else f"mov.b32 n, {operand}; "
    offset = "$3" if has_zero else "offset"
    return (
        f"{{ .reg .b32 n, one, offset; mov.b32 one, {one}; mov.b32 offset, {eight}; {shift}"
        f"lop3.b32 n, n, 0x000F000F, {magic}, 0xEA; fma.rn.{'f16x2' if half else 'bf16x2'} $0, n, one, {offset}; }}"
    )


@triton.jit
def _halves_of_pairs(words):
    """Turns each two neighbouring words into their low halves and their high halves."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $2, $3, 0x5410; prmt.b32 $1, $2, $3, 0x7632;", "=&r,=r,r,r", [words], tl.int32, True, 2
    )


@triton.jit
def _plane(words, zero, x, i: tl.constexpr, WIDE: tl.constexpr, ASM: tl.constexpr, PACKED: tl.constexpr):
    """Returns the numbers minus their zero (8 if it is None) in nibble i; exact. PACKED: of `_halves_of_pairs`."""
    if PACKED:
        HALF: tl.constexpr = x.dtype.element_ty == tl.float16
        if zero is not None:
            negative = (zero.to(tl.int32) * 0x10001) | (-0x1BFF1C00 if HALF else -0x3CFF3D00)  # -(128 + zero), twice
            return tl.inline_asm_elementwise(
                _asm_of_plane(i, HALF, True), "=r,r,r,r,r", [words, negative], x.dtype.element_ty, True, 2
            )
        else:
            return tl.inline_asm_elementwise(
                _asm_of_plane(i, HALF, False), "=r,r,r", [words], x.dtype.element_ty, True, 2
            )
    else:
        offset = 136.0
        if zero is not None:
            offset = 128.0 + zero.to(tl.float32)
        return (_offset_plane(words, i, ASM) - offset).to(tl.float32 if WIDE else x.dtype.element_ty)


@triton.jit
def _repeated(y, WIDTH: tl.constexpr):
    """Widens the last dimension from 4 to 8 or 16: each of four threads has its value for all of its columns."""
    y = tl.reshape(y, (y.shape[0], y.shape[1], y.shape[2], 4, 1))
    y = tl.broadcast_to(y, (y.shape[0], y.shape[1], y.shape[2], 4, WIDTH // 4))
    return tl.reshape(y, (y.shape[0], y.shape[1], y.shape[2], WIDTH))


@triton.jit
def _rows_of_warps(y):
    """Turns [8 n] to [n, 1, 8, 1], or to [8, 1, n, 1] with FIRST, in which threads get the 8."""
    y = tl.reshape(y, (y.shape[0] // 8, 8))
    if FIRST:
        y = tl.trans(y)
    return y[:, None, :, None]


@triton.jit
def _as_operand(y):
    """Turns [BLOCK_N / 8, WARPS, 8, 16] to [WARPS, BLOCK_N, 16] without a move: a thread's four columns become those
    that it has in an operand of the matrix units, 2 t, 2 t + 1, 2 t + 8 and 2 t + 9. x's columns change their places
    in the same way, so the products are the same. Of 8 columns a thread has 2 t and 2 t + 1.
    """
    ROWS: tl.constexpr = y.shape[0] * y.shape[2]
    y = tl.reshape(y, (y.shape[0], y.shape[1], y.shape[2], 4, y.shape[3] // 8, 2))
    y = tl.permute(y, (1, 2, 0, 4, 3, 5)) if FIRST else tl.permute(y, (1, 0, 2, 4, 3, 5))
    return tl.reshape(y, (y.shape[0], ROWS, y.shape[3] * 8))


@triton.jit
def _places(weight_row, weight_stride, G, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, MATRIX: tl.constexpr):
    """Returns where a thread's words and groups are in a chunk's, from the first row and column on, and their columns.

    Each of the four threads that have a row of a chunk loads its scales. Without the hint that nothing of them is
    contiguous it would load others' too.
    """
    if MATRIX:
        row = _rows_of_warps(weight_row)
        chunk = tl.arange(0, BLOCK_K // 128)[None, :, None, None]
        word_at = row * weight_stride + (chunk * 16 + tl.arange(0, 16))
        group = chunk * (128 // GROUP) + tl.zeros((4,), tl.int32)
        return word_at, tl.max_contiguous(row * G + group, [1, 1, 1, 1]), chunk * 128, chunk * 128
    else:
        row = weight_row[:, None]
        word = tl.arange(0, BLOCK_K // 8)[None, :]
        chunk = tl.arange(0, BLOCK_K // 32)[None, :] // 4
        group_at = tl.max_contiguous(row * G + chunk * (128 // GROUP), [1, 1])
        return row * weight_stride + word, group_at, word // 16 * 128, chunk * 128


@triton.jit
def _in_threads(y):
    """Brings the last dimension, the one that threads shall get first, to where they do."""
    if FIRST:
        y = tl.permute(y, (3, 0, 1, 2)) if len(y.shape) == 4 else tl.trans(y)
    return y


@triton.jit
def _load_groups(base, group_at, inside, column, end, GROUP: tl.constexpr):
    """Loads scales or zeros of the groups of each chunk."""
    loaded = ()
    at = _in_threads(group_at)
    for g in tl.static_range(128 // GROUP):
        mask = tl.broadcast_to(inside & (column + g * GROUP < end), group_at.shape)
        y = tl.load(base + g + at, mask=_in_threads(mask), other=0)
        if FIRST:
            y = tl.permute(y, (1, 2, 3, 0)) if len(y.shape) == 4 else tl.trans(y)
        loaded += (y,)  # type: ignore[assignment]
    return loaded


@triton.jit
def _load_chunk(
    weight, scale, zero, word_at, group_at, inside, word_column, group_column, k, end, GROUP: tl.constexpr
):  # fmt: skip
    """Loads a chunk of the words, its scales and its zeros, all 0 from `end` on; no other program reads them."""
    at = weight + tl.multiple_of(k // 8, 16) + word_at
    words = tl.load(at, mask=inside & (word_column < end - k), other=0, eviction_policy="evict_first")
    scales = _load_groups(scale + k // GROUP, group_at, inside, group_column, end - k, GROUP)
    zeros = scales  # not read where there are none
    if zero is not None:
        zeros = _load_groups(zero + k // GROUP, group_at, inside, group_column, end - k, GROUP)
    return words, scales, zeros


@triton.jit
def _plane_places(x, x_stride, ROWS: tl.constexpr, CHUNKS: tl.constexpr, MATRIX: tl.constexpr):
    """Returns pointers to the 16 columns of each chunk that belong to nibble 0 of its words, and the pointers' rows and
    columns. With a stride of 0 they are of the norm's weight, which is loaded once for each row of threads.
    """
    if MATRIX:
        row = _rows_of_warps(tl.arange(0, ROWS))
        column = 128 * tl.arange(0, CHUNKS)[None, :, None, None] + tl.arange(0, 16)
        at = tl.max_contiguous(row.to(tl.int64) * x_stride + column, [1, 1, 1, 4])  # as many as of the words
    else:
        row = tl.arange(0, ROWS)[:, None]
        word = tl.arange(0, 16 * CHUNKS)[None, :]
        column = word // 16 * 128 + word % 16
        at = tl.max_contiguous(row.to(tl.int64) * x_stride + column, [1, 4])
    return x + at, row, column


@triton.jit
def _sum_of_fours(y):
    """Adds each four neighbours in the last dimension; a thread has them."""
    if len(y.shape) == 4:
        return tl.sum(tl.reshape(y, (y.shape[0], y.shape[1], y.shape[2], y.shape[3] // 4, 4)), axis=4)
    elif len(y.shape) == 3:
        return tl.sum(tl.reshape(y, (y.shape[0], y.shape[1], y.shape[2] // 4, 4)), axis=3)
    else:
        return tl.sum(tl.reshape(y, (y.shape[0], y.shape[1] // 4, 4)), axis=2)


@triton.jit
def _add_rows(
    x_at, n_at, inside, column, zero, words, scales, zeros, sums, squares, k, end, ROWS: tl.constexpr,
    GROUP: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Adds the products of a chunk on the CUDA cores to `sums` [ROWS, BLOCK_N, BLOCK_K / 32]."""
    BLOCK_N: tl.constexpr = words.shape[0]
    WORDS: tl.constexpr = words.shape[1]
    PLANES: tl.constexpr = GROUP // 16
    x_at += k
    if n_at is not None:
        n_at += k
    for g in tl.static_range(128 // GROUP):
        for i in tl.static_range(g * PLANES, (g + 1) * PLANES):
            a = tl.load(x_at + 16 * i, mask=inside & (column < end - k - 16 * i), other=0.0).to(tl.float32)
            if n_at is not None:
                n = tl.load(n_at + 16 * i, mask=column < end - k - 16 * i, other=0.0)
                squares += a * a
                a *= n.to(tl.float32)
            b = tl.reshape(_offset_plane(words, i, ASM), (1, BLOCK_N, WORDS))
            product = tl.reshape(a, (ROWS, 1, WORDS)) * b
            if i == g * PLANES:
                products = product
                total = a
            else:
                products += product
                total += a
        offset = 136.0
        if zero is not None:
            offset = 128.0 + tl.reshape(zeros[g], (1, BLOCK_N, WORDS // 4)).to(tl.float32)
        total = tl.reshape(_sum_of_fours(total), (ROWS, 1, WORDS // 4))
        s = tl.reshape(scales[g], (1, BLOCK_N, WORDS // 4)).to(tl.float32)
        sums += s * (_sum_of_fours(products) - offset * total)
    return sums, squares


@triton.jit
def _add_matrix(
    x_at, n_at, inside, column, zero, words, scales, zeros, sums, squares, k, end, GROUP: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Adds the products of a chunk on matrix units to `sums` [WARPS, BLOCK_N, ROWS]."""
    PLANES: tl.constexpr = GROUP // 16
    x_at += k
    if n_at is not None:
        n_at += k
    PACKED: tl.constexpr = ASM and not WIDE and x_at.dtype.element_ty.primitive_bitwidth == 16
    if PACKED:
        words = _halves_of_pairs(words)
    for g in tl.static_range(128 // GROUP):
        z = None
        if zero is not None:
            z = _repeated(zeros[g], 16)
        products = tl.zeros_like(sums)
        for i in tl.static_range(g * PLANES, (g + 1) * PLANES):
            a = tl.load(x_at + 16 * i, mask=inside & (column < end - k - 16 * i), other=0.0)
            if n_at is not None:
                n = tl.load(n_at + 16 * i, mask=column < end - k - 16 * i, other=0.0)
                a = a.to(tl.float32)
                squares += _sum_of_fours(a * a)
                a *= n.to(tl.float32)
            if WIDE:
                a = rounded_to_tf32(a)
            b = _as_operand(_plane(words, z, x_at, i, WIDE, ASM, PACKED))
            a = tl.permute(_as_operand(a.to(b.dtype)), (0, 2, 1))
            products = tl.dot(b, a, products, input_precision=PRECISION)
        sums += _as_operand(_repeated(scales[g].to(tl.float32), sums.shape[2])) * products
    return sums, squares


@triton.jit(do_not_specialize=["last_row"])  # one kernel for every batch
def gemv_4bit_kernel(
    x, norm_weight, weight, scale, zero, bias, residual, out, partial, arrived, last_row, N, K, G, split_len, eps,
    x_stride, weight_stride, residual_stride, out_stride, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, WARPS: tl.constexpr, MATRIX: tl.constexpr, GROUP: tl.constexpr, ASM: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr, SWIGLU: tl.constexpr, PDL: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Computes N outputs a row. With SWIGLU each output comes from two rows of the weight, which lie N rows apart."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    WIDTH: tl.constexpr = BLOCK_N // 2 if SWIGLU else BLOCK_N
    CHUNKS: tl.constexpr = BLOCK_K // 128
    tile = tl.program_id(0)
    column = tile * WIDTH + tl.arange(0, WIDTH)
    if SWIGLU:
        weight_row = _paired_rows(tile * WIDTH, N, BLOCK_N).to(tl.int32)
        weight_inside = tile * WIDTH + tl.arange(0, BLOCK_N) // 2 < N
    else:
        weight_row = column
        weight_inside = column < N
    weight_inside = _rows_of_warps(weight_inside) if MATRIX else weight_inside[:, None]
    begin, end = _part_of_k(split_len, K, SPLIT)
    word_at, group_at, word_column, group_column = _places(weight_row, weight_stride, G, BLOCK_K, GROUP, MATRIX)
    words, scales, zeros = _load_chunk(
        weight, scale, zero, word_at, group_at, weight_inside, word_column, group_column, begin, end, GROUP
    )  # fmt: skip
    bias_N = None
    bias_up = None
    if bias is not None:
        bias_N = tl.load(bias + column, mask=column < N, other=0.0)
        if SWIGLU:
            bias_up = tl.load(bias + N + column, mask=column < N, other=0.0)
    if PDL:  # only the wait makes other kernels' writes visible
        tl.extra.cuda.gdc_wait()
        if not EARLY:
            tl.extra.cuda.gdc_launch_dependents()
    x_at, x_row, x_column = _plane_places(x, x_stride, ROWS, CHUNKS, MATRIX)
    x_inside = x_row <= last_row
    n_at = None
    if norm_weight is not None:
        n_at, _, _ = _plane_places(norm_weight, 0, 8 if MATRIX else 1, CHUNKS, MATRIX)
    if MATRIX:
        sums = tl.zeros((WARPS, BLOCK_N, ROWS), tl.float32)
        squares = tl.zeros((8, WARPS, ROWS // 8, 4) if FIRST else (ROWS // 8, WARPS, 8, 4), tl.float32)
    else:
        sums = tl.zeros((ROWS, BLOCK_N, BLOCK_K // 32), tl.float32)
        squares = tl.zeros((ROWS, BLOCK_K // 8), tl.float32)
    for k in range(begin, end, BLOCK_K):
        next_words, next_scales, next_zeros = _load_chunk(
            weight, scale, zero, word_at, group_at, weight_inside, word_column, group_column, k + BLOCK_K, end,
            GROUP,
        )  # fmt: skip
        if MATRIX:
            sums, squares = _add_matrix(
                x_at, n_at, x_inside, x_column, zero, words, scales, zeros, sums, squares, k, end, GROUP, WIDE,
                PRECISION, ASM,
            )  # fmt: skip
        else:
            sums, squares = _add_rows(
                x_at, n_at, x_inside, x_column, zero, words, scales, zeros, sums, squares, k, end, ROWS, GROUP,
                ASM,
            )  # fmt: skip
        words = next_words
        scales = next_scales
        zeros = next_zeros
    row = tl.arange(0, ROWS)[:, None].to(tl.int64)
    inside = (row <= last_row) & (column < N)[None, :]
    r = None
    if residual is not None:  # loaded while threads add their sums; during the loop it would take registers
        r = tl.load(residual + row * residual_stride + column[None, :], mask=inside, other=0.0)
    if MATRIX:
        sums = tl.trans(tl.sum(sums, axis=0))
        squares = tl.sum(tl.sum(squares, axis=3), axis=1)
        squares = tl.reshape(tl.trans(squares) if FIRST else squares, (ROWS,))
    else:
        sums = tl.sum(sums, axis=2)
        squares = tl.sum(squares, axis=1)
    is_last = True
    if SPLIT:
        is_last = _leave_partial_sums(sums, squares, partial, arrived, last_row)
    if is_last:
        if SPLIT:
            sums, squares = _add_partial_sums(partial, arrived, last_row, ROWS, BLOCK_N)
        _store_outputs(
            out, sums, squares, norm_weight, bias_N, bias_up, r, row, column, inside, K, eps, out_stride, SWIGLU
        )  # fmt: skip

"""The jitted bodies of gemm_epilogue. An operand that a call does not have is None, a constant of the build."""

import triton
import triton.language as tl

PIECE: tl.constexpr = tl.constexpr(64)  # columns of a block that the epilogue works on at a time
RSQRT_2: tl.constexpr = tl.constexpr(0.7071067811865476)
MINUS_HALF_LOG2_E: tl.constexpr = tl.constexpr(-0.7213475204444817)
SERIES: tl.constexpr = tl.constexpr(0.3275911 * 0.7071067811865476)


@triton.jit
def gelu(t, dtype: tl.constexpr):
    """Returns t * Phi(t), for a result in `dtype`, where Phi is the normal distribution function.

    For 16-bit results Phi is the approximation 7.1.26 of Abramowitz and Stegun, "Handbook of Mathematical Functions".
    With one exponential it takes half the instructions, and these are what such a kernel waits for; the result is off
    by 3e-7 at most.
    """
    if dtype == tl.float32:
        return 0.5 * t * (1.0 + tl.erf(t * RSQRT_2))
    size = tl.abs(t)
    k = size * SERIES + 1.0
    k = tl.rsqrt(k * k)  # instead of a division, which takes eight instructions
    series = ((((1.061405429 * k - 1.453152027) * k + 1.421413741) * k - 0.284496736) * k + 0.254829592) * k
    return tl.maximum(t, 0.0) - 0.5 * size * series * tl.exp2(t * t * MINUS_HALF_LOG2_E)


@triton.jit
def pieces(block):
    """Cuts the block into groups of at most PIECE columns, from left to right; no value moves between threads."""
    if block.shape[1] <= PIECE:
        return (block,)
    else:
        halves = tl.reshape(block, (block.shape[0], 2, block.shape[1] // 2))
        left, right = tl.split(tl.permute(halves, (0, 2, 1)))
        return pieces(left) + pieces(right)


@triton.jit
def grouped_block(block, blocks_m, blocks_n, GROUP_M: tl.constexpr):
    """Returns row and column of the block that is computed in this place.

    Blocks are taken GROUP_M rows at a time, column by column, so that programs that run together find each other's
    rows of x and of the weight in L2.
    """
    group = block // (GROUP_M * blocks_n)
    place = block % (GROUP_M * blocks_n)
    group_rows = tl.minimum(blocks_m - group * GROUP_M, GROUP_M)
    return group * GROUP_M + place % group_rows, place // group_rows


@triton.jit
def fused_kernel(
    x,
    weight,
    bias,
    residual,
    scale,
    rows,
    out,
    num_rows,
    num_out_rows,
    N,
    K,
    x_stride,
    weight_stride,
    residual_stride,
    out_stride,
    GELU: tl.constexpr,
    EVEN_K: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Computes every num_programs-th block of the output. Each element is one sum over K, always in the same order."""
    blocks_m = tl.cdiv(num_rows, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    if USE_TMA:
        x_tiles = tl.make_tensor_descriptor(x, [num_rows, K], [x_stride, 1], [BLOCK_M, BLOCK_K])
        weight_tiles = tl.make_tensor_descriptor(weight, [N, K], [weight_stride, 1], [BLOCK_N, BLOCK_K])

    for block in range(tl.program_id(0), blocks_m * blocks_n, tl.num_programs(0)):
        block_m, block_n = grouped_block(block, blocks_m, blocks_n, GROUP_M)
        first_row, first_column = block_m * BLOCK_M, block_n * BLOCK_N

        row = first_row.to(tl.int64) + tl.arange(0, BLOCK_M)
        row_inside = row < num_rows
        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if USE_TMA:  # the copy engine reads zeros beyond the edges
            for k in range(0, K, BLOCK_K):
                x_tile = x_tiles.load([first_row, k])
                weight_tile = weight_tiles.load([first_column, k])
                sums = tl.dot(x_tile, weight_tile.T, sums, input_precision=PRECISION)
        else:
            inner = tl.arange(0, BLOCK_K)
            weight_row = first_column.to(tl.int64) + tl.arange(0, BLOCK_N)
            weight_inside = weight_row < N
            x_at = x + row[:, None] * x_stride + inner[None, :]
            weight_at = weight + weight_row[:, None] * weight_stride + inner[None, :]
            for k in range(0, K, BLOCK_K):
                if EVEN_K:
                    x_tile = tl.load(x_at + k, mask=row_inside[:, None], other=0.0)
                    weight_tile = tl.load(weight_at + k, mask=weight_inside[:, None], other=0.0)
                else:
                    k_inside = k + inner < K
                    x_tile = tl.load(x_at + k, mask=row_inside[:, None] & k_inside[None, :], other=0.0)
                    weight_tile = tl.load(weight_at + k, mask=weight_inside[:, None] & k_inside[None, :], other=0.0)
                sums = tl.dot(x_tile, weight_tile.T, sums, input_precision=PRECISION)

        out_row = row
        if rows is not None:
            out_row = tl.load(rows + row, mask=row_inside, other=-1)
            row_inside = (out_row >= 0) & (out_row < num_out_rows)
        # The columns are taken in pieces: operands and addresses of all would not fit the registers beside the sums.
        parts = pieces(sums)
        for index in tl.static_range(len(parts)):
            y = parts[index]
            column = first_column + index * y.shape[1] + tl.arange(0, y.shape[1])
            column_inside = column < N
            inside = row_inside[:, None] & column_inside[None, :]
            if bias is not None:
                y += tl.load(bias + column, mask=column_inside, other=0.0).to(tl.float32)[None, :]
            if GELU:
                y = gelu(y, out.dtype.element_ty)
            if scale is not None:
                y *= tl.load(scale + column, mask=column_inside, other=0.0).to(tl.float32)[None, :]
            if residual is not None:
                residual_at = residual + row[:, None] * residual_stride + column[None, :]
                y += tl.load(residual_at, mask=inside, other=0.0).to(tl.float32)
            out_at = out + out_row[:, None] * out_stride + column[None, :]
            tl.store(out_at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def epilogue_kernel(
    product,
    residual,
    scale,
    rows,
    out,
    num_rows,
    num_out_rows,
    N,
    product_stride,
    residual_stride,
    out_stride,
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Applies everything after a matrix product that torch made; the bias is already in the product."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    block = tl.program_id(0)
    row = (block // blocks_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = block % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside = row < num_rows
    column_inside = column < N
    inside = row_inside[:, None] & column_inside[None, :]
    y = tl.load(product + row[:, None] * product_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if GELU:
        y = gelu(y, out.dtype.element_ty)
    if scale is not None:
        y *= tl.load(scale + column, mask=column_inside, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        y += tl.load(residual + row[:, None] * residual_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    out_row = row
    if rows is not None:
        out_row = tl.load(rows + row, mask=row_inside, other=-1)
        inside = ((out_row >= 0) & (out_row < num_out_rows))[:, None] & column_inside[None, :]
    tl.store(out + out_row[:, None] * out_stride + column[None, :], y.to(out.dtype.element_ty), mask=inside)

"""The jitted bodies of unshuffle_project: statistics of every visual token, and the product that applies them."""

import triton
import triton.language as tl

from internvl_rt.kernels._gemm_epilogue_body import gelu, grouped_block, pieces
from internvl_rt.kernels.unshuffle_norm import first_patch, patch_offset, wide_statistics


@triton.jit
def statistics_kernel(
    x,
    statistics,  # [3, tokens]
    x_stride,
    num_tokens,
    side,
    eps,
    E: tl.constexpr,
    FACTOR: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    CENTRED: tl.constexpr,
    WIDE: tl.constexpr,  # registers do not hold a token
    BLOCK_E: tl.constexpr,
):
    """Writes what normalises a visual token as (x - centre) * rstd + shift. Without CENTRED the centre is 0.

    The mean is the sum of two parts: one float32 lacks its last bits where it is much larger than the deviation.
    """
    token = tl.program_id(0)
    first = first_patch(token, side, FACTOR, TRANSPOSED)
    if WIDE:
        mean, rest, rstd = wide_statistics(x, first, x_stride, side, eps, E, FACTOR, BLOCK_E)
    else:
        neighbour = tl.arange(0, FACTOR * FACTOR)[:, None]
        channel = tl.arange(0, BLOCK_E)[None, :]
        inside = channel < E
        patch = first + patch_offset(neighbour, side, FACTOR)
        values = tl.load(x + patch.to(tl.int64) * x_stride + channel, mask=inside, other=0.0).to(tl.float32)
        width: tl.constexpr = FACTOR * FACTOR * E
        mean = tl.sum(values) / width
        centred = tl.where(inside, values - mean, 0.0)
        rest = tl.sum(centred) / width
        centred = tl.where(inside, centred - rest, 0.0)
        rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred) / width + eps)
    if CENTRED:
        centre, shift = mean, -rest * rstd
    else:
        centre, shift = 0.0, -(mean + rest) * rstd
    tl.store(statistics + token, centre)
    tl.store(statistics + num_tokens + token, rstd)
    tl.store(statistics + 2 * num_tokens + token, shift)


@triton.jit
def project_kernel(
    x,
    statistics,
    norm_weight,
    norm_bias,
    weight,
    bias,
    out,
    num_tokens,
    side,
    N,
    x_stride,
    weight_stride,
    out_stride,
    E: tl.constexpr,
    FACTOR: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    CENTRED: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Computes every num_programs-th block of the output. Each element is one sum over K, always in the same order."""
    blocks_m = tl.cdiv(num_tokens, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    K: tl.constexpr = FACTOR * FACTOR * E
    CHUNKS: tl.constexpr = (E + BLOCK_K - 1) // BLOCK_K  # of a patch; a chunk never holds channels of two patches
    EVEN: tl.constexpr = E % BLOCK_K == 0
    inner = tl.arange(0, BLOCK_K)
    if USE_TMA:
        weight_tiles = tl.make_tensor_descriptor(weight, [N, K], [weight_stride, 1], [BLOCK_N, BLOCK_K])

    for block in range(tl.program_id(0), blocks_m * blocks_n, tl.num_programs(0)):
        block_m, block_n = grouped_block(block, blocks_m, blocks_n, GROUP_M)
        first_column = block_n * BLOCK_N
        row = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
        row_inside = row < num_tokens
        rstd = tl.load(statistics + num_tokens + row, mask=row_inside, other=0.0)[:, None]
        shift = tl.load(statistics + 2 * num_tokens + row, mask=row_inside, other=0.0)[:, None]
        if CENTRED:
            centre = tl.load(statistics + row, mask=row_inside, other=0.0)[:, None]
        patch = first_patch(row, side, FACTOR, TRANSPOSED).to(tl.int64)
        x_at = x + patch[:, None] * x_stride + inner[None, :]
        if not USE_TMA:
            weight_row = first_column.to(tl.int64) + tl.arange(0, BLOCK_N)
            weight_inside = (weight_row < N)[:, None]
            weight_at = weight + weight_row[:, None] * weight_stride + inner[None, :]

        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(FACTOR * FACTOR * CHUNKS):
            neighbour = step // CHUNKS
            channel = step % CHUNKS * BLOCK_K
            k = neighbour * E + channel
            offset = patch_offset(neighbour, side, FACTOR).to(tl.int64) * x_stride + channel
            if EVEN:
                x_tile = tl.load(x_at + offset, mask=row_inside[:, None], other=0.0)
                w = tl.load(norm_weight + k + inner)
                b = tl.load(norm_bias + k + inner)
            else:
                inside = channel + inner < E
                x_tile = tl.load(x_at + offset, mask=row_inside[:, None] & inside[None, :], other=0.0)
                w = tl.load(norm_weight + k + inner, mask=inside, other=0.0)  # 0 makes 0 of what is outside
                b = tl.load(norm_bias + k + inner, mask=inside, other=0.0)
            if USE_TMA:
                weight_tile = weight_tiles.load([first_column, k])
            elif EVEN:
                weight_tile = tl.load(weight_at + k, mask=weight_inside, other=0.0)
            else:
                weight_tile = tl.load(weight_at + k, mask=weight_inside & inside[None, :], other=0.0)
            values = x_tile.to(tl.float32)
            if CENTRED:
                values -= centre
            normed = tl.fma(tl.fma(values, rstd, shift), w.to(tl.float32)[None, :], b.to(tl.float32)[None, :])
            sums = tl.dot(normed.to(weight_tile.dtype), weight_tile.T, sums, input_precision=PRECISION)

        parts = pieces(sums)  # operands and addresses of all columns would not fit the registers beside the sums
        for index in tl.static_range(len(parts)):
            y = parts[index]
            column = first_column + index * y.shape[1] + tl.arange(0, y.shape[1])
            column_inside = column < N
            y += tl.load(bias + column, mask=column_inside, other=0.0).to(tl.float32)[None, :]
            out_at = out + row.to(tl.int64)[:, None] * out_stride + column[None, :]
            inside_out = row_inside[:, None] & column_inside[None, :]
            tl.store(out_at, gelu(y, out.dtype.element_ty).to(out.dtype.element_ty), mask=inside_out)

"""The jitted body of gemm_fp8. An operand that a call does not have is None, a constant of the build.

Matrix units of sm_90 keep about 14 bits of a sum of FP8 products. So each 128 columns are summed up by them, and these
sums are added in float32, where they are also multiplied by the scale of these columns, if there is one.
"""

import triton
import triton.language as tl

from internvl_rt.kernels._gemm_epilogue_body import grouped_block


@triton.jit(do_not_specialize=["num_rows"])  # one kernel for every number of rows
def gemm_fp8_kernel(
    x, x_scale, weight, scale, bias, residual, out, num_rows, N, K, x_stride, weight_stride, scale_stride,
    residual_stride, out_stride, BLOCKS: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Computes one block of the output. BLOCKS: a row of the weight has a scale for every 128 columns, and not one."""
    block_m, block_n = grouped_block(
        tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M
    )  # fmt: skip
    row = block_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = block_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside, column_inside = row < num_rows, column < N
    inner = tl.arange(0, BLOCK_K)
    x_at = x + row[:, None] * x_stride + inner[None, :]
    weight_at = weight + column[:, None] * weight_stride + inner[None, :]
    scale += column * scale_stride
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            x_tile = tl.load(x_at + k, mask=row_inside[:, None], other=0.0)
            weight_tile = tl.load(weight_at + k, mask=column_inside[:, None], other=0.0)
        else:
            inside = (k + inner < K)[None, :]
            x_tile = tl.load(x_at + k, mask=row_inside[:, None] & inside, other=0.0)
            weight_tile = tl.load(weight_at + k, mask=column_inside[:, None] & inside, other=0.0)
        if BLOCKS:
            s = tl.load(scale + k // 128, mask=column_inside, other=0.0)
            sums += tl.dot(x_tile, weight_tile.T, max_num_imprecise_acc=BLOCK_K) * s[None, :]
        else:
            sums = tl.dot(x_tile, weight_tile.T, sums, max_num_imprecise_acc=BLOCK_K)
    if not BLOCKS:
        sums *= tl.load(scale, mask=column_inside, other=0.0)[None, :]
    y = sums * tl.load(x_scale + row, mask=row_inside, other=0.0)[:, None]
    inside = row_inside[:, None] & column_inside[None, :]
    if bias is not None:
        y += tl.load(bias + column, mask=column_inside, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        y += tl.load(residual + row[:, None] * residual_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row[:, None] * out_stride + column[None, :], y.to(out.dtype.element_ty), mask=inside)

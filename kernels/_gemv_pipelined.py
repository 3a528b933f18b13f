"""The loop of gemv and gemv_qkv in which the weight is the tall operand and passes through shared memory.

    sums [BLOCK_N, 16] = W [BLOCK_N, K] x^T [K, 16], chunk by chunk of BLOCK_K

The compiler pipelines the loop: while one chunk is multiplied, the next num_stages - 1 are being copied to shared
memory, without passing through registers. The matrix units take 64 rows of the weight at a time (wgmma, on sm_90) and
the 16 rows of x as columns. With a norm, x's chunk is read from shared memory, multiplied by the norm's weight and
written to shared memory again.
"""

import triton
import triton.language as tl

from internvl_rt.kernels._numbers_8bit import lifted, operand_of


@triton.jit
def prefetch_weight(weight, weight_row, begin, end, weight_stride, LENGTH: tl.constexpr):
    """Asks for the first LENGTH elements of each row from `begin` on to be brought to L2, 64 bytes a request."""
    STEP: tl.constexpr = 512 // weight.dtype.element_ty.primitive_bitwidth
    STEPS: tl.constexpr = LENGTH // STEP if LENGTH > STEP else 1
    inner = tl.maximum(tl.minimum(begin + STEP * tl.arange(0, STEPS), end - 1), 0)
    at = weight + weight_row[:, None] * weight_stride + inner[None, :]
    # The instruction has no result, but Triton wants one.
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def rounded_to_tf32(x):
    """Returns the nearest float32 of 10 fraction bits. Matrix units drop the others, which would pull sums to zero."""
    rounded = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)  # rounding a NaN's bits could make them a zero


@triton.jit
def _load_norm(norm_weight, k, K, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Loads the chunk once for each row of x: L1 does that faster than threads hand the values to each other."""
    inner = k + tl.arange(0, BLOCK_K)
    at = norm_weight + tl.zeros((ROWS, 1), tl.int32) + inner[None, :]
    return tl.load(at, mask=(inner < K)[None, :], other=0.0)


@triton.jit
def pipelined_sums(
    x, norm_weight, weight, scale, weight_row, last_row, begin, end, K, x_stride, weight_stride, scale_stride,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, KIND: tl.constexpr,
    LIFT: tl.constexpr,
):  # fmt: skip
    """Computes (x * w_norm) W^T [ROWS, BLOCK_N] and the sum of x's squares [ROWS]; all of `weight_row` must exist.

    KIND and LIFT as in _numbers_8bit.py; `scale`: of every 128 columns, or None.
    """
    GROUP: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth  # elements that one load brings a thread
    row = tl.arange(0, ROWS)
    weight_at = weight + weight_row[:, None] * weight_stride
    x_at = x + row[:, None].to(tl.int64) * x_stride
    sums = tl.zeros((weight_row.shape[0], ROWS), tl.float32)
    squares = tl.zeros((ROWS, BLOCK_K // GROUP), tl.float32)
    if norm_weight is not None:
        n = _load_norm(norm_weight, begin, K, ROWS, BLOCK_K)
    for k in range(begin, end, BLOCK_K):
        inner = k + tl.arange(0, BLOCK_K)
        inside = (inner < K)[None, :]
        w = tl.load(weight_at + inner[None, :], mask=inside, other=0.0, eviction_policy="evict_first")
        v = tl.load(x_at + inner[None, :], mask=(row <= last_row)[:, None] & inside, other=0.0)
        if norm_weight is not None:
            a = v.to(tl.float32)
            squares += tl.sum(tl.reshape(a * a, (ROWS, BLOCK_K // GROUP, GROUP)), axis=2)
            a = lifted(a * n.to(tl.float32), LIFT)
            v = rounded_to_tf32(a) if WIDE else a.to(x.dtype.element_ty)
            n = _load_norm(norm_weight, k + BLOCK_K, K, ROWS, BLOCK_K)  # one chunk ahead; it takes no shared memory
        else:
            v = lifted(v, LIFT)
        if KIND is not None:
            w = operand_of(w, KIND, v.dtype)
        elif WIDE:
            w = w.to(tl.float32)
        if scale is not None:
            s = tl.load(scale + weight_row * scale_stride + k // 128)
            sums += tl.dot(w, tl.trans(v), input_precision=PRECISION) * s[:, None]
        else:
            sums = tl.dot(w, tl.trans(v), sums, input_precision=PRECISION)
    return tl.trans(sums), tl.sum(squares, axis=1)

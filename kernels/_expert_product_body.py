"""The jitted bodies of expert_gate_up and expert_down: products of rows with the weights of the experts they chose.

A program takes one block of BLOCK places of pairs (token, expert), which all belong to one expert, and BLOCK_N rows of
that expert's weight. These rows are the matrix units' tall operand, and the rows of x, which lie wherever their tokens
do, are its columns: [BLOCK_N, BLOCK] = W [BLOCK_N, K] x^T [K, BLOCK]. So numbers of 8 or 4 bits become operands in
registers, and x goes to the matrix units from shared memory as it is. The compiler pipelines the loop over K.

Programs of empty blocks return at once, so that a grid for the most blocks there can be serves every step. An element
is one sum over K in one order, which depends on nothing but the kernel; what the other places hold changes no bit.

With SWIGLU each 16 rows of a tile are 8 rows of gate and the same 8 of up. A thread of the matrix units holds rows r
and r + 8 of 16, so it has both values of a pair. CLAMPED: it is the gate of GPT-OSS's experts (`swiglu.py`).
"""

import triton
import triton.language as tl

from internvl_rt.kernels._gemm_epilogue_body import grouped_block, pieces
from internvl_rt.kernels._numbers_8bit import operand_of
from internvl_rt.kernels.swiglu import GATE_ALPHA, GATE_LIMIT

TWO_120: tl.constexpr = tl.constexpr(2.0**120)
ALPHA: tl.constexpr = tl.constexpr(GATE_ALPHA)
LIMIT: tl.constexpr = tl.constexpr(GATE_LIMIT)


@triton.jit
def begin_program(
    block_expert, num_blocks, N, BLOCK_N: tl.constexpr, GROUP_B: tl.constexpr, SWIGLU: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """Returns which block of pairs a program takes, the first of its outputs, and its expert: -1 if the block is empty.

    With PDL nothing can be read before the kernel before this one has said which experts compute.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    WIDTH: tl.constexpr = BLOCK_N // 2 if SWIGLU else BLOCK_N
    block, tile = grouped_block(tl.program_id(0), num_blocks, tl.cdiv(N, WIDTH), GROUP_B)
    return block, tile * WIDTH, tl.load(block_expert + block)


@triton.jit
def _weight_rows(first, N, BLOCK_N: tl.constexpr, SWIGLU: tl.constexpr):
    """Returns which rows of an expert's weight are a tile's; rows that do not exist become row 0, nobody stores them.

    With SWIGLU `first` is a row of gate, and row N is the first one of up.
    """
    place = tl.arange(0, BLOCK_N)
    if SWIGLU:
        column = first + place // 16 * 8 + place % 8
        return tl.where(column < N, column + place // 8 % 2 * N, 0)
    else:
        return tl.where(first + place < N, first + place, 0)


@triton.jit
def _gated(sums, CLAMPED: tl.constexpr):
    """Computes SwiGLU of the pairs of rows that `_weight_rows` has put 8 rows apart."""
    BLOCK: tl.constexpr = sums.shape[1]
    WIDTH: tl.constexpr = sums.shape[0] // 2
    pairs = tl.permute(tl.reshape(sums, (WIDTH // 8, 2, 8, BLOCK)), (0, 2, 3, 1))
    gate, up = tl.split(pairs)
    if CLAMPED:
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up)) + 1.0
        return tl.reshape(gate / (1.0 + tl.exp(gate * -ALPHA)) * up, (WIDTH, BLOCK))
    return tl.reshape(gate / (1.0 + tl.exp(-gate)) * up, (WIDTH, BLOCK))


@triton.jit
def _operand(w, KIND: tl.constexpr, dtype: tl.constexpr):
    """Returns 8-bit numbers in `dtype`, where float16 has FP8 numbers divided by 2^8; exact."""
    y = operand_of(w, KIND, dtype)
    if KIND == "float8" and dtype != tl.float16:
        y *= tl.full(y.shape, TWO_120, tl.float32).to(dtype)
    return y


@triton.jit
def _store_rows(
    out, sums, bias, bias_row, pair_weight, pair_at, first, N, out_stride, SWIGLU: tl.constexpr, CLAMPED: tl.constexpr
):  # fmt: skip
    """Makes outputs of complete sums [BLOCK_N, BLOCK] and stores those of each pair in its row.

    bias_row: which elements of the bias, if there is one, belong to the rows of the tile
    It takes a piece of the pairs at a time: weights and addresses of all would not fit the registers beside the sums.
    """
    if bias is not None:
        sums += tl.load(bias + bias_row).to(tl.float32)[:, None]
    parts = pieces(sums)
    for index in tl.static_range(len(parts)):
        y = _gated(parts[index], CLAMPED) if SWIGLU else parts[index]
        pair = tl.load(pair_at + index * y.shape[1] + tl.arange(0, y.shape[1]))
        inside = pair >= 0
        if pair_weight is not None:
            y *= tl.load(pair_weight + pair, mask=inside, other=0.0)[None, :]
        column = first + tl.arange(0, y.shape[0])
        at = out + pair.to(tl.int64)[:, None] * out_stride + column[None, :]
        tl.store(at, tl.trans(y.to(out.dtype.element_ty)), mask=inside[:, None] & (column < N)[None, :])


@triton.jit(do_not_specialize=["num_blocks"])  # one kernel for every number of tokens
def expert_product_kernel(
    x, weight, scale, bias, pair, block_expert, pair_weight, out, num_blocks, pairs_per_row, N, K, x_stride,
    weight_stride, scale_stride, out_stride, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_B: tl.constexpr, SWIGLU: tl.constexpr, CLAMPED: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    KIND: tl.constexpr, SCALES: tl.constexpr, FEW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Computes N outputs of each pair with a dense weight, or with one of 8-bit numbers (KIND).

    SCALES: a row has a scale for every 128 columns, which multiplies their sums, and not one for the whole sum.
    FEW: so few blocks share a weight that it should leave the caches first.
    pairs_per_row: how many pairs share a row of x
    """
    block, first, expert = begin_program(block_expert, num_blocks, N, BLOCK_N, GROUP_B, SWIGLU, PDL)
    if expert >= 0:
        pair_B = tl.load(pair + block * BLOCK + tl.arange(0, BLOCK))
        inside = (pair_B >= 0)[:, None]
        weight_row = expert.to(tl.int64) * (2 * N if SWIGLU else N) + _weight_rows(first, N, BLOCK_N, SWIGLU)
        inner = tl.arange(0, BLOCK_K)
        weight_at = weight + weight_row[:, None] * weight_stride + inner[None, :]
        x_at = x + (pair_B // pairs_per_row).to(tl.int64)[:, None] * x_stride + inner[None, :]
        policy: tl.constexpr = "evict_first" if FEW else ""
        scale_at = None
        if KIND is not None:
            scale_at = scale + weight_row * scale_stride
        if SCALES:
            s = tl.load(scale_at)
        sums = tl.zeros((BLOCK_N, BLOCK), tl.float32)
        for k in range(0, K, BLOCK_K):
            if EVEN_K:
                w = tl.load(weight_at + k, eviction_policy=policy)
                v = tl.load(x_at + k, mask=inside, other=0.0)
            else:
                k_inside = (k + inner < K)[None, :]
                w = tl.load(weight_at + k, mask=k_inside, other=0.0, eviction_policy=policy)
                v = tl.load(x_at + k, mask=inside & k_inside, other=0.0)
            if KIND is not None:
                w = _operand(w, KIND, v.dtype)
            if SCALES:
                next_k = k + BLOCK_K
                next_s = tl.load(scale_at + next_k // 128, mask=next_k < K, other=0.0)
                sums += tl.dot(w, tl.trans(v), input_precision=PRECISION) * s[:, None]
                s = next_s
            else:
                sums = tl.dot(w, tl.trans(v), sums, input_precision=PRECISION)
        if KIND is not None:
            if not SCALES:
                sums *= tl.load(scale_at)[:, None]
            if KIND == "float8" and x.dtype.element_ty == tl.float16:
                sums *= 256.0
        pair_at = pair + block * BLOCK
        _store_rows(out, sums, bias, weight_row, pair_weight, pair_at, first, N, out_stride, SWIGLU, CLAMPED)


@triton.jit
def sum_pairs_kernel(
    part, expert_id, residual, out, first, num_experts, D, part_stride, residual_stride, out_stride,
    NUM_CHOSEN: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Adds to a row of the residual the parts of its pairs whose experts are here, in the order of the pairs."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    blocks = tl.cdiv(D, BLOCK)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < D
    x = tl.zeros((BLOCK,), tl.float32)
    if residual is not None:
        x += tl.load(residual + token * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
    for j in tl.static_range(NUM_CHOSEN):
        pair = token * NUM_CHOSEN + j
        expert = tl.load(expert_id + pair) - first
        here = (expert >= 0) & (expert < num_experts)
        x += tl.load(part + pair * part_stride + column, mask=inside & here, other=0.0).to(tl.float32)
    tl.store(out + token * out_stride + column, x.to(out.dtype.element_ty), mask=inside)

"""The jitted bodies of expert_gate_up and expert_down for weights of 4-bit numbers in words (`_int4.py`).

`_expert_product_body.py` says what a program computes. For blocks of 16 pairs, where reading the weight takes all the
time, it is done as in `_gemv_4bit_body.py`: each warp has chunks of 128 columns of its own, and loads words and columns
of x right to where its matrix units want them. For larger blocks words and x pass through shared memory, as other
weights do. A group's products are added up by the matrix units, and multiplied by its scale in float32.
"""

import triton
import triton.language as tl

from internvl_rt.kernels._expert_product_body import _store_rows, _weight_rows, begin_program
from internvl_rt.kernels._gemv_4bit_body import _add_matrix, _load_chunk, _places, _plane, _rows_of_warps
from internvl_rt.kernels._gemv_body import _part_of_k


@triton.constexpr_function
def _asm_of_planes(first, planes, half, has_zero):
    """Writes PTX for nibbles `first` to first + planes - 1 of two words: numbers minus their zero, two a register.

    Behind the results come the two words and minus (128 + zero), or minus (1024 + zero) in float16, of both.
    """
    magic, one, eight = (
        ("0x64006400", "0x3C003C00", "0xE408E408") if half else ("0x43004300", "0x3F803F80", "0xC308C308")
    )
    code = f"{{ .reg .b32 low, high, n, one, offset; mov.b32 one, {one}; "
    code += f"mov.b32 offset, {f'${planes + 2}' if has_zero else eight}; "
    code += f"prmt.b32 low, ${planes}, ${planes + 1}, 0x5410; prmt.b32 high, ${planes}, ${planes + 1}, 0x7632; "
    for i in range(first, first + planes):
        code += f"shr.b32 n, {'low' if i < 4 else 'high'}, {i % 4 * 4}; "
        code += f"lop3.b32 n, n, 0x000F000F, {magic}, 0xEA; "
        code += f"fma.rn.{'f16x2' if half else 'bf16x2'} ${i - first}, n, one, offset; "
    return code + "}"


@triton.constexpr_function
def _results(planes, has_zero):
    """Returns the constraints of the assembly: no result may share a register with what is still to be read."""
    return ",".join(["=&r"] * planes + ["r"] * (3 if has_zero else 2))


@triton.constexpr_function
def _repeated(dtype, count):
    return (dtype,) * count


@triton.jit
def _in_order(planes):
    """Makes [N, 16] planes, tuples of 2, 4 or 8, one operand [N, 16 * planes] of neighbouring columns."""
    if len(planes) == 2:
        y = tl.permute(tl.join(planes[0], planes[1]), (0, 2, 1))
    elif len(planes) == 4:
        y = tl.join(tl.join(planes[0], planes[2]), tl.join(planes[1], planes[3]))
        y = tl.permute(y, (0, 2, 3, 1))
    else:
        even = tl.join(tl.join(planes[0], planes[4]), tl.join(planes[2], planes[6]))
        odd = tl.join(tl.join(planes[1], planes[5]), tl.join(planes[3], planes[7]))
        y = tl.permute(tl.join(even, odd), (0, 2, 3, 4, 1))
    return tl.reshape(y, (planes[0].shape[0], 16 * len(planes)))


@triton.jit
def _part_of(words, zero, x, p: tl.constexpr, PART: tl.constexpr, ASM: tl.constexpr):
    """Returns part p of the chunks [N, 16] as an operand [N, PART]: numbers minus their zero, which is 8 if None."""
    PLANES: tl.constexpr = PART // 16
    if ASM and x.dtype.element_ty.primitive_bitwidth == 16:
        HALF: tl.constexpr = x.dtype.element_ty == tl.float16
        code: tl.constexpr = _asm_of_planes(p * PLANES, PLANES, HALF, zero is not None)
        dtypes: tl.constexpr = _repeated(x.dtype.element_ty, PLANES)
        names: tl.constexpr = _results(PLANES, zero is not None)
        if zero is not None:
            negative = (zero.to(tl.int16) | (-0x1C00 if HALF else -0x3D00))[:, None]  # -(128 + zero)
            negative = tl.broadcast_to(negative, words.shape)
            planes = tl.inline_asm_elementwise(code, names, [words, negative], dtypes, True, 2)
        else:
            planes = tl.inline_asm_elementwise(code, names, [words], dtypes, True, 2)
    else:
        z = None
        if zero is not None:
            z = zero[:, None]
        planes = ()
        for i in tl.static_range(p * PLANES, (p + 1) * PLANES):
            planes += (_plane(words, z, x, i, False, ASM, False),)
    return _in_order(planes)


@triton.jit
def _load_scales(base, row_at, first, G, GROUP: tl.constexpr):
    """Loads the scales or zeros of the groups of the chunk whose first one is `first`, 0 where there is none."""
    loaded = ()
    for g in tl.static_range(128 // GROUP):
        loaded += (tl.load(base + row_at + (first + g), mask=first + g < G, other=0),)  # type: ignore[assignment]
    return loaded


@triton.jit(do_not_specialize=["num_blocks"])  # one kernel for every number of tokens
def expert_product_4bit_kernel(
    x, weight, scale, zero, bias, pair, block_expert, pair_weight, out, num_blocks, pairs_per_row, N, K, G, x_stride,
    weight_stride, out_stride, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_B: tl.constexpr,
    GROUP: tl.constexpr, PART: tl.constexpr, SWIGLU: tl.constexpr, CLAMPED: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Computes N outputs of each pair, in chunks of 128 columns.

    PART: how many of these columns are an operand, which takes registers; all of one group
    ASM: the interpreter has no inline assembly.
    """
    block, first, expert = begin_program(block_expert, num_blocks, N, BLOCK_N, GROUP_B, SWIGLU, PDL)
    if expert >= 0:
        pair_B = tl.load(pair + block * BLOCK + tl.arange(0, BLOCK))
        inside = (pair_B >= 0)[:, None]
        weight_row = expert.to(tl.int64) * (2 * N if SWIGLU else N) + _weight_rows(first, N, BLOCK_N, SWIGLU)
        weight_at = weight + weight_row[:, None] * weight_stride + tl.arange(0, 16)[None, :]
        inner = tl.arange(0, PART)
        x_at = x + (pair_B // pairs_per_row).to(tl.int64)[:, None] * x_stride + inner[None, :]
        group_at = weight_row * G
        scales = _load_scales(scale, group_at, 0, G, GROUP)
        zeros = scales  # not read where there are none
        if zero is not None:
            zeros = _load_scales(zero, group_at, 0, G, GROUP)
        sums = tl.zeros((BLOCK_N, BLOCK), tl.float32)
        for k in range(0, K, 128):
            words = tl.load(weight_at + k // 8)
            next_group = (k + 128) // GROUP
            next_scales = _load_scales(scale, group_at, next_group, G, GROUP)
            next_zeros = next_scales
            if zero is not None:
                next_zeros = _load_scales(zero, group_at, next_group, G, GROUP)
            for p in tl.static_range(128 // PART):
                mask = inside
                if not EVEN_K:
                    mask = inside & (k + p * PART + inner < K)[None, :]
                v = tl.load(x_at + (k + p * PART), mask=mask, other=0.0)
                w = _part_of(words, zeros[p * PART // GROUP] if zero is not None else None, x, p, PART, ASM)
                if p * PART % GROUP == 0:
                    products = tl.dot(w, tl.trans(v), input_precision=PRECISION)
                else:
                    products = tl.dot(w, tl.trans(v), products, input_precision=PRECISION)
                if (p + 1) * PART % GROUP == 0:
                    sums += products * scales[p * PART // GROUP].to(tl.float32)[:, None]
            scales = next_scales
            zeros = next_zeros
        pair_at = pair + block * BLOCK
        _store_rows(out, sums, bias, weight_row, pair_weight, pair_at, first, N, out_stride, SWIGLU, CLAMPED)


@triton.jit(do_not_specialize=["num_blocks"])
def few_pairs_4bit_kernel(
    x, weight, scale, zero, bias, pair, block_expert, pair_weight, out, num_blocks, pairs_per_row, N, K, G, x_stride,
    weight_stride, out_stride, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WARPS: tl.constexpr,
    GROUP_B: tl.constexpr, GROUP: tl.constexpr, SWIGLU: tl.constexpr, CLAMPED: tl.constexpr, PRECISION: tl.constexpr,
    ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Computes N outputs of each pair; each warp takes a chunk of BLOCK_K's 128 columns, so their sums are added up."""
    block, first, expert = begin_program(block_expert, num_blocks, N, BLOCK_N, GROUP_B, SWIGLU, PDL)
    if expert >= 0:
        pair_B = tl.load(pair + block * BLOCK + tl.arange(0, BLOCK))
        weight_row = _weight_rows(first, N, BLOCK_N, SWIGLU)
        expert_row = expert.to(tl.int64) * (2 * N if SWIGLU else N)
        weight += expert_row * weight_stride
        scale += expert_row * G
        if zero is not None:
            zero += expert_row * G
        weight_inside = _rows_of_warps(weight_row >= 0)
        word_at, group_at, word_column, group_column = _places(weight_row, weight_stride, G, BLOCK_K, GROUP, True)
        begin, end = _part_of_k(0, K, False)
        words, scales, zeros = _load_chunk(
            weight, scale, zero, word_at, group_at, weight_inside, word_column, group_column, begin, end, GROUP
        )  # fmt: skip
        x_row = _rows_of_warps(pair_B // pairs_per_row).to(tl.int64)
        x_column = 128 * tl.arange(0, WARPS)[None, :, None, None] + tl.arange(0, 16)
        x_at = x + tl.max_contiguous(x_row * x_stride + x_column, [1, 1, 1, 4])
        x_inside = _rows_of_warps(pair_B >= 0)
        sums = tl.zeros((WARPS, BLOCK_N, BLOCK), tl.float32)
        for k in range(begin, end, BLOCK_K):
            next_words, next_scales, next_zeros = _load_chunk(
                weight, scale, zero, word_at, group_at, weight_inside, word_column, group_column, k + BLOCK_K, end,
                GROUP,
            )  # fmt: skip
            sums, _ = _add_matrix(
                x_at, None, x_inside, x_column, zero, words, scales, zeros, sums, 0.0, k, end, GROUP, False, PRECISION,
                ASM,
            )  # fmt: skip
            words = next_words
            scales = next_scales
            zeros = next_zeros
        pair_at, bias_row, sums = pair + block * BLOCK, expert_row + weight_row, tl.sum(sums, axis=0)
        _store_rows(out, sums, bias, bias_row, pair_weight, pair_at, first, N, out_stride, SWIGLU, CLAMPED)

"""Turns the 8-bit numbers of a weight, FP8 (e4m3) or int8, into floating-point operands, four at a time.

FP8 has no instruction on sm_80, and none to bfloat16 anywhere: the bits of exponent and fraction, and the sign, move to
where the type has them. The exponents' biases differ by 120, or by 8 in float16, so what comes out is the number times
2^-120, or times 2^-8; subnormal numbers too. Whoever multiplies lifts the other operand (`LIFT`) and the sum (`LOWER`)
by powers of two, half each, so that no product is so small that it loses bits. To float32 there are instructions by way
of float16 from sm_89 on, which take half as many steps.

An int8 becomes the last bits of a large number, from which that is subtracted. All results are exact.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from internvl_rt.kernels._contract import require, require_tensor
from internvl_rt.kernels._launch import Target, cdiv

BLOCK = 128  # columns that share a scale, where a row has more than one
KINDS = {torch.float8_e4m3fn: "float8", torch.int8: "int8"}
DENSE: dict[str, Any] = {"KIND": None, "ASM": False, "LIFT": 1.0, "LOWER": 1.0}  # for a weight in the dtype of x


def operand_constants(numbers: torch.dtype, operand: torch.dtype, target: Target, *, in_words: bool) -> dict[str, Any]:
    """Returns the constants of a kernel's build for a weight of such numbers, multiplied in the type `operand`.

    in_words: whether it is read four numbers at a time, by `operands_of_words`.
    """
    asm = in_words and not target.interpreted  # the interpreter has no inline assembly
    if numbers == torch.int8:
        return {**DENSE, "KIND": "int8", "ASM": asm}
    if operand == torch.float16:
        return {"KIND": "float8", "ASM": asm, "LIFT": 1.0, "LOWER": 2.0**8}
    if operand == torch.float32 and asm and target.capability >= 89:
        return {**DENSE, "KIND": "float8 by float16", "ASM": True}
    return {"KIND": "float8", "ASM": asm, "LIFT": 2.0**60, "LOWER": 2.0**60}


def require_scales(name: str, scale_NG: torch.Tensor, n: int, k: int, device: torch.device) -> None:
    """Raises ValueError unless a weight [n, k] has a scale for every row, or for every BLOCK columns of it."""
    require(scale_NG.ndim == 2, name, "two dimensions", tuple(scale_NG.shape))
    groups = 1 if scale_NG.shape[1] == 1 else cdiv(k, BLOCK)
    require_tensor(name, scale_NG, (n, groups), torch.float32, device)


# PTX for the four numbers of a word, which is the last operand.
FP8_BY_FLOAT16: tl.constexpr = tl.constexpr("""{
    .reg .b16 lo, hi, h<4>;
    .reg .b32 a, b;
    mov.b32 {lo, hi}, $4;
    cvt.rn.f16x2.e4m3x2 a, lo;
    cvt.rn.f16x2.e4m3x2 b, hi;
    mov.b32 {h0, h1}, a;
    mov.b32 {h2, h3}, b;
    cvt.f32.f16 $0, h0;
    cvt.f32.f16 $1, h1;
    cvt.f32.f16 $2, h2;
    cvt.f32.f16 $3, h3;
}""")
FP8_TO_FLOAT32: tl.constexpr = tl.constexpr("""{
    .reg .b32 a, b, c, d;
    shl.b32 a, $4, 24;
    shl.b32 b, $4, 16;
    shl.b32 c, $4, 8;
    shr.s32 a, a, 4;
    shr.s32 b, b, 4;
    shr.s32 c, c, 4;
    shr.s32 d, $4, 4;
    and.b32 a, a, 0x87F00000;
    and.b32 b, b, 0x87F00000;
    and.b32 c, c, 0x87F00000;
    and.b32 d, d, 0x87F00000;
    mov.b32 $0, a;
    mov.b32 $1, b;
    mov.b32 $2, c;
    mov.b32 $3, d;
}""")
FP8_TO_HALVES: tl.constexpr = tl.constexpr("""{
    .reg .b32 a, b, c, d;
    prmt.b32 a, $4, 0, 0x1404;
    prmt.b32 b, $4, 0, 0x3424;
    shr.b32 c, a, SHIFT;
    shr.b32 d, b, SHIFT;
    and.b32 c, c, REST;
    and.b32 d, d, REST;
    lop3.b32 a, a, 0x80008000, c, 0xEA;
    lop3.b32 b, b, 0x80008000, d, 0xEA;
    mov.b32 {$0, $1}, a;
    mov.b32 {$2, $3}, b;
}""")
FP8_TO_BFLOAT16: tl.constexpr = tl.constexpr(FP8_TO_HALVES.value.replace("SHIFT", "4").replace("REST", "0x07F007F0"))
FP8_TO_FLOAT16: tl.constexpr = tl.constexpr(FP8_TO_HALVES.value.replace("SHIFT", "1").replace("REST", "0x3F803F80"))
INT8_TO_FLOAT32: tl.constexpr = tl.constexpr("""{
    .reg .b32 n;
    .reg .f32 a, b, c, d, minus;
    mov.f32 minus, 0fCB000080;
    xor.b32 n, $4, 0x80808080;
    prmt.b32 a, n, 0x4B000000, 0x7650;
    prmt.b32 b, n, 0x4B000000, 0x7651;
    prmt.b32 c, n, 0x4B000000, 0x7652;
    prmt.b32 d, n, 0x4B000000, 0x7653;
    add.f32 $0, a, minus;
    add.f32 $1, b, minus;
    add.f32 $2, c, minus;
    add.f32 $3, d, minus;
}""")  # 2^23 + 128 + n in float32, minus 2^23 + 128
INT8_TO_BFLOAT16: tl.constexpr = tl.constexpr("""{
    .reg .b32 a, b, c, d, minus;
    mov.b32 minus, 0xBF80BF80;
    prmt.b32 a, $4, 0, 0x4140;
    prmt.b32 b, $4, 0, 0x4342;
    lop3.b32 c, a, 0x00800080, 0x43004300, 0xEA;
    lop3.b32 d, b, 0x00800080, 0x43004300, 0xEA;
    lop3.b32 a, a, 0x007F007F, 0x43004300, 0xEA;
    lop3.b32 b, b, 0x007F007F, 0x43004300, 0xEA;
    fma.rn.bf16x2 a, c, minus, a;
    fma.rn.bf16x2 b, d, minus, b;
    mov.b32 {$0, $1}, a;
    mov.b32 {$2, $3}, b;
}""")  # 128 + the last seven bits, minus 128, or minus 256 for a negative number
INT8_TO_FLOAT16: tl.constexpr = tl.constexpr("""{
    .reg .b32 n, a, b, offset;
    mov.b32 offset, 0xE480E480;
    xor.b32 n, $4, 0x80808080;
    prmt.b32 a, n, 0x00000064, 0x4140;
    prmt.b32 b, n, 0x00000064, 0x4342;
    add.rn.f16x2 a, a, offset;
    add.rn.f16x2 b, b, offset;
    mov.b32 {$0, $1}, a;
    mov.b32 {$2, $3}, b;
}""")  # 1024 + 128 + n, minus 1152


@triton.jit
def operand_of(bits, KIND: tl.constexpr, dtype: tl.constexpr):
    """Returns numbers, given as int8 of the same bits, in `dtype`: FP8 as the module says, int8 as they are."""
    tl.static_assert(KIND == "int8" or KIND == "float8", "only words become operands by instructions")
    if KIND == "int8":
        wide = ((bits.to(tl.int32) & 0xFF) ^ 0x80) | 0x4B000000  # 2^23 + 128 + n in float32
        return (wide.to(tl.float32, bitcast=True) - 8388736.0).to(dtype)
    elif dtype == tl.float16:
        return ((bits.to(tl.int16) << 7) & -0x4080).to(dtype, bitcast=True)
    elif dtype == tl.bfloat16:
        return ((bits.to(tl.int16) << 4) & -0x7810).to(dtype, bitcast=True)
    else:
        return ((bits.to(tl.int32) << 20) & -0x78100000).to(tl.float32, bitcast=True)


@triton.jit
def operands_of_words(words, KIND: tl.constexpr, ASM: tl.constexpr, dtype: tl.constexpr):
    """Does for the four numbers of each word what `operand_of` does: [N, K / 4] words become [N, K] operands.

    The bytes of a word stay in one register until they are operands; to take them apart and to put them together again
    would take more instructions than all else. ASM: by inline assembly, which Triton's interpreter does not have.
    """
    FOUR: tl.constexpr = (words.shape[0], words.shape[1] * 4)
    if not ASM:
        first = operand_of(((words << 24) >> 24).to(tl.int8), KIND, dtype)
        second = operand_of(((words << 16) >> 24).to(tl.int8), KIND, dtype)
        third = operand_of(((words << 8) >> 24).to(tl.int8), KIND, dtype)
        fourth = operand_of((words >> 24).to(tl.int8), KIND, dtype)
    elif dtype == tl.float32:
        first, second, third, fourth = tl.inline_asm_elementwise(
            INT8_TO_FLOAT32 if KIND == "int8" else FP8_TO_FLOAT32 if KIND == "float8" else FP8_BY_FLOAT16,
            *("=f,=f,=f,=f,r", [words], (tl.float32, tl.float32, tl.float32, tl.float32), True, 1),
        )
    else:
        first, second, third, fourth = tl.inline_asm_elementwise(
            (INT8_TO_FLOAT16 if KIND == "int8" else FP8_TO_FLOAT16)
            if dtype == tl.float16
            else (INT8_TO_BFLOAT16 if KIND == "int8" else FP8_TO_BFLOAT16),
            *("=h,=h,=h,=h,r", [words], (tl.int16, tl.int16, tl.int16, tl.int16), True, 1),
        )
        first = first.to(dtype, bitcast=True)
        second = second.to(dtype, bitcast=True)
        third = third.to(dtype, bitcast=True)
        fourth = fourth.to(dtype, bitcast=True)
    return tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), FOUR)


@triton.jit
def lifted(x, LIFT: tl.constexpr):
    """Returns x times LIFT, a power of two."""
    return x if LIFT == 1.0 else x * tl.full(x.shape, LIFT, tl.float32).to(x.dtype)

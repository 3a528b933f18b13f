"""Keys and values in 8 bits: a number for each channel, and a scale for each token and head.

    scale  = max |x| / largest, over the channels of a head, rounded up to bfloat16
    number = x / scale, to the nearest, ties to even
    x      = number * scale, about              FP8 is float8_e4m3fn, its largest number 448; that of int8 is 127

What is stored of a token depends on nothing but the token, so it does not matter in which chunks and beside what it is
computed. The scale is rounded up, so no number is too large. A checkpoint may give one scale for all tokens; numbers
that are too large for it become the largest. A head with a value that is not finite gets the scale NaN, so that
whoever reads it gets NaN, as without numbers in 8 bits.

A cache of such numbers has the scales beside it, `scale_BGP2` in bfloat16: of a token's key, then of its value. A
kernel reads both as one word.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from internvl_rt.kernels._contract import Tolerance, require, require_one_of, require_tensor
from internvl_rt.kernels._launch import target_of

KV_FORMATS = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}  # what users call them
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
# So that 1 / scale does not overflow. Values for which it is too large are nothing beside the others of any model.
LEAST_SCALE: tl.constexpr = tl.constexpr(2.0**-100)
ROUNDER: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2^23: a sum with it is rounded to an integer, ties to even
# Each makes four float16 numbers, in $0 and $1, of four in 8 bits, in $2. An int8 plus 128 is the low byte of 1024 to
# 1279 in float16, whose other byte is 0x64.
UNPACK_INT8: tl.constexpr = tl.constexpr("""
{
    .reg .b32 moved, offset;
    xor.b32 moved, $2, 0x80808080;
    mov.b32 offset, 0x64806480;
    prmt.b32 $0, moved, 0x64646464, 0x4140;
    prmt.b32 $1, moved, 0x64646464, 0x4342;
    sub.f16x2 $0, $0, offset;
    sub.f16x2 $1, $1, offset;
}
""")
UNPACK_FP8: tl.constexpr = tl.constexpr("""
{
    .reg .b16 low, high;
    mov.b32 {low, high}, $2;
    cvt.rn.f16x2.e4m3x2 $0, low;
    cvt.rn.f16x2.e4m3x2 $1, high;
}
""")
MIN_CAPABILITY = {"fp8": 89, "int8": 80}  # FP8: the first with instructions that convert it
STORED_TOLERANCES = {  # of numbers, which another last bit of a value may round the other way
    # After norms in bfloat16 a value near 0 has the errors, 2^-8, of its head's largest ones, whose numbers are 448 or
    # 127, and a number may be the next but one.
    torch.float8_e4m3fn: Tolerance(0.15, 3.0, 0.03, "a number may be the next one"),
    torch.int8: Tolerance(0.0, 2.5, 0.01, "a number may be the next one"),
    torch.bfloat16: Tolerance(1e-2, 0.0, 5e-3, "a scale may be the next one"),
}


def quantise_heads(x: Tensor, dtype: torch.dtype, static_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns numbers [..., C] of type `dtype` and scales [...] in bfloat16 of values [..., C].

    static_scale: a float32 scale for all, rounded up too.
    """
    values = x.float()
    largest = values.abs().amax(-1)
    scale = largest / LARGEST[dtype] if static_scale is None else static_scale.float().expand_as(largest)
    bits = scale.clamp_min(LEAST_SCALE.value).contiguous().view(torch.int32)
    scale = ((bits + 0xFFFF) & -0x10000).view(torch.float32)
    finite = largest < torch.inf
    numbers = (values / scale[..., None]).where(finite[..., None], 0).clamp(-LARGEST[dtype], LARGEST[dtype])
    numbers = numbers if dtype.is_floating_point else numbers.round()
    return numbers.to(dtype), scale.where(finite, torch.nan).bfloat16()


def dequantise_heads(numbers: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns values [..., C] of type `dtype` of numbers [..., C] and scales [...]."""
    wide = torch.float32 if dtype == torch.float16 else dtype  # float16 has no scale as small as may be here
    return numbers.to(wide).mul_(scale.to(wide)[..., None]).to(dtype)


def write_heads(
    cache_BGPC: Tensor, scale_BGP: Tensor, slot_N: Tensor, x_NGC: Tensor, static_scale: Tensor | None = None
) -> None:
    """Writes the keys or values of tokens, or their numbers and scales, to their slots."""
    block_N, place_N = slot_N // cache_BGPC.shape[2], slot_N % cache_BGPC.shape[2]
    numbers, scale = quantise_heads(x_NGC, cache_BGPC.dtype, static_scale)
    cache_BGPC[block_N, :, place_N] = numbers
    scale_BGP[block_N, :, place_N] = scale.to(scale_BGP.dtype)


def check_scales(
    k_cache_BGPC: Tensor,
    scale_BGP2: Tensor | None,
    static_scale_2: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.dtype:
    """Returns the type that the caches must have: with scales one of 8 bits, else `dtype`.

    Raises ValueError naming the argument that does not fit.
    """
    if scale_BGP2 is None:
        require(static_scale_2 is None, "static_scale_2", "None without scale_BGP2", static_scale_2)
        return dtype
    require_one_of("k_cache_BGPC", k_cache_BGPC.dtype, LARGEST)
    if k_cache_BGPC.dtype == torch.float8_e4m3fn:
        least, has = MIN_CAPABILITY["fp8"] / 10, target_of(device).capability / 10
        require(has >= least, "k_cache_BGPC", f"int8 below compute capability {least}", f"FP8 on {has}")
    require_tensor("scale_BGP2", scale_BGP2, (*k_cache_BGPC.shape[:3], 2), torch.bfloat16, k_cache_BGPC.device)
    # A kernel reads the two scales of a token as one word.
    words = scale_BGP2.stride(2) == 2 and all(stride % 2 == 0 for stride in scale_BGP2.stride()[:3])
    require(words, "scale_BGP2", "tokens side by side", f"strides {scale_BGP2.stride()}")
    require(scale_BGP2.data_ptr() % 4 == 0, "scale_BGP2", "an address that 4 divides", scale_BGP2.data_ptr())
    if static_scale_2 is not None:
        require_tensor("static_scale_2", static_scale_2, (2,), torch.float32, k_cache_BGPC.device)
    return k_cache_BGPC.dtype


def scale_arguments(scale_BGP2: Tensor | None) -> dict[str, Tensor | int | None]:
    """Returns the arguments of attention's kernels about scales; the strides count words of two scales."""
    if scale_BGP2 is None:
        return dict.fromkeys(("scale", "scale_block_stride", "scale_head_stride"))
    block_stride, head_stride = (stride // 2 for stride in scale_BGP2.stride()[:2])
    return {"scale": scale_BGP2, "scale_block_stride": block_stride, "scale_head_stride": head_stride}


def in_8_bits(cache: str) -> dict[str, Any]:
    """Returns the sizes of a case with a cache of this format."""
    return {"cache": cache, "min_capability": MIN_CAPABILITY[cache]}


@triton.jit
def head_scale(first, second, static_scale, index: tl.constexpr, LARGEST: tl.constexpr):
    """Returns the scale of heads, given as float32 halves [BLOCK_H, C / 2]; `index` is that of keys or of values."""
    first, second = tl.abs(first), tl.abs(second)
    infinity = float("inf")  # NaN becomes infinity too, because a maximum may drop it
    largest = tl.maximum(tl.where(first < infinity, first, infinity), tl.where(second < infinity, second, infinity))
    largest = tl.max(largest, axis=1)
    if static_scale is not None:
        scale = tl.zeros_like(largest) + tl.load(static_scale + index)
    else:
        scale = tl.div_rn(largest, LARGEST)
    bits = tl.maximum(scale, LEAST_SCALE).to(tl.int32, bitcast=True)
    scale = ((bits + 0xFFFF) & -0x10000).to(tl.float32, bitcast=True)
    return tl.where(largest < infinity, scale, float("nan"))


@triton.jit
def to_numbers(x, scale, dtype: tl.constexpr, LARGEST: tl.constexpr):
    """Returns the numbers of float32 values, zeros where the scale is NaN."""
    x = tl.where(scale == scale, tl.div_rn(x, scale), 0.0)
    x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
    if dtype == tl.int8:
        x = (x + ROUNDER) - ROUNDER
    return x.to(dtype)


@triton.jit
def scaled_queries(q):
    """Returns queries [rows, C] for a product with numbers, and the powers of 2 [rows] that they are divided by.

    They are float16, or stay float32: that holds numbers exactly, one instruction converts two from FP8, and it has
    more digits than bfloat16. Divided by the power they are at most 2 and lose nothing but what is 2^-24 beside that.
    """
    wide = q.to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(wide), axis=1), LEAST_SCALE)
    exponent = largest.to(tl.int32, bitcast=True) & 0x7F800000
    inverse = (0x7F000000 - exponent).to(tl.float32, bitcast=True)
    scaled = wide * inverse[:, None]
    if q.dtype != tl.float32:
        scaled = scaled.to(tl.float16)
    return scaled, exponent.to(tl.float32, bitcast=True)


@triton.jit
def word_rows(rows, C: tl.constexpr):
    """Returns pointers to the words, of four numbers each, in rows of C numbers."""
    return rows.to(tl.pointer_type(tl.int32))[:, None] + tl.arange(0, C // 4)[None, :]


@triton.jit
def numbers_of(words, numbers: tl.constexpr, dtype: tl.constexpr, C: tl.constexpr, INLINE: tl.constexpr):
    """Returns numbers [rows, C], of type `numbers`, in the `dtype` of a product. `words` [rows, C / 4] hold four each.

    Words are read, because the compiler would hold single bytes in a register each. INLINE: whether inline assembly
    may be used, which makes four numbers with two instructions of FP8 and seven of int8.
    """
    if INLINE and dtype == tl.float16:
        asm: tl.constexpr = UNPACK_INT8 if numbers == tl.int8 else UNPACK_FP8
        low, high = tl.inline_asm_elementwise(
            asm, "=r,=r,r", [words], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )  # fmt: skip
        first, second = low.to(tl.int16).to(dtype, bitcast=True), (low >> 16).to(tl.int16).to(dtype, bitcast=True)
        third, fourth = high.to(tl.int16).to(dtype, bitcast=True), (high >> 16).to(tl.int16).to(dtype, bitcast=True)
    else:
        first = words.to(tl.int8).to(numbers, bitcast=True).to(dtype)
        second = (words >> 8).to(tl.int8).to(numbers, bitcast=True).to(dtype)
        third = (words >> 16).to(tl.int8).to(numbers, bitcast=True).to(dtype)
        fourth = (words >> 24).to(tl.int8).to(numbers, bitcast=True).to(dtype)
    return tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), [words.shape[0], C])


@triton.jit
def load_scales(words, mask):
    """Loads what attention needs of tokens' scales, from words of two: the scales of keys, and of values the exponents,
    the powers 2^-exponent, and the scales times these, which are from 1 to 2.

    Whoever masks tokens must not use their numbers.
    """
    word = tl.load(words) if mask is None else tl.load(words, mask=mask, other=0)
    k_scale, v_scale = (word << 16).to(tl.float32, bitcast=True), (word & -0x10000).to(tl.float32, bitcast=True)
    exponent = word & 0x7F800000
    inverse = (0x7F000000 - exponent).to(tl.float32, bitcast=True)
    return k_scale, exponent.to(tl.float32) * 2.0**-23 - 127.0, inverse, v_scale * inverse

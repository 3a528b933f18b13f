"""Rotary embedding on the device, for every kernel that applies it: an angle's sine and cosine, and the rotation.

`tl.sin` and `tl.cos` are right for any float32, but keep their long division of a large angle in local memory. Here the
angle is reduced once for both, x = n * pi/2 + r with |r| <= pi/4, and two polynomials in r give sine and cosine.

n * pi/2 is subtracted in four parts (Cody and Waite 1980). The first three parts have 8 bits, so their products with n
are exact in float32 up to |n| = 2^16; fused multiply-adds round only once, which keeps the differences exact far
beyond. The error is at most 1.2e-7 for |x| <= 102943, and on a GPU for |x| <= 2^21, where float32 positions are 1/4
apart.
"""

import triton
import triton.language as tl

INVERSE_PI_2: tl.constexpr = tl.constexpr(0.6366197723675814)
PI_2_A: tl.constexpr = tl.constexpr(1.5703125)
PI_2_B: tl.constexpr = tl.constexpr(0.0004825592041015625)
PI_2_C: tl.constexpr = tl.constexpr(1.2665987014770508e-06)
PI_2_D: tl.constexpr = tl.constexpr(9.92093629470503e-10)
ROUNDER: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2^23: the lowest bits of a sum with it hold the integer

# sin(r) = r + r^3 (S0 + S1 r^2 + S2 r^4), cos(r) = 1 - r^2 / 2 + r^4 (C0 + C1 r^2 + C2 r^4). The coefficients make the
# largest error smallest over |r| <= pi/4 + 0.03, because at the border n may be rounded the other way.
S0: tl.constexpr = tl.constexpr(-0.16666646301746368)
S1: tl.constexpr = tl.constexpr(0.00833176076412201)
S2: tl.constexpr = tl.constexpr(-0.0001946896518347785)
C0: tl.constexpr = tl.constexpr(0.04166664183139801)
C1: tl.constexpr = tl.constexpr(-0.0013887123204767704)
C2: tl.constexpr = tl.constexpr(2.4410395781160332e-05)


@triton.jit
def sin_cos(angle):
    """Returns sine and cosine of float32 angles with |angle| <= 102943 (2^21 on a GPU); they are undefined beyond."""
    rounded = angle * INVERSE_PI_2 + ROUNDER
    # Its lowest two bits say by how many quarter turns the angle was reduced.
    quarter = rounded.to(tl.int32, bitcast=True)
    n = rounded - ROUNDER
    r = tl.fma(n, -PI_2_A, angle)
    r = tl.fma(n, -PI_2_B, r)
    r = tl.fma(n, -PI_2_C, r)
    r = tl.fma(n, -PI_2_D, r)
    z = r * r
    sine = tl.fma(tl.fma(tl.fma(z, S2, S1), z, S0) * z, r, r)
    cosine = tl.fma(tl.fma(tl.fma(tl.fma(z, C2, C1), z, C0), z, -0.5), z, 1.0)
    odd = (quarter & 1) != 0
    sin = tl.where(odd, cosine, sine)
    cos = tl.where(odd, sine, cosine)
    return tl.where((quarter & 2) != 0, -sin, sin), tl.where(((quarter + 1) & 2) != 0, -cos, cos)


@triton.jit
def rotate(first, second, sin, cos):
    """Rotates the float32 halves of heads. The fused steps are written out, so that every kernel gets the same bits."""
    return tl.fma(first, cos, -(second * sin)), tl.fma(second, cos, first * sin)


@triton.jit
def rope_row(first, second, position, inv_freq, channel):
    """Rotates halves of a head (float32): `first` has channels `channel` < C / 2, `second` the channels C / 2 further.

    `position` is float32; `inv_freq` points to [C / 2] float32. All but the pointer may be blocks, which broadcast.
    """
    sin, cos = sin_cos(position * tl.load(inv_freq + channel))
    return rotate(first, second, sin, cos)


@triton.jit
def norm_heads(first, second, weight, C: tl.constexpr, eps):
    """Normalises heads, given as float32 halves [BLOCK_H, C / 2], and rounds values where `rms_norm` rounds them."""
    w1, w2 = tl.load(weight), tl.load(weight + C // 2)  # loaded before the reduction waits for the heads
    mean_square = (tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / C
    inverse_rms = (1.0 / tl.sqrt_rn(mean_square + eps))[:, None]
    first = (first * inverse_rms).to(w1.dtype).to(tl.float32) * w1.to(tl.float32)
    second = (second * inverse_rms).to(w2.dtype).to(tl.float32) * w2.to(tl.float32)
    return first.to(w1.dtype).to(tl.float32), second.to(w2.dtype).to(tl.float32)

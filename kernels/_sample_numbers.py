"""The numbers that `sample` computes with on the device. They are integers, so that sums do not depend on their order.

A logit has a weight: its probability over that of the largest logit, times 2^42, rounded down. It has an int32 key,
which is in the order of the values. Together with its token it has a place: a distinct int64, which is larger for a
larger key and, among equal keys, for a lower id.
"""

import triton
import triton.language as tl

LOWEST: tl.constexpr = tl.constexpr(-(2**31))  # below the key of any logit
INFINITY_KEY: tl.constexpr = tl.constexpr(0x7F800000)
MINUS_INFINITY_KEY: tl.constexpr = tl.constexpr(-0x7F800001)
ID_BITS: tl.constexpr = tl.constexpr(18)  # the low bits of a place, which hold the token; the others hold the key
LAST_ID: tl.constexpr = tl.constexpr(2**18 - 1)


@triton.jit
def order_key(x):
    """Returns an int32 key in the order of float32 `x`; -0 has the key of 0, and NaN one above infinity's."""
    bits = x.to(tl.int32, bitcast=True)
    key = tl.where(x == 0, 0, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return tl.where(x == x, key, 0x7FFFFFFF)


@triton.jit
def key_value(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def lowest_place(key):
    """Returns the lowest place that a token with this key can have; token 0 has the highest."""
    return key.to(tl.int64) << ID_BITS


@triton.jit
def place_of(key, token):
    return lowest_place(key) + (token ^ LAST_ID)


@triton.jit
def key_at(place):
    return (place >> ID_BITS).to(tl.int32)


@triton.jit
def token_at(place):
    return (place.to(tl.int32) & LAST_ID) ^ LAST_ID


@triton.jit
def token_weight(x, peak, rate):
    """Returns int64 2^42 * 2^(-(peak - x) * rate), and 0 from 43 octaves below the peak on.

    The two float32 operations round once each, and no compiler can fuse them. Everything else, a polynomial for 2^-f
    at 24 bits of f, is integer arithmetic. So every machine gets the same weights.
    """
    octaves = tl.minimum((peak - x) * rate, 43.0)
    fixed = (octaves * 16777216.0).to(tl.int32)
    f = (fixed << 8).to(tl.uint32, bitcast=True)  # the fraction f, times 2^32
    q = 0x53A2D4 - tl.umulhi(f, tl.full(f.shape, 0x72C75, tl.uint32))
    q = 0x273E53D - tl.umulhi(f, q)
    q = 0xE34B488 - tl.umulhi(f, q)
    q = 0x3D7F5BFB - tl.umulhi(f, q)
    q = 0xB1721652 - tl.umulhi(f, q)
    power = 0x80000000 - (tl.umulhi(f, q) >> 1)  # 2^31 * 2^-f
    return (power.to(tl.int64) << 11) >> (fixed >> 24).to(tl.int64)


@triton.jit
def philox_word(seed, counter):
    """Returns the first uint64 of numpy's Philox(key=seed, counter=counter): Philox4x64-10, which first counts up."""
    c0 = counter.to(tl.uint64, bitcast=True) + 1
    c1, c2, c3, k1 = c0 * 0, c0 * 0, c0 * 0, c0 * 0
    k0 = seed.to(tl.uint64, bitcast=True)
    m0 = tl.full(c0.shape, 0xD2E7470EE14C6C93, tl.uint64)
    m1 = tl.full(c0.shape, 0xCA5A826395121157, tl.uint64)
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, m0), c0 * m0
        high1, low1 = tl.umulhi(c2, m1), c2 * m1
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += 0x9E3779B97F4A7C15
        k1 += 0xBB67AE8584CAA73B
    return c0


@triton.jit
def uniform_below(mass, word):
    """Returns u * mass, rounded down, where u is the word's first 53 bits over 2^53, as in numpy's random()."""
    return tl.umulhi(word & 0xFFFFFFFFFFFFF800, mass.to(tl.uint64)).to(tl.int64)

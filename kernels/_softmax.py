"""What the softmaxes of attention kernels share: the exponential, and the sinks of heads.

A sink is a learned logit of a query head. It has a share in the softmax as a key with this score would, but no value.
"""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def probability(exponent, dtype: tl.constexpr):
    """Returns 2 ** exponent, at most 1, to be a factor of a product in `dtype`.

    The exponent score * scale - top is never above 0 in exact arithmetic. On hardware it can be, because score * scale
    - top is a fused multiply-add while top is a rounded product: from scores of 2^26 on it can be several units above
    0, and 2 to its power does not fit float16.
    """
    if dtype == tl.float16:
        exponent = tl.minimum(exponent, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.exp2(exponent)


@triton.jit
def load_sinks(sinks, heads, mask):
    """Loads the sinks of query heads, as logarithms to the base 2."""
    return tl.load(sinks + heads, mask=mask, other=0.0).to(tl.float32) * LOG2_E


@triton.jit
def total_with_sink(total, top, sink):
    """Returns a softmax's sum with the sink's share, once all keys are in it; `top` is finite.

    The sum may become infinite, where the sink leaves nothing to the keys. If the softmax began with the sink instead,
    a high one would make all weights so small that few of their digits fit 16 bits.
    """
    return total + tl.exp2(sink - top)

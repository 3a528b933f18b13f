"""The exponential that the softmaxes of all attention kernels share."""

import triton
import triton.language as tl


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

"""What the softmaxes of all attention kernels share."""

import triton
import triton.language as tl


@triton.jit
def probability(exponent, dtype: tl.constexpr):
    """2 ** exponent, as a factor of a product in `dtype`; at most 1.

    The exponent is a difference that is 0 at most, but hardware rounds only one side of it (score * scale - top is a
    fused multiply-add, top a rounded product): from scores of 2^26 on it can be several units above 0, and 2 to its
    power beyond the range of float16.
    """
    if dtype == tl.float16:
        exponent = tl.minimum(exponent, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.exp2(exponent)

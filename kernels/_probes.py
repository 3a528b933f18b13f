"""Kernels that measure a device and compute nothing: `internvl_rt/bench/roofline.py` times them."""

import triton
import triton.language as tl

EXP2_BLOCK, EXP2_STEPS = 1024, 16
EXP2_FIXED_POINT = 0.641186  # the fixed point of 2 ** -x, which every value comes to


@triton.jit
def exp2_kernel(values, ROUNDS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """Replaces each value x by 2 ** -x, ROUNDS * STEPS times."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(values + index)
    for _round in range(ROUNDS):
        for _step in tl.static_range(STEPS):
            x = tl.exp2(-x)
    tl.store(values + index, x)


@triton.jit
def node_kernel(x, PDL: tl.constexpr):
    """Does as little as a kernel can that depends on the kernel before it."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    tl.store(x, tl.load(x) + 1.0)

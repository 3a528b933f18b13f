"""RMSNorm: y = w * cast(x / sqrt(mean(x^2) + eps)) over the last dimension.

The quotient is taken in float32 and cast back to x's dtype before the weight is applied, as Qwen2, InternLM2 and
InternViT-6B do without apex.
"""

import torch
from torch import Tensor


def rms_norm_reference(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    return weight_D * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)

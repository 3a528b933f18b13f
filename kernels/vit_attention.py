"""Bidirectional attention of a vision tower, straight from the packed projection.

    o[i, u, h] = softmax(q[i, u, h] . k[i, :, h] / sqrt(C)) v[i, :, h]

The packed rows are (q | k | v), each [H, C]. InternViT-6B first normalises q and k by RMS over all heads' channels
together, not per head.
"""

import torch.nn.functional as F
from torch import Tensor

from internvl_rt.kernels.rms_norm import rms_norm_reference


def vit_attention_reference(
    qkv_IUK: Tensor, head_dim: int, q_norm_E: Tensor | None, k_norm_E: Tensor | None, eps: float
) -> Tensor:
    """Attention output [I, U, E] of the packed projection [I, U, 3E]."""
    q, k, v = qkv_IUK.chunk(3, dim=-1)
    if q_norm_E is not None and k_norm_E is not None:
        q, k = rms_norm_reference(q, q_norm_E, eps), rms_norm_reference(k, k_norm_E, eps)
    q, k, v = (t.view(*t.shape[:2], -1, head_dim).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

"""Bidirectional attention of a vision tower, straight from the packed projection.

    o[i, u, h] = softmax(q[i, u, h] . k[i, :, h] / sqrt(C)) v[i, :, h]

The rows lie patches first (see _contract): row i * L + l is patch l of tile i, row I * L + i the class token of tile i.
Each holds (q | k | v), each [H, C]. InternViT-6B first normalises q and k by RMS over all heads' channels
together, not per head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from internvl_rt.kernels.rms_norm import rms_norm_reference


def vit_attention_reference(
    qkv_RK: Tensor, num_tiles: int, head_dim: int, q_norm_E: Tensor | None, k_norm_E: Tensor | None, eps: float
) -> Tensor:
    """Attention output [R, E] of the packed projection [R, 3E]; R = num_tiles * (L + 1)."""
    q, k, v = qkv_RK.chunk(3, dim=-1)
    if q_norm_E is not None and k_norm_E is not None:
        q, k = rms_norm_reference(q, q_norm_E, eps), rms_norm_reference(k, k_norm_E, eps)
    q, k, v = (tile_tokens(t, num_tiles).unflatten(2, (-1, head_dim)).transpose(1, 2) for t in (q, k, v))
    y_IUE = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return torch.cat((y_IUE[:, :-1].flatten(0, 1), y_IUE[:, -1]))


def tile_tokens(x_RE: Tensor, num_tiles: int) -> Tensor:
    """[I, U, E], the class token last, of rows that lie patches first."""
    num_patch_rows = len(x_RE) - num_tiles
    patches_ILE = x_RE[:num_patch_rows].view(num_tiles, num_patch_rows // max(num_tiles, 1), x_RE.shape[1])
    return torch.cat((patches_ILE, x_RE[num_patch_rows:, None]), dim=1)

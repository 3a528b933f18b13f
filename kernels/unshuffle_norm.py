"""Pixel unshuffle and LayerNorm: n x n neighbouring patches become one visual token of n*n*E channels.

    y[i, (r, c)] = LayerNorm(concat over a, b of x[i, patch(n r + a, n c + b)])         a slow, b fast

The class rows, which lie last (see _contract), are not read. Version v2 stores token (r, c) at row-major place (r, c);
v1, an early release, at (c, r).
"""

from typing import Literal

from torch import Tensor

from internvl_rt.kernels.layer_norm import layer_norm_reference


def unshuffle_norm_reference(
    x_RE: Tensor,
    num_tiles: int,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    factor: int,
    version: Literal["v1", "v2"],
) -> Tensor:
    """Visual tokens [I, M, factor^2 * E] of ViT rows [I * (L + 1), E]; here D = factor^2 * E."""
    num_patch_rows, width = len(x_RE) - num_tiles, x_RE.shape[1]
    side = round((num_patch_rows // max(num_tiles, 1)) ** 0.5) // factor
    x = x_RE[:num_patch_rows].view(num_tiles, side, factor, side, factor, width).transpose(2, 3)
    if version == "v1":
        x = x.transpose(1, 2)
    return layer_norm_reference(x.reshape(num_tiles, side * side, factor * factor * width), weight_D, bias_D, eps)

"""A matrix product with what follows it: bias, exact GELU, or LayerScale and residual.

linear_gelu:      y = gelu(x W^T + b)                 gelu(t) = t * Phi(t), the erf form
linear_residual:  y = r + s * (x W^T + b)             s is LayerScale (ViT) or 1 (decoder)
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_gelu_reference(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    return F.gelu(F.linear(x, weight_NK, bias_N))


def linear_residual_reference(
    x: Tensor, weight_NK: Tensor, bias_N: Tensor | None, residual: Tensor, scale_N: Tensor | None
) -> Tensor:
    y = F.linear(x, weight_NK, bias_N)
    return residual + y if scale_N is None else torch.addcmul(residual, y, scale_N)

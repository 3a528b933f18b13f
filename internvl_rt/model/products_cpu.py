"""Products on a CPU: oneDNN's, which is compiled for the processor at hand, and MKL's where that is faster.

oneDNN adds up in an order that does not depend on how many threads compute; MKL may not. `bench/FACTS.md`, 47 and 48,
has the measurements.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from internvl_rt.model.processor import has_avx512, multiplies

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # of x, W and b: x W^T + b

MKL_ROWS = 256  # with AVX2, up to so many rows of float32 oneDNN is faster than MKL; with more MKL is, by a quarter
SMALL_WEIGHT = 1 << 16  # numbers of float32; oneDNN begins 9 us after a call, when MKL has often ended
PACKED_ROWS = 16  # the number of rows that packed weights are told to expect; the format is the same from 2 rows on
FEW_ROWS = 16  # of half precision that torch multiplies fast enough on a processor that cannot
COPIED = 4 << 20  # so many weights are copied at once


def packs(dtype: torch.dtype) -> bool:
    """Says whether weights are multiplied faster once they are laid out anew."""
    return multiplies(dtype) and (dtype != torch.float32 or has_avx512())


def pack(weight_NK: Tensor) -> Tensor:
    """Lays a weight out anew, but not one that MKL multiplies. Only oneDNN's products take the result."""
    if weight_NK.dtype == torch.float32 and weight_NK.numel() <= SMALL_WEIGHT:
        return weight_NK
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_NK, PACKED_ROWS)
    return packed


def product_of(dtype: torch.dtype) -> Product:
    if dtype == torch.float32:
        return float_product
    return onednn_product if multiplies(dtype) else half_product


def onednn_product(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """Multiplies by oneDNN. A weight that has gaps, or is a transposed view, takes a thousand times as long."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_NK, bias_N, "none", [], "")
    return y


def float_product(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """Multiplies in float32: a small weight by MKL, which `linear` calls, and many rows if it is faster."""
    many = x.numel() > MKL_ROWS * x.shape[-1] and not has_avx512()
    by_mkl = many or weight_NK.numel() <= SMALL_WEIGHT
    return F.linear(x, weight_NK, bias_N) if by_mkl else onednn_product(x, weight_NK, bias_N)


def half_product(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """Multiplies in half precision on a processor that cannot: many rows in float32, with copies of parts of W."""
    if x.numel() // x.shape[-1] <= FEW_ROWS:
        return F.linear(x, weight_NK, bias_N)
    x32, size = x.float(), max(1, COPIED // x.shape[-1])
    biases = [None] * -(-len(weight_NK) // size) if bias_N is None else torch.split(bias_N.float(), size)
    parts = zip(torch.split(weight_NK, size), biases, strict=True)
    return torch.cat([float_product(x32, weight.float(), bias).to(x.dtype) for weight, bias in parts], dim=-1)

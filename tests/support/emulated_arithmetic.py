"""Emulates the kernels' arithmetic in vectorised torch: roundings, products, sine and cosine (see emulated.py)."""

import torch
from torch import Tensor

from internvl_rt.kernels import _rope


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds to `dtype` and returns the result in float32."""
    return x.to(dtype).float()


def rounded_to_tf32(x: Tensor) -> Tensor:
    """Rounds to the nearest tf32 number, as gemv rounds its operands."""
    return ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


def product(x: Tensor, weight: Tensor, dtype: torch.dtype, start: Tensor | None = None) -> Tensor:
    """Computes start + x weight^T in float32 from operands of type `dtype`."""
    x, weight = x.float(), weight.float()
    if dtype != torch.float32:
        sums = x @ weight.mT
        return sums if start is None else sums + start
    sums = torch.zeros(1) if start is None else start
    x64, weight64 = x.double(), weight.double()
    for k in range(x.shape[-1]):
        sums = (x64[..., :, None, k] * weight64[..., None, :, k] + sums.double()).float()
    return sums.expand(*x.shape[:-1], weight.shape[-2])


def fused_multiply_add(x: Tensor, y: Tensor | float, z: Tensor | float) -> Tensor:
    """Computes x y + z and rounds once, to float32."""
    x, y, z = (torch.as_tensor(each, dtype=torch.float64) for each in (x, y, z))
    return (x * y + z).float()


def sin_cos(angle: Tensor) -> tuple[Tensor, Tensor]:
    """Computes sine and cosine as the kernels do, with the kernels' coefficients."""
    n = (angle * _rope.INVERSE_PI_2.value).round()
    r = angle
    for part in (_rope.PI_2_A, _rope.PI_2_B, _rope.PI_2_C, _rope.PI_2_D):
        r = fused_multiply_add(n, -torch.tensor(part.value), r)
    z, sine, cosine = r * r, _rope.S2.value, _rope.C2.value
    for s, c in ((_rope.S1, _rope.C1), (_rope.S0, _rope.C0)):
        sine, cosine = fused_multiply_add(z, sine, s.value), fused_multiply_add(z, cosine, c.value)
    sine = fused_multiply_add(sine * z, r, r)
    cosine = fused_multiply_add(fused_multiply_add(cosine, z, -0.5), z, 1.0)
    quarter = n.long() & 3
    odd = quarter % 2 == 1
    sin, cos = torch.where(odd, cosine, sine), torch.where(odd, sine, cosine)
    return torch.where(quarter >= 2, -sin, sin), torch.where((quarter == 1) | (quarter == 2), -cos, cos)

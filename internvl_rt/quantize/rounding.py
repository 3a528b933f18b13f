"""Dense weights to the numbers and scales of compressed-tensors, and back; a row's do not depend on the other rows."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from internvl_rt.model.linear import E4M3_MAX

_PART = 1 << 24  # numbers that are rounded at once
_HALF_RANGE = 7.5  # of the 16 numbers -8 ... 7: half of their distance
_ZERO = 8  # what is added to a number so that it is 0 ... 15 in a file


@dataclass(frozen=True, slots=True)
class Rounded:
    """A rounded weight.

    numbers_NK: float8_e4m3fn, or uint8 0 ... 15
    scale_NG: in the dtype of the file; one for each row of FP8 numbers, or for each group of 4-bit ones
    zero_NG: uint8, of asymmetric groups
    """

    numbers_NK: Tensor
    scale_NG: Tensor
    zero_NG: Tensor | None = None

    def dense(self) -> Tensor:
        """Returns W [N, K] as float32."""
        if self.numbers_NK.dtype == torch.float8_e4m3fn:
            return self.numbers_NK.float() * self.scale_NG.float()
        zero = _ZERO if self.zero_NG is None else self.zero_NG.float()[..., None]
        values = self.numbers_NK.float().view(*self.scale_NG.shape, -1)
        return ((values - zero) * self.scale_NG.float()[..., None]).view(self.numbers_NK.shape)

    def stored(self, rows: Tensor) -> dict[str, Tensor]:
        """Returns the tensors of a module of these rows, by the last part of their names, on the CPU."""
        numbers, scale = _take(self.numbers_NK, rows), self.scale_NG[rows].cpu()
        if numbers.dtype == torch.float8_e4m3fn:
            return {"weight": numbers, "weight_scale": scale}
        shape = torch.tensor(numbers.shape, dtype=torch.int64)
        tensors = {"weight_packed": pack_columns(numbers), "weight_scale": scale, "weight_shape": shape}
        if self.zero_NG is not None:
            tensors["weight_zero_point"] = pack_columns(self.zero_NG[rows].cpu().t().contiguous()).t().contiguous()
        return tensors


def _take(numbers: Tensor, rows: Tensor) -> Tensor:
    """Copies rows; as bytes, because torch does not index FP8 numbers on every device."""
    return numbers.view(torch.uint8)[rows].cpu().view(numbers.dtype)


def pack_columns(q_NK: Tensor) -> Tensor:
    """Packs eight neighbouring numbers 0 ... 15, uint8 [N, K], into a word, the first one in its low bits."""
    pairs = q_NK[:, 0::2] | q_NK[:, 1::2] << 4
    return pairs.reshape(-1).view(torch.int32).view(len(q_NK), -1)


def row_parts(weight_NK: Tensor) -> Iterator[slice]:
    """Yields slices of rows which together are all, so that work on one takes little memory."""
    size = max(1, _PART // weight_NK.shape[1])
    for start in range(0, len(weight_NK), size):
        yield slice(start, start + size)


def round_fp8(weight_NK: Tensor, dtype: torch.dtype) -> Rounded:
    """Rounds to float8_e4m3fn; the largest number of a row becomes 448. dtype: of the scales."""
    numbers = torch.empty(weight_NK.shape, dtype=torch.float8_e4m3fn, device=weight_NK.device)
    scale_N1 = torch.empty((len(weight_NK), 1), dtype=dtype, device=weight_NK.device)
    for rows in row_parts(weight_NK):
        part = weight_NK[rows].float()
        scale_N1[rows] = _scale(part.abs().amax(1, keepdim=True) / E4M3_MAX, dtype)
        numbers[rows] = (part / scale_N1[rows].float()).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return Rounded(numbers, scale_N1)


def round_int4(
    weight_NK: Tensor, group: int, *, asymmetric: bool, dtype: torch.dtype, ratio_NG: Tensor | None = None
) -> Rounded:
    """Rounds to 4 bits as compressed-tensors' min-max observer does. dtype: of the scales.

    ratio_NG: by what each group's range is multiplied before; numbers outside saturate
    """
    n, k = weight_NK.shape
    values = weight_NK.float().view(n, k // group, group)
    ratio = 1.0 if ratio_NG is None else ratio_NG
    if not asymmetric:
        scale_NG = _scale(values.abs().amax(2) * ratio / _HALF_RANGE, dtype)
        q = (values / scale_NG.float()[..., None]).round_().add_(_ZERO).clamp_(0, 15)
        return Rounded(q.to(torch.uint8).view(n, k), scale_NG)
    low, high = (values.amin(2) * ratio).clamp_(max=0), (values.amax(2) * ratio).clamp_(min=0)
    scale_NG = _scale((high - low) / 15, dtype)
    zero_NG = (-low / scale_NG.float()).round_().clamp_(0, 15)
    q = (values / scale_NG.float()[..., None]).round_().add_(zero_NG[..., None]).clamp_(0, 15)
    return Rounded(q.to(torch.uint8).view(n, k), scale_NG, zero_NG.to(torch.uint8))


def _scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns scales in a file's dtype, above 0, so that zeros can be divided by theirs."""
    return scale.to(dtype).clamp_(min=torch.finfo(dtype).tiny)

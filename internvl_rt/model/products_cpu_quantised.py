"""Products of quantised weights on a CPU, by torch's own kernels for 8 and 4 bits where they beat dense products.

* In bfloat16 few rows are multiplied by a kernel that reads the numbers themselves. It adds up every row in one order,
  so a row's bits depend on no other row, on no number of rows, and on no number of threads.
* More rows, other dtypes and float8 numbers are multiplied as in `products_cpu.py`, with dense copies of a part of the
  weight, which are made anew for each product. Those bits may depend on the number of rows.

Those kernels are there for AVX2 and AVX512, but for bfloat16 alone: other dtypes take them 7 to 15 times as long as a
dense product. torch has none for float8. `bench/FACTS.md` has the measurements.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from internvl_rt.kernels._int4 import unpack_int4
from internvl_rt.model.linear import Linear4, Linear8
from internvl_rt.model.products_cpu import COPIED, product_of

ROWS_8, ROWS_4 = 20, 64  # up to so many rows the kernels are faster than products with dense copies
WIDTH = 64  # rows of a weight of 4 bits, of which blocks consist; a block has them all, or half
VECTOR = 16  # columns that the kernel for 8 bits reads at once
ALIGNED = 64  # bytes; where rows begin elsewhere, that kernel ends the process
BIAS_RATIO = 2.0**120  # an exponent's bias is 127 in a bfloat16, 7 in an e4m3
SIGN_AND_NUMBER = -0x7810  # as int16, 0x87f0: what an e4m3 fills of a bfloat16


@dataclass(frozen=True, slots=True)
class PackedLinear4(Linear4):
    """A `Linear4` as torch's kernel reads it. Its scales are float32 where bfloat16 is not computed in.

    words_NW: uint8 [N, K / 2], whose memory is [N / B, K, B / 2]: a byte holds a number of row r of a block of B rows,
        and above it that of row r + B / 2
    scale_NG: [N, G, 2], whose memory is [G, N, 2]: the scale, and (8 - zero) scale
    zero_NG: None
    """

    def dense(self, dtype: torch.dtype) -> Tensor:
        return torch.cat([part_NK.to(dtype) for part_NK in unpack(self)])


def pack_quantised(linear: Linear8 | Linear4, dtype: torch.dtype) -> Linear8 | Linear4:
    """Returns a weight as `quantised_product` multiplies it in a dtype. It may share memory with the given one.

    In bfloat16 scales are rounded, but for those of blocks of 8-bit numbers. A product then is as near to the exact one
    as that of the weight rounded to bfloat16: 2.4e-3 of it, where the numbers' own rounding is 8e-3 (int8) and more.
    4 bits stay as they are unless K is a multiple of the group, and N one of 64.
    """
    if isinstance(linear, Linear8):
        scale_NG = linear.scale_NG.to(dtype) if is_scaled_last(linear, dtype) else linear.scale_NG
        return replace(linear, weight_NK=aligned(linear.weight_NK), scale_NG=scale_NG)
    n, k = linear.num_outputs, linear.num_inputs
    if isinstance(linear, PackedLinear4) or n % WIDTH != 0 or k % linear.group != 0:
        return linear
    words_NB = torch.empty(n, k // 2, dtype=torch.uint8)
    for rows in parts_of_rows(linear):
        words_NB[rows] = pack_numbers(unpack_int4(linear.words_NW[rows], k))
    scale_GN = linear.scale_NG.t().float()
    zero_GN = torch.full_like(scale_GN, 8.0) if linear.zero_NG is None else linear.zero_NG.t().float()
    pairs_GN2 = torch.stack((scale_GN, (8.0 - zero_GN) * scale_GN), dim=-1)
    scale_NG2 = pairs_GN2.to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32).transpose(0, 1)
    return PackedLinear4(words_NB, scale_NG2, None, linear.bias_N, k, linear.group)


def quantised_product(x: Tensor, linear: Linear8 | Linear4, bias_N: Tensor | None) -> Tensor:
    """Computes x W^T + b of a weight that `pack_quantised` made for x's dtype."""
    k = x.shape[-1]
    num_rows = x.numel() // k
    y: Tensor
    match linear:
        case PackedLinear4() if x.dtype == torch.bfloat16 and num_rows <= ROWS_4:
            pairs_GN2 = linear.scale_NG.transpose(0, 1)
            y = torch._weight_int4pack_mm_for_cpu(x.reshape(num_rows, k), linear.words_NW, linear.group, pairs_GN2)
        case Linear8() if x.dtype == torch.bfloat16 and num_rows <= ROWS_8 and suits_kernel(linear):
            rows = aligned(x.reshape(num_rows, k))
            y = torch._weight_int8pack_mm(rows, linear.weight_NK, linear.scale_NG.view(-1))
        case _:
            multiply = product_of(x.dtype)
            parts = [multiply(x, part_NK, None) for part_NK in dense_parts(linear, x.dtype)]
            y = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
            if isinstance(linear, Linear8) and is_scaled_last(linear, x.dtype):
                y.mul_(linear.scale_NG.view(-1))
    y = y.view(*x.shape[:-1], linear.num_outputs)
    return y if bias_N is None else y.add_(bias_N)


def suits_kernel(linear: Linear8) -> bool:
    """Says whether torch's kernel takes a weight, which those of experts, that are not packed, do not."""
    is_packed = linear.scale_NG.dtype == torch.bfloat16 and linear.scale_NG.shape[1] == 1
    return linear.weight_NK.dtype == torch.int8 and is_packed and linear.num_inputs % VECTOR == 0


def is_scaled_last(linear: Linear8, dtype: torch.dtype) -> bool:
    """Says whether the products are scaled, not the weight; products of numbers as large as 448 overflow float16."""
    return linear.scale_NG.shape[1] == 1 and dtype != torch.float16


def dense_parts(linear: Linear8 | Linear4, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yields W in parts of its rows, without its scale if products are scaled last."""
    if isinstance(linear, PackedLinear4):
        yield from (part_NK.to(dtype) for part_NK in unpack(linear))
    elif isinstance(linear, Linear8) and is_scaled_last(linear, dtype):
        yield from (widen(linear.weight_NK[rows], dtype) for rows in parts_of_rows(linear))
    else:
        yield from (linear.take_rows(rows).dense(dtype) for rows in parts_of_rows(linear))


def unpack(linear: PackedLinear4) -> Iterator[Tensor]:
    """Yields W in parts of its rows, in the dtype of the scales. A part is the transposed view of one [K, rows]."""
    k, group, width = linear.num_inputs, linear.group, rows_of_block()
    scale_GN, shift_GN = linear.scale_NG.transpose(0, 1).unbind(-1)
    for rows in parts_of_rows(linear):
        bytes_KSB = linear.words_NW[rows].view(-1, k, width // 2).transpose(0, 1)
        part = torch.empty(k, bytes_KSB.shape[1], 2, width // 2, dtype=scale_GN.dtype)
        part[:, :, 0] = (bytes_KSB & 15).view(torch.int8).sub_(8)
        part[:, :, 1] = (bytes_KSB >> 4).view(torch.int8).sub_(8)
        part = part.view(k // group, group, -1)
        scale, shift = (of_GN[:, None, rows].contiguous() for of_GN in (scale_GN, shift_GN))
        yield torch.addcmul(shift, part, scale, out=part).view(k, -1).t()


def widen(number_NK: Tensor, dtype: torch.dtype) -> Tensor:
    """Converts int8 or float8_e4m3fn numbers, none of which is NaN, to a wider dtype, which holds each of them.

    torch converts float8 numbers one by one. Here their bits are moved to where a bfloat16 has them, and multiplied by
    what the bias of its exponent differs by. This is right for subnormal numbers too.
    """
    if number_NK.dtype == torch.int8:
        return number_NK.to(dtype)
    bits_NK = number_NK.view(torch.int8).to(torch.int16).bitwise_left_shift_(4).bitwise_and_(SIGN_AND_NUMBER)
    return bits_NK.view(torch.bfloat16).mul_(BIAS_RATIO).to(dtype)


def parts_of_rows(linear: Linear8 | Linear4) -> Iterator[slice]:
    size = max(1, COPIED // linear.num_inputs // WIDTH) * WIDTH
    return (slice(start, start + size) for start in range(0, linear.num_outputs, size))


def pack_numbers(number_NK: Tensor) -> Tensor:
    packed: Tensor = torch._convert_weight_to_int4pack_for_cpu(number_NK.int(), 1)
    return packed


@cache
def rows_of_block() -> int:
    """Finds how many rows of 4 bits torch lays out in a block on this processor: 64 with AVX512, else 32."""
    number_NK = torch.zeros(WIDTH, 32, dtype=torch.uint8)
    number_NK[WIDTH // 2] = 1
    is_in_the_first_byte = int(pack_numbers(number_NK).view(-1)[0]) != 0
    return WIDTH if is_in_the_first_byte else WIDTH // 2


def aligned(matrix: Tensor) -> Tensor:
    """Returns a matrix whose rows lie one after another, from an address that the kernel for 8 bits can read."""
    matrix = matrix.contiguous()
    return matrix if matrix.data_ptr() % ALIGNED == 0 else matrix.clone()

"""The weights of a layer as small frozen values. Only the tables of operations unpack them.

A linear computes y = x W^T + b. Its kind says how W is held: as it is (`Linear`), in 8 bits (`Linear8`) or in 4 bits
(`Linear4`). A kind knows what it multiplies out to (`dense`) and how its rows and columns are cut (`take_rows`,
`take_columns`: a shard is of the same kind); its bytes are those of its tensors. `model/stored_linear.py` knows its
tensors in a file.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from internvl_rt.kernels._fp8_rows import quantise
from internvl_rt.kernels._int4 import pack_int4, unpack_int4
from internvl_rt.kernels._numbers_8bit import BLOCK as BLOCK
from internvl_rt.kernels.dequantise import dequantise_reference
from internvl_rt.kernels.swiglu import Gate

E4M3_MAX, INT8_MAX = 448.0, 127.0
SMALLEST_GROUP = 32  # of 4-bit numbers
Inputs = Literal["full", "token", "static"]
# What ranks do with their products with a shard, if anything: add them up, or let rank 0 gather the outputs.
Join = Literal["add", "gather"] | None


@dataclass(frozen=True, slots=True)
class Linear:
    """The dense kind."""

    weight_NK: Tensor
    bias_N: Tensor | None
    join: Join = None

    @property
    def num_outputs(self) -> int:
        return self.weight_NK.shape[0]

    @property
    def num_inputs(self) -> int:
        return self.weight_NK.shape[1]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Returns W [N, K] in `dtype`."""
        return self.weight_NK.to(dtype)

    def take_rows(self, rows: slice) -> "Linear":
        return Linear(self.weight_NK[rows], None if self.bias_N is None else self.bias_N[rows])

    def take_columns(self, columns: slice) -> "Linear":
        """Returns a shard of K, without a bias, which is added once."""
        return Linear(self.weight_NK[:, columns], None)


@dataclass(frozen=True, slots=True)
class Linear8:
    """8-bit numbers with scales: W[n, k] = weight[n, k] * scale[n, k // 128], or scale[n, 0] if a row has one scale.

    inputs: how a product may round its inputs to 8 bits: not at all, by the largest of each row, or by `input_scale_1`.
    """

    weight_NK: Tensor  # float8_e4m3fn or int8
    scale_NG: Tensor  # float32
    bias_N: Tensor | None
    inputs: Inputs = "full"
    input_scale_1: Tensor | None = None  # float32
    join: Join = None

    @property
    def num_outputs(self) -> int:
        return self.weight_NK.shape[0]

    @property
    def num_inputs(self) -> int:
        return self.weight_NK.shape[1]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Returns W [N, K] in `dtype`: numbers times scales in float32, rounded once."""
        return dequantise_reference(self.weight_NK, self.scale_NG, None, self.weight_NK.shape[1], dtype=dtype)

    def take_rows(self, rows: slice) -> "Linear8":
        bias_N = None if self.bias_N is None else self.bias_N[rows]
        return replace(self, weight_NK=self.weight_NK[rows], scale_NG=self.scale_NG[rows], bias_N=bias_N)

    def take_columns(self, columns: slice) -> "Linear8":
        """Returns a shard of K, without a bias. Raises ValueError unless it begins and ends between blocks."""
        scale_NG = self.scale_NG
        if scale_NG.shape[1] > 1:
            start, stop = _borders(columns, self.num_inputs, BLOCK)
            scale_NG = scale_NG[:, start // BLOCK : -(-stop // BLOCK)]
        return replace(self, weight_NK=self.weight_NK[:, columns], scale_NG=scale_NG, bias_N=None)


@dataclass(frozen=True, slots=True)
class Linear4:
    """4-bit numbers with scales: W[n, k] = (number[n, k] - zero[n, k // group]) * scale[n, k // group].

    `kernels/_int4.py` says how the numbers, 0 ... 15, lie in the words.
    """

    words_NW: Tensor  # int32
    scale_NG: Tensor  # a floating-point dtype, as it is stored
    zero_NG: Tensor | None  # uint8; None: 8 everywhere
    bias_N: Tensor | None
    num_inputs: int
    group: int  # columns that share a scale: 32, 64 or 128
    join: Join = None

    @property
    def num_outputs(self) -> int:
        return self.words_NW.shape[0]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Returns W [N, K] in `dtype`: numbers times scales in float32, rounded once."""
        numbers = self.words_NW, self.scale_NG, self.zero_NG, self.num_inputs
        return dequantise_reference(*numbers, group=self.group, dtype=dtype)

    def take_rows(self, rows: slice) -> "Linear4":
        zero_NG, bias_N = (None if each is None else each[rows] for each in (self.zero_NG, self.bias_N))
        return replace(self, words_NW=self.words_NW[rows], scale_NG=self.scale_NG[rows], zero_NG=zero_NG, bias_N=bias_N)

    def take_columns(self, columns: slice) -> "Linear4":
        """Returns a shard of K, without a bias; of a smaller group if it begins inside of one. Packs the numbers anew.

        Raises ValueError unless it begins and ends at multiples of 32.
        """
        start, stop = _borders(columns, self.num_inputs, SMALLEST_GROUP)
        return replace(
            self,
            words_NW=pack_int4(unpack_int4(self.words_NW, self.num_inputs)[:, start:stop]),
            scale_NG=take_groups(self.scale_NG, self.group, start, stop),
            zero_NG=None if self.zero_NG is None else take_groups(self.zero_NG, self.group, start, stop),
            bias_N=None,
            num_inputs=stop - start,
            group=group_from(self.group, start),
        )


def group_from(group: int, start: int) -> int:
    """Returns the size of the groups of a shard that begins at column `start`: none is of two groups of the whole."""
    return math.gcd(group, start)


def take_groups(x_NG: Tensor, group: int, start: int, stop: int) -> Tensor:
    """Returns the scales or zeros of columns start ... stop, in groups of `group_from`, some of them repeated."""
    smaller = group_from(group, start)
    return x_NG.repeat_interleave(group // smaller, 1)[:, start // smaller : -(-stop // smaller)]


def _borders(columns: slice, num_columns: int, unit: int) -> tuple[int, int]:
    start, stop, _ = columns.indices(num_columns)
    if start % unit or (stop % unit and stop < num_columns):
        raise ValueError(f"columns: expected borders at multiples of {unit}, got {start} and {stop}")
    return start, stop


AnyLinear = Linear | Linear8 | Linear4
QuantisedLinear = Linear8 | Linear4


def tensors_of(linear: AnyLinear) -> dict[str, Tensor]:
    """Returns the tensors of a linear by the name of their field, without those that it does not have."""
    found = {field.name: getattr(linear, field.name) for field in fields(linear)}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def quantise_to_8_bits(
    linear: Linear, numbers: torch.dtype, inputs: Inputs = "full", agree: Callable[[Tensor], Tensor] | None = None
) -> Linear8:
    """Rounds a dense weight to float8_e4m3fn or int8, with one scale a row: the largest number becomes 448 or 127.

    agree: for a shard of K; of the largest number of each row, float32 [N], it returns that of the whole row.

    It works in parts of rows, so that little more memory is taken than the result. A row of zeros has scale 0.
    """
    weight_NK, (n, k) = linear.weight_NK, linear.weight_NK.shape
    largest = E4M3_MAX if numbers.is_floating_point else INT8_MAX
    made_NK = torch.empty((n, k), dtype=numbers, device=weight_NK.device)
    size = max(1, _PART // k)
    parts = [slice(start, start + size) for start in range(0, n, size)]
    absmax_N = torch.cat([weight_NK[part].float().abs().amax(1) for part in parts])
    scale_N1 = (absmax_N if agree is None else agree(absmax_N))[:, None] / largest
    for part in parts:
        numbers_NK = (weight_NK[part].float() / scale_N1[part]).nan_to_num_(0.0).clamp_(-largest, largest)
        made_NK[part] = numbers_NK if numbers.is_floating_point else numbers_NK.round_()
    return Linear8(made_NK, scale_N1, linear.bias_N, inputs)


_PART = 1 << 24  # numbers that are rounded at once


def round_inputs(x: Tensor, linear: Linear8) -> Tensor:
    """Returns x [..., K] rounded to FP8 as the linear's `inputs` says, in x's dtype."""
    if linear.inputs == "full" or linear.weight_NK.dtype != torch.float8_e4m3fn:
        return x
    number_RK, scale_R = quantise(x.reshape(-1, x.shape[-1]), linear.input_scale_1)
    return (number_RK.float() * scale_R[:, None]).to(x.dtype).view(x.shape)


@dataclass(frozen=True, slots=True)
class GatedMlp:
    """The second half of a decoder layer: x + SwiGLU(norm(x) W_gate_up^T) W_down^T."""

    gate_up: AnyLinear  # rows: gate, up
    down: AnyLinear

    @property
    def first(self) -> AnyLinear:
        """The weight that is multiplied with first."""
        return self.gate_up


@dataclass(frozen=True, slots=True)
class Experts:
    """A second half that consists of many gated MLPs, of which the router chooses some for each token.

    all_gate_up, all_down: the weights of one expert after the other, as rows of one linear; of a rank perhaps those of
        some experts alone
    num_chosen: how many experts a token has
    renormalises: whether the chosen ones' probabilities are divided by their sum
    gate: what an expert's gate and up are multiplied to: silu(gate) up, or that of `kernels/expert_gate_up.py`
    first_here: the first expert whose weights are here
    """

    router: Linear
    all_gate_up: AnyLinear
    all_down: AnyLinear
    num_chosen: int
    renormalises: bool
    gate: Gate = "silu"
    first_here: int = 0

    @property
    def first(self) -> AnyLinear:
        """The weight that is multiplied with first."""
        return self.router

    @property
    def num_here(self) -> int:
        """How many experts have their weights here."""
        return self.all_down.num_outputs // self.router.num_inputs

    def expert(self, index: int) -> GatedMlp:
        """Returns one of the experts that are here, counted from the first of these."""
        num_here, parts = self.num_here, []
        for linear in (self.all_gate_up, self.all_down):
            size = linear.num_outputs // num_here
            parts.append(linear.take_rows(slice(index * size, (index + 1) * size)))
        return GatedMlp(*parts)


@dataclass(frozen=True, slots=True)
class Norm:
    """LayerNorm with a bias; RMSNorm without one."""

    weight_D: Tensor
    bias_D: Tensor | None
    eps: float


def bias_of(part: AnyLinear | Norm) -> Tensor:
    """Returns the bias of a part that always has one: the patch embedding, or the projector's norm or first product."""
    bias = part.bias_D if isinstance(part, Norm) else part.bias_N
    assert bias is not None, "this part of every InternVL has a bias"
    return bias


def qk_weights(q_norm: Norm | None, k_norm: Norm | None) -> tuple[Tensor | None, Tensor | None, float]:
    """Returns the weights of the norms on q and k, and their eps; no weights where there are no norms."""
    if q_norm is None or k_norm is None:
        return None, None, 0.0
    return q_norm.weight_D, k_norm.weight_D, q_norm.eps

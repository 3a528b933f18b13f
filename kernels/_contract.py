"""What every kernel file agrees on.

One file is one operation: the formula, the plain torch reference, the jitted body, the plan, the launcher and `SPEC`.
The reference is the definition: tests compare everything else with it. The plan is a pure function of shapes, dtypes
and the target; it works on tensors of the device "meta", so that a test can build every kernel that a real model needs
for every architecture on a machine without a GPU.

Tensors that are computed with end in their dimensions; the letters mean the same thing across the repository:

    T tokens in this step      I image tiles in this step          V vocabulary
    S sequences in this step   U patches per tile (CLS included)   B blocks in the KV pool
    D decoder width            E vision width                      P token slots per block
    F MLP width                M visual tokens per tile            N blocks per sequence (table width)
    H query heads   G key/value heads (G divides H)   C channels per head
    L patches per tile (CLS not included)
    X visual tokens of several tiles, in prompt order              R rows, of whatever
    K, N in a weight: inputs and outputs, stored [N, K] as the checkpoints do

The rows of a vision tower lie patches first: the I * L patch rows of all tiles, tile after tile, then the I class rows.
So the patch rows of one tile are 1024 and products over them fill the chip's tiles exactly.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch

from internvl_rt.kernels._launch import Launch


@dataclass(frozen=True, slots=True)
class Cost:
    """The least that the operation must do: every input read once, every output written once."""

    bytes: int
    flops: int


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far an output may be from the reference run in float64 on the same (rounded) inputs.

    |y - ref| <= atol + rtol * |ref| for every element, and ||y - ref|| <= norm_limit(ref), about rms * ||ref||, which
    catches errors with structure. `reason` says where the figures come from; tests/support/tolerance_room.py measures
    how much of them is used.
    """

    rtol: float
    atol: float
    rms: float
    reason: str

    def norm_limit(self, expected: torch.Tensor) -> float:
        """rms * ||ref|| for many elements, more for few and for small ones.

        Of n roundings of equal weight the rms error has a deviation of about 1 / (2 sqrt(n)) of itself; the limit
        leaves room for four of them. Where elements differ, n is (sum ref^2)^2 / (sum ref^4): the few large ones count.
        A small output's relative error says nothing (gelu(-5) keeps two digits in float32): every element may be wrong
        by a twentieth of `atol`.
        """
        square = expected.double().square()
        norm = float(square.sum().sqrt())
        few = float(square.norm()) / norm**2 if norm else 0.0  # 1 / sqrt(n)
        return (1.0 + 2.0 * few) * max(self.rms * norm, self.atol / 20 * sqrt(expected.numel()))


@dataclass(frozen=True, slots=True)
class Case:
    """One set of arguments: sizes by the legend's letters, and whatever else `make_inputs` asks for."""

    name: str
    sizes: Mapping[str, Any]

    def __getitem__(self, size: str) -> Any:
        return self.sizes[size]


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """All that tests and benches know of an operation.

    `make_inputs(case, dtype, device)` gives the keyword arguments that reference, plan and launcher share (the plan
    takes `target` besides; the launcher `out`, unless the operation works in place). On the device "meta" it makes
    shapes only; elsewhere it draws from torch's default generator, which the caller seeds.
    """

    name: str
    reference: Callable[..., Any]
    plan: Callable[..., tuple[Launch, ...]]
    launcher: Callable[..., Any]
    make_inputs: Callable[[Case, torch.dtype, torch.device], dict[str, Any]]
    cost: Callable[[Case, torch.dtype], Cost]
    test_cases: tuple[Case, ...]  # small and adversarial: the interpreter runs them
    model_cases: tuple[Case, ...]  # of real models: built for every target, and benchmarked
    tolerances: Mapping[torch.dtype, Tolerance]
    in_place: tuple[str, ...] = ()  # arguments that the operation writes; without a result of its own it has no `out`
    exact: bool = False  # whether the result must equal the reference bit for bit


def require(condition: bool, name: str, expected: object, given: object) -> None:
    """What every launcher checks its arguments with: raises ValueError naming the argument."""
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {given}")


def require_one_of(name: str, given: object, allowed: Collection[object]) -> None:
    if given not in allowed:
        raise ValueError(f"{name}: expected one of {list(allowed)}, got {given}")


def rows_of(name: str, x: torch.Tensor) -> torch.Tensor:
    """`x` [..., D] as a view [R, D]; raises ValueError when no single stride leads through its rows."""
    try:
        return x.view(-1, x.shape[-1])
    except RuntimeError:
        raise ValueError(f"{name}: expected rows at one stride, got strides {x.stride()} of {tuple(x.shape)}") from None


def require_tensor(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """A tensor of exactly this shape, dtype and device whose last dimension is contiguous."""
    if tensor.shape == shape and tensor.dtype == dtype and tensor.device == device:
        if shape[-1] <= 1 or tensor.stride(-1) == 1:
            return  # as nearly always; the texts of the others take several microseconds
        raise ValueError(f"{name}: expected a contiguous last dimension, got strides {tensor.stride()}")
    require(tensor.shape == shape, name, f"shape {shape}", tuple(tensor.shape))
    require(tensor.dtype == dtype, name, dtype, tensor.dtype)
    require(tensor.device == device, name, f"a tensor on {device}", f"one on {tensor.device}")

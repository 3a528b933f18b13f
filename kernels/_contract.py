"""The rules that every kernel file follows, and the types that describe an operation.

One file is one operation: the formula, the plain torch reference, the jitted body, the plan, the launcher and `SPEC`.
The reference is the definition: tests compare everything else with it. A plan allocates the scratch memory of its
launches and copies their tables to the device; apart from that it is a pure function of shapes, memory layouts, dtypes
and the target. It works on tensors of the device "meta", so that a test can build every kernel that a real model needs
for every architecture on a machine without a GPU.

Names of tensors that are computed with end in their dimensions. Some letters have several meanings, which are listed
one after another; the rest of the name says which one holds:

    T tokens in this step      I image tiles in this step          V vocabulary
    B blocks in the KV pool    U patches per tile (CLS included)   E vision width
    P token slots per block    M visual tokens per tile            F MLP width
    G key/value heads (G divides H)   C channels per head          R rows of any kind
    X visual tokens of several tiles, in prompt order; experts of a layer
    J experts that a token has chosen
    Q pairs of a token and one of its experts: pair t * J + j
    S sequences in this step; the side of a tile in pixels
    D decoder width; the width of a row that is normalised
    H query heads; the height of a picture
    L patches per tile (CLS not included); tokens of one sequence in `paged_attention`; layers in `copy_blocks`
    K, N inputs and outputs of a weight, which is stored as [N, K], as in the checkpoints
    K also columns of packed q, k and v; keys and values, 2, in `copy_blocks`; listed, kept or likeliest tokens of a row
    N also blocks per sequence (table width); pairs of blocks in `copy_blocks`
    B also blocks of places of pairs
    W items of a split plan; words of a grammar's mask; the width of a picture; places of pairs by expert, with gaps

In a vision tower the I * L patch rows of all tiles come first, tile after tile, and the I class rows come last. So a
tile has 1024 patch rows, and the blocks of a matrix product divide them without a rest.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import torch

from internvl_rt.kernels._launch import Launch


@dataclass(frozen=True, slots=True)
class Cost:
    """The least that the operation must do: it reads every input once and writes every output once."""

    bytes: int
    flops: int


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far an output may be from the reference run in float64 on the same (rounded) inputs.

    |y - ref| <= atol + rtol * |ref| for every element, and ||y - ref|| <= norm_limit(ref), about rms * ||ref||, which
    catches errors with structure. `reason` says where the figures come from; tests/support/tolerance_room.py measures
    how much of these limits the kernels use.
    """

    rtol: float
    atol: float
    rms: float
    reason: str

    def norm_limit(self, expected: torch.Tensor) -> float:
        """Returns the limit of ||y - ref||: rms * ||ref|| for many elements, more for few and for small outputs.

        When n roundings have equal weight, the rms error has a standard deviation of about 1 / (2 sqrt(n)) of itself;
        the limit leaves room for four of them. Where elements differ in size, n is (sum ref^2)^2 / (sum ref^4), because
        the few large elements count. The relative error of a small output says nothing (gelu(-5) keeps two digits in
        float32), so the limit always allows every element an error of a twentieth of `atol`.
        """
        square = expected.double().square()
        norm = float(square.sum().sqrt())
        few = float(square.norm()) / norm**2 if norm else 0.0  # 1 / sqrt(n)
        return (1.0 + 2.0 * few) * max(self.rms * norm, self.atol / 20 * sqrt(expected.numel()))


@dataclass(frozen=True, slots=True)
class Case:
    """One set of arguments: the sizes by the legend's letters, and whatever else `make_inputs` needs."""

    name: str
    sizes: Mapping[str, Any]

    def __getitem__(self, size: str) -> Any:
        return self.sizes[size]

    @property
    def min_capability(self) -> int:
        """The first compute capability, as 89 for 8.9, that the case can run on, where that is not the kernels' own."""
        least: int = self.sizes.get("min_capability", 0)
        return least


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """Everything that tests and benches know of an operation.

    `make_inputs(case, dtype, device)` returns the keyword arguments that reference, plan and launcher share. The plan
    also takes `target`; the launcher also takes `out`, unless the operation works in place. On the device "meta" the
    inputs have shapes only; elsewhere they are drawn from torch's default generator, which the caller seeds.

    The result is a tensor, a named tuple of tensors, or None if the operation works in place; `out` is alike.
    """

    name: str
    used_by: str  # which part of which models calls it, for the catalogue; "" is none
    reference: Callable[..., Any]
    plan: Callable[..., tuple[Launch, ...]]
    launcher: Callable[..., Any]
    make_inputs: Callable[[Case, torch.dtype, torch.device], dict[str, Any]]
    cost: Callable[[Case, torch.dtype], Cost]
    test_cases: tuple[Case, ...]  # small and adversarial: Triton's interpreter runs them
    model_cases: tuple[Case, ...]  # sizes of real models: built for every target, and benchmarked
    tolerances: Mapping[torch.dtype, Tolerance]
    in_place: tuple[str, ...] = ()  # arguments that it writes, if given; if it returns nothing it takes no `out`
    exact: bool = False  # whether the result must equal the reference bit for bit
    stored: Mapping[torch.dtype, Tolerance] = field(default_factory=dict)  # of results in another dtype than a case's

    @property
    def min_capability(self) -> int:
        """The first compute capability that a case of a real model can run on, where that is not the kernels' own."""
        return min(case.min_capability for case in self.model_cases)

    def tolerance_of(self, result: torch.Tensor, dtype: torch.dtype) -> Tolerance:
        """Returns how far a result of a case in `dtype` may be off."""
        tolerance = self.tolerances[dtype]
        return tolerance if result.dtype == dtype else self.stored.get(result.dtype, tolerance)

    def result_like(self, inputs: Mapping[str, Any]) -> Any:
        """Returns what a call with these inputs returns, with its shapes and dtypes, on the device "meta"."""
        return self.reference(**{name: _without_values(value) for name, value in inputs.items()})

    def written(self, inputs: Mapping[str, Any]) -> tuple[str, ...]:
        """Returns the names of the arguments that a call with these writes."""
        return tuple(name for name in self.in_place if inputs[name] is not None)


def _without_values(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def results_of(result: Any) -> dict[str, torch.Tensor]:
    """Returns the tensors of an operation's result by name: none, one, or those of a named tuple."""
    if result is None:
        return {}
    named: dict[str, torch.Tensor] = {"the result": result} if isinstance(result, torch.Tensor) else result._asdict()
    return named


def map_result(make: Callable[..., torch.Tensor], result: Any, *others: Any) -> Any:
    """Returns an operation's result with `make(tensor)` in the place of each tensor; `others` are results of the same
    operation, whose tensors `make` takes too.
    """
    if result is None:
        return None
    if isinstance(result, torch.Tensor):
        return make(result, *others)
    return type(result)(*map(make, result, *others))


def require(condition: bool, name: str, expected: object, given: object) -> None:
    """Raises ValueError naming the argument unless `condition` holds; every launcher checks its arguments with it."""
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {given}")


def require_one_of(name: str, given: object, allowed: Collection[object]) -> None:
    if given not in allowed:
        raise ValueError(f"{name}: expected one of {list(allowed)}, got {given}")


def rows_of(name: str, x: torch.Tensor) -> torch.Tensor:
    """Returns `x` [..., D] as a view [R, D]; raises ValueError when its rows do not lie at one stride."""
    try:
        return x.view(-1, x.shape[-1])
    except RuntimeError:
        raise ValueError(f"{name}: expected rows at one stride, got strides {x.stride()} of {tuple(x.shape)}") from None


def require_tensor(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Raises ValueError unless the tensor has this shape, dtype and device and a contiguous last dimension."""
    if tensor.shape == shape and tensor.dtype == dtype and tensor.device == device:
        if shape[-1] <= 1 or tensor.stride(-1) == 1:
            return  # the usual case returns here, because making the messages below takes several microseconds
        raise ValueError(f"{name}: expected a contiguous last dimension, got strides {tensor.stride()}")
    require(tensor.shape == shape, name, f"shape {shape}", tuple(tensor.shape))
    require(tensor.dtype == dtype, name, dtype, tensor.dtype)
    require(tensor.device == device, name, f"a tensor on {device}", f"one on {tensor.device}")

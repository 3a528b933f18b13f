"""Registers the kernels as operators of torch, for models of one's own that torch.compile or torch.export traces.

    from internvl_rt.operators import register_operators

    register_operators()
    y = torch.ops.internvl_rt.rms_norm(x, weight, 1e-6)

Calling a kernel's launcher directly takes less time on the host, and gives access to its plan and to its memory. An
operator takes the arguments that say what is computed and allocates its result, so a CUDA graph may capture it.
"""

from functools import cache, partial
from inspect import Parameter, signature
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import torch
from torch import Tensor, library

from internvl_rt.kernels._contract import KernelSpec, map_result
from internvl_rt.kernels._launch import is_interpreted
from internvl_rt.kernels.catalogue import discover_specs

NAMESPACE = "internvl_rt"
_TYPES = {torch.dtype: "ScalarType", Tensor: "Tensor", int: "int", float: "float", bool: "bool", str: "str"}


def register_operators() -> tuple[str, ...]:
    """Makes each operation `torch.ops.internvl_rt.<name>`; returns the names. A second call does nothing.

    An operator launches the kernel on CUDA tensors. On CPU tensors it computes the reference, or the kernel where
    Triton's interpreter runs it (TRITON_INTERPRET=1). It raises ValueError for arguments that the launcher refuses, and
    has no gradient. `internvl-rt kernels NAME` says what the arguments are.
    """
    _registered()
    return tuple(discover_specs())


@cache
def _registered() -> Any:
    """Returns what holds the operators, which are gone once it is: the cache keeps it."""
    held: Any = library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]
    for name, spec in discover_specs().items():
        held.define(f"{name}{schema_of(spec)}", tags=(torch.Tag.pt2_compliant_tag,))
        held.impl(name, spec.launcher, "CUDA")
        held.impl(name, spec.launcher if is_interpreted() else partial(_by_reference, spec), "CPU")
        library.register_fake(f"{NAMESPACE}::{name}", partial(_without_values, spec), lib=held)
    return held


def schema_of(spec: KernelSpec) -> str:
    """Returns the operator's arguments and result in torch's own notation."""
    inputs = spec.make_inputs(spec.test_cases[0], next(iter(spec.tolerances)), torch.device("meta"))
    arguments: list[str] = []
    for name, parameter in signature(spec.launcher).parameters.items():
        kind = _kind_of(parameter.annotation)
        if name not in inputs or kind is None:
            continue  # it says how to compute, not what
        if name in spec.in_place:
            kind = kind.replace("Tensor", f"Tensor(a{len(arguments)}!)")
        if parameter.kind is Parameter.KEYWORD_ONLY and "*" not in arguments:
            arguments.append("*")
        default = "" if parameter.default is Parameter.empty else f"={_literal(parameter.default)}"
        arguments.append(f"{kind} {name}{default}")
    returned = signature(spec.launcher).return_annotation
    results = "()" if returned in (None, NoneType) else "Tensor"
    if hasattr(returned, "_fields"):  # a named tuple
        results = f"({', '.join(f'Tensor {name}' for name in returned._fields)})"
    return f"({', '.join(arguments)}) -> {results}"


def _kind_of(annotation: Any) -> str | None:
    """Returns the type of an argument in torch's notation; None if it has no such type."""
    if get_origin(annotation) is Literal:
        return "str"
    options = get_args(annotation)
    if NoneType in options:
        (other,) = (each for each in options if each is not NoneType) if len(options) == 2 else (None,)
        return f"{_TYPES[other]}?" if other in _TYPES else None
    return _TYPES.get(annotation)


def _literal(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def _by_reference(spec: KernelSpec, *args: Any, **keywords: Any) -> Any:
    return map_result(Tensor.contiguous, spec.reference(*args, **keywords))


def _without_values(spec: KernelSpec, *args: Any, **keywords: Any) -> Any:
    """Returns an empty result, whose shape the reference finds from shapes alone."""

    def empty(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")

    result = spec.reference(*map(empty, args), **{name: empty(value) for name, value in keywords.items()})
    device = next(value.device for value in args if isinstance(value, Tensor))
    return map_result(lambda like: torch.empty(like.shape, dtype=like.dtype, device=device), result)

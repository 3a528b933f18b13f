"""Lists the operations: what each computes, with which arguments, how fast at most, how exactly, and who calls it.

    from internvl_rt.kernels.catalogue import catalogue

    print(catalogue()["rms_norm"].formula)

All of it follows from the operations' own files, so a new file is listed without another word.
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internvl_rt.kernels._contract import Case, Cost, KernelSpec, Tolerance
from internvl_rt.kernels._launch import TARGETS


@dataclass(frozen=True, slots=True)
class Kernel:
    """One operation as a reader wants to know it.

    `formula` is the first paragraph of its file's docstring, `notes` the rest. `dims` has an entry for each tensor
    argument: its dimensions by the letters of `_contract.py`, or None where the docstring of the launcher says them.
    `architectures` are those for which every case of a real model is compiled and its machine code inspected.
    """

    name: str
    formula: str
    notes: str
    signature: inspect.Signature
    dims: dict[str, str | None]
    dtypes: tuple[torch.dtype, ...]
    architectures: tuple[str, ...]
    used_by: str
    spec: KernelSpec

    @property
    def launcher(self) -> Callable[..., Any]:
        """The function to call: it checks its arguments and launches the kernel on the caller's stream."""
        return self.spec.launcher

    @property
    def reference(self) -> Callable[..., Any]:
        """The same operation in plain torch, for any device: the definition of what the kernel computes."""
        return self.spec.reference

    @property
    def import_line(self) -> str:
        return f"from internvl_rt.kernels.{self.name} import {self.name}"

    @property
    def cases(self) -> tuple[Case, ...]:
        """The sizes of real models, which are benchmarked."""
        return self.spec.model_cases

    def shapes(self, case: Case) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each tensor argument in this case."""
        inputs = self.spec.make_inputs(case, preferred_dtype(self.spec), torch.device("meta"))
        return {name: tuple(value.shape) for name, value in inputs.items() if isinstance(value, Tensor)}

    def cost(self, case: Case, dtype: torch.dtype) -> Cost:
        """Returns the bytes and the floating-point operations that this case takes at least."""
        return self.spec.cost(case, dtype)

    def tolerance(self, dtype: torch.dtype) -> Tolerance:
        """Returns how far a result may be from the reference's, and why. Raises KeyError for another dtype."""
        return self.spec.tolerances[dtype]


def catalogue() -> dict[str, Kernel]:
    """Returns every operation by its name, which is also its file's and its launcher's."""
    return {name: _describe(spec) for name, spec in discover_specs().items()}


def discover_specs() -> dict[str, KernelSpec]:
    """Returns the `SPEC` of every operation by its file's name."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))
    modules = {name: import_module(f"internvl_rt.kernels.{name}") for name in names}
    return {name: module.SPEC for name, module in modules.items() if hasattr(module, "SPEC")}


def preferred_dtype(spec: KernelSpec) -> torch.dtype:
    """Returns bfloat16, or the operation's first data type where it has no bfloat16."""
    return torch.bfloat16 if torch.bfloat16 in spec.tolerances else next(iter(spec.tolerances))


def _describe(spec: KernelSpec) -> Kernel:
    about = inspect.cleandoc(import_module(spec.launcher.__module__).__doc__ or "")
    formula, _, notes = about.partition("\n\n")
    signature = inspect.signature(spec.launcher)
    inputs = spec.make_inputs(spec.test_cases[0], next(iter(spec.tolerances)), torch.device("meta"))
    tensors = [name for name in signature.parameters if isinstance(inputs.get(name), Tensor)]
    return Kernel(
        name=spec.name,
        formula=formula.replace("\n", " "),
        notes=notes,
        signature=signature,
        dims={name: match[1] if (match := re.search(r"_([A-Z][A-Z0-9]*)$", name)) else None for name in tensors},
        dtypes=tuple(spec.tolerances),
        architectures=tuple(f"sm_{capability}" for capability in sorted(TARGETS) if spec.min_capability <= capability),
        used_by=spec.used_by,
        spec=spec,
    )

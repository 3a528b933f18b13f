"""Every operation's `SPEC`, found by its file."""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

import internvl_rt
from internvl_rt.kernels._contract import Case, KernelSpec

KERNELS = Path(internvl_rt.__file__).parent / "kernels"


def discover_specs() -> dict[str, KernelSpec]:
    names = sorted(path.stem for path in KERNELS.glob("[!_]*.py"))
    modules = {name: import_module(f"internvl_rt.kernels.{name}") for name in names}
    return {name: module.SPEC for name, module in modules.items() if hasattr(module, "SPEC")}


def smallest_call(spec: KernelSpec, device: torch.device) -> tuple[Case, torch.dtype, dict[str, Any]]:
    """The model case that moves the fewest bytes, in bfloat16 where that is there, and the launcher's arguments."""
    dtype = torch.bfloat16 if torch.bfloat16 in spec.tolerances else next(iter(spec.tolerances))
    case = min(spec.model_cases, key=lambda case: spec.cost(case, dtype).bytes)
    expected = spec.reference(**spec.make_inputs(case, dtype, torch.device("meta")))
    outputs = {} if expected is None else {"out": torch.empty(expected.shape, dtype=expected.dtype, device=device)}
    return case, dtype, {**spec.make_inputs(case, dtype, device), **outputs}

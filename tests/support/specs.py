"""Every operation's `SPEC`, found by its file."""

from importlib import import_module
from pathlib import Path

import internvl_rt
from internvl_rt.kernels._contract import KernelSpec

KERNELS = Path(internvl_rt.__file__).parent / "kernels"


def discover_specs() -> dict[str, KernelSpec]:
    names = sorted(path.stem for path in KERNELS.glob("[!_]*.py"))
    modules = {name: import_module(f"internvl_rt.kernels.{name}") for name in names}
    return {name: module.SPEC for name, module in modules.items() if hasattr(module, "SPEC")}

"""Launches kernels on a machine without a GPU: by Triton's own launcher, on a stand-in for the CUDA driver.

The launches need a process of their own: the tests' process runs Triton's interpreter, and the system reads the
library path when a process begins.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.nvidia.driver import CudaDriver

from internvl_rt.kernels._launch import TARGETS, target_of
from internvl_rt.kernels.catalogue import discover_specs

TARGET = TARGETS[90]


class FakeDriver(CudaDriver):
    """A Triton driver that describes an H200."""

    def __init__(self) -> None:
        super().__init__()
        self.get_device_capability = lambda *_: (9, 0)
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda *_: 0


def fake_environment(folder: Path) -> dict[str, str]:
    """Builds the stand-in in `folder`; returns the environment of a process that loads it as its libcuda.so.1."""
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    library = folder / "libcuda.so.1"
    compiler = [*os.environ.get("CC", "cc").split(), "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    source = Path(__file__).with_name("fake_driver.c")
    subprocess.run([*compiler, f"-I{include}", f"-Wl,-soname,{library.name}", "-o", library, source], check=True)
    (folder / "libcuda.so").symlink_to(library.name)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(folder), *filter(None, [environment.get("LD_LIBRARY_PATH")])]
    return {**environment, "TRITON_LIBCUDA_PATH": str(folder), "LD_LIBRARY_PATH": os.pathsep.join(paths)}


def use_fake_driver() -> None:
    """Makes every operation treat CPU tensors as GPU tensors, launch its kernels and compute nothing."""
    triton.runtime.driver.set_active(FakeDriver())
    discover_specs()
    real = target_of
    for module in list(sys.modules.values()):
        if getattr(module, "target_of", None) is real:
            module.target_of = lambda device: TARGET


def zero_new_memory() -> None:
    """Fills new tensors with 0, so that an index that is never computed is a valid one."""
    empty = torch.empty

    def zeros(*args: Any, **kwargs: Any) -> Tensor:
        tensor: Tensor = empty(*args, **kwargs)
        return tensor if tensor.is_meta else tensor.zero_()

    torch.empty = zeros

"""Describes one kernel launch as a value and the GPU that it is planned for, and launches kernels."""

from collections.abc import Callable, Mapping
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
import triton


def cdiv(numerator: int, denominator: int) -> int:
    """Returns the quotient, rounded up. triton.cdiv takes 2 us on the host, as long as all checks of a tensor."""
    return -(-numerator // denominator)


def next_power_of_2(number: int) -> int:
    """Returns the smallest power of 2 that is not below `number`, and at least 1."""
    return 1 << (max(number, 1) - 1).bit_length()


@dataclass(frozen=True, slots=True)
class Target:
    """The properties of a GPU that a plan may depend on, besides shapes and dtypes."""

    capability: int  # 90 for sm_90
    num_sms: int
    interpreted: bool = False  # Triton's interpreter runs the kernels: no inline assembly, no PDL

    @property
    def has_programmatic_launch(self) -> bool:
        """Whether a kernel may start before the kernel launched before it has ended (programmatic dependent launch)."""
        return self.capability >= 90 and not self.interpreted

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory that one block of threads may use."""
        return {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}[self.capability] * 1024


TARGETS = {  # every architecture that kernels are built for, each with its chip that has the most multiprocessors
    80: Target(80, 108),  # A100
    89: Target(89, 142),  # L40S, RTX 4090
    90: Target(90, 132),  # H100, H200
    100: Target(100, 148),  # B200
    120: Target(120, 188),  # RTX PRO 6000, RTX 5090
}


@dataclass(frozen=True, slots=True)
class Launch:
    """The call `kernel[grid](**args, **constexprs)`; nothing is launched when a side of the grid is 0."""

    kernel: Any  # triton.JITFunction
    grid: tuple[int, int, int]
    args: Mapping[str, torch.Tensor | int | float]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    descriptors: bool = False  # the kernel makes tensor descriptors on the device, which take scratch memory
    max_registers: int | None = None  # of a thread; without it the compiler may spill to let more programs run at once
    pdl: bool = False  # programmatic dependent launch: this kernel may start before the previous one ends (sm_90 on)
    # What tests/kernels/test_compile.py must find in the machine code:
    matrix_units: bool = False  # products on the target's matrix units
    wide_loads: bool = True  # memory read 16 bytes at a time


def options_of(launch: Launch) -> dict[str, Any]:
    # Every triton up to 3.9 fuses multiply and add by default; a later version might not.
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}
    if launch.max_registers is not None:
        options["maxnreg"] = launch.max_registers
    return {**options, "launch_pdl": True} if launch.pdl else options


def run(launches: tuple[Launch, ...]) -> None:
    for launch in launches:
        device = _device_of(launch)
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):  # Triton launches on the current device, wherever the tensors are
                _run(launch, device)
        else:
            _run(launch, device)


def _device_of(launch: Launch) -> torch.device:
    return next(value.device for value in launch.args.values() if isinstance(value, torch.Tensor))


def _run(launch: Launch, device: torch.device) -> None:
    if 0 in launch.grid:
        return
    start = partial(launch.kernel[launch.grid], **launch.args, **launch.constexprs, **options_of(launch))
    if launch.descriptors:
        copy_context().run(_with_scratch, start, device)  # in a copy, so that the caller keeps its allocator
    else:
        start()


def _with_scratch(start: Callable[[], object], device: torch.device) -> None:
    """Sets the allocator, a context variable, that Triton asks for the descriptors' memory at every launch."""
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
    start()


def is_interpreted() -> bool:
    """Says whether Triton's interpreter runs the kernels (TRITON_INTERPRET=1), on tensors of any device."""
    return bool(triton.knobs.runtime.interpret)


@cache
def target_of(device: torch.device) -> Target:
    """Describes the GPU `device`. Raises ValueError for a device on which the kernels cannot run."""
    if is_interpreted():
        return Target(90, 132, interpreted=True)
    if device.type != "cuda":
        raise ValueError(f"device: expected a CUDA device, got {device}")
    properties = torch.cuda.get_device_properties(device)
    capability = 10 * properties.major + properties.minor
    if capability < 80:
        raise ValueError(f"device: expected compute capability 8.0 or newer, got {properties.major}.{properties.minor}")
    return Target(capability, properties.multi_processor_count)

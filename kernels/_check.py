"""One call of an operation against its reference, and how far apart they are."""

import math
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internvl_rt.kernels._contract import Case, KernelSpec, Tolerance

POISON = 0x5A  # of integer results, so that what a kernel leaves out shows


def discover_specs() -> dict[str, KernelSpec]:
    """Every operation's `SPEC`, found by its file."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))
    modules = {name: import_module(f"internvl_rt.kernels.{name}") for name in names}
    return {name: module.SPEC for name, module in modules.items() if hasattr(module, "SPEC")}


@dataclass(frozen=True, slots=True)
class Deviation:
    """How far a result is from its reference, as shares of what the tolerance allows: it is wrong above 1."""

    element: float  # of the worst element's limit
    rms: float  # of the limit of the root mean square
    text: str  # the worst element and the root mean square, in words

    @property
    def share(self) -> float:
        return max(self.element, self.rms)


def deviation(actual: Tensor, expected: Tensor, tolerance: Tolerance) -> Deviation:
    """NaN and infinity are right only where the reference has them."""
    assert actual.shape == expected.shape, f"a result of shape {tuple(actual.shape)} for {tuple(expected.shape)}"
    if actual.numel() == 0:
        return Deviation(0.0, 0.0, "nothing to compare")
    actual64, expected64 = actual.double().cpu(), expected.double().cpu()
    same = (actual64 == expected64) | (actual64.isnan() & expected64.isnan())
    error = torch.where(same, 0.0, (actual64 - expected64).abs())
    share = torch.where(same, 0.0, error / (tolerance.atol + tolerance.rtol * expected64.abs()))
    share = torch.where(share.isnan(), math.inf, share)
    worst = tuple(int(i) for i in torch.unravel_index(share.argmax(), share.shape))
    norm = float(error.norm())
    rms = norm / max(float(expected64.norm()), 1e-30)
    limit = tolerance.norm_limit(expected64)
    rms_share = 0.0 if norm == 0 or math.isnan(norm) else norm / limit if limit else math.inf
    text = f"at {worst} {actual64[worst]:.7g}, expected {expected64[worst]:.7g}; rms error {rms:.2g}"
    return Deviation(float(share[worst]), rms_share, text)


def check_call(spec: KernelSpec, case: Case, dtype: torch.dtype, device: torch.device) -> Deviation:
    """Launches the operation on random inputs of seed 0; the reference gets them in float64. Returns the worst result.

    Raises what the launch raises, and waits for the device, so that no error of it comes up later.
    """

    def wide(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.double() if value.dtype == dtype and dtype.is_floating_point else value.clone()

    torch.manual_seed(0)
    inputs = spec.make_inputs(case, dtype, device)
    expected_inputs = {name: wide(value) for name, value in inputs.items()}
    expected = spec.reference(**expected_inputs)
    results = [(inputs[name], expected_inputs[name]) for name in spec.in_place]
    if expected is None:
        spec.launcher(**inputs)
    else:
        floating = expected.dtype.is_floating_point
        fill, out_dtype = (math.nan, dtype) if floating else (POISON, expected.dtype)
        out = torch.full(expected.shape, fill, dtype=out_dtype, device=device)
        spec.launcher(**inputs, out=out)
        results.append((out, expected))
    if spec.exact:  # also where the operation rounds to its result's dtype
        results = [(y, y_expected.to(y.dtype)) for y, y_expected in results]
    found = [deviation(y, y_expected, spec.tolerances[dtype]) for y, y_expected in results]
    return max(found, key=lambda each: each.share)

"""Runs one call of an operation beside its reference and measures how far the results are apart."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from internvl_rt.kernels._contract import Case, KernelSpec, Tolerance, map_result, results_of

POISON = 0x5A  # integer results are filled with this before the launch: elements that a kernel does not write show


def arguments_of(spec: KernelSpec, case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Returns the arguments of a launcher, with `out` where the operation has a result."""
    inputs = spec.make_inputs(case, dtype, device)
    out = map_result(lambda like: torch.empty(like.shape, dtype=like.dtype, device=device), spec.result_like(inputs))
    return inputs if out is None else {**inputs, "out": out}


@dataclass(frozen=True, slots=True)
class Deviation:
    """How far a result is from its reference, as a share of what the tolerance allows: above 1 the result is wrong."""

    element: float  # the worst element's error over its limit
    rms: float  # the root mean square error over its limit
    text: str  # the worst element and the root mean square error in words

    @property
    def share(self) -> float:
        return max(self.element, self.rms)


def deviation(actual: Tensor, expected: Tensor, tolerance: Tolerance) -> Deviation:
    """Compares element by element. NaN and infinity are right only where the reference has them."""
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


def _poisoned(device: torch.device, like: Tensor) -> Tensor:
    fill = math.nan if like.dtype.is_floating_point else POISON
    return torch.full(like.shape, fill, dtype=like.dtype, device=device)


def check_call(spec: KernelSpec, case: Case, dtype: torch.dtype, device: torch.device) -> Deviation:
    """Launches the operation on random inputs of seed 0 and runs the reference on them in float64.

    Returns the deviation of the worst result. Raises what the launch raises; waits for the device, so that an error of
    the kernel is raised here and not by a later call.
    """

    def wide(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.double() if value.dtype == dtype and dtype.is_floating_point else value.clone()

    torch.manual_seed(0)
    inputs = spec.make_inputs(case, dtype, device)
    expected_inputs = {name: wide(value) for name, value in inputs.items()}
    expected = spec.reference(**expected_inputs)
    results = [(inputs[name], expected_inputs[name]) for name in spec.written(inputs)]
    if expected is None:
        spec.launcher(**inputs)
    else:
        out = map_result(partial(_poisoned, device), spec.result_like(inputs))
        spec.launcher(**inputs, out=out)
        results += zip(results_of(out).values(), results_of(expected).values(), strict=True)
    found = [deviation(y, y_expected, spec.tolerance_of(y, dtype)) for y, y_expected in results]
    return max(found, key=lambda each: each.share)

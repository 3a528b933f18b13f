"""Tests that support/emulated.py writes what the kernels write, on every fourth test case of every operation."""

from typing import Any

import pytest
import torch

from internvl_rt.kernels._check import deviation
from internvl_rt.kernels._contract import Case, KernelSpec
from internvl_rt.kernels.catalogue import discover_specs
from support.contract import clone, draw_inputs, run_case
from support.emulated import EMULATED
from support.hardware_arithmetic import hardware_arithmetic

CPU = torch.device("cpu")
RUNS = [
    pytest.param(spec, case, dtype, id=f"{spec.name}/{case.name}/{str(dtype).removeprefix('torch.')}")
    for spec in discover_specs().values()
    if spec.name in EMULATED
    for number, case in enumerate(spec.test_cases)
    for dtype in (torch.bfloat16, torch.float16)
    if number % 8 == (dtype == torch.float16) * 4
]
QUICK = [run.id for run in RUNS[::4]]


def test_every_operation_that_rounds_is_emulated() -> None:
    assert set(EMULATED) == {spec.name for spec in discover_specs().values() if any_tolerance(spec)}


def any_tolerance(spec: KernelSpec) -> bool:
    return not spec.exact and any(tolerance.rms for tolerance in spec.tolerances.values())


@pytest.mark.fast(*QUICK)
@pytest.mark.parametrize(("spec", "case", "dtype"), RUNS)
def test_emulation_equals_the_kernel(spec: KernelSpec, case: Case, dtype: torch.dtype) -> None:
    """All bits are equal, except in at most one result in 20, where another order of the sum rounds differently."""
    inputs: dict[str, Any] = draw_inputs(spec, case, dtype, CPU, seed=1)
    emulated = EMULATED[spec.name](**clone(inputs))
    with hardware_arithmetic():
        pairs = run_case(spec, inputs, dtype)
    for (actual, expected), ours in zip(pairs, emulated, strict=True):
        assert ours.dtype == actual.dtype
        assert ours.shape == actual.shape
        written = ~expected.isnan()
        different = (ours != actual) & written
        assert different.count_nonzero() <= 1 + actual.numel() // 20
        kernel, emulation = (deviation(each, expected, spec.tolerance_of(each, dtype)) for each in (actual, ours))
        assert emulation.element == pytest.approx(kernel.element, abs=0.1)
        assert emulation.rms == pytest.approx(kernel.rms, abs=0.05)

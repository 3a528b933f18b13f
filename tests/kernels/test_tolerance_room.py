"""Tests that what fails with a GPU's roundings fails in the tests too, and that the rest has room in its tolerance."""

from typing import Any

import pytest
import torch
from torch import Tensor

from internvl_rt.kernels import _gemv_body
from internvl_rt.kernels._check import deviation
from internvl_rt.kernels._contract import Case, KernelSpec, Tolerance
from internvl_rt.kernels.catalogue import discover_specs
from support.contract import draw_inputs, run_case
from support.emulated import EMULATED
from support.hardware_arithmetic import hardware_arithmetic
from support.tolerance_room import main, room_of_case

SPECS = discover_specs()
SEEDS = range(4)


def case_of(spec: KernelSpec, name: str) -> Case:
    return next(case for case in spec.test_cases if case.name == name)


def identity(x: Any) -> Any:
    return x


def alike_for_few_elements(self: Tolerance, expected: Tensor) -> float:
    return self.rms * float(expected.norm())


@pytest.fixture
def old_rms_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tolerance, "norm_limit", alike_for_few_elements)


def failures_of_kernel(operation: str, name: str, dtype: torch.dtype) -> int:
    case = case_of(SPECS[operation], name)
    return room_of_case(operation, case, dtype, SEEDS, interpreter=True).failures


@pytest.mark.slow
def test_gemv_without_rounding_to_tf32_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    assert failures_of_kernel("gemv", "many_swiglu_16", torch.float16) == 0
    monkeypatch.setattr(_gemv_body, "rounded_to_tf32", identity)
    assert failures_of_kernel("gemv", "many_swiglu_16", torch.float16) >= 3  # 37 of 40 seeds failed when measured


@pytest.mark.usefixtures("old_rms_limits")
def test_gemv_without_rounding_to_tf32_fails_the_old_limits_whatever_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gemv_body, "rounded_to_tf32", identity)
    assert failures_of_kernel("gemv", "swiglu_5", torch.float16) == len(SEEDS)


@pytest.mark.usefixtures("old_rms_limits")
@pytest.mark.parametrize(("operation", "name"), [("swiglu", "width_1"), ("swiglu", "width_2"), ("rms_norm", "width_2")])
def test_operations_on_few_elements_fail_the_old_limits_by_chance(operation: str, name: str) -> None:
    case = case_of(SPECS[operation], name)
    assert room_of_case(operation, case, torch.bfloat16, range(300), interpreter=False).failures > 0


@pytest.mark.parametrize("operation", ["swiglu", "rms_norm"])
def test_operations_on_few_elements_have_room(operation: str) -> None:
    for name in ("width_1", "width_2", "width_15"):
        room = room_of_case(operation, case_of(SPECS[operation], name), torch.bfloat16, range(300), interpreter=False)
        assert max(room.element.share, room.rms.share) < 0.8


@pytest.mark.parametrize("name", ["huge_fused", "huge_tma", "huge_pieces"])
def test_a_product_in_float32_of_values_around_1000_fails(name: str) -> None:
    """Float32 products are one chain of sums over K, as on a GPU; the case's own values, around 10, pass."""
    spec, dtype = SPECS["gemm_epilogue"], torch.float32
    worst: dict[str, list[float]] = {"10": [], "1000": []}
    for seed in range(8):
        for fill, factor in (("10", 1.0), ("1000", 100.0)):
            inputs = draw_inputs(spec, case_of(spec, name), dtype, torch.device("cpu"), seed)
            inputs["x"] *= factor
            with hardware_arithmetic():
                ((actual, expected),) = run_case(spec, inputs, dtype)
            worst[fill].append(deviation(actual, expected, spec.tolerances[dtype]).share)
    assert max(worst["10"]) < 0.8
    assert sum(share > 1 for share in worst["1000"]) >= 3


def test_nan_and_infinity_use_infinitely_much_of_a_tolerance() -> None:
    tolerance = Tolerance(1e-3, 1e-3, 1e-3, "")
    for wrong in (torch.nan, torch.inf):
        shares = deviation(torch.tensor([1.0, wrong]), torch.tensor([1.0, 2.0]), tolerance)
        assert shares.share == torch.inf
        assert "at (1,)" in shares.text
    assert deviation(torch.tensor([torch.inf, 0.0]), torch.tensor([torch.inf, 0.0]), tolerance).share == 0
    assert deviation(torch.zeros(2), torch.zeros(2), Tolerance(0, 0, 0, "")).share == 0


def test_the_limit_of_the_norm_is_rms_for_many_elements_three_times_it_for_one_and_never_below_atols() -> None:
    tolerance = Tolerance(1e-3, 1e-2, 1e-3, "")
    assert tolerance.norm_limit(torch.ones(10_000)) == pytest.approx(1.02e-3 * 100)
    assert tolerance.norm_limit(torch.tensor([5.0])) == pytest.approx(3e-3 * 5)
    one_of_many = torch.full((1000,), 1e-3)
    one_of_many[7] = 100.0
    assert tolerance.norm_limit(one_of_many) == pytest.approx(3e-3 * 100)
    assert tolerance.norm_limit(torch.zeros(4)) == pytest.approx(5e-4 * 2)
    assert tolerance.norm_limit(torch.full((4,), 1e-6)) == pytest.approx(2 * 5e-4 * 2)


def test_a_gelu_that_cancels_has_room() -> None:
    """With this seed x W^T + b is -5.2, so 1 + erf has only two exact digits; the result is below any tolerance."""
    case = case_of(SPECS["gemm_epilogue"], "1_1_1_fused")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert room_of_case("gemm_epilogue", case, dtype, range(103, 104), interpreter=True).rms.share < 0.8


def test_the_script_prints_a_row_and_says_by_its_exit_code_whether_a_run_failed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--seeds", "2", "--operations", "swiglu", "--dtypes", "bfloat16", "--cases", "one_row"]
    assert main(arguments) == 0
    _, row = capsys.readouterr().out.splitlines()
    assert row.split()[:2] == ["swiglu", "bfloat16"]
    assert row.split()[-2:] == ["2", "0"]
    monkeypatch.setitem(EMULATED, "swiglu", lambda gate_up_T2F: [gate_up_T2F[:, ::2]])
    assert main(arguments) == 1
    _, row = capsys.readouterr().out.splitlines()
    assert row.split()[-3:] == ["2", "2", "<--"]

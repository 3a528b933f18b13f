"""Tests the kernels in FP8 beyond their contracts: refusals, GPUs without FP8, rows that are not finite, values."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from internvl_rt.kernels import _fp8_rows
from internvl_rt.kernels._contract import KernelSpec
from internvl_rt.kernels._launch import TARGETS
from internvl_rt.kernels._plans import GemmPlan
from internvl_rt.kernels.catalogue import catalogue, discover_specs
from internvl_rt.kernels.gemm_fp8 import gemm_fp8, torch_can
from internvl_rt.kernels.quantise_rows import quantise_rows
from internvl_rt.kernels.rms_norm_fp8 import rms_norm_fp8
from internvl_rt.kernels.swiglu_fp8 import swiglu_fp8
from support.hardware_arithmetic import hardware_arithmetic

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FP8 = torch.float8_e4m3fn
NAMES = ("quantise_rows", "rms_norm_fp8", "swiglu_fp8", "gemm_fp8")


@pytest.fixture(autouse=True)
def arithmetic() -> Iterator[None]:
    torch.manual_seed(0)
    with hardware_arithmetic() if DEVICE.type == "cpu" else nullcontext():
        yield


def inputs_of(name: str) -> tuple[KernelSpec, dict[str, Any]]:
    spec = discover_specs()[name]
    return spec, spec.make_inputs(spec.test_cases[2], torch.bfloat16, DEVICE)


@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_without_fp8_is_refused_and_told_what_it_can_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, inputs = inputs_of(name)
    monkeypatch.setattr(_fp8_rows, "target_of", lambda device: TARGETS[80])
    with pytest.raises(ValueError, match=r"compute capability 8\.9 or newer .* got 8\.0; round only the weights"):
        spec.launcher(**inputs)


@pytest.mark.parametrize("name", NAMES)
def test_they_are_built_for_gpus_with_fp8_only(name: str) -> None:
    assert catalogue()[name].architectures == ("sm_89", "sm_90", "sm_100", "sm_120")
    assert "sm_80" in catalogue()["gemv_8bit"].architectures
    assert all(case.min_capability == 89 for case in discover_specs()[name].test_cases)


def test_rows_are_scaled_to_the_largest_number_and_rounded_to_even() -> None:
    x = torch.tensor([[448.0, 17.0, 19.0, -1.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0], [-2.0, 1.0, 0.5, 0.0, 2.0]])
    x, scale = x.to(DEVICE), torch.zeros(3, device=DEVICE)
    numbers = quantise_rows(x, scale)
    assert numbers.float().tolist() == [[448, 16, 20, -1, 0], [0, 0, 0, 0, 0], [-448, 224, 112, 0, 448]]
    assert scale.tolist() == pytest.approx([1.0, 1e-30 / 448, 2 / 448])


def test_numbers_are_limited_with_a_given_scale() -> None:
    x, scale = torch.tensor([[1000.0, -1e6, 3.0]], device=DEVICE), torch.zeros(1, device=DEVICE)
    numbers = quantise_rows(x, scale, torch.full((1,), 2.0, device=DEVICE))
    assert numbers.float().tolist() == [[448, -448, 1.5]]
    assert scale.tolist() == [2.0]


def test_a_quotient_beyond_float32_is_limited_too() -> None:
    x, scale = torch.tensor([[3e38, -3e38, 1e-30, 0.0]], device=DEVICE), torch.zeros(1, device=DEVICE)
    numbers = quantise_rows(x, scale, torch.full((1,), 1e-30, device=DEVICE))
    assert numbers.float().tolist() == [[448, -448, 1, 0]]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("static", [None, 1.0])
def test_a_row_that_is_not_finite_gives_nan_and_others_do_not(bad: float, static: float | None) -> None:
    given = None if static is None else torch.full((1,), static, device=DEVICE)
    x = torch.randn(3, 160, device=DEVICE)
    x[1, 7] = bad
    weight, w_scale = torch.ones(8, 160, device=DEVICE).to(FP8), torch.ones(8, 1, device=DEVICE)
    calls: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda scale: quantise_rows(x, scale, given),
        lambda scale: rms_norm_fp8(x, torch.ones(160, device=DEVICE), 1e-6, scale, given),
        lambda scale: swiglu_fp8(torch.cat((x, x), 1), scale, given),
    )
    for call in calls[
        : 2 if bad == -torch.inf else 3
    ]:  # silu(-inf) times -inf is 0 times infinity, or NaN, by hardware
        scale = torch.zeros(3, device=DEVICE)
        y = gemm_fp8(call(scale), scale, weight, w_scale, None, dtype=torch.float32)
        assert y.isnan().all(1).tolist() == [False, True, False]


def test_products_of_literal_numbers() -> None:
    x = torch.tensor([[2.0, 4.0] + [0.0] * 126 + [1.0]], device=DEVICE).to(FP8)
    weight = torch.tensor([[1.0, 0.5] + [0.0] * 126 + [8.0]] * 2, device=DEVICE).to(FP8)
    scale, bias = torch.tensor([0.5], device=DEVICE), torch.tensor([1.0, -1.0], device=DEVICE)
    row = torch.tensor([[1.0], [2.0]], device=DEVICE)
    block = torch.tensor([[1.0, 10.0], [2.0, 0.0]], device=DEVICE)
    residual = torch.tensor([[100.0, 200.0]], device=DEVICE)
    for scales, expected in ((row, [6.0, 12.0]), (block, [42.0, 4.0])):
        y = gemm_fp8(x, scale, weight, scales, bias, dtype=torch.float32, residual_RN=residual)
        assert y.tolist() == [[expected[0] + 101, expected[1] + 199]]
    assert gemm_fp8(x, scale, weight, row, None, dtype=torch.float32, residual_RN=residual, out=residual) is residual
    assert residual.tolist() == [[106, 212]]


def test_torch_multiplies_where_its_limits_allow() -> None:
    class OnGpu(Tensor):
        is_cuda = True  # type: ignore[assignment]

    def can(k: int = 64, n: int = 32, groups: int = 1, rows: int = 17, gaps: tuple[int, int] = (0, 0)) -> bool:
        x = torch.zeros(rows, k + gaps[0]).to(FP8)[:, :k].as_subclass(OnGpu)
        weight = torch.zeros(n, k + gaps[1]).to(FP8)[:, :k]
        return torch_can(x, weight, torch.zeros(n, groups), torch.bfloat16)

    assert can()
    assert not any((can(k=72), can(n=40), can(groups=2), can(rows=0), can(gaps=(16, 0)), can(gaps=(0, 16))))
    x = torch.zeros(17, 64).to(FP8).as_subclass(OnGpu)
    assert not torch_can(x, torch.zeros(32, 64).to(FP8), torch.zeros(32, 1), torch.float16)
    assert not torch_can(torch.zeros(17, 64).to(FP8), torch.zeros(32, 64).to(FP8), torch.zeros(32, 1), torch.bfloat16)


def test_torch_writes_a_product_once_unless_it_must_lie_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tensor] = []

    def multiply(x: Tensor, weight_KN: Tensor, *, scale_a: Tensor, scale_b: Tensor, bias: Any, **_: Any) -> Tensor:
        made.append((x.float() * scale_a) @ (weight_KN.float() * scale_b))
        made[-1] = (made[-1] if bias is None else made[-1] + bias).to(torch.bfloat16)
        return made[-1]

    monkeypatch.setattr("internvl_rt.kernels.gemm_fp8.torch_can", lambda *_: True)
    monkeypatch.setattr(torch, "_scaled_mm", multiply)
    case = next(case for case in discover_specs()["gemm_fp8"].test_cases if case.sizes.get("residual"))
    spec = discover_specs()["gemm_fp8"]
    inputs = spec.make_inputs(case, torch.bfloat16, DEVICE) | {"plan": None}
    expected, residual = spec.reference(**inputs), inputs["residual_RN"]
    y = gemm_fp8(**inputs)
    assert y is made[-1]
    assert (y - expected).float().norm() < 0.01 * expected.float().norm()
    assert torch.equal(gemm_fp8(**inputs, out=residual), y)
    assert torch.equal(residual, y)
    without = inputs | {"residual_RN": None}
    y, out = gemm_fp8(**without), torch.empty_like(expected)
    assert y is made[-1]
    assert gemm_fp8(**without, out=out) is out
    assert torch.equal(out, y)


REFUSALS: list[tuple[str, str, dict[str, Any]]] = [
    ("quantise_rows", "x_RK: expected rows", {"x_RK": torch.zeros(3, device=DEVICE)}),
    ("quantise_rows", "x_RK: expected one of .* got torch.float64", {"x_RK": torch.zeros(3, 15).double()}),
    ("quantise_rows", r"scale_R: expected shape \(3,\), got \(2,\)", {"scale_R": torch.zeros(2, device=DEVICE)}),
    (
        "quantise_rows",
        "scale_R: expected a tensor on .*, got one on meta",
        {"scale_R": torch.zeros(3, device="meta")},
    ),
    ("quantise_rows", r"static_scale_1: expected shape \(1,\)", {"static_scale_1": torch.zeros(3, device=DEVICE)}),
    ("quantise_rows", "out: expected torch.float8_e4m3fn", {"out": torch.zeros(3, 15, device=DEVICE)}),
    ("rms_norm_fp8", r"weight_D: expected shape \(15,\)", {"weight_D": torch.zeros(16, device=DEVICE)}),
    ("swiglu_fp8", "gate_up_T2F: expected an even width", {"gate_up_T2F": torch.zeros(3, 15, device=DEVICE)}),
    ("gemm_fp8", "dtype: expected one of", {"dtype": torch.float64}),
    ("gemm_fp8", "numbers_RK: expected torch.float8_e4m3fn", {"numbers_RK": torch.zeros(67, 129, device=DEVICE)}),
    ("gemm_fp8", r"scale_R: expected shape \(67,\)", {"scale_R": torch.zeros(1, device=DEVICE)}),
    ("gemm_fp8", r"scale_NG: expected shape \(33, 2\)", {"scale_NG": torch.zeros(33, 3, device=DEVICE)}),
    ("gemm_fp8", r"residual_RN: expected shape", {"residual_RN": torch.zeros(67, 32, device=DEVICE)}),
    ("gemm_fp8", "plan: expected block_k of at most 128", {"plan": GemmPlan("fused", 32, 32, 256, 2, 4, 2)}),
]


@pytest.mark.parametrize(("name", "message", "change"), REFUSALS, ids=[f"{n}-{m[:30]}" for n, m, _ in REFUSALS])
def test_an_argument_that_does_not_fit_is_named(name: str, message: str, change: dict[str, Any]) -> None:
    spec, inputs = inputs_of(name)
    with pytest.raises(ValueError, match=message):
        spec.launcher(**inputs | change)

"""Tests products with epilogues beyond their contract: refusals, the places of rows, and equal bits."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from internvl_rt.kernels import gemm_epilogue as gemm_epilogue_module
from internvl_rt.kernels._launch import TARGETS, Target, run
from internvl_rt.kernels._plans import GemmPlan
from internvl_rt.kernels.gemm_epilogue import (
    gemm_epilogue,
    gemm_epilogue_reference,
    linear_gelu_reference,
    linear_reference,
    linear_residual_reference,
    plan_gemm_epilogue,
)
from support.instruction_order import instructions_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FUSED = GemmPlan("fused", 32, 32, 16, group_m=2, num_warps=4, num_stages=2)
PLANS: dict[str, GemmPlan | str] = {"cublas": "cublas", "fused": FUSED, "tma": replace(FUSED, use_tma=True)}
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}  # float32 sums of 48 products are added in another order

every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
fused_plans = pytest.mark.parametrize("plan", [PLANS["fused"], PLANS["tma"]], ids=["fused", "tma"])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float32, device=DEVICE).to(dtype)


def product(rows: int = 70, n: int = 72, k: int = 48, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return draw(rows, k, dtype=dtype), draw(n, k, dtype=dtype), draw(n, dtype=dtype)


def test_the_launcher_is_the_references() -> None:
    x, weight, bias = product()
    residual, scale = draw(70, 72), draw(72)
    torch.testing.assert_close(gemm_epilogue(x, weight, bias), linear_reference(x, weight, bias), **TOLERANCE)
    torch.testing.assert_close(gemm_epilogue(x, weight, None), linear_reference(x, weight, None), **TOLERANCE)
    actual = gemm_epilogue(x, weight, bias, activation="gelu")
    torch.testing.assert_close(actual, linear_gelu_reference(x, weight, bias), **TOLERANCE)
    for bias_N, scale_N in ((bias, scale), (bias, None), (None, None)):
        actual = gemm_epilogue(x, weight, bias_N, residual=residual, scale_N=scale_N)
        expected = linear_residual_reference(x, weight, bias_N, residual, scale_N)
        torch.testing.assert_close(actual, expected, **TOLERANCE)


@every_plan
@pytest.mark.parametrize("shape", [(48,), (2, 5, 48), (3, 0, 48)])
def test_leading_dimensions_are_kept(plan: GemmPlan | str, shape: tuple[int, ...]) -> None:
    _, weight, bias = product()
    x, residual = draw(*shape), draw(*shape[:-1], 72)
    actual = gemm_epilogue(x, weight, bias, residual=residual, plan=plan)
    torch.testing.assert_close(actual, linear_residual_reference(x, weight, bias, residual, None), **TOLERANCE)


@every_plan
@pytest.mark.parametrize(("has_bias", "has_scale"), [(True, True), (True, False), (False, False)])
def test_the_residual_may_be_overwritten(plan: GemmPlan | str, has_bias: bool, has_scale: bool) -> None:
    x, weight, bias = product()
    residual, scale = draw(70, 80)[:, :72], draw(72)
    operands = (bias if has_bias else None, residual, scale if has_scale else None)
    expected = linear_residual_reference(x, weight, *operands)
    out = gemm_epilogue(x, weight, operands[0], residual=residual, scale_N=operands[2], out=residual, plan=plan)
    assert out.data_ptr() == residual.data_ptr()
    torch.testing.assert_close(out, expected, **TOLERANCE)


@every_plan
def test_residual_and_result_may_lie_in_one_buffer(plan: GemmPlan | str) -> None:
    x, weight, bias = product()
    residual, out = draw(2, 70, 72)
    expected = linear_residual_reference(x, weight, bias, residual, None)
    before = residual.clone()
    torch.testing.assert_close(
        gemm_epilogue(x, weight, bias, residual=residual, out=out, plan=plan), expected, **TOLERANCE
    )
    assert torch.equal(residual, before)


@every_plan
def test_rows_go_to_their_places_and_nothing_else_is_written(plan: GemmPlan | str) -> None:
    x, weight, bias = product(rows=6)
    rows = torch.tensor([8, -1, 0, 10, 3, 2**40], device=DEVICE)  # three of these are outside the 10 rows
    out = torch.full((10, 80), torch.nan, device=DEVICE)[:, :72]
    storage = out.untyped_storage()
    assert gemm_epilogue(x, weight, bias, rows=rows, out=out, plan=plan) is out
    torch.testing.assert_close(out[[8, 0, 3]], linear_reference(x[[0, 2, 4]], weight, bias), **TOLERANCE)
    untouched = torch.tensor([], device=DEVICE).set_(storage, 0, (10, 80), (80, 1))
    assert int(untouched.isnan().sum()) == 10 * 80 - 3 * 72
    expected = gemm_epilogue_reference(x, weight, bias, rows=rows, out=torch.full((10, 72), torch.nan, device=DEVICE))
    torch.testing.assert_close(out, expected, equal_nan=True, **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("epilogue", ["none", "gelu", "residual"])
def test_the_implementations_agree(epilogue: str, dtype: torch.dtype) -> None:
    x, weight, bias = product(dtype=dtype)
    weight /= 7  # 7 is about sqrt(K), so that results are about 1
    operands: dict[str, Any] = {"activation": "gelu"} if epilogue == "gelu" else {}
    if epilogue == "residual":
        operands = {"residual": draw(70, 72, dtype=dtype), "scale_N": draw(72, dtype=dtype)}
    results = {name: gemm_epilogue(x, weight, bias, **operands, plan=plan) for name, plan in PLANS.items()}
    assert torch.equal(results["fused"], results["tma"])
    if dtype == torch.float32:
        torch.testing.assert_close(results["fused"], results["cublas"], **TOLERANCE)
    else:  # the torch product, up to 4, is rounded to 11 bits, then scaled by up to 4; then the results are rounded
        torch.testing.assert_close(results["fused"], results["cublas"], rtol=2e-3, atol=1e-2)


@every_plan
def test_two_runs_give_the_same_bits(plan: GemmPlan | str) -> None:
    x, weight, bias = product(dtype=torch.float16)
    first, second = (gemm_epilogue(x, weight, bias, activation="gelu", plan=plan) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.usefixtures("one_order_of_sums")
@fused_plans
def test_a_row_does_not_depend_on_the_other_rows(plan: GemmPlan) -> None:
    x, weight, bias = product(rows=70)
    together = gemm_epilogue(x, weight, bias, activation="gelu", plan=plan)
    for rows in (slice(0, 1), slice(31, 33), slice(5, 70)):
        assert torch.equal(gemm_epilogue(x[rows], weight, bias, activation="gelu", plan=plan), together[rows])


@pytest.mark.parametrize("num_sms", [1, 2])
def test_few_programs_take_all_blocks_in_turn(num_sms: int) -> None:
    x, weight, bias = product(rows=100, n=100)
    plan = PLANS["tma"]
    expected = gemm_epilogue(x, weight, bias, activation="gelu", plan=plan)
    out = torch.full_like(expected, torch.nan)
    target = Target(90, num_sms)
    launches = plan_gemm_epilogue(x, weight, bias, activation="gelu", plan=plan, out=out, target=target)
    assert launches[0].grid == (2 * num_sms, 1, 1)
    run(launches)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("padding", [0, 1, 8])
def test_tma_is_used_where_rows_begin_at_16_bytes(offset: int, padding: int) -> None:
    def is_planned(x: Tensor, weight: Tensor) -> bool:
        launches = plan_gemm_epilogue(x, weight, None, plan="square", out=x.new_empty(70, 72), target=TARGETS[90])
        return bool(launches[0].constexprs["USE_TMA"])

    half = torch.bfloat16
    aligned = [torch.empty(size, 48, dtype=half, device=DEVICE) for size in (70, 72)]
    buffers = [torch.empty(1 + size * (48 + padding), dtype=half, device=DEVICE) for size in (70, 72)]
    odd = [
        buffer.as_strided((size, 48), (48 + padding, 1), offset) for buffer, size in zip(buffers, (70, 72), strict=True)
    ]
    expected = offset == 0 and padding != 1
    assert is_planned(odd[0], aligned[1]) == expected
    assert is_planned(aligned[0], odd[1]) == expected


@pytest.mark.parametrize(
    ("rows", "parts"), [(16, [16]), (128, [128]), (129, [128, 1]), (144, [128, 16]), (145, [145]), (259, [256, 3])]
)
@pytest.mark.parametrize("epilogue", ["none", "residual", "scaled", "elsewhere"])
def test_a_few_rows_beyond_whole_blocks_are_a_product_of_their_own(
    rows: int, parts: list[int], epilogue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []
    multiply = gemm_epilogue_module._multiply
    monkeypatch.setattr(gemm_epilogue_module, "_multiply", lambda x, *rest: (found.append(len(x)), multiply(x, *rest)))
    x, weight, bias = product(rows)
    how: dict[str, Any] = {}
    if epilogue != "none":
        how["residual"] = draw(rows, 72)
    if epilogue == "scaled":
        how["scale_N"] = draw(72)
    bias_N = None if epilogue == "residual" else bias
    expected = gemm_epilogue_reference(x, weight, bias_N, **how)
    out = torch.empty(rows, 72, device=DEVICE) if epilogue == "elsewhere" else how.get("residual")
    actual = gemm_epilogue(x, weight, bias_N, **how, out=out, plan="cublas_twice")
    assert found == parts
    torch.testing.assert_close(actual, expected, **TOLERANCE)


def test_cublas_leaves_at_most_one_kernel() -> None:
    x, weight, bias = (tensor.to("meta") for tensor in product())
    residual = out = x.new_empty(70, 72)

    def count(bias_N: Tensor | None, **operands: Any) -> int:
        return len(plan_gemm_epilogue(x, weight, bias_N, **operands, plan="cublas", out=out, target=TARGETS[90]))

    assert count(None) == count(bias) == count(None, residual=residual) == 0
    assert count(bias, activation="gelu") == count(bias, residual=residual) == 1
    assert count(None, residual=residual, scale_N=bias) == count(bias, rows=x.new_empty(70, dtype=torch.int64)) == 1


@pytest.mark.slow
def test_gelu_takes_at_most_30_instructions_an_element() -> None:
    """Counts all instructions of the kernel behind a torch product; a thread has 16 elements."""
    job = ("gemm_epilogue", "projector_4096_896_1_tiles", 90)
    code = instructions_of([job], r"/\*[0-9a-f]{4}\*/ +[^;]+;")[job]
    assert 16 * 15 < len(code) <= 16 * 30


REFUSALS: list[tuple[str, dict[str, Any]]] = [
    ("x: expected one of .* got torch.float64", {"x": draw(70, 48).double()}),
    (r"x: expected shape \(70, 48\), got \(70, 47\)", {"x": draw(70, 47)}),
    ("x: expected a contiguous last dimension", {"x": draw(48, 70).t()}),
    ("x: expected rows at one stride", {"x": draw(5, 20, 48)[:, :14], "residual": None}),
    (r"weight_NK: expected shape \(N, K\)", {"weight_NK": draw(48)}),
    ("weight_NK: expected torch.float32", {"weight_NK": draw(72, 48, dtype=torch.float16)}),
    ("weight_NK: expected a contiguous last dimension", {"weight_NK": draw(48, 72).t()}),
    (r"bias_N: expected shape \(72,\)", {"bias_N": draw(71)}),
    (r"scale_N: expected shape \(72,\)", {"scale_N": draw(1)}),
    ("scale_N: expected None without a residual", {"scale_N": draw(72), "residual": None}),
    (r"residual: expected shape \(70, 72\)", {"residual": draw(72)}),
    ("activation: expected 'none' or 'gelu', got 'silu'", {"activation": "silu"}),
    ("activation: expected 'none' with a residual", {"activation": "gelu"}),
    ("rows: expected None with", {"rows": torch.arange(70, device=DEVICE)}),
    ("rows: expected torch.int64", {"rows": torch.arange(70, device=DEVICE).int(), "residual": None}),
    (r"rows: expected shape \(70,\)", {"rows": torch.arange(69, device=DEVICE), "residual": None}),
    ("out: expected a tensor .* got None", {"rows": torch.arange(70, device=DEVICE), "residual": None}),
    (
        r"out: expected shape \(71, 72\), got \(1, 71, 72\)",
        {"rows": torch.arange(70, device=DEVICE), "residual": None, "out": draw(1, 71, 72)},
    ),
    (r"out: expected shape \(70, 72\)", {"out": draw(70, 71)}),
    ("plan: expected one of .* got 'fast'", {"plan": "fast"}),
    ("plan: block_m: expected one of", {"plan": replace(FUSED, block_m=48)}),
]


@pytest.mark.parametrize(("message", "change"), REFUSALS, ids=[message[:30] for message, _ in REFUSALS])
def test_an_argument_that_does_not_fit_is_named(message: str, change: dict[str, Any]) -> None:
    x, weight, bias = product()
    arguments = {"x": x, "weight_NK": weight, "bias_N": bias, "residual": draw(70, 72)}
    with pytest.raises(ValueError, match=message):
        gemm_epilogue(**{**arguments, **change})


def test_a_result_that_would_destroy_what_is_read_is_refused() -> None:
    x, weight, bias = product(n=48)
    with pytest.raises(ValueError, match="out: expected memory of its own, got x"):
        gemm_epilogue(x, weight, bias, out=x)
    buffer = draw(140, 48)
    with pytest.raises(ValueError, match="out: expected all of the residual or memory of its own"):
        gemm_epilogue(x, weight, bias, residual=buffer[:70], out=buffer[::2])

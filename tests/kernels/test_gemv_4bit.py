"""Tests `gemv_4bit` beyond its contract: refusals, equal bits, splits, plans, and the machine code of its numbers."""

from typing import Any

import pytest
import torch
import triton.language as tl
from torch import Tensor

from internvl_rt.kernels import _gemv_4bit_body
from internvl_rt.kernels._contract import Case
from internvl_rt.kernels._gemv_plan import (
    MAX_ROWS,
    MAX_SPLIT_PROGRAMS,
    GemvPlan,
    GemvWorkspace,
    build_gemv_workspace,
)
from internvl_rt.kernels._launch import TARGETS, Target
from internvl_rt.kernels.gemv import MODELS
from internvl_rt.kernels.gemv_4bit import SPEC, choose_gemv_4bit_plan, gemv_4bit, gemv_4bit_reference, plan_gemv_4bit
from support.instruction_order import instructions_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
N, K, GROUP = 40, 288, 32
PLANS = {
    "rows": GemvPlan(4, 128, 1),
    "split_rows": GemvPlan(8, 128, 1, split_k=2),
    "matrix": GemvPlan(16, 256, 2, matrix=True),
    "split": GemvPlan(16, 128, 1, split_k=3, matrix=True),
}
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}  # float32 sums of 288 products with an offset of 128


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def operands(rows: int = 2, dtype: torch.dtype = torch.float32, **changes: Any) -> dict[str, Any]:
    case = Case("", {"R": rows, "N": N, "K": K, "group": GROUP, "zero": True, "bias": True, "norm": True})
    return {**SPEC.make_inputs(case, dtype, DEVICE), **changes}


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


WORDS, SCALES, ZEROS = (operands()[name] for name in ("words_NW", "scale_NG", "zero_NG"))
REFUSALS: list[tuple[str, dict[str, Any]]] = [
    ("x_RK: expected at most 16 rows, got 17", {"x_RK": draw(17, K)}),
    ("x_RK: expected one of .* got torch.float64", {"x_RK": draw(2, K).double()}),
    ("x_RK: expected two dimensions", {"x_RK": draw(K)}),
    ("x_RK: expected a contiguous last dimension", {"x_RK": draw(K, 2).t()}),
    (r"words_NW: expected shape \(40, 64\), got \(40, 48\)", {"x_RK": draw(2, 512)}),
    ("words_NW: expected two dimensions, none 0", {"words_NW": WORDS[:0]}),
    ("words_NW: expected torch.int32", {"words_NW": WORDS.long()}),
    ("words_NW: expected a contiguous last dimension", {"words_NW": WORDS.t().contiguous().t()}),
    ("group: expected one of .* got 16", {"group": 16}),
    (r"scale_NG: expected shape \(40, 5\)", {"group": 64}),
    ("scale_NG: expected one of .* got torch.float64", {"scale_NG": SCALES.double()}),
    ("scale_NG: expected a contiguous tensor", {"scale_NG": SCALES.repeat(1, 2)[:, :9]}),
    (r"zero_NG: expected shape \(40, 9\)", {"zero_NG": ZEROS[:, :5]}),
    ("zero_NG: expected torch.uint8", {"zero_NG": ZEROS.int()}),
    ("zero_NG: expected a contiguous tensor", {"zero_NG": ZEROS.repeat(1, 2)[:, :9]}),
    (r"bias_N: expected shape \(40,\)", {"bias_N": draw(N - 1)}),
    (r"norm_weight_K: expected shape \(288,\)", {"norm_weight_K": draw(N)}),
    ("activation: expected 'none' or 'swiglu', got 'gelu'", {"activation": "gelu"}),
    (r"residual_RN: expected shape \(2, 20\)", {"residual_RN": draw(2, N), "activation": "swiglu"}),
    (r"out: expected shape \(2, 40\)", {"out": draw(1, N)}),
    ("plan: expected matrix units for more than 2 rows", {"x_RK": draw(3, K), "plan": PLANS["rows"]}),
    ("plan: expected block_k from 128 on", {"plan": GemvPlan(4, 64, 1)}),
    ("plan: expected no stages, block_n from 16 on, block_k 128 a warp", {"plan": GemvPlan(8, 128, 1, matrix=True)}),
    ("plan: expected no stages, block_n from 16 on, block_k 128 a warp", {"plan": GemvPlan(16, 128, 2, matrix=True)}),
]


@pytest.mark.parametrize(("message", "change"), REFUSALS, ids=[message[:50] for message, _ in REFUSALS])
def test_an_argument_that_does_not_fit_is_named(message: str, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        gemv_4bit(**operands(**change))


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_the_residual_may_be_overwritten(plan: GemvPlan) -> None:
    residual = draw(2, 2 * N)[:, :N]
    inputs = operands(residual_RN=residual)
    expected = gemv_4bit_reference(**inputs)
    inputs["plan"] = plan
    assert gemv_4bit(**inputs, out=residual) is residual
    torch.testing.assert_close(residual, expected, **TOLERANCE)


def test_a_workspace_serves_call_after_call() -> None:
    """The workspace holds NaN at first; its counts are 0 behind every call."""
    inputs = operands(5, plan=PLANS["split"])
    partial = torch.full((2448,), torch.nan, device=DEVICE)
    shared = GemvWorkspace(partial, torch.zeros(3, dtype=torch.int32, device=DEVICE))
    first = gemv_4bit(**inputs, workspace=shared)
    assert not shared.arrived.any()
    gemv_4bit(**operands(16, plan=PLANS["split"]), workspace=shared)
    assert torch.equal(gemv_4bit(**inputs, workspace=shared), first)
    assert torch.equal(gemv_4bit(**inputs), first)
    torch.testing.assert_close(first, gemv_4bit_reference(**inputs), **TOLERANCE)


@pytest.mark.usefixtures("one_order_of_sums")
@pytest.mark.parametrize("plan", [None, PLANS["matrix"], PLANS["split"]], ids=["chosen", "matrix", "split"])
def test_a_row_does_not_depend_on_the_rows_beside_it(plan: GemvPlan | None) -> None:
    inputs = operands(16, torch.float16, plan=plan, norm_weight_K=None)
    together = gemv_4bit(**inputs)
    for rows in (slice(0, 1), slice(2, 4), slice(9, 16)):
        assert torch.equal(gemv_4bit(**{**inputs, "x_RK": inputs["x_RK"][rows]}), together[rows])


def products() -> list[tuple[int, int]]:
    """Returns N and K of every product of a decoder's layer, of every model."""
    sizes = set()
    for width, mlp, heads, groups, channels, _ in MODELS.values():
        sizes |= {((heads + 2 * groups) * channels, width), (width, width), (2 * mlp, width), (width, mlp)}
    return sorted(sizes)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_plans_of_real_models(target: Target) -> None:
    room = build_gemv_workspace(torch.device("meta"), MAX_SPLIT_PROGRAMS * target.num_sms)
    splits = 0
    for n, k in products():
        plans = {choose_gemv_4bit_plan(rows, n, k, torch.bfloat16, target) for rows in range(1, MAX_ROWS + 1)}
        (plan,) = plans  # so a row has the same bits in every batch
        chunks, tiles = -(-k // plan.block_k), -(-n // plan.block_n)
        assert (plan.split_k - 1) * -(-chunks // plan.split_k) < chunks  # no split is empty
        assert plan.split_k == 1 or tiles * plan.split_k <= MAX_SPLIT_PROGRAMS * target.num_sms
        splits += plan.split_k > 1
        few = {choose_gemv_4bit_plan(rows, n, k, torch.float16, target, normed=True) for rows in (1, 2)}
        (on_cores,) = few
        assert not on_cores.matrix
        assert on_cores.split_k == 1
        case = Case("", {"R": MAX_ROWS, "N": n, "K": k})
        inputs = SPEC.make_inputs(case, torch.bfloat16, torch.device("meta"))
        out = torch.empty(MAX_ROWS, n, dtype=torch.bfloat16, device="meta")
        plan_gemv_4bit(**inputs, workspace=room, out=out, target=target)  # the workspace has room
    assert splits > 5


@pytest.mark.parametrize("target", [*TARGETS.values(), Target(90, 132, interpreted=True)], ids=str)
def test_the_kernel_starts_before_the_last_has_ended_where_it_can(target: Target) -> None:
    expected = target.capability >= 90 and not target.interpreted
    for allowed in (True, False):
        (launch,) = plan_gemv_4bit(**operands(), programmatic_launch=allowed, out=draw(2, N), target=target)
        assert launch.pdl == launch.constexprs["PDL"] == (expected and allowed)
        assert launch.constexprs["ASM"] == (not target.interpreted)


def test_every_case_names_a_plan_that_is_there() -> None:
    assert {case.sizes["plan"] for case in SPEC.test_cases if "plan" in case.sizes} == set(PLANS)


@pytest.mark.slow
@pytest.mark.fast("90")
@pytest.mark.parametrize("capability", [80, 90])
def test_numbers_become_operands_two_at_a_time_and_without_a_conversion(capability: int) -> None:
    """Checks the machine code: a LOP3 and an exact HFMA2 or HADD2 for two numbers, no conversion of an integer."""
    names = r"LOP3\.LUT[^;]*0xf000f\b|HFMA2\.BF16|HADD2\.BF16|HMMA|LDG\.\S*128|I2F|PRMT|SHF\.R|ACQBULK"
    for rows in (1, 16):
        job = ("gemv_4bit", f"8b_down_{rows}", capability)
        found = instructions_of([job], names)[job]
        masked = sum(name.startswith("LOP3") for name in found)
        weights = 32 * 512 // 128  # of a thread, in a chunk
        assert masked == weights // 2
        assert sum(name in ("HFMA2.BF16", "HADD2.BF16") for name in found) == weights // 2
        assert found.count("HMMA") == weights * 32 // (16 * 16) * (2 if rows > 8 else 1)
        assert sum(name.startswith("LDG") for name in found) >= 2 * 4  # words: before the loop, and in it
        assert "I2F" not in found
        if capability == 90:
            assert sum(name.startswith("LDG") for name in found[: found.index("ACQBULK")]) >= 4


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a compiled kernel keeps its arrangement")
@pytest.mark.fast("5")
@pytest.mark.parametrize("rows", [1, 5, 16])
def test_threads_may_be_given_dimensions_in_either_order(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6 does so from the first one on, which the kernel's loads follow."""
    inputs = operands(rows, torch.float16, plan=PLANS["matrix"])
    expected = gemv_4bit(**inputs)
    monkeypatch.setattr(_gemv_4bit_body, "FIRST", tl.constexpr(not _gemv_4bit_body.FIRST.value))
    assert torch.equal(gemv_4bit(**inputs), expected)
    on_cores = operands(1, plan=PLANS["rows"])
    torch.testing.assert_close(gemv_4bit(**on_cores), gemv_4bit_reference(**on_cores), **TOLERANCE)


def test_places_of_words_beyond_32_bits_are_refused() -> None:
    inputs = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in operands().items()}
    inputs["words_NW"] = torch.empty_strided((N, 48), (2**26, 1), dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match="words_NW: expected places of words that 32 bits can tell"):
        gemv_4bit(**inputs)


def test_a_nan_in_the_norm_shows_in_float16() -> None:
    inputs = operands(5, torch.float16)
    inputs["norm_weight_K"][3] = torch.nan
    assert gemv_4bit(**inputs).isnan().all()

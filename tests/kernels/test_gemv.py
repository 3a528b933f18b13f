"""Tests `gemv` and `gemv_qkv` beyond their contracts: refusals, equal bits, splits, plans, early loads of weights."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from internvl_rt.kernels._contract import Case
from internvl_rt.kernels._gemv_plan import (
    MAX_ROWS,
    MAX_SPLIT_PROGRAMS,
    RESIDENT,
    SMALL_WEIGHT,
    GemvPlan,
    GemvWorkspace,
    build_gemv_workspace,
    choose_gemv_plan,
)
from internvl_rt.kernels._launch import TARGETS, Target
from internvl_rt.kernels.gemv import MODELS, gemv, gemv_reference, plan_gemv
from internvl_rt.kernels.gemv import SPEC as GEMV
from internvl_rt.kernels.gemv_qkv import SPEC as QKV
from internvl_rt.kernels.gemv_qkv import gemv_qkv, plan_gemv_qkv
from support.instruction_order import instructions_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SPLIT = GemvPlan(16, 64, 4, split_k=3, matrix=True)
PLANS = {
    "rows": GemvPlan(4, 64, 2),
    "split_rows": GemvPlan(8, 32, 1, split_k=2),
    "matrix": GemvPlan(16, 64, 2, matrix=True),
    "split": SPLIT,
    "stages": GemvPlan(64, 64, 4, matrix=True, num_stages=3),
    "split_stages": GemvPlan(16, 32, 4, split_k=3, matrix=True, num_stages=2),
}
MATRIX = ("matrix", "split", "stages", "split_stages")
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}  # float32 sums of 160 products are added in another order
N, K = 40, 160
PREFETCH = "CCTL.E.PF2"  # this instruction asks L2 for a cache line


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float32, device=DEVICE).to(dtype)


def operands(rows: int = 2, **changes: Any) -> dict[str, Any]:
    tensors = {"x_RK": draw(rows, K), "weight_NK": draw(N, K), "bias_N": draw(N), "norm_weight_K": draw(K)}
    return {**tensors, "eps": 1e-6, **changes}


def qkv_operands(rows: int = 2, **changes: Any) -> dict[str, Any]:
    case = Case("", {"R": rows, "D": K, "H": 2, "G": 1, "C": 16})
    return {**QKV.make_inputs(case, torch.float32, DEVICE), **changes}


def workspace(partial: int, arrived: int, device: torch.device = DEVICE) -> GemvWorkspace:
    counts = torch.zeros(arrived, dtype=torch.int32, device=device)
    return GemvWorkspace(torch.full((partial,), torch.nan, device=device), counts)


REFUSALS: list[tuple[str, dict[str, Any]]] = [
    ("x_RK: expected at most 16 rows, got 17", {"x_RK": draw(17, K)}),
    ("x_RK: expected one of .* got torch.float64", {"x_RK": draw(2, K).double()}),
    ("x_RK: expected two dimensions", {"x_RK": draw(K)}),
    (r"x_RK: expected shape \(2, 160\), got \(2, 159\)", {"x_RK": draw(2, K - 1)}),
    ("x_RK: expected a contiguous last dimension", {"x_RK": draw(K, 2).t()}),
    ("weight_NK: expected two dimensions, none 0", {"weight_NK": draw(0, K)}),
    ("weight_NK: expected torch.float32", {"weight_NK": draw(N, K, dtype=torch.float16)}),
    ("weight_NK: expected a contiguous last dimension", {"weight_NK": draw(K, N).t()}),
    ("weight_NK: expected an even number of rows", {"weight_NK": draw(3, K), "bias_N": None, "activation": "swiglu"}),
    (r"bias_N: expected shape \(40,\)", {"bias_N": draw(N - 1)}),
    (r"norm_weight_K: expected shape \(160,\)", {"norm_weight_K": draw(N)}),
    ("activation: expected 'none' or 'swiglu', got 'gelu'", {"activation": "gelu"}),
    (r"residual_RN: expected shape \(2, 20\)", {"residual_RN": draw(2, N), "activation": "swiglu"}),
    (r"out: expected shape \(2, 40\)", {"out": draw(1, N)}),
    ("plan: expected matrix units for more than 2 rows", {"x_RK": draw(3, K), "plan": PLANS["rows"]}),
    ("workspace: expected 2448 partial sums, got 2447", {"plan": SPLIT, "workspace": workspace(2447, 3)}),
    ("workspace: expected one on .* got meta", {"plan": SPLIT, "workspace": workspace(2448, 3, torch.device("meta"))}),
    ("workspace: expected 3 counts, got 2", {"plan": SPLIT, "workspace": workspace(2448, 2)}),
]


@pytest.mark.parametrize(("message", "change"), REFUSALS, ids=[message[:40] for message, _ in REFUSALS])
def test_an_argument_that_does_not_fit_is_named(message: str, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        gemv(**operands(**change))


QKV_REFUSALS: list[tuple[str, dict[str, Any]]] = [
    ("x_RD: expected at most 16 rows, got 17", {"x_RD": draw(17, K)}),
    (r"norm_weight_D: expected shape \(160,\)", {"norm_weight_D": draw(16)}),
    (r"weight_KD: expected \(4 \+ 2 \* 1\) \* 16 = 96 rows, got 64", {"num_heads": 4}),
    (r"bias_K: expected shape \(64,\)", {"bias_K": draw(96)}),
    ("num_heads: expected a multiple of 1, got 0", {"num_heads": 0}),
    ("position_T: expected torch.float32, got torch.float16", {"position_T": draw(2, dtype=torch.float16)}),
    (r"inv_freq_C: expected shape \(8,\)", {"inv_freq_C": draw(16)}),
    ("slot_T: expected torch.int32, got torch.int64", {"slot_T": torch.zeros(2, dtype=torch.int64, device=DEVICE)}),
    (r"k_cache_BGPC: expected shape \[B, G, P, C\]", {"k_cache_BGPC": draw(2, 16, 16)}),
    ("k_cache_BGPC: expected a head dim of .* got 24", {"k_cache_BGPC": draw(2, 1, 16, 24)}),
    ("v_cache_BGPC: expected shape", {"v_cache_BGPC": draw(2, 1, 8, 16)}),
    ("v_cache_BGPC: expected strides", {"v_cache_BGPC": draw(2, 1, 16, 32)[..., :16]}),
    (r"out: expected shape \(2, 2, 16\)", {"out": draw(2, 32)}),
]


@pytest.mark.parametrize(("message", "change"), QKV_REFUSALS, ids=[message[:40] for message, _ in QKV_REFUSALS])
def test_an_argument_of_gemv_qkv_that_does_not_fit_is_named(message: str, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        gemv_qkv(**qkv_operands(**change))


@pytest.mark.parametrize(
    ("message", "numbers"),
    [
        ("plan: expected block_n one of", (12, 64, 2)),
        ("plan: expected num_warps one of", (16, 64, 3)),
        ("plan: expected block_k a power of two", (16, 96, 2)),
        ("plan: expected block_k a power of two", (16, 64, 8)),
        ("plan: expected split_k from 1 to 64", (16, 64, 2, 0)),
        ("plan: expected num_stages 0 or 2 to 8", (64, 64, 4, 1, True, 1)),
        ("plan: expected matrix with num_stages", (64, 64, 4, 1, False, 3)),
        ("plan: expected block_n one of 16, 32, 64, 128", (8, 64, 4, 1, True, 3)),
        ("plan: expected num_warps 4 or 8", (64, 64, 2, 1, True, 3)),
        ("plan: expected block_k a power of two", (64, 96, 4, 1, True, 3)),
    ],
)
def test_a_plan_that_no_kernel_follows_is_refused(message: str, numbers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=message):
        GemvPlan(*numbers)


def test_a_result_that_would_destroy_what_is_read_is_refused() -> None:
    square = {"weight_NK": draw(K, K), "bias_N": None}
    x, buffer = draw(2, K), draw(4, K)
    with pytest.raises(ValueError, match="out: expected memory of its own, got x_RK"):
        gemv(**operands(**square, x_RK=x, out=x))
    with pytest.raises(ValueError, match="out: expected all of the residual or memory of its own"):
        gemv(**operands(**square, residual_RN=buffer[:2], out=buffer[::2]))


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_the_residual_may_be_overwritten(plan: GemvPlan) -> None:
    residual = draw(2, 2 * N)[:, :N]
    inputs = operands(residual_RN=residual)
    expected = gemv_reference(**inputs)
    assert gemv(**inputs, out=residual, plan=plan) is residual
    torch.testing.assert_close(residual, expected, **TOLERANCE)


@pytest.mark.fast("1-0", "5-2")
@pytest.mark.parametrize("stages", [0, 2])
@pytest.mark.parametrize("splits", [1, 2, 3, 5])
def test_a_workspace_serves_call_after_call(splits: int, stages: int) -> None:
    """The workspace holds NaN at first, and other products use it in between."""
    inputs, plan = operands(5), GemvPlan(16, 64 // 2, 2, split_k=splits, matrix=True)
    if stages:
        plan = replace(plan, num_warps=4, num_stages=stages)
    shared = workspace(4080, 4)
    first = gemv(**inputs, plan=plan, workspace=shared)
    assert not shared.arrived.any()
    gemv_qkv(**qkv_operands(3, plan=GemvPlan(16, 64, 2, split_k=2, matrix=True)), workspace=shared)
    gemv(**operands(16), plan=SPLIT, workspace=shared)
    assert torch.equal(gemv(**inputs, plan=plan, workspace=shared), first)
    assert torch.equal(gemv(**inputs, plan=plan), first)
    torch.testing.assert_close(first, gemv_reference(**inputs), **TOLERANCE)


@pytest.mark.usefixtures("one_order_of_sums")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("plan", [None, *(PLANS[name] for name in MATRIX)], ids=["chosen", *MATRIX])
def test_a_row_does_not_depend_on_the_rows_beside_it(plan: GemvPlan | None, dtype: torch.dtype) -> None:
    inputs = {name: value.to(dtype) if name != "eps" else value for name, value in operands(16).items()}
    together = gemv(**inputs, plan=plan)
    for rows in (slice(0, 3), slice(9, 16)):
        assert torch.equal(gemv(**{**inputs, "x_RK": inputs["x_RK"][rows]}, plan=plan), together[rows])


@pytest.mark.parametrize("rows", [1, 3])
def test_a_slot_beyond_the_cache_is_none(rows: int) -> None:
    inputs = qkv_operands(rows)
    inputs["slot_T"][0] = inputs["k_cache_BGPC"].shape[0] * inputs["k_cache_BGPC"].shape[2]
    untouched = {**inputs, **{name: inputs[name].clone() for name in ("k_cache_BGPC", "v_cache_BGPC")}}
    q_RHC = gemv_qkv(**inputs)
    assert not q_RHC[0].any()
    assert bool(q_RHC[1:].all())
    untouched["slot_T"] = torch.where(torch.arange(rows, device=DEVICE) == 0, -1, inputs["slot_T"])
    gemv_qkv(**untouched)
    for name in ("k_cache_BGPC", "v_cache_BGPC"):
        assert torch.equal(inputs[name], untouched[name])


def products() -> list[tuple[int, int]]:
    """Returns N and K of every product in a decode step of every model."""
    sizes = set()
    for width, mlp, heads, groups, channels, vocabulary in MODELS.values():
        sizes |= {((heads + 2 * groups) * channels, width), (width, width), (2 * mlp, width), (width, mlp)}
        sizes.add((vocabulary, width))
    return sorted(sizes)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plans_of_real_models(dtype: torch.dtype, target: Target) -> None:
    counts = []
    for n, k in products():
        few = {choose_gemv_plan(rows, n, k, dtype, target) for rows in (1, 2)}
        many = {choose_gemv_plan(rows, n, k, dtype, target) for rows in range(3, MAX_ROWS + 1)}
        assert (len(few), len(many)) == (1, 1)
        for plan in few | many:
            chunks, tiles = -(-k // plan.block_k), -(-n // plan.block_n)
            per_split = -(-chunks // plan.split_k)
            assert (plan.split_k - 1) * per_split < chunks  # no split is empty
            staged = plan.num_stages > 0
            assert staged == (
                plan in many and dtype == torch.bfloat16 and target.capability == 90 and 2 * n * k > SMALL_WEIGHT
            )
            if staged and plan.split_k > 1:  # all programs run in one round, on nearly every multiprocessor
                assert 0.7 * target.num_sms < tiles * plan.split_k <= 2 * target.num_sms
            elif plan.split_k > 1 and per_split > 1:  # splits must fill two thirds of the GPU in every round
                share = tiles * plan.split_k / (RESIDENT * target.num_sms)
                assert share / math.ceil(share) >= 2 / 3
            assert plan.matrix or (plan.split_k == 1 and tiles >= target.num_sms)
            chunk = plan.block_k * (plan.block_n + 16) * dtype.itemsize if plan.matrix else 0
            shared = chunk * max(1, plan.num_stages)
            assert max(shared, plan.num_warps * 16 * plan.block_n * 4) <= target.shared_bytes
            counts.append(tiles * plan.split_k if plan.split_k > 1 else 0)
    assert 0 < max(counts) <= MAX_SPLIT_PROGRAMS * target.num_sms  # build_gemv_workspace allocates this much


def test_a_workspace_is_large_enough_for_every_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("internvl_rt.kernels._gemv_plan.target_of", lambda device: TARGETS[120])
    room = build_gemv_workspace(torch.device("meta"))
    split = 0
    for n, k in products():
        x, weight = (torch.empty(size, k, dtype=torch.bfloat16, device="meta") for size in (MAX_ROWS, n))
        out = x.new_empty(MAX_ROWS, n)
        plan_gemv(x, weight, None, None, 1e-6, workspace=room, out=out, target=TARGETS[120])
        split += choose_gemv_plan(MAX_ROWS, n, k, x.dtype, TARGETS[120]).split_k > 1
    assert split > 5


@pytest.mark.parametrize("target", [*TARGETS.values(), Target(90, 132, interpreted=True)], ids=str)
def test_kernels_start_before_the_last_has_ended_where_they_can(target: Target) -> None:
    expected = target.capability >= 90 and not target.interpreted
    inputs, qkv_inputs = operands(), qkv_operands()
    launches = (
        *plan_gemv(**inputs, out=draw(2, N), target=target),
        *plan_gemv_qkv(**qkv_inputs, out=draw(2, 2, 16), target=target),
    )
    assert [launch.pdl for launch in launches] == [expected] * 2
    assert [launch.constexprs["PDL"] for launch in launches] == [expected] * 2
    launches = (
        *plan_gemv(**inputs, programmatic_launch=False, out=draw(2, N), target=target),
        *plan_gemv_qkv(**qkv_inputs, programmatic_launch=False, out=draw(2, 2, 16), target=target),
    )
    assert not any(launch.pdl or launch.constexprs["PDL"] for launch in launches)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_the_first_weights_are_on_their_way_before_the_wait(capability: int) -> None:
    """Checks the machine code, where ACQBULK waits for the previous kernel."""
    cases = [("gemv", "8b_gate_up_1"), ("gemv_qkv", "1b_1"), ("gemv", "1b_o_8"), ("gemv_qkv", "1b_8")]
    staged = [("gemv", "8b_gate_up_8"), ("gemv", "8b_down_8"), ("gemv_qkv", "8b_8")]
    for job, names in instructions_of([(*case, capability) for case in cases + staged]).items():
        if capability == 80:
            assert not {"ACQBULK", "PREEXIT", PREFETCH} & set(names)
            continue
        before, after = names[: names.index("ACQBULK")], names[names.index("ACQBULK") :]
        loaded, multiply = ("LDGSTS", "HGMMA") if job[:2] in staged else ("LDG", "HMMA")
        assert before.count(PREFETCH if job[:2] in staged else "LDG") >= 4
        assert set(before) <= {"LDG", PREFETCH}
        assert after.index("PREEXIT") < after.index(loaded)
        assert (multiply in after) == job[1].endswith("_8")


@pytest.mark.slow
def test_chunks_are_on_their_way_to_shared_memory_while_one_is_multiplied() -> None:
    """In the machine code, with and without a norm, copies stand before the loop, and in the loop after the product."""
    for names in instructions_of([("gemv", "8b_gate_up_8", 90), ("gemv", "8b_down_8", 90)]).values():
        first, last = names.index("HGMMA"), len(names) - 1 - names[::-1].index("HGMMA")
        assert names[:first].count("LDGSTS") >= 2 * 8
        assert "LDGSTS" in names[last:]


def test_every_case_names_a_plan_that_is_there() -> None:
    named = [case.sizes["plan"] for spec in (GEMV, QKV) for case in spec.test_cases if "plan" in case.sizes]
    assert set(named) == set(PLANS)


def test_a_nan_in_the_norm_shows_in_float16() -> None:
    """Operands are rounded to tf32 by adding to their bits, which could turn a GPU's NaN (0x7fffffff) into zero."""
    case = next(case for case in GEMV.test_cases if case.name == "swiglu_5")
    inputs = GEMV.make_inputs(case, torch.float16, DEVICE)
    inputs["norm_weight_K"][3] = torch.nan
    assert gemv(**inputs).isnan().all()

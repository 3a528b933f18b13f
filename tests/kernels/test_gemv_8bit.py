"""Tests `gemv_8bit` beyond its contract: its inline assembly, refusals, small numbers, equal bits, plans."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from internvl_rt.kernels import _numbers_8bit
from internvl_rt.kernels._contract import Case
from internvl_rt.kernels._gemv_plan import MAX_ROWS, GemvPlan, build_gemv_workspace, choose_8bit_plan
from internvl_rt.kernels._launch import TARGETS, Target, run
from internvl_rt.kernels._numbers_8bit import operand_constants
from internvl_rt.kernels.gemv import MODELS, TEST_PLANS
from internvl_rt.kernels.gemv_8bit import SPEC, gemv_8bit, gemv_8bit_reference, plan_gemv_8bit

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
N, K = 40, 160


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def operands(rows: int = 2, kind: str = "float8", groups: int = 1, **changes: Any) -> dict[str, Any]:
    numbers = torch.randint(-100, 100, (N, K), device=DEVICE).float()
    weight = numbers.to(torch.float8_e4m3fn if kind == "float8" else torch.int8)
    tensors = {"x_RK": torch.randn(rows, K, device=DEVICE), "weight_NK": weight}
    tensors |= {"scale_NG": torch.rand(N, groups, device=DEVICE) / 50}
    tensors |= {"bias_N": torch.randn(N, device=DEVICE), "norm_weight_K": torch.randn(K, device=DEVICE)}
    return {**tensors, "eps": 1e-6, **changes}


# What the instructions of `_numbers_8bit.py` compute, on registers of 32 bits, or of 16 bits after a move to a pair.


def _permuted(a: int, b: int, selector: int) -> int:
    source = (a | b << 32).to_bytes(8, "little")
    return int.from_bytes(bytes(source[selector >> 4 * i & 7] for i in range(4)), "little")


def _floats(bits: int, dtype: torch.dtype) -> Tensor:
    return torch.tensor([bits & 0xFFFF, bits >> 16], dtype=torch.int32).to(torch.uint16).view(dtype).double()


def _pair(values: Tensor, dtype: torch.dtype) -> int:
    low, high = values.to(dtype).view(torch.int16).tolist()
    return (low & 0xFFFF) | (high & 0xFFFF) << 16


def _float32(bits: int) -> np.float32:
    return np.uint32(bits).view(np.float32)


INSTRUCTIONS: dict[str, Callable[..., int]] = {
    "mov.b32": lambda a: a,
    "mov.f32": lambda a: a,
    "shl.b32": lambda a, n: a << n & 0xFFFFFFFF,
    "shr.b32": lambda a, n: a >> n,
    "shr.s32": lambda a, n: ((a ^ 1 << 31) - (1 << 31) >> n) & 0xFFFFFFFF,
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "prmt.b32": _permuted,
    "lop3.b32": lambda a, b, c, table: (a & b) | c if table == 0xEA else 1 // 0,  # 0xEA is (0xF0 & 0xCC) | 0xAA
    "add.f32": lambda a, b: int((_float32(a) + _float32(b)).view(np.uint32)),
    "add.rn.f16x2": lambda a, b: _pair(_floats(a, torch.float16) + _floats(b, torch.float16), torch.float16),
    "fma.rn.bf16x2": lambda a, b, c: _pair(
        _floats(a, torch.bfloat16) * _floats(b, torch.bfloat16) + _floats(c, torch.bfloat16), torch.bfloat16
    ),
    "cvt.rn.f16x2.e4m3x2": lambda a: _pair(
        torch.tensor([a & 0xFF, a >> 8], dtype=torch.uint8).view(torch.float8_e4m3fn).float(), torch.float16
    ),
    "cvt.f32.f16": lambda a: int(np.uint16(a).view(np.float16).astype(np.float32).view(np.uint32)),
}


def run_ptx(text: str, word: int) -> list[int]:
    """Runs inline assembly on one word, its operand $4; returns $0 to $3."""
    registers: dict[str, int] = {"$4": word}
    for line in text.strip("{} \n").split(";\n"):
        name, _, rest = line.strip().rstrip(";").partition(" ")
        if not name or name.startswith(".reg"):
            continue
        pair = re.fullmatch(r"(\{.*\}), (\S+)|(\S+), (\{.*\})", rest)
        if pair and pair[1]:
            low, high = pair[1].strip("{}").split(", ")
            registers |= {low: registers[pair[2]] & 0xFFFF, high: registers[pair[2]] >> 16}
            continue
        target, *sources = rest.split(", ")
        values = [
            registers[each] if each in registers else int(each.replace("0f", "0x", 1) if "0f" in each else each, 0)
            for each in sources
        ]
        registers[target] = INSTRUCTIONS[name](*values)
    return [registers[f"${i}"] for i in range(4)]


@pytest.mark.parametrize(
    ("name", "numbers", "dtype", "factor"),
    [
        ("FP8_BY_FLOAT16", torch.float8_e4m3fn, torch.float32, 1.0),
        ("FP8_TO_FLOAT32", torch.float8_e4m3fn, torch.float32, 2.0**-120),
        ("FP8_TO_BFLOAT16", torch.float8_e4m3fn, torch.bfloat16, 2.0**-120),
        ("FP8_TO_FLOAT16", torch.float8_e4m3fn, torch.float16, 2.0**-8),
        ("INT8_TO_FLOAT32", torch.int8, torch.float32, 1.0),
        ("INT8_TO_BFLOAT16", torch.int8, torch.bfloat16, 1.0),
        ("INT8_TO_FLOAT16", torch.int8, torch.float16, 1.0),
    ],
)
def test_the_inline_assembly_gives_every_number_its_value(
    name: str, numbers: torch.dtype, dtype: torch.dtype, factor: float
) -> None:
    text = getattr(_numbers_8bit, name).value
    for first in range(256):
        codes = [(first + step) % 256 for step in (0, 3, 100, 201)]
        codes = [code - (numbers != torch.int8 and code % 128 == 127) for code in codes]  # not NaN
        found = run_ptx(text, int.from_bytes(bytes(codes), "little"))
        bits = torch.tensor(found, dtype=torch.int64)
        values = bits.to(torch.int32 if dtype == torch.float32 else torch.int16).view(dtype)
        expected = torch.tensor(codes, dtype=torch.uint8).view(numbers).double() * factor
        assert torch.equal(values.double(), expected), codes


REFUSALS: list[tuple[str, dict[str, Any]]] = [
    ("x_RK: expected at most 16 rows, got 17", {"rows": 17}),
    ("x_RK: expected one of .* got torch.float64", {"x_RK": torch.zeros(2, K, dtype=torch.float64, device=DEVICE)}),
    ("weight_NK: expected one of .* got torch.float16", {"weight_NK": torch.zeros(N, K, device=DEVICE).half()}),
    (r"x_RK: expected shape \(2, 159\)", {"weight_NK": torch.zeros(N, K - 1, dtype=torch.int8, device=DEVICE)}),
    ("scale_NG: expected torch.float32", {"scale_NG": torch.ones(N, 1, device=DEVICE).half()}),
    (r"scale_NG: expected shape \(40, 2\), got \(40, 3\)", {"scale_NG": torch.ones(N, 3, device=DEVICE)}),
    (r"scale_NG: expected shape \(40, 1\), got \(39, 1\)", {"scale_NG": torch.ones(N - 1, 1, device=DEVICE)}),
    ("scale_NG: expected two dimensions", {"scale_NG": torch.ones(N, device=DEVICE)}),
    (r"bias_N: expected shape \(40,\)", {"bias_N": torch.zeros(N - 1, device=DEVICE)}),
    ("plan: expected matrix units for more than 2 rows", {"rows": 3, "plan": GemvPlan(4, 64, 2)}),
    ("plan: expected at most 128 columns", {"plan": GemvPlan(16, 256, 1, matrix=True), "groups": 2}),
    ("plan: expected at most 128 columns", {"plan": GemvPlan(16, 256, 4, matrix=True, num_stages=2), "groups": 2}),
]


@pytest.mark.parametrize(("message", "change"), REFUSALS, ids=[message[:40] for message, _ in REFUSALS])
def test_an_argument_that_does_not_fit_is_named(message: str, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        gemv_8bit(**operands(**change))


@pytest.mark.parametrize("name", ["rows", "matrix", "stages"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_smallest_numbers_and_small_inputs_count(name: str, dtype: torch.dtype) -> None:
    """A subnormal FP8 number is moved to where the operand's type is subnormal too."""
    x = torch.full((2, K), 1e-6 if dtype == torch.float32 else 2e-4, device=DEVICE).to(dtype)
    weight = torch.full((N, K), 1, dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn)
    scale = torch.full((N, 1), 4.0, device=DEVICE)
    y = gemv_8bit(x, weight, scale, None, None, 0.0, plan=TEST_PLANS[name])
    torch.testing.assert_close(y, (x.float().sum(1, keepdim=True) * 4 / 512).expand(2, N).to(dtype), rtol=1e-3, atol=0)


@pytest.mark.usefixtures("one_order_of_sums")
@pytest.mark.parametrize("name", [None, "matrix", "split", "stages"])
def test_a_row_does_not_depend_on_the_rows_beside_it(name: str | None) -> None:
    inputs = operands(16, groups=2)
    plan = TEST_PLANS[name] if name else None
    together = gemv_8bit(**inputs, plan=plan)
    for rows in (slice(0, 3), slice(9, 16)):
        assert torch.equal(gemv_8bit(**{**inputs, "x_RK": inputs["x_RK"][rows]}, plan=plan), together[rows])


@pytest.mark.parametrize("offset", [1, 4])
def test_a_weight_at_any_address_gives_the_same(offset: int) -> None:
    """Words of four numbers are read where they can be."""
    inputs = operands(2, "int8")
    buffer = torch.zeros(N * K + offset, dtype=torch.int8, device=DEVICE)
    buffer[offset:] = inputs["weight_NK"].flatten()
    moved = gemv_8bit(**{**inputs, "weight_NK": buffer[offset:].view(N, K)})
    torch.testing.assert_close(moved, gemv_8bit(**inputs), rtol=1e-6, atol=1e-6)


def test_a_workspace_of_gemv_serves_it() -> None:
    inputs = operands(5, groups=2)
    workspace = build_gemv_workspace(DEVICE, 16)
    y = gemv_8bit(**inputs, plan=TEST_PLANS["split"], workspace=workspace)
    assert not workspace.arrived.any()
    torch.testing.assert_close(y, gemv_8bit_reference(**inputs), rtol=1e-4, atol=1e-4)


def products() -> list[tuple[int, int]]:
    """Returns N and K of the products of every model's layers."""
    sizes = set()
    for width, mlp, heads, groups, channels, _ in MODELS.values():
        sizes |= {((heads + 2 * groups) * channels, width), (width, width), (2 * mlp, width), (width, mlp)}
    return sorted(sizes)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_plans_of_real_models(dtype: torch.dtype, target: Target) -> None:
    for n, k in products():
        for normed in (False, True):
            few = {choose_8bit_plan(rows, n, k, dtype, target, normed=normed) for rows in (1, 2)}
            many = {choose_8bit_plan(rows, n, k, dtype, target, normed=normed) for rows in range(3, MAX_ROWS + 1)}
            assert (len(few), len(many)) == (1, 1)
            for plan in few | many:
                chunks = -(-k // plan.block_k)
                assert (plan.split_k - 1) * -(-chunks // plan.split_k) < chunks  # no split is empty
                if plan in many:  # every part of a chunk has one scale
                    assert plan.block_k // (1 if plan.num_stages else plan.num_warps) <= 128
                else:
                    assert k >= 0.75 * chunks * plan.block_k or plan.num_warps == 2


@pytest.mark.parametrize("rows", [1, 8])
def test_a_workspace_is_large_enough_for_every_plan(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for target in TARGETS.values():
        monkeypatch.setattr("internvl_rt.kernels._gemv_plan.target_of", lambda device, target=target: target)
        room = build_gemv_workspace(torch.device("meta"))
        for case in (case for case in SPEC.model_cases if case["R"] == rows):
            inputs = SPEC.make_inputs(case, torch.bfloat16, torch.device("meta"))
            out = SPEC.reference(**inputs)
            plan_gemv_8bit(**inputs, workspace=room, out=out, target=target)


def test_only_targets_with_fp8_convert_it() -> None:
    def constants(target: Target, *, in_words: bool = True) -> tuple[Any, ...]:
        made = operand_constants(torch.float8_e4m3fn, torch.float32, target, in_words=in_words)
        return made["KIND"], made["ASM"], made["LIFT"]

    assert constants(TARGETS[80]) == ("float8", True, 2.0**60)
    assert constants(TARGETS[89]) == ("float8 by float16", True, 1.0)
    assert constants(TARGETS[89], in_words=False) == ("float8", False, 2.0**60)
    assert constants(replace(TARGETS[90], interpreted=True)) == ("float8", False, 2.0**60)


@pytest.mark.fast(
    "float8-rows-80", "int8-rows-90", *(f"{kind}-stages-{sm}" for kind in ("float8", "int8") for sm in TARGETS)
)
@pytest.mark.skipif(DEVICE.type == "cuda", reason="on a GPU the contract's own cases are built for it")
@pytest.mark.usefixtures("one_order_of_sums")  # without it the interpreter cuts bits off instead of rounding to 16 bits
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("plan", ["rows", "stages"])
@pytest.mark.parametrize("kind", ["float8", "int8"])
def test_numbers_that_lie_in_no_words_are_read_as_a_gpu_would(kind: str, plan: str, target: Target) -> None:
    """The interpreter runs what is planned for a GPU, all but the waits: such a plan has no inline assembly."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        case = Case("unaligned", {"R": 2, "N": 34, "K": 330, "padding": 3, "kind": kind, "plan": plan, "norm": True})
        inputs = SPEC.make_inputs(case, dtype, DEVICE)
        expected = SPEC.reference(**inputs)
        out = torch.empty_like(expected)
        (launch,) = plan_gemv_8bit(**inputs, programmatic_launch=False, out=out, target=target)
        assert launch.constexprs["WORD"] == 1
        run((launch,))
        assert (out - expected).float().norm() < 0.02 * expected.float().norm()


def test_chunks_are_loaded_ahead_by_their_bytes() -> None:
    case = next(case for case in SPEC.model_cases if case.name == "8b_down_1")
    inputs = SPEC.make_inputs(case, torch.bfloat16, torch.device("meta"))
    out = SPEC.reference(**inputs)
    how = {"early_trigger": True, "out": out, "target": TARGETS[90], "workspace": None}
    (launch,) = plan_gemv_8bit(**inputs, **how)
    plan = choose_8bit_plan(1, case["N"], case["K"], torch.bfloat16, TARGETS[90])
    assert launch.constexprs["WORD"] == 4
    assert launch.constexprs["AHEAD"] == plan.chunks_ahead(case["K"], 1) > plan.chunks_ahead(case["K"], 4)

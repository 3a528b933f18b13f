"""Tests the projector's first half beyond its contract: refusals, launches, equal bits, and what it is compiled to."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from internvl_rt.kernels._contract import Case
from internvl_rt.kernels._launch import TARGETS, Target, run
from internvl_rt.kernels._plans import GemmPlan
from internvl_rt.kernels.gemm_epilogue import gemm_epilogue
from internvl_rt.kernels.unshuffle_norm import unshuffle_norm
from internvl_rt.kernels.unshuffle_project import SPEC, plan_unshuffle_project, unshuffle_project
from support.instruction_order import instructions_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FUSED = GemmPlan("fused", 32, 32, 16, group_m=2, num_warps=4, num_stages=2)
PLANS: dict[str, GemmPlan | str] = {"apart": "apart", "fused": FUSED, "tma": replace(FUSED, use_tma=True)}
WIDE = "1b_13_tiles_wide"  # a model case


def inputs_of(dtype: torch.dtype = torch.float32, **sizes: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    case = Case("small", {"I": 3, "side": 2, "E": 24, "N": 40, **sizes})
    return SPEC.make_inputs(case, dtype, DEVICE)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_implementations_agree(version: str) -> None:
    inputs = inputs_of(version=version)
    results = {name: unshuffle_project(**{**inputs, "plan": plan}) for name, plan in PLANS.items()}
    assert results["apart"].shape == (3, 4, 40)
    assert torch.equal(results["fused"], results["tma"])
    torch.testing.assert_close(results["fused"], results["apart"], rtol=1e-5, atol=1e-5)  # sums in another order


def test_apart_is_the_norm_and_the_product() -> None:
    inputs = inputs_of(torch.float16)
    norm = inputs["norm_weight_K"], inputs["norm_bias_K"], inputs["eps"]
    x_IMK = unshuffle_norm(inputs["x_RE"], 3, *norm, 2, "v2")
    expected = gemm_epilogue(x_IMK, inputs["weight_NK"], inputs["bias_N"], activation="gelu", plan="cublas")
    assert torch.equal(unshuffle_project(**{**inputs, "plan": "apart"}), expected)
    assert torch.equal(unshuffle_project(**inputs), expected)  # the interpreter's target has no entry for these shapes


def test_the_operand_of_the_product_is_rounded_like_the_result_of_the_norm() -> None:
    """Weights that pick one column of K each show the normalised values; GELU keeps those that are above 5."""
    inputs = inputs_of(torch.float16, I=1)
    inputs["norm_bias_K"] += 20
    weight_NK = torch.zeros_like(inputs["weight_NK"])
    weight_NK[range(40), range(0, 80, 2)] = 1
    inputs |= {"weight_NK": weight_NK, "bias_N": torch.zeros_like(inputs["bias_N"])}
    fused, apart = (unshuffle_project(**{**inputs, "plan": PLANS[name]}) for name in ("fused", "apart"))
    assert float(apart.min()) > 5
    different = (fused != apart).count_nonzero()  # the last bit of a float32 may change a rounding
    assert different <= apart.numel() // 50
    torch.testing.assert_close(fused, apart, rtol=2**-10, atol=0)


@pytest.mark.usefixtures("one_order_of_sums")
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_tile_does_not_depend_on_the_tiles_beside_it(plan: GemmPlan | str) -> None:
    inputs = {**inputs_of(torch.float16), "plan": plan}
    together = unshuffle_project(**inputs)
    x, num_patches = inputs["x_RE"], 16
    if plan != "apart":  # torch's product may add in another order for other numbers of rows
        for tile in range(3):
            rows = [*range(num_patches * tile, num_patches * (tile + 1)), 3 * num_patches + tile]
            alone = unshuffle_project(**{**inputs, "x_RE": x[rows], "num_tiles": 1})
            assert torch.equal(alone[0], together[tile])
    x[num_patches : 2 * num_patches] = torch.nan
    spoiled = unshuffle_project(**inputs)
    assert spoiled[1].isnan().all()
    assert torch.equal(spoiled[[0, 2]], together[[0, 2]])


@pytest.mark.parametrize("num_sms", [1, 2])
def test_few_programs_take_all_blocks_in_turn(num_sms: int) -> None:
    inputs = inputs_of(torch.float16, side=5, E=16, N=72) | {"plan": PLANS["tma"]}
    expected = unshuffle_project(**inputs)
    out = torch.full_like(expected, torch.nan)
    launches = plan_unshuffle_project(**inputs, out=out, target=Target(90, num_sms))
    assert launches[1].grid == (2 * num_sms, 1, 1)
    run(launches)
    assert torch.equal(out, expected)


def launches_of(name: str, target: Target, **changes: Any) -> list[str]:
    case = next(case for case in SPEC.model_cases if case.name == name)
    inputs = {**SPEC.make_inputs(case, torch.bfloat16, torch.device("meta")), **changes}
    out = torch.empty(case["I"], 256, case["N"], dtype=torch.bfloat16, device="meta")
    return [each.kernel.fn.__name__ for each in plan_unshuffle_project(**inputs, out=out, target=target)]


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("name", ["1b_13_tiles", "38b_13_tiles"])
def test_fused_is_two_launches_and_apart_is_a_product_with_one_kernel_on_either_side(name: str, target: Target) -> None:
    for tiling in ("wide", "square", "low"):
        assert launches_of(name, target, plan=tiling) == ["statistics_kernel", "project_kernel"]
    assert launches_of(name, target, plan="apart") == ["_unshuffle_norm_kernel", "epilogue_kernel"]


@pytest.mark.parametrize(
    ("channels", "padding", "expected"), [(16, 0, True), (16, 8, True), (16, 1, False), (20, 0, False), (24, 0, True)]
)
def test_weights_are_read_by_the_copy_engine_where_rows_and_patches_begin_at_16_bytes(
    channels: int, padding: int, expected: bool
) -> None:
    inputs = inputs_of(torch.bfloat16, E=channels, padding=padding) | {"plan": PLANS["tma"]}
    out = torch.empty(3, 4, 40, dtype=torch.bfloat16, device=DEVICE)
    for capability, able in ((90, expected), (89, False)):
        _, product = plan_unshuffle_project(**inputs, out=out, target=TARGETS[capability])
        assert product.constexprs["USE_TMA"] == product.descriptors == able


def far_rows(rows: Tensor, folder: Path) -> Tensor:
    """Copies the rows so far from each other that from the third row on offsets in int32 would be negative.

    On the CPU the memory is a sparse file, of which only a few pages are written.
    """
    (count, width), stride, first = rows.shape, 2**30 + 16, 2**31
    size = first + (count - 1) * stride + width
    if DEVICE.type == "cpu":
        memory = torch.from_file(str(folder / "rows"), shared=True, size=size, dtype=rows.dtype)
    else:
        memory = torch.empty(size, dtype=rows.dtype, device=DEVICE)
    return memory.as_strided((count, width), (stride, 1), first).copy_(rows)


@pytest.mark.parametrize("argument", ["x_RE", "weight_NK"])
def test_rows_may_lie_more_than_2_to_the_31_elements_behind_the_first(argument: str, tmp_path: Path) -> None:
    inputs = inputs_of(torch.float16, I=1, side=1, E=8, N=5) | {"plan": FUSED}
    expected = unshuffle_project(**inputs)
    assert torch.equal(unshuffle_project(**inputs | {argument: far_rows(inputs[argument], tmp_path)}), expected)


def test_rows_of_the_result_may_lie_far_from_each_other(tmp_path: Path) -> None:
    inputs = inputs_of(torch.float16, I=1, side=2, E=8, N=5) | {"plan": FUSED}
    expected = unshuffle_project(**inputs)
    out = far_rows(torch.zeros(4, 5, dtype=torch.float16, device=DEVICE), tmp_path)[None]
    assert torch.equal(unshuffle_project(**inputs, out=out), expected)


REFUSALS: list[tuple[str, Callable[[Any], Any], str]] = [
    ("x_RE", torch.Tensor.double, "x_RE: expected one of .* got torch.float64"),
    ("x_RE", lambda t: t[1:], r"x_RE: expected 3 tiles of 1 \+ \(a multiple of 2\)\^2 rows, got 50 rows"),
    ("x_RE", lambda t: t[0], r"x_RE: expected rows \[R, E\]"),
    ("x_RE", lambda t: t.repeat(1, 700)[:, :16385], r"x_RE: expected factor\^2 \* E from 1 to 65536, got 65540"),
    ("factor", lambda _: 3, r"factor: expected one of \[1, 2, 4\], got 3"),
    ("version", lambda _: "v3", "version: expected v1 or v2, got v3"),
    ("num_tiles", lambda _: -1, "num_tiles: expected 0 or more, got -1"),
    ("norm_weight_K", lambda t: t[1:], r"norm_weight_K: expected shape \(96,\), got \(95,\)"),
    ("norm_bias_K", torch.Tensor.half, "norm_bias_K: expected torch.float32, got torch.float16"),
    ("weight_NK", lambda t: t[:, 1:], r"weight_NK: expected shape \(40, 96\), got \(40, 95\)"),
    ("weight_NK", lambda t: t.t().contiguous().t(), "weight_NK: expected a contiguous last dimension"),
    ("bias_N", lambda t: t[1:], r"bias_N: expected shape \(40,\), got \(39,\)"),
    ("bias_N", lambda t: t.to("meta"), "bias_N: expected a tensor on .*, got one on meta"),
    ("plan", lambda _: "cublas", "plan: expected one of .* got 'cublas'"),
    ("plan", lambda _: replace(FUSED, block_k=48), "plan: block_k: expected one of .* got 48"),
    ("out", lambda _: torch.zeros(12, 40, device=DEVICE), r"out: expected shape \(3, 4, 40\), got \(12, 40\)"),
    (
        "out",
        lambda _: torch.zeros(3, 8, 40, device=DEVICE)[:, ::2].transpose(0, 1).contiguous().transpose(0, 1),
        r"out: expected rows at one stride",
    ),
]


@pytest.mark.parametrize(("argument", "change", "message"), REFUSALS, ids=[message[:40] for _, _, message in REFUSALS])
def test_an_argument_that_does_not_fit_is_named(argument: str, change: Callable[[Any], Any], message: str) -> None:
    inputs = inputs_of() | {"plan": FUSED}
    with pytest.raises(ValueError, match=f"^{message}"):
        unshuffle_project(**{**inputs, argument: change(inputs.get(argument))})


@pytest.mark.slow
def test_on_hopper_normalised_rows_go_from_registers_to_the_matrix_units() -> None:
    """The rows come by cp.async and the weights by the copy engine; a normalised row is not stored again, and the loop
    takes at most 320 instructions, so that two warps of a scheduler take less than the 1,024 cycles of the products."""
    job = ("unshuffle_project", WIDE, 90)
    code = instructions_of([job], r"/\*([0-9a-f]{4,}\*/ +[^;]+);", launch=1)[job]
    address = [int(line.partition("*")[0], 16) for line in code]
    products = [index for index, line in enumerate(code) if "HGMMA" in line]
    assert len(products) == 4
    assert all("HGMMA.64x256x16.F32.BF16 R" in code[index] for index in products)
    assert not any(code[index].split(", ")[1].startswith("gdesc") for index in products)
    end, jump = next((i, line) for i, line in enumerate(code) if i > products[-1] and "BRA 0x" in line)
    start = address.index(int(jump.rpartition("0x")[2].strip(), 16))
    loop = code[start : end + 1]
    assert start < products[0]
    assert len(loop) <= 320
    assert sum("LDGSTS" in line and ".128" in line for line in loop) == 6  # of x four, of the norm's vectors one each
    assert sum("UTMALDG" in line for line in loop) == 1
    assert not any(" STS" in line for line in loop)

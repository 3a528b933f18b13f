"""Tests the products of a layer's experts beyond their contract: parts of ranks, equal bits, exact numbers."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from internvl_rt.kernels._contract import Case, KernelSpec
from internvl_rt.kernels._expert_plan import BLOCKS, choose_block, choose_expert_plan
from internvl_rt.kernels._int4 import pack_int4
from internvl_rt.kernels._launch import TARGETS
from internvl_rt.kernels.catalogue import discover_specs
from internvl_rt.kernels.expert_down import expert_down, expert_down_reference, plan_expert_down
from internvl_rt.kernels.expert_gate_up import expert_gate_up, expert_gate_up_reference
from internvl_rt.kernels.route_experts import sort_pairs_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SPECS = {name: discover_specs()[name] for name in ("expert_gate_up", "expert_down")}
SIZES: dict[str, Any] = {"T": 7, "X": 6, "J": 3, "D": 48, "F": 32, "block": 16}
KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "float8": {"kind": "float8"},
    "blocks": {"kind": "float8", "blocks": True, "D": 144, "F": 136},
    "int8": {"kind": "int8"},
    "int4": {"kind": "int4", "zero": True, "group": 32},
}
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}  # sums in float32 are added in another order

every_kind = pytest.mark.parametrize("kind", KINDS)
both = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def inputs_of(spec: KernelSpec, dtype: torch.dtype = torch.float32, **sizes: Any) -> dict[str, Any]:
    return spec.make_inputs(Case("of_a_test", {**SIZES, **sizes}), dtype, DEVICE)


def of_rank(inputs: dict[str, Any], first: int, count: int) -> dict[str, Any]:
    """Returns the inputs of a rank that holds these experts: their weights, and their pairs sorted."""
    block = len(inputs["pair_W"]) // len(inputs["block_expert_B"])
    pair_W, block_expert_B = sort_pairs_reference(inputs["expert_id_TJ"].long(), block, first, count)
    size = len(inputs["weight"]) // inputs["num_experts"]
    rows = slice(first * size, (first + count) * size)
    parts = {name: inputs[name] if inputs[name] is None else inputs[name][rows] for name in WEIGHT}
    return {**inputs, **parts, "pair_W": pair_W, "block_expert_B": block_expert_B, "num_experts": count}


WEIGHT = ("weight", "scale_NG", "zero_NG")


@every_kind
def test_the_parts_of_ranks_add_up_to_the_whole(kind: str) -> None:
    inputs = inputs_of(SPECS["expert_down"], **KINDS[kind])
    residual = inputs.pop("residual_TD")
    whole = expert_down(**inputs, residual_TD=residual)
    parts = residual.clone()
    for first, count in ((0, 2), (2, 1), (3, 3)):
        parts += expert_down(**{**of_rank(inputs, first, count), "first": first})
    torch.testing.assert_close(parts, whole, **TOLERANCE)


@pytest.mark.parametrize("block", BLOCKS)
def test_rows_of_experts_held_elsewhere_are_neither_written_nor_read(block: int) -> None:
    first, count = 1, 2
    inputs = inputs_of(SPECS["expert_gate_up"], block=block)
    routed = inputs_of(SPECS["expert_down"], block=block)
    expert_id_TJ = routed["expert_id_TJ"]
    rank = of_rank({**inputs, "expert_id_TJ": expert_id_TJ}, first, count)
    del rank["expert_id_TJ"]
    y_QF = torch.full((expert_id_TJ.numel(), SIZES["F"]), torch.nan, device=DEVICE)
    assert expert_gate_up(**rank, out=y_QF) is y_QF
    here = ((expert_id_TJ >= first) & (expert_id_TJ < first + count)).flatten()
    assert 0 < int(here.sum()) < len(here)
    assert bool(y_QF[~here].isnan().all())
    torch.testing.assert_close(y_QF[here], expert_gate_up_reference(**rank)[here], **TOLERANCE)
    down = {**of_rank({**routed, "y_QF": y_QF}, first, count), "first": first}
    assert bool(expert_down(**down).isfinite().all())


@pytest.mark.fast("dense-16", "float8-64", "int4-64")
@pytest.mark.usefixtures("one_order_of_sums")
@pytest.mark.parametrize("block", [16, 64])
@every_kind
def test_a_row_does_not_depend_on_the_other_rows(kind: str, block: int) -> None:
    """The tokens of a step are cut and turned round, so that pairs lie in other places, blocks and programs."""
    inputs = inputs_of(SPECS["expert_gate_up"], torch.float16, T=20, block=block, **KINDS[kind])
    down = inputs_of(SPECS["expert_down"], torch.float16, T=20, block=block, **KINDS[kind])
    experts, expert_id_TJ = inputs["num_experts"], down["expert_id_TJ"]
    inputs |= dict(
        zip(("pair_W", "block_expert_B"), sort_pairs_reference(expert_id_TJ.long(), block, 0, experts), strict=True)
    )
    y_TJF = expert_gate_up(**inputs).view(20, 3, -1)
    x_TD = expert_down(**down)
    for tokens in (torch.arange(20).flip(0), torch.tensor([4]), torch.arange(3, 12)):
        part = tokens.to(DEVICE)
        routing = sort_pairs_reference(expert_id_TJ[part].long(), block, 0, experts)
        pairs = dict(zip(("pair_W", "block_expert_B"), routing, strict=True))
        y_Q = expert_gate_up(**{**inputs, **pairs, "x_TD": inputs["x_TD"][part]})
        assert torch.equal(y_Q.view(len(part), 3, -1), y_TJF[part])
        of_part = {name: down[name][part] for name in ("expert_id_TJ", "weight_TJ", "residual_TD")}
        of_part["y_QF"] = down["y_QF"].view(20, 3, -1)[part].flatten(0, 1)
        assert torch.equal(expert_down(**{**down, **pairs, **of_part}), x_TD[part])


@pytest.mark.parametrize("block", [16, 64])
def test_the_residual_may_be_overwritten(block: int) -> None:
    inputs = inputs_of(SPECS["expert_down"], block=block, padding=8)
    expected = expert_down_reference(**inputs)
    residual = inputs["residual_TD"]
    assert expert_down(**inputs, out=residual) is residual
    torch.testing.assert_close(residual, expected, **TOLERANCE)


@both
def test_more_blocks_than_are_needed_change_nothing(spec: KernelSpec) -> None:
    inputs = inputs_of(spec)
    more = {
        "pair_W": torch.cat((inputs["pair_W"], torch.full((5 * 16,), -1, dtype=torch.int32, device=DEVICE))),
        "block_expert_B": torch.cat((inputs["block_expert_B"], torch.full((5,), -1, dtype=torch.int32, device=DEVICE))),
    }
    assert torch.equal(spec.launcher(**{**inputs, **more}), spec.launcher(**inputs))


def one_hot(kind: torch.dtype, dtype: torch.dtype, numbers: Tensor, **more: Any) -> Tensor:
    """Returns the weight [N, K] that an expert multiplies with: its products with the rows of the identity."""
    k = more.pop("k", numbers.shape[1])
    expert_id_TJ = torch.zeros(k, 1, dtype=torch.int32, device=DEVICE)
    pairs = sort_pairs_reference(expert_id_TJ.long(), more.pop("block"), 0, 1)
    x, ones = torch.eye(k, dtype=dtype, device=DEVICE), torch.ones(k, 1, device=DEVICE)
    of_weight = {"weight": numbers.to(DEVICE), "zero_NG": None, "num_experts": 1, **more}
    given = {"expert_id_TJ": expert_id_TJ, "weight_TJ": ones, "pair_W": pairs[0], "block_expert_B": pairs[1]}
    return expert_down(y_QF=x, **of_weight, **given).T


@pytest.mark.usefixtures("one_order_of_sums")
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_number_of_8_and_of_4_bits_is_multiplied_exactly(dtype: torch.dtype, block: int) -> None:
    bits = torch.arange(256).to(torch.uint8)
    of_fp8 = bits[bits % 128 != 127].view(torch.float8_e4m3fn)  # not NaN
    for numbers in (of_fp8, bits.view(torch.int8)):
        numbers_NK = numbers[:, None].expand(-1, 16).contiguous()
        ones = torch.ones(len(numbers), 1, device=DEVICE)
        weight_NK = one_hot(numbers.dtype, dtype, numbers_NK, scale_NG=ones, block=block)
        assert torch.equal(weight_NK.cpu().double(), numbers_NK.double())
    four, zero = torch.arange(256).reshape(16, 16) % 16, torch.arange(16).to(torch.uint8)
    numbers_NK = torch.cat((four, four.flip(1)), 1).repeat(1, 4)
    scale_NG = torch.ones(16, 4, device=DEVICE)
    zero_NG = zero[:, None].expand(16, 4).contiguous().to(DEVICE)
    words = pack_int4(numbers_NK.to(torch.uint8))
    given: dict[str, Any] = {"scale_NG": scale_NG, "zero_NG": zero_NG, "group": 32, "block": block, "k": 128}
    weight_NK = one_hot(torch.int32, dtype, words, **given)
    assert torch.equal(weight_NK.cpu().double(), (numbers_NK - zero[:, None].long()).double())


def test_blocks_grow_with_the_pairs_of_an_expert() -> None:
    assert [choose_block(tokens, 8, 128) for tokens in (0, 1, 64, 256, 1024, 3392, 8192)] == [
        *(16, 16, 16, 32, 64, 128, 128)
    ]
    assert choose_block(1, 4, 4) == 16
    assert choose_block(3392, 4, 32) == 128


def test_a_token_alone_keeps_every_multiprocessor_busy() -> None:
    """Its experts have 1.5 programs and more for each multiprocessor, in the models of this family."""
    for target in TARGETS.values():
        for rows, chosen in ((1536, 8), (2048, 8), (3072, 8), (4096, 8), (5760, 4), (2880, 4)):
            for weight in (torch.bfloat16, torch.int8, torch.int32):
                plan = choose_expert_plan(16, rows, chosen, weight, 128, torch.bfloat16, target)
                assert chosen * rows / plan.block_n >= 1.5 * target.num_sms


def test_four_groups_of_a_chunk_do_not_lie_in_the_tensor_memory() -> None:
    def rows_of_a_program(group: int, capability: int) -> int:
        return choose_expert_plan(128, 1536, 8, torch.int32, group, torch.bfloat16, TARGETS[capability]).block_n

    assert [rows_of_a_program(group, 100) for group in (32, 64, 128)] == [32, 64, 64]
    assert [rows_of_a_program(group, 90) for group in (32, 64, 128)] == [64, 64, 64]


@both
def test_one_kernel_serves_every_number_of_tokens(spec: KernelSpec) -> None:
    """Nothing that Triton builds a kernel for changes; it does not specialise the number of blocks."""
    built = set()
    for tokens in (1, 2, 7, 64):
        inputs = spec.make_inputs(Case("of_a_test", {**SIZES, "T": tokens}), torch.bfloat16, torch.device("meta"))
        out = torch.empty_like(spec.reference(**inputs))
        for launch in spec.plan(**inputs, out=out, target=TARGETS[90]):
            numbers = {name: each for name, each in launch.args.items() if not isinstance(each, Tensor)}
            numbers.pop("num_blocks", None)
            built.add((launch.kernel, str(numbers), str(launch.constexprs)))
    assert len(built) == len({kernel for kernel, *_ in built})


def test_parts_are_rounded_where_they_are_many() -> None:
    for block, dtype in ((16, torch.float32), (32, torch.float32), (64, torch.bfloat16), (128, torch.bfloat16)):
        inputs = inputs_of(SPECS["expert_down"], torch.bfloat16, block=block)
        _, last = plan_expert_down(**inputs, out=inputs["residual_TD"], target=TARGETS[90])
        assert last.args["part"].dtype == dtype


REFUSED: list[tuple[str, str, dict[str, Any]]] = [
    ("expert_gate_up", "x_TD: expected one of", {"x_TD": torch.zeros(7, 48, dtype=torch.float64, device=DEVICE)}),
    ("expert_gate_up", r"weight: expected shape (384, 48)", {"weight": torch.zeros(384, 47, device=DEVICE)}),
    ("expert_gate_up", "num_experts: expected a part of the weight's 384 rows for each, got 7", {"num_experts": 7}),
    ("expert_gate_up", "weight: expected an even number of rows for each expert, got 3", {"num_experts": 128}),
    ("expert_gate_up", "num_chosen: expected 1 or more", {"num_chosen": 0}),
    ("expert_gate_up", "pair_W: expected one of", {"pair_W": torch.zeros(8, dtype=torch.int32, device=DEVICE)}),
    ("expert_gate_up", "zero_NG: expected None but with 4-bit numbers", {"zero_NG": torch.zeros(384, 1)}),
    ("expert_gate_up", "weight: expected torch.float32, got torch.int8", {"weight": torch.zeros(384, 48).char()}),
    ("expert_gate_up", "out: expected shape (21, 32)", {"out": torch.zeros(20, 32, device=DEVICE)}),
    ("expert_down", "y_QF: expected 7 * 3 rows, got 20", {"y_QF": torch.zeros(20, 32, device=DEVICE)}),
    ("expert_down", "weight_TJ: expected torch.float32", {"weight_TJ": torch.zeros(7, 3).double().to(DEVICE)}),
    ("expert_down", "expert_id_TJ: expected shape (7, 3)", {"expert_id_TJ": torch.zeros(7, 2).int().to(DEVICE)}),
    ("expert_down", "weight_TJ: expected a contiguous tensor", {"weight_TJ": torch.zeros(7, 6, device=DEVICE)[:, :3]}),
    ("expert_down", "residual_TD: expected shape (7, 48)", {"residual_TD": torch.zeros(7, 47, device=DEVICE)}),
]


@pytest.mark.parametrize(("name", "problem", "given"), REFUSED, ids=[problem for _, problem, _ in REFUSED])
def test_what_does_not_fit_is_refused_by_name(name: str, problem: str, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)):
        SPECS[name].launcher(**{**inputs_of(SPECS[name]), **given})


def test_numbers_need_scales_of_their_kind() -> None:
    inputs = inputs_of(SPECS["expert_gate_up"], kind="int4", group=32)
    for problem, given in (
        ("group: expected one of", {"group": 16}),
        ("scale_NG: expected shape", {"group": 64}),
        ("zero_NG: expected torch.uint8", {"zero_NG": inputs["scale_NG"]}),
    ):
        with pytest.raises(ValueError, match=problem):
            expert_gate_up(**{**inputs, **given})
    inputs = inputs_of(SPECS["expert_gate_up"], kind="float8")
    with pytest.raises(ValueError, match=r"scale_NG: expected torch\.float32"):
        expert_gate_up(**{**inputs, "scale_NG": inputs["scale_NG"].half()})

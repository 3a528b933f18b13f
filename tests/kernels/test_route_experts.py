"""Tests `route_experts` beyond its contract: where pairs stand, ties, NaN, parts of the experts, what is refused."""

import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from internvl_rt.kernels import route_experts as module
from internvl_rt.kernels._launch import TARGETS
from internvl_rt.kernels.route_experts import (
    BLOCKS,
    Routing,
    num_blocks,
    plan_route_experts,
    route_experts,
    route_experts_reference,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS = (1, 7, 16, 17, 64, 65, 100)  # of each kernel, and at the edges between them

NOT_FINITE = pytest.mark.filterwarnings("ignore:invalid value encountered")  # by numpy, in the interpreter


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def draw(tokens: int, experts: int) -> Tensor:
    return 2 * torch.randn(tokens, experts, device=DEVICE)


def sorted_by_hand(expert_id_TJ: Tensor, block: int, first: int, count: int) -> tuple[list[int], list[int]]:
    """Returns the places in use and the experts of their blocks, as lists."""
    expert_of_pair = expert_id_TJ.flatten().tolist()
    places: list[int] = []
    blocks: list[int] = []
    for expert in range(first, first + count):
        pairs = [pair for pair, other in enumerate(expert_of_pair) if other == expert]
        filled = -(-len(pairs) // block)
        places += pairs + [-1] * (filled * block - len(pairs))
        blocks += [expert - first] * filled
    return places, blocks


def check(logits: Tensor, chosen: int, block: int, **how: Any) -> Routing:
    """Runs the kernel, and compares all but the weights with the reference and with a sort by hand."""
    routing, expected = (run(logits, chosen, block, **how) for run in (route_experts, route_experts_reference))
    for name in ("expert_id_TJ", "pair_W", "block_expert_B"):
        assert torch.equal(getattr(routing, name), getattr(expected, name)), name
    torch.testing.assert_close(routing.weight_TJ, expected.weight_TJ, rtol=2e-5, atol=1e-30, equal_nan=True)
    first = how.get("first", 0)
    count = how.get("count") or logits.shape[1] - first
    places, blocks = sorted_by_hand(routing.expert_id_TJ, block, first, count)
    pair_W, block_expert_B = routing.pair_W.tolist(), routing.block_expert_B.tolist()
    assert len(block_expert_B) == num_blocks(len(logits) * chosen, count, block)
    assert len(pair_W) == block * len(block_expert_B)
    assert pair_W == places + [-1] * (len(pair_W) - len(places))
    assert block_expert_B == blocks + [-1] * (len(block_expert_B) - len(blocks))
    return routing


@pytest.mark.parametrize(("pairs", "experts", "block"), [*itertools.product(range(9), (1, 2, 3, 4), (1, 2, 3))])
def test_the_capacity_is_what_the_worst_routing_needs(pairs: int, experts: int, block: int) -> None:
    routings = (each for each in itertools.product(range(pairs + 1), repeat=experts) if sum(each) == pairs)
    needed = max(sum(-(-count // block) for count in each) for each in routings)
    assert num_blocks(pairs, experts, block) == needed


def test_the_reference_is_a_softmax_and_its_largest() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, -3.0], [5.0, 5.0, -1.0, 5.0]]).log_softmax(1)
    routing = route_experts_reference(logits, 2, 16, renormalise=False)
    assert routing.expert_id_TJ.tolist() == [[1, 2], [0, 1]]
    torch.testing.assert_close(routing.weight_TJ, torch.tensor([[logits[0, 1], logits[0, 2]], [*logits[1, :2]]]).exp())
    whole = route_experts_reference(logits, 2, 16)
    torch.testing.assert_close(whole.weight_TJ, torch.tensor([[0.7310586, 0.2689414], [0.5, 0.5]]))
    torch.testing.assert_close(whole.weight_TJ, logits.topk(2).values.softmax(1))  # a softmax over the chosen
    assert whole.block_expert_B.tolist() == [0, 1, 2, -1][: num_blocks(4, 4, 16)]
    assert [each for each in whole.pair_W.tolist() if each >= 0] == [2, 0, 3, 1]


@pytest.mark.parametrize("number", range(24))
def test_pairs_stand_where_a_sort_by_hand_puts_them(number: int) -> None:
    rng = random.Random(number)
    experts = rng.choice((1, 2, 5, 16, 33, 128))
    first = rng.randrange(experts)
    logits = draw(rng.choice(ROWS), experts)
    if number % 3 == 0:
        logits = logits.round()  # many ties
    count = rng.randint(1, experts - first)
    check(logits, rng.randint(1, min(experts, 8)), rng.choice(BLOCKS), first=first, count=count)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 32, 64, 80, 81])
def test_all_tokens_on_one_expert_fill_its_blocks(tokens: int) -> None:
    logits = draw(tokens, 20)
    logits[:, 13] = 50
    routing = check(logits, 1, 16)
    used = -(-tokens // 16)
    assert routing.block_expert_B.tolist() == [13] * used + [-1] * (len(routing.block_expert_B) - used)
    assert routing.pair_W[:tokens].tolist() == list(range(tokens))
    torch.testing.assert_close(routing.weight_TJ, torch.ones_like(routing.weight_TJ))


@pytest.mark.parametrize("tokens", [3, 70])
def test_the_adversary_who_opens_the_most_blocks_fills_all_of_them(tokens: int) -> None:
    logits = torch.zeros(tokens, tokens * 2, device=DEVICE)
    logits[:, 0] = 1  # every token takes expert 0 and one of its own
    logits[range(tokens), range(1, tokens + 1)] = 2
    assert int((check(logits, 2, 16).block_expert_B >= 0).sum()) == tokens + -(-tokens // 16)
    logits = torch.eye(tokens, device=DEVICE)
    assert int((check(logits, 1, 16).block_expert_B >= 0).sum()) == num_blocks(tokens, tokens, 16)


@pytest.mark.parametrize("tokens", ROWS)
def test_of_equal_logits_the_lower_ids_are_chosen(tokens: int) -> None:
    logits = torch.zeros(tokens, 40, device=DEVICE)
    logits[:, 1::2] = -0.0
    routing = check(logits, 5, 32)
    assert routing.expert_id_TJ.tolist() == [[0, 1, 2, 3, 4]] * tokens
    assert check(logits, 40, 32).expert_id_TJ.tolist() == [list(range(40))] * tokens


def test_logits_whose_probabilities_round_to_the_same_are_told_apart() -> None:
    logits = torch.full((2, 64), -1e30, device=DEVICE)
    logits[0, 7], logits[1, 9], logits[1, 5] = 1e30, 3.0, 3.0000002
    routing = check(logits, 3, 16)
    assert routing.expert_id_TJ.tolist() == [[7, 0, 1], [5, 9, 0]]
    assert routing.weight_TJ[0].tolist() == [1, 0, 0]


@NOT_FINITE
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("tokens", ROWS)
def test_a_row_that_is_not_finite_gets_distinct_experts_and_harms_no_other(tokens: int, renormalise: bool) -> None:
    logits = draw(tokens, 24)
    expected = route_experts(logits, 4, 16, renormalise=renormalise)
    broken = list(range(0, tokens, 3))
    for row, fill in zip(broken, itertools.cycle((torch.nan, torch.inf, -torch.inf)), strict=False):
        logits[row, :: 2 if row % 2 else 1] = fill
    logits[0, 3:] = -torch.nan
    routing = check(logits, 4, 16, renormalise=renormalise)
    assert all(len(set(row)) == 4 and set(row) <= set(range(24)) for row in routing.expert_id_TJ.tolist())
    whole = [row for row in range(tokens) if row not in broken]
    assert torch.equal(routing.expert_id_TJ[whole], expected.expert_id_TJ[whole])
    assert torch.equal(routing.weight_TJ[whole], expected.weight_TJ[whole])
    assert routing.weight_TJ[0].isnan().all()


@pytest.mark.parametrize("tokens", ROWS)
def test_the_parts_of_all_ranks_hold_every_pair_once(tokens: int) -> None:
    logits = draw(tokens, 36)
    parts = [check(logits, 6, 32, first=first, count=count) for first, count in ((0, 10), (10, 1), (11, 25))]
    whole = route_experts(logits, 6, 32)
    pairs = [pair for part in parts for pair in part.pair_W.tolist() if pair >= 0]
    assert sorted(pairs) == list(range(tokens * 6))
    assert pairs == [pair for pair in whole.pair_W.tolist() if pair >= 0]
    for part in parts:
        assert torch.equal(part.expert_id_TJ, whole.expert_id_TJ)
        assert torch.equal(part.weight_TJ, whole.weight_TJ)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("renormalise", [True, False])
def test_a_rows_experts_and_weights_do_not_depend_on_the_other_rows(dtype: torch.dtype, renormalise: bool) -> None:
    logits = draw(100, 128).to(dtype)
    whole = route_experts(logits, 8, 64, renormalise=renormalise)
    for begin, end in ((0, 1), (99, 100), (3, 12), (40, 56), (20, 84), (34, 100)):
        part = route_experts(logits[begin:end], 8, 16, renormalise=renormalise)
        assert torch.equal(part.expert_id_TJ, whole.expert_id_TJ[begin:end])
        assert torch.equal(part.weight_TJ, whole.weight_TJ[begin:end])


@pytest.mark.parametrize("tokens", [1, 16, 50, 64])
def test_the_kernels_for_many_rows_do_the_same_to_few(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = draw(tokens, 60)
    few = check(logits, 4, 32, first=5, count=40)
    monkeypatch.setattr(module, "FEW_ROWS", ())
    for one, other in zip(few, check(logits, 4, 32, first=5, count=40), strict=True):
        assert torch.equal(one, other)


def test_a_program_of_many_rows_goes_through_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_COUNTS", 3 * 64)  # three programs
    check(draw(500, 60), 4, 64, first=20, count=30)


def planned(tokens: int, experts: int = 128, chosen: int = 8, capability: int = 90, **how: Any) -> Any:
    logits = torch.empty(tokens, experts, device="meta", dtype=torch.bfloat16)
    out = route_experts_reference(logits, chosen, 64)
    return plan_route_experts(logits, chosen, 64, out=out, target=TARGETS[capability], **how)


def test_few_rows_take_one_launch_of_one_program_and_many_two() -> None:
    for tokens in (1, 2, 16, 64):
        assert [launch.grid for launch in planned(tokens)] == [(1, 1, 1)]
    assert [launch.grid for launch in planned(0)] == [(0, 1, 1)]
    assert [launch.grid for launch in planned(16, experts=512, chosen=10)] == [(1, 1, 1)]
    assert [launch.grid for launch in planned(17, experts=512, chosen=10)] == [(5, 1, 1)] * 2
    assert [launch.grid for launch in planned(3392)] == [(212, 1, 1)] * 2
    assert [launch.grid for launch in planned(16384)] == [(256, 1, 1)] * 2
    assert [launch.grid for launch in planned(16384, experts=512, chosen=10)] == [(64, 1, 1)] * 2


def test_programmatic_launch_is_where_the_gpu_has_it_and_where_it_is_wanted() -> None:
    for tokens in (1, 3392):
        for launch in (*planned(tokens), *planned(tokens, capability=80), *planned(tokens, programmatic_launch=False)):
            assert launch.pdl == launch.constexprs["PDL"]
        assert all(launch.pdl for launch in planned(tokens))
        assert not any(launch.pdl for launch in planned(tokens, capability=80))
        assert not any(launch.pdl for launch in planned(tokens, programmatic_launch=False))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits_TX": torch.zeros(3, 8, dtype=torch.float64)}, "logits_TX: expected one of"),
        ({"logits_TX": torch.zeros(3)}, r"logits_TX: expected rows \[T, X\], got \(3,\)"),
        ({"logits_TX": torch.zeros(3, 0)}, "logits_TX: expected 1 to 512 experts, got 0"),
        ({"logits_TX": torch.zeros(3, 513)}, "logits_TX: expected 1 to 512 experts, got 513"),
        ({"logits_TX": torch.zeros(8, 3).T}, "logits_TX: expected a contiguous last dimension"),
        ({"num_chosen": 0}, "num_chosen: expected 1 to 8, got 0"),
        ({"num_chosen": 9}, "num_chosen: expected 1 to 8, got 9"),
        ({"block": 8}, r"block: expected one of \[16, 32, 64, 128\], got 8"),
        ({"first": -1}, "first: expected 0 to 7, got -1"),
        ({"first": 8}, "first: expected 0 to 7, got 8"),
        ({"first": 4, "count": 5}, "count: expected 1 to 4, got 5"),
        ({"count": 0}, "count: expected 1 to 8, got 0"),
        ({"expert_id_TJ": torch.zeros(3, 2, dtype=torch.int64)}, r"out.expert_id_TJ: expected torch.int32"),
        ({"weight_TJ": torch.zeros(2, 2)}, r"out.weight_TJ: expected shape \(3, 2\), got \(2, 2\)"),
        ({"weight_TJ": torch.zeros(3, 4)[:, :2]}, "out.weight_TJ: expected a contiguous tensor"),
        ({"pair_W": torch.zeros(95, dtype=torch.int32)}, r"out.pair_W: expected shape \(96,\), got \(95,\)"),
        (
            {"block_expert_B": torch.zeros(7, dtype=torch.int32)},
            r"out.block_expert_B: expected shape \(6,\), got \(7,\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    changes = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in changes.items()}
    out = route_experts(torch.zeros(3, 8, device=DEVICE), 2, 16)
    out = out._replace(**{name: changes.pop(name) for name in out._fields if name in changes})
    inputs = {"logits_TX": torch.zeros(3, 8, device=DEVICE), "num_chosen": 2, "block": 16}
    with pytest.raises(ValueError, match=message):
        route_experts(**inputs | changes, out=out)

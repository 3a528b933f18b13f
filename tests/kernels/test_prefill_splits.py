"""Tests how prefill attention splits keys: the rule, the order of arrival, the workspace, the machine code."""

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime.interpreter import interpreter_builder

from internvl_rt.kernels._contract import Case
from internvl_rt.kernels._launch import TARGETS, Launch, run, target_of
from internvl_rt.kernels._prefill_attention_body import own_item
from internvl_rt.kernels._prefill_plan import (
    MAX_SPLITS,
    PrefillWorkspace,
    SplitRule,
    block_splits,
    build_prefill_workspace,
    padded_rows,
    split_lens,
    split_rule,
)
from internvl_rt.kernels.prefill_attention import (
    SPEC,
    plan_prefill_attention,
    prefill_attention,
    prefill_attention_reference,
)
from support.instruction_order import ADDING, adding_of, instructions_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS, KV_HEADS, CHANNELS, BLOCK = 6, 2, 16, 64
Rows = list[tuple[int, int]]  # cached and new tokens of each sequence
SHORT, THREE = SplitRule(64), SplitRule(1, num_splits=3)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def inputs_of(*chunks: tuple[int, int], splits: SplitRule | None = SHORT, **sizes: Any) -> dict[str, Any]:
    common = {"chunks": chunks, "H": HEADS, "G": KV_HEADS, "C": CHANNELS, "P": BLOCK}
    return SPEC.make_inputs(Case("small", common | sizes), torch.float16, DEVICE) | {"splits": splits}


def plan_of(inputs: dict[str, Any], workspace: PrefillWorkspace, out: Tensor) -> Launch:
    return plan_prefill_attention(**inputs, workspace=workspace, out=out, target=target_of(DEVICE))[0]


def poisoned_workspace(programs: int = 264) -> PrefillWorkspace:
    workspace = build_prefill_workspace(DEVICE, programs)
    workspace.parts.fill_(math.nan)
    workspace.stats.fill_(math.nan)
    return workspace


def assert_near_reference(actual: Tensor, inputs: dict[str, Any]) -> None:
    wide = {name: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for name, t in inputs.items()}
    torch.testing.assert_close(actual.double(), prefill_attention_reference(**wide), rtol=2e-3, atol=2e-3)  # float16


# The rule


Item = tuple[int, int, int, int]  # row, block, split, keys of a split


def items_of(rows: Rows, queries: int, num_items: int, block_n: int, rule: SplitRule) -> list[Item]:
    """Lists what each program does, as `own_item` says, from the rule in Python."""
    seq_lens = [old + new for old, new in rows]
    lens = split_lens([new for _, new in rows], seq_lens, queries, num_items, block_n, rule)
    found: list[Item] = []
    for row, (_, new) in enumerate(rows):
        splits = -(-seq_lens[row] // lens[row])
        found += [(row, b, s, lens[row]) for b in range(-(-new // queries)) for s in range(splits)]
    return found


ROWS = st.lists(st.tuples(st.integers(0, 40_000), st.integers(0, 60)), min_size=1, max_size=16)
RULES = st.builds(SplitRule, st.integers(1, 700), st.none() | st.integers(1, 40))


@given(ROWS, st.sampled_from([4, 9, 64]), st.integers(0, 300), st.sampled_from([32, 64]), RULES)
def test_there_are_programs_for_all_items_and_splits_are_not_too_short(
    rows: Rows, queries: int, spare: int, block_n: int, rule: SplitRule
) -> None:
    num_blocks = sum(-(-new // queries) for _, new in rows)
    room = (num_blocks + spare) * (rule.num_splits or 1)
    items = items_of(rows, queries, room, block_n, rule)
    assert num_blocks <= len(items) <= room
    for _, _, split, keys in items:
        assert keys % block_n == 0
        assert keys >= rule.min_keys or rule.num_splits
        assert split < (rule.num_splits or MAX_SPLITS)


@given(st.integers(0, 5000), st.integers(1, 64), st.integers(1, 20))
def test_the_splits_of_a_block_hold_every_key_once_and_all_queries_see_the_first_of_each(
    first_position: int, queries: int, multiple: int
) -> None:
    splits = block_splits(first_position, first_position + queries, 64 * multiple)
    assert [key for start, stop in splits for key in (start, stop)][1:-1] == [s for s, _ in splits[1:] for _ in "ab"]
    assert (splits[0][0], splits[-1][1]) == (0, first_position + queries)
    assert all(start <= first_position and start < stop for start, stop in splits)
    assert all(stop - start == 64 * multiple for start, stop in splits[:-1])


@pytest.mark.parametrize(
    ("rows", "room", "channels", "splits"),
    [
        ([(3392, 64)], 132, 64, [14]),  # the second question about a picture, 1B: runs of 256 keys
        ([(8192, 64)], 132, 64, [15]),  # 16 would fit; the length is a multiple of 64
        ([(32704, 64)], 132, 64, [16]),
        ([(3392, 64)], 66, 128, [7]),  # 8B: runs of 512 keys
        ([(32704, 64)], 66, 128, [8]),
        ([(32704, 9)], 132, 64, [32]),  # one block: not more, since one program adds up all parts
        ([(0, 64)], 132, 64, [1]),
        ([(3392, 64), *[(0, 0)] * 7], 132, 64, [14, *[0] * 7]),  # rows without queries take nothing
        ([(32704, 9), (1000, 9)], 132, 64, [32, 1]),  # an even share for every row would be as many splits of each
        ([(8192, 570)], 66, 128, [1]),  # 64 blocks: the chip is full
        ([(8192, 570), (0, 0)], 66, 128, [1, 0]),
    ],
)
def test_how_often_the_keys_of_questions_are_split(rows: Rows, room: int, channels: int, splits: list[int]) -> None:
    seq_lens, news = [old + new for old, new in rows], [new for _, new in rows]
    lens = split_lens(news, seq_lens, 9, room, 64, split_rule(channels))
    assert [-(-keys // length) for keys, length in zip(seq_lens, lens, strict=True)] == splits


@triton.jit
def _items_kernel(out, query_start, seq_len, num_rows, queries, num_splits, min_keys, N: tl.constexpr, R: tl.constexpr):
    row, block, split, keys = own_item(query_start, seq_len, num_rows, queries, num_splits, min_keys, N, R)
    at = out + 4 * tl.program_id(0)
    tl.store(at, row)
    tl.store(at + 1, block)
    tl.store(at + 2, split)
    tl.store(at + 3, keys)


@pytest.mark.parametrize("rule", [SHORT, SplitRule(200), THREE])
@pytest.mark.parametrize(
    "rows",
    [
        [(900, 20)],
        [(0, 0)],
        [(0, 0), (5, 0)],
        [(300, 5), (0, 0), (0, 1), (2000, 30)],
        [*[(0, 0)] * 5, (2000, 9), (1, 1), (0, 0)],
        [(64 * i, i) for i in range(16)],
    ],
)
def test_programs_find_the_items_of_the_rule(rows: Rows, rule: SplitRule) -> None:
    queries = 9
    num_blocks = sum(-(-new // queries) for _, new in rows)
    room = 4 * max(num_blocks, 1)
    starts = [0, *itertools.accumulate(new for _, new in rows)]
    numbers = [torch.tensor(each, dtype=torch.int32, device=DEVICE) for each in (starts, [sum(row) for row in rows])]
    out = torch.empty(room, 4, dtype=torch.int32, device=DEVICE)
    how = len(rows), queries, rule.num_splits or 0, rule.min_keys, 64, padded_rows(len(rows))
    _items_kernel[(room,)](out, *numbers, *how)
    expected = items_of(rows, queries, room, 64, rule)
    found = [tuple(item) for item in out.tolist()]
    assert found[: len(expected)] == expected
    assert all(block == -1 for _, block, _, _ in found[len(expected) :])


def test_a_rule_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="splits: expected min_keys of 1 or more, got 0"):
        SplitRule(0)
    with pytest.raises(ValueError, match="splits: expected num_splits of 1 or more, got 0"):
        SplitRule(64, num_splits=0)


# The plan


@pytest.mark.parametrize(
    ("chunks", "width", "grid", "split"),
    [
        ([(3392, 64)], None, (56, 4, 1), 1),  # 8 blocks of up to 7 splits of 512 keys
        ([(3392, 64), *[(0, 0)] * 7], None, (66, 4, 1), 16),  # two programs a multiprocessor
        ([(3392, 64), *[(0, 0)] * 16], None, (8, 4, 17), 0),  # more rows than every program should look at
        ([(0, 64)], 16, (16, 4, 1), 1),  # a table for 1,024 keys, two splits of 512, of 8 blocks
        ([(0, 64)], 8, (8, 4, 1), 0),  # a table for one split
        ([(8192, 512)], None, (57, 4, 1), 0),  # 228 blocks fill the chip
        ([(0, 3392)], None, (189, 4, 1), 0),
    ],
)
def test_the_grid_has_room_for_two_programs_a_multiprocessor_where_keys_may_be_split(
    chunks: Rows, width: int | None, grid: tuple[int, ...], split: int
) -> None:
    sizes = {"chunks": chunks, "H": 28, "G": 4, "C": 128, "P": 64}
    inputs = SPEC.make_inputs(Case("other", sizes), torch.bfloat16, torch.device("meta"))
    if width is not None:
        inputs["block_table_SN"] = torch.empty(len(chunks), width, dtype=torch.int32, device="meta")
    out = torch.empty_like(inputs["q_THC"])
    (launch,) = plan_prefill_attention(**inputs, out=out, target=TARGETS[90])
    assert launch.grid == grid
    assert launch.constexprs["SPLIT"] == split


@pytest.mark.parametrize("capability", TARGETS)
def test_the_workspace_of_the_engine_is_large_enough_for_every_model_and_below_13_megabytes(
    capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = TARGETS[capability]
    monkeypatch.setattr("internvl_rt.kernels._prefill_plan.target_of", lambda device: target)
    workspace = build_prefill_workspace(torch.device("meta"))
    assert sum(t.nbytes for t in (workspace.parts, workspace.stats, workspace.arrived)) < 13e6
    split = 0
    for case in SPEC.model_cases:
        inputs = SPEC.make_inputs(case, torch.bfloat16, torch.device("meta"))
        out = torch.empty_like(inputs["q_THC"])
        (launch,) = plan_prefill_attention(**inputs, workspace=workspace, out=out, target=target)
        split += launch.constexprs["SPLIT"]
        assert launch.grid[0] * launch.grid[1] <= 2 * target.num_sms or not launch.constexprs["SPLIT"]
    assert split >= 6  # the questions behind a prefix, of the 1B and the 8B


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": 6143}, "expected 6144 parts, got 6143"),
        ({"stats": 767}, "expected 768 stats, got 767"),
        ({"arrived": 5}, "expected 6 arrived, got 5"),
    ],
)
def test_a_workspace_that_is_too_small_is_refused(change: dict[str, int], message: str) -> None:
    inputs = inputs_of((200, 5), splits=THREE)  # a block of 64 rows, three splits, two kv heads
    sizes = {"parts": 6144, "stats": 768, "arrived": 6}
    for name, size in change.items():
        kind = torch.int32 if name == "arrived" else torch.float32
        whole = PrefillWorkspace(*(torch.zeros(6 * 1024, dtype=torch.float32, device=DEVICE) for _ in sizes))
        workspace = dataclasses.replace(whole, **{name: torch.zeros(size, dtype=kind, device=DEVICE)})
        with pytest.raises(ValueError, match=f"workspace: {message}"):
            prefill_attention(**inputs, workspace=workspace)


def test_a_workspace_on_another_device_is_refused() -> None:
    workspace = build_prefill_workspace(torch.device("meta"), 264)
    with pytest.raises(ValueError, match=r"workspace: expected parts on .*, got meta"):
        prefill_attention(**inputs_of((200, 5)), workspace=workspace)


# Results


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the interpreter runs programs in any order that a test asks for")
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_order_in_which_parts_arrive_changes_no_bit(
    order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = inputs_of((170, 5), splits=THREE)
    expected = prefill_attention(**inputs)
    out, workspace = torch.full_like(expected, math.nan), poisoned_workspace(6)
    launch = plan_of(inputs, workspace, out)
    assert launch.grid == (3, KV_HEADS, 1)
    seen: list[tuple[int, ...]] = []
    set_grid_idx = interpreter_builder.set_grid_idx

    def permuted(x: int, y: int, z: int) -> None:
        seen.append((order[x], y, z))
        set_grid_idx(*seen[-1])

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", permuted)
    run((launch,))
    assert sorted(seen) == list(itertools.product(range(3), range(KV_HEADS), range(1)))
    assert [item for item, head, _ in seen if head == 0] == list(order)
    assert torch.equal(out, expected)
    assert not workspace.arrived.any()


@pytest.mark.parametrize("rule", [SHORT, THREE])
def test_a_workspace_serves_call_after_call(rule: SplitRule) -> None:
    workspace = poisoned_workspace()
    for chunks in (((300, 20),), ((0, 5), (130, 3)), ((300, 20),)):
        inputs = inputs_of(*chunks, splits=rule)
        result = prefill_attention(**inputs, workspace=workspace)
        assert torch.equal(result, prefill_attention(**inputs))
        assert_near_reference(result, inputs)
        assert not workspace.arrived.any()


@pytest.mark.usefixtures("one_order_of_sums")
def test_with_a_number_of_splits_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    inputs = inputs_of((133, 12), (700, 3), (0, 21), splits=THREE)
    together = prefill_attention(**inputs)
    for row in range(3):
        start, stop = inputs["query_start_S1"][row : row + 2].tolist()
        alone = {name: inputs[name][row : row + 1] for name in ("block_table_SN", "seq_len_S")}
        alone |= {"query_start_S1": inputs["query_start_S1"][row : row + 2] - start}
        alone |= {"q_THC": inputs["q_THC"][start:stop], "max_query_len": stop - start}
        assert torch.equal(prefill_attention(**(inputs | alone)), together[start:stop])


def test_other_splits_round_differently_and_the_same_give_the_same_bits() -> None:
    inputs = inputs_of((300, 20))
    rules = [SplitRule(1, num_splits=1), SplitRule(64), SplitRule(128), THREE]
    results = [prefill_attention(**(inputs | {"splits": rule})) for rule in rules]
    for rule, result in zip(rules, results, strict=True):
        assert_near_reference(result, inputs)
        assert torch.equal(prefill_attention(**(inputs | {"splits": rule})), result)
    assert any(not torch.equal(result, results[0]) for result in results)


# The machine code


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_parts_are_added_without_a_barrier_and_several_are_on_their_way(capability: int) -> None:
    """The first 8 are asked for together with the statistics, before these are added up across threads."""
    cases = [("prefill_attention", case, capability) for case in ("1b_64_behind_3392", "8b_64_behind_8192")]
    for found in instructions_of(cases, ADDING).values():
        ahead, loop = adding_of(found)
        many = 4 if capability in (90, 100) else 1  # loads of each of 8 parts, for 4 values each
        assert ahead.count("LDG.E.128") >= 8 * many
        assert "FFMA" not in ahead
        assert "BAR" not in loop
        assert loop.count("LDG.E.128") == 8 * many
        assert loop.count("FFMA") * (2 if capability == 100 else 1) == 32 * many  # sm_100 multiplies pairs
        assert loop.index("FFMA") >= 4 * many, "the first part is added before others are asked for"


# Tests on a GPU, where programs run in parallel


@pytest.mark.gpu
def test_a_thousand_launches_give_the_same_bits() -> None:
    inputs = inputs_of((8000, 40), (300, 9), splits=None, H=28, G=4, C=128)
    workspace = build_prefill_workspace(DEVICE)
    expected = prefill_attention(**inputs, workspace=workspace)
    assert_near_reference(expected, inputs)
    out = torch.empty_like(expected)
    for _ in range(1000):
        out.fill_(math.nan)
        prefill_attention(**inputs, workspace=workspace, out=out)
        assert torch.equal(out, expected)
    assert not workspace.arrived.any()


@pytest.mark.gpu
def test_a_graph_serves_other_lengths() -> None:
    first = inputs_of((5000, 64), (0, 0), splits=None, H=28, G=4, C=128)
    first["k_cache_BGPC"].nan_to_num_()  # other lengths below read the same blocks
    first["v_cache_BGPC"].nan_to_num_()
    workspace = build_prefill_workspace(DEVICE)
    prefill_attention(**first, workspace=workspace)  # this call builds the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = prefill_attention(**first, workspace=workspace)
    table = first["block_table_SN"]
    table[1] = table[0]
    for new, seq_lens in (((64, 0), (5064, 0)), ((3, 20), (1000, 4000)), ((0, 1), (0, 1)), ((0, 0), (0, 0))):
        starts = torch.tensor([0, *itertools.accumulate(new)], dtype=torch.int32)
        first["query_start_S1"].copy_(starts)
        first["seq_len_S"].copy_(torch.tensor(seq_lens, dtype=torch.int32))
        out.fill_(0.0)
        graph.replay()
        tokens = sum(new)
        assert_near_reference(out[:tokens], first | {"q_THC": first["q_THC"][:tokens]})
        assert not out[tokens:].any()
    assert not workspace.arrived.any()

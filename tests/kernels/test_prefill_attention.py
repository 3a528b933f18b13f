"""Tests `prefill_attention` beyond its contract: refusals, choice of tiles and loads, padding rows, large offsets.

How keys are split is tested in test_prefill_splits.py.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from internvl_rt.kernels._contract import Case
from internvl_rt.kernels._launch import TARGETS, Launch
from internvl_rt.kernels.prefill_attention import SPEC, plan_prefill_attention, prefill_attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS, KV_HEADS, CHANNELS, BLOCK = 6, 2, 16, 16


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def inputs_of(*chunks: tuple[int, int], **sizes: Any) -> dict[str, Any]:
    common = {"chunks": chunks, "H": HEADS, "G": KV_HEADS, "C": CHANNELS, "P": BLOCK}
    return SPEC.make_inputs(Case("small", common | sizes), torch.float16, DEVICE)


@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        ("q_THC", torch.Tensor.double, "expected one of .*, got torch.float64"),
        ("q_THC", lambda t: t[0], "expected three dimensions, got 2"),
        ("q_THC", lambda t: t[:, :, :8], "expected channels of a head one of .16, 32, 64, 128., got 8"),
        ("q_THC", lambda t: t[:, ::2], "expected heads side by side, got strides"),
        ("k_cache_BGPC", lambda t: t.repeat(1, 2, 1, 1), "expected a kv head for each 1 to 16 of 6 heads, got 4"),
        ("k_cache_BGPC", lambda t: t[:, :, :8], "expected slots of a block one of .16, 32, 64, 128., got 8"),
        ("k_cache_BGPC", torch.Tensor.float, "expected torch.float16, got torch.float32"),
        ("v_cache_BGPC", lambda t: t[1:], "expected shape"),
        ("v_cache_BGPC", lambda t: t.transpose(0, 1).contiguous().transpose(0, 1), "expected strides .* of k, got"),
        ("block_table_SN", lambda t: t[1:], "expected shape .2, 4., got .1, 4."),
        ("block_table_SN", lambda t: t[0], "expected two dimensions, got 1"),
        ("block_table_SN", torch.Tensor.long, "expected torch.int32, got torch.int64"),
        ("query_start_S1", lambda t: t[None], "expected one dimension, got 2"),
        ("query_start_S1", lambda t: t[:0], "expected 1 to 65536 elements, got 0"),
        ("query_start_S1", lambda t: t.repeat(30_000), "expected 1 to 65536 elements, got 90000"),
        ("query_start_S1", lambda t: t.repeat_interleave(2)[::2], "expected a contiguous last dimension, got strides"),
        ("query_start_S1", torch.Tensor.long, "expected torch.int32, got torch.int64"),
        ("seq_len_S", lambda t: t[1:], "expected shape .2,., got .1,."),
        ("seq_len_S", torch.Tensor.long, "expected torch.int32, got torch.int64"),
        ("max_query_len", lambda n: -1, "expected 0 to 23 tokens, got -1"),
        ("max_query_len", lambda n: 24, "expected 0 to 23 tokens, got 24"),
        ("out", lambda t: t[1:], "expected shape .23, 6, 16., got .22, 6, 16."),
        ("out", torch.Tensor.float, "expected torch.float16, got torch.float32"),
        ("out", lambda t: t.repeat(1, 2, 1)[:, :6], "expected a contiguous tensor, got strides"),
        ("out", lambda t: t.to("meta"), "expected a tensor on .*, got one on meta"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(argument: str, change: Any, message: str) -> None:
    inputs = inputs_of((20, 20), (0, 3))
    inputs["out"] = torch.empty(23, HEADS, CHANNELS, dtype=torch.float16, device=DEVICE)
    inputs[argument] = change(inputs[argument])
    with pytest.raises(ValueError, match=f"{argument}: {message}"):
        prefill_attention(**inputs)


def test_rows_that_belong_to_no_sequence_stay_as_they_are() -> None:
    inputs = inputs_of((0, 3), (20, 20), (0, 5))
    expected = prefill_attention(**inputs)
    rows = {name: inputs[name][1:] for name in ("block_table_SN", "seq_len_S")}
    rows |= {"query_start_S1": inputs["query_start_S1"][1:]}  # the sequences begin at row 3
    padding = torch.full((4, HEADS, CHANNELS), math.nan, dtype=torch.float16, device=DEVICE)
    out = torch.full((len(expected) + 4, HEADS, CHANNELS), 7.0, dtype=torch.float16, device=DEVICE)
    prefill_attention(**(inputs | rows | {"q_THC": torch.cat((inputs["q_THC"], padding))}), out=out)
    assert torch.equal(out[3:-4], expected[3:])
    assert (out[:3] == 7).all()
    assert (out[-4:] == 7).all()


@pytest.mark.usefixtures("one_order_of_sums")
def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    inputs = inputs_of((33, 40), (0, 30), (64, 21))
    together = prefill_attention(**inputs)
    for row in range(3):
        start, stop = inputs["query_start_S1"][row : row + 2].tolist()
        alone = {name: inputs[name][row : row + 1] for name in ("block_table_SN", "seq_len_S")}
        alone |= {
            "query_start_S1": inputs["query_start_S1"][row : row + 2] - start,
            "q_THC": inputs["q_THC"][start:stop],
        }
        alone["max_query_len"] = stop - start
        assert torch.equal(prefill_attention(**(inputs | alone)), together[start:stop])


@pytest.mark.fast("63")
@pytest.mark.parametrize("border", [1, 16, 63, 64, 100])
def test_two_chunks_give_what_one_gives(border: int) -> None:
    inputs = inputs_of((0, 130))
    whole = prefill_attention(**inputs)
    for first, stop in ((0, border), (border, 130)):
        chunk = {"q_THC": inputs["q_THC"][first:stop], "max_query_len": stop - first}
        chunk["query_start_S1"] = torch.tensor([0, stop - first], dtype=torch.int32, device=DEVICE)
        chunk["seq_len_S"] = torch.tensor([stop], dtype=torch.int32, device=DEVICE)
        # Blocks hold other keys than before: the keys are summed in the same order, but rounded at other places.
        torch.testing.assert_close(prefill_attention(**(inputs | chunk)), whole[first:stop], rtol=2e-3, atol=2e-3)


def test_a_grid_that_is_larger_than_any_row_needs_changes_nothing() -> None:
    inputs = inputs_of((33, 40), (0, 30))
    assert torch.equal(prefill_attention(**(inputs | {"max_query_len": 70})), prefill_attention(**inputs))


# The plan


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("case", SPEC.model_cases, ids=lambda case: case.name)
def test_real_models_read_keys_by_the_copy_engine_where_there_is_one(case: Case, capability: int) -> None:
    constexprs = plan_of(case.sizes, capability).constexprs
    fits = case["P"] % constexprs["BLOCK_N"] == 0  # else the box of keys that is read at once would lie in two blocks
    assert constexprs["USE_TMA"] == (capability in (90, 100) and fits and "window" not in case.sizes)


@pytest.mark.parametrize(
    "sizes",
    [
        {"P": 32},  # the copy engine's box of keys would lie in two blocks
        {"padding": 8},  # the rows are not next to each other
    ],
)
def test_pointers_are_used_where_boxes_do_not_fit(sizes: dict[str, int]) -> None:
    assert not plan_of({"chunks": [(0, 512)], "H": 28, "G": 4, "C": 128, "P": 64, **sizes}, 90).constexprs["USE_TMA"]


@pytest.mark.parametrize(
    ("chunks", "block_m"),
    [
        ([(0, 3392)], 128),  # 189 blocks of 18 queries x 4 kv heads
        ([(0, 512)], 64),  # with 128, 29 blocks x 4 kv heads would leave 16 of 132 multiprocessors without work
        ([(0, 512), (0, 512)], 128),
        ([(0, 512), (0, 100), (64, 12)], 128),
        ([(0, 16)], 64),
    ],
)
def test_blocks_are_small_where_large_ones_would_be_too_few(chunks: list[tuple[int, int]], block_m: int) -> None:
    launch = plan_of({"chunks": chunks, "H": 28, "G": 4, "C": 128, "P": 64}, 90)
    lengths = [new for _, new in chunks]
    assert launch.constexprs["BLOCK_M"] == block_m
    if len(set(lengths)) == 1:
        assert launch.grid == (-(-lengths[0] // (block_m // 7)), 4, len(chunks))
    else:
        assert launch.grid == (-(-sum(lengths) // (block_m // 7)) + len(chunks) - 1, 4, 1)


def test_a_graph_for_several_rows_starts_no_block_of_the_longest_row_for_each() -> None:
    """It knows the tokens of all rows together, any of which may be the longest."""
    sizes = {"chunks": [(0, 2048), *[(0, 0)] * 7], "H": 14, "G": 2, "C": 64, "P": 64}
    assert plan_of(sizes, 90).grid == (-(-2048 // 18) + 7, 2, 1)
    sizes["chunks"] = [(0, 2048), *[(0, 0)] * 16]
    assert plan_of(sizes, 90).grid == (-(-2048 // 18), 2, 17), "more rows than every program should look at"


def plan_of(sizes: Any, capability: int) -> Launch:
    inputs = SPEC.make_inputs(Case("other", sizes), torch.bfloat16, torch.device("meta"))
    out = torch.empty_like(SPEC.reference(**inputs))
    return plan_prefill_attention(**inputs, out=out, target=TARGETS[capability])[0]


# Large offsets


def far_apart(tensor: Tensor, file: Path) -> Tensor:
    """Copies the rows 2^30 + 16 elements from each other, so that in int32 the offset of the third is negative.

    The memory begins 2^31 elements before the first row, so an offset that overflows int32 reads a wrong value and
    does not crash. On the CPU it is a sparse file, of which only a few pages are written.
    """
    stride, first = 2**30 + 16, 2**31
    size = first + (len(tensor) - 1) * stride + tensor[0].numel()
    if DEVICE.type == "cpu":
        memory = torch.from_file(str(file), shared=True, size=size, dtype=tensor.dtype)
    else:
        memory = torch.empty(size, dtype=tensor.dtype, device=DEVICE)
    return memory.as_strided(tensor.shape, (stride, *tensor.stride()[1:]), first).copy_(tensor)


@pytest.mark.parametrize("block_size", [16, 64])  # a table entry is read for each key, or for each tile of keys
@pytest.mark.parametrize("arguments", [("k_cache_BGPC", "v_cache_BGPC"), ("q_THC",)])
def test_rows_may_lie_more_than_2_to_the_31_elements_behind_the_first(
    block_size: int, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    inputs = inputs_of((2 * block_size - 1, 6), P=block_size)
    expected = prefill_attention(**inputs)
    for name in arguments:
        inputs[name] = far_apart(inputs[name], tmp_path / name)
    assert torch.equal(prefill_attention(**inputs), expected)

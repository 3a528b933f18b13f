"""Tests `decode_attention` beyond its contract: refusals, split plans, the order in which parts end, large offsets."""

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from internvl_rt._C import PagedKVCache
from internvl_rt.checkpoint.config import KNOWN_MODELS
from internvl_rt.kernels._contract import Case
from internvl_rt.kernels._decode_attention_body import probability
from internvl_rt.kernels._launch import run, target_of
from internvl_rt.kernels._paged_attention import MODEL_HEADS
from internvl_rt.kernels._split_plan import build_splits, num_split_items, plan_splits
from internvl_rt.kernels.decode_attention import (
    SPEC,
    decode_attention,
    decode_attention_reference,
    plan_decode_attention,
)
from support.instruction_order import ADDING, adding_of, instructions_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS, KV_HEADS, CHANNELS, BLOCK = 6, 2, 16, 16


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def inputs_of(*seq_lens: int, **sizes: Any) -> dict[str, Tensor]:
    common = {"seq_lens": seq_lens, "H": HEADS, "G": KV_HEADS, "C": CHANNELS, "P": BLOCK, "split": 2}
    return SPEC.make_inputs(Case("small", common | sizes), torch.float16, DEVICE)


def assert_near_reference(actual: Tensor, inputs: dict[str, Tensor]) -> None:
    wide = {name: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for name, t in inputs.items()}
    torch.testing.assert_close(actual.double(), decode_attention_reference(**wide), rtol=2e-3, atol=2e-3)  # float16


REFUSALS = [
    ("q_SHC", torch.Tensor.double, "expected one of .*, got torch.float64"),
    ("q_SHC", lambda t: t[0], "expected three dimensions, got 2"),
    ("q_SHC", lambda t: t[:, :, :8], "expected channels of a head one of .16, 32, 64, 128., got 8"),
    ("q_SHC", lambda t: t[:, ::2], "expected heads side by side, got strides"),
    ("q_SHC", lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), "expected heads side by side, got strides"),
    ("k_cache_BGPC", lambda t: t[0], "expected four dimensions, got 3"),
    ("k_cache_BGPC", lambda t: t[:, :0], "expected a kv head for each 1 to 16 of 6 heads, got 0"),
    ("k_cache_BGPC", lambda t: t.repeat(1, 2, 1, 1), "expected a kv head for each 1 to 16 of 6 heads, got 4"),
    ("k_cache_BGPC", lambda t: t.repeat(1, 6, 1, 1), "expected a kv head for each 1 to 16 of 6 heads, got 12"),
    ("k_cache_BGPC", lambda t: t[:, :, :8], "expected slots of a block one of .16, 32, 64, 128., got 8"),
    ("k_cache_BGPC", torch.Tensor.float, "expected torch.float16, got torch.float32"),
    ("k_cache_BGPC", lambda t: t.repeat(1, 1, 1, 2), "expected shape .*16., got .*32"),
    ("k_cache_BGPC", lambda t: t.repeat_interleave(2, -1)[..., ::2], "expected a contiguous last dimension"),
    ("v_cache_BGPC", lambda t: t[1:], "expected shape"),
    ("v_cache_BGPC", torch.Tensor.float, "expected torch.float16, got torch.float32"),
    ("v_cache_BGPC", lambda t: t.transpose(0, 1).contiguous().transpose(0, 1), "expected strides .* of k, got"),
    ("block_table_SN", lambda t: t[0], "expected two dimensions, got 1"),
    ("block_table_SN", lambda t: t[1:], "expected shape .2, 4., got .1, 4."),
    ("block_table_SN", torch.Tensor.long, "expected torch.int32, got torch.int64"),
    ("seq_len_S", lambda t: t[1:], "expected shape .2,., got .1,."),
    ("seq_len_S", torch.Tensor.long, "expected torch.int32, got torch.int64"),
    ("split_start_S1", lambda t: t[1:], "expected shape .3,., got .2,."),
    ("split_start_S1", torch.Tensor.long, "expected torch.int32, got torch.int64"),
    ("split_W3", lambda t: t[0], "expected two dimensions, got 1"),
    ("split_W3", lambda t: t[:1], "expected at least 2 items, got 1"),
    ("split_W3", lambda t: t[:, :2], "expected shape .*3., got .*2."),
    ("split_W3", lambda t: t.repeat(1, 2)[:, :3], "expected a contiguous tensor, got strides"),
    ("counters_SG", lambda t: t[:1], "expected shape .2, 2., got .1, 2."),
    ("counters_SG", torch.Tensor.float, "expected torch.int32, got torch.float32"),
    ("out", lambda t: t[1:], "expected shape .2, 6, 16., got .1, 6, 16."),
    ("out", torch.Tensor.float, "expected torch.float16, got torch.float32"),
    ("out", lambda t: t.repeat(1, 2, 1)[:, :6], "expected a contiguous tensor, got strides"),
    ("out", lambda t: t.to("meta"), "expected a tensor on .*, got one on meta"),
]


@pytest.mark.parametrize(("argument", "change", "message"), REFUSALS)
def test_arguments_that_do_not_fit_are_refused_by_name(argument: str, change: Any, message: str) -> None:
    inputs = inputs_of(33, 20)
    inputs["counters_SG"] = torch.zeros(2, KV_HEADS, dtype=torch.int32, device=DEVICE)
    inputs["out"] = torch.empty(2, HEADS, CHANNELS, dtype=torch.float16, device=DEVICE)
    inputs[argument] = change(inputs[argument])
    with pytest.raises(ValueError, match=f"{argument}: {message}"):
        decode_attention(**inputs)


def test_slots_that_lie_too_far_apart_are_refused() -> None:
    inputs = inputs_of(33, 20)
    for name in ("k_cache_BGPC", "v_cache_BGPC"):
        blocks, heads, slots, channels = inputs[name].shape
        inputs[name] = torch.empty(2**28, dtype=torch.float16, device=DEVICE).as_strided(
            (blocks, heads, slots, channels), (channels, channels, 2**24, 1)
        )
    with pytest.raises(ValueError, match=r"k_cache_BGPC: expected slots fewer than 2\*\*24 elements apart"):
        decode_attention(**inputs)


def test_the_table_of_heads_is_that_of_the_models_of_internvl3() -> None:
    def heads_of(path: Path) -> tuple[int, int, int]:
        text = json.loads(path.read_text())["llm_config"]
        num_heads = text["num_attention_heads"]
        return num_heads, text["num_key_value_heads"], text["hidden_size"] // num_heads

    models = {name.partition("-")[::2]: path for name, path in KNOWN_MODELS.items()}
    expected = {size.lower(): heads_of(path) for (series, size), path in models.items() if series == "InternVL3"}
    assert expected == MODEL_HEADS


# Split plans


@given(st.integers(0, 300), st.integers(1, 16), st.integers(16, 200))
def test_a_plan_has_room_for_every_sequence_and_for_two_programs_a_multiprocessor(s: int, g: int, sms: int) -> None:
    items = num_split_items(s, g, sms)
    assert items >= s
    at_once = items - max(0, s - 1)
    assert at_once * g <= 2 * sms < (at_once + 1) * g


@given(st.integers(1, 132), st.integers(1, 3000), st.sampled_from([2, 4, 8]))
def test_programs_of_equal_rows_are_resident_at_once_and_equally_long(rows: int, blocks: int, kv_heads: int) -> None:
    """A program that starts when the others end would run alone. If there are too many rows for that, none is split."""
    plan = plan_splits([blocks] * rows, num_split_items(rows, kv_heads, 132))
    lengths = {stop - first for items in plan for _, first, stop in items[:-1]}
    assert len(lengths) <= 1
    if rows * kv_heads <= 264:
        assert sum(map(len, plan)) * kv_heads <= 264
    else:
        assert all(len(items) == 1 for items in plan)


def test_one_long_row_among_many_short_ones_is_split() -> None:
    """Although the rows alone fill the GPU, the long row is split so that the others do not wait for it."""
    plan = plan_splits([512] + [32] * 199, num_split_items(200, 4, 132))
    assert len(plan[0]) > 4
    assert all(len(items) == 1 for items in plan[1:])


@pytest.mark.parametrize(
    ("name", "batch", "context", "splits", "length"),
    [
        ("1b", 1, 2048, 16, 2),
        ("8b", 1, 2048, 16, 2),
        ("1b", 1, 32768, 64, 8),
        ("8b", 1, 32768, 64, 8),
        ("8b", 8, 2048, 8, 4),
        ("8b", 8, 32768, 8, 64),
        ("8b", 64, 32768, 1, 512),
        ("78b", 64, 32768, 1, 512),
    ],
)
def test_the_plans_that_are_measured(name: str, batch: int, context: int, splits: int, length: int) -> None:
    case = next(case for case in SPEC.model_cases if case.name == f"{name}_{batch}_x_{context}")
    starts = SPEC.make_inputs(case, torch.bfloat16, torch.device("meta"))["split_start_S1"]
    assert starts.shape == (batch + 1,)
    for row, items in enumerate(plan_splits([context // 64] * batch, case["room"])):
        assert items == [[row, length * i, length * (i + 1)] for i in range(splits)]


@pytest.mark.parametrize(("sequences", "kv_heads", "items"), [(0, 4, 66), (1, 4, 66), (1, 8, 33), (64, 2, 195)])
def test_the_number_of_items_on_132_multiprocessors(sequences: int, kv_heads: int, items: int) -> None:
    assert num_split_items(sequences, kv_heads, 132) == items


@pytest.mark.parametrize("num_items", [3, 4, 9, 40])
def test_the_plan_of_the_cache_is_understood(num_items: int) -> None:
    """The rows are a decode of 9 blocks, a prefill (not split: zeros), decodes of 1 and of 5 blocks, and padding."""
    lengths, new, padded_rows, width = [140, 30, 3, 80], [1, 30, 1, 1], 5, 10
    cache = PagedKVCache(32, BLOCK)
    for seq_id, length in enumerate(lengths):
        assert cache.admit(seq_id, np.arange(length, dtype=np.int32)) == 0
        old = length - new[seq_id]
        assert cache.append(np.array([seq_id], np.int32), np.array([old], np.int32))
        cache.complete(cache.fill_step(*step_buffers([seq_id], [old], 1, width)))
        assert cache.append(np.array([seq_id], np.int32), np.array([new[seq_id]], np.int32))
    starts = np.empty(padded_rows + 1, np.int32)
    items = np.empty((max(num_items, padded_rows), 3), np.int32)
    buffers = step_buffers(list(range(4)), new, padded_rows, width)
    cache.fill_step(*buffers, starts, items)

    inputs = inputs_of(16 * 32 - 1)  # the pool has 32 blocks and two spare ones
    q = torch.randn(padded_rows, HEADS, CHANNELS, dtype=torch.float16, device=DEVICE)
    table, seq_lens = torch.from_numpy(buffers[4]).to(DEVICE), torch.from_numpy(buffers[3]).to(DEVICE)
    for name in ("k_cache_BGPC", "v_cache_BGPC"):
        inputs[name] = torch.randn(32, KV_HEADS, BLOCK, CHANNELS, dtype=torch.float16, device=DEVICE)
    inputs |= {"q_SHC": q, "block_table_SN": table, "seq_len_S": seq_lens}
    inputs |= {"split_start_S1": torch.from_numpy(starts).to(DEVICE), "split_W3": torch.from_numpy(items).to(DEVICE)}
    actual = decode_attention(**inputs)
    seq_lens[1] = 0  # the result of a row without a split is that of an empty sequence
    assert_near_reference(actual, inputs)


def step_buffers(seq_ids: list[int], new: list[int], rows: int, width: int) -> tuple[np.ndarray, ...]:
    shapes = ((rows + 1,), (rows,), (rows, width), (sum(new),))
    return np.array(seq_ids, np.int32), np.array(new, np.int32), *(np.empty(shape, np.int32) for shape in shapes)


def test_another_plan_rounds_differently_and_the_same_plan_gives_the_same_bits() -> None:
    inputs = inputs_of(130, 75, 9)
    results = []
    for split in (1, 2, 3, 99):
        plan = inputs_of(130, 75, 9, split=split)
        inputs |= {name: plan[name] for name in ("split_start_S1", "split_W3")}
        results.append(decode_attention(**inputs))
        assert_near_reference(results[-1], inputs)
        assert torch.equal(decode_attention(**inputs), results[-1])
    assert any(not torch.equal(result, results[0]) for result in results)


@pytest.mark.usefixtures("one_order_of_sums")
def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    together = inputs_of(130, 75, 9)
    out = decode_attention(**together)
    for row in range(3):
        start, stop = together["split_start_S1"][row : row + 2].tolist()
        items = together["split_W3"][start:stop].clone()
        items[:, 0] = 0
        alone = {name: together[name] for name in ("k_cache_BGPC", "v_cache_BGPC")}
        alone |= {name: together[name][row : row + 1] for name in ("q_SHC", "block_table_SN", "seq_len_S")}
        alone |= {"split_start_S1": together["split_start_S1"][row : row + 2] - start, "split_W3": items}
        assert torch.equal(decode_attention(**alone)[0], out[row])


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_order_in_which_parts_arrive_changes_no_bit(order: tuple[int, ...]) -> None:
    """Launches each item of the plan alone, in this order; the last launch combines the parts."""
    inputs = inputs_of(90)
    expected = decode_attention(**inputs)
    assert len(inputs["split_W3"]) == 3
    out = torch.full_like(expected, math.nan)
    counters = torch.zeros(1, KV_HEADS, dtype=torch.int32, device=DEVICE)
    (launch,) = plan_decode_attention(**inputs, counters_SG=counters, out=out, target=target_of(DEVICE))
    for arrived, item in enumerate(order, 1):
        assert out.isnan().all()
        only = torch.full_like(inputs["split_W3"], -1)
        only[item] = inputs["split_W3"][item]
        run((dataclasses.replace(launch, args={**launch.args, "split_items": only}),))
        assert (counters == arrived % 3).all()
    assert torch.equal(out, expected)


def test_counters_are_left_as_zeros_and_serve_many_calls() -> None:
    counters = torch.zeros(3, KV_HEADS, dtype=torch.int32, device=DEVICE)
    for lengths in ((130, 75, 9), (9, 200, 0), (33, 33, 33)):
        inputs = inputs_of(*lengths)
        expected = decode_attention(**inputs)
        assert torch.equal(decode_attention(**inputs, counters_SG=counters), expected)
        assert not counters.any()


# Large offsets


def far_blocks(cache_BGPC: Tensor, file: Path) -> Tensor:
    """Copies the blocks 2^30 + 16 elements from each other, so that in int32 the offset of the third is negative.

    The memory begins 2^31 elements before the first block, so an offset that overflows int32 reads a wrong value and
    does not crash. On the CPU it is a sparse file, of which only a few pages are written.
    """
    stride, first = 2**30 + 16, 2**31
    size = first + (len(cache_BGPC) - 1) * stride + cache_BGPC[0].numel()
    if DEVICE.type == "cpu":
        memory = torch.from_file(str(file), shared=True, size=size, dtype=cache_BGPC.dtype)
    else:
        memory = torch.empty(size, dtype=cache_BGPC.dtype, device=DEVICE)
    strides = (stride, *cache_BGPC.stride()[1:])
    return memory.as_strided(cache_BGPC.shape, strides, first).copy_(cache_BGPC)


@pytest.mark.parametrize("block_size", [16, 64])  # a table entry is read for each key, or for each piece of keys
def test_blocks_may_lie_more_than_2_to_the_31_elements_behind_the_first(block_size: int, tmp_path: Path) -> None:
    inputs = inputs_of(3 * block_size - 1, P=block_size)
    expected = decode_attention(**inputs)
    for name in ("k_cache_BGPC", "v_cache_BGPC"):
        inputs[name] = far_blocks(inputs[name], tmp_path / name)
    assert torch.equal(decode_attention(**inputs), expected)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_the_plan_is_read_before_the_wait_and_all_else_after_it(capability: int) -> None:
    """Checks the machine code, where ACQBULK waits for the previous kernel."""
    cases = [("decode_attention", case, capability) for case in ("1b_1_x_2048", "8b_8_x_2048")]
    for names in instructions_of(cases).values():
        if capability == 80:
            assert not {"ACQBULK", "PREEXIT"} & set(names)
            continue
        before, after = names[: names.index("ACQBULK")], names[names.index("ACQBULK") :]
        assert set(before) == {"LDG"}
        assert len(before) == 9  # 3 numbers of the item, 4 ends of splits, the row's length and a table entry
        assert after.index("PREEXIT") < min(after.index(name) for name in ("LDG", "LDGSTS", "STG"))


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_parts_are_added_without_a_barrier_and_several_are_on_their_way(capability: int) -> None:
    """The first 20 are asked for together with the statistics, before these are added up across threads."""
    cases = [("decode_attention", case, capability) for case in ("1b_1_x_2048", "8b_8_x_2048")]
    for found in instructions_of(cases, ADDING).values():
        ahead, loop = adding_of(found)
        assert ahead.count("LDG.E.128") >= 20
        assert "FFMA" not in ahead
        assert "BAR" not in loop
        assert loop.count("LDG.E.128") == 20
        assert loop.index("FFMA") >= 4, "the first part is added before others are asked for"


@triton.jit
def _probability_kernel(exponent, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, probability(tl.load(exponent + at), out.dtype.element_ty).to(out.dtype.element_ty))


def test_a_weight_in_float16_is_at_most_1_and_stays_nan() -> None:
    """On a GPU the rounding of huge scores can leave an exponent above 0."""
    exponent = torch.tensor([20.0, 0.0, -1.0, -math.inf, math.nan, 128.0, 3.0, -3.0], device=DEVICE)
    out = torch.empty(8, dtype=torch.float16, device=DEVICE)
    _probability_kernel[(1,)](exponent, out, 8)
    expected = torch.tensor([1.0, 1.0, 0.5, 0.0, math.nan, 1.0, 1.0, 0.125], dtype=torch.float16, device=DEVICE)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


# Tests on a GPU, where programs run in parallel


@pytest.mark.gpu
def test_a_thousand_launches_give_the_same_bits() -> None:
    inputs = inputs_of(8000, 300, 5000, 64, H=28, G=4, C=128, P=64, split=4)
    counters = torch.zeros(4, 4, dtype=torch.int32, device=DEVICE)
    expected = decode_attention(**inputs)
    assert_near_reference(expected, inputs)
    out = torch.empty_like(expected)
    for _ in range(1000):
        out.fill_(math.nan)
        decode_attention(**inputs, counters_SG=counters, out=out)
        assert torch.equal(out, expected)
    assert not counters.any()


@pytest.mark.gpu
def test_keys_and_values_that_are_prefetched_are_never_stale() -> None:
    """Before each call the newest token of every row is written, as in a decode step."""
    inputs = inputs_of(8000, 300, 5000, 64, H=28, G=4, C=128, P=64, split=2)
    lengths, table = inputs["seq_len_S"].long() - 1, inputs["block_table_SN"].long()
    newest = table[torch.arange(4, device=DEVICE), lengths // 64], lengths % 64
    for _ in range(100):
        for name in ("k_cache_BGPC", "v_cache_BGPC"):
            inputs[name][newest[0], :, newest[1]] = torch.randn(4, 4, 128, dtype=torch.float16, device=DEVICE)
        assert torch.equal(decode_attention(**inputs, prefetch_keys=True), decode_attention(**inputs))


def test_splits_have_one_shape_whatever_the_lengths_so_that_a_graph_takes_them() -> None:
    for sequences in (1, 7, 300):
        lengths = ([1] * sequences, [32_768] + [0] * (sequences - 1), list(range(900, 900 + sequences)))
        assert len({build_splits(each, 64, 2, DEVICE)[1].shape for each in lengths}) == 1


@pytest.mark.gpu
def test_a_graph_serves_other_lengths_and_plans() -> None:
    first = inputs_of(3000, 40, 500, H=28, G=4, C=128, P=64, split=1, spare=60)
    captured = {name: t.clone() for name, t in first.items() if not name.endswith("BGPC")}
    caches = {name: first[name] for name in ("k_cache_BGPC", "v_cache_BGPC")}
    for cache in caches.values():
        cache.nan_to_num_()  # other lengths below read the same blocks
    counters = torch.zeros(3, 4, dtype=torch.int32, device=DEVICE)
    decode_attention(**captured, **caches, counters_SG=counters)  # this call builds the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(**captured, **caches, counters_SG=counters)
    for lengths, split in (((3000, 40, 500), 1), ((900, 0, 64), 2), ((2999, 2, 500), 9)):
        plan = inputs_of(*lengths, H=28, G=4, C=128, P=64, split=split)
        captured["seq_len_S"].copy_(plan["seq_len_S"])
        captured["split_start_S1"].copy_(plan["split_start_S1"])
        captured["split_W3"].fill_(-1)[: len(plan["split_W3"])] = plan["split_W3"]
        out.fill_(math.nan)
        graph.replay()
        assert_near_reference(out, captured | caches)
    assert not counters.any()

"""Tests attention sinks and sliding windows in both attention kernels and in the reference."""

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from internvl_rt.kernels._contract import Case
from internvl_rt.kernels._kv_numbers import KV_FORMATS
from internvl_rt.kernels._launch import TARGETS, run, target_of
from internvl_rt.kernels._paged_attention import attend_by_torch, paged_attention_reference
from internvl_rt.kernels._prefill_attention_body import own_item
from internvl_rt.kernels._prefill_plan import SplitRule, padded_rows, split_lens
from internvl_rt.kernels._split_plan import split_tensors
from internvl_rt.kernels.decode_attention import SPEC as DECODE
from internvl_rt.kernels.decode_attention import decode_attention, plan_decode_attention
from internvl_rt.kernels.prefill_attention import SPEC as PREFILL
from internvl_rt.kernels.prefill_attention import plan_prefill_attention, prefill_attention
from support.dense_attention import Drawn, assert_near, dense_attention, draw
from support.instruction_order import instructions_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONTEXTS = (1, 127, 128, 129, 500)
WINDOWS = (1, 7, 16, 128)
NONE, THREE, SHORT = SplitRule(1, num_splits=1), SplitRule(1, num_splits=3), SplitRule(64)
HALF = 2e-3  # float16: probabilities and results are rounded to 11 bits


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def decode(drawn: Drawn, splits: tuple[Tensor, Tensor] | None = None, **more: Any) -> Tensor:
    batch = drawn.batch
    plan = splits or (batch.split_start_S1, batch.split_W3)
    lengths = batch.block_table_SN, batch.seq_len_S
    return decode_attention(drawn.q_THC, *drawn.caches, *lengths, *plan, drawn.cache.scale_BGP2, **drawn.how, **more)


def prefill(drawn: Drawn, rule: SplitRule | None = NONE, **more: Any) -> Tensor:
    batch = drawn.batch
    rows = batch.block_table_SN, batch.query_start_R1, batch.seq_len_S, batch.max_query_len
    return prefill_attention(drawn.q_THC, *drawn.caches, *rows, drawn.cache.scale_BGP2, rule, **drawn.how, **more)


def equal_splits(lengths: tuple[int, ...], block_size: int, split: int) -> tuple[Tensor, Tensor]:
    """Plans items of `split` blocks."""
    counts = [-(-length // block_size) for length in lengths]
    rows = [[[row, i, min(i + split, n)] for i in range(0, n, split)] for row, n in enumerate(counts)]
    return split_tensors(rows, sum(map(len, rows)), DEVICE)


# Against a dense softmax


@pytest.mark.fast("None-16-128", "0.0-64-None", "0.0-16-128")
@pytest.mark.parametrize("window", [*WINDOWS, None])
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("sink", [None, 0.0])
def test_decodes_of_unequal_lengths(sink: float | None, block_size: int, window: int | None) -> None:
    """Some rows have one item and others have many, most of them before a window."""
    drawn = draw(CONTEXTS, window=window, sink=sink, block_size=block_size, device=DEVICE)
    assert_near(decode(drawn), drawn.expected_THC, HALF)


@pytest.mark.fast("0.0-16-128", "None-64-7")
@pytest.mark.parametrize("window", [*WINDOWS, None])
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("sink", [None, 0.0])
def test_prompts_whole_and_in_chunks(sink: float | None, block_size: int, window: int | None) -> None:
    chunks = (0, 1), (0, 40), (120, 7), (127, 1), (126, 3), (490, 10), (100, 28)
    drawn = draw((), chunks, window=window, sink=sink, block_size=block_size, device=DEVICE)
    assert_near(prefill(drawn), drawn.expected_THC, HALF)


@pytest.mark.parametrize("rule", [THREE, SHORT, None])
@pytest.mark.parametrize("window", [1, 16, 128, 300, None])
def test_prompts_whose_keys_are_split(window: int | None, rule: SplitRule | None) -> None:
    drawn = draw((), ((490, 10), (0, 0), (0, 20)), window=window, sink=0.0, heads=(8, 1, 32), device=DEVICE)
    assert_near(prefill(drawn, rule), drawn.expected_THC, HALF)


@pytest.mark.fast("-1e+30-20", "0.0-20", "1e+30-20")
@pytest.mark.parametrize("window", [20, None])
@pytest.mark.parametrize("sink", [-1e30, -10.0, 0.0, 10.0, 1e30])
def test_sinks_of_any_size(sink: float, window: int | None) -> None:
    """A high sink takes nearly all, yet what it leaves is as exact as without it; the highest takes all."""
    drawn = draw((1, 33, 200), window=window, sink=sink, device=DEVICE)
    results = {split: decode(drawn, equal_splits((1, 33, 200), 16, split)) for split in (1, 99)}
    chunk = draw((), ((0, 1), (33, 20)), window=window, sink=sink, device=DEVICE)
    chunks = {rule: prefill(chunk, rule) for rule in (NONE, THREE)}
    for y_THC, expected_THC in [
        *((y, drawn.expected_THC) for y in results.values()), *((y, chunk.expected_THC) for y in chunks.values())
    ]:  # fmt: skip
        if sink == 1e30:
            assert not y_THC.any()
        else:
            assert_near(
                y_THC, expected_THC, 0.02 if sink == 10.0 else HALF
            )  # of results around 2^-14 float16 has few bits


def test_a_high_sink_costs_no_digits() -> None:
    """In float32 the result has as many as without sinks. Weights relative to the sink would be 1e-20 in float16."""
    for dtype, most in ((torch.float32, 1e-5), (torch.float16, HALF)):
        drawn = draw((40, 200), sink=0.0, dtype=dtype, device=DEVICE)
        alone = decode(dataclasses.replace(drawn, sinks_H=None)).double()
        sinks_H = torch.full_like(drawn.sinks_H, 8.0)
        ratio = decode(dataclasses.replace(drawn, sinks_H=sinks_H)).double() / alone
        spread = (ratio.amax(-1) - ratio.amin(-1)) / ratio.mean(-1)
        assert spread.median() < 5 * most, "a sink makes all channels of a head smaller alike"


@pytest.mark.fast("16-fp8", "16-int8")
@pytest.mark.parametrize("cache", KV_FORMATS)
@pytest.mark.parametrize("window", [1, 16, 128, None])
@pytest.mark.usefixtures("one_order_of_sums")
def test_caches_in_8_bits(window: int | None, cache: str) -> None:
    how: dict[str, Any] = {"window": window, "numbers": KV_FORMATS[cache], "heads": (8, 1, 64), "device": DEVICE}
    for block_size, sink in ((16, None), (64, 0.0)):
        drawn = draw((1, 128, 300), sink=sink, block_size=block_size, **how)
        assert_near(decode(drawn, equal_splits((1, 128, 300), block_size, 2)), drawn.expected_THC, HALF)
        drawn = draw((), ((0, 1), (150, 20)), sink=sink, block_size=block_size, **how)
        assert_near(prefill(drawn), drawn.expected_THC, HALF)


@pytest.mark.usefixtures("one_order_of_sums")
def test_bfloat16_with_its_own_sinks() -> None:
    drawn = draw((1, 129, 200), window=128, sink=0.0, dtype=torch.bfloat16, device=DEVICE)
    rounded = drawn.sinks_H.bfloat16()
    of_rounded = dataclasses.replace(drawn, sinks_H=rounded)
    assert torch.equal(decode(of_rounded), decode(dataclasses.replace(drawn, sinks_H=rounded.float())))
    assert_near(decode(of_rounded), drawn.expected_THC, 0.02)


def test_a_sink_beside_one_key_takes_its_share_of_a_softmax_over_two() -> None:
    drawn = draw((1, 1), sink=0.0, device=DEVICE)
    k_SGC, v_SGC = (cache[drawn.batch.block_table_SN[:, 0].long()][:, :, 0] for cache in drawn.caches)
    score_SH = (drawn.q_THC.double() * k_SGC.double().repeat_interleave(8, 1)).sum(-1) / 8
    share_SH = torch.sigmoid(score_SH - drawn.sinks_H.double())
    expected = share_SH[..., None] * v_SGC.double().repeat_interleave(8, 1)
    torch.testing.assert_close(drawn.expected_THC, expected)
    assert_near(decode(drawn), expected, HALF)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [1, 7, 128, None])
def test_the_reference(window: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("internvl_rt.kernels._paged_attention.AT_ONCE", 6 * 500)  # scores of a few queries at once
    chunks = (0, 1), (0, 40), (126, 3), (490, 10)
    for sink in (None, -10.0, 0.0, 10.0):
        drawn = draw((), chunks, window=window, sink=sink, heads=(4, 2, 16), dtype=dtype)
        batch = drawn.batch
        rows = batch.block_table_SN, batch.query_start_R1, batch.seq_len_S
        actual = paged_attention_reference(drawn.q_THC, *drawn.caches, *rows, **drawn.how)
        assert actual.dtype == dtype
        assert_near(actual, drawn.expected_THC, 1e-5 if dtype == torch.float32 else 0.02)


def test_a_window_of_all_keys_and_a_sink_of_nothing_change_nothing() -> None:
    drawn = draw((1, 33, 130), device=DEVICE)
    for window, sinks_H in ((130, None), (10_000, None), (None, torch.full((16,), -math.inf, device=DEVICE))):
        other = dataclasses.replace(drawn, window=window, sinks_H=sinks_H)
        assert torch.equal(decode(other), decode(drawn))
    q_HLC, k_GSC = torch.randn(4, 3, 16), torch.randn(2, 9, 16)
    torch.testing.assert_close(attend_by_torch(q_HLC, k_GSC, k_GSC, None, 9), attend_by_torch(q_HLC, k_GSC, k_GSC))


# What is read and what is left alone


def of_one_row(length: int, split: int, window: int) -> tuple[Drawn, dict[str, Any]]:
    drawn = draw((length,), window=window, sink=0.0, device=DEVICE)
    plan = equal_splits((length,), 16, split)
    lengths = drawn.batch.block_table_SN, drawn.batch.seq_len_S
    return drawn, {
        **dict(zip(("q_SHC", "k_cache_BGPC", "v_cache_BGPC"), (drawn.q_THC, *drawn.caches), strict=True)),
        **dict(zip(("block_table_SN", "seq_len_S", "split_start_S1", "split_W3"), (*lengths, *plan), strict=True)),
        **drawn.how,
    }


@pytest.mark.parametrize(
    ("window", "kept"), [(1, 1), (4, 1), (5, 2), (20, 2), (21, 3), (36, 3), (37, 4), (52, 4), (53, 5), (500, 7)]
)
def test_programs_of_items_before_the_window_write_nothing(window: int, kept: int) -> None:
    """A row of 100 tokens has blocks of 16 in items of one block; its last block holds four tokens."""
    drawn, inputs = of_one_row(100, 1, window)
    counters = torch.zeros(1, 2, dtype=torch.int32, device=DEVICE)
    out = torch.full_like(drawn.q_THC, math.nan)
    (launch,) = plan_decode_attention(**inputs, counters_SG=counters, out=out, target=target_of(DEVICE))
    for name in ("partial_acc", "partial_stats"):
        launch.args[name].fill_(math.nan)
    run((launch,))
    assert_near(out, drawn.expected_THC, HALF)
    assert not counters.any()
    written = ~launch.args["partial_stats"].isnan().flatten(2).all(2)
    expected = 0 if kept == 1 else kept  # a single part is the result
    assert written.sum(1).tolist() == [expected, expected]
    assert written[:, : 7 - kept].sum() == 0


@pytest.mark.parametrize("order", list(itertools.permutations(range(2, 5))))
def test_the_order_in_which_parts_of_a_window_arrive_changes_no_bit(order: tuple[int, ...]) -> None:
    drawn, inputs = of_one_row(150, 2, 60)  # five items of two blocks, of which three hold the last 60 keys
    expected = decode_attention(**inputs)
    assert_near(expected, drawn.expected_THC, HALF)
    out = torch.full_like(expected, math.nan)
    counters = torch.zeros(1, 2, dtype=torch.int32, device=DEVICE)
    (launch,) = plan_decode_attention(**inputs, counters_SG=counters, out=out, target=target_of(DEVICE))
    items = inputs["split_W3"]
    for arrived, item in enumerate((0, 1, *order)):
        # Items that wait keep their ends, by which a program knows which of its row's items count.
        only = items.clone()
        only[:, 0] = -1
        only[item, 0] = 0
        assert out.isnan().all()
        run((dataclasses.replace(launch, args={**launch.args, "split_items": only}),))
        assert (counters == max(0, arrived - 1) % 3).all()
    assert torch.equal(out, expected)


def test_a_window_is_read_by_one_kernel_whatever_the_lengths() -> None:
    """A graph that was captured for one batch serves any other with as many rows."""
    plans = [
        plan_decode_attention(**of_one_row(length, 1, 20)[1], out=torch.empty(1, 16, 64), target=TARGETS[90])[0]
        for length in (1, 20, 300)
    ]
    assert plans[0].constexprs == plans[1].constexprs == plans[2].constexprs


@pytest.mark.parametrize("name", ["decode_attention", "prefill_attention"])
def test_the_cost_counts_the_keys_that_are_seen(name: str) -> None:
    spec = {"decode_attention": DECODE, "prefill_attention": PREFILL}[name]
    cases = {case.name: case for case in spec.model_cases if case.name.startswith("gpt_oss")}
    for case in cases.values():
        if "window" not in case.sizes or "cache" in case.sizes:
            continue
        cost, whole = (spec.cost(each, torch.bfloat16) for each in (case, cases[case.name.removesuffix("_window")]))
        if name == "decode_attention":
            rows = len(case["seq_lens"])
            assert (whole.bytes - cost.bytes, cost.flops) == (rows * (4096 - 128) * 2048, rows * 128 * 4 * 64 * 64)
        else:
            ((cached, new),) = case["chunks"]
            keys = [min(index + 1, 128) for index in range(cached, cached + new)]
            assert cost.flops == 4 * 64 * 64 * sum(keys)
            assert whole.bytes - cost.bytes == max(0, cached - 127) * 2048


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sinks_H": lambda t: t.double()}, r"sinks_H: expected one of \[torch.float32, torch.float16\], got .*64"),
        ({"sinks_H": lambda t: t[1:]}, r"sinks_H: expected shape \(16,\), got \(15,\)"),
        ({"sinks_H": lambda t: t.repeat(2)[::2]}, "sinks_H: expected a contiguous last dimension"),
        ({"sinks_H": lambda t: t.to("meta")}, "sinks_H: expected a tensor on .*, got one on meta"),
        ({"window": lambda n: 0}, "window: expected 1 key or more, got 0"),
        ({"window": lambda n: -5}, "window: expected 1 key or more, got -5"),
    ],
)
@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_arguments_that_do_not_fit_are_refused_by_name(name: str, change: dict[str, Any], message: str) -> None:
    drawn = draw(*(((40,), ()) if name == "decode" else ((), ((30, 10),))), window=5, sink=0.0, device=DEVICE)
    ((key, of),) = change.items()
    drawn = dataclasses.replace(drawn, **{key: of(getattr(drawn, key))})
    with pytest.raises(ValueError, match=message):
        decode(drawn) if name == "decode" else prefill(drawn)


# How prefill attention splits what a window shows


@triton.jit
def _items_kernel(
    out, query_start, seq_len, num_rows, queries, num_splits, min_keys,
    N: tl.constexpr, R: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    row, block, split, keys = own_item(query_start, seq_len, num_rows, queries, num_splits, min_keys, N, R, WINDOW)
    at = out + 4 * tl.program_id(0)
    tl.store(at, row)
    tl.store(at + 1, block)
    tl.store(at + 2, split)
    tl.store(at + 3, keys)


@pytest.mark.parametrize("rule", [SHORT, SplitRule(200), THREE])
@pytest.mark.parametrize("window", [1, 130, 700])
def test_programs_find_the_items_of_the_rule(window: int, rule: SplitRule) -> None:
    rows, queries, block_n = [(300, 5), (0, 0), (0, 1), (2000, 30)], 9, 64
    room = 40
    starts = [0, *itertools.accumulate(new for _, new in rows)]
    seq_lens = [sum(row) for row in rows]
    numbers = [torch.tensor(each, dtype=torch.int32, device=DEVICE) for each in (starts, seq_lens)]
    out = torch.empty(room, 4, dtype=torch.int32, device=DEVICE)
    how = len(rows), queries, rule.num_splits or 0, rule.min_keys, block_n, padded_rows(len(rows)), window
    _items_kernel[(room,)](out, *numbers, *how)
    lens = split_lens([new for _, new in rows], seq_lens, queries, room, block_n, rule, window)
    expected = [
        (row, block, split, lens[row])
        for row, (_, new) in enumerate(rows)
        for block in range(-(-new // queries))
        for split in range(-(-min(seq_lens[row], window + block_n - 1) // lens[row]))
    ]
    found = [tuple(item) for item in out.tolist()]
    assert found[: len(expected)] == expected
    assert all(block == -1 for _, block, _, _ in found[len(expected) :])


def test_what_a_narrow_window_shows_is_not_split() -> None:
    sizes = {"chunks": [(3392, 64)], "H": 64, "G": 8, "C": 64, "P": 64}
    inputs = PREFILL.make_inputs(Case("question", sizes), torch.bfloat16, torch.device("meta"))
    out = torch.empty_like(inputs["q_THC"])
    constexprs = {
        window: plan_prefill_attention(**inputs | {"window": window}, out=out, target=TARGETS[90])[0].constexprs
        for window in (None, 128, 2048)
    }
    assert [bool(each["SPLIT"]) for each in constexprs.values()] == [True, False, True]
    assert [each["USE_TMA"] for each in constexprs.values()] == [True, False, False]


# The machine code


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_a_window_is_found_before_the_wait_and_its_keys_are_on_their_way_together(capability: int) -> None:
    jobs = [("decode_attention", "gpt_oss_1_x_4096_window", capability)]
    jobs += [("prefill_attention", "gpt_oss_3392_behind_0_window", capability)]
    decodes, prompt = instructions_of(jobs).values()
    if capability > 80:
        before = decodes[: decodes.index("ACQBULK")]
        assert set(before) == {"LDG"}
        assert len(before) == 10, "what is read without a window, and the ends of the row's last items"
    products = next(index for index, name in enumerate(prompt) if name.endswith("MMA")) if capability != 100 else -1
    # A block of 64 keys or values has 8 KB, of which 256 threads copy 4 KB at once.
    assert prompt[:products].count("LDGSTS") >= 2 * 2 * 2, "keys and values of two blocks"


def test_the_dense_softmax_is_torchs() -> None:
    q_THC, k_SGC = torch.randn(9, 4, 16), torch.randn(9, 2, 16)
    expected = attend_by_torch(*(x.double().transpose(0, 1) for x in (q_THC, k_SGC, k_SGC)))
    torch.testing.assert_close(dense_attention(q_THC, k_SGC, k_SGC), expected)

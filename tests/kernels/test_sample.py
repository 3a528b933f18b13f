"""`sample` beyond the contract: its numbers, the kept sets, the draws, and what the launcher refuses."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from internvl_rt import sampler
from internvl_rt.kernels._contract import Case
from internvl_rt.kernels._launch import Launch, run, target_of
from internvl_rt.kernels._sample_body import key_value, order_key, philox_word, token_weight
from internvl_rt.kernels.sample import (
    MIXED,
    PLAIN,
    SPEC,
    draw_reference,
    kept_reference,
    plan_sample,
    sample,
    sample_reference,
    weight_reference,
)
from internvl_rt.sequence import SamplingParams, Sequence

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ODD_FLOATS = [0.0, -0.0, 1e-45, -1e-45, 1.17e-38, 1.0, -1.0, 3.4e38, -3.4e38, math.inf, -math.inf]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def inputs_of(logits: Tensor, *parameters: tuple[float, ...], seeds: Any = None, **changes: Any) -> dict[str, Any]:
    """Rows of logits, all with the same parameters (as in MIXED) or each with its own."""
    rows, vocab = logits.shape
    inputs = SPEC.make_inputs(Case("", {"R": rows, "V": vocab, "parameters": parameters}), torch.float32, DEVICE)
    if seeds is not None:
        inputs |= {"seed_R": torch.as_tensor(seeds, device=DEVICE), "counter_R": torch.zeros_like(inputs["counter_R"])}
    return inputs | {"logits_RV": logits.to(DEVICE)} | changes


def listed(*rows: dict[int, int]) -> dict[str, Tensor]:
    start = torch.tensor([0, *np.cumsum([len(row) for row in rows])], dtype=torch.int32, device=DEVICE)
    ids, counts = (
        torch.tensor([value for row in rows for value in part(row)], dtype=torch.int32, device=DEVICE)
        for part in (dict.keys, dict.values)
    )
    return {"listed_start_R1": start, "listed_id": ids, "listed_count": counts}


def launched(inputs: dict[str, Any]) -> tuple[Tensor, list[Launch]]:
    """The kernel's tokens, and the launches that made them, for a look at their scratch tensors."""
    out = torch.empty(len(inputs["logits_RV"]), dtype=torch.int64, device=DEVICE)
    launches = plan_sample(**inputs, out=out, target=target_of(DEVICE))
    run(launches)
    return out, launches


def drawn_and_kept(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The kernel's tokens, and the mass that each row kept."""
    out, launches = launched(inputs)
    return out, launches[1].args["kept_mass"]


@triton.jit
def _words_kernel(seed, counter, y, N: tl.constexpr):
    index = tl.arange(0, N)
    tl.store(y + index, philox_word(tl.load(seed + index), tl.load(counter + index)).to(tl.int64, bitcast=True))


def test_uniform_numbers_are_those_of_the_cpu_sampler() -> None:
    seeds = [0, 1, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 0x0123456789ABCDEF]
    counters = [0, 1, 2, 1000, 2**31, 2**32, 7, 2**62]
    seed = torch.from_numpy(np.array(seeds, np.uint64).view(np.int64)).to(DEVICE)
    words = torch.empty(8, dtype=torch.int64, device=DEVICE)
    _words_kernel[(1,)](seed, torch.tensor(counters, device=DEVICE), words, 8)
    uniform = [(word % 2**64 >> 11) / 2**53 for word in words.tolist()]
    assert uniform == [sampler._uniform(s, c) for s, c in zip(seeds, counters, strict=True)]


@triton.jit
def _weights_kernel(x, y, peak, rate, N: tl.constexpr):
    index = tl.arange(0, N)
    tl.store(y + index, token_weight(tl.load(x + index), tl.load(peak), tl.load(rate)))


@pytest.mark.parametrize("temperature", [1e-30, 0.3, 1.0, 7.0, 100.0])
def test_weights_are_the_references_bit_for_bit(temperature: float) -> None:
    x = torch.cat([torch.tensor(ODD_FLOATS[:7]), -torch.rand(2041) * 31 * temperature, -torch.rand(2048) * 1e-3])
    peak = x.max()
    rate = (torch.tensor(1.4426950408889634) / torch.tensor(temperature)).clamp_max(3e38)
    weights = torch.empty(4096, dtype=torch.int64, device=DEVICE)
    _weights_kernel[(1,)](x.to(DEVICE), weights, peak[None].to(DEVICE), rate[None].to(DEVICE), 4096)
    assert torch.equal(weights.cpu(), weight_reference(x, temperature))


def test_weights_are_the_softmax_and_never_rise_with_the_distance() -> None:
    """At this temperature the rate is 1, so that every value that a fraction of an octave can have is tried."""
    last = torch.tensor([2**42])
    for start in range(0, 2**24, 2**20):
        octaves = torch.arange(start, start + 2**20, dtype=torch.float64) / 2**24
        x = -torch.cat([torch.zeros(1), octaves.float()])
        weights = weight_reference(x, float(torch.tensor(1.4426950408889634)))[1:]
        exact = torch.exp2(42 - octaves)
        assert ((weights - exact).abs() <= 2**-27 * exact).all()
        assert (weights.diff() <= 0).all()
        assert weights[0] <= last
        last = weights[-1]
    assert last >= 2**41  # what the next octave begins with


def test_weights_are_the_softmax_within_float32() -> None:
    x = torch.randn(10000) * 4
    weights = weight_reference(x, 0.8).double() / 2**42
    exact = torch.exp((x.double() - x.max().double()) / 0.8)
    octaves = -torch.log2(exact)  # rounded about three times, then cut off behind 24 bits
    assert ((weights - exact).abs() <= (3 * octaves + 1) * 2**-24 * exact + 2**-42).all()
    assert weight_reference(torch.tensor([0.0, -29.9, -math.inf]), 1.0).tolist() == [2**42, 0, 0]


@triton.jit
def _keys_kernel(x, key, back, N: tl.constexpr):
    index = tl.arange(0, N)
    keys = order_key(tl.load(x + index))
    tl.store(key + index, keys)
    tl.store(back + index, key_value(keys))


def test_keys_are_in_the_order_of_the_values_and_lead_back_to_them() -> None:
    x = torch.cat([torch.tensor([*ODD_FLOATS, math.nan]), torch.randn(116)])
    keys = torch.empty(128, dtype=torch.int32, device=DEVICE)
    back = torch.empty(128, device=DEVICE)
    _keys_kernel[(1,)](x.to(DEVICE), keys, back, 128)
    order = keys.cpu().argsort(stable=True)
    assert torch.equal(x[order], x.sort(stable=True).values) or order[-1] == 11  # NaN equals nothing
    assert order[-1] == 11
    assert keys[0] == keys[1] == 0
    torch.testing.assert_close(back.cpu()[:11], x[:11], rtol=0, atol=0)


LOGIT = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 2.5, -3.0, 20.0, -math.inf]),  # ties
    st.floats(-30, 30, width=32),
    st.floats(allow_nan=False, width=32),
)
PARAMETERS = st.tuples(
    st.one_of(st.sampled_from([0.0, 1.0, 0.5, 1e-3]), st.floats(2**-7, 100, width=32)),
    st.sampled_from([0, 1, 2, 3, 7, 40, 45]),
    st.one_of(st.sampled_from([1.0, 0.5, 0.25, 0.9, 1e-6, 1e-30]), st.floats(2**-20, 1, width=32)),
    st.one_of(st.sampled_from([0.0, 1.0, 0.5, 0.05]), st.floats(0, 1, width=32)),
    *(st.sampled_from([neutral]) for neutral in (1.0, 0.0, 0.0)),
)


@pytest.mark.filterwarnings("ignore:overflow encountered in multiply")  # the interpreter's numpy; infinity is meant
@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.tuples(st.lists(LOGIT, min_size=40, max_size=40), PARAMETERS), min_size=1, max_size=4),
    seed=st.integers(-(2**63), 2**63 - 1),
)
@example(rows=[([1.0] * 40, (1.0, 3, 0.5, 0.0, 1.0, 0.0, 0.0))], seed=1)
@example(rows=[([-math.inf] * 40, (1.0, 3, 0.5, 0.0, 1.0, 0.0, 0.0))], seed=1)
def test_kept_mass_and_token_are_the_references(rows: list[tuple[list[float], tuple[float, ...]]], seed: int) -> None:
    logits = torch.tensor([values for values, _ in rows], dtype=torch.float32)
    inputs = inputs_of(logits, *(parameters for _, parameters in rows), seeds=[seed] * len(rows))
    token_R, kept_R = drawn_and_kept(inputs)
    assert torch.equal(token_R, sample_reference(**inputs))
    for x_V, (_, (temperature, top_k, top_p, min_p, *_)), kept in zip(logits, rows, kept_R.tolist(), strict=True):
        temperature, top_p, min_p = (float(np.float32(value)) for value in (temperature, top_p, min_p))
        if temperature and x_V.max().isfinite():
            assert kept == kept_reference(x_V, temperature, int(top_k), top_p, min_p)[1].sum()


@pytest.mark.parametrize("spread", [0.0, 0.01, 4.0])
def test_kept_mass_where_the_list_of_large_tokens_is_too_short(spread: float) -> None:
    """The list has some 400 of 1100 tokens, or overflows: thresholds lie in it, below it, above what it gets later."""
    parameters = [
        (1.0, *filters, 1.0, 0.0, 0.0)
        for filters in ((0, 1.0, 0.0), (20, 0.5, 0.0), (1000, 1e-3, 0.0), (1099, 0.99, 0.6), (0, 0.5, 0.999))
    ]
    logits = (torch.randn(1100) * spread).expand(len(parameters), -1)
    inputs = inputs_of(logits, *parameters)
    token_R, kept_R = drawn_and_kept(inputs)
    assert torch.equal(token_R, sample_reference(**inputs))
    for (temperature, top_k, *rest), kept in zip(parameters, kept_R.tolist(), strict=True):
        top_p, min_p = (float(np.float32(value)) for value in rest[:2])
        assert kept == kept_reference(logits[0], temperature, top_k, top_p, min_p)[1].sum()


@pytest.mark.parametrize("by", ["tokens", "mass"])
def test_thresholds_at_the_end_of_the_list(by: str) -> None:
    """The first list's last token, its neighbours before and behind: by one token, and by one unit of mass."""
    x_V = torch.randn(1100) * 0.5
    _, launches = launched(inputs_of(x_V[None], PLAIN))
    num_listed = int(launches[1].args["totals"][..., 1].sum())
    assert 100 < num_listed <= launches[1].constexprs["LIST"]
    if by == "tokens":
        rows = [(1.0, num_listed + step, 1.0, 0.0) for step in (-1, 0, 1)]
    else:
        weight_V = weight_reference(x_V.sort(descending=True).values, 1.0)
        share = float(weight_V[:num_listed].sum() / weight_V.sum())
        rows = [(1.0, 0, float(np.float32(share + step * 1e-7)), 0.0) for step in range(-3, 4)]
    inputs = inputs_of(x_V.expand(len(rows), -1), *((*row, 1.0, 0.0, 0.0) for row in rows))
    _, kept_R = drawn_and_kept(inputs)
    assert kept_R.tolist() == [int(kept_reference(x_V, *row)[1].sum()) for row in rows]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(st.lists(st.one_of(LOGIT), min_size=1, max_size=50), PARAMETERS)
def test_reference_keeps_what_a_sort_in_float64_keeps(values: list[float], parameters: tuple[float, ...]) -> None:
    x_V = torch.tensor(values, dtype=torch.float32)
    temperature, top_k, top_p, min_p = parameters[:4]
    assume(temperature and x_V.max().isfinite())
    probs_V, id_V = torch.softmax(x_V.double() / temperature, -1).sort(descending=True, stable=True)
    probs_V = probs_V[: int(top_k) or len(values)] / probs_V[: int(top_k) or len(values)].sum()
    before_V = probs_V.cumsum(-1) - probs_V
    assume(((before_V - top_p).abs() > 1e-5).all() or top_p == 1)  # float64 itself is arbitrary there
    assume((probs_V / probs_V[0] - min_p).abs().min() > 1e-5 or min_p in (0, 1))
    expected = id_V[: len(probs_V)][
        (before_V < top_p) & (probs_V >= min_p * probs_V[0]) & (probs_V > 2e-13 * probs_V[0])
    ]
    assume(not ((probs_V < 3e-13 * probs_V[0]) & (probs_V > 1e-13 * probs_V[0])).any())  # weights vanish there
    x_sorted = x_V[id_V]
    assume(torch.equal(x_sorted, x_V.sort(descending=True).values))  # softmax rounds neighbours to ties
    assume(min_p != 1 or (x_sorted[0] - x_sorted[x_sorted < x_sorted[0]]).gt(1e-5 * temperature).all())
    kept, _ = kept_reference(x_V, temperature, int(top_k), top_p, min_p)
    if top_p == 1:  # before_V may reach 1 in the tail of float64
        expected = id_V[: len(probs_V)][(probs_V >= min_p * probs_V[0]) & (probs_V > 2e-13 * probs_V[0])]
    assert kept.tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("logits", "parameters", "kept"),
    [
        ([1.0] * 4, (1.0, 0, 0.5, 0.0), [0, 1]),  # exactly half is reached by two
        ([1.0] * 4, (1.0, 0, 0.5001, 0.0), [0, 1, 2]),
        ([1.0] * 4, (1.0, 3, 0.5, 0.0), [0, 1]),  # half of three
        ([0.0, 2.0, 0.0, 2.0, -0.0], (1.0, 3, 1.0, 0.0), [1, 3, 0]),  # lower indices first
        ([0.0, math.log(2), -math.inf], (1.0, 9, 1.0, 0.5), [1, 0]),
        ([5.0, 5.0, 4.9], (1.0, 0, 1e-9, 0.0), [0]),
        ([3.0, 1.0, 3.0], (1.0, 0, 1.0, 1.0), [0, 2]),
    ],
)
def test_kept_sets_by_hand(logits: list[float], parameters: tuple[float, int, float, float], kept: list[int]) -> None:
    assert kept_reference(torch.tensor(logits), *parameters)[0].tolist() == kept
    inputs = inputs_of(torch.tensor(logits).expand(24, -1), (*parameters, 1.0, 0.0, 0.0), seeds=range(24))
    assert set(sample(**inputs).tolist()) == set(kept)


def test_draws_follow_the_softmax() -> None:
    """Chi-square over 1e5 draws of the reference; the kernel draws the first 200 of them alike."""
    x_V = torch.randn(20)
    id_K, weight_K = kept_reference(x_V, 1.0, 0, 1.0, 0.0)
    total_K = weight_K.cumsum(0)
    draws = [draw_reference(total_K, seed, 0) for seed in range(100_000)]
    counts = np.bincount(draws, minlength=20)
    expected = 100_000 * torch.softmax(x_V.double(), -1)[id_K].numpy()
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < 52.2  # p > 1e-4 with 19 degrees of freedom
    inputs = inputs_of(x_V.expand(200, -1), PLAIN, seeds=range(200))
    assert torch.equal(sample(**inputs).cpu(), id_K[draws[:200]])


def sequence(params: SamplingParams, generated: list[int], seed: int, stop_ids: frozenset[int]) -> Sequence:
    made = Sequence(
        seq_id=0,
        token_ids=[1],
        position_T=np.zeros(1, np.float32),
        next_position=1,
        pictures=(),
        params=params,
        max_tokens=params.max_tokens,
        stop_ids=stop_ids,
        seed=seed,
    )
    made.token_ids += generated
    return made


def test_tokens_are_those_of_the_cpu_sampler() -> None:
    """Its probabilities are float64's, so a number within 1e-6 of a border could tell them apart; none here is."""
    rows, vocab = 60, 300
    logits = torch.randn(rows, vocab) * 3
    sequences, lists = [], []
    for row, parameters in zip(range(rows), MIXED * 6, strict=True):
        names = "temperature top_k top_p min_p repetition_penalty presence_penalty frequency_penalty".split()
        params = SamplingParams(**dict(zip(names, parameters, strict=True)), min_tokens=2 * (row % 3))
        generated = np.random.default_rng(row).integers(0, vocab, row % 5).tolist()
        stop_ids = frozenset(logits[row].topk(2).indices.tolist())
        sequences.append(sequence(params, generated, 2**63 + row, stop_ids))
        counts = {token: generated.count(token) for token in generated}
        lists.append(counts | (dict.fromkeys(stop_ids, -1) if len(generated) < params.min_tokens else {}))
    seeds = torch.from_numpy(np.array([s.seed for s in sequences], np.uint64).view(np.int64))
    counters = torch.tensor([s.num_generated for s in sequences], device=DEVICE)
    inputs = inputs_of(logits, *MIXED, seeds=seeds, **listed(*lists)) | {"counter_R": counters}
    assert sample(**inputs).tolist() == sampler.sample(logits, sequences)


def test_penalties_are_the_cpu_samplers_bit_for_bit() -> None:
    penalties = [(1.3, 0.1, 0.7), (0.7, -1.5, 0.3), (1.0, 0.0, 0.1)]
    logits = torch.randn(3, 90) * 5
    generated = [np.random.default_rng(row).integers(0, 90, 60).tolist() for row in range(3)]
    lists = listed(*({token: row.count(token) for token in row} for row in generated))
    inputs = inputs_of(logits, *((*PLAIN[:4], *penalty) for penalty in penalties), **lists)
    _, launches = launched(inputs)
    for x_V, row, (repetition, presence, frequency) in zip(logits, generated, penalties, strict=True):
        params = SamplingParams(repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency)
        sampler._penalise(x_V, row, params)
    assert torch.equal(launches[0].args["copy"].cpu(), logits)


def test_a_row_is_drawn_alike_in_any_batch() -> None:
    inputs = SPEC.make_inputs(Case("", {"R": 10, "V": 700, "parameters": MIXED, "listed": 9}), torch.float32, DEVICE)
    together = sample(**inputs)
    order = [7, 2, 9, 0, 5]
    starts = inputs["listed_start_R1"].tolist()
    lists = [torch.arange(starts[row], starts[row + 1]) for row in order]
    picked = {name: value[order] for name, value in inputs.items() if name.endswith(("_R", "_R3", "_RV"))}
    picked |= {name: inputs[name][torch.cat(lists)] for name in ("listed_id", "listed_count")}
    lengths = np.cumsum([0, *map(len, lists)])
    picked["listed_start_R1"] = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    assert torch.equal(sample(**picked), together[order])


def test_ids_outside_the_vocabulary_are_ignored() -> None:
    logits = torch.randn(3, 50)
    penalised = (1.0, 0, 1.0, 0.0, 5.0, 1.0, 1.0)
    clean = inputs_of(logits, penalised, seeds=[1, 2, 3], **listed({4: 1}, {}, {49: -1}))
    dirty = inputs_of(logits, penalised, seeds=[1, 2, 3], **listed({50: 1, 4: 1}, {-1: 3}, {49: -1, 2**31 - 1: 1}))
    assert torch.equal(sample(**dirty), sample(**clean))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("values", "token"),
    [
        ([0.0, math.nan, 9.0, math.nan], 1),
        ([0.0, math.inf, 9.0, math.inf], 1),
        ([math.inf, 0.0, math.nan, 0.0], 2),
        ([-math.inf] * 4, 0),
        ([-math.inf, -math.inf, -5.0, -math.inf], 2),
    ],
)
def test_rows_that_are_not_finite(values: list[float], token: int, temperature: float) -> None:
    inputs = inputs_of(torch.tensor([values]), (temperature, *PLAIN[1:]))
    assert sample(**inputs).tolist() == [token]
    assert sample_reference(**inputs).tolist() == [token]


REFUSALS: list[tuple[str, Callable[[Any], Any], str]] = [
    ("logits_RV", torch.Tensor.double, "expected one of .*torch.float32.*, got torch.float64"),
    ("logits_RV", lambda t: t[0], r"expected rows \[R, V\], got \(12,\)"),
    ("logits_RV", lambda t: t[:, :0], "expected a vocabulary from 1 to 262144, got 0"),
    ("logits_RV", lambda t: t[:, :1].expand(3, 2**18 + 1), "expected a vocabulary from 1 to 262144, got 262145"),
    ("logits_RV", lambda t: t.t().contiguous().t(), "expected a contiguous last dimension, got strides"),
    ("penalty_R3", lambda t: t.t().contiguous().t(), "expected a contiguous last dimension, got strides"),
    ("penalty_R3", lambda t: t.repeat(1, 2)[:, :3], "expected a contiguous tensor, got strides"),
    ("listed_count", lambda t: torch.zeros(1, dtype=torch.int32, device=DEVICE), r"expected shape \(0,\), got \(1,\)"),
    *(
        (f"{name}_R", change, message)
        for name, expected, change_dtype in (
            ("temperature", "torch.float32", torch.Tensor.double),
            ("top_k", "torch.int32", torch.Tensor.long),
            ("top_p", "torch.float32", torch.Tensor.half),
            ("min_p", "torch.float32", torch.Tensor.half),
            ("seed", "torch.int64", torch.Tensor.int),
            ("counter", "torch.int64", torch.Tensor.int),
        )
        for change, message in (
            (change_dtype, f"expected {expected}, got"),
            (lambda t: t[:-1], r"expected shape \(3,\), got \(2,\)"),
            (lambda t: t.repeat_interleave(2)[::2], "expected a contiguous last dimension, got strides"),
            (lambda t: t.to("meta"), "expected a tensor on .*, got one on meta"),
        )
    ),
    ("listed_start_R1", lambda t: t[1:], r"expected shape \(4,\), got \(3,\)"),
    ("listed_id", torch.Tensor.long, "expected torch.int32, got torch.int64"),
    ("out", lambda t: t[:-1], r"expected shape \(3,\), got \(2,\)"),
    ("out", torch.Tensor.int, "expected torch.int64, got torch.int32"),
]


@pytest.mark.parametrize(("argument", "change", "message"), REFUSALS)
def test_arguments_that_do_not_fit_are_refused_by_name(
    argument: str, change: Callable[[Any], Any], message: str
) -> None:
    inputs = inputs_of(torch.zeros(3, 12), *MIXED) | {"out": torch.zeros(3, dtype=torch.int64, device=DEVICE)}
    inputs[argument] = change(inputs[argument])
    with pytest.raises(ValueError, match=f"{argument}: {message}"):
        sample(**inputs)

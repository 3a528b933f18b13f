"""Tests `sample` beyond its contract: the kept sets, the draws, and what the launcher refuses."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from internvl_rt.kernels._contract import Case
from internvl_rt.kernels._launch import Launch, run, target_of
from internvl_rt.kernels.sample import (
    GREEDY,
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

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

OVERFLOWS = pytest.mark.filterwarnings(  # numpy warns in the interpreter; infinity is the intended result
    "ignore:overflow encountered in (multiply|subtract|divide)"
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def inputs_of(logits: Tensor, *parameters: tuple[float, ...], seeds: Any = None, **changes: Any) -> dict[str, Any]:
    """Builds the inputs for rows of logits; the rows share one set of parameters (as in MIXED) or have one each."""
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
    """Returns the kernel's tokens and its launches, whose scratch tensors can be read."""
    out = torch.empty(len(inputs["logits_RV"]), dtype=torch.int64, device=DEVICE)
    launches = plan_sample(**inputs, out=out, target=target_of(DEVICE))
    run(launches)
    return out, launches


def drawn_and_kept(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Returns the kernel's tokens and the mass that each row kept."""
    out, launches = launched(inputs)
    return out, launches[1].args["kept_mass"]


LOGIT = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 2.5, -3.0, 20.0, -math.inf]),  # these values make ties
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


@OVERFLOWS
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


@pytest.mark.slow
@pytest.mark.parametrize("spread", [0.0, 0.01, 4.0])
def test_kept_mass_where_the_list_of_large_tokens_is_too_short(spread: float) -> None:
    """The list holds about 430 of 1500 tokens or overflows; thresholds lie in it, below it, or above later entries."""
    parameters = [
        (1.0, *filters, 1.0, 0.0, 0.0)
        for filters in ((0, 1.0, 0.0), (20, 0.5, 0.0), (1400, 1e-3, 0.0), (1499, 0.99, 0.6), (0, 0.5, 0.999))
    ]
    logits = (torch.randn(1500) * spread).expand(len(parameters), -1)
    inputs = inputs_of(logits, *parameters)
    token_R, kept_R = drawn_and_kept(inputs)
    assert torch.equal(token_R, sample_reference(**inputs))
    for (temperature, top_k, *rest), kept in zip(parameters, kept_R.tolist(), strict=True):
        top_p, min_p = (float(np.float32(value)) for value in rest[:2])
        assert kept == kept_reference(logits[0], temperature, top_k, top_p, min_p)[1].sum()


@pytest.mark.fast("tokens")
@pytest.mark.parametrize("by", ["tokens", "mass"])
def test_thresholds_at_the_end_of_the_list(by: str) -> None:
    """Puts the threshold at the list's last token, and one token, or one unit of mass, before and after it."""
    x_V = torch.randn(1500) * 0.5
    _, launches = launched(inputs_of(x_V[None], (1.0, 1, 1.0, 0.0, 1.0, 0.0, 0.0)))
    num_listed = int(launches[1].args["lengths"].sum())
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
    assume(((before_V - top_p).abs() > 1e-5).all() or top_p == 1)  # near a border the float64 result is arbitrary
    assume((probs_V / probs_V[0] - min_p).abs().min() > 1e-5 or min_p in (0, 1))
    expected = id_V[: len(probs_V)][
        (before_V < top_p) & (probs_V >= min_p * probs_V[0]) & (probs_V > 2e-13 * probs_V[0])
    ]
    assume(not ((probs_V < 3e-13 * probs_V[0]) & (probs_V > 1e-13 * probs_V[0])).any())  # weights this small may be 0
    x_sorted = x_V[id_V]
    assume(torch.equal(x_sorted, x_V.sort(descending=True).values))  # softmax may round close values to ties
    assume(min_p != 1 or (x_sorted[0] - x_sorted[x_sorted < x_sorted[0]]).gt(1e-5 * temperature).all())
    kept, _ = kept_reference(x_V, temperature, int(top_k), top_p, min_p)
    if top_p == 1:  # rounding may bring before_V to 1 before the last tokens
        expected = id_V[: len(probs_V)][(probs_V >= min_p * probs_V[0]) & (probs_V > 2e-13 * probs_V[0])]
    assert kept.tolist() == sorted(expected.tolist())


@pytest.mark.fast("half", "equal", "largest_alone")
@pytest.mark.parametrize(
    ("logits", "parameters", "kept"),
    [
        ([1.0] * 4, (1.0, 0, 0.5, 0.0), [0, 1]),  # two tokens reach exactly half
        ([1.0] * 4, (1.0, 0, 0.5001, 0.0), [0, 1, 2]),
        ([1.0] * 4, (1.0, 3, 0.5, 0.0), [0, 1]),  # two tokens are more than half of three
        ([0.0, 2.0, 0.0, 2.0, -0.0], (1.0, 3, 1.0, 0.0), [0, 1, 3]),  # of equal logits the lower ids are kept
        ([0.0, math.log(2), -math.inf], (1.0, 9, 1.0, 0.5), [0, 1]),
        ([5.0, 5.0, 4.9], (1.0, 0, 1e-9, 0.0), [0]),
        ([3.0, 1.0, 3.0], (1.0, 0, 1.0, 1.0), [0, 2]),
    ],
    ids=["half", "more_than_half", "half_of_three", "equal", "ratio", "least", "largest_alone"],
)
def test_kept_sets_by_hand(logits: list[float], parameters: tuple[float, int, float, float], kept: list[int]) -> None:
    assert kept_reference(torch.tensor(logits), *parameters)[0].tolist() == kept
    inputs = inputs_of(torch.tensor(logits).expand(24, -1), (*parameters, 1.0, 0.0, 0.0), seeds=range(24))
    assert set(sample(**inputs).tolist()) == set(kept)


@pytest.mark.slow
def test_draws_follow_the_softmax() -> None:
    """Tests 1e5 draws of the reference by chi-square; the kernel must make the same first 200 draws."""
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


def drawn_in_sorted_order(x_V: Tensor, temperature: float, seed: int) -> int:
    x_V, id_V = x_V.sort(descending=True, stable=True)
    return int(id_V[draw_reference(weight_reference(x_V, temperature).cumsum(0), seed, 0)])


@pytest.mark.slow
def test_a_draw_hardly_depends_on_noise_in_the_logits() -> None:
    """The noise swaps near ties in sorted order, which would change most draws; the order of ids does not change."""
    logits = (4 * torch.randn(2000, 3000)).round() + 1e-6 * torch.randn(2000, 3000)
    noisy = logits * (1 + 1e-6 * torch.randn(2000, 3000))
    hot = (3.0, *PLAIN[1:])
    drawn, drawn_of_noisy = (sample_reference(**inputs_of(rows, hot, seeds=range(2000))) for rows in (logits, noisy))
    assert (drawn != drawn_of_noisy).double().mean() < 1e-3
    swapped = [drawn_in_sorted_order(logits[i], 3.0, i) != drawn_in_sorted_order(noisy[i], 3.0, i) for i in range(100)]
    assert sum(swapped) > 50


def penalised(x: float, count: int, repetition: float, presence: float, frequency: float) -> np.float32:
    """Applies the penalties one after another, rounding to float32 each time."""
    value, factor = np.float32(x), np.float32(repetition)
    value = value / factor if value > 0 else value * factor
    return value - np.float32(presence) - np.float32(frequency) * np.float32(count)


def token_in_float64(x_V: Tensor, parameters: tuple[float, ...], seed: int, counter: int) -> int:
    temperature, top_k, top_p, min_p = parameters
    if temperature == 0:
        return int(x_V.argmax())
    probs_V, id_V = torch.softmax(x_V.double() / temperature, -1).sort(descending=True, stable=True)
    probs_V = probs_V[: int(top_k) or None] / probs_V[: int(top_k) or None].sum()
    kept_V = (probs_V.cumsum(-1) - probs_V < top_p) & (probs_V >= min_p * probs_V[0])
    id_V, order_V = id_V[: len(probs_V)][kept_V].sort()
    total_V = probs_V[kept_V][order_V].cumsum(-1)
    uniform = np.random.Generator(np.random.Philox(key=seed, counter=counter)).random()
    return int(id_V[int(torch.searchsorted(total_V, uniform * total_V[-1], right=True))])


@pytest.mark.slow
def test_tokens_are_those_of_an_inverse_cdf_in_float64() -> None:
    """The results could differ if a random number were within 1e-6 of a border between tokens; none here is."""
    logits, parameters = 3 * torch.randn(60, 300), MIXED * 6
    lists = []
    for row, x_V in enumerate(logits):
        generated = np.random.default_rng(row).integers(0, 300, row % 5).tolist()
        forbidden = x_V.topk(2).indices.tolist() if row % 3 else []
        lists.append({token: generated.count(token) for token in generated} | dict.fromkeys(forbidden, -1))
    seeds = np.arange(2**63, 2**63 + 60, dtype=np.uint64)
    inputs = inputs_of(logits, *MIXED, seeds=torch.from_numpy(seeds.view(np.int64)), **listed(*lists))
    inputs["counter_R"] += torch.arange(60, device=DEVICE) % 5
    expected = []
    for row, x_V in enumerate(logits.clone()):
        for token, count in lists[row].items():
            x_V[token] = float(penalised(x_V[token], count, *parameters[row][4:])) if count > 0 else -math.inf
        expected.append(token_in_float64(x_V, parameters[row][:4], int(seeds[row]), row % 5))
    assert sample(**inputs).tolist() == expected


def test_penalties_round_at_every_step() -> None:
    penalties = [(1.3, 0.1, 0.7), (0.7, -1.5, 0.3), (1.0, 0.0, 0.1)]
    logits = torch.randn(3, 90) * 5
    lists = [dict.fromkeys(range(row, 90, 2), 1 + 3 * row) for row in range(3)]
    inputs = inputs_of(logits, *((*PLAIN[:4], *penalty) for penalty in penalties), **listed(*lists))
    _, launches = launched(inputs)
    for x_V, counts, penalty in zip(logits, lists, penalties, strict=True):
        for token, count in counts.items():
            x_V[token] = float(penalised(x_V[token], count, *penalty))
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


@pytest.mark.slow
def test_rows_of_the_official_vocabulary_are_the_references() -> None:
    parameters = (PLAIN, (0.8, 50, 0.9, 0.05, 1.2, 0.0, 0.0), GREEDY)
    case = Case("", {"R": 3, "V": 151_674, "parameters": parameters, "listed": 5})
    inputs = SPEC.make_inputs(case, torch.float32, DEVICE)
    assert torch.equal(sample(**inputs), sample_reference(**inputs))


def test_ids_outside_the_vocabulary_are_ignored() -> None:
    logits = torch.randn(3, 50)
    penalised = (1.0, 0, 1.0, 0.0, 5.0, 1.0, 1.0)
    clean = inputs_of(logits, penalised, seeds=[1, 2, 3], **listed({4: 1}, {}, {49: -1}))
    dirty = inputs_of(logits, penalised, seeds=[1, 2, 3], **listed({50: 1, 4: 1}, {-1: 3}, {49: -1, 2**31 - 1: 1}))
    assert torch.equal(sample(**dirty), sample(**clean))


@OVERFLOWS
@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1.0])
@pytest.mark.parametrize(
    ("values", "token"),
    [
        ([0.0, 1.0, 9.0, math.nan], -1),
        ([0.0, math.inf, 9.0, 1.0], -1),
        ([math.inf, 0.0, math.nan, 0.0], -1),
        ([-math.inf] * 4, -1),
        ([-math.inf, -math.inf, -5.0, -math.inf], 2),  # a grammar forbids tokens so
        ([-3e38, 3.4e38, -math.inf, 0.0], 1),
    ],
)
def test_a_row_that_is_not_finite_gives_no_token(values: list[float], token: int, temperature: float) -> None:
    inputs = inputs_of(torch.tensor([values]), (temperature, *PLAIN[1:]))
    assert sample(**inputs).tolist() == [token]
    assert sample_reference(**inputs).tolist() == [token]


def test_one_logit_that_is_no_number_is_noticed_anywhere_and_in_its_row_alone() -> None:
    logits = torch.randn(4, 3000)
    logits[[0, 1, 2], [0, 1499, 2999]] = math.nan
    inputs = inputs_of(logits, PLAIN, seeds=range(4))
    drawn = sample(**inputs).tolist()
    assert drawn[:3] == [-1, -1, -1]
    assert drawn == sample_reference(**inputs).tolist()
    assert drawn[3] >= 0


@OVERFLOWS
def test_penalties_neither_hide_what_is_not_finite_nor_make_it() -> None:
    logits = torch.zeros(4, 50)
    logits[0, 7], logits[1, 7], logits[2, 7], logits[3, 7] = math.nan, math.inf, 1.0, 1.0
    forbidden, repeated = {7: -1}, {7: 1}
    smallest = float(torch.finfo(torch.float32).smallest_normal) / 2**20  # 1 / smallest is beyond float32
    inputs = inputs_of(logits, (0.0, *PLAIN[1:4], smallest, 0.0, 0.0), **listed(*[forbidden] * 3, repeated))
    assert sample(**inputs).tolist() == [-1, -1, 0, 7]
    assert sample_reference(**inputs).tolist() == [-1, -1, 0, 7]


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

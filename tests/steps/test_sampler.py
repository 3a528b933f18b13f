"""Tests sampling: filters, penalties, seeds, and that rows do not depend on each other."""

import math
from itertools import count

import numpy as np
import pytest
import torch

from internvl_rt import SamplingParams
from internvl_rt.model.ops import TORCH
from internvl_rt.steps.sampler import Sampler, add_biases, derive_seed, forbid
from internvl_rt.steps.sequence import Sequence
from internvl_rt.steps.step import Draw

VOCAB = 50
CPU = torch.device("cpu")
SEQ_IDS = count()


def sequence(params=None, *, generated=(), seed=7, stop_ids=(), **fields):
    params = params or SamplingParams(**fields)
    made = Sequence(
        seq_id=next(SEQ_IDS),
        token_ids=[1, 2, 3],
        position_T=np.arange(3, dtype=np.float32),
        next_position=3.0,
        pictures=(),
        params=params,
        max_tokens=params.max_tokens,
        stop_ids=frozenset(stop_ids),
        seed=seed,
    )
    made.token_ids += generated
    made.num_tokens += len(generated)
    return made


def sample(logits_RV, sequences):
    draws = [Draw(sequence, row, sequence.num_tokens - sequence.num_prompt) for row, sequence in enumerate(sequences)]
    token_id_R = torch.empty(len(draws), dtype=torch.int64)
    TORCH.sample(logits_RV, Sampler(CPU).build(draws), token_id_R)
    return token_id_R.tolist()


@pytest.fixture
def logits_V():
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(3)) * 2


def drawn(logits_V, num_draws=4000, **fields):
    """Returns how often each id is drawn over many seeds."""
    params = SamplingParams(**{"temperature": 1.0, **fields})
    ids = sample(logits_V.expand(num_draws, -1), [sequence(params, seed=seed) for seed in range(num_draws)])
    return np.bincount(ids, minlength=VOCAB)


def test_forbidding_tokens_hides_no_logit_that_is_not_finite():
    logits_RV = torch.zeros(3, VOCAB)
    logits_RV[0, 7], logits_RV[1, 7], logits_RV[2, 7] = math.nan, math.inf, -math.inf
    only_first = np.array([[1, 0]] * 3, np.int32)
    forbid(logits_RV, [0, 1, 2], only_first)
    assert logits_RV[:, 7].isfinite().logical_not().all()
    assert torch.all(logits_RV[:, 8] == -math.inf)
    assert sample(logits_RV, [sequence(), sequence(), sequence()]) == [-1, -1, 0]


def test_biases_are_added_to_their_rows_and_tokens_alone():
    logits_RV = torch.randn(4, VOCAB)
    logits_RV[3, 1], logits_RV[3, 2] = math.nan, math.inf
    before_RV = logits_RV.clone()
    first, second = sequence(logit_bias={"7": 2.5, 3: -100, 49: 100}), sequence(logit_bias={0: 1, 1: 1, 2: -1})
    add_biases(logits_RV, {2: first.bias, 3: second.bias})
    change_RV = torch.zeros(4, VOCAB)
    change_RV[2, [7, 3, 49]] = torch.tensor([2.5, -100.0, 100.0])
    change_RV[3, [0, 1, 2]] = torch.tensor([1.0, 1.0, -1.0])
    torch.testing.assert_close(logits_RV, before_RV + change_RV, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_biased_logit_is_the_sum_rounded_to_its_dtype(dtype):
    logits_RV = torch.full((1, VOCAB), 20.0, dtype=dtype)
    add_biases(logits_RV, {0: sequence(logit_bias={5: 0.3}).bias})
    assert logits_RV[0, 5] == torch.tensor(20.3).to(dtype) != 20
    assert logits_RV[0, :5].tolist() == [20.0] * 5


def test_only_a_sequence_whose_logits_are_drawn_from_as_they_are_is_plain():
    assert sequence().is_plain
    assert sequence(logit_bias={}).is_plain
    assert not sequence(logit_bias={1: 0.5}).is_plain


def test_temperature_zero_takes_the_largest_logit(logits_V):
    assert sample(logits_V[None], [sequence()]) == [int(logits_V.argmax())]


def test_frequencies_follow_the_softmax_at_a_temperature(logits_V):
    probs = torch.softmax(logits_V / 1.5, -1).numpy()
    counts = drawn(logits_V, temperature=1.5)
    chi2 = ((counts - 4000 * probs) ** 2 / (4000 * probs)).sum()
    assert chi2 < 49 + 5 * math.sqrt(2 * 49)  # mean + 5 sigma of chi-square with 49 degrees of freedom


def test_top_k_keeps_exactly_k(logits_V):
    kept = set(np.flatnonzero(drawn(logits_V, top_k=5)))
    assert kept == set(logits_V.topk(5).indices.tolist())


def test_top_p_keeps_the_smallest_set_that_reaches_p(logits_V):
    probs, ids = torch.softmax(logits_V.double(), -1).sort(descending=True)
    size = int((probs.cumsum(-1) < 0.6).sum()) + 1
    assert set(np.flatnonzero(drawn(logits_V, top_p=0.6))) == set(ids[:size].tolist())


def test_min_p_drops_what_is_below_a_share_of_the_largest(logits_V):
    probs = torch.softmax(logits_V.double(), -1)
    expected = set(torch.nonzero(probs >= 0.3 * probs.max()).flatten().tolist())
    assert set(np.flatnonzero(drawn(logits_V, min_p=0.3))) == expected


def test_tiny_top_p_is_greedy(logits_V):
    assert drawn(logits_V, num_draws=50, top_p=1e-9)[int(logits_V.argmax())] == 50


def test_draw_does_not_depend_on_neighbours_or_row(logits_V):
    other_V = torch.randn(VOCAB)
    mine, theirs = sequence(temperature=1.0, seed=11), sequence(temperature=2.0, seed=12, top_k=3)
    alone = sample(logits_V[None], [mine])
    together = sample(torch.stack([other_V, logits_V, other_V]), [theirs, mine, theirs])
    assert together[1] == alone[0]


def test_draws_of_a_seed_differ_from_token_to_token():
    flat_RV = torch.zeros(12, VOCAB)
    ids = sample(flat_RV, [sequence(temperature=1.0, generated=[0] * n) for n in range(12)])
    assert len(set(ids)) > 6


def test_repetition_penalty_acts_on_generated_tokens_only(logits_V):
    best, second = logits_V.topk(2).indices.tolist()
    assert sample(logits_V[None], [sequence(repetition_penalty=50.0, generated=[best])]) == [second]
    untouched = sequence(repetition_penalty=50.0)
    untouched.token_ids[0] = best  # this token is in the prompt
    assert sample(logits_V[None], [untouched]) == [best]


def test_repetition_penalty_lowers_negative_logits_too():
    logits_V = torch.tensor([-1.0, -1.1, -9.0])
    assert sample(logits_V[None], [sequence(repetition_penalty=2.0, generated=[0])]) == [1]


@pytest.mark.parametrize(("name", "count"), [("presence_penalty", 1), ("frequency_penalty", 3)])
def test_presence_counts_once_and_frequency_counts_each(name, count):
    logits_V = torch.tensor([count * 1.0 + 0.5, 0.0])
    assert sample(logits_V[None], [sequence(**{name: 1.0}, generated=[0, 0, 0])]) == [0]
    logits_V[0] -= 1.0
    assert sample(logits_V[None], [sequence(**{name: 1.0}, generated=[0, 0, 0])]) == [1]


def test_no_stop_token_before_min_tokens(logits_V):
    best, second = logits_V.topk(2).indices.tolist()
    params = SamplingParams(min_tokens=2)
    assert sample(logits_V[None], [sequence(params, generated=[5], stop_ids=[best])]) == [second]
    assert sample(logits_V[None], [sequence(params, generated=[5, 5], stop_ids=[best])]) == [best]


def test_a_draw_ahead_is_the_one_that_its_place_gives(logits_V):
    """A draw after draft tokens uses the sequence's seed and the index of its own place."""
    params = SamplingParams(temperature=1.0)
    ahead = Sampler(CPU).build([Draw(sequence(params), 0, 3)])
    there = Sampler(CPU).build([Draw(sequence(params, generated=[1, 1, 1]), 0, 3)])
    assert ahead.counter_R.tolist() == there.counter_R.tolist() == [3]
    assert ahead.seed_R.tolist() == there.seed_R.tolist() == [7]


def test_seeds_of_64_bits_arrive_whole():
    seeds = [0, 1, 2**63, 2**64 - 1]
    sampling = Sampler(CPU).build([Draw(sequence(seed=seed), 0, 0) for seed in seeds])
    assert sampling.seed_R.numpy().view(np.uint64).tolist() == seeds


def test_derived_seeds_differ():
    seeds = {derive_seed(seed, number) for seed in (0, 1, 2**64 - 1) for number in range(100)}
    assert len(seeds) == 300


def test_forbidden_tokens_are_minus_infinity_and_the_others_untouched():
    logits_RV = torch.randn(3, 70)
    allowed = [{0, 31, 32, 69}, {5}]
    mask_RW = np.zeros((2, 3), np.uint32)
    for row, ids in enumerate(allowed):
        for token_id in ids:
            mask_RW[row, token_id // 32] |= np.uint32(1) << np.uint32(token_id % 32)
    changed = logits_RV.clone()
    forbid(changed, [2, 0], mask_RW.view(np.int32))
    for row, ids in ((2, allowed[0]), (1, set(range(70))), (0, allowed[1])):
        kept = set(torch.nonzero(changed[row] == logits_RV[row]).flatten().tolist())
        assert kept == ids
        assert (changed[row][[i for i in range(70) if i not in ids]] == -torch.inf).all()


def test_arguments_that_are_kept_are_those_that_would_be_built():
    """Covers steps with the same and with other sequences, with and without lists; earlier results must not change."""
    plain = [sequence(temperature=0.5 + seed, top_k=seed, seed=seed) for seed in range(3)]
    patient = sequence(min_tokens=2, stop_ids=[4])
    sampler, built = Sampler(CPU), []
    for index, sequences in enumerate([plain, plain, plain[:2], [*plain, patient], [*plain, patient], plain, plain]):
        draws = [Draw(each, row, index) for row, each in enumerate(sequences)]
        built.append((sampler.build(draws), Sampler(CPU).build(draws)))
    for kept, fresh in built:
        for name in kept._fields:
            assert torch.equal(getattr(kept, name), getattr(fresh, name)), name

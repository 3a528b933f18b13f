"""Biases of logits, through an engine: what is drawn, beside what, and with which log-probabilities."""

from dataclasses import replace

import numpy as np
import pytest

from internvl_rt import RequestError, SamplingParams
from support.calls import ask, check_idle, load

GREEDY = SamplingParams(max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def engine():
    with load() as engine:
        yield engine


@pytest.fixture(autouse=True)
def nothing_is_left(engine):
    yield
    check_idle(engine)


def test_a_token_of_large_bias_is_always_drawn_and_one_of_small_bias_never(engine):
    token_id = engine.tokenizer.encode("7")[0]
    assert engine.chat(ask("Hello"), replace(GREEDY, logit_bias={token_id: 100})).token_ids == [token_id] * 8
    plain = engine.chat(ask("Hello"), GREEDY).token_ids
    banned = engine.chat(ask("Hello"), replace(GREEDY, logit_bias=dict.fromkeys(map(str, plain), -100))).token_ids
    assert not set(banned) & set(plain)


def test_a_bias_moves_the_likeliest_token_exactly_when_it_is_larger_than_the_distance(engine):
    (first, *_) = engine.chat(ask("Hello"), replace(GREEDY, logprobs=2)).logprobs
    (best, best_logprob), (second, second_logprob) = first.top
    gap = best_logprob - second_logprob
    for bias, expected in ((0.99 * gap, best), (1.01 * gap, second)):
        params = replace(GREEDY, max_tokens=1, logit_bias={second: bias})
        assert engine.chat(ask("Hello"), params).token_ids == [expected]


def test_log_probabilities_are_those_without_biases(engine):
    raw = engine.chat(ask("Hello"), replace(GREEDY, max_tokens=1, logprobs=5)).logprobs[0]
    chosen = raw.top[3][0]
    (biased,) = engine.chat(ask("Hello"), replace(GREEDY, max_tokens=1, logprobs=5, logit_bias={chosen: 100})).logprobs
    assert biased.token_id == chosen
    np.testing.assert_allclose(biased.top, raw.top, rtol=1e-4)
    assert biased.logprob == pytest.approx(raw.top[3][1], rel=1e-4)


def test_a_grammar_forbids_a_token_whatever_its_bias(engine):
    letters = [engine.tokenizer.encode(letter)[0] for letter in "ab7"]
    params = SamplingParams(max_tokens=20, regex="[a-b]{4}", logit_bias={letters[2]: 100, letters[1]: 100})
    assert engine.chat(ask("Hello"), params).text == "bbbb"


def test_penalties_act_on_what_a_bias_has_made_of_the_logits(engine):
    token_id = engine.tokenizer.encode("7")[0]
    biased = replace(GREEDY, max_tokens=2, logit_bias={token_id: 60})
    assert engine.chat(ask("Hello"), biased).token_ids == [token_id] * 2
    first, second = engine.chat(ask("Hello"), replace(biased, repetition_penalty=100.0)).token_ids
    assert (first, second == token_id) == (token_id, False), "the biased logit is divided"


def test_biased_answers_run_beside_others_and_leave_them_alone(engine):
    token_id = engine.tokenizer.encode("7")[0]
    drawn = replace(GREEDY, temperature=2.0, seed=3)
    each = [GREEDY, replace(GREEDY, logit_bias={token_id: 100}), replace(drawn, n=2), replace(drawn, logit_bias={1: 2})]
    together = engine.generate([ask("Hello")] * 4, each)
    alone = [engine.chat(ask("Hello"), params) for params in each]
    assert [reply.choices for reply in together] == [reply.choices for reply in alone]
    assert together[1].token_ids == [token_id] * 8


def test_speculation_changes_no_biased_answer():
    texts = ask("one two three one two three one two three one two")
    for params in (GREEDY, replace(GREEDY, temperature=1.5, seed=2)):
        biased = replace(params, max_tokens=40, logit_bias=dict(zip(range(300), np.linspace(-3, 3, 300), strict=True)))
        with load() as plain, load(num_draft_tokens=4) as speculating:
            assert speculating.chat(texts, biased).token_ids == plain.chat(texts, biased).token_ids


def test_ids_beyond_the_vocabulary_are_refused_before_anything_is_prepared(engine, monkeypatch):
    size = engine.config.decoder.vocab_size
    monkeypatch.setattr(engine, "prepare", None)
    with pytest.raises(RequestError, match=f"logit_bias: {size} is not in the vocabulary of {size:,} tokens"):
        engine.chat(ask("Hello"), SamplingParams(logit_bias={size: 1, 0: 1}))
    with pytest.raises(RequestError, match="stop_token_ids: "):
        engine.chat(ask("Hello"), SamplingParams(stop_token_ids=[0, size]))

"""Usage counts the draft tokens that became part of an answer, and the others, exactly."""

from dataclasses import replace

import pytest

from internvl_rt import SamplingParams
from internvl_rt.engine.in_flight import InFlight
from support.calls import ask, load

GREEDY = SamplingParams(max_tokens=60, ignore_eos=True)
DRAWN = replace(GREEDY, temperature=0.7, seed=4)
QUESTION = ask("7 8 7 8 7 8 7 8 7 8 7 8")


def common_prefix(drafts, token_ids):
    return next((i for i, draft in enumerate(drafts) if token_ids[i : i + 1] != [draft]), len(drafts))


@pytest.fixture
def checked(monkeypatch):
    """A list of each draft that a step checked: sequence, index of its first token, tokens."""
    found, collect = [], InFlight.collect

    def watched(self, launched, result):
        found.extend(
            (chunk.sequence, chunk.start + 1, chunk.drafts)
            for chunk in launched.step.chunks
            if chunk.drafts and self.holds(chunk.sequence)
        )
        collect(self, launched, result)

    monkeypatch.setattr(InFlight, "collect", watched)
    return found


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        DRAWN,
        replace(DRAWN, n=3),
        replace(GREEDY, stop=["87", "78"]),
        replace(GREEDY, max_tokens=5, logit_bias={22: 100}),
        replace(GREEDY, logit_bias={22: 100}),
        replace(GREEDY, logprobs=1, stop="0"),
    ],
)
def test_accepted_are_the_draft_tokens_of_the_answer_and_rejected_all_others(checked, params):
    with load(num_draft_tokens=5) as engine:
        reply = engine.chat(QUESTION, params)
    accepted = sum(common_prefix(drafts, sequence.token_ids[first:]) for sequence, first, drafts in checked)
    assert reply.usage.accepted_draft_tokens == accepted
    assert reply.usage.rejected_draft_tokens == sum(len(drafts) for _, _, drafts in checked) - accepted
    assert reply.usage.accepted_draft_tokens < reply.usage.completion_tokens


def test_an_answer_of_one_token_again_and_again_accepts_what_is_guessed_from_it(checked):
    with load(num_draft_tokens=4) as engine:
        usage = engine.chat(QUESTION, replace(GREEDY, logit_bias={22: 100})).usage
    assert usage.accepted_draft_tokens > 30
    assert usage.accepted_draft_tokens + usage.rejected_draft_tokens == sum(len(drafts) for _, _, drafts in checked)


def test_without_speculation_there_are_none():
    with load() as engine:
        usage = engine.chat(QUESTION, GREEDY).usage
    assert (usage.accepted_draft_tokens, usage.rejected_draft_tokens) == (0, 0)

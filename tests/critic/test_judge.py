"""A model judges answers, its own too, by the probability of yes against no after a question."""

from pathlib import Path

import numpy as np
import pytest

from internvl_rt import Engine, RawPrompt, RequestError
from internvl_rt.critic import Judge
from internvl_rt.critic.judge import QUESTION
from support.calls import ask, check_idle, load
from support.harmony import FINAL, write_small

SAMPLES = Path(__file__).parents[2] / "internvl_rt" / "tiny" / "samples"
ASKED = ask("Read the digits.", SAMPLES / "4719.png")


@pytest.fixture(scope="module")
def engine():
    with load(dtype="float32") as engine:
        yield engine


def test_the_score_is_that_of_the_words_at_the_beginning_of_the_next_answer(engine):
    judge = Judge(engine)
    conversation = [*ASKED, {"role": "assistant", "content": "4719"}, *ask(QUESTION)]
    firsts = [
        engine.tokenizer.encode(f"assistant\n{word}")[len(engine.tokenizer.encode("assistant\n"))]
        for word in ("Yes", "No")
    ]
    (expected,) = engine.score_tokens(conversation, firsts)
    verdict = judge(ASKED, "4719")
    assert verdict.score == pytest.approx(expected.probabilities[0], abs=1e-6)
    assert verdict.score == pytest.approx(1 / (1 + np.exp(expected.logits[1] - expected.logits[0])), abs=1e-6)


def test_answers_are_judged_together_as_each_alone(engine):
    judge = Judge(engine, "Is it true?", yes="yes", no="no")
    answers = ["4719", "7", "The digits are 4719."]
    together = judge.score_responses(ASKED, answers)
    assert [each.response for each in together] == answers
    assert [each.score for each in together] == [pytest.approx(judge(ASKED, text).score, abs=1e-5) for text in answers]
    assert together[1].usage.cached_tokens > together[1].usage.image_tokens > 0, "the picture was computed once"
    check_idle(engine)


def test_a_model_may_judge_its_own_answers(engine):
    ranking = engine.best_of(ASKED, 4, critic=Judge(engine))
    scores = [each.score for each in ranking.answers]
    assert scores == sorted(scores, reverse=True)
    assert all(0 < score < 1 for score in scores)
    check_idle(engine)


REFUSED = {
    "words that begin alike": (
        lambda e: Judge(e, yes="no", no="no"),
        "that begin with tokens of their own",
    ),
    "no question": (lambda e: Judge(e, ""), "question must be"),
    "no answer": (lambda e: Judge(e)(ASKED, ""), "expected texts that are not empty"),
    "an answer begun": (
        lambda e: Judge(e)([*ASKED, {"role": "assistant", "content": "4"}], "4719"),
        "as the last message",
    ),
    "a raw prompt": (lambda e: Judge(e)(RawPrompt("Read"), "4719"), "a critic needs the conversation itself"),
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_what_cannot_be_judged_is_refused(engine, wrong):
    call, message = REFUSED[wrong]
    with pytest.raises(RequestError, match=message):
        call(engine)


def test_a_model_that_answers_in_channels_is_asked_behind_their_header(tmp_path):
    with Engine.from_pretrained(write_small(tmp_path / "model"), device="cpu", dtype="float32") as engine:
        verdict = Judge(engine)(ask("Hi"), "yo")
        conversation = [*ask("Hi"), {"role": "assistant", "content": "yo"}, *ask(QUESTION)]
        behind = [*conversation, {"role": "assistant", "content": FINAL}]
        (expected,) = engine.score_tokens(behind, ["Y", "N"])
        assert verdict.score == pytest.approx(expected.probabilities[0], abs=1e-6)

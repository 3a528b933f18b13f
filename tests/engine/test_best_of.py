"""Best of n: answers drawn from one prompt, scored as they end, best first; votes; early stops; and errors."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from internvl_rt import AsyncEngine, RequestError, SamplingParams
from internvl_rt.engine.voting import MajorityVote
from support.calls import SHORT, advance, ask, check_idle, load, run, submit, threads

SAMPLES = Path(__file__).parents[2] / "internvl_rt" / "tiny" / "samples"
ASKED = ask("Read the digits.", SAMPLES / "862053.png")
WILD = SamplingParams(max_tokens=24, temperature=4.0, seed=5)


@pytest.fixture(scope="module")
def engine():
    with load(dtype="float32") as engine:
        yield engine


def longest(messages, response):
    return len(response)


def test_answers_come_with_all_scores_and_the_best_first(engine):
    ranking = engine.best_of(ASKED, 8, critic=longest, params=WILD)
    assert sorted(each.index for each in ranking.answers) == list(range(8))
    assert [each.score for each in ranking.answers] == sorted((len(e.text) for e in ranking.answers), reverse=True)
    assert ranking.text == ranking.best.text == max((e.text for e in ranking.answers), key=len)
    assert ranking.num_unfinished == 0
    assert ranking.usage.completion_tokens == sum(len(each.choice.token_ids) for each in ranking.answers)
    plain = engine.chat(ASKED, SamplingParams(max_tokens=24, temperature=4.0, seed=5, n=8))
    drawn = {each.index: each.text for each in ranking.answers}
    assert [drawn[index] for index in range(8)] == [choice.text for choice in plain.choices]
    assert 0 < ranking.drawing_s <= ranking.total_s
    check_idle(engine)


def test_of_equal_answers_the_earlier_comes_first(engine):
    ranking = engine.best_of(ASKED, 4, critic=lambda *_: 1, params=WILD)
    assert [each.index for each in ranking.answers] == [0, 1, 2, 3]


def test_the_prompt_is_computed_once(engine):
    before = engine.stats()["encoded_tiles"]
    engine.best_of(ask("Read the digits.", SAMPLES / "31415.png"), 8, critic=longest)
    tiles = engine.describe(ask("Read the digits.", SAMPLES / "31415.png")).layouts[0].num_tiles
    assert engine.stats()["encoded_tiles"] - before == tiles


def test_the_first_answer_may_be_greedy(engine):
    greedy = engine.chat(ASKED, SamplingParams(max_tokens=24)).text
    drawn = [engine.best_of(ASKED, 4, critic=longest, params=WILD, greedy_first=first) for first in (True, False)]
    texts = [{each.index: each.text for each in ranking.answers} for ranking in drawn]
    assert texts[0][0] == greedy
    assert [texts[0][index] for index in (1, 2, 3)] == [texts[1][index] for index in (1, 2, 3)]
    assert texts[1][0] != greedy


def test_parameters_are_the_official_ones_by_default(engine, monkeypatch):
    seen, new_request = [], engine.new_request

    def watched(prepared, params, *rest, **more):
        seen.append(params)
        return new_request(prepared, params, *rest, **more)

    monkeypatch.setattr(engine, "new_request", watched)
    engine.best_of(ASKED, critic=longest)
    (params,) = seen
    assert (params.n, params.temperature, params.top_p, params.max_tokens) == (8, 0.6, 0.95, 4096)


def test_answers_are_scored_while_others_are_drawn():
    """The critic has scored the short answers before the long one has ended."""
    with load(dtype="float32") as engine:
        num_generated = []
        ended = threading.Event()

        def critic(messages, response):
            num_generated.append(engine.stats()["generated_tokens"])
            ended.set()
            return 0.5

        grammar = SamplingParams(regex="(1|2{200})", temperature=5.0, max_tokens=200, seed=3)
        ranking = engine.best_of(ASKED, 6, critic=critic, params=grammar)
        lengths = sorted(len(each.text) for each in ranking.answers)
        assert lengths[0] == 1
        assert lengths[-1] > 1, "the seed draws answers of both lengths"
        assert num_generated[0] < ranking.usage.completion_tokens / 2
        assert not threads()


def test_scores_come_with_what_the_critic_says(engine):
    ranking = engine.best_of(ASKED, 3, critic=lambda _, text: SimpleNamespace(score=len(text), why=text), params=WILD)
    assert all(each.judgement.why == each.text and each.score == len(each.text) for each in ranking.answers)


def test_a_good_answer_may_end_the_drawing():
    with load(dtype="float32") as engine:
        params = SamplingParams(regex="(1|2{400})", temperature=5.0, max_tokens=400, seed=3)
        scores = {"1": 0.9}
        ranking = engine.best_of(ASKED, 6, critic=lambda _, text: scores.get(text, 0.1), params=params, stop_score=0.8)
        assert ranking.text == "1"
        assert ranking.num_unfinished == 6 - len(ranking.answers) > 0
        assert ranking.usage.completion_tokens < 400
        check_idle(engine)


def test_an_answer_without_text_has_no_score(engine):
    never = SamplingParams(regex="|7", temperature=3.0, max_tokens=4, seed=2)
    ranking = engine.best_of(ASKED, 8, critic=longest, params=never)
    empty = [each for each in ranking.answers if not each.text]
    assert 0 < len(empty) < 8
    assert all(each.score is None and "no text" in str(each.error) for each in empty)
    assert all(each.score is not None for each in ranking.answers[: 8 - len(empty)])


def picky(messages, response):
    if len(response) != len(picky.first):
        raise RequestError("the answer is too long for this critic")
    return 1.0


def test_an_answer_that_the_critic_refuses_has_no_score_and_comes_last(engine):
    texts = [each.text for each in engine.best_of(ASKED, 8, critic=longest, params=WILD).answers]
    picky.first = texts[0]
    ranking = engine.best_of(ASKED, 8, critic=picky, params=WILD)
    refused = [each for each in ranking.answers if each.error is not None]
    assert 0 < len(refused) < 8
    assert ranking.answers[-len(refused) :] == tuple(refused)
    assert all(each.error.__traceback__ is None for each in refused), "whoever keeps a ranking keeps no critic"
    picky.first = "x" * 100
    with pytest.raises(RequestError, match="too long for this critic"):
        engine.best_of(ASKED, 8, critic=picky, params=WILD)
    check_idle(engine)


@pytest.mark.parametrize("score", [float("nan"), float("inf"), None, "0.5", True, [1]])
def test_a_score_that_is_no_finite_number_is_an_error(engine, score):
    with pytest.raises(RequestError, match="critic: expected a function that returns a finite number"):
        engine.best_of(ASKED, 2, critic=lambda *_: score, params=WILD)
    check_idle(engine)


def test_a_mistake_of_the_critic_is_raised_and_leaves_nothing(engine):
    other = submit(engine, ask("Hello"), SHORT)
    with pytest.raises(ZeroDivisionError):
        engine.best_of(ASKED, 4, critic=lambda *_: 1 / 0, params=WILD)
    while advance(engine, other) is None:
        pass
    check_idle(engine)
    assert not threads()


def test_a_mistake_of_the_critic_ends_the_drawing_at_once():
    with load(dtype="float32") as engine:
        long = SamplingParams(regex="(1|2{400})", temperature=5.0, max_tokens=400, seed=3)
        with pytest.raises(ZeroDivisionError):
            engine.best_of(ASKED, 6, critic=lambda *_: 1 / 0, params=long)
        assert engine.stats()["generated_tokens"] < 400
        check_idle(engine)


def test_after_an_early_stop_no_other_answer_is_scored():
    """A call that has begun is waited for, and what it says is not lost."""
    calls = []

    def slow(messages, text):
        calls.append(text)
        time.sleep(0.2)
        return 1.0

    with load(dtype="float32") as engine:
        ranking = engine.best_of(ASKED, 8, critic=slow, params=WILD, stop_score=0.5)
        assert calls == [ranking.text]
        assert [each.score for each in ranking.answers[:1]] == [1.0]
        assert all(each.score is None and each.error is None for each in ranking.answers if each.text != calls[0])


def test_the_usage_counts_the_picture(engine):
    usage = engine.best_of(ASKED, 2, critic=longest, params=WILD).usage
    assert usage.image_tokens == engine.chat(ASKED, WILD).usage.image_tokens > 0


def test_an_interrupt_ends_drawing_and_scoring(engine, monkeypatch):
    advance_once, calls = engine.loop.advance, []

    def interrupted(request):
        calls.append(None)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return advance_once(request)

    monkeypatch.setattr(engine.loop, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.best_of(ASKED, 4, critic=lambda *_: time.sleep(0.05) or 1.0, params=WILD)
    monkeypatch.undo()
    assert not threads()
    engine.chat(ask("Hello"), SHORT)
    check_idle(engine)


@pytest.mark.parametrize("timeout_s", [1e-6, 0.05])
def test_answers_that_their_deadline_ends_have_no_score(engine, timeout_s):
    endless = SamplingParams(max_tokens=100_000, ignore_eos=True, temperature=1.0)
    ranking = engine.best_of(ASKED, 3, critic=longest, params=endless, timeout_s=timeout_s)
    assert [each.choice.finish_reason for each in ranking.answers] == ["timeout"] * 3
    assert [each.score for each in ranking.answers] == [None] * 3
    check_idle(engine)


REFUSED = {
    "no critic": ({"critic": None}, "critic: expected a critic, a function or a MajorityVote"),
    "a class": ({"critic": MajorityVote}, "critic: expected a critic, a function or a MajorityVote"),
    "no answers": ({"n": 0}, "n must be an integer from 1"),
    "too many answers": ({"n": 100}, "n is 100, but at most max_num_seqs = 64"),
    "two numbers of answers": ({"n": 4, "params": SamplingParams(n=3)}, "n is 4, but the n of params is 3"),
    "params of another kind": ({"params": {"n": 4}}, "params must be SamplingParams"),
    "a wrong threshold": ({"stop_score": float("nan")}, "stop_score must be a number"),
    "a threshold of a vote": ({"critic": MajorityVote(), "stop_score": 0.5}, "a vote has stop_decided instead"),
    "a wrong flag": ({"greedy_first": 1}, "greedy_first must be"),
    "no messages": ({"messages": []}, "messages: expected"),
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_what_cannot_be_ranked_is_refused(engine, wrong):
    given, message = REFUSED[wrong]
    with pytest.raises(RequestError, match=message):
        engine.best_of(**{"messages": ASKED, "critic": longest, "params": WILD} | given)
    check_idle(engine)


def test_an_engine_in_an_event_loop_refuses(engine):
    other = load()

    async def main():
        async with AsyncEngine(other):
            with pytest.raises(RequestError, match="an AsyncEngine runs the steps"):
                other.best_of(ASKED, 2, critic=longest, params=WILD)

    run(main())
    assert not threads()

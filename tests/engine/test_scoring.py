"""Scores are bounded in number, size, memory and time, and leave room for others while they are computed."""

import asyncio
import time

import pytest

from internvl_rt import AsyncEngine, QueueFullError, RequestError
from internvl_rt.engine.scoring import MAX_RESPONSES
from support.calls import ENDLESS, SHORT, ask, begin, load, run, until_idle

TOO_MUCH = {
    "number": (["a"] * (MAX_RESPONSES + 1), "expected at most 10,000, got 10,001"),
    "characters": (["a" * 700_000] * 100, "expected at most 67,108,864 characters together, got 70,000,000"),
    "the last one": (["a", "b", ""], "expected texts that are not empty, got ''"),
    "a number": (["a", 7], "expected texts that are not empty, got 7"),
}


@pytest.mark.parametrize("responses", TOO_MUCH)
def test_responses_are_checked_before_anything_is_prepared(responses, monkeypatch):
    engine = load(kv_cache_bytes=1 << 24)
    monkeypatch.setattr(engine.preparer, "prepare", None)
    given, message = TOO_MUCH[responses]
    with pytest.raises(RequestError, match=message):
        engine.score(ask("Hello"), given)

    async def main():
        async with AsyncEngine(engine) as e:
            with pytest.raises(RequestError, match=message):
                await e.score(ask("Hello"), given)

    run(main())


async def score_in_a_loop(engine, responses):
    async with AsyncEngine(engine) as e:
        return await e.score(ask("Hello"), responses)


@pytest.mark.parametrize(
    "score", [lambda e, given: e.score(ask("Hello"), given), lambda e, given: run(score_in_a_loop(e, given))]
)
def test_no_more_responses_are_prepared_than_run(score, monkeypatch):
    """Each holds a copy of the prompt."""
    engine, ahead = load(max_num_seqs=2), []
    prepare_score = engine.preparer.prepare_score

    def prepare(*args, **kwargs):
        ahead.append(len(ahead) + 1 - engine.stats().get("requests_length", 0))
        return prepare_score(*args, **kwargs)

    monkeypatch.setattr(engine.preparer, "prepare_score", prepare)
    assert len({len(each.tokens) for each in score(engine, ["a"] * 20)}) == 1
    assert len(ahead) == 20
    assert max(ahead) <= 2


def test_texts_do_not_wait_for_scores_of_many_responses(monkeypatch):
    engine, prepared = load(kv_cache_bytes=1 << 24), []
    prepare_score = engine.preparer.prepare_score

    def prepare_slowly(*args, **kwargs):
        prepared.append(None)
        time.sleep(0.02)
        return prepare_score(*args, **kwargs)

    monkeypatch.setattr(engine.preparer, "prepare_score", prepare_slowly)

    async def main():
        async with AsyncEngine(engine) as e:
            scores = [asyncio.create_task(e.score(ask("Hello"), ["a"] * 200)) for _ in range(4)]
            while not prepared:
                await asyncio.sleep(0.001)
            start_s = time.perf_counter()
            await e.chat(ask("Hello"), SHORT)
            assert time.perf_counter() - start_s < 1.0  # a thread that prepared a whole call would take 4 s
            for task in scores:
                assert not task.done()
                task.cancel()
            await asyncio.gather(*scores, return_exceptions=True)
            num_prepared = len(prepared)
            await until_idle(engine)
            while e.stats()["preparing"]:
                await asyncio.sleep(0.001)
            assert len(prepared) <= num_prepared + 1, "a cancelled call prepares no further response"

    run(main())


def test_scores_that_have_begun_wait_for_room_while_others_fill_the_queue(monkeypatch):
    engine, submissions = load(max_num_seqs=2), []
    expected = engine.score(ask("Hello"), ["a", "b", "c"])
    submit = engine.loop.submit

    def submit_or_be_full(*arguments):
        submissions.append(None)
        if 2 <= len(submissions) <= 5:
            raise QueueFullError("full")
        submit(*arguments)

    monkeypatch.setattr(engine.loop, "submit", submit_or_be_full)

    async def main():
        async with AsyncEngine(engine) as e:
            scores = await e.score(ask("Hello"), ["a", "b", "c"])
            assert [score.logprobs for score in scores] == [pytest.approx(score.logprobs) for score in expected]
            assert len(submissions) == 7

    run(main())


def test_a_full_queue_refuses_scores_before_any_is_computed():
    async def main():
        async with AsyncEngine(load(max_num_seqs=1, max_waiting=0)) as e:
            stream = e.stream(ask("Hello"), ENDLESS)
            await begin(stream)
            with pytest.raises(QueueFullError):
                await e.score(ask("Hello"), ["a", "b"])
            await stream.aclose()
            await until_idle(e._engine)
            assert len(await e.score(ask("Hello"), ["a", "b"])) == 2

    run(main())

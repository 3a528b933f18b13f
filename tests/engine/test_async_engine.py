"""Many callers use the asynchronous interface at once; the model is the checkpoint in the package."""

import asyncio
import random
import threading
import time

import numpy as np
import pytest
import torch

from internvl_rt import AsyncEngine, QueueFullError, RequestError, SamplingParams
from support.calls import (
    ENDLESS,
    PATIENCE_S,
    SHORT,
    ask,
    begin,
    check_nothing_is_left,
    collect,
    load,
    run,
    until_idle,
)

# asyncio reports coroutines that nobody awaited, and tasks that nobody ended, as warnings or from `__del__`.
pytestmark = pytest.mark.filterwarnings("error")

PICTURE = np.random.default_rng(11).integers(0, 256, (60, 90, 3), dtype=np.uint8)
CONVERSATIONS = [ask(f"Question {index}", *[PICTURE] * (index % 5 == 0)) for index in range(30)]


@pytest.fixture(autouse=True)
def nothing_is_left(caplog):
    yield
    check_nothing_is_left(caplog)


def test_thirty_streams_give_the_tokens_and_texts_of_the_engine():
    engine = load(max_num_seqs=16)
    expected = engine.generate(CONVERSATIONS, SHORT)

    async def main():
        async with AsyncEngine(engine) as e:
            streams = await asyncio.gather(*(collect(e.stream(messages, SHORT)) for messages in CONVERSATIONS))
            await until_idle(engine)
        return streams

    streams = run(main())
    assert [pieces[-1].reply.token_ids for pieces in streams] == [reply.token_ids for reply in expected]
    assert ["".join(piece.text for piece in pieces) for pieces in streams] == [reply.text for reply in expected]
    assert all(piece.reply is None for pieces in streams for piece in pieces[:-1])


def test_chat_score_and_encoded_pictures_are_those_of_the_engine():
    engine = load(max_num_seqs=2)
    picture, responses = CONVERSATIONS[0][0]["content"][0]["image"], ["one", "two", "three", "four", "five"]
    reply, scores = engine.chat(CONVERSATIONS[0], SHORT), engine.score(CONVERSATIONS[0], responses)
    [visual_XD] = engine.encode_images([picture])

    async def main():
        async with AsyncEngine(engine) as e:
            assert (await e.chat(CONVERSATIONS[0], SHORT)).token_ids == reply.token_ids
            found = await e.score(CONVERSATIONS[0], responses)
            assert [score.logprobs for score in found] == [pytest.approx(score.logprobs, abs=1e-5) for score in scores]
            torch.testing.assert_close(await e.encode_images([picture]), [visual_XD])
            several = await e.chat(CONVERSATIONS[1], SamplingParams(max_tokens=4, n=2, temperature=1.0, seed=1))
            assert len(several.choices) == 2

    run(main())


@pytest.mark.parametrize("run_ahead", [False, True])  # an engine on a GPU runs ahead
def test_requests_cancelled_at_random_moments_leave_nothing_and_disturb_nobody(run_ahead):
    engine = load(max_num_seqs=12)
    engine.loop.run_ahead = run_ahead
    expected = engine.generate(CONVERSATIONS, SHORT)
    draw = random.Random(3)

    async def main():
        async with AsyncEngine(engine) as e:
            tasks = [asyncio.create_task(collect(e.stream(messages, SHORT))) for messages in CONVERSATIONS]
            victims = draw.sample(tasks, len(tasks) // 2)
            for victim in victims:  # after the pause a victim waits, is being prepared, or has tokens
                await asyncio.sleep(draw.choice([0.0, 0.001, 0.01]))
                victim.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            await until_idle(engine)
            return [task in victims for task in tasks], results

    for was_victim, result, reply in zip(*run(main()), expected, strict=True):
        if isinstance(result, asyncio.CancelledError):
            assert was_victim
        else:  # a victim's request may have ended before its task was cancelled
            assert result[-1].reply.token_ids == reply.token_ids


def test_call_that_is_cancelled_while_it_is_prepared_never_runs(monkeypatch):
    engine, prepared, go_on = load(), [], threading.Event()
    prepare = engine.preparer.prepare

    def prepare_late(*arguments, **how):
        go_on.wait()
        prepared.append(prepare(*arguments, **how))
        return prepared[-1]

    monkeypatch.setattr(engine.preparer, "prepare", prepare_late)

    async def main():
        async with AsyncEngine(engine) as e:
            task = asyncio.create_task(e.chat(ask("Hello"), ENDLESS))
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            go_on.set()
            while not prepared or e.stats()["preparing"]:
                await asyncio.sleep(0.001)
            await until_idle(engine)

    run(main())


def test_deadline_ends_an_answer_where_it_is():
    async def main():
        async with AsyncEngine(load()) as e:
            *_, last = await collect(e.stream(ask("Hello"), ENDLESS, timeout_s=0.2))
            assert last.reply.finish_reason == "timeout"
            assert 0.2 <= last.reply.timings.total_s < 5  # a busy machine may need seconds
            reply = await e.chat(ask("Hello"), ENDLESS, timeout_s=1e-9)
            assert (reply.finish_reason, reply.token_ids) == ("timeout", [])
            with pytest.raises(RequestError, match="timeout_s must be a number above 0"):
                await e.chat(ask("Hello"), timeout_s=0.0)

    run(main())


def test_full_queue_refuses_and_takes_the_next_when_there_is_room():
    async def main():
        async with AsyncEngine(load(max_num_seqs=1, max_waiting=1)) as e:
            first = e.stream(ask("Hello"), ENDLESS)
            await begin(first)
            second = asyncio.create_task(e.chat(ask("Hello"), SHORT))
            while not e.stats()["waiting"]:
                await asyncio.sleep(0.001)
            with pytest.raises(QueueFullError, match="2 requests are in flight"):
                await e.chat(ask("Hello"), SHORT)
            await first.aclose()
            assert len((await second).token_ids) == len((await e.chat(ask("Hello"), SHORT)).token_ids) == 10

    run(main())


def test_calls_that_wait_to_be_prepared_are_bounded_too(monkeypatch):
    engine, go_on = load(max_num_seqs=1, max_waiting=6), threading.Event()
    prepare = engine.preparer.prepare
    monkeypatch.setattr(engine.preparer, "prepare", lambda *args, **how: go_on.wait() and prepare(*args, **how))

    async def main():
        async with AsyncEngine(engine) as e:
            tasks = [asyncio.create_task(e.chat(ask("Hello"), SHORT)) for _ in range(7)]
            await asyncio.sleep(0)
            with pytest.raises(QueueFullError, match="7 calls wait to be prepared"):
                await e.chat(ask("Hello"), SHORT)
            go_on.set()
            assert len({tuple(reply.token_ids) for reply in await asyncio.gather(*tasks)}) == 1

    run(main())


def test_event_loop_goes_on_while_a_request_is_prepared_and_its_steps_run(monkeypatch):
    """The bound is far above the delays of a busy machine; a blocked event loop would stop for twice as long."""
    engine, pause_s = load(), 1.0
    prepare, run_step = engine.preparer.prepare, engine.model.run_step
    monkeypatch.setattr(engine.preparer, "prepare", lambda *args, **how: time.sleep(pause_s) or prepare(*args, **how))
    steps = []

    def run_first_step_slowly(*arguments):
        if not steps:
            time.sleep(pause_s)
        steps.append(None)
        return run_step(*arguments)

    monkeypatch.setattr(engine.model, "run_step", run_first_step_slowly)

    async def main():
        async with AsyncEngine(engine) as e:
            task = asyncio.create_task(e.chat(ask("Hello"), SHORT))
            gaps_s = []
            while not task.done():
                start_s = time.perf_counter()
                await asyncio.sleep(0.005)
                e.stats()
                doomed = e.stream(ask("Hello"), SHORT)  # it is cancelled while the slow step runs
                gaps_s.append(time.perf_counter() - start_s)
                await doomed.aclose()
            assert (await task).timings.total_s > 2 * pause_s
            return gaps_s

    assert max(run(main())) < pause_s / 2


def test_cancelling_does_not_wait_for_the_step_under_way(monkeypatch):
    engine, in_step, go_on = load(), threading.Event(), threading.Event()
    run_step = engine.model.run_step

    def run_step_when_told(*arguments):
        in_step.set()
        go_on.wait()
        return run_step(*arguments)

    monkeypatch.setattr(engine.model, "run_step", run_step_when_told)

    async def main():
        async with AsyncEngine(engine) as e:
            task = asyncio.create_task(e.chat(ask("Hello"), ENDLESS))
            while not in_step.is_set():
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert e.stats()["running"] == 1
            go_on.set()
            await until_idle(engine)
            assert e.stats()["steps"] == 1

    run(main())


def test_submitting_waits_for_few_steps_while_another_thread_steps_all_the_time():
    """Nine in ten calls wait for at most one step; without the queue lock they wait for two or more, or hundreds."""
    assert min(steps_that_nine_in_ten_wait_for() for _ in range(3)) <= 1  # a busy machine may delay some threads


def steps_that_nine_in_ten_wait_for():
    engine = load()
    e, passed = AsyncEngine(engine), []
    prepared = engine.preparer.prepare(ask("Hello"))

    def submit(params):
        request = engine.new_request(prepared, params)
        num_steps = engine.stats()["steps"]
        engine.loop.submit(request, lambda: None)
        passed.append(engine.stats()["steps"] - num_steps)
        return request

    def submit_often(pause_s):
        for _ in range(20):
            time.sleep(pause_s)
            request = submit(SamplingParams(max_tokens=2))
            while not request.done:
                time.sleep(0.001)

    long = submit(ENDLESS)
    submitters = [threading.Thread(target=submit_often, args=(index / 1000,)) for index in range(1, 9)]
    for thread in submitters:
        thread.start()
    for thread in submitters:
        thread.join()
    assert not long.done
    run(e.close())
    return sorted(passed)[int(0.9 * len(passed))]


def test_event_loops_of_several_threads_share_the_steps():
    engine = load()
    expected = [reply.token_ids for reply in engine.generate(CONVERSATIONS[:6], SHORT)]
    e, found = AsyncEngine(engine), {}

    async def chat_all():
        replies = await asyncio.gather(*(e.chat(messages, SHORT) for messages in CONVERSATIONS[:6]))
        return [reply.token_ids for reply in replies]

    callers = [threading.Thread(target=lambda name=name: found.update({name: run(chat_all())})) for name in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(PATIENCE_S)
    run(e.close())
    assert [found[name] for name in range(4)] == [expected] * 4


def test_engine_refuses_requests_of_its_own_while_an_asyncengine_runs_its_steps():
    engine = load()

    async def main():
        async with AsyncEngine(engine) as e:
            for call in (engine.chat, lambda messages: next(engine.stream(messages)), lambda m: engine.score(m, ["x"])):
                with pytest.raises(RequestError, match="an AsyncEngine runs the steps of this engine"):
                    call(ask("Hello"))
            with pytest.raises(RequestError, match="has an AsyncEngine already"):
                AsyncEngine(engine)
            assert len((await e.chat(ask("Hello"), SHORT)).token_ids) == 10
            await until_idle(engine)
        with pytest.raises(RequestError, match="the engine is closed"):
            AsyncEngine(engine)

    run(main())

"""The asynchronous interface ends cleanly when callers cancel, something fails, or an engine is closed or forgotten."""

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from contextlib import aclosing

import pytest

from internvl_rt import AsyncEngine, EngineDeadError, MediaError, RequestError, StepError
from internvl_rt.engine.in_flight import InFlight
from internvl_rt.steps.scheduler import Scheduler
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
    threads,
    until_idle,
)

# asyncio reports coroutines that nobody awaited, and tasks that nobody ended, as warnings or from `__del__`.
pytestmark = pytest.mark.filterwarnings("error")

CONVERSATIONS = [ask(f"Question {index}") for index in range(20)]


@pytest.fixture(autouse=True)
def nothing_is_left(caplog):
    yield
    check_nothing_is_left(caplog)


async def leave_the_loop(stream):
    async for _ in stream:
        break


async def fail_in_the_loop(stream):
    try:
        async for _ in stream:
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass


async def close_the_stream(stream):
    async with aclosing(stream):
        await anext(stream)


async def cancel_the_task(stream):
    task = asyncio.create_task(collect(stream))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def run_out_of_patience(stream):
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(collect(stream), 0.05)


@pytest.mark.parametrize(
    "leave", [leave_the_loop, fail_in_the_loop, close_the_stream, cancel_the_task, run_out_of_patience]
)
def test_consumer_that_goes_away_cancels_its_request(leave):
    engine = load()

    async def main():
        async with AsyncEngine(engine) as e:
            await leave(e.stream(ask("Hello"), ENDLESS))
            await until_idle(engine)
            assert e.stats()["requests_cancelled"] == 1

    run(main())


def test_request_is_cancelled_when_the_event_loop_is_closed_around_its_stream():
    engine = load()
    e = AsyncEngine(engine)
    event_loop = asyncio.new_event_loop()
    stream = e.stream(ask("Hello"), ENDLESS)
    event_loop.run_until_complete(begin(stream))
    event_loop.close()

    async def main():
        await until_idle(engine)
        await e.close()

    run(main())


def test_bad_requests_fail_alone():
    engine = load()
    expected = engine.generate(CONVERSATIONS, SHORT)
    bad = [ask("What?", b"not a picture"), ask("What?", "no-such.png"), [{"role": "nobody", "content": "x"}], ask("")]

    async def main():
        async with AsyncEngine(engine) as e:
            calls = [e.chat(messages, SHORT) for messages in CONVERSATIONS]
            for index, messages in enumerate(bad[:3]):
                calls.insert(7 * index, e.chat(messages, SHORT))
            return await asyncio.gather(*calls, return_exceptions=True)

    results = run(main())
    failures = [type(results.pop(index)) for index in (14, 7, 0)]
    assert failures == [RequestError, MediaError, MediaError]
    assert [reply.token_ids for reply in results] == [reply.token_ids for reply in expected]


def test_step_that_fails_ends_its_own_requests_and_nothing_else(monkeypatch):
    engine = load(max_num_seqs=2)
    expected = engine.chat(ask("Hello"), SHORT)
    original, calls = engine.model.run_step, []

    def fail_once(step, caches):
        calls.append(step)
        if len(calls) == 3:
            raise RuntimeError("device fault")
        return original(step, caches)

    async def main():
        async with AsyncEngine(engine) as e:
            return await asyncio.gather(*(e.chat(ask("Hello"), SHORT) for _ in range(5)), return_exceptions=True)

    monkeypatch.setattr(engine.model, "run_step", fail_once)
    results = run(main())
    failures = [result for result in results if isinstance(result, StepError)]
    assert 1 <= len(failures) <= 2
    assert all("a step failed by RuntimeError('device fault')" in str(failure) for failure in failures)
    replies = [result for result in results if not isinstance(result, StepError)]
    assert [reply.token_ids for reply in replies] == [expected.token_ids] * len(replies)


@pytest.mark.parametrize("cause", [KeyboardInterrupt(), SystemExit(3)])
@pytest.mark.parametrize("place", ["scheduler", "model"])
def test_dead_step_thread_fails_everyone_at_once_and_says_why(monkeypatch, caplog, place, cause):
    engine = load(max_num_seqs=4)

    def fail(*_, **__):
        raise cause

    async def main():
        async with AsyncEngine(engine) as e:
            streams = [e.stream(ask("Hello"), ENDLESS) for _ in range(4)]
            for stream in streams:
                await begin(stream)
            waiting = [asyncio.create_task(collect(e.stream(ask("Hello"), ENDLESS))) for _ in range(4)]
            while e.stats()["waiting"] < 4:
                await asyncio.sleep(0.001)
            if place == "scheduler":
                monkeypatch.setattr(engine.loop._scheduler, "schedule", fail)
            else:
                monkeypatch.setattr(engine.model, "run_step", fail)
            start_s = time.perf_counter()
            results = await asyncio.gather(*map(collect, streams), *waiting, return_exceptions=True)
            assert time.perf_counter() - start_s < 2.0  # a step takes only milliseconds
            for later in (e.chat(ask("Hello")), e.score(ask("Hello"), ["x"]), e.encode_images([])):
                with pytest.raises(EngineDeadError) as caught:
                    await later
                results.append(caught.value)
            for result in results:
                assert isinstance(result, EngineDeadError)
                assert result.__cause__ is cause
                assert repr(cause) in str(result)

    run(main())
    assert [record.message for record in caplog.records] == ["the thread that runs the engine's steps has died"]


def test_an_error_in_the_books_fails_everyone_and_the_engine_works_on(monkeypatch):
    """The requests of a step are not known before it is scheduled, so those that wait end too."""
    engine = load(max_num_seqs=2)
    expected = engine.chat(ask("Hello"), SHORT)

    def fail(*_, **__):
        raise AssertionError("the block counts are wrong")

    async def main():
        async with AsyncEngine(engine) as e:
            streams = [e.stream(ask("Hello"), ENDLESS) for _ in range(2)]
            for stream in streams:
                await begin(stream)
            waiting = asyncio.create_task(collect(e.stream(ask("Hello"), ENDLESS)))
            while e.stats()["waiting"] < 1:
                await asyncio.sleep(0.001)
            monkeypatch.setattr(engine.loop._scheduler, "schedule", fail)
            results = await asyncio.gather(*map(collect, streams), waiting, return_exceptions=True)
            monkeypatch.undo()
            for result in results:
                assert isinstance(result, StepError)
                assert "AssertionError('the block counts are wrong')" in str(result)
            await until_idle(engine)
            assert (await e.chat(ask("Hello"), SHORT)).token_ids == expected.token_ids

    run(main())


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (Scheduler, "schedule"),
        (Scheduler, "publish"),
        (Scheduler, "remove"),
        (InFlight, "_forget"),
        (InFlight, "_tell"),
    ],
)
def test_memory_that_runs_out_between_two_steps_leaves_nobody_waiting_and_no_answer_wrong(monkeypatch, owner, name):
    engine = load(max_num_seqs=2)
    expected = engine.chat(ask("Hello"), SHORT)
    original, calls = getattr(owner, name), []

    def fail_once(*args, **keywords):
        calls.append(name)
        result = original(*args, **keywords)
        if len(calls) == 2:
            raise MemoryError
        return result

    async def main():
        async with AsyncEngine(engine) as e:
            monkeypatch.setattr(owner, name, fail_once)
            calls_of_one = (e.chat(ask("Hello"), SHORT) for _ in range(5))
            results = await asyncio.gather(*calls_of_one, return_exceptions=True)
            await until_idle(engine)
            return [*results, await e.chat(ask("Hello"), SHORT)]

    *results, last = run(main())
    assert len(calls) > 2
    failures = [result for result in results if isinstance(result, StepError)]
    assert all("memory ran out" in str(failure) for failure in failures)
    replies = [result for result in results if not isinstance(result, StepError)]
    assert [reply.token_ids for reply in [*replies, last]] == [expected.token_ids] * (len(replies) + 1)


def test_close_ends_open_streams_and_can_be_called_again():
    engine = load(max_num_seqs=2)

    async def main():
        e = AsyncEngine(engine)
        tasks = [asyncio.create_task(collect(e.stream(ask("Hello"), ENDLESS))) for _ in range(4)]
        while not (e.stats()["running"] == e.stats()["waiting"] == 2):
            await asyncio.sleep(0.001)
        tasks.append(asyncio.create_task(e.chat(CONVERSATIONS[0])))
        await asyncio.sleep(0)
        await asyncio.gather(*(e.close() for _ in range(3)))
        assert not threads()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, RequestError)
            assert "closed" in str(result)
        await until_idle(engine)
        with pytest.raises(RequestError, match="the engine is closed"):
            await e.chat(ask("Hello"))
        with pytest.raises(RequestError, match="the engine is closed"):
            engine.chat(ask("Hello"))
        await e.close()

    run(main())


@pytest.mark.slow
def test_forgotten_engine_ends_its_threads_and_frees_its_memory():
    e = AsyncEngine.from_pretrained("tiny", device="cpu")
    assert run(e.chat(ask("Hello"), SHORT)).usage.completion_tokens == 10
    engine = weakref.ref(e._engine)
    [stepping] = [thread for thread in threading.enumerate() if thread.name == "internvl_rt steps"]
    del e
    gc.collect()
    stepping.join(PATIENCE_S)
    assert not stepping.is_alive()
    gc.collect()
    assert engine() is None


@pytest.mark.slow
def test_program_that_forgets_to_close_ends():
    program = """
import asyncio
from internvl_rt import AsyncEngine, SamplingParams

e = AsyncEngine.from_pretrained("tiny", device="cpu")
messages = [{"role": "user", "content": "Hello"}]
stream = e.stream(messages, SamplingParams(max_tokens=100_000, ignore_eos=True))
event_loop = asyncio.new_event_loop()
event_loop.run_until_complete(anext(stream))
print("at the end", flush=True)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (0, "at the end\n"), ended.stderr


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_process_is_told_that_the_threads_stayed_behind():
    e = AsyncEngine(load())
    run(e.chat(ask("Hello"), SHORT))
    child = os.fork()
    if child == 0:
        try:
            asyncio.run(asyncio.wait_for(e.chat(ask("Hello"), SHORT), 5))
        except EngineDeadError:
            os._exit(7)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    run(e.close())

"""Texts do not wait for pictures, and deadlines and cancellation hold while a call waits to be prepared."""

import asyncio
import gc
import threading
import time
import weakref
from contextlib import contextmanager

import numpy as np
import pytest

from internvl_rt import AsyncEngine, RequestError, SamplingParams
from internvl_rt.engine.preparing import MEDIA_THREADS, has_media
from internvl_rt.steps.uploads import Uploads
from support.calls import ENDLESS, PATIENCE_S, SHORT, ask, check_nothing_is_left, load, run, until_idle


def picture(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (60, 150, 3), dtype=np.uint8)


@contextmanager
def slow_pictures(monkeypatch):
    """Pictures take until the block ends; yields the list of those that were begun."""
    begun, go_on, load_picture = [], threading.Event(), Uploads.load

    def wait(uploads, given):
        begun.append(given.digest)
        assert go_on.wait(PATIENCE_S)
        return load_picture(uploads, given)

    monkeypatch.setattr(Uploads, "load", wait)
    try:
        yield begun
    finally:
        go_on.set()


async def start(calls, begun, number):
    tasks = [asyncio.ensure_future(call) for call in calls]
    while len(begun) < number:
        await asyncio.sleep(0.001)
    return tasks


def test_texts_do_not_wait_for_pictures(monkeypatch):
    async def main():
        async with AsyncEngine(load(kv_cache_bytes=1 << 24)) as e:
            with slow_pictures(monkeypatch) as begun:
                calls = (e.chat(ask("What?", picture(i)), SHORT) for i in range(3 * MEDIA_THREADS))
                tasks = await start(calls, begun, MEDIA_THREADS)
                reply = await asyncio.wait_for(e.chat(ask("Hello"), SHORT), PATIENCE_S / 4)
                assert reply.usage.completion_tokens == 10
                assert len(await e.score(ask("Hello"), ["a", "b"])) == 2
                assert not any(task.done() for task in tasks)
                assert e.stats()["preparing"] == 3 * MEDIA_THREADS
            assert {reply.finish_reason for reply in await asyncio.gather(*tasks)} == {"length"}

    run(main())


def test_a_deadline_holds_while_a_picture_is_decoded_and_while_one_waits_for_that(monkeypatch):
    async def main():
        async with AsyncEngine(load(kv_cache_bytes=1 << 24)) as e:
            with slow_pictures(monkeypatch) as begun:
                for number in (1, 2):  # the second time some wait for a thread
                    calls = [e.chat(ask("What?", picture(i)), SHORT, timeout_s=0.2) for i in range(3 * number)]
                    start_s = time.perf_counter()
                    replies = await asyncio.gather(*calls)
                    assert time.perf_counter() - start_s < PATIENCE_S / 4
                    for reply in replies:
                        assert (reply.text, reply.token_ids, reply.finish_reason) == ("", [], "timeout")
                        assert reply.usage.total_tokens == 0
                        assert 0.2 <= reply.timings.total_s < PATIENCE_S / 4
                assert len(begun) == MEDIA_THREADS, "the others were forgotten before they had a thread"
                params = SamplingParams(n=2, logprobs=1)
                [piece] = [piece async for piece in e.stream(ask("What?", picture()), params, timeout_s=0.1)]
                assert [choice.finish_reason for choice in piece.reply.choices] == ["timeout"] * 2
            await until_idle(e._engine)
            while e.stats()["preparing"]:
                await asyncio.sleep(0.001)
            assert len(begun) == MEDIA_THREADS
            await until_idle(e._engine)

    run(main())


def test_a_cancelled_call_leaves_the_queue_at_once_with_its_pictures(monkeypatch):
    class Given(str):
        pass

    async def main():
        async with AsyncEngine(load(kv_cache_bytes=1 << 24)) as e:
            with slow_pictures(monkeypatch) as begun:
                tasks = await start(
                    (e.chat(ask("What?", picture(i)), SHORT) for i in range(MEDIA_THREADS)), begun, MEDIA_THREADS
                )
                given = Given("no-such.png")  # texts are not copied
                left = weakref.ref(given)
                waiting = asyncio.ensure_future(e.chat(ask("What?", given), SHORT))
                del given
                while e.stats()["preparing"] < MEDIA_THREADS + 1:
                    await asyncio.sleep(0.001)
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting
                del waiting
                await asyncio.sleep(0)
                gc.collect()
                assert left() is None
                assert e.stats()["preparing"] == MEDIA_THREADS
                for task in tasks:
                    task.cancel()
                assert all(
                    isinstance(each, asyncio.CancelledError)
                    for each in await asyncio.gather(*tasks, return_exceptions=True)
                )
            while e.stats()["preparing"]:
                await asyncio.sleep(0.001)
            await until_idle(e._engine)
            assert len(begun) == MEDIA_THREADS
            assert "requests_length" not in e.stats()

    run(main())


def test_an_abandoned_call_decodes_no_further_picture(monkeypatch):
    async def main():
        async with AsyncEngine(load(kv_cache_bytes=1 << 24)) as e:
            with slow_pictures(monkeypatch) as begun:
                reply = await e.chat(ask("What?", *(picture(i) for i in range(4))), SHORT, timeout_s=0.2)
                assert reply.finish_reason == "timeout"
            while e.stats()["preparing"]:
                await asyncio.sleep(0.001)
            assert len(begun) == 1

    run(main())


async def begin_to_close(engine):
    closing = asyncio.ensure_future(engine.close())
    while not engine._engine.loop._closed:
        await asyncio.sleep(0.001)
    return closing


async def check_refused(tasks):
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(result, RequestError)
        assert "closed" in str(result)


def test_closing_refuses_those_that_wait_for_a_thread(monkeypatch):
    async def main():
        e = AsyncEngine(load(kv_cache_bytes=1 << 24))
        with slow_pictures(monkeypatch) as begun:
            calls = (e.chat(ask("What?", picture(i)), SHORT) for i in range(2 * MEDIA_THREADS))
            tasks = await start(calls, begun, MEDIA_THREADS)
            closing = await begin_to_close(e)
        await closing
        await check_refused(tasks)
        assert len(set(begun)) == MEDIA_THREADS

    run(main())


@pytest.mark.parametrize("cancel", ["cancel", "wait_for"])
@pytest.mark.parametrize("messages", [ask("Hello"), [{"role": "nobody", "content": "x"}]])
def test_a_cancellation_in_the_turn_in_which_a_thread_finishes_is_not_lost(cancel, messages, caplog, monkeypatch):
    engine = load()
    prepare = engine.preparer.prepare
    monkeypatch.setattr(engine.preparer, "prepare", lambda *args, **how: time.sleep(0.1) or prepare(*args, **how))

    async def main():
        async with AsyncEngine(engine) as e:
            call = e.chat(messages, ENDLESS)
            task = asyncio.create_task(call if cancel == "cancel" else asyncio.wait_for(call, 0.05))
            while not e.stats()["preparing"]:
                await asyncio.sleep(0)
            while e.stats()["preparing"]:  # the event loop is busy until the timer is due and the thread has finished
                time.sleep(0.001)
            if cancel == "cancel":
                task.cancel()
            with pytest.raises(asyncio.CancelledError if cancel == "cancel" else TimeoutError):
                await task
            await until_idle(e._engine)
            assert "requests_length" not in e.stats()

    run(main())
    check_nothing_is_left(caplog)


def test_closing_decodes_no_further_picture_of_a_call(monkeypatch):
    async def main():
        e, pictures = AsyncEngine(load(kv_cache_bytes=1 << 24)), [picture(i) for i in range(8)]
        with slow_pictures(monkeypatch) as begun:
            calls = [e.chat(ask("What?", *pictures[:4]), SHORT), e.encode_images(pictures[4:])]
            tasks = await start(calls, begun, 2)
            closing = await begin_to_close(e)
        await closing
        await check_refused(tasks)
        assert len(begun) == 2

    run(main())


def test_what_may_hold_media_is_told_from_text_in_any_form():
    text = {"type": "text", "text": "x"}
    long = [*[{"content": "x"}] * 2000, {"content": [text] * 2000}]
    for messages in ([], "abc", None, 7, [3], [{}], [{"content": "x" * 5000}], [{"content": [text]}], ask("x"), long):
        assert not has_media(messages)
    for part in ({"type": "image", "image": "x"}, {"type": "video"}, {"type": ["image"]}, {"image_embeds": 3}):
        assert has_media([{"role": "user", "content": "x"}, {"role": "user", "content": [text, part]}])
        assert has_media([*long, {"content": [part]}])


def test_a_long_conversation_of_text_does_not_wait_for_pictures(monkeypatch):
    turns = [{"role": role, "content": "Hello"} for _ in range(600) for role in ("user", "assistant")]

    async def main():
        async with AsyncEngine(load(kv_cache_bytes=1 << 26)) as e:
            with slow_pictures(monkeypatch) as begun:
                calls = (e.chat(ask("What?", picture(i)), SHORT) for i in range(2 * MEDIA_THREADS))
                tasks = await start(calls, begun, MEDIA_THREADS)
                long = asyncio.create_task(e.chat([*turns, *ask("Bye")], SHORT))
                while not e.stats()["running"]:
                    await asyncio.sleep(0.001)
                long.cancel()
            await asyncio.gather(*tasks, long, return_exceptions=True)

    run(main())

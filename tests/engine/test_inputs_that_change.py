"""What a caller changes after a call of the asynchronous interface, awaited or not, changes no answer."""

import asyncio
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from internvl_rt import AsyncEngine, MediaError, QueueFullError, RequestError, SamplingParams
from internvl_rt.engine.preparing import MEDIA_THREADS
from support.calls import PATIENCE_S, SHORT, ask, load, run

SAMPLES = sorted((Path(__file__).parents[2] / "internvl_rt" / "tiny" / "samples").glob("*.png"))
GREEDY = SamplingParams(max_tokens=8)
RIGHT, WRONG = (np.array(Image.open(path).convert("RGB").resize((56, 56))) for path in SAMPLES[:2])


async def collect(stream):
    return "".join([piece.text async for piece in stream])


CALLS = {
    "chat": lambda e, messages: e.chat(messages, GREEDY),
    "stream": lambda e, messages: collect(e.stream(messages, GREEDY)),
    "score": lambda e, messages: e.score(messages, [SAMPLES[0].stem]),
    "encode_images": lambda e, messages: e.encode_images([messages[0]["content"][0]["image"]]),
}


def found(result):
    if isinstance(result, str):
        return result
    if isinstance(result, list):
        return [score.logprobs for score in result] if not isinstance(result[0], torch.Tensor) else result[0].tolist()
    return result.text


@pytest.mark.parametrize("when", ["at once", "behind slow pictures"])
@pytest.mark.parametrize("call", CALLS)
def test_pixels_that_are_overwritten_after_the_call_change_no_answer(call, when, monkeypatch):
    engine, go_on = load(kv_cache_bytes=1 << 24), threading.Event()
    load_picture = engine._uploads.load

    async def main():
        async with AsyncEngine(engine) as e:
            expected = found(await CALLS[call](e, ask("Read the digits.", RIGHT)))
            assert found(await CALLS[call](e, ask("Read the digits.", WRONG))) != expected
            others = []
            if when == "behind slow pictures":
                monkeypatch.setattr(engine._uploads, "load", lambda p: go_on.wait(PATIENCE_S) and load_picture(p))
                slow = (np.full((60, 90, 3), index, np.uint8) for index in range(MEDIA_THREADS))
                others = [asyncio.create_task(e.chat(ask("What?", each), SHORT)) for each in slow]
                await asyncio.sleep(0.05)
            pixels = RIGHT.copy()
            task = asyncio.ensure_future(CALLS[call](e, ask("Read the digits.", pixels)))
            if when != "at once":
                await asyncio.sleep(0.05)
            pixels[...] = WRONG
            go_on.set()
            assert found(await task) == expected
            await asyncio.gather(*others)

    run(main())


def test_messages_and_responses_that_are_changed_after_the_call_change_no_answer():
    async def main():
        async with AsyncEngine(load(kv_cache_bytes=1 << 24)) as e:
            messages, responses = ask("Read the digits.", RIGHT), [SAMPLES[0].stem, "1"]
            reply, scores = await e.chat(messages, GREEDY), await e.score(messages, responses)
            calls = [e.chat(messages, GREEDY), e.score(messages, responses), e.stream(messages, GREEDY)]
            messages[0]["content"][0]["image"] = WRONG
            messages.append({"role": "nobody"})
            responses[:] = ["2"]
            assert (await calls[0]).text == reply.text
            assert [len(score.tokens) for score in await calls[1]] == [len(score.tokens) for score in scores]
            assert await collect(calls[2]) == reply.text

    run(main())


def test_a_call_raises_where_it_is_awaited_and_not_where_it_is_made():
    async def main():
        async with AsyncEngine(load(kv_cache_bytes=1 << 24)) as e:
            many = [{"role": "user", "content": "x"}] * 200_000
            calls = [e.chat(many), e.score(many, ["x"]), e.score(ask("x"), "x"), e.encode_images(7), e.chat(None)]
            calls += [e.encode_images(range(1 << 60)), e.chat(ask("x", np.zeros(3))), e.chat(ask("x", torch.zeros(3)))]
            for result in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(result, RequestError | MediaError)
            stream = e.stream(many)
            with pytest.raises(RequestError, match="more than 100,000"):
                await anext(stream)

    run(main())


def test_nothing_is_copied_for_a_call_that_finds_the_queue_full(monkeypatch):
    engine, go_on = load(max_num_seqs=1, max_waiting=0), threading.Event()
    prepare = engine.preparer.prepare
    monkeypatch.setattr(
        engine.preparer, "prepare", lambda *args, **how: go_on.wait(PATIENCE_S) and prepare(*args, **how)
    )

    async def main():
        async with AsyncEngine(engine) as e:
            task = asyncio.create_task(e.chat(ask("Hello"), SHORT))
            while not e.stats()["preparing"]:
                await asyncio.sleep(0)
            with monkeypatch.context() as patch:
                patch.setattr("internvl_rt.engine.async_engine.snapshot", None)
                call = e.chat(ask("Hello", RIGHT), SHORT)
            with pytest.raises(QueueFullError):
                await call
            go_on.set()
            await task

    run(main())


@pytest.mark.slow
def test_copies_of_pictures_stall_the_event_loop_for_a_fifth_of_a_second_at_most():
    """Of 16 megapixels: new memory takes most of the time, which differs between machines."""
    pixels = np.ones((4096, 4096, 3), np.uint8)

    async def main():
        async with AsyncEngine(load(kv_cache_bytes=1 << 24)) as e:
            stalls = []
            for _ in range(3):
                start_s = time.perf_counter()
                task = asyncio.create_task(e.chat(ask("What?", pixels), SHORT))
                await asyncio.sleep(0)
                stalls.append(time.perf_counter() - start_s)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            assert min(stalls) < 0.2

    run(main())

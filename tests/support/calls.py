"""Asks engines, in an event loop or without one, for their tests."""

import asyncio
import gc
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

import pytest

from internvl_rt import Engine, Piece, Reply, SamplingParams
from internvl_rt.engine.request import Request

PATIENCE_S = 20.0  # a call that takes longer hangs; no call takes a tenth of this
SHORT = SamplingParams(max_tokens=10, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=100_000, ignore_eos=True)

T = TypeVar("T")


def ask(text: str, *images: object) -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def load(**options: Any) -> Engine:
    return Engine.from_pretrained("tiny", device="cpu", **options)


def check_idle(engine: Engine) -> None:
    """Checks that no request runs or waits, and that no sequence and no block is held."""
    stats, blocks = engine.stats(), engine.cache.blocks
    assert stats["running"] == stats["waiting"] == stats["kv_blocks_used"] == 0, stats
    blocks.check_invariants()
    assert (blocks.num_sequences, blocks.num_available_blocks) == (0, blocks.num_blocks)


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs the coroutine in a new event loop and checks that no task is left there."""

    async def within_patience() -> T:
        result = await asyncio.wait_for(coroutine, PATIENCE_S)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return result

    return asyncio.run(within_patience())


async def collect(stream: AsyncIterator[Piece]) -> list[Piece]:
    return [piece async for piece in stream]


async def begin(stream: AsyncIterator[Piece]) -> Piece:
    """Waits for the first piece of the stream, so that its request runs."""
    return await asyncio.wait_for(anext(stream), PATIENCE_S)


async def until_idle(engine: Engine) -> None:
    """Waits until no request runs or waits, then checks that no sequence and no block is held."""
    deadline_s = time.perf_counter() + PATIENCE_S
    while any(engine.stats()[name] for name in ("running", "waiting", "kv_blocks_used")):
        assert time.perf_counter() < deadline_s, engine.stats()
        await asyncio.sleep(0.001)
    check_idle(engine)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("internvl_rt")]


def check_nothing_is_left(caplog: pytest.LogCaptureFixture) -> None:
    """Checks that no thread is left, and that asyncio logs no complaint when garbage is collected."""
    gc.collect()
    assert not threads()
    assert not [record.getMessage() for record in caplog.records if record.name == "asyncio"]


def ids(reply: Reply) -> list[list[int]]:
    return [choice.token_ids for choice in reply.choices]


def attempt(call: Callable[..., Any], *args: object) -> Any:
    """Returns a call's result, or its error."""
    try:
        return call(*args)
    except BaseException as error:
        return error


def submit(engine: Engine, messages: list[dict[str, Any]], params: SamplingParams) -> Request:
    request = engine.new_request(engine.prepare(messages), params)
    engine.loop.submit(request)
    return request


def advance(engine: Engine, request: Request) -> list[list[int]] | None:
    """Runs a step as a caller does; returns the ids of a request that is done, or None."""
    try:
        engine.loop.advance(request)
    except BaseException:
        engine.loop.cancel(request)
        raise
    return ids(request.reply) if request.reply is not None else None


def outcomes(engine: Engine, calls: list[tuple[list[dict[str, Any]], SamplingParams]]) -> list[Any]:
    """Asks all at once and lets them take turns in running steps. Returns the ids or the error of each."""
    return finish(engine, [attempt(submit, engine, *call) for call in calls])


def finish(engine: Engine, requests: list[Any]) -> list[Any]:
    """Lets requests take turns in running steps, to the end of all; what is no request stays as it is."""
    found = list(requests)
    while running := [(index, each) for index, each in enumerate(found) if isinstance(each, Request)]:
        for index, request in running:
            if (result := attempt(advance, engine, request)) is not None:
                found[index] = result
    return found

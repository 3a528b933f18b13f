"""Memory is freed with its last owner, at once: nothing waits for the garbage collector, which is off here."""

import asyncio
import contextlib
import gc
import logging
import weakref

import numpy as np
import pytest
import torch

from internvl_rt import AsyncEngine, Engine, InternVLError, MediaError, RequestError, SamplingParams, StepError
from internvl_rt.compat import ChatModel
from internvl_rt.critic import VisualPRM
from support.calls import ENDLESS, PATIENCE_S, SHORT, ask, load, until_idle
from support.recorder import Recorder


@pytest.fixture(autouse=True)
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def picture():
    return np.random.default_rng(0).integers(0, 256, (60, 150, 3), dtype=np.uint8)


def chat(engine):
    engine.chat(ask("What?", picture()), SHORT)


def several_answers(engine):
    engine.chat(ask("What?", picture()), SamplingParams(n=3, max_tokens=3))


def generate(engine):
    engine.generate([ask(f"{i}?", picture()) for i in range(3)], SHORT, progress=True)


def a_grammar(engine):
    engine.chat(ask("What?"), SamplingParams(json_schema=True, max_tokens=5))


def speculation(engine):
    engine.chat(ask("a b c a b c a b c"), SHORT)


def a_whole_stream(engine):
    for _ in engine.stream(ask("What?", picture()), SHORT):
        pass


def a_dropped_stream(engine):
    next(engine.stream(ask("What?", picture()), ENDLESS))


def a_timeout(engine):
    engine.chat(ask("What?", picture()), ENDLESS, timeout_s=0.05)


def a_broken_picture(engine):
    with contextlib.suppress(MediaError):
        engine.chat(ask("What?", picture(), b"broken"), SHORT)


def a_broken_video(engine):
    parts = [{"type": "image", "image": picture()}, {"type": "video", "video": b"\0\0\0\x18ftypmp42" + bytes(500)}]
    with contextlib.suppress(MediaError):
        engine.chat([{"role": "user", "content": parts}], SHORT)


def a_broken_conversation_among_others(engine):
    with contextlib.suppress(RequestError):
        engine.generate([ask("What?", picture()), [{"role": "nobody", "content": "x"}]], SHORT)


def a_failing_step(engine):
    run_step, engine.model.run_step = engine.model.run_step, None
    with contextlib.suppress(StepError):
        engine.generate([ask(f"{i}?", picture()) for i in range(3)], SHORT)
    del engine.model.run_step, run_step


def an_interrupted_step(engine):
    def interrupt(*_):
        raise KeyboardInterrupt

    engine.model.run_step = interrupt
    with contextlib.suppress(KeyboardInterrupt):
        engine.generate([ask(f"{i}?", picture()) for i in range(3)], SHORT)
    del engine.model.run_step


def scores(engine):
    engine.score(ask("What?", picture()), ["one", "two"])


def some_of_a_batch(engine):
    next(engine.generate_as_completed([ask(f"{i}?", picture()) for i in range(3)], SHORT))


def the_best_of_three(engine):
    def picky(messages, text):
        if not refused:
            refused.append(text)
            raise RequestError("the first one is refused")
        return critic(messages, text)

    critic, refused = VisualPRM(engine), []
    wild = SamplingParams(max_tokens=5, temperature=4.0, seed=1)
    ranking = engine.best_of(ask("What?", picture()), 3, critic=picky, params=wild)
    assert ranking.answers[-1].error is not None
    with contextlib.suppress(RequestError):
        critic.score_responses(ask("What?", picture()), ["one", " "])


def a_critic_that_fails(engine):
    def refuse(messages, text):
        raise RequestError("refused")

    for critic in (refuse, len):
        with contextlib.suppress(RequestError, TypeError):
            engine.best_of(ask("What?", picture()), 3, critic=critic, params=SHORT)


def encoded_pictures(engine):
    engine.encode_images([picture()])


def the_official_interface(engine):
    model, tiles = ChatModel(engine), torch.zeros(2, 3, 56, 56)
    model.chat(engine.tokenizer, tiles, "What?", {"max_new_tokens": 3})
    model.batch_chat(engine.tokenizer, tiles, ["What?", "Who?"], {"max_new_tokens": 3}, num_patches_list=[1, 1])


def graphs(engine):
    engine.runner.capture(max_num_seqs=2, max_model_len=64, max_tokens_per_step=1, capture=Recorder())


def nothing(_):
    pass


REQUESTS = [
    chat,
    several_answers,
    generate,
    a_whole_stream,
    a_dropped_stream,
    a_timeout,
    a_broken_picture,
    a_broken_video,
    a_broken_conversation_among_others,
    a_failing_step,
    an_interrupted_step,
    scores,
    some_of_a_batch,
    the_best_of_three,
    a_critic_that_fails,
    encoded_pictures,
    the_official_interface,
]
PREPARE_NONE = (encoded_pictures, a_broken_picture, a_broken_video)


@pytest.mark.parametrize("is_closed", [True, False])
@pytest.mark.parametrize("use", [nothing, graphs, a_grammar, speculation, *REQUESTS])
def test_an_engine_is_freed_with_its_last_reference(use, is_closed):
    backend = "torch" if use is graphs else "auto"  # no graph is captured with the table for CPUs
    engine = load(num_draft_tokens=4 if use is speculation else 0, kv_cache_bytes=1 << 24, backend=backend)
    use(engine)
    if is_closed:
        engine.close()
    owned = [engine, engine.model, engine.model.weights.decoder.embedding_VD, engine.cache.pool.buffers[0], engine.loop]
    left = [weakref.ref(each) for each in owned]
    del engine, owned
    assert [each() for each in left] == [None] * len(left)


@pytest.fixture
def pictures(monkeypatch):
    """Weak references to all pictures that are prepared."""
    seen = weakref.WeakSet()
    originals = {name: getattr(Engine, name) for name in ("prepare", "prepare_turns")}

    def recorded(name):
        def record(*args, **kwargs):
            prepared = originals[name](*args, **kwargs)
            seen.update(prepared.pictures)
            seen.num_prepared = getattr(seen, "num_prepared", 0) + len(prepared.pictures)
            return prepared

        return record

    for name in originals:
        monkeypatch.setattr(Engine, name, recorded(name))
    return seen


@pytest.mark.parametrize("use", [use for use in REQUESTS if use not in PREPARE_NONE])
def test_pictures_are_freed_when_their_request_has_ended(use, pictures):
    with load(kv_cache_bytes=1 << 24) as engine:
        use(engine)
        assert pictures.num_prepared > 0
        assert len(pictures) == 0


def test_pictures_of_a_batch_are_freed_as_their_requests_end(pictures):
    left = []
    with load(max_num_seqs=1, kv_cache_bytes=1 << 24) as engine:
        submit = engine.loop.submit
        engine.loop.submit = lambda *args: (left.append(len(pictures)), submit(*args))
        engine.generate([ask(f"{i}?", picture()) for i in range(4)], SHORT)
    assert len(left) == 4
    assert max(left) <= 2  # the one that is submitted, and the one before it in the generator of prompts


def test_a_stream_that_is_kept_after_its_end_keeps_no_pictures(pictures):
    with load(kv_cache_bytes=1 << 24) as engine:
        stream = engine.stream(ask("What?", picture()), SHORT)
        while next(stream).reply is None:
            pass
        assert len(pictures) == 0


async def async_chat(engine):
    await engine.chat(ask("What?", picture()), SHORT)


async def async_stream(engine):
    async for _ in engine.stream(ask("What?", picture()), SHORT):
        pass


async def async_dropped_stream(engine):
    async for _ in engine.stream(ask("What?", picture()), ENDLESS):
        break


async def async_cancelled_chat(engine):
    task = asyncio.create_task(engine.chat(ask("What?", picture()), ENDLESS))
    await asyncio.sleep(0.1)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def async_broken_request(engine):
    for messages in (ask("What?", picture(), b"broken"), [{"role": "nobody", "content": "x"}]):
        with contextlib.suppress(InternVLError):
            await engine.chat(messages, SHORT)


async def async_failing_step(engine):
    engine._engine.model.run_step = None
    calls = [engine.chat(ask(f"{i}?", picture()), SHORT) for i in range(3)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(result) for result in results} == {StepError}
    del engine._engine.model.run_step


async def async_dead_worker(engine):
    def die(*_):
        raise SystemExit

    engine._engine.model.run_step = die
    logging.disable(logging.ERROR)  # pytest keeps what is logged, with its traceback
    with contextlib.suppress(InternVLError):
        await engine.chat(ask("What?", picture()), SHORT)
    engine._thread.join(PATIENCE_S)
    logging.disable(logging.NOTSET)
    del engine._engine.model.run_step


async def async_scores(engine):
    await engine.score(ask("What?", picture()), ["one", "two"])


async def async_encoded_pictures(engine):
    await engine.encode_images([picture()])


ASYNC_USES = [
    async_chat,
    async_stream,
    async_dropped_stream,
    async_cancelled_chat,
    async_broken_request,
    async_failing_step,
    async_dead_worker,
    async_scores,
    async_encoded_pictures,
]


@pytest.mark.parametrize("use", ASYNC_USES)
def test_a_closed_asyncio_engine_is_freed_with_its_last_reference_and_pictures_before(use, pictures):
    async def main():
        async with AsyncEngine.from_pretrained("tiny", device="cpu", kv_cache_bytes=1 << 24) as engine:
            await use(engine)
            if use is not async_dead_worker:
                await until_idle(engine._engine)
            await asyncio.sleep(0)
            assert len(pictures) == 0
            owned = [engine, engine._engine, engine._engine.model, engine._engine.model.weights.decoder.embedding_VD]
            return [weakref.ref(each) for each in owned]

    left = asyncio.run(main())
    assert [each() for each in left] == [None] * len(left)

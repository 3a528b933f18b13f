"""Pictures are encoded by processes of their own, ahead of the steps that need them; the answers stay the same."""

import asyncio
import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from internvl_rt import AsyncEngine, Engine, EngineDeadError, RequestError, SamplingParams
from internvl_rt.engine.loading import plan_parts
from internvl_rt.engine.options import EngineOptions
from internvl_rt.model.internvl import named_parameters
from support.calls import SHORT, ask, load
from support.load import (
    SAMPLES,
    build_broken_kind,
    build_kinds,
    build_video,
    check_nothing_is_left,
    expected_answers,
    run_load,
)
from support.rank_processes import folders, open_ports, processes_of, shared_memory, wait_until

PICTURE = str(SAMPLES[0])
LONG = SamplingParams(max_tokens=30, ignore_eos=True, logprobs=2)


@pytest.fixture(scope="module")
def one() -> Iterator[Engine]:
    with load(max_tiles=40) as engine:
        yield engine


@pytest.fixture(scope="module")
def apart() -> Iterator[Engine]:
    before = set(processes_of())
    with load(vision_processes=1, max_tiles=40) as engine:
        engine.test_process = (set(processes_of()) - before).pop()
        yield engine


def picture(seed: int, height: int = 60, width: int = 90) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@contextmanager
def stopped(process: int) -> Iterator[None]:
    """Stops the vision process: what needs it waits."""
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process, signal.SIGCONT)


def test_answers_are_those_of_one_process(one, apart):
    many = {"type": "image", "image": picture(0, 60, 1500), "max_tiles": 40}
    embeds = one.encode_images([picture(1)])[0]
    video = {"type": "video", "video": build_video(0), "num_frames": 4}
    for content in (
        [{"type": "image", "image": PICTURE}],
        [{"type": "image", "image": picture(2)}, {"type": "image", "image": picture(3)}],
        [many],
        [video],
        [{"type": "image_embeds", "image_embeds": embeds}],
    ):
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": "Read."}]}]
        theirs, ours = one.chat(messages, LONG), apart.chat(messages, LONG)
        assert ours.token_ids == theirs.token_ids
        assert [each.logprob for each in ours.logprobs] == pytest.approx([each.logprob for each in theirs.logprobs])
        assert ours.usage == theirs.usage
    assert one.describe([{"role": "user", "content": [many]}]).layouts[0].num_tiles > 16, "it crosses in parts"
    assert apart.encode_images([PICTURE])[0].equal(one.encode_images([PICTURE])[0])


def test_tiles_of_a_processor_are_encoded_there(one, apart):
    tiles = torch.randn(3, 3, one.config.vision.image_size, one.config.vision.image_size)
    found = [engine.loop.encode(_given(engine, tiles), None) for engine in (one, apart)]
    assert found[0].equal(found[1])


def _given(engine: Engine, tiles: torch.Tensor):
    from internvl_rt.inputs.picture import Picture

    return Picture(bytes(32), len(tiles), tiles=tiles)


def test_a_picture_that_comes_again_is_not_encoded_again(apart):
    before = apart.stats()
    for _ in range(3):
        apart.chat(ask("Read", picture(5)), SHORT)
    after = apart.stats()
    assert (
        after["encoded_tiles"] - before["encoded_tiles"] == apart.describe(ask("Read", picture(5))).layouts[0].num_tiles
    )
    assert after["visual_cache_hits"] - before["visual_cache_hits"] == 2


def test_the_language_model_goes_on_while_pictures_are_encoded(apart):
    """The vision process is stopped: requests with text end all the same, in their own threads and in a batch."""
    replies = []
    with stopped(apart.test_process):
        waiting = threading.Thread(target=lambda: replies.append(apart.chat(ask("Read", picture(6)), SHORT)))
        waiting.start()
        for _ in range(3):
            assert len(apart.chat(ask("Hello"), SHORT).token_ids) == SHORT.max_tokens
        assert not replies
        stream = apart.stream(ask("And on"), SamplingParams(max_tokens=40, ignore_eos=True))
        next(stream)
        steps = apart.stats()["steps"]
        also = threading.Thread(target=lambda: replies.append(apart.chat(ask("Read", picture(7)), SHORT)))
        also.start()
        wait_until(lambda: apart.stats()["steps"] > steps + 10)  # it runs the steps of the stream while it waits
        assert not replies
    waiting.join(20)
    also.join(20)
    assert len(replies) == 2
    assert sum(1 for _ in stream) > 0


def test_a_picture_that_needs_no_other_process_runs_no_steps_while_it_is_prepared(one):
    stream = one.stream(ask("Hello"), SamplingParams(max_tokens=40, ignore_eos=True))
    next(stream)
    steps = one.stats()["steps"]
    one.prepare(ask("Read", picture(20)))
    assert one.stats()["steps"] == steps
    stream.close()


def test_a_deadline_passes_while_a_picture_is_encoded(apart):
    with stopped(apart.test_process):
        start_s = time.perf_counter()
        reply = apart.chat(ask("Read", picture(8)), SHORT, timeout_s=0.3)
        assert reply.finish_reason == "timeout"
        assert 0.25 < time.perf_counter() - start_s < 2
    assert apart.chat(ask("Read", picture(8)), SHORT).token_ids


def test_asyncio_callers_wait_for_pictures_and_may_go(one):
    async def run() -> None:
        before = set(processes_of())
        async with AsyncEngine(load(vision_processes=1)) as engine:
            process = (set(processes_of()) - before).pop()
            expected = one.chat(ask("Read", picture(9)), SHORT).text
            with stopped(process):
                calls = [asyncio.ensure_future(engine.chat(ask("Read", picture(9 + i)), SHORT)) for i in range(3)]
                texts = await asyncio.gather(*(engine.chat(ask("Hello"), SHORT) for _ in range(4)))
                assert len(texts) == 4
                assert not any(call.done() for call in calls)
                calls[2].cancel()
                await asyncio.wait([calls[2]], timeout=2)
                assert calls[2].cancelled()
            assert (await calls[0]).text == expected
            await calls[1]

    asyncio.run(run())


def test_the_tower_is_not_where_the_language_model_is(one, apart):
    held = named_parameters(apart.model.weights)
    assert {path for path, tensor in held.items() if tensor.is_meta} == {
        path for path in held if not path.startswith("decoder.")
    }
    assert apart.memory.vision_bytes == 0
    assert apart.memory.weight_bytes == sum(tensor.nbytes for tensor in held.values() if not tensor.is_meta)
    assert apart.memory.weight_bytes < one.memory.weight_bytes
    assert apart.memory == plan_parts(
        "tiny", EngineOptions(device="cpu", dtype="float32", vision_processes=1, max_tiles=40)
    )


@pytest.mark.slow
def test_mixed_requests_with_two_ranks_and_two_vision_processes_get_what_each_gets_alone():
    kinds = [*build_kinds(20, seed=0), build_broken_kind()]
    with load(tensor_parallel_size=2, vision_processes=2, max_model_len=640, visual_cache_bytes=0) as engine:
        outcome = run_load(engine, kinds, expected_answers(kinds), num_requests=50, seed=3)
        assert not outcome.wrong, outcome.wrong[0]
        check_nothing_is_left(engine)


@pytest.mark.fast("encoding")
@pytest.mark.parametrize("moment", ["idle", "encoding", "decoding"])
def test_a_vision_process_that_is_killed_ends_the_engine(moment):
    before = folders(), open_ports(), processes_of()
    with load(vision_processes=1) as engine:
        (process,) = set(processes_of()) - set(before[-1])
        errors = []

        def chat() -> None:
            try:
                engine.chat(ask("Read", picture(1)), SamplingParams(max_tokens=600, ignore_eos=True))
            except EngineDeadError as error:
                errors.append(error)

        thread = threading.Thread(target=chat)
        if moment == "encoding":
            os.kill(process, signal.SIGSTOP)
        if moment != "idle":
            thread.start()
            time.sleep(0.3)
        start_s = time.perf_counter()
        os.kill(process, signal.SIGKILL)
        if moment == "idle":
            wait_until(lambda: process not in processes_of())
            thread.start()
        thread.join(10)
        if moment == "decoding":  # the picture is encoded, so the answer needs that process no more
            assert not errors
        else:
            assert time.perf_counter() - start_s < 5
            assert len(errors) == 1
            assert "the vision process of this engine has ended" in str(errors[0])
        with pytest.raises(EngineDeadError):
            engine.loop.check()
    wait_until(lambda: (folders(), open_ports(), processes_of()) == before)


def test_nothing_is_left_of_a_closed_engine_or_of_one_that_was_dropped():
    def now():
        return folders(), open_ports(), threading.active_count(), processes_of(), shared_memory()

    gc.collect()  # of other tests
    before = now()
    engine = load(vision_processes=2)
    engine.chat(ask("Read", PICTURE), SHORT)
    engine.close()
    wait_until(lambda: now()[:4] == before[:4])
    del engine
    wait_until(lambda: now() == before)
    engine = load(vision_processes=1)
    engine.chat(ask("Read", PICTURE), SHORT)
    del engine
    wait_until(lambda: now() == before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vision_processes": -1}, "vision_processes"),
        ({"vision_processes": 17}, "vision_processes"),
        ({"vision_processes": 1, "vision_device": "gpu"}, "vision_device"),
        ({"vision_processes": 2, "vision_device": "cuda:0"}, "GPUs from cuda:0 on|not there"),
    ],
)
def test_impossible_options_are_refused(options, message):
    before = processes_of()
    with pytest.raises(RequestError, match=message):
        load(**options)
    assert processes_of() == before

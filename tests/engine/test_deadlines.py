"""A deadline ends the preparation of a request, in every engine, between two frames or two pictures."""

import asyncio
import io
import time

import av
import numpy as np
import pytest

from internvl_rt import AsyncEngine, Piece, RequestError, SamplingParams
from internvl_rt.inputs import prepare
from internvl_rt.inputs.proceed import LateError
from support.calls import SHORT, ask, check_idle, load, run, until_idle

FRAME = np.zeros((60, 60, 3), np.uint8)
NUM_FRAMES = 40
SLOW = 0.1  # seconds for each frame


def video(source, **options):
    return [{"role": "user", "content": [{"type": "video", "video": source, **options}, {"type": "text", "text": "?"}]}]


@pytest.fixture(scope="module")
def engine():
    with load(kv_cache_bytes=1 << 24) as engine:
        yield engine


@pytest.fixture
def opened(monkeypatch):
    """Returns a list that grows with each picture that is opened, which takes a while."""
    opened = []

    def slowly(original):
        def do(*args):
            opened.append(time.perf_counter())
            time.sleep(SLOW)
            return original(*args)

        return do

    for name in ("open_picture", "open_image"):  # the latter opens frames of videos
        monkeypatch.setattr(prepare, name, slowly(getattr(prepare, name)))
    return opened


def check_empty(reply, n=1):
    assert [(each.text, each.token_ids, each.finish_reason) for each in reply.choices] == [("", [], "timeout")] * n
    assert reply.usage.total_tokens == 0


@pytest.mark.parametrize("messages", [video([FRAME] * NUM_FRAMES), ask("?", *[FRAME] * NUM_FRAMES)])
def test_a_deadline_ends_preparation_in_the_callers_own_thread(engine, opened, messages):
    start_s = time.perf_counter()
    reply = engine.chat(messages, SamplingParams(n=2), timeout_s=1.5 * SLOW)
    assert 1.5 * SLOW <= time.perf_counter() - start_s < NUM_FRAMES * SLOW / 2
    check_empty(reply, n=2)
    assert 1.5 * SLOW <= reply.timings.total_s < NUM_FRAMES * SLOW / 2
    (piece,) = engine.stream(messages, SHORT, timeout_s=1.5 * SLOW)
    assert (piece.text, piece.choice) == ("", 0)
    assert isinstance(piece, Piece)
    check_empty(piece.reply)
    assert len(opened) < NUM_FRAMES
    check_idle(engine)


def test_the_others_of_a_batch_are_answered(engine, monkeypatch):
    def be_late(source, options):
        raise LateError

    monkeypatch.setattr(prepare, "open_image", be_late)
    text, late, other = engine.generate([ask("Hello"), video([FRAME]), ask("Hello")], SHORT, timeout_s=1000.0)
    check_empty(late)
    assert (text.finish_reason, other.finish_reason) == ("length", "length")
    assert text.token_ids == other.token_ids
    check_idle(engine)


def test_a_stream_that_is_late_may_be_closed(engine, opened):
    stream = engine.stream(video([FRAME] * NUM_FRAMES), SHORT, timeout_s=SLOW / 2)
    stream.close()
    check_idle(engine)


def test_threads_give_up_videos_that_nobody_waits_for(opened):
    async def main():
        async with AsyncEngine(load(kv_cache_bytes=1 << 24)) as e:
            late = [e.chat(video([FRAME] * 32), SHORT, timeout_s=1.5 * SLOW) for _ in range(4)]
            cancelled = [asyncio.ensure_future(e.chat(video([FRAME] * 32), SHORT)) for _ in range(4)]
            for reply in await asyncio.gather(*late):
                check_empty(reply)
            for task in cancelled:
                task.cancel()
            start_s = time.perf_counter()
            reply = await e.chat(ask("What?", FRAME), SHORT)  # it waits for a thread that a video had
            assert reply.finish_reason == "length"
            assert time.perf_counter() - start_s < 20 * SLOW
            while e.stats()["preparing"]:
                await asyncio.sleep(0.001)
            await until_idle(e._engine)

    run(main())
    assert len(opened) < 32


def long_video(num_frames):
    """Makes a video of 8 megapixels, each frame of which takes some 10 ms to decode."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as output:
        stream = output.add_stream("mjpeg", rate=30)
        stream.width, stream.height, stream.pix_fmt = 3840, 2160, "yuvj420p"
        (first,) = stream.encode(av.VideoFrame.from_ndarray(np.zeros((2160, 3840, 3), np.uint8), format="rgb24"))
        for index in range(num_frames):
            packet = av.Packet(bytes(first))
            packet.stream, packet.time_base, packet.pts, packet.dts = stream, first.time_base, index, index
            packet.is_keyframe = True
            output.mux(packet)
    return file.getvalue()


def test_long_videos_hold_no_thread_after_their_deadline():
    data = long_video(400)

    async def main():
        async with AsyncEngine(load(kv_cache_bytes=1 << 24)) as e:
            calls = (e.chat(video(data, num_frames=1), SHORT, timeout_s=0.2) for _ in range(4))
            for reply in await asyncio.gather(*calls):
                check_empty(reply)
            start_s = time.perf_counter()
            while e.stats()["preparing"]:
                await asyncio.sleep(0.001)
            assert time.perf_counter() - start_s < 1.0

    run(main())


def test_closing_waits_for_one_frame_of_a_video_and_not_for_all(opened):
    async def main():
        e = AsyncEngine(load(kv_cache_bytes=1 << 24))
        call = asyncio.ensure_future(e.chat(video([FRAME] * 32), SHORT))
        while not opened:
            await asyncio.sleep(0.001)
        await e.close()
        assert len(opened) < 16
        with pytest.raises(RequestError, match="closed"):
            await call

    run(main())

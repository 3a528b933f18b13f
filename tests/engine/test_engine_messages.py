"""What a message may ask for: a picture's tiles, a video's frames, no labels, an answer that has begun."""

import asyncio
import base64
import io
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from internvl_rt import AsyncEngine, Engine, RequestError, SamplingParams

SAMPLE = Path(__file__).parents[2] / "internvl_rt" / "tiny" / "samples" / "4719.png"
OPTIONS = {"device": "cpu", "block_size": 16}


@pytest.fixture(scope="module")
def engine():
    with Engine.from_pretrained("tiny", **OPTIONS) as engine:
        yield engine


def ask(*parts, text="Read the digits.", begun=None):
    question = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
    return [question] if begun is None else [question, {"role": "assistant", "content": begun}]


def picture(**options):
    return {"type": "image", "image": SAMPLE, **options}


def video():
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(20):
            array = np.full((48, 64, 3), 10 * index, np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        output.mux(stream.encode())
    return {"type": "video", "video": file.getvalue()}


def tiles(engine, *parts):
    return [picture.num_tiles for picture in engine.prepare(ask(*parts)).pictures]


@pytest.mark.parametrize("begun", ["4", "47", [{"type": "text", "text": "4"}, {"type": "text", "text": "71"}]])
def test_an_answer_goes_on_where_its_beginning_stops_and_holds_the_new_text_alone(engine, begun):
    text = begun if isinstance(begun, str) else "".join(part["text"] for part in begun)
    assert engine.chat(ask(picture())).text == "4719"
    assert engine.chat(ask(picture(), begun=begun)).text == "4719".removeprefix(text)
    assert "".join(piece.text for piece in engine.stream(ask(picture(), begun=begun))) == "4719".removeprefix(text)


def test_whitespace_that_goes_on_with_a_begun_answer_is_kept(engine):
    params = SamplingParams(max_tokens=6, temperature=100.0, min_tokens=6, n=24, seed=1)
    texts = {begun: [each.text for each in engine.chat(ask(begun=begun), params).choices] for begun in ("", "4")}
    assert any(text[:1].isspace() for text in texts["4"])
    assert not any(text[:1].isspace() for text in texts[""])


def test_every_way_to_ask_continues_an_answer(engine):
    messages = ask(picture(), begun="47")
    assert [reply.text for reply in engine.generate([messages, ask(picture())])] == ["19", "4719"]
    (whole,), (rest,) = engine.score(ask(picture()), ["4719"]), engine.score(messages, ["19"])
    assert rest.logprobs == pytest.approx(whole.logprobs[2:], abs=1e-4)

    async def answers():
        async with AsyncEngine.from_pretrained("tiny", **OPTIONS) as other:
            reply = await other.chat(messages)
            pieces = [piece.text async for piece in other.stream(messages)]
            (score,) = await other.score(messages, ["19"])
            return reply.text, "".join(pieces), score.logprobs

    text, streamed, logprobs = asyncio.run(answers())
    assert (text, streamed) == ("19", "19")
    assert logprobs == pytest.approx(rest.logprobs, abs=1e-4)


def test_a_grammar_holds_for_the_text_that_is_new(engine):
    params = SamplingParams(regex="[0-9]{1,2}", max_tokens=8)
    assert engine.chat(ask(picture(), begun="47"), params).text == "19"


def test_a_picture_has_at_most_the_tiles_that_its_part_allows(engine):
    wide = np.zeros((60, 400, 3), np.uint8)
    (most,) = tiles(engine, {"type": "image", "image": wide})
    assert most > 4
    parts = [{"type": "image", "image": wide, "max_tiles": count} for count in (1, 2, 12)]
    assert tiles(engine, *parts, {"type": "image", "image": wide, "detail": "low"}) == [1, 3, most, 1]
    stream = io.BytesIO()
    Image.fromarray(wide).save(stream, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
    plain, low = {"type": "image_url", "image_url": url}, {"url": url, "detail": "low"}
    assert tiles(engine, plain, {**plain, "max_tiles": 1}, {**plain, "image_url": low}) == [most, 1, 1]


def test_a_picture_of_other_tiles_is_another_picture_to_the_caches(engine):
    wide = np.random.default_rng(0).integers(0, 256, (60, 400, 3), dtype=np.uint8)
    counts = [engine.chat(ask({"type": "image", "image": wide, "max_tiles": most})).usage for most in (1, 3, 1)]
    assert counts[0].image_tokens == counts[2].image_tokens < counts[1].image_tokens
    assert counts[2].cached_tokens > 0


@pytest.mark.parametrize("most", [13, 10**400])
def test_more_tiles_than_the_engine_allows_are_refused(engine, most):
    with pytest.raises(
        RequestError, match=r"max_tiles of a picture: expected at most the engine's 12, got .*raise max_t"
    ):
        engine.chat(ask(picture(max_tiles=most)))
    with (
        Engine.from_pretrained("tiny", max_tiles=3, **OPTIONS) as small,
        pytest.raises(RequestError, match="at most the engine's 3, got 4"),
    ):
        small.chat(ask(picture(max_tiles=4)))


def test_a_video_has_the_frames_that_its_part_asks_for(engine):
    def frames(**options):
        return engine.prepare(ask({**video(), **options})).pictures

    assert len(frames()) == len(frames(num_frames=None, bound=None)) == 32
    assert [frame.num_tiles for frame in frames(num_frames=3)] == [1, 1, 1]
    chosen = frames(num_frames=2, bound=[0.5, 1.0])
    levels = [round(float(frame.tiles[0, -8:, -8:].float().mean()) / 10) for frame in chosen]
    assert levels == [6, 8]
    assert "Frame2: <img>" in engine.prepare(ask({**video(), "num_frames": 2})).prompt.text


@pytest.mark.parametrize("num_frames", [100_000, 10**400])
def test_more_frames_than_fit_are_refused_before_the_video_is_opened(engine, monkeypatch, num_frames):
    monkeypatch.setattr("internvl_rt.inputs.prepare.load_video", None)
    with pytest.raises(RequestError, match=r"has .* pictures and frames of videos, but only \d+ tiles"):
        engine.chat(ask({"type": "video", "video": "no such file", "num_frames": num_frames}))


def test_labels_of_pictures_are_left_out_on_request(engine):
    messages = ask(picture(), picture())
    assert "Image-1: <img>" in engine.prepare(messages).prompt.text
    with Engine.from_pretrained("tiny", number_images=False, **OPTIONS) as other:
        text = other.prepare(messages).prompt.text
    assert "Image-" not in text
    assert text.count("</img>\n") == 2

"""A prompt can be described without a request: its tokens, and how its pictures are cut."""

import io
from dataclasses import astuple

import numpy as np
import pytest
from PIL import Image

from internvl_rt import AsyncEngine, MediaError, RequestError
from internvl_rt.inputs import image as image_module
from support.calls import ask, check_idle, load, run

WIDE = np.random.default_rng(3).integers(0, 256, (60, 180, 3), dtype=np.uint8)
FRAMES = np.zeros((3, 40, 50, 3), np.uint8)


def encoded(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def engine():
    with load() as engine:
        yield engine


def everything(engine):
    [visual_XD] = engine.encode_images([WIDE[:20, :20]])
    parts = [
        {"type": "image", "image": encoded(WIDE)},
        {"type": "image", "image": WIDE[:, :60], "max_tiles": 1},
        {"type": "image_embeds", "image_embeds": visual_XD},
        {"type": "video", "video": FRAMES},
        {"type": "text", "text": "What is new?"},
    ]
    return [{"role": "user", "content": parts}]


def test_a_description_has_the_prompts_tokens_and_every_pictures_size_and_grid(engine):
    messages = everything(engine)
    described, prepared = engine.describe(messages), engine.prepare(messages)
    assert described.prompt == prepared.prompt
    spans, context = described.prompt.spans, engine.tokenizer.token_id("<IMG_CONTEXT>")
    for span in spans:
        ids = described.prompt.token_ids[span.start : span.start + span.num_tokens]
        assert set(ids) == {context}
    wide, square, given, *frames = described.layouts
    assert astuple(wide) == (180, 60, 3, 1, True)
    assert astuple(square) == (60, 60, 1, 1, False)
    assert given is None
    assert [astuple(frame) for frame in frames] == [(50, 40, 1, 1, False)] * 3
    known = [(layout, span) for layout, span in zip(described.layouts, spans, strict=True) if layout]
    assert all(span.num_tokens == layout.num_tiles * engine.config.tokens_per_tile for layout, span in known)


def test_describing_decodes_no_encoded_picture_and_computes_nothing(engine, monkeypatch):
    monkeypatch.setattr(image_module, "to_rgb", None)
    before = engine.stats()
    described = engine.describe(ask("What is it?", encoded(WIDE), encoded(WIDE[:, :50])))
    assert [layout.width for layout in described.layouts] == [180, 50]
    assert engine.stats() == before
    check_idle(engine)


def test_an_asynchronous_engine_describes_a_prompt_as_the_engine_does():
    engine = load()
    messages = everything(engine)
    expected = engine.describe(messages)

    async def main():
        async with AsyncEngine(engine) as e:
            described = e.describe(messages)
            messages[0]["content"].clear()  # what was given is copied at once
            assert await described == expected
            with pytest.raises(RequestError, match="content: expected a list with at least one part"):
                await e.describe(messages)

    run(main())


def test_what_no_request_could_have_is_refused_by_a_description(engine):
    with pytest.raises(MediaError, match="image"):
        engine.describe(ask("What is it?", b"no picture"))
    with pytest.raises(RequestError, match="fit"):
        engine.describe(ask("word " * 50_000))
    closed = load()
    closed.close()
    with pytest.raises(RequestError, match="the engine is closed"):
        closed.describe(ask("Hello"))

"""A prompt that does not fit is refused with what helps it, and rendered turns are checked as messages are."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from internvl_rt import RequestError
from internvl_rt.inputs.prepare import Preparer
from internvl_rt.inputs.prompt import IMAGE, Turn
from internvl_rt.inputs.tiles import ImageOptions
from internvl_rt.inputs.video import VideoLimits
from support.calls import ask, load

WINDOW = 300  # tokens


@pytest.fixture(scope="module")
def engine():
    with load(kv_cache_bytes=1 << 24) as engine:
        yield engine


@pytest.fixture
def preparer(engine):
    """Makes preparers for a model with a short trained window."""

    def make(max_model_len, v2pe_delta=1.0):
        config = replace(engine.config, decoder=replace(engine.config.decoder, max_position=WINDOW))
        return Preparer(
            config,
            engine.tokenizer,
            max_model_len,
            dtype=torch.float32,
            images=ImageOptions(image_size=config.vision.image_size),
            number_images=True,
            videos=VideoLimits(),
            v2pe_delta=v2pe_delta,
            identity=None,
        )

    return make


def refusal(preparer, *args):
    with pytest.raises(RequestError) as error:
        preparer.prepare(ask(*args))
    return str(error.value)


WIDE = np.zeros((60, 1200, 3), np.uint8)  # 13 tiles


@pytest.mark.parametrize("num_words", [WINDOW, 2 * WINDOW, 500 * WINDOW])
def test_a_text_beyond_the_window_is_told_to_be_shorter_and_nothing_else(preparer, num_words):
    for max_model_len, v2pe_delta in ((WINDOW, 1.0), (10 * WINDOW, 1.0), (10 * WINDOW, "auto")):
        text = refusal(preparer(max_model_len, v2pe_delta), "1 " * num_words)
        assert text.endswith(("; shorten it", "; send less text"))
        assert "max_model_len" not in text


@pytest.mark.parametrize("num_words", [50, 200, 20_000])
def test_a_text_within_the_window_may_be_helped_by_a_larger_max_model_len(preparer, num_words):
    text = refusal(preparer(40), "1 " * num_words)
    assert text.endswith("; shorten it, or raise max_model_len")


def test_a_prompt_with_pictures_is_told_what_makes_pictures_smaller(preparer):
    assert refusal(preparer(100), "x", WIDE, WIDE).endswith("shorten it, or lower max_tiles, or raise max_model_len")
    assert refusal(preparer(WINDOW), "1 " * 300, WIDE).endswith("shorten it, or lower max_tiles")
    beyond = refusal(preparer(10 * WINDOW), "1 " * 120, WIDE)
    assert beyond.endswith("shorten it, or lower max_tiles, or choose a smaller v2pe_delta (or 'auto')")
    assert refusal(preparer(10 * WINDOW, 1 / 256), "1 " * 300, WIDE).endswith("shorten it, or lower max_tiles")
    assert refusal(preparer(10 * WINDOW, "auto"), "1 " * 300, WIDE).endswith("send less text or fewer pictures")


@pytest.mark.parametrize("whole", [[{"role": "user", "content": "x"}], [{"type": "text", "text": "x"}]])
def test_a_million_messages_or_parts_are_refused_at_once(engine, whole):
    million = whole * 1_000_000
    start_s = time.perf_counter()
    with pytest.raises(RequestError, match=r"^messages: 1,000,000 (messages|parts)"):
        engine.prepare(million if "role" in whole[0] else [{"role": "user", "content": million}])
    assert time.perf_counter() - start_s < 0.2


TURNS = [Turn("user", ("What? ", IMAGE))]


@pytest.mark.parametrize(
    ("turns", "tiles", "message"),
    [
        ([], [], "turns: expected at least one turn, got none"),
        (None, [], "turns: expected a list of turns, got NoneType"),
        ("user", [], "turns: expected a list of turns, got 'user'"),
        (["user"], [], r"turns\[0\]: expected a Turn .* got 'user'"),
        ([*TURNS, Turn("user", None)], [], r"turns\[1\]: expected a Turn with a tuple of parts"),
        ([Turn("user", (3,))], [], r"turns\[0\]\.parts: expected texts and IMAGE, got 3"),
        ([Turn("tool", ("x",))], [], r"turns\[0\]\.role must be one of system, user, assistant, got 'tool'"),
        (TURNS, None, "tiles: expected a list of tensors or arrays of tiles"),
        (TURNS, torch.zeros(1, 56, 56, 3, dtype=torch.uint8), "tiles: expected a list of tensors"),
        (TURNS, [], "places for 1 pictures, but 0 were given"),
    ],
)
def test_turns_that_cannot_be_rendered_are_refused_with_their_place(engine, turns, tiles, message):
    with pytest.raises(RequestError, match=message) as error:
        engine.prepare_turns(turns, tiles)
    assert "\n" not in str(error.value)

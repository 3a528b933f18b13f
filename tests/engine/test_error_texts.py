"""Whatever a public call is given, it refuses in one short line of the package, at once, or does what was asked."""

import time

import pytest

from internvl_rt import Engine, SamplingParams
from internvl_rt.compat import ChatModel, load_image
from internvl_rt.errors import InternVLError
from support.hostile import HOSTILE

ONE = SamplingParams(max_tokens=1)
HELLO = [{"role": "user", "content": "Hello"}]
SHORT = {"max_new_tokens": 1}


def part(engine, kind, value, **options):
    return engine.chat([{"role": "user", "content": [{"type": kind, kind: value, **options}]}], ONE)


def official(engine, question="Hello", config=SHORT, pixels=None, **arguments):
    return ChatModel(engine).chat(engine.tokenizer, pixels, question, config, **arguments)


CALLS = {
    "image": lambda engine, value: part(engine, "image", value),
    "image_url": lambda engine, value: part(engine, "image_url", value),
    "image_embeds": lambda engine, value: part(engine, "image_embeds", value),
    "max_tiles": lambda engine, value: part(engine, "image", "no such file", max_tiles=value),
    "num_frames": lambda engine, value: part(engine, "video", "no such file", num_frames=value),
    "bound": lambda engine, value: part(engine, "video", "no such file", bound=value),
    "cache_salt": lambda engine, value: engine.chat(HELLO, ONE, cache_salt=value),
    "batch": lambda engine, value: engine.generate(value, ONE),
    "responses": lambda engine, value: engine.score(HELLO, value),
    "images": lambda engine, value: engine.encode_images(value),
    "an_image": lambda engine, value: engine.encode_images([value]),
    "load_image": lambda _, value: load_image(value),
    "input_size": lambda _, value: load_image("no such file", input_size=value),
    "max_num": lambda _, value: load_image("no such file", max_num=value),
    "generation_config": lambda engine, value: official(engine, config=value),
    "num_beams": lambda engine, value: official(engine, config={"num_beams": value}),
    "do_sample": lambda engine, value: official(engine, config={"do_sample": value, **SHORT}),
    "history": lambda engine, value: official(engine, history=value),
    "a_turn": lambda engine, value: official(engine, history=[value]),
    "num_patches_list": lambda engine, value: official(engine, num_patches_list=value),
    "pixel_values": lambda engine, value: official(engine, pixels=value),
    "questions": lambda engine, value: ChatModel(engine).batch_chat(engine.tokenizer, None, value, SHORT),
}


@pytest.fixture(scope="module")
def engine():
    with Engine.from_pretrained("tiny", device="cpu", kv_cache_bytes=1 << 26) as engine:
        yield engine


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize("call", CALLS)
def test_a_hostile_argument_is_refused_in_one_short_line_at_once(engine, call, value):
    start_s = time.perf_counter()
    text = "accepted"
    try:
        CALLS[call](engine, HOSTILE[value])
    except InternVLError as error:
        text = str(error)
    assert time.perf_counter() - start_s < 5
    assert text.isprintable()
    assert 0 < len(text) <= 2000

"""One dataclass is the signature of both `from_pretrained` methods, and its docstring lists the options."""

import asyncio
import inspect
import io
import math
import re
from dataclasses import fields

import numpy as np
import pytest
import torch
from PIL import Image

from internvl_rt import AsyncEngine, Engine, EngineOptions, RequestError, SamplingParams
from internvl_rt.checkpoint.config import KNOWN_MODELS, load_config
from support.configs import HF, ORIGINAL, parse


@pytest.mark.parametrize("engine_class", [Engine, AsyncEngine])
def test_the_fields_of_the_options_are_the_keyword_arguments(engine_class):
    model, *keywords = inspect.signature(engine_class.from_pretrained).parameters.values()
    assert model.name == "model"
    assert {keyword.kind for keyword in keywords} == {inspect.Parameter.KEYWORD_ONLY}
    options = {field.name: field.default for field in fields(EngineOptions)}
    assert {keyword.name: keyword.default for keyword in keywords} == options


def test_every_option_has_its_line_in_the_docstring_and_no_other_has():
    described = re.findall(r"^(\w+): \S", inspect.getdoc(EngineOptions), re.MULTILINE)
    assert described == [field.name for field in fields(EngineOptions)]


@pytest.mark.parametrize("engine_class", [Engine, AsyncEngine])
def test_the_model_may_be_given_by_name(engine_class):
    engine = engine_class.from_pretrained(model="tiny", device="cpu", max_num_seqs=1, kv_cache_bytes=1 << 24)
    assert isinstance(engine, engine_class)


def test_by_default_steps_of_torch_follow_the_context_and_a_given_number_of_tokens_is_kept():
    decoder, cpu = load_config(KNOWN_MODELS["InternVL3-1B"]).decoder, torch.device("cpu")
    assert EngineOptions().double_cost_context(decoder, cpu) == pytest.approx(4160, rel=0.01)
    assert EngineOptions(backend="triton").double_cost_context(decoder, cpu) == math.inf
    assert EngineOptions().double_cost_context(decoder, torch.device("cuda")) == math.inf
    assert EngineOptions(max_tokens_per_step=512).double_cost_context(decoder, cpu) == math.inf


def test_an_unknown_argument_is_named():
    with pytest.raises(TypeError, match="max_seqs"):
        Engine.from_pretrained("tiny", max_seqs=3)


WRONG = {
    "device": [3, None, "gpu", "cuda:-1", "cuda:999", "cuda:x", "cpu\n", b"cpu", True],
    "quantization": ["int4", "awq", 8, "FP8"],
    "quantize_vision": [1, "yes", None],
    "dtype": [5, None, "int8", torch.int8, "FLOAT32", float],
    "revision": [7, "", "x" * 1000, b"main"],
    "max_model_len": [0, -1, 1.5, "4096", True, 1 << 40, math.nan],
    "kv_cache_dtype": ["bfloat16", "fp4", None, torch.int8, 8],
    "kv_cache_bytes": [-1, 0, "4GB", 1e9, True, 1 << 80],
    "block_size": [True, 48, 64.0, "64", None, [64]],
    "max_num_seqs": [0, 1e9, 2.5, True, None, "8", 10**9],
    "max_tokens_per_step": [0, 2.5, True, "512", 10**9],
    "max_waiting": [None, -1, 1.0, True, 1 << 40],
    "prefix_cache": ["no", 0, 1, None],
    "visual_cache_bytes": [-1, None, 1e6, "1MB", True],
    "num_draft_tokens": [True, -1, 16, 1.0, None],
    "v2pe_delta": ["x", 0.3, True, math.nan, math.inf, 10**400, None, [1]],
    "number_images": [1, "no"],
    "tensor_parallel_size": [0, -1, 17, 2.0, True, None, "2"],
    "expert_parallel": [1, "yes", None],
    "vision_processes": [-1, 17, 1.0, True, None, "1"],
    "vision_device": ["gpu", None, 0, "cuda:999", True],
    "exif": ["turn", None, True, ["apply"]],
    "max_tiles": [0, 1000, 1.0, True, "12"],
    "alpha": ["black", None, True, ["drop"]],
    **{
        f"max_{name}": [0, -1, 1.5, True, None, "9", 1 << 60]
        for name in "pixels side image_bytes decode_bytes video_bytes video_frames frame_pixels video_pixels "
        "decoded_video_pixels".split()
    },
    "max_decode_s": [0, -1, math.nan, math.inf, True, None, "9"],
    "seed": [-1, "x", 1.0, True, 1 << 64],
    "backend": ["cuda", None, 1, True],
    "num_threads": [0, -1, 1.5, True, "2", 4096],
    "cuda_graphs": [1, 0, None, "yes"],
    "capture_all": [1, 0, None, "yes"],
    "batch_invariant": [1, 0, None, "yes"],
    "programmatic_launch": [1, 0, None, "yes"],
    "experiments": ["early", ["early_trigger", "x"], True, 1, b"early_trigger", {"early_trigger": 1}, [None]],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_option_is_refused_by_name_before_anything_is_loaded(name, value):
    with pytest.raises(RequestError, match=f"^{name} must be .*, got "):
        Engine.from_pretrained("no such model", **{name: value})


def test_every_option_is_checked():
    assert {field.name for field in fields(EngineOptions)} == WRONG.keys()


def test_options_of_numpy_and_torch_are_taken_as_plain_values():
    given = {"device": torch.device("cpu"), "max_num_seqs": np.int64(3), "block_size": np.int32(64)}
    given |= {"v2pe_delta": np.float32(0.25), "prefix_cache": np.bool_(False)}
    plain = {"device": "cpu", "max_num_seqs": 3, "block_size": 64, "v2pe_delta": 0.25, "prefix_cache": False}
    options = EngineOptions(**given)
    assert options == EngineOptions(**plain)
    assert [type(getattr(options, name)) for name in plain] == [type(value) for value in plain.values()]


def test_pictures_are_read_as_the_options_say():
    config = Engine.from_pretrained("tiny", device="cpu", max_num_seqs=1, kv_cache_bytes=1 << 24).config
    options = EngineOptions(exif="apply", alpha="white", max_pixels=200, max_tiles=3).images(config)
    assert (options.exif, options.alpha, options.max_pixels, options.max_tiles) == ("apply", "white", 200, 3)
    assert options.image_size == config.vision.image_size


@pytest.mark.parametrize(("values", "exif", "numbered"), [(ORIGINAL, "ignore", True), (HF, "apply", False)])
def test_pictures_are_by_default_read_as_by_the_code_that_the_format_is_made_for(values, exif, numbered):
    config = parse(values)
    assert EngineOptions().images(config).exif == exif
    assert EngineOptions().numbers_images(config) == numbered
    for given in ("apply", "ignore"):
        assert EngineOptions(exif=given).images(config).exif == given
    for given in (True, False):
        assert EngineOptions(number_images=given).numbers_images(config) == given


def test_a_turned_picture_reaches_the_prompt_turned():
    upright = np.random.default_rng(0).integers(0, 256, (60, 120, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # viewers turn the stored picture clockwise by 90 degrees
    data = io.BytesIO()
    Image.fromarray(np.rot90(upright)).save(data, "PNG", exif=exif)
    parts = [{"type": "image", "image": data.getvalue()}, {"type": "text", "text": "?"}]
    options = {"device": "cpu", "max_num_seqs": 1, "kv_cache_bytes": 1 << 24}
    with Engine.from_pretrained("tiny", exif="apply", **options) as engine:
        (picture,) = engine.prepare([{"role": "user", "content": parts}]).pictures
    columns, rows = picture.layout.columns, picture.layout.rows
    assert columns > rows
    assert np.array_equal(picture.image.pixels(), upright)


WRONG_IN_A_CALL = {
    "params": [{"max_tokens": 5}, "short", 7, SamplingParams],
    "timeout_s": [0, -1, "5", math.nan, math.inf, True, [1]],
    "v2pe_delta": ["x", 0.3, True, math.nan, [1]],
    "cache_salt": [5, b"a", "x" * 100_000],
    "progress": [1, "no", None],
    "include_end": [1, "no", None],
}
CALLS = {
    "chat": ("params", "timeout_s", "v2pe_delta", "cache_salt"),
    "stream": ("params", "timeout_s", "v2pe_delta", "cache_salt"),
    "generate": ("params", "timeout_s", "v2pe_delta", "cache_salt", "progress"),
    "score": ("v2pe_delta", "cache_salt", "include_end"),
    "encode_images": ("cache_salt",),
}


@pytest.fixture(scope="module")
def engine():
    with Engine.from_pretrained("tiny", device="cpu", max_num_seqs=2, kv_cache_bytes=1 << 24) as engine:
        yield engine


class Untouched:
    """A picture that must not be looked at."""

    def __getattribute__(self, name):
        pytest.fail(f"{name} was read before the arguments were checked")


def positional(method):
    messages = [{"role": "user", "content": [{"type": "image", "image": Untouched()}]}]
    return {"generate": ([messages],), "score": (messages, ["x"]), "encode_images": ([Untouched()],)}.get(
        method, (messages,)
    )


@pytest.mark.parametrize("method", CALLS)
def test_a_wrong_argument_of_a_call_is_refused_before_its_media_are_read(engine, method):
    for name in CALLS[method]:
        for value in WRONG_IN_A_CALL[name]:
            with pytest.raises(RequestError, match=f"{name} must be .*, got "):
                getattr(engine, method)(*positional(method), **{name: value})


@pytest.mark.parametrize("method", [name for name in CALLS if name != "generate"])
def test_asyncio_calls_refuse_the_same(method):
    async def call(engine, **wrong):
        result = getattr(engine, method)(*positional(method), **wrong)
        return await (anext(result) if method == "stream" else result)

    async def main():
        async with AsyncEngine.from_pretrained("tiny", device="cpu", kv_cache_bytes=1 << 24) as engine:
            for name in CALLS[method]:
                for value in WRONG_IN_A_CALL[name]:
                    with pytest.raises(RequestError, match=f"{name} must be .*, got "):
                        await call(engine, **{name: value})

    asyncio.run(main())


@pytest.mark.parametrize("params", [SamplingParams(n=3), SamplingParams(stop_token_ids=1 << 20)])
def test_what_this_engine_cannot_serve_is_refused_before_media_are_read(engine, params):
    with pytest.raises(RequestError, match=r"max_num_seqs|not in the vocabulary"):
        engine.chat(*positional("chat"), params)


def test_the_path_of_a_trace_is_checked(engine):
    for path in (3, None, b"run.json"):
        with pytest.raises(RequestError, match="path must be a string or a Path"), engine.trace(path):
            pytest.fail("the block must not begin")

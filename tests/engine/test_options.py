"""One dataclass is the signature of both `from_pretrained` methods, and its docstring lists the options."""

import inspect
import io
import re
from dataclasses import fields

import numpy as np
import pytest
from PIL import Image

from internvl_rt import AsyncEngine, Engine, EngineOptions, RequestError
from support.configs import HF, ORIGINAL, parse


@pytest.mark.parametrize("engine_class", [Engine, AsyncEngine])
def test_the_fields_of_the_options_are_the_keyword_arguments(engine_class):
    model, *keywords = inspect.signature(engine_class.from_pretrained).parameters.values()
    assert model.name == "model"
    assert {keyword.kind for keyword in keywords} == {inspect.Parameter.KEYWORD_ONLY}
    options = {field.name: field.default for field in fields(EngineOptions)}
    assert {keyword.name: keyword.default for keyword in keywords} == options


def test_every_option_has_its_line_in_the_docstring_and_no_other_has():
    described = re.findall(r"^    (\w+): \S", EngineOptions.__doc__, re.MULTILINE)
    assert described == [field.name for field in fields(EngineOptions)]


@pytest.mark.parametrize("engine_class", [Engine, AsyncEngine])
def test_the_model_may_be_given_by_name(engine_class):
    engine = engine_class.from_pretrained(model="tiny", device="cpu", max_num_seqs=1, kv_cache_bytes=1 << 24)
    assert isinstance(engine, engine_class)


def test_an_unknown_argument_is_named():
    with pytest.raises(TypeError, match="max_seqs"):
        Engine.from_pretrained("tiny", max_seqs=3)


@pytest.mark.parametrize(
    "wrong", [{"exif": "turn"}, {"exif": None}, {"number_images": "no"}, {"alpha": "black"}, {"max_pixels": 0}]
)
def test_a_wrong_option_of_pictures_is_refused_by_name(wrong):
    with pytest.raises(RequestError, match=f"^{next(iter(wrong))} must be"):
        EngineOptions(**wrong)


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
    columns, rows = picture.image.grid
    assert columns > rows
    assert np.array_equal(picture.image.pixels(), upright)

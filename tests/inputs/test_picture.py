"""A picture is plain data: it can be pickled for another process, and later changes of its source do not reach it."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import internvl_rt
from internvl_rt import Engine, MediaError, RequestError, SamplingParams, compat
from internvl_rt.inputs import image as image_module
from internvl_rt.inputs.image import open_image
from internvl_rt.inputs.picture import open_picture, picture_of_tiles, picture_of_visual_tokens
from internvl_rt.inputs.prompt import turns_from_question
from internvl_rt.inputs.tiles import ImageOptions
from support.small_models import build_model

SAMPLE = Path(internvl_rt.__file__).parent / "tiny" / "samples" / "4719.png"


def as_given(kind: str):
    array = np.array(Image.open(SAMPLE).convert("RGB"))
    match kind:
        case "path":
            return SAMPLE
        case "bytes":
            return SAMPLE.read_bytes()
        case "image":
            return Image.fromarray(array)
        case "array":
            return array
        case _:
            return torch.from_numpy(array)


KINDS = ["path", "bytes", "image", "array", "tensor"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_opened_picture_crosses_a_process(kind):
    opened = open_image(as_given(kind), ImageOptions(image_size=56))
    arrived = pickle.loads(pickle.dumps(opened))
    assert arrived.digest == opened.digest
    assert np.array_equal(arrived.tiles(), opened.tiles())


@pytest.mark.parametrize("kind", KINDS)
def test_prepared_prompts_hold_no_reference_to_the_engine(kind):
    parts = [{"type": "image", "image": as_given(kind)}, {"type": "text", "text": "Read the digits."}]
    with Engine.from_pretrained("tiny", device="cpu", max_num_seqs=1, kv_cache_bytes=1 << 24) as engine:
        prepared = engine.preparer.prepare([{"role": "user", "content": parts}])
        prepared = pickle.loads(pickle.dumps(prepared))
        (reply,) = engine.generate_prepared(iter([prepared]), [SamplingParams(max_tokens=12)])
    assert reply.text == "4719"


@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_pixels_that_are_written_into_later_do_not_change_the_picture(kind):
    given, options = as_given(kind), ImageOptions(image_size=56)
    opened = open_image(given, options)
    expected = opened.tiles()
    given[:] = 0
    assert np.array_equal(opened.tiles(), expected)
    assert opened.digest != open_image(given, options).digest


@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_pixels_in_any_order_of_memory_are_copied_row_by_row(kind):
    upright = np.ascontiguousarray(np.rot90(as_given("array")))
    given = np.rot90(as_given("array")) if kind == "array" else torch.rot90(as_given("tensor")).mT.contiguous().mT
    pixels = torch.as_tensor(open_image(given, ImageOptions(image_size=56)).pixels())
    assert pixels.is_contiguous()
    assert np.array_equal(pixels.numpy(), upright)


@pytest.mark.parametrize("kind", ["image_embeds", "tiles"])
def test_tensors_that_are_written_into_later_do_not_change_the_prompt(kind):
    with Engine.from_pretrained("tiny", device="cpu", max_num_seqs=1, kv_cache_bytes=1 << 24) as engine:
        if kind == "tiles":
            given = compat.load_image(SAMPLE, input_size=56)
            turns, _ = turns_from_question("Read the digits.", None, num_images=1, system=engine.config.system_message)
            prepared = engine.prepare_turns(turns, [given])
        else:
            given = engine.encode_images([SAMPLE])[0].clone()
            parts = [{"type": kind, kind: given}, {"type": "text", "text": "Read the digits."}]
            prepared = engine.prepare([{"role": "user", "content": parts}])
        given[:] = 0
        (reply,) = engine.generate_prepared(iter([prepared]), [SamplingParams(max_tokens=12)])
    assert reply.text == "4719"


def test_a_video_may_be_given_as_its_frames():
    frames = np.stack([as_given("array")] * 2)
    with Engine.from_pretrained("tiny", device="cpu", max_num_seqs=1, kv_cache_bytes=1 << 24) as engine:

        def digests(video):
            parts = [{"type": "video", "video": video}, {"type": "text", "text": "Read the digits."}]
            return [picture.digest for picture in engine.prepare([{"role": "user", "content": parts}]).pictures]

        expected = digests(frames)
        assert len(expected) == 2
        for video in (torch.from_numpy(frames), list(frames), [Image.fromarray(frame) for frame in frames]):
            assert digests(video) == expected
        with pytest.raises(RequestError, match="has 5000 pictures and frames of videos, but only"):
            digests(np.broadcast_to(frames[0], (5000, *frames[0].shape)))


def test_frames_in_read_only_or_strided_memory_are_copied():
    array = as_given("array")
    read_only = array.copy()
    read_only.flags.writeable = False
    tensor = torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1))).permute(1, 2, 0)
    for given in (read_only, np.repeat(array, 2, axis=1)[:, ::2], tensor, tensor.expand(2, *tensor.shape)[1]):
        opened = open_image(given, ImageOptions(image_size=56))
        assert np.array_equal(np.asarray(opened.pixels()), array)
        assert not np.shares_memory(np.asarray(opened.pixels()), np.asarray(given))


@pytest.mark.parametrize(("writeable", "view"), [(False, False), (True, False), (False, True)])
def test_a_large_array_is_copied_unless_nobody_can_write_into_it(writeable, view, monkeypatch):
    monkeypatch.setattr(image_module, "LARGE_PIXELS", 100_000)
    given = np.random.default_rng(0).integers(0, 256, (400, 600, 3), dtype=np.uint8)
    given = given[:] if view else given
    given.flags.writeable = writeable
    opened = open_image(given, ImageOptions(image_size=56))
    assert np.array_equal(opened.pixels(), given)
    assert np.shares_memory(opened.pixels(), given) == (not writeable and not view)


@pytest.mark.parametrize("kind", ["image", "array", "tensor"])
def test_of_large_pixels_the_tiles_are_kept(kind, monkeypatch):
    monkeypatch.setattr(image_module, "LARGE_PIXELS", 100_000)
    array = np.random.default_rng(0).integers(0, 256, (400, 600, 3), dtype=np.uint8)
    given = {"image": Image.fromarray, "array": np.copy, "tensor": torch.tensor}[kind](array)
    options = ImageOptions(image_size=56)
    large, small = open_picture(given, options), open_picture(as_given(kind), options)
    opened = open_image(given, options)
    assert large.image is None
    assert np.array_equal(large.tiles.numpy(), opened.tiles())
    assert (large.digest, large.num_tiles) == (opened.digest, opened.layout.num_tiles)
    assert small.tiles is None
    assert small.image.pixels().nbytes <= small.image.tiles().nbytes


# What cannot be read as numbers, in forms that both kinds of given tensors share.
UNREADABLE = {
    "a list": (torch.Tensor.tolist, "expected a tensor or an array, got list"),
    "None": (lambda t: None, "expected a tensor or an array, got NoneType"),
    "text": (lambda t: "4719.png", "expected a tensor or an array, got str"),
    "a number": (lambda t: 1.0, "expected a tensor or an array, got float"),
    "meta": (lambda t: t.to("meta"), "on meta"),
    "sparse": (lambda t: t.to_sparse(), "torch.sparse_coo"),
    "quantised": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "quantised"),
    "complex": (lambda t: t.to(torch.complex64), "got complex64"),
    "integers": (torch.Tensor.int, "got int32"),
    "signed bytes": (lambda t: t.to(torch.int8), "got int8"),
    "truth values": (torch.Tensor.bool, "got bool"),
    "eight bits": (lambda t: t.to(torch.float8_e4m3fn), "got float8_e4m3fn"),
    "an array of objects": (lambda t: t.numpy().astype(object), "got object"),
    "an array of texts": (lambda t: t.numpy().astype(str), "got str"),
    "a wide array": (lambda t: t.numpy().astype(np.longdouble), "got (longdouble|float128)"),
    "a number alone": (lambda t: t.sum(), r"got float32 \[\]"),
    "nothing": (lambda t: t[:0], r"got float32 \[0, "),
    "NaN": (lambda t: t * torch.nan, "numbers are not finite in float16 .*; send finite numbers, or load the model"),
    "infinity": (lambda t: t / 0, "numbers are not finite in float16"),
    "beyond float16": (lambda t: t + 1e5, "numbers are not finite in float16"),
    "beyond float32": (lambda t: t.double() + 1e300, "numbers are not finite in float16"),
    "an array beyond float16": (lambda t: t.numpy().astype(">f8") - 1e5, "numbers are not finite in float16"),
    "more than fits": (lambda t: t[:1].expand(10**9, *t.shape[1:]), "visual tokens, but only 64 fit"),
}
READABLE = {
    "float64": torch.Tensor.double,
    "bfloat16": torch.Tensor.bfloat16,
    "a gradient": lambda t: t.clone().requires_grad_() * 1.0,
    "gaps": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "an array": torch.Tensor.numpy,
    "an array of another byte order": lambda t: t.numpy().astype(">f4"),
    "a reversed array": lambda t: t.numpy()[::-1].copy()[::-1],
    "an array that is read only": lambda t: np.broadcast_to(t.numpy(), t.shape),
    "a negative view": lambda t: torch.complex(t, -t).conj().imag,
}


def given_as(kind):
    """Returns a config of 4 visual tokens a tile, a function that takes tensors of a kind, and one that it takes."""
    config = build_model().config
    take = {"pixel_values": picture_of_tiles, "image_embeds": picture_of_visual_tokens}[kind]
    shape = (2, 3, 56, 56) if kind == "pixel_values" else (8, config.decoder.hidden_size)
    return config, take, torch.linspace(-2, 2, int(np.prod(shape))).view(shape)


@pytest.mark.parametrize(("change", "message"), UNREADABLE.values(), ids=UNREADABLE)
@pytest.mark.parametrize("kind", ["pixel_values", "image_embeds"])
@pytest.mark.filterwarnings("ignore:.*[Ss]parse", "ignore:.*quantiz")
def test_a_tensor_that_no_step_can_take_is_refused_by_name(kind, change, message):
    config, take, tensor = given_as(kind)
    if message.endswith("64 fit") and kind == "image_embeds":
        tensor = tensor.repeat_interleave(config.tokens_per_tile, 0)
    with pytest.raises(RequestError, match=f"^{kind}: .*{message}"):
        take(change(tensor), config, torch.float16, max_tokens=64)


@pytest.mark.parametrize("change", READABLE.values(), ids=READABLE)
@pytest.mark.parametrize("kind", ["pixel_values", "image_embeds"])
def test_numbers_are_taken_in_any_memory_and_kept_in_the_dtype_of_the_model(kind, change):
    config, take, tensor = given_as(kind)
    given = change(tensor)
    picture = take(given, config, torch.float16, max_tokens=64)
    kept = picture.tiles if kind == "pixel_values" else picture.visual_XD
    assert kept.is_contiguous()
    assert not kept.requires_grad
    expected = torch.from_numpy(given.astype(np.float32)) if isinstance(given, np.ndarray) else given.detach()
    assert torch.equal(kept, expected.half())
    assert picture.num_tiles == 2


@pytest.mark.parametrize(
    "shape",
    [(3, 56, 56), (1, 3, 224, 224), (1, 1, 56, 56), (1, 4, 56, 56), (1, 56, 56, 3), (1, 3, 56, 28), (1, 1, 3, 56, 56)],
)
def test_tiles_of_another_shape_are_refused(shape):
    config, take, _ = given_as("pixel_values")
    with pytest.raises(RequestError, match=r"expected at least one tile, .* \[tiles, 3, 56, 56\]"):
        take(torch.zeros(shape), config, torch.float32, max_tokens=64)


def test_tiles_of_bytes_have_their_colours_last():
    config, take, _ = given_as("pixel_values")
    assert take(torch.zeros(2, 56, 56, 3, dtype=torch.uint8), config, torch.float16, 64).tiles.dtype == torch.uint8
    assert take(np.zeros((2, 56, 56, 3), np.uint8), config, torch.float16, 64).tiles.dtype == torch.uint8
    with pytest.raises(RequestError, match=r"got uint8 \[2, 3, 56, 56\]"):
        take(torch.zeros(2, 3, 56, 56, dtype=torch.uint8), config, torch.float16, 64)


@pytest.mark.parametrize("change", [lambda t: t.to("meta"), torch.Tensor.to_sparse])
def test_pixels_without_memory_of_their_own_are_refused(change):
    with pytest.raises(MediaError, match="must be a dense tensor on the CPU or a CUDA device"):
        open_image(change(torch.ones(56, 56, 3, dtype=torch.uint8)), ImageOptions(image_size=56))


@pytest.mark.gpu
def test_pixels_on_a_gpu_are_kept_there():
    given = as_given("tensor").cuda()
    opened = open_image(given, ImageOptions(image_size=56))
    assert opened.pixels().device == given.device
    assert opened.digest == open_image(given.cpu(), ImageOptions(image_size=56)).digest
    parts = [{"type": "image", "image": given}, {"type": "text", "text": "Read the digits."}]
    with Engine.from_pretrained("tiny", max_num_seqs=1) as engine:
        assert engine.chat([{"role": "user", "content": parts}], SamplingParams(max_tokens=12)).text == "4719"

"""A picture is plain data: it can be pickled for another process, and later changes of its source do not reach it."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import internvl_rt
from internvl_rt import Engine, SamplingParams, compat
from internvl_rt.errors import RequestError
from internvl_rt.inputs.image import open_image
from internvl_rt.inputs.prompt import turns_from_question
from internvl_rt.inputs.tiles import ImageOptions

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
        with pytest.raises(RequestError, match="the videos have 5000 frames, but only"):
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


@pytest.mark.gpu
def test_pixels_on_a_gpu_are_kept_there():
    given = as_given("tensor").cuda()
    opened = open_image(given, ImageOptions(image_size=56))
    assert opened.pixels().device == given.device
    assert opened.digest == open_image(given.cpu(), ImageOptions(image_size=56)).digest
    parts = [{"type": "image", "image": given}, {"type": "text", "text": "Read the digits."}]
    with Engine.from_pretrained("tiny", max_num_seqs=1) as engine:
        assert engine.chat([{"role": "user", "content": parts}], SamplingParams(max_tokens=12)).text == "4719"

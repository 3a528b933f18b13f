"""Arrays of other libraries are pictures, frames and visual tokens like NumPy's and torch's."""

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from internvl_rt import AsyncEngine, MediaError, RequestError, SamplingParams
from internvl_rt.inputs.foreign import adopted
from internvl_rt.inputs.image import open_image
from internvl_rt.inputs.tiles import ImageOptions
from support.calls import load, run

SAMPLE = Path(__file__).parents[2] / "internvl_rt" / "tiny" / "samples" / "4719.png"
PIXELS = np.asarray(Image.open(SAMPLE).convert("RGB"))
GREEDY = SamplingParams(max_tokens=8)


class Foreign:
    """An array as another library has it: nothing but DLPack."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = np.array(array)

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


class Broken:
    def __dlpack__(self, **_: Any) -> Any:
        raise BufferError("the memory\nis gone")

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


class OnCuda:
    """An array of a library that has no DLPack."""

    def __init__(self, data: int = 0) -> None:
        shape = PIXELS.shape
        self.__cuda_array_interface__ = {"shape": shape, "typestr": "|u1", "data": (data, False), "version": 3}


OnCuda.__cuda_array_interface__ = None  # as a class that computes it in a property has it


@pytest.fixture(scope="module")
def engine():
    with load() as engine:
        yield engine


def ask(**part: Any) -> list[dict[str, Any]]:
    (kind,) = part
    return [{"role": "user", "content": [{"type": kind, **part}, {"type": "text", "text": "Read the digits."}]}]


def test_memory_is_shared_and_outlives_its_owner() -> None:
    foreign = Foreign(np.arange(6, dtype=np.uint8))
    tensor = adopted(foreign)
    foreign.array[0] = 9
    assert tensor.tolist() == [9, 1, 2, 3, 4, 5]
    del foreign
    gc.collect()
    assert tensor.tolist() == [9, 1, 2, 3, 4, 5]


class Subclass(torch.Tensor):
    """A tensor with more to it, as programs make for themselves."""


@pytest.mark.parametrize(
    "given",
    [PIXELS, torch.ones(2), torch.ones(2).as_subclass(Subclass), "page.png", b"", None, [1]],
    ids=lambda given: str(type(given)),
)
def test_what_is_not_foreign_is_left_alone(given: Any) -> None:
    assert adopted(given) is given


def test_a_picture_is_the_one_that_numpy_holds() -> None:
    opened = open_image(Foreign(PIXELS), ImageOptions())
    assert opened.digest == open_image(PIXELS, ImageOptions()).digest
    assert np.array_equal(opened.tiles(), open_image(SAMPLE, ImageOptions()).tiles())


def test_an_engine_takes_pictures_frames_and_visual_tokens(engine: Any) -> None:
    expected = engine.chat(ask(image=PIXELS), GREEDY).text
    assert expected == "4719"
    assert engine.chat(ask(image=Foreign(PIXELS)), GREEDY).text == expected
    (visual,) = engine.encode_images([Foreign(PIXELS)])
    assert engine.chat(ask(image_embeds=Foreign(visual.float().numpy())), GREEDY).text == expected
    frames = np.stack([PIXELS, PIXELS])
    given = [ask(video=video) for video in (frames, Foreign(frames), [Foreign(PIXELS), PIXELS])]
    assert len({engine.describe(messages).prompt.token_ids for messages in given}) == 1
    assert len({reply.text for reply in engine.generate(given, GREEDY)}) == 1


def test_an_asynchronous_engine_copies_them_at_once(engine: Any) -> None:
    async def main() -> None:
        async with AsyncEngine(load()) as served:
            foreign = Foreign(PIXELS)
            call = served.chat(ask(image=foreign), GREEDY)
            foreign.array[:] = 255
            assert (await call).text == "4719"
            with pytest.raises(MediaError, match="cannot be taken"):
                await served.chat(ask(image=Broken()), GREEDY)

    run(main())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Broken(), r"test_foreign\.Broken cannot be taken as an array .*the memory\\nis gone.*; convert it to NumPy's"),
        (Foreign(np.zeros((4, 4), np.uint8)), r"image array \(uint8 \[4, 4\]\) must be uint8 \[height, width, 3\]"),
        (Foreign(np.zeros((4, 4, 3), np.float32)), "must be uint8"),
    ],
    ids=["broken", "shape", "dtype"],
)
def test_what_is_no_picture_is_refused(engine: Any, given: Any, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        engine.chat(ask(image=given))
    with pytest.raises((MediaError, RequestError)):
        engine.chat(ask(image_embeds=given))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the memory that it names is not there")
def test_an_array_on_cuda_is_refused_where_there_is_none() -> None:
    with pytest.raises(MediaError, match=r"OnCuda cannot be taken as an array"):
        open_image(OnCuda(), ImageOptions())


@pytest.mark.gpu
def test_an_array_on_cuda_is_read_where_it_is() -> None:
    pixels = torch.from_numpy(np.array(PIXELS)).cuda()
    opened = open_image(OnCuda(pixels.data_ptr()), ImageOptions())
    assert opened.content.is_cuda
    assert opened.digest == open_image(PIXELS, ImageOptions()).digest

"""A snapshot of messages stays as it is, whatever happens to what it was taken of, and is bounded."""

import copy
import io
import time
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from internvl_rt.errors import RequestError
from internvl_rt.inputs.image import open_image
from internvl_rt.inputs.snapshot import MAX_ITEMS, CopyLimits, snapshot
from internvl_rt.inputs.tiles import ImageOptions
from internvl_rt.inputs.video import VideoLimits, load_video

OPTIONS = ImageOptions(image_size=56, min_tiles=1, max_tiles=4, thumbnail=True)
LIMITS = CopyLimits(images=OPTIONS, videos=VideoLimits(), max_media=16, max_visual_bytes=1 << 20)
PIXELS = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def encoded(kind="PNG", pixels=PIXELS):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def part(kind, value, **options):
    return [{"role": "user", "content": [{"type": kind, kind: value, **options}]}]


def value_in(messages):
    one = messages[0]["content"][0]
    return one[one["type"]]


def fill(array):
    array[...] = 0


def fill_memory(view):
    view[:] = bytes(len(view))


def rewrite(file):
    file.seek(0)
    file.write(encoded(pixels=PIXELS[::-1].copy()))


def lazy(kind, folder):
    path = folder / f"picture.{kind}"
    path.write_bytes(encoded(kind))
    return Image.open(path)


# Ways to give a picture that can be changed, and how it is.
GIVEN = {
    "array": (lambda _: PIXELS.copy(), fill),
    "turned array": (lambda _: PIXELS[::-1].copy()[::-1], fill),
    "tensor": (lambda _: torch.from_numpy(PIXELS.copy()), fill),
    "bytearray": (lambda _: bytearray(encoded()), fill_memory),
    "memoryview": (lambda _: memoryview(bytearray(encoded())), fill_memory),
    "BytesIO": (lambda _: io.BytesIO(encoded()), rewrite),
    "decoded": (lambda _: Image.fromarray(PIXELS), lambda image: image.paste(0, (0, 0, 60, 40))),
    "decoded palette": (
        lambda _: Image.fromarray(PIXELS).quantize(16),
        lambda image: image.putpalette(bytes(range(48))) or image.paste(0, (0, 0, 60, 40)),
    ),
    "undecoded PNG": (lambda folder: lazy("PNG", folder), lambda image: image.paste(0, (0, 0, 60, 40))),
    "undecoded BMP": (lambda folder: lazy("BMP", folder), lambda image: image.putpixel((3, 3), (1, 2, 3))),
    "undecoded JPEG": (lambda folder: lazy("JPEG", folder), lambda image: image.thumbnail((20, 20))),
    "closed later": (lambda folder: lazy("PNG", folder), lambda image: image.close()),
}


@pytest.mark.parametrize("given", GIVEN)
def test_a_picture_is_that_of_the_call_whatever_the_caller_does_later(given, tmp_path):
    make, change = GIVEN[given]
    expected = open_image(make(tmp_path), OPTIONS)
    source = make(tmp_path)
    own = [snapshot(part("image", source), LIMITS), snapshot([source], LIMITS, "image")]
    change(source)
    for each in (value_in(own[0]), own[1][0]):
        assert open_image(each, OPTIONS).digest == expected.digest
        assert np.array_equal(open_image(each, OPTIONS).tiles(), expected.tiles())


@pytest.mark.parametrize("num_frames", [None, 1, 2, 3, 7])
@pytest.mark.parametrize("kind", ["array", "tensor", "list", "tuple"])
def test_frames_are_those_of_the_call_and_only_chosen_ones_are_copied(kind, num_frames):
    frames = np.random.default_rng(1).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    source = {"array": frames, "tensor": torch.from_numpy(frames), "list": list(frames), "tuple": tuple(frames)}[kind]
    expected = [np.asarray(frame).copy() for frame in load_video(source, num_segments=num_frames)]
    options = {} if num_frames is None else {"num_frames": num_frames}
    own = snapshot(part("video", source, **options), LIMITS)
    frames[...] = 0
    one = own[0]["content"][0]
    found = load_video(one["video"], num_segments=one.get("num_frames"))
    assert [np.asarray(frame).tolist() for frame in found] == [frame.tolist() for frame in expected]
    if num_frames in (1, 2, 3):
        assert len(one["video"]) == num_frames
    assert len({id(frame) for frame in found}) <= 5 or num_frames is None


def test_lists_and_mappings_are_those_of_the_call():
    inner = OrderedDict(url="a.png", detail="low")
    messages = [
        {"role": "user", "content": [{"type": "image_url", "image_url": inner}, {"type": "text", "text": "x"}]},
        {"role": "user", "content": [{"type": "video", "video": "a.mp4", "bound": [1, 2], "num_frames": 3}]},
    ]
    expected = copy.deepcopy(messages)
    own = snapshot(messages, LIMITS)
    inner["url"] = "b.png"
    messages[1]["content"][0]["bound"][0] = 7
    messages[0]["content"][1]["text"] = "y"
    messages[0]["content"].append(3)
    messages.append(4)
    assert own == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_visual_tokens_are_those_of_the_call(dtype):
    given = torch.ones(4, 8, dtype=dtype)
    sources = [given] if dtype == torch.bfloat16 else [given, given.numpy()]
    own = [value_in(snapshot(part("image_embeds", source), LIMITS)) for source in sources]
    given.zero_()
    assert [float(each.sum()) for each in own] == [32.0] * len(own)


class OwnIndexing(np.ndarray):
    def __getitem__(self, key):
        raise AssertionError("code of the caller's own class has run")


def test_pixels_are_copied_as_they_lie_in_memory_where_that_is_little_more():
    memory = np.random.default_rng(1).integers(0, 256, (40, 60, 4), dtype=np.uint8)
    gray = memory[..., :1]
    quick = [
        memory[..., :3],
        memory[..., 2::-1],
        memory[..., 2::-1].view(OwnIndexing),
        memory[::-1, ::-1, :3],
        memory[..., :3].transpose(1, 0, 2),
        np.rot90(memory[..., 1:]),
        memory[:, 20:, :3],
        np.broadcast_to(memory[:, :, None, 0], (40, 60, 3)),
        np.broadcast_to(gray, (40, 60, 3))[::-1],
        torch.from_numpy(PIXELS).permute(1, 0, 2),
    ]
    slow = [memory[:, ::4, :3], memory[::3, :, :3], memory[:0, :, 2::-1]]
    for given, is_quick in [*((each, True) for each in quick), *((each, False) for each in slow)]:
        expected = np.asarray(given).copy()
        own = value_in(snapshot(part("image", given), LIMITS))
        assert own.flags.c_contiguous != is_quick
        assert not own.flags.writeable
        assert not np.shares_memory(own, np.asarray(given))
        assert np.array_equal(own, expected)
        if is_quick:
            assert own.strides == tuple(np.asarray(given).strides)


def test_copied_pixels_need_no_second_copy():
    for given in (PIXELS, torch.from_numpy(PIXELS)):
        own = value_in(snapshot(part("image", given), LIMITS))
        assert isinstance(own, np.ndarray)
        assert own.flags.owndata
        assert own.flags.c_contiguous
        assert not own.flags.writeable


def test_one_array_that_is_given_often_is_copied_once():
    own = snapshot([{"role": "user", "content": [{"type": "image", "image": PIXELS}] * 10}], LIMITS)
    assert len({id(each["image"]) for each in own[0]["content"]}) == 1


large = np.broadcast_to(np.uint8(0), (1 << 14, 1 << 14, 3))
LEFT = {
    "a large picture": part("image", large),
    "a large tensor": part("image", torch.zeros(1, dtype=torch.uint8).expand(1 << 14, 1 << 14, 3)),
    "a large Pillow picture": part("image", Image.new("1", (1 << 14, 1 << 14))),
    "a large video": part("video", np.broadcast_to(np.uint8(0), (64, 4096, 4096, 3))),
    "large frames": part("video", [np.broadcast_to(np.uint8(0), (8192, 8192, 3))] * 8),
    "large visual tokens": part("image_embeds", np.broadcast_to(np.float32(0), (1 << 16, 1 << 10))),
    "large bytes": part("image", bytearray(OPTIONS.max_image_bytes + 1)),
    "pictures that do not fit": part("video", [PIXELS[:]] * 17),
    "a frame for each of many": part("video", list(PIXELS), num_frames=1 << 40),
    "dates without a buffer": part("text", np.zeros(3, "datetime64[s]")),
    "objects": part("image", np.full((4, 4, 3), None)),
    "a meta tensor": part("image", torch.zeros(4, 4, 3, dtype=torch.uint8, device="meta")),
    "a sparse tensor": part("image", torch.zeros(4, 4, 3).to_sparse()),
    "a nested tensor": part("image", torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])),
    "a nested video": part("video", torch.nested.nested_tensor([torch.zeros(2, 3, 3)] * 3), num_frames=2),
    "no picture": part("image", {1, 2}),
    "a text array": part("text", np.zeros(3)),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("given", LEFT)
def test_what_is_invalid_or_too_large_is_left_as_it_is_at_once(given):
    start_s = time.perf_counter()
    messages = LEFT[given]
    found, source = value_in(snapshot(messages, LIMITS)), value_in(messages)
    if isinstance(source, np.ndarray) and source.ndim == 1:
        assert np.array_equal(found, source)
    elif isinstance(source, list):
        assert all(one is other for one, other in zip(found, source, strict=True))
    else:
        assert found is source
    assert time.perf_counter() - start_s < 0.2


MANY = {
    "messages": [{}] * (MAX_ITEMS + 1),
    "parts": [{"role": "user", "content": [{}] * (MAX_ITEMS // 2)}] * 2,
    "keys": [dict.fromkeys(range(20 * MAX_ITEMS))],
}


@pytest.mark.parametrize("given", MANY)
def test_too_many_things_are_refused_at_once(given):
    start_s = time.perf_counter()
    with pytest.raises(RequestError, match="the call holds more than 100,000 messages, parts, pictures and frames"):
        snapshot(MANY[given], LIMITS)
    assert time.perf_counter() - start_s < 0.5


@pytest.mark.parametrize(
    "given", [None, 7, "abc", b"abc", [], [None], [[[]]], {"role": 3}, range(1 << 60), [{"content": {1, 2}}]]
)
def test_anything_else_goes_through(given):
    assert repr(snapshot(given, LIMITS)) == repr(given)


def test_a_list_that_holds_itself_ends():
    nested = []
    nested.append(nested)
    for given in (nested, [{"content": nested}]):
        assert isinstance(snapshot(given, LIMITS), list)


def test_what_a_caller_has_closed_or_released_is_left_to_the_one_who_reads_it():
    closed = io.BytesIO()
    closed.close()
    picture = Image.open(io.BytesIO(encoded()))
    picture.close()
    for given in (closed, picture):
        assert value_in(snapshot(part("image", given), LIMITS)) is given


def test_an_undecoded_picture_from_a_slow_file_is_not_read():
    class Slow(io.BytesIO):
        def read(self, *arguments):
            reads.append(arguments)
            return super().read(*arguments)

    class Remote(io.RawIOBase):
        def __init__(self):
            self._file = Slow(encoded())

        def __getattribute__(self, name):
            own = object.__getattribute__
            return own(self, name) if name in ("__class__", "_file") else getattr(own(self, "_file"), name)

    reads = []
    picture = Image.open(Remote())
    reads.clear()
    assert value_in(snapshot(part("image", picture), LIMITS)) is picture
    assert not reads


def test_limits_are_those_of_the_engine():
    small = replace(LIMITS, images=replace(OPTIONS, max_pixels=100))
    given = PIXELS.copy()
    assert value_in(snapshot(part("image", given), small)) is given

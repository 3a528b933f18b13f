"""A Pillow picture of a caller may be given to many requests at once, and stays as it is."""

import io
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageOps, ImageSequence

import internvl_rt
from internvl_rt import AsyncEngine, Engine, SamplingParams, compat
from internvl_rt.errors import MediaError
from internvl_rt.inputs.image import open_image
from internvl_rt.inputs.tiles import ImageOptions

Pixels = npt.NDArray[np.uint8]

SAMPLE = Path(internvl_rt.__file__).parent / "tiny" / "samples" / "4719.png"
OPTIONS = ImageOptions(image_size=56)
THREADS = 8


def digits(scale: int = 4) -> Image.Image:
    """Returns digits that the tiny model reads; decoding them takes long enough for threads to meet."""
    sample = Image.open(SAMPLE).convert("RGB")
    return sample.resize((sample.width * scale, sample.height * scale), Image.Resampling.NEAREST)


def encode(image: Image.Image, kind: str, **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def in_threads(call: Callable[[int], Any], count: int = THREADS) -> list[Any]:
    """Returns the results of calls that begin together."""
    barrier = threading.Barrier(count)

    def begin(index: int) -> Any:
        barrier.wait()
        return call(index)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


def rgb(image: Image.Image) -> Pixels:
    return np.asarray(open_image(image, OPTIONS).decode())


ENCODINGS: dict[str, dict[str, Any]] = {
    "PNG": {},
    "TIFF": {"compression": "tiff_lzw"},
    "WEBP": {"lossless": True},
    "BMP": {},
    "JPEG": {"progressive": True},
    "GIF": {},
    "AVIF": {},
}


@pytest.mark.parametrize("kind", ENCODINGS)
@pytest.mark.parametrize("on_disk", [False, True], ids=["stream", "path"])
def test_one_undecoded_picture_in_many_threads_has_its_own_pixels(kind: str, on_disk: bool, tmp_path: Path) -> None:
    file = encode(noise(300, 400), kind, **ENCODINGS[kind])
    path = tmp_path / "picture"
    path.write_bytes(file.getvalue())
    expected = np.asarray(Image.open(path).convert("RGB"))
    for _ in range(4):
        given = Image.open(path if on_disk else file)
        before = given.mode, given.size, given.tell(), given.fp.tell(), given._im, list(given.tile), dict(given.info)
        for pixels in in_threads(lambda _, given=given: rgb(given)):
            assert np.array_equal(pixels, expected)
        after = given.mode, given.size, given.tell(), given.fp.tell(), given._im, list(given.tile), dict(given.info)
        assert after == before
        assert np.array_equal(np.asarray(given.convert("RGB")), expected)


@pytest.mark.parametrize("kind", ENCODINGS)
def test_an_undecoded_picture_keeps_its_encoded_bytes(kind: str) -> None:
    file = encode(noise(300, 400), kind, **ENCODINGS[kind])
    opened = open_image(Image.open(file), OPTIONS)
    assert opened.content == file.getvalue()
    assert opened.digest == open_image(Image.open(file), OPTIONS).digest
    arrived = pickle.loads(pickle.dumps(opened))
    assert np.array_equal(arrived.decode(), Image.open(file).convert("RGB"))
    file.close()
    assert np.array_equal(opened.decode(), arrived.decode())


def test_a_frame_a_draft_and_changed_transparency_or_orientation_make_another_digest() -> None:
    gif = encode(noise(60, 80), "GIF", save_all=True, append_images=[noise(60, 80, seed=1)])
    later = Image.open(gif)
    later.seek(1)
    jpeg = encode(noise(300, 400), "JPEG")
    draft = Image.open(jpeg)
    draft.draft("L", (100, 100))
    palette = encode(noise(60, 80).quantize(4), "PNG", transparency=1)
    opaque = Image.open(palette)
    del opaque.info["transparency"]
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.open(palette)
    turned.info["exif"] = exif.tobytes()
    options = ImageOptions(image_size=56, exif="apply", alpha="white")
    given = [Image.open(gif), later, Image.open(jpeg), draft, Image.open(palette), opaque, turned]
    opened = [open_image(image, options) for image in given]
    assert len({each.digest for each in opened}) == len(given)
    assert not np.array_equal(opened[4].decode(), opened[5].decode())
    assert opened[6].decode().size == (60, 80)


@pytest.mark.slow
def test_undecoded_and_decoded_pictures_of_a_request_take_less_memory_than_decoding_them_all() -> None:
    """A process of its own tells by how much its memory rose at most, in megabytes."""
    code = (
        "import io, resource, sys\n"
        "from PIL import Image\n"
        "from internvl_rt.inputs.picture import open_picture\n"
        "from internvl_rt.inputs.tiles import ImageOptions\n"
        "file = io.BytesIO(); Image.new('RGB', (4000, 4000), 'red').save(file, 'JPEG'); data = file.getvalue()\n"
        "images = [Image.open(io.BytesIO(data)) for _ in range(10)]\n"
        "if sys.argv[1] == 'decoded': images = [Image.new('RGB', (4000, 4000), (i, 0, 0)) for i in range(6)]\n"
        "def most(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "before = most()\n"
        "pictures = [open_picture(image, ImageOptions(max_tiles=1)) for image in images]\n"
        "print(most() - before)\n"
    )
    for kind, most in (("encoded", 60), ("decoded", 200)):
        done = subprocess.run([sys.executable, "-c", code, kind], capture_output=True, text=True, check=True)
        assert int(done.stdout) < most, kind


def test_two_pictures_over_one_file_object_do_not_disturb_each_other() -> None:
    file = encode(noise(300, 400), "PNG")
    expected = np.asarray(noise(300, 400))
    for _ in range(4):
        given = [Image.open(file) for _ in range(THREADS)]
        for pixels in in_threads(lambda index, given=given: rgb(given[index])):
            assert np.array_equal(pixels, expected)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP", "AVIF"])
@pytest.mark.parametrize("decode", [False, True], ids=["sought", "decoded before"])
def test_the_frame_at_which_a_picture_stands_is_read_and_it_stays_there(kind: str, decode: bool) -> None:
    levels = [20, 90, 160, 230]
    frames = [Image.new("RGB", (64, 48), (level, 255 - level, level)) for level in levels]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    file = encode(frames[0], kind, save_all=True, append_images=frames[1:], **lossless)
    for index, level in enumerate(levels):
        given = Image.open(file)
        if decode:
            given.load()
        given.seek(index)
        for pixels in in_threads(lambda _, given=given: rgb(given)):
            assert np.abs(pixels[20, 20].astype(int) - (level, 255 - level, level)).max() < 8
        assert given.tell() == index
        given.seek(min(index + 1, 3))
        assert np.abs(np.asarray(given.convert("RGB"))[20, 20, 0].astype(int) - levels[min(index + 1, 3)]) < 8
    given = Image.open(file)
    seen = [rgb(frame)[20, 20, 0] for frame in ImageSequence.Iterator(given)]
    assert np.abs(np.array(seen, int) - levels).max() < 8


def test_a_draft_that_the_caller_asked_for_is_kept() -> None:
    file = encode(noise(300, 401), "JPEG")
    given, expected = Image.open(file), Image.open(io.BytesIO(file.getvalue()))
    for image in (given, expected):
        image.draft("L", (100, 100))
    pixels = rgb(given)
    assert pixels.shape == (150, 201, 3)
    assert np.array_equal(pixels, np.asarray(expected.convert("RGB")))


def test_pictures_in_memory_are_not_changed_and_not_shared() -> None:
    palette = noise(90, 90).quantize(16)
    palette.palette.dirty = 1  # Pillow writes the palette into the pixels when they are next used
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.open(encode(noise(40, 60), "PNG", exif=exif))
    turned.load()
    turned = turned.copy()
    options = ImageOptions(image_size=56, exif="apply")
    expected_palette = np.asarray(palette.copy().convert("RGB"))
    palette.palette.dirty = 1
    for pixels in in_threads(lambda _: rgb(palette)):
        assert np.array_equal(pixels, expected_palette)
    assert palette.palette.dirty == 1
    for opened in in_threads(lambda _: open_image(turned, options)):
        assert np.array_equal(
            np.asarray(opened.decode()), np.asarray(ImageOps.exif_transpose(noise(40, 60))).swapaxes(0, 1)[:, ::-1]
        )
    assert turned.size == (60, 40)
    assert turned._exif is None


def test_a_picture_is_copied_before_the_call_returns() -> None:
    given = noise(40, 60)
    opened = open_image(given, OPTIONS)
    given.paste((0, 0, 0), (0, 0, 60, 40))
    assert np.array_equal(np.asarray(opened.decode()), np.asarray(noise(40, 60)))


@pytest.mark.parametrize("close", ["with", "close", "file"])
def test_a_picture_that_was_closed_is_refused_with_what_to_do(close: str) -> None:
    file = encode(noise(40, 60), "PNG")
    given = Image.open(file)
    if close == "with":
        with given:
            pass
    elif close == "close":
        given.close()
    else:
        file.close()
    with pytest.raises(MediaError, match=r"image \(PIL, mode RGB\) (was|is) closed.*pass .*path or"):
        open_image(given, OPTIONS)


def test_a_file_that_has_become_another_picture_is_refused() -> None:
    file = encode(noise(40, 60), "PNG")
    given = Image.open(file)
    file.seek(0)
    file.write(encode(noise(40, 60), "BMP").getvalue())
    with pytest.raises(MediaError, match="cannot be read again from its file: call its load"):
        open_image(given, OPTIONS)


def test_a_slow_file_holds_up_its_own_picture_only() -> None:
    class Slow(io.BytesIO):
        entered, release = threading.Event(), threading.Event()

        def seek(self, *args: int) -> int:
            if self.slow:
                self.entered.set()
                assert self.release.wait(10)
            return super().seek(*args)

    file = Slow(encode(noise(40, 60), "PNG").getvalue())
    file.slow = False
    slow, other = Image.open(file), Image.open(encode(noise(40, 60), "PNG"))
    file.slow = True
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(rgb, slow)
        assert file.entered.wait(10)
        rgb(other)
        assert not waiting.done()
        file.release.set()
        assert np.array_equal(waiting.result(), np.asarray(noise(40, 60)))


# Requests


def messages(image: Image.Image) -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": image}, {"type": "text", "text": "Read the digits."}]
    return [{"role": "user", "content": parts}]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "BMP"])
def test_requests_at_once_with_one_undecoded_picture_all_read_it(kind: str) -> None:
    file = encode(digits(), kind, **({"lossless": True} if kind == "WEBP" else {}))
    params = SamplingParams(max_tokens=8)
    with Engine.from_pretrained("tiny", device="cpu", kv_cache_bytes=1 << 24) as engine:
        for _ in range(2):
            given = Image.open(file)
            assert [reply.text for reply in in_threads(lambda _, g=given: engine.chat(messages(g), params), 4)] == [
                "4719"
            ] * 4
            given = Image.open(file)
            visual = in_threads(lambda _, g=given: engine.encode_images([g])[0], 4)
            assert all(np.array_equal(each.numpy(), visual[0].numpy()) for each in visual)
    given = Image.open(file)
    tiles = in_threads(lambda _: compat.load_image(given, input_size=56), 4)
    assert all(np.array_equal(each, compat.load_image(digits(), input_size=56)) for each in tiles)
    assert given._im is None


def test_an_async_engine_reads_one_undecoded_picture_in_requests_at_once() -> None:
    import asyncio

    given = Image.open(encode(digits(), "PNG"))

    async def answers() -> list[str]:
        async with AsyncEngine.from_pretrained("tiny", device="cpu", kv_cache_bytes=1 << 24) as engine:
            calls = (engine.chat(messages(given), SamplingParams(max_tokens=8)) for _ in range(4))
            return [reply.text for reply in await asyncio.gather(*calls)]

    assert asyncio.run(answers()) == ["4719"] * 4

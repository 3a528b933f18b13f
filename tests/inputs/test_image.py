import base64
import io
import struct
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image, ImageFile

from internvl_rt.errors import MediaError, RequestError
from internvl_rt.inputs.image import ImageSource, open_image
from internvl_rt.inputs.tiles import ImageOptions

Pixels = npt.NDArray[np.uint8]
OFFICIAL = ImageOptions()


def noise(height: int, width: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(source: ImageSource, options: ImageOptions = OFFICIAL) -> Pixels:
    image = open_image(source, options).decode()
    assert image.mode == "RGB"
    return np.asarray(image)


def message(source: Any, options: ImageOptions = OFFICIAL) -> str:
    """Returns the error message, of one line, with which `source` is refused."""
    with pytest.raises(MediaError) as caught:
        open_image(source, options).decode()
    text = str(caught.value)
    assert "\n" not in text
    assert " object at " not in text
    return text


def png_of_size(width: int, height: int) -> bytes:
    """Returns a PNG file that ends after its header, which claims this size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + header
        + struct.pack(">I", zlib.crc32(header))
        + b"\0\0\0\x20IDAT"
    )


# Loading


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("1", "PNG"), ("L", "PNG"), ("LA", "PNG"), ("P", "GIF"), ("RGB", "BMP"), ("RGBA", "WEBP"), ("CMYK", "JPEG")],
)
def test_pictures_of_8_bits_are_converted_as_pillow_does(mode: str, kind: str) -> None:
    rgba = Image.fromarray(np.dstack([noise(9, 13), noise(9, 13, seed=1)[..., :1]]))
    data = encode(rgba.convert("RGB").convert(mode) if mode in ("1", "P", "CMYK") else rgba.convert(mode), kind)
    assert np.array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_transparency_is_dropped_or_laid_on_white() -> None:
    color, alpha = noise(600, 8), noise(600, 8, seed=1)[..., :1]
    data = encode(Image.fromarray(np.dstack([color, alpha])), "PNG")
    assert np.array_equal(pixels(data), color)
    opacity = alpha / 255
    on_white = color * opacity + 255 * (1 - opacity)
    assert np.abs(pixels(data, ImageOptions(alpha="white")) - on_white).max() <= 1  # Pillow rounds differently


def test_a_transparent_palette_entry_keeps_its_color_or_turns_white() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    data = encode(palette, "PNG", transparency=1)
    assert pixels(data).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    assert pixels(data, ImageOptions(alpha="white")).tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_16_bit_gray_is_scaled_and_not_saturated() -> None:
    gray = np.arange(0, 1 << 16, 257, dtype=np.uint16).reshape(16, 16)
    want = np.repeat((gray >> 8).astype(np.uint8)[..., None], 3, axis=2)
    for kind in ("PNG", "TIFF"):
        data = encode(Image.fromarray(gray), kind)
        assert Image.open(io.BytesIO(data)).mode == "I;16"
        assert np.array_equal(pixels(data), want)
    big_endian = Image.frombytes("I;16B", (16, 16), gray.astype(">u2").tobytes())
    assert np.array_equal(pixels(big_endian), want)


@pytest.mark.parametrize(
    ("values", "want"),
    [
        (np.array([[0, 7, 255]], np.int32), [0, 7, 255]),
        (np.array([[-5, 0x1234, 0xFFFF]], np.int32), [0, 0x12, 0xFF]),
        (np.array([[0x12345678, 0, 0x7FFFFFFF]], np.int32), [0x24, 0, 0xFF]),
        (np.array([[0.0, 100 / 255, 1.0]], np.float32), [0, 100, 255]),
        (np.array([[-1.0, 100.9, 255.0]], np.float32), [0, 100, 255]),
        (np.array([[np.nan, 0x1234, np.inf]], np.float32), [0, 0x12, 0]),
    ],
)
def test_32_bit_gray_takes_its_range_from_the_brightest_pixel(values: npt.NDArray[Any], want: list[int]) -> None:
    for source in (Image.fromarray(values), encode(Image.fromarray(values), "TIFF")):
        assert pixels(source)[0, :, 0].tolist() == want


def test_exif_orientation_is_ignored_unless_asked_for() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # viewers turn the picture clockwise by 90 degrees
    data = encode(Image.fromarray(noise(16, 24)), "JPEG", exif=exif)
    stored = pixels(data)
    assert stored.shape == (16, 24, 3)
    assert np.array_equal(pixels(data, ImageOptions(exif="apply")), np.rot90(stored, -1))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_several_is_taken(kind: str) -> None:
    first, second = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    red, _, blue = pixels(encode(first, kind, save_all=True, append_images=[second]))[4, 4]
    assert red > 200 > 50 > blue


def test_every_kind_of_source_gives_the_same_pixels(tmp_path: Path) -> None:
    array = noise(6, 10)
    data = encode(Image.fromarray(array), "PNG")
    path = tmp_path / "picture without extension"
    path.write_bytes(data)
    sources: list[ImageSource] = [
        path,
        str(path),
        data,
        "data:image/png;base64," + base64.b64encode(data).decode(),
        Image.open(path),
        array,
        np.ascontiguousarray(array[::-1])[::-1],
        torch.from_numpy(array),
        torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1))).permute(1, 2, 0),
    ]
    for source in sources:
        assert np.array_equal(pixels(source), array)


def test_torch_is_not_imported_to_read_a_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    open_image(noise(2, 2), OFFICIAL).decode()
    assert "torch" not in sys.modules


# Refusals


def test_damaged_and_foreign_files_are_refused_in_one_line(tmp_path: Path) -> None:
    picture = Image.fromarray(noise(64, 64))
    jpeg, png = encode(picture, "JPEG"), encode(picture, "PNG")
    text = tmp_path / "text.png"
    text.write_text("not a picture")
    empty = tmp_path / "empty.png"
    empty.touch()
    assert "is broken or truncated" in message(jpeg[: len(jpeg) // 2])
    assert f"image bytes ({len(png) // 2} bytes) is broken or truncated" in message(png[: len(png) // 2])
    assert "is broken or truncated" in message(png[:60] + bytes(20) + png[80:])
    assert "text.png' is not a readable JPEG, PNG," in message(text)
    assert "empty.png' is empty" in message(empty)
    assert "image bytes (0 bytes) is empty" in message(b"")
    assert "does not exist" in message(tmp_path / "missing.png")
    assert "does not exist" in message("a\0b" + "c" * 5000 + "\n")
    assert "is not a regular file" in message(str(tmp_path))
    assert "got int" in message(3)


def test_formats_off_the_list_are_refused() -> None:
    picture = Image.fromarray(noise(8, 8))
    for kind in ("JPEG2000", "EPS", "PPM", "ICO"):
        assert "is not a readable JPEG, PNG," in message(encode(picture, kind))


def test_urls_are_not_fetched() -> None:
    for url in ("http://host/a.png", "HTTPS://host/a.png", "file:///a.png", "s3://bucket/a.png"):
        assert "download it" in message(url)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("data:image/png,abc", "must have the form"),
        ("data:image/png;base64", "is empty"),
        ("DATA:;base64,iVBO@@@@Rw0K", "is not valid base64"),
        ("data:;base64,", "is empty"),
    ],
)
def test_bad_data_urls_are_refused(url: str, problem: str) -> None:
    assert f"image data URL ({len(url)} characters) {problem}" in message(url)


def test_arrays_and_tensors_must_be_uint8_height_width_3() -> None:
    arrays: list[npt.NDArray[Any]] = [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), np.uint8),
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ]
    for array in arrays:
        want = f"image array ({array.dtype} {list(array.shape)})"
        assert want in message(array)
        assert want in message(torch.from_numpy(array))


@pytest.mark.filterwarnings("ignore:Image size")
def test_size_is_checked_before_pixels_are_decoded() -> None:
    # These files end after their header, so decoding them would fail with another message.
    assert "9460x9459 pixels; at most 89478485 pixels" in message(png_of_size(9460, 9459))
    assert "65536x1 pixels; at most 65535 a side" in message(png_of_size(65536, 1))
    assert "make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS" in message(png_of_size(60000, 60000))
    assert "is broken or truncated" in message(png_of_size(9459, 9459))
    assert "5x4 pixels; at most 19 pixels" in message(noise(4, 5), ImageOptions(max_pixels=19))
    assert "make it smaller, or raise max_pixels" in message(noise(4, 5), ImageOptions(max_pixels=19))
    assert "make it smaller, or raise max_side" in message(noise(4, 5), ImageOptions(max_side=4))
    assert pixels(noise(4, 5), ImageOptions(max_pixels=20)).shape == (4, 5, 3)


def test_size_is_checked_before_arrays_and_lazy_images_take_memory() -> None:
    huge = np.broadcast_to(np.zeros(3, np.uint8), (1 << 20, 1 << 20, 3))  # 3 TiB, but all pixels share 3 bytes
    assert "1048576x1048576 pixels" in message(huge)
    assert "1048576x1048576 pixels" in message(torch.zeros(3, dtype=torch.uint8).expand(1 << 20, 1 << 20, 3))
    assert "8000x8000 pixels" in message(
        Image.open(io.BytesIO(png_of_size(8000, 8000))), ImageOptions(max_pixels=1 << 25)
    )


def test_a_warning_of_pillow_that_the_program_made_an_error_is_a_media_error() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "more pixels than Pillow accepts" in message(png_of_size(10000, 10000))


def test_settings_of_pillow_are_left_alone() -> None:
    before = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
    data = encode(Image.fromarray(noise(64, 64)), "JPEG")
    pixels(data, ImageOptions(max_pixels=1 << 30))
    message(data[:-500])
    assert (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS) == before == (False, 89478485)


@pytest.mark.parametrize(
    "values",
    [
        {"image_size": 0},
        {"image_size": 4096},
        {"max_tiles": 0},
        {"max_tiles": 129},
        {"max_tiles": 12.0},
        {"min_tiles": 0},
        {"min_tiles": 7, "max_tiles": 6},
        {"max_pixels": 0},
        {"max_side": 1 << 21},
        {"max_image_bytes": 0},
        {"max_decode_bytes": 1.5},
        {"max_decode_s": 0},
        {"max_decode_s": float("nan")},
        {"max_decode_s": "5"},
        {"exif": "maybe"},
        {"alpha": "black"},
    ],
)
def test_options_out_of_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=f"{next(iter(values))} must be"):
        ImageOptions(**values)

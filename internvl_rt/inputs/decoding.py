"""Decodes pictures with Pillow, once their sizes, and the time and memory that decoding takes, are known to be bounded.

PIL's global settings are left alone.
"""

import io
import struct
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from internvl_rt.errors import MediaError, TranslateErrors
from internvl_rt.inputs.jpeg_scans import WINDOW, jpeg_seconds, tiff_seconds
from internvl_rt.inputs.tiles import ImageOptions

# EPS, which starts ghostscript, JPEG 2000 and Pillow's rarely used decoders are left out.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")

# Pillow raises these on damaged files; most were seen when files of every format above were changed and cut.
_DAMAGED = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, EOFError),
    *(AssertionError, struct.error),
)

# Nanoseconds of one core for a pixel and for an encoded byte, and bytes of the decoder's own for a pixel. Measured with
# pictures of noise and of smooth areas of 2 to 16 megapixels on a server of 2024, and rounded up.
_COSTS = {
    "JPEG": (12, 30, 0),
    "MPO": (12, 30, 0),
    "PNG": (12, 10, 0),
    "WEBP": (25, 40, 14),
    "GIF": (15, 10, 0),
    "BMP": (6, 2, 0),
    "TIFF": (20, 10, 4),
    "AVIF": (25, 70, 12),
}
_OTHER_COST = (25, 70, 14)  # of a picture that the caller opened with another of Pillow's plugins

# Pillow's parsers read a few bytes at a time, in Python: segments of a JPEG, chunks of a PNG, blocks of a GIF, tags of
# a TIFF, runs of a BMP. Each read takes a microsecond or two. Photographs take under 1,000 reads to open, and 100,000
# to decode at the most (a PNG of 200 MB in chunks of 8 KiB).
_OPEN_READS = 20_000
_DECODE_READS = 500_000

_COMPRESSED_CHUNKS = (b"iCCP", b"zTXt", b"iTXt")  # of a PNG; Pillow decompresses each to as much as a megabyte
_MAX_COMPRESSED_CHUNKS = 100

_BAND_PIXELS = 1 << 18

_SEPARATE_FRAMES = ("TIFF", "MPO", "AVIF")  # a frame is decoded without those before it

_QUARTER_TURNS = (5, 6, 7, 8)
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class _CountedReads(io.BytesIO):
    """Encoded bytes that can be read a limited number of times, as each read is a step of a parser in Python."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self._name, self._limit = name, _OPEN_READS
        self._reads_left, self._bytes_left = _OPEN_READS, 8 * len(content) + (1 << 20)

    def allow(self, reads: int) -> None:
        self._limit = self._reads_left = reads

    def read(self, size: int | None = -1, /) -> bytes:
        part = super().read(size)
        self._reads_left -= 1
        self._bytes_left -= len(part)
        if self._reads_left < 0 or self._bytes_left < 0:
            raise MediaError(
                f"{self._name} is made of more than {self._limit} small pieces, or has pieces that overlap: save it "
                "anew, for example as PNG"
            )
        return part


def open_encoded(
    content: bytes,
    name: str,
    options: ImageOptions,
    *,
    formats: tuple[str, ...] | None = _FORMATS,
    frame: int = 0,
) -> Image.Image:
    """Reads the header of a picture and goes to a frame, after it has checked what decoding up to there takes.

    formats: those of Pillow that are tried; None is all. Raises MediaError.
    """
    scan_s = jpeg_seconds(content, name)
    if content[:4] == b"\x89PNG" and _count_compressed_chunks(content) > _MAX_COMPRESSED_CHUNKS:
        raise MediaError(
            f"{name} has more than {_MAX_COMPRESSED_CHUNKS} compressed chunks of metadata: save it anew without them"
        )
    stream = _CountedReads(content, name)
    with pillow_errors(name):
        image = Image.open(stream, formats=formats)
        num_frames = 1 if image.format in _SEPARATE_FRAMES else 1 + frame
        _check_decoding(image, num_frames, scan_s, content, name, options)
        stream.allow(_DECODE_READS)
        if frame:
            image.seek(frame)
            if image.format == "MPO":  # each of its frames is a JPEG
                scan_s = jpeg_seconds(content, name, image.tile[0][2])
            _check_decoding(image, 1, scan_s, content, name, options)
    return image


def upright_size(image: Image.Image, name: str, options: ImageOptions) -> tuple[int, int]:
    """Returns width and height of what `to_rgb` gives."""
    width, height = image.size
    if options.exif == "apply" and image.format != "TIFF":  # Pillow itself turns a TIFF, and its size says so
        with pillow_errors(name):
            if _orientation(image) in _QUARTER_TURNS:
                return height, width
    return width, height


def to_rgb(image: Image.Image, name: str, options: ImageOptions) -> Image.Image:
    """Decodes a picture that nobody else uses to mode RGB. Raises MediaError if it is broken."""
    with pillow_errors(name):
        image.load()
        turn = _TRANSPOSITIONS.get(_orientation(image)) if options.exif == "apply" else None
        if turn is not None:
            image = image.transpose(turn)
        if image.mode[0] in "IF":
            return _by_bands(image, partial(_scale, bits=_gray_bits(image)))
        if options.alpha == "white" and image.has_transparency_data:
            return _by_bands(image, _on_white)
        return image if image.mode == "RGB" else _by_bands(image, lambda band: band)


def _by_bands(image: Image.Image, change: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Changes a picture and converts it to RGB, some rows at a time: Pillow holds the interpreter lock meanwhile."""
    rgb = Image.new("RGB", image.size, None)
    for box in _bands(image):
        rgb.paste(change(image.crop(box)).convert("RGB"), box)
    return rgb


def _bands(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield 0, top, image.width, min(top + rows, image.height)


def _orientation(image: Image.Image) -> Any:
    return image.getexif().get(ExifTags.Base.Orientation)


def check_size(width: int, height: int, name: str, options: ImageOptions) -> None:
    """Raises MediaError for a picture without pixels or beyond the limits."""
    if min(width, height) < 1:
        raise MediaError(f"{name} has no pixels: {width}x{height}")
    if width * height > options.max_pixels:
        raise MediaError(
            f"{name} is {width}x{height} pixels; at most {options.max_pixels} pixels are allowed: make it smaller, or "
            "raise max_pixels"
        )
    if max(width, height) > options.max_side:
        raise MediaError(
            f"{name} is {width}x{height} pixels; at most {options.max_side} a side are allowed: make it smaller, or "
            "raise max_side"
        )


def pillow_errors(name: str) -> TranslateErrors:
    """Makes Pillow's errors one line; its own texts may hold object addresses and stay in `__cause__`."""
    return TranslateErrors(partial(_media_error, name))


def _media_error(name: str, error: BaseException) -> MediaError | None:
    if isinstance(error, UnidentifiedImageError):
        return MediaError(f"{name} is not a readable {', '.join(_FORMATS)} file: convert it to one of these")
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return MediaError(
            f"{name} has more pixels than Pillow accepts: make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS"
        )
    if isinstance(error, _DAMAGED):
        return MediaError(f"{name} is broken or truncated and cannot be decoded ({type(error).__name__})")
    return None


def _check_decoding(
    image: Image.Image, num_frames: int, scan_s: float, content: bytes, name: str, options: ImageOptions
) -> None:
    """Refuses what takes too long or too much memory to decode, as far as the header tells.

    num_frames: the frames up to the one that is wanted. scan_s: what the scans of a JPEG take.
    """
    check_size(*image.size, name, options)
    width, height = _decoded_size(image)
    check_size(width, height, f"{name}, with its tiles,", options)
    num_pixels = width * height
    pixel_ns, byte_ns, own_bytes = _COSTS.get(image.format or "", _OTHER_COST)
    seconds = scan_s + 1e-9 * (num_pixels * num_frames * pixel_ns + len(content) * byte_ns)
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tile and image.tile[0][0] == "libtiff":
        seconds += tiff_seconds(content, image.tag_v2.offset, name)
    if seconds > options.max_decode_s:
        raise MediaError(
            f"{name} would take about {seconds:.0f} s to decode; at most {options.max_decode_s:g} s are allowed: save "
            "it anew as PNG or baseline JPEG, make it smaller, or raise max_decode_s"
        )
    if image.info.get("progressive"):
        own_bytes = 2 * len(image.getbands())  # coefficients of all components are kept until the last scan
    sample_bytes = 4 if len(image.getbands()) > 1 else {"I;": 2, "I": 4, "F": 4}.get(image.mode[:2], 1)
    converted_bytes = 0 if image.mode == "RGB" else 8 if image.mode[0] in "IF" else 4
    resized_bytes = 7  # RGB, and what is between the two passes of canvas and thumbnail
    total = num_pixels * max(own_bytes + sample_bytes, sample_bytes + converted_bytes, resized_bytes)
    if total > options.max_decode_bytes:
        raise MediaError(
            f"{name} would take about {total >> 20} MiB to decode; at most {options.max_decode_bytes >> 20} MiB are "
            "allowed: make it smaller, save it anew as PNG or baseline JPEG, or raise max_decode_bytes"
        )


def _decoded_size(image: Image.Image) -> tuple[int, int]:
    """Returns the size of all that is decoded: whole tiles, where a TIFF is made of tiles."""
    tags = getattr(image, "tag_v2", None)
    width, height = image.size
    if tags is None or 322 not in tags or 323 not in tags:
        return width, height
    tile_width, tile_height = int(tags[322]), int(tags[323])
    if min(tile_width, tile_height) < 1:
        raise ValueError("tiles without pixels")
    return -(-width // tile_width) * tile_width, -(-height // tile_height) * tile_height


def _count_compressed_chunks(content: bytes) -> int:
    """Counts the names of such chunks in a PNG, or what looks like one."""
    return sum(
        content.count(name, start, start + WINDOW + len(name) - 1)  # a name may begin at the window's end
        for start in range(0, len(content), WINDOW)
        for name in _COMPRESSED_CHUNKS
    )


def _on_white(image: Image.Image) -> Image.Image:
    """Lays a picture with transparency on white."""
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)


def _gray_bits(image: Image.Image) -> int:
    """Returns how many bits the gray of mode I;16*, I or F has.

    I and F do not tell their range: it is the first of 1 (F only), 8, 16 and 31 bits that holds the brightest pixel.
    """
    if image.mode.startswith("I;16"):
        return 16
    brightest = max(_finite(np.asarray(image.crop(box))).max() for box in _bands(image))
    return next((bits for bits in ((8, 16) if image.mode == "I" else (0, 8, 16)) if brightest <= 1 << bits), 31)


def _finite(gray: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.nan_to_num(gray, posinf=0.0, neginf=0.0) if gray.dtype.kind == "f" else gray


def _scale(gray: Image.Image, bits: int) -> Image.Image:
    """Converts gray to mode L by dropping the low bits."""
    scaled = _finite(np.asarray(gray)) * np.float32(2.0 ** (8 - bits))
    return Image.fromarray(np.clip(scaled, 0, 255, out=scaled).astype(np.uint8))

"""Reads pictures from files, `data:` URLs, bytes and arrays, with limits that are checked before decoding.

The result is that of the official `load_image` (InternVL README.md). PIL's global settings are left alone.
"""

import base64
import io
import os
import re
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from internvl_rt.errors import MediaError, quoted
from internvl_rt.inputs.identity import content_digest
from internvl_rt.inputs.tiles import ImageOptions, choose_grid, tile_image

if TYPE_CHECKING:
    import torch

ImageSource: TypeAlias = "str | Path | bytes | Image.Image | npt.NDArray[np.uint8] | torch.Tensor"

# EPS, which starts ghostscript, JPEG 2000 and Pillow's rarely used decoders are left out.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")

# Bounds the buffer between the two resize passes, which is as wide as the canvas and as high as the picture.
_MAX_SIDE = 32_768

_MAX_ENCODED_BYTES = 1 << 29  # a file is read whole, to be hashed

# Pillow raises these on damaged files; most were seen when files of every format above were changed and cut.
_DAMAGED = (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, EOFError)


def open_media(source: str | Path | bytes, kind: str) -> tuple[BinaryIO, str]:
    """Opens a path, a `data:` URL or encoded bytes for reading.

    Returns the stream, at its start, and the name of the source for messages; `kind` ("image", "video") begins the
    name. Raises MediaError if the source is another kind of URL, not a readable file, not base64, or empty.
    """
    stream: BinaryIO
    if isinstance(source, bytes):
        name = f"{kind} bytes ({len(source)} bytes)"
        stream = io.BytesIO(source)
    elif isinstance(source, str) and source[:5].lower() == "data:":
        name = f"{kind} data URL ({len(source)} characters)"
        header, _, data = source.partition(",")
        if not header.lower().endswith(";base64"):
            raise MediaError(f"{name} must have the form data:<type>;base64,<data>, got {header[:60]!r}")
        try:
            stream = io.BytesIO(base64.b64decode(data, validate=True))
        except ValueError as error:
            raise MediaError(
                f"{name} is not valid base64: pass the encoded file without spaces or line ends"
            ) from error
    else:
        path = str(source)
        name = f"{kind} {quoted(path)}"
        stream = _open_file(path, name)
    if not stream.seek(0, os.SEEK_END):
        stream.close()
        raise MediaError(f"{name} is empty")
    stream.seek(0)
    return stream, name


def _open_file(path: str, name: str) -> BinaryIO:
    if re.match(r"[a-z][a-z0-9+.-]+:/", path, re.IGNORECASE):
        raise MediaError(f"{name} is a URL, which is not fetched: download it and pass the path or the bytes")
    if not os.path.isfile(path):
        raise MediaError(f"{name} {'is not a regular file' if os.path.exists(path) else 'does not exist'}")
    try:
        return open(path, "rb")
    except OSError as error:
        raise MediaError(f"{name} cannot be opened: {error.strerror}") from error


@dataclass(frozen=True, slots=True, eq=False)
class OpenImage:
    """A picture of known size and content. It is plain data: it decodes its content when it is asked for pixels.

    digest: 32 bytes over the encoded bytes (or else the pixels) and the options. Equal digests mean equal tiles.
    content: the encoded bytes, or pixels uint8 [height, width, 3] on any device; nobody else writes into either.
    """

    digest: bytes
    grid: tuple[int, int]  # columns and rows of tiles
    content: "bytes | npt.NDArray[np.uint8] | torch.Tensor"
    name: str  # used in error messages
    options: ImageOptions

    @property
    def thumbnail(self) -> bool:
        """Whether the whole picture is one more tile."""
        return self.options.thumbnail and self.grid != (1, 1)

    @property
    def num_tiles(self) -> int:
        return self.grid[0] * self.grid[1] + self.thumbnail

    def decode(self) -> Image.Image:
        """Returns mode RGB, not to be written into. Raises MediaError for an encoded picture that is broken."""
        if isinstance(self.content, bytes):
            stream = io.BytesIO(self.content)
            return _to_rgb(_open_encoded(stream, self.name, self.options), self.name, self.options)
        return Image.fromarray(_on_host(self.content))

    def pixels(self) -> "npt.NDArray[np.uint8] | torch.Tensor":
        """Returns uint8 [height, width, 3], on the device where the picture was given. Raises as `decode` does."""
        return np.array(self.decode()) if isinstance(self.content, bytes) else self.content

    def tiles(self) -> npt.NDArray[np.uint8]:
        """Cuts tiles by `tile_image`. Raises as `decode` does."""
        return tile_image(self.decode(), self.options)


def open_image(source: ImageSource, options: ImageOptions) -> OpenImage:
    """Reads and hashes a picture; decodes only the header of an encoded one.

    Its pixels are RGB, as the official `Image.open(file).convert("RGB")` gives them. EXIF orientation and ICC profiles
    are ignored and alpha is dropped unless the options say otherwise; an animation gives its first frame. Unlike in
    Pillow's conversion, gray of more than 8 bits is scaled, not saturated.

    source: path, `data:` URL, encoded bytes, PIL image, or uint8 array or tensor [height, width, 3]. Pixels are copied,
    on their device, so that the caller may change its own. Raises MediaError if the source cannot be read, or is too
    large; sizes are checked before decoding.
    """
    if not isinstance(source, str | Path | bytes):
        pixels: npt.NDArray[np.uint8] | torch.Tensor
        if isinstance(source, Image.Image):
            pixels = np.array(_to_rgb(source, f"image (PIL, mode {source.mode})", options))
        elif isinstance(array := _check_array(source, options), np.ndarray):
            pixels = np.array(array, order="C")
        else:
            pixels = array.detach().clone().contiguous()
        on_host = _on_host(pixels)
        height, width = on_host.shape[:2]
        digest = content_digest("pixels", f"{(width, height)} {options}", on_host.data)
        return OpenImage(digest, choose_grid(width, height, options), pixels, "image", options)
    stream, name = open_media(source, "image")
    with stream:
        if stream.seek(0, os.SEEK_END) > _MAX_ENCODED_BYTES:
            raise MediaError(f"{name} is larger than {_MAX_ENCODED_BYTES} bytes: make it smaller")
        stream.seek(0)
        content = stream.read()
    image = _open_encoded(io.BytesIO(content), name, options)
    width, height = image.size
    _check_size(width, height, name, options)
    if options.exif == "apply":
        with _pillow_errors(name, options):
            if image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8):  # a quarter turn
                width, height = height, width
    digest = content_digest("encoded", str(options), content)
    return OpenImage(digest, choose_grid(width, height, options), content, name, options)


def _open_encoded(stream: BinaryIO, name: str, options: ImageOptions) -> Image.Image:
    with _pillow_errors(name, options):
        return Image.open(stream, formats=_FORMATS)


def _check_array(array: Any, options: ImageOptions) -> Any:
    """Returns an array or tensor that was given as a picture. Raises MediaError if it cannot be one."""
    torch = sys.modules.get("torch")  # a tensor can only be given by a program that has imported torch
    if not isinstance(array, np.ndarray) and (torch is None or not isinstance(array, torch.Tensor)):
        raise MediaError(
            "an image must be a path, a data: URL, bytes, a PIL image, or a uint8 array or tensor "
            f"[height, width, 3], got {type(array).__name__}"
        )
    dtype, shape = str(array.dtype).removeprefix("torch."), tuple(array.shape)
    name = f"image array ({dtype} {list(shape)})"
    if not isinstance(array, np.ndarray) and (
        str(array.layout) != "torch.strided" or array.device.type not in ("cpu", "cuda")
    ):
        raise MediaError(f"{name} must be a dense tensor on the CPU or a CUDA device: convert it to one")
    if dtype != "uint8" or len(shape) != 3 or shape[2] != 3:
        raise MediaError(f"{name} must be uint8 [height, width, 3]")
    _check_size(shape[1], shape[0], name, options)
    return array


def _on_host(array: "npt.NDArray[np.uint8] | torch.Tensor") -> npt.NDArray[np.uint8]:
    """Returns an array as it is, a tensor as an array that shares its memory, or as a copy if it is on a GPU."""
    return array if isinstance(array, np.ndarray) else array.detach().cpu().numpy()


def _check_size(width: int, height: int, name: str, options: ImageOptions) -> None:
    if min(width, height) < 1:
        raise MediaError(f"{name} has no pixels: {width}x{height}")
    if width * height > options.max_pixels or max(width, height) > _MAX_SIDE:
        raise MediaError(
            f"{name} is {width}x{height} pixels; at most {options.max_pixels} pixels (max_pixels) and "
            f"{_MAX_SIDE} a side are allowed: make it smaller"
        )


def _to_rgb(image: Image.Image, name: str, options: ImageOptions) -> Image.Image:
    _check_size(*image.size, name, options)
    with _pillow_errors(name, options):
        if options.exif == "apply":
            image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":
            image = _to_8_bit(image)
        elif options.alpha == "white" and image.has_transparency_data:
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        if image.mode != "RGB":
            return image.convert("RGB")
        image.load()
        return image


@contextmanager
def _pillow_errors(name: str, options: ImageOptions) -> Iterator[None]:
    """Makes Pillow's errors one line; its own texts may hold object addresses and stay in `__cause__`."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise MediaError(f"{name} is not a readable {', '.join(_FORMATS)} file: convert it to one of these") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise MediaError(f"{name} has more pixels than Pillow accepts: keep it under {options.max_pixels}") from error
    except (*_DAMAGED, struct.error) as error:
        raise MediaError(f"{name} is broken or truncated and cannot be decoded ({type(error).__name__})") from error


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Converts gray of mode I;16*, I or F to mode L by dropping the low bits.

    I and F do not tell their range: it is the first of 1 (F only), 8, 16 and 31 bits that holds the brightest pixel.
    """
    gray = np.asarray(image)
    if image.mode == "F":
        gray = np.nan_to_num(gray, posinf=0.0, neginf=0.0)
    if image.mode.startswith("I;16"):
        bits = 16
    else:
        bits = next((bits for bits in ((8, 16) if image.mode == "I" else (0, 8, 16)) if gray.max() <= 1 << bits), 31)
    scaled = gray * np.float32(2.0 ** (8 - bits))
    return Image.fromarray(np.clip(scaled, 0, 255, out=scaled).astype(np.uint8))

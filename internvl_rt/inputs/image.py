"""Pictures in, uint8 tiles out: guarded decoding, the official tile grid, and a resize whose pass order is fixed.

Only this module and `video` import PIL, and PIL's global settings are left alone. The rules are those of the
official `load_image` and `dynamic_preprocess` (InternVL README.md and internvl_chat/internvl/train/dataset.py).
"""

import base64
import hashlib
import io
import os
import re
import struct
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from internvl_rt.errors import MediaError, RequestError

if TYPE_CHECKING:
    import torch

ImageSource: TypeAlias = "str | Path | bytes | Image.Image | npt.NDArray[np.uint8] | torch.Tensor"

# No EPS (starts ghostscript), no JPEG 2000 and none of Pillow's rarely used decoders.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")

# Bounds the buffer between the two resize passes, which is as wide as the canvas and as high as the picture.
_MAX_SIDE = 32_768

_MAX_ENCODED_BYTES = 1 << 29  # a file is read whole, to be hashed

# What Pillow raises on damaged files; most of it was seen when files of every format above were changed and cut.
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    EOFError,
    struct.error,
)


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """How pictures are read and cut. The defaults are the official ones.

    Raises:
        RequestError: a value is out of range.
    """

    image_size: int = 448  # side of a tile in pixels
    min_tiles: int = 1
    max_tiles: int = 12  # the thumbnail is not counted
    thumbnail: bool = True  # the whole picture as a last tile, if there is more than one
    exif: Literal["ignore", "apply"] = "ignore"
    alpha: Literal["drop", "white"] = "drop"
    max_pixels: int = 50_000_000  # larger pictures are refused before their pixels are decoded

    def __post_init__(self) -> None:
        limits = {"image_size": 2048, "max_tiles": 128, "min_tiles": self.max_tiles, "max_pixels": 1 << 30}
        for name, limit in limits.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= limit:
                raise RequestError(f"ImageOptions.{name} must be an integer from 1 to {limit}, got {value!r}")
        for name, choices in {"exif": ("ignore", "apply"), "alpha": ("drop", "white")}.items():
            if getattr(self, name) not in choices:
                raise RequestError(f"ImageOptions.{name} must be one of {choices}, got {getattr(self, name)!r}")


def open_media(source: str | Path | bytes, kind: str) -> tuple[BinaryIO, str]:
    """Open a path, a `data:` URL or encoded bytes for reading.

    Returns:
        The stream, at its start, and the name of the source for messages; `kind` ("image", "video") begins the name.

    Raises:
        MediaError: the source is another kind of URL, not a readable file, not base64, or empty.
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
        name = f"{kind} {path if len(path) <= 200 else path[:197] + '...'!r}"
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


def load_image(source: ImageSource, options: ImageOptions) -> Image.Image:
    """Read a picture as RGB, as the official `Image.open(file).convert("RGB")` does, within limits.

    EXIF orientation and ICC profiles are ignored and alpha is dropped unless the options say otherwise; of an
    animation the first frame is taken. Unlike Pillow's conversion, gray of more than 8 bits is scaled, not saturated.

    Args:
        source: path, `data:` URL, encoded bytes, PIL image, or uint8 array or tensor [height, width, 3].
        options: `exif`, `alpha` and `max_pixels` are used.

    Returns:
        A PIL image of mode RGB. It is `source` itself where that is one, so do not write into it.

    Raises:
        MediaError: the source cannot be read or decoded, or is too large; sizes are checked before decoding.
    """
    torch = sys.modules.get("torch")  # a tensor can only be given by a program that has imported torch
    if isinstance(source, np.ndarray) or (torch is not None and isinstance(source, torch.Tensor)):
        return _from_array(source, options)
    if isinstance(source, Image.Image):
        return _to_rgb(source, f"image (PIL, mode {source.mode})", options)
    if not isinstance(source, (str, Path, bytes)):
        raise MediaError(
            "an image must be a path, a data: URL, bytes, a PIL image, or a uint8 array or tensor "
            f"[height, width, 3], got {type(source).__name__}"
        )
    stream, name = open_media(source, "image")
    with stream:
        return _to_rgb(_open_encoded(stream, name, options), name, options)


@dataclass(frozen=True, slots=True)
class OpenImage:
    """A picture whose size and content are known, but whose pixels are decoded only when its tiles are asked for.

    digest: 32 bytes over the encoded bytes (or, where there are none, the pixels) and the options: pictures of equal
    digest have equal tiles.
    """

    digest: bytes
    grid: tuple[int, int]  # columns and rows of tiles
    thumbnail: bool  # whether the whole picture is one more tile
    _decode: Callable[[], Image.Image]
    _options: ImageOptions

    @property
    def num_tiles(self) -> int:
        return self.grid[0] * self.grid[1] + self.thumbnail

    def pixels(self) -> npt.NDArray[np.uint8]:
        """uint8 [height, width, 3]. Raises MediaError for a picture that turns out to be broken."""
        return np.array(self._decode())

    def tiles(self) -> npt.NDArray[np.uint8]:
        """As `tile_image`. Raises MediaError for a picture that turns out to be broken."""
        return tile_image(self._decode(), self._options)


def open_image(source: ImageSource, options: ImageOptions) -> OpenImage:
    """Reads and hashes a picture; of an encoded one only the header is decoded. Sources and errors: `load_image`."""
    if not isinstance(source, (str, Path, bytes)):
        image = load_image(source, options)
        digest = content_digest("pixels", f"{image.size} {options}", image.tobytes())
        return _open(digest, image.size, lambda: image, options)
    stream, name = open_media(source, "image")
    with stream:
        if stream.seek(0, os.SEEK_END) > _MAX_ENCODED_BYTES:
            raise MediaError(f"{name} is larger than {_MAX_ENCODED_BYTES} bytes: make it smaller")
        stream.seek(0)
        encoded = stream.read()
    image = _open_encoded(io.BytesIO(encoded), name, options)
    width, height = image.size
    _check_size(width, height, name, options)
    if options.exif == "apply":
        with _pillow_errors(name, options):
            if image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8):  # a quarter turn
                width, height = height, width
    digest = content_digest("encoded", str(options), encoded)
    return _open(digest, (width, height), lambda: _to_rgb(image, name, options), options)


def _open(digest: bytes, size: tuple[int, int], decode: Callable[[], Image.Image], options: ImageOptions) -> OpenImage:
    grid = choose_grid(*size, options)
    return OpenImage(digest, grid, num_tiles(*size, options) > grid[0] * grid[1], decode, options)


def content_digest(kind: str, details: str, content: bytes | memoryview) -> bytes:
    """SHA-256 of a picture's content and all that its tiles depend on besides; 32 bytes."""
    head = f"{kind} {details} ".encode()
    return hashlib.sha256(len(head).to_bytes(8, "little") + head + hashlib.sha256(content).digest()).digest()


def _open_encoded(stream: BinaryIO, name: str, options: ImageOptions) -> Image.Image:
    with _pillow_errors(name, options):
        return Image.open(stream, formats=_FORMATS)


def _from_array(array: Any, options: ImageOptions) -> Image.Image:
    dtype, shape = str(array.dtype).removeprefix("torch."), tuple(array.shape)
    name = f"image array ({dtype} {list(shape)})"
    if dtype != "uint8" or len(shape) != 3 or shape[2] != 3:
        raise MediaError(f"{name} must be uint8 [height, width, 3]")
    _check_size(shape[1], shape[0], name, options)
    return Image.fromarray(array if isinstance(array, np.ndarray) else array.detach().cpu().numpy())


def _check_size(width: int, height: int, name: str, options: ImageOptions) -> None:
    if min(width, height) < 1:
        raise MediaError(f"{name} has no pixels: {width}x{height}")
    if width * height > options.max_pixels or max(width, height) > _MAX_SIDE:
        raise MediaError(
            f"{name} is {width}x{height} pixels; at most {options.max_pixels} pixels (ImageOptions.max_pixels) and "
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
    """Pillow's errors as one line; its own texts may hold object addresses and stay behind `__cause__`."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise MediaError(f"{name} is not a readable {', '.join(_FORMATS)} file: convert it to one of these") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise MediaError(f"{name} has more pixels than Pillow accepts: keep it under {options.max_pixels}") from error
    except _DAMAGED as error:
        raise MediaError(f"{name} is broken or truncated and cannot be decoded ({type(error).__name__})") from error


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Gray of mode I;16*, I or F as mode L, by dropping the low bits.

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


@lru_cache
def _grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All (columns, rows) with min_tiles <= columns * rows <= max_tiles, by number of tiles, equal ones in set order.

    The official code sorts a set, so where two grids of the same size tie (only possible with min_tiles > 1) the order
    in which CPython walks that set decides. It depends on the order of insertion, hence the redundant outer loop.
    """
    grids = {
        (columns, rows)
        for side in range(min_tiles, max_tiles + 1)
        for columns in range(1, side + 1)
        for rows in range(1, side + 1)
        if min_tiles <= columns * rows <= max_tiles
    }
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def choose_grid(width: int, height: int, options: ImageOptions) -> tuple[int, int]:
    """The (columns, rows) whose aspect ratio is closest to width / height (official `find_closest_aspect_ratio`).

    On an exact tie the larger grid wins if the picture covers more than half of its pixels. All sizes at least 1.
    """
    aspect, area = width / height, width * height
    best, best_error = (1, 1), float("inf")
    for columns, rows in _grids(options.min_tiles, options.max_tiles):
        error = abs(aspect - columns / rows)
        fills = area > 0.5 * options.image_size**2 * columns * rows
        if error < best_error or (error == best_error and fills):
            best, best_error = (columns, rows), error
    return best


def num_tiles(width: int, height: int, options: ImageOptions) -> int:
    """Tiles of a picture of that size, the thumbnail included."""
    columns, rows = choose_grid(width, height, options)
    return columns * rows + (options.thumbnail and columns * rows > 1)


def tile_image(image: Image.Image, options: ImageOptions) -> npt.NDArray[np.uint8]:
    """Cut an RGB picture, stretched to its grid, into square tiles (official `dynamic_preprocess`).

    Returns:
        uint8 [num_tiles, image_size, image_size, 3], row by row; the thumbnail, if any, is the last one.
    """
    size = options.image_size
    columns, rows = choose_grid(*image.size, options)
    tiles = np.empty((num_tiles(*image.size, options), size, size, 3), np.uint8)
    with ThreadPoolExecutor(1) as pool:  # the two resizes run side by side: Pillow's passes release the GIL
        thumbnail = pool.submit(_resize, image, size, size) if len(tiles) > columns * rows else None
        canvas = np.asarray(_resize(image, columns * size, rows * size)).reshape(rows, size, columns, size, 3)
        tiles[: columns * rows].reshape(rows, columns, size, size, 3)[...] = canvas.swapaxes(1, 2)
        if thumbnail:
            tiles[-1] = np.asarray(thumbnail.result())
    return tiles


def _resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """Pillow's antialiased bicubic, horizontal pass first.

    In one call Pillow 13 starts with the vertical pass for some sizes, which rounds differently.
    """
    return image.resize((width, image.height), Image.Resampling.BICUBIC).resize(
        (width, height), Image.Resampling.BICUBIC
    )

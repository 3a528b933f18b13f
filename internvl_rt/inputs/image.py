"""Reads pictures from files, `data:` URLs, bytes, Pillow pictures and arrays.

The result is that of the official `load_image` (InternVL README.md).
"""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from internvl_rt.errors import MediaError
from internvl_rt.inputs.decoding import check_size, open_encoded, to_rgb, upright_size
from internvl_rt.inputs.foreign import ForeignArray, adopted
from internvl_rt.inputs.identity import content_digest
from internvl_rt.inputs.media import MediaSource, is_media_source, open_media
from internvl_rt.inputs.pil_picture import AsOpened, own_picture
from internvl_rt.inputs.tiles import ImageOptions, TileLayout, plan_tiles, tile_image

if TYPE_CHECKING:
    import torch

ImageSource: TypeAlias = "MediaSource | Image.Image | npt.NDArray[np.uint8] | torch.Tensor | ForeignArray"


LARGE_PIXELS = 1 << 24  # of a picture; they take 48 MiB


@dataclass(frozen=True, slots=True, eq=False)
class OpenImage:
    """A picture of known size and content. It is plain data: it decodes its content when it is asked for pixels.

    digest: 32 bytes over the encoded bytes (or else the pixels) and the options. Equal digests mean equal tiles.
    content: the encoded bytes, or pixels uint8 [height, width, 3] on any device; nobody else writes into either.
    as_opened: how a caller had opened the encoded bytes; None: as Pillow opens them by default.
    """

    digest: bytes
    layout: TileLayout
    content: "bytes | npt.NDArray[np.uint8] | torch.Tensor"
    name: str  # used in error messages
    options: ImageOptions
    as_opened: AsOpened | None = None

    @property
    def outweighs_tiles(self) -> bool:
        """Whether the picture holds so many pixels in the host's memory that its tiles are to be kept instead.

        Smaller pictures stay as they are: a GPU cuts their tiles faster.
        """
        if isinstance(self.content, bytes) or (not isinstance(self.content, np.ndarray) and self.content.is_cuda):
            return False
        return _outweighs_tiles(self.content, self.options)

    def decode(self) -> Image.Image:
        """Returns mode RGB, not to be written into. Raises MediaError for an encoded picture that is broken."""
        if isinstance(self.content, bytes):
            image = _open_header(self.content, self.name, self.options, self.as_opened)
            return to_rgb(image, self.name, self.options)
        return Image.fromarray(_on_host(self.content))

    def pixels(self) -> "npt.NDArray[np.uint8] | torch.Tensor":
        """Returns uint8 [height, width, 3], on the device where the picture was given, not to be written into.

        Raises as `decode` does.
        """
        return np.asarray(self.decode()) if isinstance(self.content, bytes) else self.content

    def tiles(self) -> npt.NDArray[np.uint8]:
        """Cuts tiles by `tile_image`. Raises as `decode` does."""
        return tile_image(self.decode(), self.options)


def open_image(source: ImageSource, options: ImageOptions) -> OpenImage:
    """Reads and hashes a picture; decodes only the header of an encoded one.

    Its pixels are RGB, as the official `Image.open(file).convert("RGB")` gives them. EXIF orientation and ICC profiles
    are ignored and alpha is dropped unless the options say otherwise; an animation gives its first frame. Unlike in
    Pillow's conversion, gray of more than 8 bits is scaled, not saturated.

    source: path, `data:` URL, encoded bytes, binary file object, PIL image, or uint8 array or tensor [height, width,
        3], of any library that speaks DLPack or has the CUDA array interface. Pixels are copied, on their device, so
        that the caller may change its own; not copied are those of an array that owns its memory, row by row, and is
        not writeable, where they outweigh their tiles, which are then to be cut at once. A PIL image or a file object
        is left as it is, and may be given to several threads at once; a PIL image that is not decoded yet is decoded
        when its tiles are cut, from its encoded bytes.

    Raises MediaError if the source cannot be read, or is beyond the limits of the options: sizes are checked before
    memory is taken, and what decoding takes is estimated before it begins.
    """
    if isinstance(source, Image.Image):
        name = f"image (PIL, mode {source.mode})"
        own = own_picture(source, name, options)
        if isinstance(own, Image.Image):
            return _open_pixels(np.asarray(to_rgb(own, name, options)), options)
        return _open_encoded(*own, name, options)
    if not is_media_source(source):
        return _open_pixels(_own_pixels(_check_array(source, options), options), options)
    stream, name = open_media(source, "image", options.max_image_bytes)
    with stream:
        content = stream.read(options.max_image_bytes)
    return _open_encoded(content, None, name, options)


def _open_encoded(content: bytes, as_opened: AsOpened | None, name: str, options: ImageOptions) -> OpenImage:
    image = _open_header(content, name, options, as_opened)
    layout = plan_tiles(*upright_size(image, name, options), options)
    digest = content_digest("encoded", f"{options}{as_opened or ''}", content)
    return OpenImage(digest, layout, content, name, options, as_opened)


def _open_header(content: bytes, name: str, options: ImageOptions, as_opened: AsOpened | None) -> Image.Image:
    return as_opened.open(content, name, options) if as_opened else open_encoded(content, name, options)


def _open_pixels(pixels: "npt.NDArray[np.uint8] | torch.Tensor", options: ImageOptions) -> OpenImage:
    on_host = _on_host(pixels)
    height, width = on_host.shape[:2]
    digest = content_digest("pixels", f"{(width, height)} {options}", on_host.data)
    return OpenImage(digest, plan_tiles(width, height, options), pixels, "image", options)


def _own_pixels(
    array: "npt.NDArray[np.uint8] | torch.Tensor", options: ImageOptions
) -> "npt.NDArray[np.uint8] | torch.Tensor":
    """Returns the pixels of an array or tensor, row by row, in memory that nobody writes into."""
    if not isinstance(array, np.ndarray):
        return array.detach().clone().contiguous()
    is_fixed = type(array) is np.ndarray and array.base is None and not array.flags.writeable
    if is_fixed and array.flags.c_contiguous and _outweighs_tiles(array, options):
        return array
    return np.array(array, order="C")


def _outweighs_tiles(pixels: "npt.NDArray[np.uint8] | torch.Tensor", options: ImageOptions) -> bool:
    height, width = pixels.shape[:2]
    return height * width > max(LARGE_PIXELS, plan_tiles(width, height, options).num_tiles * options.image_size**2)


def check_image_source(source: object, options: ImageOptions) -> None:
    """Raises MediaError for what is no picture: another type, or an array of another shape, dtype or size."""
    if not isinstance(source, Image.Image) and not is_media_source(source):
        _check_array(source, options)


def _check_array(array: Any, options: ImageOptions) -> Any:
    """Returns an array or tensor that was given as a picture. Raises MediaError if it cannot be one."""
    array = adopted(array)
    torch = sys.modules.get("torch")  # a tensor can only be given by a program that has imported torch
    if not isinstance(array, np.ndarray) and (torch is None or not isinstance(array, torch.Tensor)):
        raise MediaError(
            "an image must be a path, a data: URL, bytes, a binary file object, a PIL image, or a uint8 array or "
            f"tensor [height, width, 3], got {type(array).__name__}: convert it to one of these"
        )
    dtype, shape = str(array.dtype).removeprefix("torch."), tuple(array.shape)
    name = f"image array ({dtype} {list(shape)})"
    if not isinstance(array, np.ndarray) and (
        str(array.layout) != "torch.strided" or array.device.type not in ("cpu", "cuda")
    ):
        raise MediaError(f"{name} must be a dense tensor on the CPU or a CUDA device: convert it to one")
    if dtype != "uint8" or len(shape) != 3 or shape[2] != 3:
        raise MediaError(f"{name} must be uint8 [height, width, 3]")
    check_size(shape[1], shape[0], name, options)
    return array


def _on_host(array: "npt.NDArray[np.uint8] | torch.Tensor") -> npt.NDArray[np.uint8]:
    """Returns an array as it is, a tensor as an array that shares its memory, or as a copy if it is on a GPU."""
    return array if isinstance(array, np.ndarray) else array.detach().cpu().numpy()

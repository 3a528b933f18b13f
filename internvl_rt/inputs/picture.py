"""A picture and its place in a prompt; tiles and visual tokens that a caller has computed are checked here."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from internvl_rt.checkpoint.config import ModelConfig
from internvl_rt.errors import RequestError, not_finite
from internvl_rt.inputs.foreign import adopted
from internvl_rt.inputs.identity import content_digest
from internvl_rt.inputs.image import ImageSource, OpenImage, open_image
from internvl_rt.inputs.prompt import VisualSpan
from internvl_rt.inputs.tiles import ImageOptions, TileLayout

_FLOATS = ("float64", "float32", "float16", "bfloat16")
_NO_SPAN = VisualSpan(0, 0)


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Picture:
    """Plain data: nothing in it belongs to an engine. One of `image`, `tiles` and `visual_XD` is given.

    digest: 32 bytes. Pictures of equal digest have equal visual tokens.
    layout: the picture's size and grid; None of tiles and visual tokens that a caller has computed.
    span: the picture's visual tokens in the prompt; empty as long as there is no prompt.
    media_id: index, among the request's pictures and videos, of the one that it is, or is a frame of.
    compressed: whether each tile is compressed; None: that is not decided, or the model compresses none.
    num_saved: visual tokens fewer in the prompt than if no tile were compressed.
    """

    digest: bytes
    num_tiles: int  # thumbnail included
    image: OpenImage | None = None
    tiles: Tensor | None = None  # uint8 [I, S, S, 3], or normalised, in the model's dtype, [I, 3, S, S]
    visual_XD: Tensor | None = None  # visual tokens that were computed elsewhere, in the model's dtype
    layout: TileLayout | None = None
    span: VisualSpan = _NO_SPAN
    media_id: int = 0
    compressed: tuple[bool, ...] | None = None
    num_saved: int = 0

    @property
    def is_unseen(self) -> bool:
        """Whether the vision tower has not looked at it: there are no visual tokens, and nothing of them is decided."""
        return self.visual_XD is None and self.compressed is None

    @property
    def span_digest(self) -> bytes:
        """Names the visual tokens in the prompt, which depend on the tiles that are compressed."""
        if self.compressed is None:
            return self.digest
        return content_digest("compressed", "".join(map("01".__getitem__, self.compressed)), self.digest)

    def count_tokens(self, config: ModelConfig) -> int:
        """Counts the visual tokens in the prompt."""
        if self.visual_XD is not None:
            return len(self.visual_XD)
        return self.num_tiles * config.tokens_per_tile - self.num_saved


def open_picture(source: ImageSource, options: ImageOptions) -> Picture:
    """Opens a picture as `open_image` does. Raises MediaError.

    Of large pictures that are given as pixels, in the host's memory, only the tiles are kept.
    """
    image = open_image(source, options)
    num_tiles = image.layout.num_tiles
    if image.outweighs_tiles:
        return Picture(image.digest, num_tiles, tiles=torch.from_numpy(image.tiles()), layout=image.layout)
    return Picture(image.digest, num_tiles, image=image, layout=image.layout)


def count_tiles(tiles: object, config: ModelConfig) -> int:
    """Checks kind, dtype and shape of tiles as `picture_of_tiles` takes them. Raises RequestError."""
    size = config.vision.image_size
    number, shape = describe_array("pixel_values", tiles)
    one = (size, size, 3) if number == "uint8" else (3, size, size)
    if number not in ("uint8", *_FLOATS) or len(shape) != 4 or shape[1:] != one or not shape[0]:
        raise RequestError(
            f"pixel_values: expected at least one tile, normalised floating point [tiles, 3, {size}, {size}] or uint8 "
            f"[tiles, {size}, {size}, 3], got {number} {list(shape)}; load_image(..., input_size={size}) makes them"
        )
    return shape[0]


def picture_of_tiles(tiles: object, config: ModelConfig, dtype: torch.dtype, max_tokens: int) -> Picture:
    """Takes tiles as a tensor or array: uint8 [I, S, S, 3], or normalised floating point [I, 3, S, S].

    They are copied, the latter in `dtype`. Raises RequestError for anything else, for numbers that are not finite in
    `dtype`, and, before memory is taken, for more than `max_tokens` visual tokens.
    """
    _check_count("pixel_values", count_tiles(tiles, config) * config.least_tokens_per_tile, max_tokens)
    own = own_copy("pixel_values", tiles, dtype)
    return Picture(_tensor_digest("tiles", own), len(own), tiles=own)


def picture_of_visual_tokens(visual_XD: object, config: ModelConfig, dtype: torch.dtype, max_tokens: int) -> Picture:
    """Takes visual tokens [X, D] as a floating-point tensor or array, for example from `Engine.encode_images`.

    They are copied in `dtype`. Raises RequestError as `picture_of_tiles` does.
    """
    visual_XD = adopted(visual_XD)
    width, per_tile = config.decoder.hidden_size, config.least_tokens_per_tile
    number, shape = describe_array("image_embeds", visual_XD)
    if number not in _FLOATS or len(shape) != 2 or shape[1] != width or not shape[0] or shape[0] % per_tile:
        raise RequestError(
            f"image_embeds: expected floating-point numbers [tokens, {width}] with a multiple of {per_tile} tokens, "
            f"got {number} {list(shape)}; encode_images makes them"
        )
    _check_count("image_embeds", shape[0], max_tokens)
    own = own_copy("image_embeds", visual_XD, dtype)
    return Picture(_tensor_digest("visual", own), -(-len(own) // config.tokens_per_tile), visual_XD=own)


def describe_array(name: str, given: object) -> tuple[str, tuple[int, ...]]:
    """Returns the name of the dtype, and the shape, of a tensor or array whose memory can be read."""
    if isinstance(given, np.ndarray):
        foreign = given.dtype.isbuiltin == 2  # such as the bfloat16 of another package, which torch cannot read
        return f"{'foreign ' * foreign}{given.dtype.name}", given.shape
    if not isinstance(given, Tensor):
        raise RequestError(f"{name}: expected a tensor or an array, got {type(given).__name__}; convert it to one")
    kind = "nested" if given.is_nested else "quantised" if given.is_quantized else given.layout
    if kind != torch.strided or given.device.type not in ("cpu", "cuda"):
        raise RequestError(
            f"{name}: expected a dense tensor on the CPU or a CUDA device, got one of {given.dtype} on {given.device} "
            f"({kind}); convert it to one"
        )
    return str(given.dtype).removeprefix("torch."), tuple(given.shape)


def _check_count(name: str, num_tokens: int, max_tokens: int) -> None:
    if num_tokens > max_tokens:
        raise RequestError(
            f"{name}: they are {num_tokens:,} visual tokens, but only {max_tokens:,} fit; send fewer, or raise "
            "max_model_len"
        )


def own_copy(name: str, given: object, dtype: torch.dtype) -> Tensor:
    """Returns a copy of bytes, or of finite numbers in `dtype`; later the caller may change the given ones."""
    if isinstance(given, np.ndarray):
        given = torch.from_numpy(np.array(given, given.dtype.newbyteorder("="), order="C"))
    assert isinstance(given, Tensor)
    if given.dtype == torch.uint8:
        return given.detach().clone(memory_format=torch.contiguous_format)
    own = given.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
    if not torch.stack(own.aminmax()).isfinite().all():
        raise RequestError(f"{name}: numbers are {not_finite(dtype, 'send finite numbers')}")
    return own


def _tensor_digest(kind: str, tensor: Tensor) -> bytes:
    content = tensor.cpu().view(torch.uint8).numpy().data
    return content_digest(kind, f"{tensor.dtype} {tuple(tensor.shape)}", content)

"""Copies what a caller may change after a call whose messages another thread reads, perhaps seconds later.

Sizes are compared with the limits before anything is copied. What is invalid or too large is left as it is, since it is
refused, with a message that says why, when it is read.
"""

import io
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.lib.array_utils import byte_bounds
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray
from PIL import Image

from internvl_rt.errors import MediaError, RequestError
from internvl_rt.inputs.foreign import adopted
from internvl_rt.inputs.pil_picture import own_picture
from internvl_rt.inputs.tiles import ImageOptions
from internvl_rt.inputs.video import VideoLimits, choose_frame_indices

MAX_ITEMS = 100_000  # messages, parts and frames of one call
_NUM_KEYS = 8  # no valid message or part has more; these many more count as an item
_UNKNOWN = 1 << 62  # size of what cannot be copied, and is refused later
# Types alone are asked for, since isinstance would run code of a caller's own class.
_CONTAINERS = (dict, list, tuple, Mapping)  # in this order: to ask whether something is a Mapping is slow
_WRITABLE = (np.ndarray, torch.Tensor, bytearray, memoryview, io.BytesIO, Image.Image)
_MAX_DEPTH = 5  # of lists and mappings: messages, a message, its content, a part, the frames of a video

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class CopyLimits:
    """Beyond these nothing is copied."""

    images: ImageOptions
    videos: VideoLimits
    max_media: int  # pictures and frames of one call
    max_visual_bytes: int  # of a picture's visual tokens


def snapshot(given: T, limits: CopyLimits, name: str = "messages") -> T:
    """Returns messages, or a list of pictures, as they are now, whatever the caller changes later.

    Lists, mappings, arrays (other libraries' become tensors), tensors (on their device), bytearrays, memoryviews,
    BytesIO and Pillow pictures are copied; of a video that is given as frames only the chosen ones. A Pillow picture
    that was not decoded is copied as its encoded bytes, and left as it is if they come from something else than a file
    of the system or BytesIO. A copied array of pixels cannot be written into. Files are not read.

    name: key of the given ("image" for a list of pictures). Raises RequestError for more than MAX_ITEMS.
    """
    structure = _Structure(limits)
    own: T = structure.copy(given, name, 0)
    if len(structure.places) > limits.max_media:
        return own
    sizes = Counter[int]()  # of the frames of each video together
    for holder, key, kind in structure.places:
        sizes[id(holder)] += _num_bytes(holder[key]) if kind == "video" else 0
    copies: dict[tuple[int, str], tuple[Any, Any]] = {}  # with what was copied, which keeps its identity
    for holder, key, kind in structure.places:
        leaf = holder[key]
        known = copies.get((id(leaf), kind))
        most = _max_bytes(leaf, kind, limits)
        fits = _num_bytes(leaf) <= most and sizes[id(holder)] <= max(most, 3 * limits.videos.max_video_pixels)
        if known is None and fits:
            known = copies[id(leaf), kind] = leaf, _copy(leaf, limits)
        if known is not None:
            holder[key] = known[1]
    return own


class _Structure:
    """Copies lists and mappings, and notes where in the copies things stand that can be written into."""

    def __init__(self, limits: CopyLimits) -> None:
        self._limits, self._num_items = limits, 0
        self.places: list[tuple[Any, Any, str]] = []  # a list or dict, an index or key in it, and the name of the key

    def copy(self, value: Any, name: str, depth: int) -> Any:
        own: Any
        if depth == _MAX_DEPTH or not issubclass(type(value), _CONTAINERS):
            return value
        is_list = isinstance(value, list | tuple)
        self._num_items += len(value) if is_list else len(value) // _NUM_KEYS
        if self._num_items > MAX_ITEMS:
            raise RequestError(
                f"the call holds more than {MAX_ITEMS:,} messages, parts, pictures and frames, which cannot fit; send "
                "fewer"
            )
        own = list(value) if is_list else dict(value)
        if not is_list and "video" in own:
            self._choose_frames(own)
        items: Iterable[tuple[Any, Any]] = enumerate(own) if is_list else list(own.items())
        for key, each in items:
            if type(each) is str:  # most are, and this is the fastest question
                continue
            kind = name if is_list else key
            own[key] = self.copy(_adopted(each), kind, depth + 1)
            if issubclass(type(own[key]), _WRITABLE):
                self.places.append((own, key, kind))
        return own

    def _choose_frames(self, part: dict[str, Any]) -> None:
        """Replaces the frames of a video by those that `load_video` would choose."""
        frames: Any = part.get("video")
        number = part.get("num_frames")
        is_array = isinstance(frames, np.ndarray | torch.Tensor) and _num_bytes(frames) < _UNKNOWN and frames.ndim == 4
        if not (is_array or isinstance(frames, list | tuple)) or type(number) is not int or not len(frames):
            return
        if 1 <= number <= min(self._limits.max_media, self._limits.videos.max_video_frames):
            indices = choose_frame_indices(len(frames), 1.0, number)
            chosen = {index: frames[index] for index in indices}
            part["video"] = [chosen[index] for index in indices]
            del part["num_frames"]


def _adopted(value: Any) -> Any:
    """Returns another library's array as a tensor, to be copied like one. One that cannot be read is refused later."""
    with suppress(MediaError):
        return adopted(value)
    return value


def _num_bytes(leaf: Any) -> int:
    if isinstance(leaf, torch.Tensor):
        is_plain = leaf.layout == torch.strided and leaf.device.type in ("cpu", "cuda")
        is_plain = is_plain and not (leaf.is_nested or leaf.is_quantized)
        return leaf.numel() * leaf.element_size() if is_plain else _UNKNOWN
    if isinstance(leaf, Image.Image):
        return 3 * leaf.width * leaf.height
    if isinstance(leaf, io.BytesIO):
        return _UNKNOWN if leaf.closed else leaf.getbuffer().nbytes
    if isinstance(leaf, np.ndarray):
        return _UNKNOWN if leaf.dtype.hasobject else leaf.nbytes
    try:
        return memoryview(leaf).nbytes
    except ValueError:  # it was released
        return _UNKNOWN


def _max_bytes(leaf: Any, kind: str, limits: CopyLimits) -> int:
    if isinstance(leaf, bytearray | memoryview | io.BytesIO):
        return limits.videos.max_video_bytes if kind == "video" else limits.images.max_image_bytes
    if kind == "image_embeds":
        return limits.max_visual_bytes
    is_frames = kind == "video" and getattr(leaf, "ndim", 0) == 4
    return 3 * (limits.videos.max_video_pixels if is_frames else limits.images.max_pixels)


def _copy(leaf: Any, limits: CopyLimits) -> Any:
    if isinstance(leaf, bytearray | memoryview):
        return bytes(leaf)
    if isinstance(leaf, io.BytesIO):
        return io.BytesIO(leaf.getvalue())
    if isinstance(leaf, Image.Image):
        return _copy_picture(leaf, limits.images)
    if isinstance(leaf, torch.Tensor):
        if leaf.dtype != torch.uint8 or leaf.device.type != "cpu":
            return leaf.detach().clone(memory_format=torch.contiguous_format)
        leaf = leaf.detach().numpy()
    own = _copy_array(np.asarray(leaf))
    own.flags.writeable = False  # which tells later code that it needs no copy of its own
    return own


def _copy_array(array: NDArray[Any]) -> NDArray[Any]:
    """Copies an array: row by row, but bytes in another order, such as BGR read as RGB, as they lie in memory.

    To put them in order here would take ten times as long, and the caller, who may be an event loop, waits meanwhile.
    """
    low, high = byte_bounds(array)
    if array.flags.c_contiguous or array.dtype != np.uint8 or not 0 < high - low <= 2 * array.nbytes:
        return np.array(array, order="C")
    lowest = array[tuple(slice(None, None, -1 if stride < 0 else 1) for stride in array.strides)]
    memory = np.array(as_strided(lowest, (high - low,), (1,), writeable=False))
    return np.ndarray(array.shape, np.uint8, memory, array.ctypes.data - low, array.strides)


def _copy_picture(picture: Image.Image, options: ImageOptions) -> Image.Image:
    file, is_pending = getattr(picture, "fp", None), bool(getattr(picture, "tile", None))
    if is_pending and (picture.tell() or not isinstance(file, io.BytesIO | io.BufferedReader)):
        return picture  # to read it may take long: its bytes may come from a network, or earlier frames come first
    with suppress(MediaError):
        own = own_picture(picture, "image", options)
        if isinstance(own, Image.Image):
            return own.copy()  # it shares the caller's pixels
        content, as_opened = own
        return as_opened.open(content, "image", options)
    return picture

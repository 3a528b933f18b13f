"""The options of an engine: keyword arguments of `Engine.from_pretrained`, checked once."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import update_wrapper
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

import torch

from internvl_rt.checkpoint.config import ModelConfig
from internvl_rt.errors import RequestError, quoted
from internvl_rt.inputs.position import Delta
from internvl_rt.inputs.tiles import ImageOptions
from internvl_rt.inputs.video import VideoLimits
from internvl_rt.steps.kv_cache import BLOCK_SIZES

DEFAULT_VISUAL_CACHE_BYTES = 256 << 20  # about ten pictures of 13 tiles on the 8B
MAX_DRAFT_TOKENS = 15  # 16 rows with the token before them: the limit of matrix products for few rows

_IMAGES, _VIDEOS = ImageOptions(), VideoLimits()

P = ParamSpec("P")
C = TypeVar("C")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Options of an engine. Raises RequestError that names a value out of range.

    `device`, `dtype`, `backend`, `v2pe_delta` and `max_tiles` are checked when an engine is built.

    device: "cpu", "cuda" or "cuda:N"; "auto" is CUDA if there is a GPU.
    dtype: of weights and KV cache; "auto" is the checkpoint's on CUDA, and float32 on the CPU.
    revision: a branch, tag or commit of the hub's repository; None is its newest.
    max_model_len: most tokens of prompt and answer together; None is the trained window, or what the KV cache holds.
    kv_cache_bytes: size of the KV cache; None is what weights and workspaces leave, on the CPU at most 4 GiB
        (`Engine.memory` has the plan). The cache is never larger than `max_num_seqs` sequences can use.
    block_size: tokens of a block of the KV cache: 16, 32, 64 or 128.
    max_num_seqs: most sequences that run together.
    max_tokens_per_step: most tokens that one step computes.
    max_waiting: most requests that may wait until they run; more are refused.
    prefix_cache: whether prompts with a common prefix, pictures included, share its keys and values.
    visual_cache_bytes: memory for visual tokens of pictures that may come again.
    num_draft_tokens: most tokens guessed from the text so far and checked in one step; 0: none. The answer is the same.
    v2pe_delta: rotary positions per visual token: a power of two from 1 to 1/256, or "auto".
    max_tiles: most tiles per picture, the thumbnail not counted; None is the model's own limit (12).
    number_images: whether several pictures in one message are called "Image-1: " and so on; None is as in the model's
        own template: yes, and no in `-hf` folders.
    exif: whether a picture is turned as its EXIF orientation says ("apply") or not ("ignore"); "auto" is as in the code
        that the folder was made for: the official code ignores it, transformers, for `-hf` folders, applies it.
    alpha: whether transparency is dropped ("drop", as in the official code) or laid over white ("white").
    max_pixels: most pixels of a picture; the default is what Pillow opens without a warning, and takes 358 MB as RGB.
    max_side: most pixels of a picture's width and of its height.
    max_image_bytes: most encoded bytes of a picture.
    max_decode_bytes: most memory for decoding a picture, as estimated from its header.
    max_decode_s: most seconds of one core for decoding a picture, as estimated from its size, bytes and scans.
    max_video_bytes: most encoded bytes of a video.
    max_video_frames: most frames of a video that are decoded to reach the chosen ones.
    max_frame_pixels: most pixels of a frame of a video.
    max_video_pixels: most pixels of all chosen frames of a video together.
    seed: makes requests without a seed of their own reproducible, and seeds random weights (None is 0 there).
    backend: "triton" (kernels) or "torch" (the references that test the kernels); "auto" is triton on CUDA.
    cuda_graphs: whether the kernels of a step, and of a pass of the vision tower, are launched as one CUDA graph. The
        graphs are captured while the engine is built, which takes seconds before the first answer; no other thread may
        call `torch.cuda.synchronize` meanwhile. Without graphs the CPU launches each kernel, which is slower.
    programmatic_launch: whether a kernel of a decode step begins before the previous one has ended (from compute
        capability 9.0 on). This switch and `cuda_graphs` change how fast an answer comes, and not the answer: turn one
        off to see what it is worth, or whether it causes a fault.
    """

    device: str = "auto"
    dtype: str | torch.dtype = "auto"
    revision: str | None = None
    max_model_len: int | None = None
    kv_cache_bytes: int | None = None
    block_size: int = 64
    max_num_seqs: int = 64
    max_tokens_per_step: int = 8192
    max_waiting: int = 1024
    prefix_cache: bool = True
    visual_cache_bytes: int = DEFAULT_VISUAL_CACHE_BYTES
    num_draft_tokens: int = 0
    v2pe_delta: Delta = 1.0
    max_tiles: int | None = None
    number_images: bool | None = None
    exif: Literal["auto", "ignore", "apply"] = "auto"
    alpha: Literal["drop", "white"] = "drop"
    max_pixels: int = _IMAGES.max_pixels
    max_side: int = _IMAGES.max_side
    max_image_bytes: int = _IMAGES.max_image_bytes
    max_decode_bytes: int = _IMAGES.max_decode_bytes
    max_decode_s: float = _IMAGES.max_decode_s
    max_video_bytes: int = _VIDEOS.file_bytes
    max_video_frames: int = _VIDEOS.num_frames
    max_frame_pixels: int = _VIDEOS.frame_pixels
    max_video_pixels: int = _VIDEOS.total_pixels
    seed: int | None = None
    backend: str = "auto"
    cuda_graphs: bool = True
    programmatic_launch: bool = True

    def __post_init__(self) -> None:
        least = dict.fromkeys(("max_num_seqs", "max_tokens_per_step", "max_model_len"), 1)
        for name, number in (least | {"max_waiting": 0, "visual_cache_bytes": 0}).items():
            value = getattr(self, name)
            if value is not None and value < number:
                raise RequestError(f"{name} must be at least {number}, got {value}")
        for name in ("cuda_graphs", "programmatic_launch"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not 0 <= self.num_draft_tokens <= MAX_DRAFT_TOKENS:
            raise RequestError(f"num_draft_tokens must be from 0 to {MAX_DRAFT_TOKENS}, got {self.num_draft_tokens}")
        if self.block_size not in BLOCK_SIZES:
            raise RequestError(f"block_size must be one of {BLOCK_SIZES}, got {self.block_size}")
        if self.number_images is not None and not isinstance(self.number_images, bool):
            raise RequestError(f"number_images must be True, False or None, got {quoted(self.number_images)}")
        if not isinstance(self.exif, str) or self.exif not in ("auto", "ignore", "apply"):
            raise RequestError(f"exif must be auto, ignore or apply, got {quoted(self.exif)}")
        _ = self.videos, ImageOptions(**self._reading)

    def numbers_images(self, config: ModelConfig) -> bool:
        """Returns whether several pictures in one message are numbered in a model's prompts."""
        return config.format == "original" if self.number_images is None else self.number_images

    @property
    def _reading(self) -> dict[str, Any]:
        names = "alpha max_pixels max_side max_image_bytes max_decode_bytes max_decode_s".split()
        return {name: getattr(self, name) for name in names}

    @property
    def videos(self) -> VideoLimits:
        return VideoLimits(
            num_frames=self.max_video_frames,
            frame_pixels=self.max_frame_pixels,
            file_bytes=self.max_video_bytes,
            total_pixels=self.max_video_pixels,
        )

    def images(self, config: ModelConfig) -> ImageOptions:
        """Returns how pictures are read and cut into tiles for a model."""
        most = config.max_tiles if self.max_tiles is None else self.max_tiles
        return ImageOptions(
            image_size=config.vision.image_size,
            min_tiles=min(config.min_tiles, most),
            max_tiles=most,
            thumbnail=config.thumbnail,
            exif=self.exif if self.exif != "auto" else "apply" if config.format == "hf" else "ignore",
            **self._reading,
        )


def takes_options(
    options: Callable[P, EngineOptions],
) -> Callable[[Callable[[C, str | Path, EngineOptions], T]], Callable[Concatenate[C, str | Path, P], T]]:
    """Makes a function of (class, model, options) take keyword arguments, also for help() and type checkers."""

    def decorate(load: Callable[[C, str | Path, EngineOptions], T]) -> Callable[Concatenate[C, str | Path, P], T]:
        def loads(cls: C, model: str | Path, *args: P.args, **given: P.kwargs) -> T:
            return load(cls, model, options(*args, **given))

        update_wrapper(loads, load)
        own, keywords = inspect.signature(load), inspect.signature(options).parameters.values()
        parameters = [*list(own.parameters.values())[:2], *keywords]
        loads.__dict__["__signature__"] = own.replace(parameters=parameters)
        return loads  # type: ignore[return-value]  # a Concatenate cannot say that `model` may be named

    return decorate

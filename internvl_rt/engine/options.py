"""The options of an engine: keyword arguments of `Engine.from_pretrained`, checked once."""

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import update_wrapper
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

import torch

from internvl_rt.checkpoint.config import MAX_TILES, DecoderConfig, ModelConfig
from internvl_rt.inputs.position import DELTA, Delta
from internvl_rt.inputs.sampling_params import SamplingParams
from internvl_rt.inputs.tiles import READING_KINDS, ImageOptions
from internvl_rt.inputs.video import LIMIT_KINDS, VideoLimits
from internvl_rt.model.ops_triton import EXPERIMENTS
from internvl_rt.model.processor import runs_onednn
from internvl_rt.model.shard import MAX_RANKS, Shard
from internvl_rt.steps.cpu_threads import count_cores
from internvl_rt.steps.kv_cache import BLOCK_SIZES
from internvl_rt.values import Flag, Integer, Kind, Number, OneOf, OrNone, Several, Text, UnfitError, read_fields

DEFAULT_VISUAL_CACHE_BYTES = 256 << 20  # about ten pictures of 13 tiles on the 8B
TOKENS_PER_STEP = 8192
TOKENS_PER_TORCH_STEP = 512
ONE_SHOT = "one_shot_sums"  # an experiment, beside those of the kernels
MAX_DRAFT_TOKENS = 15  # 16 rows with the token before them: the limit of matrix products for few rows

_IMAGES, _VIDEOS = ImageOptions(), VideoLimits()

P = ParamSpec("P")
C = TypeVar("C")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Options of an engine. Raises RequestError that names a value out of range.

    A count, a size or a number may be numpy's; a bool is no number. Whether the device is there is checked when an
    engine is built.

    device: "cpu", "cuda" or "cuda:N"; "auto" is CUDA if there is a GPU.
    dtype: of weights and KV cache; "auto" is the checkpoint's on CUDA. On the CPU it is bfloat16 where the processor
        has instructions to multiply it (AMX or AVX512-BF16), and float32 elsewhere.
    quantization: to what the weights of a dense checkpoint's language model are rounded while they are loaded: "fp8" or
        "int8", with one scale for each output; None leaves a checkpoint as it is, dense or quantised. Embeddings and
        the output layer stay as they are.
    quantize_vision: whether `quantization` rounds the weights of the vision tower's layers as well.
    tensor_parallel_size: how many processes on this machine, each with a GPU of its own (from `device` on; on the CPU
        they share it), compute each layer of the language model together, of which each holds a part. Each holds the
        vision tower, and they share the tiles of a picture. `kv_cache_bytes` and `Engine.memory` are of one of them.
    expert_parallel: of a model with experts, whether each of these processes holds some experts whole, and not a part
        of every expert. Products are then larger, and GPUs less evenly busy, most of all in steps of few tokens.
    vision_processes: how many processes of their own have the vision tower, which the others then have not: pictures
        are encoded there, before the steps that need them, while the language model goes on. 0: there are none.
    vision_device: the device of the first vision process; the others have the GPUs that follow, or the same CPU. "auto"
        is the first GPU behind those of the language model, or the CPU with it.
    revision: a branch, tag or commit of the hub's repository; None is its newest.
    max_model_len: most tokens of prompt and answer together; None is the trained window, or what the KV cache holds.
    kv_cache_dtype: "fp8" or "int8": keys and values as numbers in 8 bits with a scale for each token and head, so that
        the cache has room for nearly twice as many tokens of 16 bits, and attention reads half as much; "fp8" needs
        compute capability 8.9 with the kernels. "model" is `dtype`; "auto" too, or what a quantised checkpoint has
        scales for.
    kv_cache_bytes: size of the KV cache; None is what weights and workspaces leave, on the CPU at most 4 GiB
        (`Engine.memory` has the plan). The cache is never larger than `max_num_seqs` sequences can use.
    block_size: tokens of a block of the KV cache: 16, 32, 64 or 128.
    max_num_seqs: most sequences that run together.
    max_tokens_per_step: most tokens that one step computes; None is 8192 with the kernels, and 512 on the CPU and with
        backend "torch", where a longer step would hold up all other requests and take much memory. There a step takes
        fewer of a prompt's tokens the more tokens are before them, because attention then takes longer than all else.
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
    max_decoded_video_pixels: most pixels of the frames that are decoded to reach the chosen ones. The default, 74
        minutes of 1080p at 30 frames a second, takes one core 3 minutes (smooth pictures) to 10 (8 Mbit a second); a
        deadline or a cancellation ends that early.
    seed: makes requests without a seed of their own reproducible, and seeds random weights (None is 0 there).
    backend: "triton" (kernels), "torch" (the references that test the kernels) or "onednn" (torch with what it has for
        CPUs, which need AVX2); "auto" is triton on CUDA, and onednn, or torch without AVX2, on the CPU.
    num_threads: threads that compute on the CPU. None is one for each free core: physical cores that this process may
        use and that no other program keeps busy, looked at several times a second; never more than torch would take,
        which OMP_NUM_THREADS and `torch.set_num_threads` set. Another number changes logits by rounding at most.
    cuda_graphs: whether the kernels of a step, and of a pass of the vision tower, are launched as one CUDA graph. No
        other thread may call `torch.cuda.synchronize` while one is captured. Without graphs the CPU launches each
        kernel, which is slower.
    capture_all: whether all CUDA graphs are captured while the engine is built, which takes seconds before the first
        answer. Otherwise those that a single user needs are, and another one when a step first needs it: that step then
        takes some tens of milliseconds longer. All kernels are built before the first answer in either case.
    programmatic_launch: whether a kernel of a decode step begins before the previous one has ended (from compute
        capability 9.0 on). This switch and `cuda_graphs` change how fast an answer comes, and not the answer: turn one
        off to see what it is worth, or whether it causes a fault.
    experiments: changes to a decode step that are off until a GPU has measured them: some of "prefetch_keys",
        "prefetch_weights", "early_trigger" and "tokens_to_host", which `model.ops_triton.Switches` explains, and
        "one_shot_sums", with which GPUs of one engine add up small tensors by reading each other's memory. They change
        how fast an answer comes, if at all, and not the answer.
    batch_invariant: whether an answer's logits are the same to the bit whatever else runs, alone or among others, in
        whatever chunks, its pictures included. Every product and attention then has one order of sums for any number of
        rows, which takes longer: a decode step of one sequence about twice as long. Needs the backend "triton"; with it
        `programmatic_launch` and `experiments` have no effect.
    """

    device: str = "auto"
    dtype: str | torch.dtype = "auto"
    quantization: Literal["fp8", "int8"] | None = None
    quantize_vision: bool = False
    tensor_parallel_size: int = 1
    expert_parallel: bool = False
    vision_processes: int = 0
    vision_device: str = "auto"
    revision: str | None = None
    max_model_len: int | None = None
    kv_cache_dtype: Literal["auto", "model", "fp8", "int8"] = "auto"
    kv_cache_bytes: int | None = None
    block_size: int = 64
    max_num_seqs: int = 64
    max_tokens_per_step: int | None = None
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
    max_video_bytes: int = _VIDEOS.max_video_bytes
    max_video_frames: int = _VIDEOS.max_video_frames
    max_frame_pixels: int = _VIDEOS.max_frame_pixels
    max_video_pixels: int = _VIDEOS.max_video_pixels
    max_decoded_video_pixels: int = _VIDEOS.max_decoded_video_pixels
    seed: int | None = None
    backend: str = "auto"
    num_threads: int | None = None
    cuda_graphs: bool = True
    capture_all: bool = False
    programmatic_launch: bool = True
    experiments: tuple[str, ...] = ()
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        for name in ("device", "vision_device"):
            if isinstance(getattr(self, name), torch.device):
                object.__setattr__(self, name, str(getattr(self, name)))
        read_fields(self, ENGINE_KINDS)

    def numbers_images(self, config: ModelConfig) -> bool:
        """Returns whether several pictures in one message are numbered in a model's prompts."""
        return config.format == "original" if self.number_images is None else self.number_images

    def shard(self, rank: int = 0, **more: Any) -> Shard:
        """Returns what a rank holds of the model. more: other fields of a `Shard`."""
        how = {"vision": self.vision_processes == 0, "by_expert": self.expert_parallel}
        return Shard(rank, self.tensor_parallel_size, **how | more)

    @property
    def max_draws(self) -> int:
        """Most tokens that a step draws."""
        return self.max_num_seqs * (1 + self.num_draft_tokens)

    @property
    def num_processes(self) -> int:
        """How many processes the engine consists of."""
        return self.tensor_parallel_size + self.vision_processes

    @property
    def threads_of_rank(self) -> int | None:
        """`num_threads` of each process: several share the cores of a CPU."""
        if self.num_threads is not None or self.num_processes == 1:
            return self.num_threads
        return max(1, int(count_cores() / self.num_processes))

    def choose_vision_device(self, device: torch.device) -> torch.device:
        """Returns the device of the first vision process. device: of the language model, or of its rank 0."""
        if self.vision_device != "auto":
            return torch.device(self.vision_device)
        if device.type != "cuda":
            return device
        return torch.device("cuda", (device.index or 0) + self.tensor_parallel_size)

    def tokens_per_step(self, device: torch.device) -> int:
        """Returns `max_tokens_per_step`, or its default for a device."""
        return self.max_tokens_per_step or (TOKENS_PER_TORCH_STEP if self.uses_torch(device) else TOKENS_PER_STEP)

    def double_cost_context(self, decoder: DecoderConfig, device: torch.device) -> float:
        """Returns behind how many tokens a prompt's token takes twice the time, if steps shall follow that, else inf.

        They do where the default of `max_tokens_per_step` follows the device. Products take 2 operations a weight,
        attention 4 a token, head and channel, on a CPU at half the rate: a step of 512 tokens of a 1B took 1.4 s at the
        start of a prompt and 11 s at its 32,000th token.
        """
        if self.max_tokens_per_step is not None or not self.uses_torch(device):
            return math.inf
        head_channels, kv_channels = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim
        mlp_channels = decoder.intermediate_size * (decoder.experts.num_chosen if decoder.experts else 1)
        num_weights = decoder.hidden_size * (2 * head_channels + 2 * kv_channels + 3 * mlp_channels)
        return num_weights / (4 * head_channels)

    def backend_on(self, device: torch.device) -> str:
        """Returns `backend`, or what "auto" is on a device."""
        if self.backend != "auto":
            return self.backend
        return "triton" if device.type == "cuda" else "onednn" if runs_onednn() else "torch"

    def uses_torch(self, device: torch.device) -> bool:
        """Says whether torch computes instead of the kernels."""
        return self.backend_on(device) != "triton"

    @property
    def videos(self) -> VideoLimits:
        """The limits of videos among these options."""
        return VideoLimits(**{name: getattr(self, name) for name in LIMIT_KINDS})

    def images(self, config: ModelConfig) -> ImageOptions:
        """Returns how pictures are read and cut into tiles for a model."""
        most = config.max_tiles if self.max_tiles is None else self.max_tiles
        return ImageOptions(
            image_size=config.vision.image_size,
            min_tiles=min(config.min_tiles, most),
            max_tiles=most,
            thumbnail=config.thumbnail,
            exif=self.exif if self.exif != "auto" else "apply" if config.format == "hf" else "ignore",
            **{name: getattr(self, name) for name in READING_KINDS},
        )


class _Device:
    """Names of devices. torch takes an index of three digits for another one: "cuda:999" is "cuda:-25"."""

    expected = "auto, cpu, cuda or cuda:N"

    def read(self, value: object) -> str:
        if not isinstance(value, str) or not re.fullmatch(r"auto|cpu|cuda(:(0|[1-9][0-9]?))?", value):
            raise UnfitError
        return str.__str__(value)


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_FLOAT_NAMES = tuple(str(dtype).removeprefix("torch.") for dtype in _FLOATS)
_MOST_BYTES = 1 << 50
ENGINE_KINDS: dict[str, Kind] = {
    "device": _Device(),
    "dtype": OneOf(("auto", *_FLOAT_NAMES, *_FLOATS), f"auto, {', '.join(_FLOAT_NAMES)} or the same torch dtype"),
    "quantization": OrNone(OneOf(("fp8", "int8"), "fp8 or int8")),
    "quantize_vision": Flag(),
    "tensor_parallel_size": Integer(1, MAX_RANKS),
    "expert_parallel": Flag(),
    "vision_processes": Integer(0, MAX_RANKS),
    "vision_device": _Device(),
    "revision": OrNone(Text(1, 256)),
    "max_model_len": OrNone(Integer(1, 1 << 24)),
    "kv_cache_dtype": OneOf(("auto", "model", "fp8", "int8"), "auto, model, fp8 or int8"),
    "kv_cache_bytes": OrNone(Integer(1, _MOST_BYTES)),
    "block_size": OneOf(BLOCK_SIZES),
    "max_num_seqs": Integer(1, 4096),
    "max_tokens_per_step": OrNone(Integer(1, 1 << 20)),
    "max_waiting": Integer(0, 1 << 20),
    "prefix_cache": Flag(),
    "visual_cache_bytes": Integer(0, _MOST_BYTES),
    "num_draft_tokens": Integer(0, MAX_DRAFT_TOKENS),
    "v2pe_delta": DELTA,
    "max_tiles": OrNone(Integer(1, MAX_TILES)),
    "number_images": OrNone(Flag()),
    "exif": OneOf(("auto", "ignore", "apply"), "auto, ignore or apply"),
    **READING_KINDS,
    **LIMIT_KINDS,
    "seed": OrNone(Integer(0, 2**64 - 1)),
    "backend": OneOf(("auto", "triton", "torch", "onednn"), "auto, triton, torch or onednn"),
    "num_threads": OrNone(Integer(1, 1024)),
    "cuda_graphs": Flag(),
    "capture_all": Flag(),
    "programmatic_launch": Flag(),
    "batch_invariant": Flag(),
    "experiments": Several(OneOf((*EXPERIMENTS, ONE_SHOT)), len(EXPERIMENTS) + 1),
}


def write_facts(model: str, options: EngineOptions, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Returns what other processes need to load parts of a model, for JSON; all that depends on a machine is chosen.

    model: a folder, or a name of random weights
    """
    chosen = replace(
        options,
        device=str(device),
        vision_device=str(options.choose_vision_device(device)),
        dtype=str(dtype).removeprefix("torch."),
        backend=options.backend_on(device),
        revision=None,
    )
    return {"model": model, "options": asdict(chosen)}


def read_facts(facts: dict[str, Any]) -> tuple[str, EngineOptions]:
    """Returns the model and the options of `write_facts`."""
    options = facts["options"]
    return facts["model"], EngineOptions(**{**options, "experiments": tuple(options["experiments"])})


class _Params:
    expected = "SamplingParams, such as SamplingParams(max_tokens=64), or None"

    def read(self, value: object) -> SamplingParams | None:
        if not isinstance(value, SamplingParams | None):
            raise UnfitError
        return value


# What calls of an engine take besides.
PARAMS = _Params()
TIMEOUT = OrNone(Number(0, 1_000_000_000, above=True))  # seconds
REQUEST_ID = OrNone(Text(0, 128, printable=True))


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

"""The engine: requests in, replies out, one step loop between them."""

import itertools
import secrets
from collections.abc import Iterator
from collections.abc import Sequence as Items
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from internvl_rt.checkpoint import open_checkpoint, resolve_model
from internvl_rt.config import ModelConfig, load_config
from internvl_rt.cuda_graph import DecodeGraphs, TileGraphs
from internvl_rt.errors import InternVLError, RequestError
from internvl_rt.image import OpenImage
from internvl_rt.kernels._launch import target_of
from internvl_rt.kv_cache import BLOCK_SIZES, KVCache
from internvl_rt.loop import Request, StepLoop
from internvl_rt.memory import MemoryPlan, plan_memory
from internvl_rt.model.internvl import InternVL, named_parameters
from internvl_rt.ops import TORCH, Ops
from internvl_rt.ops_triton import TRITON
from internvl_rt.prompt import Turn
from internvl_rt.reply import AnswerText, Piece, Reply
from internvl_rt.request import Delta, Prepared, Preparer
from internvl_rt.runner import MAX_TILES_PER_PASS, Runner
from internvl_rt.sampler import derive_seed
from internvl_rt.scheduler import Scheduler
from internvl_rt.sequence import SamplingParams
from internvl_rt.tokenizer import Tokenizer, load_tokenizer
from internvl_rt.weights import load_weights

Messages = Items[dict[str, Any]]


class Engine:
    """A model in memory that answers requests. Build one with `from_pretrained`.

    Methods may be called from several threads; whichever thread waits drives the shared step loop. All greedy and
    seeded output is independent of what else runs.
    """

    def __init__(
        self,
        model: InternVL,
        tokenizer: Tokenizer,
        cache: KVCache,
        memory: MemoryPlan,
        *,
        max_model_len: int,
        max_num_seqs: int,
        max_tokens_per_step: int,
        prefix_cache: bool,
        v2pe_delta: Delta,
        max_tiles: int | None,
        seed: int | None,
    ) -> None:
        self.config, self.tokenizer, self.device = model.config, tokenizer, model.device
        self.model, self.cache, self.memory = model, cache, memory
        self.max_model_len = max_model_len
        scheduler = Scheduler(cache, max_num_seqs=max_num_seqs, max_tokens_per_step=max_tokens_per_step)
        graphs: tuple[TileGraphs, DecodeGraphs] | tuple[()] = ()
        if model.device.type == "cuda" and model.ops is TRITON:
            with torch.inference_mode():
                graphs = (
                    TileGraphs(model.encode_tiles, model.config.vision.image_size, model.device),
                    DecodeGraphs(
                        partial(model.run_step, caches=cache.layers),
                        cache,
                        model.device,
                        max_num_seqs=max_num_seqs,
                        max_model_len=max_model_len,
                    ),
                )
        self._loop = StepLoop(scheduler, Runner(model, cache, *graphs))
        identity: dict[str, str | int] = {
            "model": repr(model.config),
            "dtype": str(model.dtype),
            "block_size": cache.block_size,
        }
        self._preparer = Preparer(
            model.config,
            tokenizer,
            max_model_len,
            max_tiles=max_tiles,
            v2pe_delta=v2pe_delta,
            cut=self._cut,
            identity=identity if prefix_cache else None,
            num_cached=self._loop.num_cached,
        )
        self._max_num_seqs = max_num_seqs
        self._seed = secrets.randbits(64) if seed is None else seed
        self._numbers = itertools.count()

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        revision: str | None = None,
        max_model_len: int | None = None,
        kv_cache_bytes: int | None = None,
        block_size: int = 64,
        max_num_seqs: int = 64,
        max_tokens_per_step: int = 8192,
        prefix_cache: bool = True,
        v2pe_delta: Delta = 1.0,
        max_tiles: int | None = None,
        seed: int | None = None,
        backend: str = "auto",
    ) -> "Engine":
        """Loads a checkpoint: a folder, a hub id, or "tiny", the one in the package.

        device: "auto" is CUDA where there is a GPU. dtype: "auto" is the checkpoint's on CUDA, float32 on the CPU.
        max_model_len: most tokens of prompt and answer together; by default the trained window, or less if the KV
        cache holds less. kv_cache_bytes: size of the cache; by default 4 GiB on the CPU, on CUDA what weights and
        workspaces leave (`memory` has the plan), and never more than `max_num_seqs` sequences can use. prefix_cache:
        prompts that begin alike, pictures included, share what was computed of their beginning. v2pe_delta: rotary
        positions per visual token, a power of two from 1 to 1/256, or "auto". max_tiles: tiles per picture, by default
        the model's own (12). seed: makes sampling without a seed of its own reproducible. backend: "triton", the
        kernels, or "torch", the references they are tested against; "auto" is triton on CUDA.

        Raises ConfigError, CheckpointError or RequestError (all ValueErrors).
        """
        counts = {"max_num_seqs": max_num_seqs, "max_tokens_per_step": max_tokens_per_step}
        counts |= {"max_model_len": 1 if max_model_len is None else max_model_len}
        for name, value in counts.items():
            if value < 1:
                raise RequestError(f"{name} must be at least 1, got {value}")
        if block_size not in BLOCK_SIZES:
            raise RequestError(f"block_size must be one of {BLOCK_SIZES}, got {block_size}")
        target = _choose_device(device)
        ops = _choose_ops(backend, target)
        folder = resolve_model(model, revision=revision)
        config = load_config(folder)
        tokenizer = load_tokenizer(folder)
        if tokenizer.vocab_size > config.decoder.vocab_size:
            raise RequestError(
                f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens but the model {config.decoder.vocab_size} "
                "embeddings; the folder mixes files of different models"
            )
        chosen = _choose_dtype(dtype, config, target)
        weights = load_weights(open_checkpoint(folder), config, dtype=chosen, device=target)
        memory = plan_memory(
            config,
            chosen,
            target,
            weight_bytes=sum(tensor.nbytes for tensor in named_parameters(weights).values()),
            block_size=block_size,
            kv_cache_bytes=kv_cache_bytes,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            max_tokens_per_step=max_tokens_per_step,
            max_tiles_per_pass=MAX_TILES_PER_PASS,
        )
        num_blocks = memory.num_blocks
        cache = KVCache(
            config.decoder,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=chosen,
            device=target,
            num_sms=target_of(target).num_sms if ops is TRITON else 0,
        )
        return cls(
            InternVL(config, weights, ops),
            tokenizer,
            cache,
            memory,
            max_model_len=max_model_len or min(config.decoder.max_position, num_blocks * block_size),
            max_num_seqs=max_num_seqs,
            max_tokens_per_step=max_tokens_per_step,
            prefix_cache=prefix_cache,
            v2pe_delta=v2pe_delta,
            max_tiles=max_tiles,
            seed=seed,
        )

    def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        v2pe_delta: Delta | None = None,
        cache_salt: str | None = None,
    ) -> Reply:
        """Answers the last user message of a conversation.

        messages: `{"role": "user", "content": ...}` and so on; content is a string or a list of parts
        `{"type": "text", "text": str}`, `{"type": "image", "image": path, bytes, data URL, PIL image, or uint8 array or
        tensor [h, w, 3]}`, `{"type": "video", "video": path or bytes}`. A conversation is sent whole each time.
        v2pe_delta overrides the engine's. cache_salt: only requests of equal salt share prefixes, so that no tenant can
        learn from its timings what another has asked. Raises RequestError or MediaError, and then nothing has changed.
        """
        return self.generate([messages], params, v2pe_delta=v2pe_delta, cache_salt=cache_salt)[0]

    def stream(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        v2pe_delta: Delta | None = None,
        cache_salt: str | None = None,
    ) -> Iterator[Piece]:
        """As `chat`, piece by piece as the text becomes certain; the last piece has the whole reply.

        Errors in the request are raised by this call; closing the iterator cancels the request.
        """
        return self._stream(self._preparer.prepare(messages, v2pe_delta, cache_salt), params or SamplingParams())

    def generate(
        self,
        batch: Items[Messages],
        params: SamplingParams | Items[SamplingParams] | None = None,
        *,
        v2pe_delta: Delta | None = None,
        cache_salt: str | None = None,
    ) -> list[Reply]:
        """Answers many conversations in one continuous batch; `params` is for all, or one for each.

        The first invalid request raises, naming its index, and cancels the rest.
        """
        each = [params or SamplingParams()] * len(batch) if not isinstance(params, Items) else list(params)
        if len(each) != len(batch):
            raise RequestError(f"params must be one for all or one for each of {len(batch)} requests, got {len(each)}")

        def prepared() -> Iterator[Prepared]:
            for index, messages in enumerate(batch):
                try:
                    yield self._preparer.prepare(messages, v2pe_delta, cache_salt)
                except InternVLError as error:
                    raise error if len(batch) == 1 else type(error)(f"request {index}: {error}") from error

        return self.generate_prepared(prepared(), each)

    def prepare_turns(self, turns: Items[Turn], tiles: Items[Tensor]) -> Prepared:
        """A prompt from rendered turns and the tiles of each of their pictures, for `generate_prepared`."""
        return self._preparer.prepare_turns(turns, tiles)

    def generate_prepared(self, prompts: Iterator[Prepared], params: Items[SamplingParams]) -> list[Reply]:
        """As `generate`, from prompts that were prepared elsewhere; they are taken as places become free."""
        requests: list[Request] = []
        try:
            for prompt, each in zip(prompts, params, strict=True):
                while len(running := [request for request in requests if not request.done]) >= self._max_num_seqs:
                    self._loop.advance(running[0])
                requests.append(self._submit(prompt, each))
            return [self._wait(request) for request in requests]
        finally:
            for request in requests:
                self._loop.cancel(request)

    def close(self) -> None:
        """Cancels what runs and refuses everything after; the memory goes with the last reference to the engine."""
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _cut(self, image: OpenImage) -> Tensor:
        """A picture's tiles, resized where the model runs; on the CPU Pillow does it, to the same bits."""
        if self.model.ops is not TRITON:
            return torch.from_numpy(image.tiles())
        pixels = torch.from_numpy(image.pixels()).to(self.device)
        size = self.config.vision.image_size
        return self.model.ops.resize_tiles(pixels, *image.grid, size, image.thumbnail)

    def _stream(self, prepared: Prepared, params: SamplingParams) -> Iterator[Piece]:
        request = self._submit(prepared, params)
        try:
            while request.reply is None:
                text = self._loop.advance(request)
                if text and request.reply is None:
                    yield Piece(text)
            yield Piece(text, request.reply)
        finally:
            self._loop.cancel(request)

    def _submit(self, prepared: Prepared, params: SamplingParams) -> Request:
        number = next(self._numbers)
        seed = params.seed if params.seed is not None else derive_seed(self._seed, number)
        sequence = self._preparer.sequence(number, prepared, params, seed)
        request = Request(sequence, AnswerText(self.tokenizer.stream(), params), prepared)
        self._loop.submit(request)
        return request

    def _wait(self, request: Request) -> Reply:
        while request.reply is None:
            self._loop.advance(request)
        return request.reply


def _choose_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise RequestError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}") from None
    if chosen.type not in ("cpu", "cuda"):
        raise RequestError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise RequestError(f"device {device!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return chosen


def _choose_ops(backend: str, device: torch.device) -> Ops:
    if backend not in ("auto", "triton", "torch"):
        raise RequestError(f"backend must be auto, triton or torch, got {backend!r}")
    if backend == "torch" or (backend == "auto" and device.type == "cpu"):
        return TORCH
    try:
        target_of(device)
    except ValueError as error:
        raise RequestError(f"backend {backend!r} cannot run here: {error}; choose 'torch'") from error
    return TRITON


def _choose_dtype(dtype: str | torch.dtype, config: ModelConfig, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        dtype = config.dtype if device.type == "cuda" else "float32"
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    for name, value in known.items():
        if dtype in (name, value):
            return value
    raise RequestError(f"dtype must be auto, {', '.join(known)} or the same torch dtype, got {dtype!r}")

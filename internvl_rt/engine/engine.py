"""The engine: requests in, replies out, one step loop between them."""

import itertools
import secrets
from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from tqdm import tqdm

from internvl_rt.engine.loading import load_parts
from internvl_rt.engine.loop import StepLoop
from internvl_rt.engine.memory import MemoryPlan
from internvl_rt.engine.options import DEFAULT_VISUAL_CACHE_BYTES, EngineOptions
from internvl_rt.engine.reply import AnswerText, Piece, Reply, Score, pieces_of
from internvl_rt.engine.request import Answer, Request
from internvl_rt.engine.trace import Trace
from internvl_rt.errors import InternVLError, RequestError
from internvl_rt.inputs.image import ImageSource, OpenImage
from internvl_rt.inputs.prepare import Delta, Prepared, Preparer
from internvl_rt.inputs.prompt import Turn
from internvl_rt.inputs.sampling_params import SamplingParams
from internvl_rt.inputs.tokenizer import Tokenizer
from internvl_rt.model.internvl import InternVL
from internvl_rt.model.work import roof_of
from internvl_rt.steps.device_stream import Arriving, DeviceStream, to_device
from internvl_rt.steps.kv_cache import KVCache
from internvl_rt.steps.runner import Runner
from internvl_rt.steps.sampler import derive_seed
from internvl_rt.steps.scheduler import Scheduler
from internvl_rt.steps.visual_cache import VisualCache

MAX_TILES_PER_STEP = 32  # encoded in front of a step: as many as the tokens of a full step have

SCORING = SamplingParams(max_tokens=1, prompt_logprobs=0)

Messages = Items[dict[str, Any]]


class Engine:
    """A model in memory that answers requests. Build one with `from_pretrained`.

    Methods may be called from several threads; whichever thread waits drives the shared step loop. What else
    runs changes greedy and seeded output by no more than rounding: products of other batch sizes sum in other orders.
    """

    def __init__(
        self, model: InternVL, tokenizer: Tokenizer, cache: KVCache, memory: MemoryPlan, options: EngineOptions
    ) -> None:
        self.config, self.tokenizer, self.device = model.config, tokenizer, model.device
        self.model, self.cache, self.memory, self.options = model, cache, memory, options
        self.roof = roof_of(model.device, model.dtype)  # what the device can do at most; None where it is not known
        self.visual_cache = VisualCache(options.visual_cache_bytes)
        room = min(model.config.decoder.max_position, cache.blocks.num_blocks * cache.block_size)
        self.max_model_len = options.max_model_len or room
        self._scheduler = Scheduler(
            cache,
            max_num_seqs=options.max_num_seqs,
            max_tokens_per_step=options.max_tokens_per_step,
            max_tiles_per_step=MAX_TILES_PER_STEP,
        )
        self._uploads = DeviceStream(model.device)  # so that pictures come to the device beside the step in flight
        max_draws = options.max_num_seqs * (1 + options.num_draft_tokens)
        self._runner = Runner(model, cache, self.visual_cache, max_draws=max_draws)
        on_gpu = model.device.type == "cuda"
        if on_gpu and options.cuda_graphs and model.ops.captures_graphs:
            self._runner.capture(
                max_num_seqs=options.max_num_seqs,
                max_model_len=self.max_model_len,
                max_tokens_per_step=options.max_tokens_per_step,
            )
        self._loop = StepLoop(
            self._scheduler,
            self._runner,
            max_requests=options.max_num_seqs + options.max_waiting,
            run_ahead=on_gpu,
        )
        identity: dict[str, str | int] = {
            "model": repr(model.config),
            "dtype": str(model.dtype),
            "block_size": cache.block_size,
        }
        self._preparer = Preparer(
            model.config,
            tokenizer,
            self.max_model_len,
            max_tiles=options.max_tiles,
            v2pe_delta=options.v2pe_delta,
            num_draft_tokens=options.num_draft_tokens,
            cut=self._cut,
            send=self._send,
            identity=identity if options.prefix_cache else None,
            num_cached=self._loop.num_cached,
            is_encoded=self.visual_cache.has,
        )
        self._seed = secrets.randbits(64) if options.seed is None else options.seed
        self._request_numbers, self._seq_ids = itertools.count(), itertools.count()

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
        max_waiting: int = 1024,
        prefix_cache: bool = True,
        visual_cache_bytes: int = DEFAULT_VISUAL_CACHE_BYTES,
        num_draft_tokens: int = 0,
        v2pe_delta: Delta = 1.0,
        max_tiles: int | None = None,
        seed: int | None = None,
        backend: str = "auto",
        cuda_graphs: bool = True,
        programmatic_launch: bool = True,
    ) -> "Engine":
        """Loads a checkpoint: a folder, a hub id, or "tiny", the one in the package.

        "random:InternVL3-8B", or "random:" before the path of a config.json, makes random weights of that shape where
        they are to be, without a file: for benchmarks.

        device: "auto" is CUDA where there is a GPU.
        dtype: "auto" is the checkpoint's on CUDA, float32 on the CPU.
        revision: of the hub's repository; by default its newest.
        max_model_len: most tokens of prompt and answer together; by default the trained window, or less if the KV cache
            holds less.
        kv_cache_bytes: size of the cache; by default 4 GiB on the CPU, on CUDA what weights and workspaces leave
            (`memory` has the plan), and never more than `max_num_seqs` sequences can use.
        block_size: tokens of a block of the cache: 16, 32, 64 or 128.
        max_num_seqs: most sequences that run together.
        max_tokens_per_step: most tokens that are computed together.
        max_waiting: how many requests may wait for a place among those that run; more are refused.
        prefix_cache: prompts that begin alike, pictures included, share what was computed of their beginning.
        visual_cache_bytes: for visual tokens of pictures that may come again.
        num_draft_tokens: tokens that are guessed from the text so far and checked together, which changes no answer; 0
            guesses nothing.
        v2pe_delta: rotary positions per visual token, a power of two from 1 to 1/256, or "auto".
        max_tiles: tiles per picture, by default the model's own (12).
        seed: makes sampling without a seed of its own reproducible, and chooses random weights (0 if None).
        backend: "triton", the kernels, or "torch", the references they are tested against; "auto" is triton on CUDA.
        cuda_graphs: whether the kernels of a step or of a pass of the vision tower are launched as one graph, on CUDA.
            Without, every kernel is launched by the CPU, which takes longer, but nothing is captured at the start.
        programmatic_launch: whether the kernels of a decode step begin before the one before them has ended (from
            compute capability 9.0 on). Both switches change how fast an answer comes, and not the answer: to turn one
            off tells whether it is to blame for a fault, and what it is worth.

        While an engine is being built with `cuda_graphs`, no other thread may call `torch.cuda.synchronize`.

        Raises ConfigError, CheckpointError or RequestError (all ValueErrors).
        """
        options = EngineOptions(
            device=device,
            dtype=dtype,
            max_model_len=max_model_len,
            kv_cache_bytes=kv_cache_bytes,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_tokens_per_step=max_tokens_per_step,
            max_waiting=max_waiting,
            prefix_cache=prefix_cache,
            visual_cache_bytes=visual_cache_bytes,
            num_draft_tokens=num_draft_tokens,
            v2pe_delta=v2pe_delta,
            max_tiles=max_tiles,
            seed=seed,
            backend=backend,
            cuda_graphs=cuda_graphs,
            programmatic_launch=programmatic_launch,
        )
        return cls(*load_parts(model, options, revision=revision), options)

    def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        v2pe_delta: Delta | None = None,
        cache_salt: str | None = None,
        timeout_s: float | None = None,
    ) -> Reply:
        """Answers the last user message of a conversation.

        messages: `{"role": "user", "content": ...}` and so on; content is a string or a list of parts
        `{"type": "text", "text": str}`, `{"type": "image", "image": path, bytes, data URL, PIL image, or uint8 array or
        tensor [h, w, 3]}`, `{"type": "video", "video": path or bytes}`, `{"type": "image_embeds", "image_embeds":
        visual tokens [X, D], as encode_images gives them}`. A conversation is sent whole each time.
        v2pe_delta overrides the engine's. cache_salt: only requests of equal salt share prefixes and visual tokens, so
        that no tenant can learn from its timings what another has asked. timeout_s: after so many seconds the answer
        ends where it is, with finish_reason "timeout".
        Raises RequestError or MediaError, and then nothing has changed.
        """
        return self.generate([messages], params, v2pe_delta=v2pe_delta, cache_salt=cache_salt, timeout_s=timeout_s)[0]

    def stream(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        v2pe_delta: Delta | None = None,
        cache_salt: str | None = None,
        timeout_s: float | None = None,
    ) -> Iterator[Piece]:
        """As `chat`, piece by piece as the text becomes certain; the last piece has the whole reply.

        Errors in the request are raised by this call; closing the iterator cancels the request.
        """
        prepared = self._preparer.prepare(messages, v2pe_delta, cache_salt)
        return self._stream(self.build_request(prepared, params or SamplingParams(), timeout_s))

    def generate(
        self,
        batch: Items[Messages],
        params: SamplingParams | Items[SamplingParams] | None = None,
        *,
        v2pe_delta: Delta | None = None,
        cache_salt: str | None = None,
        timeout_s: float | None = None,
        progress: bool = False,
    ) -> list[Reply]:
        """Answers many conversations in one continuous batch; `params` is for all, or one for each.

        The first invalid request raises, naming its index, and cancels the rest. timeout_s counts for each from when
        it is prepared. progress: shows a bar on stderr.
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

        return self.generate_prepared(prepared(), each, timeout_s=timeout_s, progress=progress)

    def score(
        self,
        messages: Messages,
        responses: Items[str],
        *,
        include_end: bool = False,
        v2pe_delta: Delta | None = None,
        cache_salt: str | None = None,
    ) -> list[Score]:
        """How likely the model finds each response to a conversation, token by token.

        include_end: the token that ends an answer counts as the response's last. Raises RequestError or MediaError.
        """
        scored = self.prepare_scores(messages, responses, include_end, v2pe_delta, cache_salt)
        replies = self.generate_prepared(iter(scored), [SCORING] * len(scored))
        return [build_score(prepared, reply) for prepared, reply in zip(scored, replies, strict=True)]

    def encode_images(self, images: Items[ImageSource], *, cache_salt: str | None = None) -> list[Tensor]:
        """Visual tokens [X, D] of each picture, on the engine's device; `image_embeds` parts take them.

        Raises RequestError or MediaError.
        """
        pictures = self._preparer.tiles_of(images)
        return [self._loop.encode(picture, cache_salt) for picture in pictures]

    def stats(self) -> dict[str, int | float]:
        """A snapshot of what the engine holds and has done so far; counts, tokens and bytes."""
        return self._loop.stats()

    @contextmanager
    def trace(self, path: str | Path) -> Iterator[None]:
        """Writes what the engine does inside the `with` block to a JSON file for Perfetto or chrome://tracing.

        The file grows by about 500 bytes a step and holds nothing of prompts and answers. A trace that fails on the
        way, as on a full disk, disturbs no request. Raises RequestError: at once where the file cannot be made,
        otherwise when the block ends.
        """
        with Trace(Path(path)) as trace:
            self._loop.set_trace(trace)
            try:
                yield
            finally:
                self._loop.set_trace(None)

    def prepare_turns(self, turns: Items[Turn], tiles: Items[Tensor]) -> Prepared:
        """A prompt from rendered turns and the tiles of each of their pictures, for `generate_prepared`."""
        return self._preparer.prepare_turns(turns, tiles)

    def prepare_scores(
        self, messages: Messages, responses: Items[str], include_end: bool, delta: Delta | None, salt: str | None
    ) -> list[Prepared]:
        """A prompt for each response, to be run with SCORING, from whose reply `build_score` reads the score."""
        prompt = self._preparer.prepare(messages, delta, salt)
        return [self._preparer.prepare_score(prompt, text, include_end=include_end) for text in responses]

    def generate_prepared(
        self,
        prompts: Iterator[Prepared],
        params: Items[SamplingParams],
        *,
        timeout_s: float | None = None,
        progress: bool = False,
    ) -> list[Reply]:
        """As `generate`, from prompts that were prepared elsewhere; they are taken as places become free."""
        requests: list[Request] = []
        unfinished: list[Request] = []
        with tqdm(total=len(params), unit="request", disable=not progress) as bar:

            def advance() -> None:
                self._loop.advance(unfinished[0])
                left = [request for request in unfinished if not request.done]
                bar.update(len(unfinished) - len(left))
                unfinished[:] = left

            try:
                for prompt, each in zip(prompts, params, strict=True):
                    while len(unfinished) >= self.options.max_num_seqs:
                        advance()
                    requests.append(self.build_request(prompt, each, timeout_s))
                    self._loop.submit(requests[-1])
                    unfinished.append(requests[-1])
                while unfinished:
                    advance()
                for request in requests:
                    self._loop.take(request)  # raises what made it fail
            finally:
                for request in unfinished:
                    self._loop.cancel(request)
        return [request.reply for request in requests if request.reply is not None]

    def build_request(self, prepared: Prepared, params: SamplingParams, timeout_s: float | None = None) -> Request:
        """A request that is not submitted yet. Raises RequestError."""
        if timeout_s is not None and not timeout_s > 0:
            raise RequestError(f"timeout_s must be above 0 or None, got {timeout_s!r}")
        if params.n > self.options.max_num_seqs:
            raise RequestError(
                f"n is {params.n}, but at most max_num_seqs = {self.options.max_num_seqs} answers run together; lower "
                "n or raise max_num_seqs"
            )
        number = next(self._request_numbers)
        seed = params.seed if params.seed is not None else derive_seed(self._seed, number)
        request = Request(prepared, deadline_s=None if timeout_s is None else prepared.start_s + timeout_s)
        for index, sequence in enumerate(self._preparer.sequences(prepared, params, seed, self._seq_ids)):
            request.answers.append(Answer(request, index, sequence, AnswerText(self.tokenizer.stream(), params)))
        return request

    def close(self) -> None:
        """Cancels what runs and refuses everything after; the memory goes with the last reference to the engine."""
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _cut(self, image: OpenImage) -> Arriving:
        """A picture's tiles, resized where the model runs; on the CPU Pillow does it, to the same bits."""
        if not self.model.ops.resizes_on_device:
            return self._send(torch.from_numpy(image.tiles()))
        pixels, size = torch.from_numpy(image.pixels()), self.config.vision.image_size
        with self._uploads.use():
            tiles = self.model.ops.resize_tiles(to_device(pixels, self.device), *image.grid, size, image.thumbnail)
            return Arriving.on_current_stream(tiles)

    def _send(self, tensor: Tensor) -> Arriving:
        """A tensor of the host on its way to the device; one that is on a GPU is what the caller's stream makes it."""
        if tensor.device.type != "cpu":
            return Arriving.on_current_stream(tensor)
        with self._uploads.use():
            return Arriving.on_current_stream(to_device(tensor, self.device))

    def _stream(self, request: Request) -> Iterator[Piece]:
        self._loop.submit(request)
        try:
            reply = None
            while reply is None:
                fresh = self._loop.advance(request)
                reply = request.reply
                yield from pieces_of(fresh, reply)
        finally:
            self._loop.cancel(request)


def build_score(prepared: Prepared, reply: Reply) -> Score:
    assert reply.prompt_logprobs is not None, "run with SCORING"
    return Score(reply.prompt_logprobs[prepared.score_from :])

"""The engine answers requests: it prepares them and submits them to the loop of steps."""

import math
import time
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Items
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Self

from torch import Tensor

from internvl_rt.engine.batch import run_batch
from internvl_rt.engine.failures import numbered
from internvl_rt.engine.loading import load_parts
from internvl_rt.engine.loop import StepLoop
from internvl_rt.engine.memory import MemoryPlan
from internvl_rt.engine.options import PARAMS, REQUEST_ID, TIMEOUT, EngineOptions, takes_options
from internvl_rt.engine.pictures import PictureLoader
from internvl_rt.engine.reply import AnswerText, Piece, Reply, Score, unprepared_reply
from internvl_rt.engine.request import Answer, Request
from internvl_rt.engine.scoring import SCORING, build_score, read_responses
from internvl_rt.engine.sequences import SequenceFactory
from internvl_rt.engine.trace import Trace
from internvl_rt.errors import ContextLengthError, InternVLError, RequestError, check_list, quoted
from internvl_rt.inputs.image import ImageSource
from internvl_rt.inputs.position import Delta
from internvl_rt.inputs.prepare import Prepared, Preparer, PromptDescription, PromptSource
from internvl_rt.inputs.proceed import LateError, Proceed, both, go_on, until
from internvl_rt.inputs.prompt import Turn
from internvl_rt.inputs.sampling_params import SamplingParams
from internvl_rt.inputs.tokenizer import Tokenizer
from internvl_rt.model.internvl import InternVL
from internvl_rt.model.work import roof_of
from internvl_rt.steps.kv_cache import KVCache
from internvl_rt.steps.runner import Runner
from internvl_rt.steps.scheduler import Scheduler
from internvl_rt.steps.uploads import Uploads
from internvl_rt.steps.visual_cache import VisualCache
from internvl_rt.values import Flag, read

MAX_TILES_PER_STEP = 32  # of 256 visual tokens: as many as a GPU's step computes by default; fewer in a shorter step


class Engine:
    """A model in memory that answers requests. Build one with `from_pretrained`.

    Any thread may call any method; a thread that waits for its reply runs steps, which serve all requests. Other
    requests change greedy and seeded output by rounding alone: products of another batch size sum in another order.

    `prepare`, `new_request` and the attributes `loop` and `runner` are for code that runs the steps itself, as
    `AsyncEngine` and the benchmarks do.
    """

    def __init__(
        self, model: InternVL, tokenizer: Tokenizer, cache: KVCache, memory: MemoryPlan, options: EngineOptions
    ) -> None:
        self.config, self.tokenizer, self.device = model.config, tokenizer, model.device
        self.model, self.cache, self.memory, self.options = model, cache, memory, options
        self.roof = roof_of(model.device, model.dtype)  # the device's peak rates; None if they are not known
        self.visual_cache = VisualCache(options.visual_cache_bytes)
        room = min(model.config.decoder.max_position, cache.blocks.num_blocks * cache.block_size)
        self.max_model_len = options.max_model_len or room
        self.max_tokens_per_step = options.tokens_per_step(model.device)
        scheduler = Scheduler(
            cache,
            max_num_seqs=options.max_num_seqs,
            max_tokens_per_step=self.max_tokens_per_step,
            max_tiles_per_step=min(MAX_TILES_PER_STEP, -(-self.max_tokens_per_step // model.config.tokens_per_tile)),
            double_cost_context=options.double_cost_context(model.config.decoder, model.device),
        )
        self._uploads = Uploads(model.ops, model.device)
        max_draws = options.max_num_seqs * (1 + options.num_draft_tokens)
        caches = cache, self.visual_cache
        self.runner = Runner(model, *caches, self._uploads, max_draws=max_draws, num_threads=options.num_threads)
        if memory.graph_bytes:
            self.runner.capture(
                max_num_seqs=options.max_num_seqs,
                max_model_len=self.max_model_len,
                max_tokens_per_step=self.max_tokens_per_step,
                everything=options.capture_all,
            )
        max_requests = options.max_num_seqs + options.max_waiting
        run_ahead = model.device.type == "cuda"
        self.loop = StepLoop(scheduler, self.runner, max_requests=max_requests, run_ahead=run_ahead)
        identity: dict[str, str | int] = {"model": repr(model.config), "dtype": str(model.dtype)}
        identity["block_size"] = cache.block_size
        self.preparer = Preparer(
            model.config,
            tokenizer,
            self.max_model_len,
            dtype=model.dtype,
            images=options.images(model.config),
            number_images=options.numbers_images(model.config),
            videos=options.videos,
            v2pe_delta=options.v2pe_delta,
            identity=identity if options.prefix_cache else None,
        )
        self.pictures = PictureLoader(self.loop, self.preparer, cache, self.visual_cache, self._uploads)
        self._sequences = SequenceFactory(model.config, tokenizer, options, self.max_model_len)

    @classmethod
    @takes_options(EngineOptions)
    def from_pretrained(cls, model: str | Path, options: EngineOptions) -> "Engine":
        """Loads a checkpoint: a folder, a hub id, or "tiny", the one in the package.

        "random:InternVL3-8B", or "random:" before the path of a config.json, makes random weights of that shape on the
        device, without a file, for benchmarks. `internvl_rt.EngineOptions` explains the keyword arguments.

        Raises ConfigError, CheckpointError or RequestError (all ValueErrors), TypeError for an unknown argument.
        """
        return cls(*load_parts(model, options), options)

    def chat(
        self,
        messages: PromptSource,
        params: SamplingParams | None = None,
        *,
        v2pe_delta: Delta | None = None,
        cache_salt: str | None = None,
        timeout_s: float | None = None,
        request_id: str | None = None,
    ) -> Reply:
        """Answers the last user message of a conversation.

        messages: the whole conversation, `[{"role": "user", "content": ...}, ...]`; content is a string or a list of
            parts `{"type": "text", "text": str}`, `{"type": "image", "image": path, bytes, data URL, file object, PIL
            image, or uint8 array or tensor [h, w, 3]}`, `{"type": "video", "video": path, bytes, data URL, file object,
            list of frames (each as an image), or uint8 array or tensor [n, h, w, 3]}`, `{"type": "image_embeds",
            "image_embeds": visual tokens [X, D], as encode_images gives them}`, or OpenAI's `{"type": "image_url",
            "image_url": {"url": data URL or path}}`. A picture takes "max_tiles" and OpenAI's "detail" ("low": one
            tile), a video "num_frames" and "bound" ([start, end] in seconds). A last message of the assistant is the
            beginning of the answer: the reply goes on where it stops, and holds the new text alone, as does a grammar.
            Or a `RawPrompt`, ids and tiles of a processor perhaps, which has no template: the text of the reply then
            keeps the whitespace around it.
        v2pe_delta: overrides the engine's.
        cache_salt: only requests of equal salt share prefixes and visual tokens, so that timings tell a tenant nothing.
        timeout_s: seconds after which the answer ends as far as it has come, with finish_reason "timeout". If they pass
            before the prompt is prepared, as with a long video, the answer is empty, and no tokens are counted.
        request_id: printable text of at most 128 characters, which the request's line in the log and in a trace shows.

        Raises RequestError or MediaError, and then nothing has changed; StepError if a fault or an interrupt of another
        thread ended the answer.
        """
        params = self.check_call(params, timeout_s, request_id)
        request = self._request((messages, v2pe_delta, cache_salt), params, timeout_s, request_id)
        return run_batch(self.loop, iter([request]), 1, max_running=1)[0]

    def stream(
        self,
        messages: PromptSource,
        params: SamplingParams | None = None,
        *,
        v2pe_delta: Delta | None = None,
        cache_salt: str | None = None,
        timeout_s: float | None = None,
        request_id: str | None = None,
    ) -> Iterator[Piece]:
        """Answers as `chat` does, in pieces, as the text becomes certain; the last piece has the whole reply.

        This call raises the errors in the request; closing the iterator cancels the request.
        """
        params = self.check_call(params, timeout_s, request_id)
        return self._stream(self._request((messages, v2pe_delta, cache_salt), params, timeout_s, request_id))

    def generate(
        self,
        batch: Items[PromptSource],
        params: SamplingParams | Items[SamplingParams] | None = None,
        *,
        v2pe_delta: Delta | None = None,
        cache_salt: str | None = None,
        timeout_s: float | None = None,
        progress: bool = False,
    ) -> list[Reply]:
        """Answers many conversations in one continuous batch; `params` is for all, or one for each.

        The first invalid request raises, naming its index, and cancels the rest. timeout_s: counted for each
        conversation from the start of its preparation. progress: shows a bar on stderr.
        """
        check_list("batch", batch, "conversations, each a list of messages")
        if any(isinstance(messages, Mapping) for messages in batch):
            raise RequestError("batch: expected a list of conversations, got one of messages; wrap it: [messages]")
        read("progress", progress, Flag())
        if isinstance(params, Items):
            each = [self.check_call(one, timeout_s) for one in params]
        else:
            each = [self.check_call(params, timeout_s)] * len(batch)
        if len(each) != len(batch):
            raise RequestError(f"params must be one for all or one for each of {len(batch)} requests, got {len(each)}")

        def requests() -> Iterator[Request | Reply]:
            for index, (messages, one) in enumerate(zip(batch, each, strict=True)):
                try:
                    yield self._request((messages, v2pe_delta, cache_salt), one, timeout_s)
                except InternVLError as error:
                    if len(batch) == 1:
                        raise
                    raise numbered(index, error) from error  # without a name here, whose frame would keep the engine

        return run_batch(self.loop, requests(), len(batch), max_running=self.options.max_num_seqs, progress=progress)

    def score(
        self,
        messages: PromptSource,
        responses: Items[str],
        *,
        include_end: bool = False,
        v2pe_delta: Delta | None = None,
        cache_salt: str | None = None,
    ) -> list[Score]:
        """Computes how likely the model finds each response to a conversation, token by token.

        responses: at most 10,000 texts that are not empty, of 67 million characters together. include_end: whether the
        end token counts as part of a response. Raises RequestError or MediaError.
        """
        responses, include_end = read_responses(responses), read("include_end", include_end, Flag())
        prompt = self.prepare(messages, v2pe_delta, cache_salt)
        prompts = (self.preparer.prepare_score(prompt, text, include_end=include_end) for text in responses)
        return [build_score(reply) for reply in self.generate_prepared(prompts, [SCORING] * len(responses))]

    def describe(self, messages: PromptSource) -> PromptDescription:
        """Returns the prompt's tokens, and the size and grid of each picture; makes no request.

        An encoded picture is not decoded; the frames of a video are. Raises RequestError or MediaError, as for a
        request.
        """
        self.loop.check()
        return self.preparer.describe(messages, self.loop.check)

    def encode_images(self, images: Items[ImageSource], *, cache_salt: str | None = None) -> list[Tensor]:
        """Computes visual tokens [X, D] of each picture on the engine's device, for `image_embeds` parts.

        Raises RequestError or MediaError.
        """
        return self.pictures.encode(images, cache_salt)

    def stats(self) -> dict[str, int | float]:
        """Counts what the engine holds now and what it has done so far: events, tokens and bytes."""
        return self.loop.stats()

    @contextmanager
    def trace(self, path: str | Path) -> Iterator[None]:
        """Writes what the engine does inside the `with` block to a JSON file for Perfetto or chrome://tracing.

        The file grows by about 500 bytes a step and holds nothing of prompts and answers. A trace that fails later, as
        on a full disk, disturbs no request. Raises RequestError if the file cannot be made, or at the end if it failed.
        """
        self.loop.check()
        if not isinstance(path, str | Path):
            raise RequestError(f"path must be a string or a Path, got {quoted(path)}")
        with Trace(Path(path)) as trace:
            self.loop.set_trace(trace)
            try:
                yield
            finally:
                self.loop.set_trace(None)

    def check_call(
        self, params: SamplingParams | None, timeout_s: float | None, request_id: str | None = None
    ) -> SamplingParams:
        """Returns the parameters of a call, before anything is prepared. Raises RequestError or EngineDeadError."""
        self.loop.check()
        read("timeout_s", timeout_s, TIMEOUT)
        read("request_id", request_id, REQUEST_ID)
        params = read("params", params, PARAMS) or SamplingParams()
        self._sequences.check(params)
        return params

    def prepare(
        self,
        messages: PromptSource,
        v2pe_delta: Delta | None = None,
        cache_salt: str | None = None,
        proceed: Proceed = go_on,
    ) -> Prepared:
        """Makes a prompt for `new_request` or `generate_prepared`, and starts the upload of its pictures.

        proceed: called before each picture is opened, and before it, or a frame of a video, is decoded; it may raise.
        Raises RequestError, also if the engine is closed meanwhile, or MediaError.
        """
        self.loop.check()
        proceed = both(self.loop.check, proceed)
        prepared = self.preparer.prepare(messages, v2pe_delta, cache_salt, proceed)
        start_s = time.perf_counter()
        self.pictures.load(prepared, proceed)
        return replace(prepared, tile_s=time.perf_counter() - start_s)

    def prepare_turns(self, turns: Items[Turn], tiles: Items[Tensor]) -> Prepared:
        """Makes a prompt as `prepare` does, from rendered turns and the tiles of each picture. Raises RequestError."""
        self.loop.check()
        prepared = self.preparer.prepare_turns(turns, tiles)
        self.pictures.load(prepared)
        return prepared

    def generate_prepared(
        self,
        prompts: Iterator[Prepared],
        params: Items[SamplingParams | None],
        *,
        timeout_s: float | None = None,
        progress: bool = False,
    ) -> list[Reply]:
        """Answers as `generate` does. Takes a prompt from `prompts` when fewer than `max_num_seqs` requests run."""
        requests = (self.new_request(prompt, each, timeout_s) for prompt, each in zip(prompts, params, strict=True))
        return run_batch(self.loop, requests, len(params), max_running=self.options.max_num_seqs, progress=progress)

    def new_request(
        self,
        prepared: Prepared,
        params: SamplingParams | None = None,
        timeout_s: float | None = None,
        request_id: str | None = None,
    ) -> Request:
        """Makes a request for `loop.submit`. Raises RequestError, or MediaError for a picture that is broken.

        A prompt may come from the `Preparer` of another engine, or process, if that has the same model and options.
        """
        if not isinstance(prepared, Prepared) or prepared.made_for != self.preparer.made_for:
            raise RequestError(
                "the prompt is for another model, dtype, block_size or prefix_cache; prepare it with this engine"
            )
        params = read("params", params, PARAMS) or SamplingParams()
        num_tokens = len(prepared.prompt.token_ids) + (prepared.score_from is None)
        if num_tokens > self.max_model_len:
            raise ContextLengthError(
                f"the prompt needs room for {num_tokens:,} tokens, but this engine has {self.max_model_len:,}; shorten "
                "it, or raise max_model_len"
            )
        self.pictures.load(prepared)  # does nothing for those that are loaded
        timeout_s = read("timeout_s", timeout_s, TIMEOUT)
        deadline_s = math.inf if timeout_s is None else prepared.start_s + timeout_s
        request = Request(prepared, deadline_s, read("request_id", request_id, REQUEST_ID))
        for sequence in self._sequences.make(prepared, params):
            stream = self.tokenizer.stream(skip_specials=params.skip_special_tokens, begun=prepared.begun)
            text = AnswerText(stream, params, begun=prepared.begun, strips=not prepared.raw)
            request.answers.append(Answer(sequence, text))
        return request

    def close(self) -> None:
        """Cancels all requests and refuses new ones; the memory is freed with the last reference to the engine."""
        self.loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _request(
        self,
        asked: tuple[PromptSource, Delta | None, str | None],
        params: SamplingParams,
        timeout_s: float | None,
        request_id: str | None = None,
    ) -> Request | Reply:
        """Prepares a request. Returns the reply to one whose time is over before it is prepared."""
        start_s = time.perf_counter()
        try:
            prepared = self.prepare(*asked, until(start_s + (timeout_s or math.inf)))
            return self.new_request(prepared, params, timeout_s, request_id)
        except LateError:
            return unprepared_reply(params, start_s)

    def _stream(self, request: Request | Reply) -> Iterator[Piece]:
        if isinstance(request, Reply):
            yield Piece("", request)
            return
        try:
            self.loop.submit(request)
            reply = None
            while reply is None:
                for piece in self.loop.advance(request):
                    reply = piece.reply
                    yield piece
        finally:
            self.loop.cancel(request)

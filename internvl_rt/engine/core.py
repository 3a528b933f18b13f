"""What an engine consists of, and how prompts become requests for the loop of steps."""

import math
import time
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import replace
from itertools import islice
from typing import Self

from torch import Tensor

from internvl_rt.engine.batch import as_completed, run_batch
from internvl_rt.engine.channel_text import ChannelText
from internvl_rt.engine.encoding import PictureEncoder
from internvl_rt.engine.flash import TileDecider
from internvl_rt.engine.loop import StepLoop
from internvl_rt.engine.memory import MemoryPlan
from internvl_rt.engine.options import PARAMS, REQUEST_ID, TIMEOUT, EngineOptions
from internvl_rt.engine.pictures import PictureLoader
from internvl_rt.engine.reply import AnswerText, Reply, Scored
from internvl_rt.engine.request import Answer, Request
from internvl_rt.engine.sequences import SequenceFactory
from internvl_rt.errors import ContextLengthError, RequestError
from internvl_rt.inputs.channels import Part
from internvl_rt.inputs.position import Delta
from internvl_rt.inputs.prepare import Prepared, Preparer, PromptSource
from internvl_rt.inputs.proceed import Proceed, both, go_on
from internvl_rt.inputs.prompt import Turn
from internvl_rt.inputs.sampling_params import SamplingParams
from internvl_rt.inputs.thinking import ThoughtReader
from internvl_rt.inputs.tokenizer import Tokenizer
from internvl_rt.model.internvl import InternVL
from internvl_rt.model.work import roof_of
from internvl_rt.steps.kv_cache import KVCache
from internvl_rt.steps.runner import Runner
from internvl_rt.steps.scheduler import Scheduler
from internvl_rt.steps.sequence import Sequence
from internvl_rt.steps.uploads import Uploads
from internvl_rt.steps.visual_cache import VisualCache
from internvl_rt.values import read

MAX_TILES_PER_STEP = 32  # of 256 visual tokens: as many as a GPU's step computes by default; fewer in a shorter step


class EngineCore:
    """The parts of an engine: model, tokenizer, caches and the loop of steps. `Engine` has the calls that use them.

    What is here, and the attributes `loop` and `runner`, is for code that runs the steps itself, as `AsyncEngine`, a
    critic and the benchmarks do.
    """

    def __init__(
        self, model: InternVL, tokenizer: Tokenizer, cache: KVCache, memory: MemoryPlan, options: EngineOptions
    ) -> None:
        self.config, self.tokenizer, self.device = model.config, tokenizer, model.device
        self.model, self.cache, self.memory, self.options = model, cache, memory, options
        self.roof = roof_of(model.device, model.dtype)  # the device's peak rates; None if they are not known
        self.visual_cache = VisualCache(options.visual_cache_bytes)
        room = min(model.config.decoder.max_position, cache.max_sequence_len)
        self.max_model_len = options.max_model_len or room
        self.max_tokens_per_step = options.tokens_per_step(model.device)
        scheduler = Scheduler(
            cache,
            max_num_seqs=options.max_num_seqs,
            max_tokens_per_step=self.max_tokens_per_step,
            max_tiles_per_step=min(MAX_TILES_PER_STEP, -(-self.max_tokens_per_step // model.config.tokens_per_tile)),
            double_cost_context=options.double_cost_context(model.config.decoder, model.device),
        )
        self._uploads = Uploads(model.ops, model.device, model.shard.tower)
        caches, num_threads = (cache, self.visual_cache), options.threads_of_rank
        self.runner = Runner(model, *caches, self._uploads, max_draws=options.max_draws, num_threads=num_threads)
        if memory.graph_bytes:
            self.runner.capture(
                max_num_seqs=options.max_num_seqs,
                max_model_len=self.max_model_len,
                max_tokens_per_step=self.max_tokens_per_step,
                everything=options.capture_all,
            )
        self.max_answers = scheduler.max_answers
        max_requests = options.max_num_seqs + options.max_waiting
        run_ahead = model.device.type == "cuda"
        self.loop = StepLoop(scheduler, self.runner, max_requests=max_requests, run_ahead=run_ahead)
        encoder = PictureEncoder(self.loop, self._uploads, self.visual_cache)
        identity: dict[str, str | int] = {"model": repr(model.config), "dtype": str(model.dtype)}
        identity |= {"block_size": cache.block_size, "kv_cache_dtype": str(cache.dtype)}
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
            decide=TileDecider(encoder, model).decide,
        )
        per_tile = model.config.tokens_per_tile
        self.pictures = PictureLoader(self.loop, encoder, self.preparer, cache, self.visual_cache, per_tile)
        self._sequences = SequenceFactory(model.config, tokenizer, options, self.max_model_len)

    def stats(self) -> dict[str, int | float]:
        """Counts what the engine holds now and what it has done so far: events, tokens and bytes."""
        return self.loop.stats()

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
        *,
        think: bool | None = False,
    ) -> Prepared:
        """Makes a prompt for `new_request` or `generate_prepared`, and starts the upload of its pictures.

        proceed: called before each picture is opened, and before it, or a frame of a video, is decoded; it may raise.
        Raises RequestError, also if the engine is closed meanwhile, or MediaError.
        """
        self.loop.check()
        proceed = both(self.loop.check, proceed)
        prepared = self.preparer.prepare(messages, v2pe_delta, cache_salt, proceed, think=think)
        start_s = time.perf_counter()
        self.pictures.load(prepared, proceed)
        return replace(prepared, tile_s=prepared.tile_s + time.perf_counter() - start_s)

    def prepare_turns(self, turns: Items[Turn], tiles: Items[Tensor]) -> Prepared:
        """Makes a prompt as `prepare` does, from rendered turns and the tiles of each picture. Raises RequestError."""
        self.loop.check()
        prepared = self.preparer.render(self.preparer.read_turns(turns, tiles))
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
        *,
        greedy_first: bool = False,
    ) -> Request:
        """Makes a request for `loop.submit`. Raises RequestError, or MediaError for a picture that is broken.

        A prompt may come from the `Preparer` of another engine, or process, if that has the same model and options.
        greedy_first: whether the first of several answers is greedy.
        """
        params = read("params", params, PARAMS) or SamplingParams()
        self._check_prompt(prepared, num_drawn=1)
        if params.grammar:
            prepared = self.preparer.begin_answer(prepared)
            self._check_prompt(prepared, num_drawn=1)
        self.pictures.load(prepared)  # does nothing for those that are loaded
        timeout_s = read("timeout_s", timeout_s, TIMEOUT)
        deadline_s = math.inf if timeout_s is None else prepared.start_s + timeout_s
        request = Request(prepared, deadline_s, read("request_id", request_id, REQUEST_ID))
        for sequence in self._sequences.make(prepared, params, greedy_first=greedy_first):
            request.answers.append(self._answer(sequence, prepared))
        return request

    def new_scoring(self, prompts: Items[Prepared]) -> Request:
        """Makes a request that scores the places of prompts; its reply has `scored`, of each prompt.

        What the prompts begin with alike is computed once. Raises what `new_request` raises.
        """
        for prepared in prompts:
            self._check_prompt(prepared, num_drawn=0)
        self.pictures.load(prompts[0])
        request = Request(prompts[0])
        beginning, sequences = self._sequences.make_scored(prompts)
        request.beginning = None if beginning is None else self._answer(beginning, prompts[0])
        request.answers += (self._answer(*pair) for pair in zip(sequences, prompts, strict=True))
        return request

    def run_scoring(self, prompts: Iterator[Prepared]) -> list[Scored]:
        """Scores the places of prompts that begin alike, a part of them after the other. Raises RequestError."""
        parts = iter(lambda: list(islice(prompts, self.max_answers)), [])
        replies = as_completed(self.loop, map(self.new_scoring, parts), max_running=1)
        return [scored for _, reply in replies for scored in reply.scored]

    def _answer(self, sequence: Sequence, prepared: Prepared) -> Answer:
        params, begun = sequence.params, prepared.begun

        def make(part: Part = "text") -> AnswerText:
            is_begun = begun and part == "text"
            stream = self.tokenizer.stream(skip_specials=params.skip_special_tokens, begun=is_begun)
            return AnswerText(stream, params, begun=is_begun, strips=not prepared.raw)

        channels = self.preparer.channels
        if channels is not None:
            reader = channels.reader(prepared.prompt.token_ids)
            return Answer(sequence, ChannelText(reader, make, whole=not params.skip_special_tokens))
        return Answer(sequence, make(), ThoughtReader(strips=params.grammar is None) if prepared.thinks else None)

    def _check_prompt(self, prepared: Prepared, num_drawn: int) -> None:
        """Refuses a prompt that is for another engine, or too long for it with the tokens that are drawn at least."""
        if not isinstance(prepared, Prepared) or prepared.made_for != self.preparer.made_for:
            raise RequestError(
                "the prompt is for another model, dtype, kv_cache_dtype, block_size or prefix_cache; prepare it with "
                "this engine"
            )
        assert (prepared.places is None) == (num_drawn > 0), "a prompt is scored or answered"
        if self.config.flash is not None and any(picture.is_unseen for picture in prepared.pictures):
            raise RequestError(
                "the prompt's pictures have tiles of which is not decided whether they are compressed; prepare it with "
                "this engine"
            )
        num_tokens = len(prepared.prompt.token_ids) + num_drawn
        if num_tokens > self.max_model_len:
            raise ContextLengthError(
                f"the prompt needs room for {num_tokens:,} tokens, but this engine has {self.max_model_len:,}; shorten "
                "it, or raise max_model_len"
            )

    def close(self) -> None:
        """Cancels all requests and refuses new ones; the memory is freed with the last reference to the engine."""
        self.loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

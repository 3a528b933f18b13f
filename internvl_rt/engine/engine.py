"""The engine answers requests: it prepares them and submits them to the loop of steps."""

import math
import time
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Items
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from torch import Tensor

from internvl_rt.engine.batch import as_completed, run_batch
from internvl_rt.engine.best_of import (
    Critic,
    Ranking,
    begin_judging,
    check_ranking,
    rank_answers,
    unprepared_ranking,
)
from internvl_rt.engine.core import EngineCore
from internvl_rt.engine.failures import numbered
from internvl_rt.engine.loading import load_parts
from internvl_rt.engine.options import EngineOptions, takes_options
from internvl_rt.engine.reply import Piece, Reply, Score, unprepared_reply
from internvl_rt.engine.request import Request
from internvl_rt.engine.scoring import score_conversations, score_places
from internvl_rt.engine.trace import Trace
from internvl_rt.engine.voting import MajorityVote
from internvl_rt.errors import InternVLError, RequestError, check_list, quoted
from internvl_rt.inputs.image import ImageSource
from internvl_rt.inputs.position import Delta
from internvl_rt.inputs.prepare import PromptDescription, PromptSource
from internvl_rt.inputs.proceed import LateError, until
from internvl_rt.inputs.sampling_params import SamplingParams
from internvl_rt.inputs.thinking import shall_think
from internvl_rt.steps.logprobs import TokenScores
from internvl_rt.values import Flag, read


class Engine(EngineCore):
    """A model in memory that answers requests. Build one with `from_pretrained`.

    Any thread may call any method; a thread that waits for its reply runs steps, which serve all requests. Other
    requests change greedy and seeded output by rounding alone: products of another batch size sum in another order.
    """

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
        think: bool | None = None,
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
        think: has the model reason before it answers, by the official system message in front of the conversation's
            own. What it thinks is the reply's `reasoning` and no part of its `text`; `params` are those of both: tokens
            of both count, a stop string ends either, and a grammar holds behind the reasoning. For InternVL3.5, whose
            cards advise a temperature of 0.6, and for models whose chat template asks for reasoning, by that. None: as
            the model does by default, which for all but Intern-S1 is not to.
        v2pe_delta: overrides the engine's.
        cache_salt: only requests of equal salt share prefixes and visual tokens, so that timings tell a tenant nothing.
        timeout_s: seconds after which the answer ends as far as it has come, with finish_reason "timeout". If they pass
            before the prompt is prepared, as with a long video, the answer is empty, and no tokens are counted.
        request_id: printable text of at most 128 characters, which the request's line in the log and in a trace shows.

        Raises RequestError or MediaError, and then nothing has changed; StepError if a fault or an interrupt of another
        thread ended the answer.
        """
        params = self.check_call(params, timeout_s, request_id)
        request = self._request((messages, v2pe_delta, cache_salt, think), params, timeout_s, request_id)
        return run_batch(self.loop, iter([request]), 1, max_running=1)[0]

    def stream(
        self,
        messages: PromptSource,
        params: SamplingParams | None = None,
        *,
        think: bool | None = None,
        v2pe_delta: Delta | None = None,
        cache_salt: str | None = None,
        timeout_s: float | None = None,
        request_id: str | None = None,
    ) -> Iterator[Piece]:
        """Answers as `chat` does, in pieces, as the text becomes certain; the last piece has the whole reply.

        This call raises the errors in the request; closing the iterator cancels the request.
        """
        params = self.check_call(params, timeout_s, request_id)
        return self._stream(self._request((messages, v2pe_delta, cache_salt, think), params, timeout_s, request_id))

    def generate(
        self,
        batch: Items[PromptSource],
        params: SamplingParams | Items[SamplingParams] | None = None,
        *,
        think: bool | None = None,
        v2pe_delta: Delta | None = None,
        cache_salt: str | None = None,
        timeout_s: float | None = None,
        progress: bool = False,
    ) -> list[Reply]:
        """Answers many conversations in one continuous batch; `params` is for all, or one for each.

        The first invalid request raises, naming its index, and cancels the rest. timeout_s: counted for each
        conversation from the start of its preparation. progress: shows a bar on stderr.
        """
        read("progress", progress, Flag())
        requests = self._requests(batch, params, (v2pe_delta, cache_salt, think), timeout_s)
        return run_batch(self.loop, requests, len(batch), max_running=self.options.max_num_seqs, progress=progress)

    def generate_as_completed(
        self,
        batch: Items[PromptSource],
        params: SamplingParams | Items[SamplingParams] | None = None,
        *,
        think: bool | None = None,
        v2pe_delta: Delta | None = None,
        cache_salt: str | None = None,
        timeout_s: float | None = None,
    ) -> Iterator[tuple[int, Reply]]:
        """Answers as `generate` does, but yields each reply as soon as it is there, with the index of its conversation.

        Closing the iterator cancels the rest.
        """
        requests = self._requests(batch, params, (v2pe_delta, cache_salt, think), timeout_s)
        return as_completed(self.loop, requests, max_running=self.options.max_num_seqs)

    def score(
        self,
        messages: PromptSource,
        responses: Items[str],
        *,
        include_end: bool = False,
        num_top: int = 0,
        v2pe_delta: Delta | None = None,
        cache_salt: str | None = None,
    ) -> list[Score]:
        """Computes how likely the model finds each response to a conversation, token by token.

        The conversation is computed once for all. responses: at most 10,000 texts that are not empty, of 67 million
        characters together. include_end: whether the end token counts as part of a response. num_top: how many of the
        likeliest tokens come with each token, up to 20. Raises RequestError or MediaError.
        """
        make = partial(self.prepare, v2pe_delta=v2pe_delta, cache_salt=cache_salt)
        batch = [(messages, responses)]
        return score_conversations(self, batch, make, include_end=include_end, num_top=num_top, progress=False)[0]

    def score_batch(
        self,
        batch: Items[tuple[PromptSource, Items[str]]],
        *,
        include_end: bool = False,
        num_top: int = 0,
        v2pe_delta: Delta | None = None,
        cache_salt: str | None = None,
        progress: bool = False,
    ) -> list[list[Score]]:
        """Scores the responses to many conversations as `score` does, in one continuous batch.

        The first invalid conversation raises, naming its index, and cancels the rest. progress: shows a bar on stderr.
        """
        make = partial(self.prepare, v2pe_delta=v2pe_delta, cache_salt=cache_salt)
        return score_conversations(self, batch, make, include_end=include_end, num_top=num_top, progress=progress)

    def score_tokens(
        self,
        messages: PromptSource,
        candidates: Items[str | int],
        positions: Items[int] = (-1,),
        *,
        v2pe_delta: Delta | None = None,
        cache_salt: str | None = None,
    ) -> list[TokenScores]:
        """Computes how likely each candidate token is to follow some of a prompt's tokens, in one pass.

        candidates: at most 1,024 token ids, or texts that are one token each. positions: indices of the prompt's
        tokens, which `describe` shows; -1, the last one, is where the answer begins. Raises RequestError or MediaError.
        """
        make = partial(self.prepare, messages, v2pe_delta, cache_salt)
        return score_places(self, candidates, positions, make)

    def best_of(
        self,
        messages: PromptSource,
        n: int = 8,
        *,
        critic: Critic | MajorityVote,
        params: SamplingParams | None = None,
        greedy_first: bool = False,
        stop_score: float | None = None,
        v2pe_delta: Delta | None = None,
        cache_salt: str | None = None,
        timeout_s: float | None = None,
    ) -> Ranking:
        """Draws `n` answers to one prompt and returns them the best first.

        critic: `internvl_rt.critic.VisualPRM` or `Judge`, or any function of messages and an answer's text that returns
            a number, or something that has a `score`. It is called in a thread of its own, for one answer after the
            other, each as soon as it has ended; of answers of the same text, for the first. An answer without text, or
            which the critic raises an InternVLError for, has no score; if no answer has one, that error is raised. Or a
            `MajorityVote`.
        params: of all answers; None draws as in the official evaluation, at temperature 0.6 and top_p 0.95, and up to
            4,096 tokens.
        greedy_first: whether the first answer is greedy, as it is in the official evaluation by default.
        stop_score: ends the drawing as soon as an answer has this score. The best is then that of the answers that had
            ended by then, so it depends on how fast the critic is, and another run may return another one.
        v2pe_delta, cache_salt: as for `chat`; a VisualPRM and a Judge get them too.
        timeout_s: as for `chat`, of the drawing; an answer that it ends has no score.

        Raises what `chat` raises.
        """
        start_s = time.perf_counter()
        checked = self.check_call(check_ranking(n, critic, params, greedy_first, stop_score), timeout_s)
        judge = begin_judging(critic, messages, v2pe_delta, cache_salt, stop_score)
        try:
            prepared = self.prepare(messages, v2pe_delta, cache_salt, until(start_s + (timeout_s or math.inf)))
            request = self.new_request(prepared, checked, timeout_s, greedy_first=greedy_first)
        except LateError:
            return unprepared_ranking(checked, start_s)
        return rank_answers(self.loop, request, judge)

    def describe(
        self, messages: PromptSource, *, think: bool | None = None, cache_salt: str | None = None
    ) -> PromptDescription:
        """Returns the prompt's tokens, and the size and grid of each picture; makes no request.

        An encoded picture is not decoded; the frames of a video are. A Flash model encodes all of them, since which
        tiles it compresses decides how many tokens they are. think, cache_salt: as for `chat`. Raises RequestError or
        MediaError, as for a request.
        """
        self.loop.check()
        return self.preparer.describe(messages, self.loop.check, think=think, cache_salt=cache_salt)

    def encode_images(self, images: Items[ImageSource], *, cache_salt: str | None = None) -> list[Tensor]:
        """Computes visual tokens [X, D] of each picture on the engine's device, for `image_embeds` parts.

        Raises RequestError or MediaError.
        """
        return self.pictures.encode(images, cache_salt)

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

    def _requests(
        self,
        batch: Items[PromptSource],
        params: SamplingParams | Items[SamplingParams] | None,
        how: tuple[Delta | None, str | None, bool | None],
        timeout_s: float | None,
    ) -> Iterator[Request | Reply]:
        """Checks a batch, and returns an iterator that prepares its requests one by one."""
        check_list("batch", batch, "conversations, each a list of messages")
        if isinstance(params, Items):
            each = [self.check_call(one, timeout_s) for one in params]
        else:
            each = [self.check_call(params, timeout_s)] * len(batch)
        if len(each) != len(batch):
            raise RequestError(f"params must be one for all or one for each of {len(batch)} requests, got {len(each)}")

        def requests() -> Iterator[Request | Reply]:
            for index, (messages, one) in enumerate(zip(batch, each, strict=True)):  # the batch may make them now
                if isinstance(messages, Mapping):
                    raise RequestError("batch: expected conversations, got a message; wrap a conversation: [messages]")
                try:
                    yield self._request((messages, *how), one, timeout_s)
                except InternVLError as error:
                    if len(batch) == 1:
                        raise
                    raise numbered(index, error) from error  # without a name here, whose frame would keep the engine

        return requests()

    def _request(
        self,
        asked: tuple[PromptSource, Delta | None, str | None, bool | None],
        params: SamplingParams,
        timeout_s: float | None,
        request_id: str | None = None,
    ) -> Request | Reply:
        """Prepares a request. Returns the reply to one whose time is over before it is prepared."""
        start_s = time.perf_counter()
        messages, v2pe_delta, cache_salt, think = asked
        try:
            proceed = until(start_s + (timeout_s or math.inf))
            prepared = self.prepare(messages, v2pe_delta, cache_salt, proceed, think=think)
            return self.new_request(prepared, params, timeout_s, request_id)
        except LateError:
            return unprepared_reply(params, start_s, think=shall_think(think, self.config))

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

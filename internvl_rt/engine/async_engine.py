"""The engine for asyncio: a few threads prepare requests, and one worker thread runs the steps."""

import asyncio
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from collections.abc import Sequence as Items
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Self, TypeVar

from torch import Tensor

from internvl_rt.engine.engine import Engine
from internvl_rt.engine.loading import load_parts
from internvl_rt.engine.loop import StepLoop
from internvl_rt.engine.options import EngineOptions, takes_options
from internvl_rt.engine.preparing import Given, Preparing, has_media
from internvl_rt.engine.reply import Piece, Reply, Score, unprepared_reply
from internvl_rt.engine.request import Request
from internvl_rt.engine.scoring import build_score, read_responses, read_score_options
from internvl_rt.engine.worker import WakeUps, run_steps, stop_worker
from internvl_rt.errors import QueueFullError, check_list
from internvl_rt.inputs.image import ImageSource
from internvl_rt.inputs.position import Delta
from internvl_rt.inputs.prepare import Prepared, PromptDescription, PromptSource
from internvl_rt.inputs.proceed import LateError, Proceed
from internvl_rt.inputs.raw_prompt import RawPrompt
from internvl_rt.inputs.sampling_params import SamplingParams
from internvl_rt.inputs.snapshot import MAX_ITEMS, CopyLimits, snapshot
from internvl_rt.inputs.thinking import shall_think

T = TypeVar("T")

ROOM_S = 0.05  # pause between two attempts to find room for the next responses of a call of `score`


class AsyncEngine:
    """Owns an `Engine` and answers requests in asyncio; `close` closes both.

    Tasks may call it in the event loops of any threads; meanwhile the engine's own methods refuse requests. No event
    loop waits for a step or for the decoding of a picture. A caller cancels its request when its task is cancelled, or
    when it closes or drops its stream; a caller that only stops reading keeps its request, within its `timeout_s`.

    A call copies what it is given at once, before it is awaited, so that the caller may change that and call again. The
    event loop waits for the copy of pixels that are given as arrays or tensors (of 64 megapixels: 0.03 s) or as decoded
    Pillow pictures (0.16 s), for several times as long where the system has to find the memory first, and for the sum
    of pictures that are given at the same moment. It does not wait for paths and encoded pictures: prefer these for
    large ones. Files are read later.
    """

    def __init__(self, engine: Engine) -> None:
        """Raises RequestError if the engine is closed or has an AsyncEngine already."""
        self._engine, self._steps = engine, engine.loop
        most = engine.options.max_num_seqs + engine.options.max_waiting
        self._preparing = Preparing(engine.device, most, self._steps.check)
        self._copy_limits = CopyLimits(
            images=engine.options.images(engine.config),
            videos=engine.options.videos,
            max_media=engine.max_model_len // engine.config.least_tokens_per_tile,
            max_visual_bytes=engine.max_model_len * engine.config.decoder.hidden_size * 8,  # as float64
        )
        wake_ups = WakeUps()
        self._steps.use_worker(wake_ups.wake)
        # The thread is a daemon, because at exit the interpreter joins all other threads before it runs anything that
        # could end them: a program that forgets to close would never end. `stop_worker` ends the thread in time. The
        # thread does not refer to this object, which could otherwise never be collected.
        self._thread = threading.Thread(
            target=run_steps, args=(self._steps, wake_ups), name="internvl_rt steps", daemon=True
        )
        self._thread.start()
        self._finalizer = weakref.finalize(self, stop_worker, wake_ups, self._thread)
        self._close_lock = threading.Lock()
        self._closer: threading.Thread | None = None
        self._closed: Future[None] = Future()
        self._closed.set_running_or_notify_cancel()  # cancelling a caller of `close` does not cancel the closing

    @classmethod
    @takes_options(EngineOptions)
    def from_pretrained(cls, model: str | Path, options: EngineOptions) -> "AsyncEngine":
        """Loads a checkpoint as `Engine.from_pretrained` does, and blocks the event loop meanwhile."""
        return cls(Engine(*load_parts(model, options), options))

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
    ) -> AsyncGenerator[Piece, None]:
        """Answers as `Engine.stream` does: text as it becomes certain; the last piece has the whole reply.

        timeout_s counts from the first `anext`. If it passes before the prompt is prepared, as behind many slow
        pictures, the answer is empty, and no tokens are counted. Raises RequestError or MediaError, QueueFullError if
        there are more requests than the engine takes, StepError if a step failed, EngineDeadError if the worker thread
        has died.
        """
        asked = self._copy(messages), v2pe_delta, cache_salt, think
        begin = partial(self._begin, asked, params, timeout_s, request_id)
        return self._stream(begin, params, think=think)

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
    ) -> Coroutine[Any, Any, Reply]:
        """Answers as `Engine.chat` does. Raises what `stream` raises, and takes `timeout_s` as it does."""
        asked = self._copy(messages), v2pe_delta, cache_salt, think
        begin = partial(self._begin, asked, params, timeout_s, request_id)
        return self._chat(begin, params, think=think)

    def score(
        self,
        messages: PromptSource,
        responses: Items[str],
        *,
        include_end: bool = False,
        num_top: int = 0,
        v2pe_delta: Delta | None = None,
        cache_salt: str | None = None,
    ) -> Coroutine[Any, Any, list[Score]]:
        """Scores responses as `Engine.score` does. Raises what `stream` raises.

        A full engine refuses the first response, and then nothing is computed; further ones wait until there is room.
        """
        texts = Given(partial(read_responses, responses))
        return self._score(self._copy(messages), texts, (include_end, num_top), v2pe_delta, cache_salt)

    def describe(
        self, messages: PromptSource, *, think: bool | None = None, cache_salt: str | None = None
    ) -> Coroutine[Any, Any, PromptDescription]:
        """Describes a prompt as `Engine.describe` does. Raises what `stream` raises."""
        return self._describe(self._copy(messages), think, cache_salt)

    def encode_images(
        self, images: Items[ImageSource], *, cache_salt: str | None = None
    ) -> Coroutine[Any, Any, list[Tensor]]:
        """Encodes pictures as `Engine.encode_images` does. Raises what `stream` raises."""
        return self._encode(Given(partial(self._copy_pictures, images)), cache_salt)

    def check(self) -> None:
        """Raises RequestError or EngineDeadError if the engine takes no calls any more."""
        self._steps.check()

    def stats(self) -> dict[str, int | float]:
        """Returns what `Engine.stats` does, and the number of calls that are being prepared or wait for that."""
        return {"preparing": len(self._preparing), **self._engine.stats()}

    async def close(self) -> None:
        """Cancels all requests, whose callers get RequestError, and refuses new ones.

        Every call returns when all threads have ended. A picture or frame that is being decoded is decoded to its end.
        In a process that was forked there is nothing to end, and this returns at once.
        """
        if self._steps.is_forked:
            return
        with self._close_lock:
            if self._closer is None:
                self._closer = threading.Thread(target=self._close, name="internvl_rt closes")
                self._closer.start()
        await asyncio.wrap_future(self._closed)
        self._closer.join()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _copy(self, messages: PromptSource) -> Given[PromptSource]:
        def copy() -> PromptSource:
            self._preparing.check()  # nothing is copied for a call that is refused
            if isinstance(messages, RawPrompt):
                return self._engine.preparer.fixed(messages)
            return snapshot(messages, self._copy_limits)

        return Given(copy)

    def _copy_pictures(self, images: Items[ImageSource]) -> Items[ImageSource]:
        self._preparing.check()
        check_list("images", images, "pictures")
        limits = replace(self._copy_limits, max_media=MAX_ITEMS)  # they need not fit one prompt
        return snapshot(list(islice(images, MAX_ITEMS + 1)), limits, "image")

    async def _stream(
        self, begin: Callable[..., Awaitable["_Call"]], params: SamplingParams | None, *, think: bool | None
    ) -> AsyncGenerator[Piece, None]:
        start_s = time.perf_counter()
        try:
            call = await begin(start_s, every_piece=True)
        except LateError:
            yield Piece("", self._unprepared(params, start_s, think))
            return
        try:
            reply = None
            while reply is None:
                piece = await call.next_piece()
                reply = piece.reply
                yield piece
        finally:
            call.cancel()

    async def _chat(
        self, begin: Callable[..., Awaitable["_Call"]], params: SamplingParams | None, *, think: bool | None
    ) -> Reply:
        start_s = time.perf_counter()
        try:
            call = await begin(start_s)
        except LateError:
            return self._unprepared(params, start_s, think)
        try:
            return await call.reply()
        finally:
            call.cancel()

    def _unprepared(self, params: SamplingParams | None, start_s: float, think: bool | None) -> Reply:
        return unprepared_reply(params or SamplingParams(), start_s, think=shall_think(think, self._engine.config))

    async def _score(
        self,
        given: Given[PromptSource],
        texts: Given[tuple[str, ...]],
        options: tuple[bool, int],
        v2pe_delta: Delta | None,
        cache_salt: str | None,
    ) -> list[Score]:
        messages, responses, given_options = given.take(), texts.take(), read_score_options(*options)
        prepare = partial(self._engine.prepare, messages, v2pe_delta, cache_salt)
        prompt = await self._preparing.run(prepare, media=has_media(messages))
        del prepare, messages
        scores: list[Score] = []
        size = self._engine.max_answers  # responses that are computed together; the next ones follow them
        for first in range(0, len(responses), size):
            prompts: list[Prepared] = []
            for text in responses[first : first + size]:  # each by itself, so that no other call waits for all of them
                make = partial(self._engine.preparer.prepare_score, prompt, text, **given_options)
                begun = bool(scores or prompts)
                prompts.append(await _when_there_is_room(partial(self._prepare_text, make), wait=begun))
            start = partial(self._start, partial(self._make_scoring, prompts))
            call = await _when_there_is_room(start, wait=bool(scores))
            try:
                scores += map(build_score, (await call.reply()).scored)
            finally:
                call.cancel()
        return scores

    async def _prepare_text(self, make: Callable[[], Prepared]) -> Prepared:
        return await self._preparing.run(lambda _: make(), media=False)

    async def _describe(self, given: Given[PromptSource], think: bool | None, salt: str | None) -> PromptDescription:
        messages = given.take()
        describe = partial(self._engine.preparer.describe, messages, think=think, cache_salt=salt)
        return await self._preparing.run(describe, media=has_media(messages))

    async def _encode(self, given: Given[Items[ImageSource]], cache_salt: str | None) -> list[Tensor]:
        return await self._preparing.run(partial(self._engine.pictures.encode, given.take(), cache_salt), media=True)

    def _close(self) -> None:
        try:
            self._finalizer()
            self._thread.join()
            self._engine.close()
            self._preparing.shutdown()
            self._closed.set_result(None)
        except BaseException as error:
            self._closed.set_exception(error)

    def _make_scoring(self, prompts: Items[Prepared], _: Proceed) -> Request:
        return self._engine.new_scoring(prompts)

    async def _begin(
        self,
        asked: tuple[Given[PromptSource], Delta | None, str | None, bool | None],
        params: SamplingParams | None,
        timeout_s: float | None,
        request_id: str | None,
        start_s: float,
        *,
        every_piece: bool = False,
    ) -> "_Call":
        """Prepares a request and submits it. Raises LateError if its time is over before."""
        given, v2pe_delta, cache_salt, think = asked
        messages, checked = given.take(), self._engine.check_call(params, timeout_s, request_id)

        def make(proceed: Proceed) -> Request:
            prepared = self._engine.prepare(messages, v2pe_delta, cache_salt, proceed, think=think)
            proceed()
            return self._engine.new_request(replace(prepared, start_s=start_s), checked, timeout_s, request_id)

        deadline_s = None if timeout_s is None else start_s + timeout_s
        return await self._start(make, media=has_media(messages), deadline_s=deadline_s, every_piece=every_piece)

    async def _start(
        self,
        make: Callable[[Proceed], Request],
        *,
        media: bool = False,
        deadline_s: float | None = None,
        every_piece: bool = False,
    ) -> "_Call":
        """Makes a request and submits it, both in a thread of the pool."""
        steps, event_loop = self._steps, asyncio.get_running_loop()

        def start(proceed: Proceed) -> _Call:
            call = _Call(steps, make(proceed), event_loop, every_piece=every_piece)
            proceed()
            steps.submit(call.request, call.notify)
            return call

        return await self._preparing.run(start, media=media, undo=_Call.cancel, deadline_s=deadline_s)


async def _when_there_is_room(begin: Callable[[], Awaitable[T]], *, wait: bool) -> T:
    """Returns what `begin` returns. wait: whether it is tried again, as long as it raises QueueFullError."""
    while True:
        try:
            return await begin()
        except QueueFullError:
            if not wait:
                raise
        await asyncio.sleep(ROOM_S)


class _Call:
    """Hands the pieces of one request to the event loop in which its caller waits."""

    def __init__(
        self, steps: StepLoop, request: Request, event_loop: asyncio.AbstractEventLoop, *, every_piece: bool
    ) -> None:
        self.request = request
        self._steps, self._event_loop, self._every_piece = steps, event_loop, every_piece
        self._arrived: deque[Piece] = deque()
        self._changed = asyncio.Event()
        self._is_waking = False  # whether `_wake` is scheduled and has not run yet

    async def next_piece(self) -> Piece:
        """Waits for the next piece. Raises the request's error once all earlier pieces are taken."""
        while True:
            if self._steps.is_forked:  # pieces that came before the fork are the parent's
                self._steps.check()
            if self._arrived:
                return self._arrived.popleft()
            if self.request.done and self.request.reply is None:
                raise self.request.take_error()
            await self._changed.wait()
            self._changed.clear()

    async def reply(self) -> Reply:
        while (reply := (await self.next_piece()).reply) is None:
            pass
        return reply

    def cancel(self) -> None:
        self._steps.cancel(self.request)

    def notify(self) -> None:
        """Takes new text and wakes the caller up. The worker thread calls it between steps."""
        if not (self._every_piece or self.request.done):
            return
        if self.request.reply is not None or not self.request.done:
            self._arrived += self._steps.poll(self.request)
        if self._is_waking:
            return
        self._is_waking = True
        try:
            self._event_loop.call_soon_threadsafe(self._wake)
        except RuntimeError:  # the caller's event loop was closed while it waited
            self.cancel()

    def _wake(self) -> None:
        self._is_waking = False  # comes first, so that a piece which arrives from here on schedules another wake-up
        self._changed.set()

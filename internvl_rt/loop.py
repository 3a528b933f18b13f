"""Requests in flight: one step loop that whoever waits drives, and what each request gets from it."""

import threading
import time
from dataclasses import dataclass

from internvl_rt.errors import RequestError
from internvl_rt.reply import AnswerText, Reply, Timings, Usage
from internvl_rt.request import Prepared
from internvl_rt.runner import Runner
from internvl_rt.scheduler import Scheduler
from internvl_rt.sequence import FinishReason, Sequence
from internvl_rt.step import Chunk


@dataclass(slots=True, eq=False)
class Request:
    """A sequence with what its caller waits for."""

    sequence: Sequence
    answer: AnswerText
    prepared: Prepared
    vision_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    first_token_s: float = 0.0
    fresh: str = ""  # visible text that nobody has taken yet
    reply: Reply | None = None
    error: BaseException | None = None

    @property
    def done(self) -> bool:
        return self.reply is not None or self.error is not None


class StepLoop:
    """Owns the requests in flight. Any thread may call any method; steps exclude each other."""

    def __init__(self, scheduler: Scheduler, runner: Runner) -> None:
        self._scheduler, self._runner = scheduler, runner
        self._requests: dict[int, Request] = {}
        self._lock = threading.RLock()
        self._closed = False

    def submit(self, request: Request) -> None:
        with self._lock:
            if self._closed:
                raise RequestError("the engine is closed")
            self._requests[request.sequence.seq_id] = request
            self._scheduler.add(request.sequence)

    def advance(self, request: Request) -> str:
        """Runs one step unless `request` is done; returns its text that became visible since the last call.

        Raises what made the request fail.
        """
        with self._lock:
            if not request.done:
                self._step()
            if request.error is not None:
                raise request.error
            text, request.fresh = request.fresh, ""
            return text

    def num_cached(self, prepared: Prepared) -> int:
        """How many leading tokens of the prompt the cache holds right now."""
        with self._lock:
            return self._scheduler.num_cached(prepared.prompt.token_ids, prepared.pictures, prepared.identity)

    def cancel(self, request: Request) -> None:
        """Ends a request that is not done and returns its blocks."""
        with self._lock:
            if not request.done:
                self._fail(request, RequestError("the request was cancelled"))

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for request in list(self._requests.values()):
                self._fail(request, RequestError("the engine was closed"))

    def _step(self) -> None:
        chunks = self._scheduler.schedule()
        assert chunks, "a step without work: an unfinished sequence can always run"
        try:
            result = self._runner.run(chunks)
        except BaseException as error:  # the chunks' cache contents are unknown now, so their requests end here
            for chunk in chunks:
                self._fail(self._requests[chunk.sequence.seq_id], error)
            if not isinstance(error, Exception):  # an interrupt is for this thread; an error for those who wait
                raise
            return
        for chunk in chunks:
            self._charge(self._requests[chunk.sequence.seq_id], chunk, result.vision_s, result.decoder_s)
        for chunk, token_id in result.tokens:
            self._accept(self._requests[chunk.sequence.seq_id], token_id)

    def _charge(self, request: Request, chunk: Chunk, vision_s: float, decoder_s: float) -> None:
        if chunk.start < request.sequence.num_prompt:
            request.vision_s += vision_s
            request.prefill_s += decoder_s
        else:
            request.decode_s += vision_s + decoder_s

    def _accept(self, request: Request, token_id: int) -> None:
        """Appends a drawn token and ends the request if it was the last."""
        sequence = request.sequence
        sequence.token_ids.append(token_id)
        if sequence.num_generated == 1:
            request.first_token_s = time.perf_counter() - request.prepared.start_s
        if token_id in sequence.stop_ids:
            self._finish(request, "stop")
            return
        request.fresh += request.answer.push(token_id)
        if request.answer.stopped:
            self._finish(request, "stop")
        elif sequence.num_generated == sequence.max_tokens:
            self._finish(request, "length")

    def _finish(self, request: Request, reason: FinishReason) -> None:
        request.fresh += request.answer.finish()
        sequence, prepared = request.sequence, request.prepared
        sequence.finish_reason = reason
        request.reply = Reply(
            text=request.answer.text,
            token_ids=sequence.generated_ids,
            finish_reason=reason,
            usage=Usage(
                prompt_tokens=sequence.num_prompt,
                image_tokens=sum(picture.span.num_tokens for picture in sequence.pictures),
                completion_tokens=sequence.num_generated,
                cached_tokens=sequence.num_cached,
            ),
            timings=Timings(
                media_s=prepared.media_s,
                tile_s=prepared.tile_s,
                vision_s=request.vision_s,
                prefill_s=request.prefill_s,
                decode_s=request.decode_s,
                first_token_s=request.first_token_s,
                total_s=time.perf_counter() - prepared.start_s,
                num_decoded=sequence.num_generated - 1,
            ),
        )
        self._forget(request)

    def _fail(self, request: Request, error: BaseException) -> None:
        request.error = error
        self._forget(request)

    def _forget(self, request: Request) -> None:
        del self._requests[request.sequence.seq_id]
        self._scheduler.remove(request.sequence)

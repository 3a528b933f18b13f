"""The step loop, which whoever waits drives, or one thread for all; and what each request gets from it."""

import threading
from collections import deque
from collections.abc import Callable, Iterable

from torch import Tensor

from internvl_rt.engine.in_flight import InFlight
from internvl_rt.engine.request import Request
from internvl_rt.engine.trace import Trace
from internvl_rt.errors import EngineDeadError, QueueFullError, RequestError
from internvl_rt.inputs.prepare import Prepared
from internvl_rt.steps.runner import Runner, Running
from internvl_rt.steps.scheduler import Scheduler
from internvl_rt.steps.sequence import Picture
from internvl_rt.steps.step import Chunk, plan_step


class StepLoop:
    """Owns the requests in flight. Any thread may call any method; steps exclude each other.

    `check`, `num_cached`, `stats`, and `cancel` where a thread is appointed, wait for no step: an event loop may call
    them.
    """

    def __init__(self, scheduler: Scheduler, runner: Runner, *, max_requests: int, run_ahead: bool) -> None:
        """max_requests: how many may be in flight, those that wait included. run_ahead: whether a step is launched
        before the one before it has ended, as a GPU wants it.
        """
        self._scheduler, self._runner = scheduler, runner
        self._max_requests, self._run_ahead = max_requests, run_ahead
        self._in_flight = InFlight(scheduler)
        self._running: deque[Running] = deque()
        self._cancelled: deque[Request] = deque()
        self._lock = threading.RLock()
        # Held while waiting for the lock. Without it a thread that steps again and again has it again before those who
        # wait have woken: for hundreds of steps when eight others submit.
        self._door = threading.Lock()
        self._ring: Callable[[], None] | None = None  # wakes the thread that runs all steps, if one is appointed
        self._death: BaseException | None = None  # what ended it
        self._closed = False
        self._num_steps = 0

    def appoint(self, ring: Callable[[], None]) -> None:
        """From now on one thread calls `step` and nobody else; `ring`, in any thread, tells it that there is work."""
        with self._door, self._lock:
            self.check()
            if self._ring is not None:
                raise RequestError("this engine has an AsyncEngine already; use that one, or load the model again")
            self._ring = ring

    def check(self) -> None:
        """Raises what keeps every request out."""
        if self._death is not None:
            raise _dead(self._death)
        if self._closed:
            raise RequestError("the engine is closed")

    def submit(self, request: Request) -> None:
        with self._door, self._lock:
            self.check()
            if self._ring is not None and request.notify is None:
                raise RequestError(
                    "an AsyncEngine runs the steps of this engine; call its methods, from an event loop in any thread, "
                    "or load the model again"
                )
            if len(self._in_flight) >= self._max_requests:
                raise QueueFullError(
                    f"{len(self._in_flight)} requests are in flight, which is the limit; try again later, or raise "
                    "max_num_seqs or max_waiting"
                )
            self._in_flight.add(request)
        if self._ring is not None:
            self._ring()

    def advance(self, request: Request) -> list[tuple[int, str]]:
        """Runs one step unless `request` is done; returns what became visible of its answers since the last call.

        Raises what made the request fail.
        """
        self._let_others_in()
        with self._lock:
            if not request.done:
                self._step()
            return self.take(request)

    def take(self, request: Request) -> list[tuple[int, str]]:
        """What became visible of its answers since the last call, by index. Raises what made the request fail.

        For `notify`, which is called between two steps, and for a request that is done.
        """
        if request.error is not None:
            raise request.error
        for answer in request.answers:
            if answer.sequence.finish_reason is None:  # else all of it was read
                answer.read(len(answer.sequence.token_ids) - answer.sequence.num_prompt)
        fresh = [(answer.index, answer.fresh) for answer in request.answers if answer.fresh]
        for answer in request.answers:
            answer.fresh = ""
        return fresh

    def num_cached(self, prepared: Prepared) -> int:
        """How many leading tokens of the prompt the cache holds right now; one call into C++, which nothing divides."""
        return self._scheduler.num_cached(prepared.prompt.token_ids, prepared.pictures, prepared.identity)

    def cancel(self, request: Request) -> None:
        """Ends a request that is not done and returns its blocks, at the latest before the next step."""
        if request.done:
            return
        self._cancelled.append(request)
        if self._ring is not None:
            self._ring()
            return
        with self._door, self._lock:
            self._end_cancelled()
            if not self._in_flight:  # nobody would drive what is under way, which holds blocks
                self._collect_down_to(0)

    def die(self, cause: BaseException) -> None:
        """The thread that ran the steps has come to its end: everybody who waits learns why, and nobody is let in.

        The books are not touched, since nothing is known of them.
        """
        with self._door, self._lock:
            self._death = cause
            self._running.clear()
            self._cancelled.clear()
            self._in_flight.abandon(lambda: _dead(cause))

    def close(self) -> None:
        with self._door, self._lock:
            self._closed = True
            self._in_flight.fail_all(lambda: RequestError("the engine was closed"), "cancelled")
            self._collect_down_to(0)

    def encode(self, picture: Picture, salt: str | None) -> Tensor:
        """Visual tokens [X, D] of a picture, for the calling thread's stream."""
        with self._door, self._lock:
            self.check()
            return self._runner.encode(picture, salt)

    def stats(self) -> dict[str, int | float]:
        """Counts, tokens and bytes; what has no other unit counts events since the start."""
        return {
            "running": self._scheduler.num_running,
            "waiting": self._scheduler.num_waiting,
            "steps": self._num_steps,
            "generated_tokens": self._in_flight.num_generated,
            "preemptions": self._scheduler.num_preemptions,
            **{f"requests_{outcome}": count for outcome, count in sorted(dict(self._in_flight.finished).items())},
            **self._runner.stats(),
        }

    def set_trace(self, trace: Trace | None) -> None:
        """Writes to `trace` what ends from now on, until None is set: steps, and requests, which may have begun before.

        Requests in flight are written when it is taken away. Raises RequestError if there is another one.
        """
        with self._door, self._lock:
            if trace is not None and self._in_flight.trace is not None:
                raise RequestError("this engine writes a trace already, and only one at a time; end that one first")
            if trace is None and self._in_flight.trace is not None:
                self._in_flight.trace_unfinished()
            self._in_flight.trace = trace

    def step(self) -> bool:
        """Runs one step, if there is anything to do; whether there was."""
        self._let_others_in()
        with self._lock:
            return self._step()

    def _let_others_in(self) -> None:
        with self._door:  # whoever has it waits for the lock
            pass

    def _step(self) -> bool:
        self._end_cancelled()
        self._in_flight.end_late()
        if not self._in_flight:
            self._collect_down_to(0)
            return False
        chunks = self._scheduler.schedule(in_flight=bool(self._running))
        if chunks:
            self._launch(chunks)
        else:
            assert self._running, "a step without work: an unfinished sequence can always run"
        self._collect_down_to(1 if chunks and self._run_ahead else 0)
        if not self._in_flight:
            self._collect_down_to(0)
        return True

    def _collect_down_to(self, most: int) -> None:
        """Waits until at most so many steps are under way."""
        while len(self._running) > most:
            self._collect(self._running.popleft())

    def _launch(self, chunks: list[Chunk]) -> None:
        step = plan_step(chunks)
        try:
            running = self._runner.launch(step)
        except BaseException as error:  # the chunks' cache contents are unknown now, so their requests end here
            self._collect_down_to(0)
            self._end_step_of(chunks, error)
            return
        for row in reversed(range(len(step.draws))):
            sequence, _, place = step.draws[row]
            if place == sequence.num_tokens - sequence.num_prompt:  # not one behind a guess
                sequence.draw_row = row
                sequence.num_tokens += 1
        self._scheduler.launched(chunks)
        self._running.append(running)
        self._num_steps += 1

    def _end_step_of(self, chunks: Iterable[Chunk], error: BaseException) -> None:
        """A step has failed. An interrupt is for this thread, an error for those who wait."""
        self._in_flight.fail_chunks(chunks, error if isinstance(error, Exception) else _dead(error))
        self._collect_down_to(0)
        self._runner.fail()
        if not isinstance(error, Exception):
            raise error

    def _collect(self, running: Running) -> None:
        """Waits for a step and hands out what it drew."""
        try:
            result = self._runner.collect(running)
        except BaseException as error:  # what it drew is lost, to those too that another step computes meanwhile
            self._end_step_of(running.step.chunks, error)
            return
        if self._in_flight.trace is not None:
            self._in_flight.trace.step(running, result, self.stats())
        self._in_flight.collect(running, result)

    def _end_cancelled(self) -> None:
        while self._cancelled:
            request = self._cancelled.popleft()
            if not request.done:
                self._in_flight.fail(request, RequestError("the request was cancelled"), "cancelled")


def _dead(cause: BaseException) -> EngineDeadError:
    error = EngineDeadError(
        f"the thread that ran the engine's steps was ended by {cause!r}, and what it ran is lost; send the request "
        "again, to a new engine if this one refuses it"
    )
    error.__cause__ = cause
    return error

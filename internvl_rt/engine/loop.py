"""Runs steps while there are requests, and gives each request the tokens that steps drew for it."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from torch import Tensor

from internvl_rt.engine.failures import dead, errors_of_picture, errors_of_step, fault_errors, shareable, without_frames
from internvl_rt.engine.in_flight import InFlight, Notify
from internvl_rt.engine.reply import Piece
from internvl_rt.engine.request import Request
from internvl_rt.engine.trace import Trace
from internvl_rt.errors import EngineDeadError, QueueFullError, RequestError, forked
from internvl_rt.inputs.picture import Picture
from internvl_rt.steps.decodes import Decodes, build_decodes
from internvl_rt.steps.runner import LaunchedStep, Runner
from internvl_rt.steps.scheduler import Scheduler
from internvl_rt.steps.step import Chunk, Step, plan_step

T = TypeVar("T")


class StepLoop:
    """Owns the requests in flight and runs their steps: in the thread that waits for one, or in one worker thread.

    Any thread may call any method; steps exclude each other. `check` and `stats`, and `cancel` if there is a worker
    thread, do not wait for a step, so an event loop may call them.
    """

    def __init__(self, scheduler: Scheduler, runner: Runner, *, max_requests: int, run_ahead: bool) -> None:
        """max_requests: how many may be in flight, waiting ones included.
        run_ahead: whether a step is launched before the one before it has ended, which keeps a GPU busy.
        """
        self._scheduler, self._runner = scheduler, runner
        self._max_requests, self.run_ahead = max_requests, run_ahead
        self._in_flight = InFlight(scheduler, runner.dtype)
        self._launched: deque[LaunchedStep] = deque()
        self._cancelled: deque[Request] = deque()
        self._lock = threading.Lock()
        # A thread holds this lock while it waits for `_lock`. A thread that runs step after step passes through it
        # before each one; else it would take `_lock` again before those that wait for it have woken up.
        self._queue_lock = threading.Lock()
        self._wake_worker: Callable[[], None] | None = None  # None: there is no worker thread
        self._fatal_error: BaseException | None = None  # what ended the worker thread, or this object's own repair
        self._closed = False
        self._num_steps = 0
        self._process_id = os.getpid()

    def use_worker(self, wake: Callable[[], None]) -> None:
        """From now on one worker thread calls `step`, and no other thread runs steps.

        wake: tells it that there is work; any thread may call `wake`. Raises RequestError if there is a worker thread.
        """
        with self._locked():
            self.check()
            if self._wake_worker is not None:
                raise RequestError("this engine has an AsyncEngine already; use that one, or load the model again")
            self._wake_worker = wake

    @property
    def is_forked(self) -> bool:
        """Whether this is a copy in a forked process, where other threads are missing and may have held the lock."""
        return os.getpid() != self._process_id

    def _check_process(self) -> None:
        if self.is_forked:
            raise forked(self._process_id)

    def check(self) -> None:
        """Raises RequestError or EngineDeadError if the engine takes no requests any more."""
        self._check_process()
        if self._fatal_error is not None:
            raise dead(self._fatal_error)
        if self._closed:
            raise _closed()
        self._runner.check()

    def submit(self, request: Request, notify: Notify | None = None) -> None:
        """notify: a worker thread calls it between steps when there is text, a reply or an error."""
        with self._locked():
            self.check()
            if self._wake_worker is not None and notify is None:
                raise RequestError(
                    "an AsyncEngine runs the steps of this engine; call its methods, from an event loop in any thread, "
                    "or load the model again"
                )
            if len(self._in_flight) >= self._max_requests:
                raise QueueFullError(
                    f"{len(self._in_flight)} requests are in flight, which is the limit; try again later, or raise "
                    "max_num_seqs or max_waiting"
                )
            try:
                self._in_flight.add(request, notify)
            except BaseException:
                self._in_flight.fail(request, RequestError("the request was cancelled"), "cancelled")
                raise
        if self._wake_worker is not None:
            self._wake_worker()

    def advance(self, request: Request) -> list[Piece]:
        """Runs one step unless `request` is done, and returns its new pieces as `poll` does."""
        return self._in_turn(partial(self._advance, request))

    def _advance(self, request: Request) -> list[Piece]:
        if not request.done:
            self._step()
        return self.poll(request)

    def poll(self, request: Request) -> list[Piece]:
        """Returns what is new since the last call, as `Request.take_pieces` does.

        May be called between two steps, from `notify`, or when the request is done. Raises the request's error, once.
        """
        if request.done and request.reply is None:
            raise request.take_error()
        for answer in request.answers:
            if answer.sequence.finish_reason is None:  # the tokens of an answer that has ended are text already
                answer.read(len(answer.sequence.token_ids) - answer.sequence.num_prompt)
        return request.take_pieces()

    def cancel(self, request: Request) -> None:
        """Ends a request that is not done and returns its blocks, at the latest before the next step.

        Of one that is done it drops the error, which nobody will raise. It waits for no lock, because the garbage
        collector, when it closes a stream, may call it in the middle of any other call of the same thread.
        """
        if request.done or self.is_forked:
            request.error = None
            return
        self._cancelled.append(request)
        if self._wake_worker is not None:
            self._wake_worker()
        else:
            self._end_cancelled_unless_busy()

    def fail_worker(self, cause: BaseException) -> None:
        """Fails every request because the worker thread has died of `cause`, and refuses new ones.

        The cause loses its tracebacks: their frames would hold whatever the thread held, as long as this object lives.
        Leaves the scheduler and the cache alone, since the thread may have died in the middle of changing them.
        """
        with self._locked():
            self._die(without_frames(cause))

    def close(self) -> None:
        """Fails the requests in flight and refuses others from now on. Does nothing in a forked process."""
        if self.is_forked:
            return
        with self._locked():
            self._closed = True
            try:
                self._in_flight.fail_all(_closed, "cancelled")
                self._collect_down_to(0)
            except BaseException as error:
                self._start_over(error)
                raise
            finally:
                self._runner.close()

    def encode(self, picture: Picture, salt: str | None) -> Tensor:
        """Computes the visual tokens [X, D] of a picture, for use on the calling thread's stream.

        Raises MediaError for a broken picture, StepError for a fault or a lack of memory.
        """
        with self._locked(), fault_errors():
            self.check()
            return self._runner.encode(picture, salt)

    def stats(self) -> dict[str, int | float]:
        """Counts what runs and waits now, events since the start, and the runner's tokens and bytes."""
        self._check_process()
        return {
            "running": self._scheduler.num_running,
            "waiting": self._scheduler.num_waiting,
            "steps": self._num_steps,
            "generated_tokens": self._in_flight.num_generated,
            "saved_image_tokens": self._in_flight.num_saved,
            "preemptions": self._scheduler.num_preemptions,
            **{f"requests_{outcome}": count for outcome, count in sorted(dict(self._in_flight.finished).items())},
            **self._runner.stats(),
        }

    def set_trace(self, trace: Trace | None) -> None:
        """Writes the steps and requests that end from now on to `trace`. None ends the trace.

        At the end the requests in flight are written too. Raises RequestError if there is a trace already.
        """
        with self._locked():
            if trace is not None and self._in_flight.trace is not None:
                raise RequestError("this engine writes a trace already, and only one at a time; end that one first")
            try:
                if trace is None:
                    self._in_flight.trace_unfinished()
            finally:
                self._in_flight.trace = trace

    def step(self) -> bool:
        """Runs one step; returns False if there was nothing to do."""
        return self._in_turn(self._step)

    def help(self) -> bool:
        """Runs one step if there is something to do and no worker thread that does it; says whether it did."""
        return self._wake_worker is None and len(self._in_flight) > 0 and self.step()

    def _in_turn(self, work: Callable[[], T]) -> T:
        """Runs a step, which holds the lock, after all that wait for the lock, and then does what `_locked` does."""
        self._check_process()
        with self._queue_lock:
            pass
        try:
            with self._lock:
                return work()
        finally:
            if self._wake_worker is None:
                self._end_cancelled_unless_busy()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Holds the lock, and then ends the requests that were cancelled meanwhile."""
        self._check_process()
        try:
            with self._queue_lock, self._lock:
                yield
        finally:
            if self._wake_worker is None:
                self._end_cancelled_unless_busy()

    def _end_cancelled_unless_busy(self) -> None:
        """Ends cancelled requests, or leaves that to the call that holds the lock."""
        while self._cancelled:
            held = False
            try:
                held = self._lock.acquire(blocking=False)
                if not held:
                    return
                self._end_cancelled()
                if not self._in_flight:  # no other call would collect the launched steps, which hold blocks
                    self._collect_down_to(0)
            except BaseException as error:
                if held:
                    self._start_over(error)
                if not isinstance(error, Exception):
                    raise
            finally:
                if held:
                    self._lock.release()

    def _step(self) -> bool:
        try:
            return self._run_step()
        except BaseException as error:
            self._start_over(error)
            if not isinstance(error, Exception):  # it interrupts this thread
                raise
            return True

    def _run_step(self) -> bool:
        self._end_cancelled()
        self._in_flight.end_late()
        if not self._in_flight:
            self._collect_down_to(0)
            return False
        scheduled = self._scheduler.schedule(in_flight=bool(self._launched))
        has_work = scheduled is not None and bool(scheduled[0] or scheduled[1])
        if scheduled is not None and has_work:
            self._launch(*scheduled)
        else:
            assert self._launched, "a step without work: an unfinished sequence can always run"
        self._collect_down_to(1 if has_work and self.run_ahead else 0)
        if not self._in_flight:
            self._collect_down_to(0)
        return True

    def _with_pictures(self, step: Step) -> Step:
        """Decodes pictures that have left the caches since their request was made; one that fails ends that alone.

        Returns the step of the requests that have not ended.
        """
        for chunk in step.chunks:
            try:
                self._runner.load_pictures(chunk)
            except Exception as error:
                self._in_flight.fail_sequences([chunk.sequence], errors_of_picture(error))
        chunks = [chunk for chunk in step.chunks if self._in_flight.holds(chunk.sequence)]
        if len(chunks) == len(step.chunks):
            return step
        decoding = [sequence for sequence in step.decodes.sequences if self._in_flight.holds(sequence)]
        return plan_step(build_decodes(decoding), chunks)

    def _collect_down_to(self, most: int) -> None:
        """Collects the oldest steps until at most `most` are launched."""
        while len(self._launched) > most:
            self._collect(self._launched.popleft())

    def _launch(self, decodes: Decodes, chunks: list[Chunk]) -> None:
        step = plan_step(decodes, chunks)
        if step.has_prompts:
            step = self._with_pictures(step)
        if not (step.chunks or step.decodes):
            return
        try:
            launched = self._runner.launch(step)
        except EngineDeadError:
            raise
        except Exception as error:  # the cache's content for the sequences is unknown now, so their requests end
            self._collect_down_to(0)
            self._end_step_of(step, error)
            return
        self._scheduler.launched(step)
        self._launched.append(launched)
        self._num_steps += 1

    def _end_step_of(self, step: Step, error: Exception) -> None:
        """Fails the requests of a step that failed on the device, and no others."""
        self._in_flight.fail_sequences(step.sequences, errors_of_step(error))
        self._collect_down_to(0)
        self._runner.fail()

    def _collect(self, launched: LaunchedStep) -> None:
        """Waits for a launched step and gives its tokens to their requests."""
        try:
            result = self._runner.collect(launched)
        except EngineDeadError:
            raise
        except Exception as error:  # the tokens that the step drew are lost
            self._end_step_of(launched.step, error)
            return
        if self._in_flight.trace is not None:
            self._in_flight.trace.step(launched, result, self.stats())
        self._in_flight.collect(launched, result)

    def _end_cancelled(self) -> None:
        while self._cancelled:
            request = self._cancelled.popleft()
            if not request.done:
                self._in_flight.fail(request, RequestError("the request was cancelled"), "cancelled")

    def _start_over(self, error: BaseException) -> None:
        """Ends every request after an error that came between two changes that belong together, and clears the books.

        So nothing goes on from half a change. An interrupt of a worker thread is left to `fail_worker`. Without its
        other ranks the engine is dead.
        """
        if self._wake_worker is not None and not isinstance(error, Exception):
            return
        if isinstance(error, EngineDeadError):
            self._die(without_frames(error))
            return
        try:
            self._launched.clear()
            self._in_flight.start_over(errors_of_step(error))
            self._runner.fail()
        except Exception as second:
            self._die(shareable(second))
        except BaseException as second:  # impatience: all of this may be done again
            self._start_over(second)
            raise

    def _die(self, cause: BaseException) -> None:
        """Fails every request and refuses new ones. cause: without frames, because this object keeps it."""
        self._fatal_error = cause
        self._launched.clear()
        self._cancelled.clear()
        self._in_flight.abandon(lambda: dead(cause))


def _closed() -> RequestError:
    return RequestError("the engine is closed; load the model again")

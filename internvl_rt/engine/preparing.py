"""Prepares calls of asyncio in a few threads, texts apart from pictures, so that a text waits for no picture.

What the caller awaits ends when its task is cancelled or its time is over, whatever the threads do. A call that still
waits for a thread is then forgotten; one that has a thread is abandoned between two pictures, and its result is undone.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, Generic, TypeVar

import torch

from internvl_rt.errors import QueueFullError
from internvl_rt.inputs.proceed import LateError, Proceed
from internvl_rt.inputs.raw_prompt import RawPrompt
from internvl_rt.steps.device_stream import on_this_stream

MEDIA_THREADS = 4  # they run in parallel, since decoding a picture releases the interpreter lock
TEXT_THREADS = 2

T = TypeVar("T")


class AbandonedError(Exception):
    """Ends work whose caller has gone."""


class Preparing:
    """Threads that prepare calls, and the calls that are being prepared or wait for that."""

    def __init__(self, device: torch.device, most: int, check: Callable[[], None]) -> None:
        """most: calls at a time; more are refused. check: raises if the engine takes no calls any more."""
        self._device, self._most, self._check = device, most, check
        self._texts = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="internvl_rt prepares texts")
        self._media = ThreadPoolExecutor(MEDIA_THREADS, thread_name_prefix="internvl_rt prepares media")
        self._unfinished: set[Future[Any]] = set()

    def __len__(self) -> int:
        return len(self._unfinished)

    def check(self) -> None:
        """Raises QueueFullError if there is no room for a call, or what `check` of the engine raises."""
        self._check()
        if len(self._unfinished) >= self._most:
            raise QueueFullError(
                f"{len(self._unfinished)} calls wait to be prepared, which is the limit; try again later, or raise "
                "max_num_seqs or max_waiting"
            )

    async def run(
        self,
        work: Callable[[Proceed], T],
        *,
        media: bool,
        undo: Callable[[T], None] | None = None,
        deadline_s: float | None = None,
    ) -> T:
        """Returns what `work` returns or raises. Raises LateError if the deadline (by perf_counter) passes before.

        undo: gets a result that came too late.
        """
        self.check()
        job = _Job(work, self._check)
        is_taken = False  # whether the caller gets the result; it may be cancelled in the turn that brings the result
        try:
            future = (self._media if media else self._texts).submit(on_this_stream(job.run, self._device))
        except RuntimeError:
            self._check()  # the threads end after the engine was closed
            raise
        self._unfinished.add(future)
        future.add_done_callback(self._unfinished.discard)
        result = asyncio.wrap_future(future)
        try:
            await asyncio.wait([result], timeout=None if deadline_s is None else deadline_s - time.perf_counter())
            if not result.done():
                raise LateError
            taken = result.result()
            is_taken = True
            return taken
        finally:
            if not is_taken:
                job.abandon()
                if not future.cancel() and undo is not None:
                    future.add_done_callback(partial(_undo, undo))
                with suppress(RuntimeError):  # the caller's event loop was closed while it waited
                    if not result.cancel() and not result.cancelled():
                        result.exception()  # asyncio would log one that nobody takes
            del job, future, result  # an error refers to this frame, which must not refer to the error

    def shutdown(self) -> None:
        """Waits for the calls that have a thread."""
        self._texts.shutdown()
        self._media.shutdown()


class _Job(Generic[T]):
    """Work for a thread. Abandoned work is dropped with all that it refers to, even while it waits for its turn."""

    def __init__(self, work: Callable[[Proceed], T], check: Callable[[], None]) -> None:
        """check: raises if the engine takes no calls any more."""
        self._work: Callable[[Proceed], T] | None = work
        self._abandoned, self._check_engine = False, check

    def abandon(self) -> None:
        self._abandoned, self._work = True, None

    def run(self) -> T:
        work, self._work = self._work, None
        if work is None:
            raise AbandonedError
        self._proceed()
        return work(self._proceed)

    def _proceed(self) -> None:
        if self._abandoned:
            raise AbandonedError
        self._check_engine()


def _undo(undo: Callable[[T], None], future: "Future[T]") -> None:
    if not future.cancelled() and future.exception() is None:
        undo(future.result())


def has_media(messages: object) -> bool:
    """Says whether a snapshot of messages, valid or not, may hold anything but text. A snapshot is not very long."""
    if isinstance(messages, RawPrompt):
        return messages.pixel_values is not None
    if not isinstance(messages, list):
        return False
    contents = (message.get("content") for message in messages if isinstance(message, dict))
    parts = (part for content in contents if isinstance(content, list) for part in content)
    return any(isinstance(part, dict) and part.get("type") != "text" for part in parts)


class Given(Generic[T]):
    """What a call was given, copied when it was called; an error is raised where the call is awaited."""

    def __init__(self, copy: Callable[[], T]) -> None:
        self._copied: Future[T] = Future()
        try:
            self._copied.set_result(copy())
        except Exception as error:
            self._copied.set_exception(error)

    def take(self) -> T:
        """Returns the copy, and holds it no longer. Raises what copying raised."""
        copied = self._copied
        del self._copied
        try:
            return copied.result()
        finally:
            del copied  # an error refers to this frame, which must not refer to the error

"""Makes the errors of requests that a failed step ends, and of callers whose engine is dead."""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import ENOMEM
from typing import TypeVar

import torch

from internvl_rt.errors import EngineDeadError, InternVLError, StepError, TranslateErrors, quoted

LOG = logging.getLogger("internvl_rt")

E = TypeVar("E", bound=BaseException)


def is_out_of_memory(error: BaseException) -> bool:
    """Says whether the memory of the host or of a device ran out; on the CPU, torch has no class for that."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == ENOMEM
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def errors_of_step(error: BaseException) -> Callable[[], StepError]:
    """Returns a function that makes an error for each request that `error` ends, to be raised by its own caller.

    Their common cause has no frames, because the frames of a step hold the texts of all its requests; the log has them,
    at level DEBUG.
    """
    LOG.debug("a step failed", exc_info=error)
    what = type(error).__name__ + (f"({quoted(str(error))})" if str(error) else "")
    if not isinstance(error, Exception):
        text = f"the thread that ran a step was interrupted by {what}, and what it ran is lost; send the request again"
    elif is_out_of_memory(error):
        text = (
            f"memory ran out, by {what}; send fewer or smaller pictures and texts at a time, or load the "
            "model with a lower max_num_seqs, max_tokens_per_step, kv_cache_bytes or visual_cache_bytes"
        )
    else:
        text = (
            f"a step failed by {what}, and what it ran is lost; send the request again, and report the error if it "
            "comes again: with logging at level DEBUG, 'internvl_rt' logs where it was raised"
        )
    cause = shareable(error)
    return lambda: _caused(StepError(text), cause)


def errors_of_picture(error: Exception) -> Callable[[], InternVLError]:
    """Returns a function that makes the error of the one request whose picture failed in a step."""
    return (lambda: without_frames(error)) if isinstance(error, InternVLError) else errors_of_step(error)


def fault_errors() -> TranslateErrors:
    """Makes a StepError of any other error than the package's own and interrupts."""
    return TranslateErrors(lambda error: errors_of_step(error)() if isinstance(error, Exception) else None)


def numbered(index: int, error: InternVLError) -> InternVLError:
    """Returns the error of one of many conversations, with the index of that one."""
    named = type(error)(f"request {index}: {error}")
    named.media_id = error.media_id
    return named


@contextmanager
def named_by_index(what: str, index: int, number: int) -> Iterator[None]:
    """Makes the error of one of several texts name its index."""
    try:
        yield
    except InternVLError as error:
        if number == 1:
            raise
        raise type(error)(f"{what}[{index}]: {error}") from error


def memory_faults() -> TranslateErrors:
    """Makes a StepError of a lack of memory, and lets other errors through."""
    return TranslateErrors(lambda error: errors_of_step(error)() if is_out_of_memory(error) else None)


def dead(cause: BaseException) -> EngineDeadError:
    """cause: as `shareable` or `without_frames` returns it"""
    if isinstance(cause, EngineDeadError):
        return EngineDeadError(str(cause))
    text = (
        f"the thread that ran the engine's steps was ended by {cause!r}, and what it ran is lost; send the request "
        "again, to a new engine if this one refuses it"
    )
    return _caused(EngineDeadError(text), cause)


def shareable(error: BaseException) -> BaseException:
    """Returns an error without frames, as the cause of others: a copy of an interrupt, which goes on to its caller."""
    if isinstance(error, Exception):
        return without_frames(error)
    try:
        return copy.copy(error)  # does not copy the traceback
    except Exception:  # its class cannot be called with its arguments
        return InternVLError(repr(error))


def without_frames(error: E) -> E:
    """Removes the tracebacks of an error, and of all those that it came from."""
    pending: list[BaseException] = [error]
    seen = {id(error)}
    while pending:
        each = pending.pop()
        each.__traceback__ = None
        origins = [origin for origin in (each.__cause__, each.__context__) if origin and id(origin) not in seen]
        pending += origins
        seen |= set(map(id, origins))
    return error


def _caused(error: E, cause: BaseException) -> E:
    error.__cause__ = cause
    return error

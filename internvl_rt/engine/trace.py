"""Writes steps, requests and cache use as Trace Event JSON, which Perfetto and chrome://tracing show.

The file holds numbers alone, nothing of prompts and answers. Each event, of some hundred bytes, is written as it
happens, so memory stays bounded; the file gets its name when it is whole.
"""

import json
import secrets
import stat
from collections.abc import Mapping
from collections.abc import Sequence as Items
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from internvl_rt.errors import RequestError, quoted
from internvl_rt.steps.runner import LaunchedStep, StepResult

Phase = tuple[str, float]  # name of what begins, and its time by perf_counter

_KINDS = {
    stat.S_ISDIR: "a folder",
    stat.S_ISLNK: "a symbolic link",
    stat.S_ISFIFO: "a named pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}
_PROCESS = {"pid": 1, "tid": 1}
_NAMES = (
    {"name": "process_name", "ph": "M", **_PROCESS, "args": {"name": "internvl_rt"}},
    {"name": "thread_name", "ph": "M", **_PROCESS, "args": {"name": "steps"}},
)


class Trace:
    """Open it with `with`; inside, one thread at a time may call its methods. Times are by perf_counter."""

    def __init__(self, path: Path) -> None:
        """Raises RequestError if the file cannot be written."""
        self._path = path
        self._error: OSError | None = None
        self._end_s = 0.0  # when the latest step ended
        self._num_requests = 0
        try:
            _check_replaceable(path)
            self._part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
            self._file = self._part.open("x", encoding="ascii")
        except OSError as error:
            raise self._refusal(error) from error
        self._write('{"displayTimeUnit": "ms", "traceEvents": [\n' + ",\n".join(map(json.dumps, _NAMES)), flush=True)
        if self._error is not None:
            raise self._refusal(self._error) from self._error

    def step(self, launched: LaunchedStep, result: StepResult, stats: Mapping[str, int | float]) -> None:
        """Writes a step that has ended, and the engine's `stats()` before its tokens are handed out."""
        # Steps run one after another: each begins at its launch or at the previous step's end, whichever is later.
        start_s = max(launched.start.host_s, self._end_s)
        encoded_s = start_s + result.vision_s
        self._end_s = encoded_s + result.decoder_s
        step = launched.step
        shape = {
            "sequences": len(step.decodes) + len(step.chunks),
            "tokens": len(step.decodes) + step.num_tokens,
            "draws": step.num_draws,
            "tiles": result.num_tiles,
        }
        for name, begin_s, seconds, work in (
            ("vision", start_s, result.vision_s, result.vision_work),
            ("decoder", encoded_s, result.decoder_s, result.decoder_work),
        ):
            if name == "decoder" or result.num_tiles:
                args = {**shape, "flops": work.flops, "bytes": work.bytes}
                self._event(name, "X", begin_s, dur=_us(seconds), args=args)
        self._event("KV blocks", "C", self._end_s, args={"used": stats["kv_blocks_used"]})
        self._event("requests", "C", self._end_s, args={name: stats[name] for name in ("running", "waiting")})

    def request(self, phases: Items[Phase], end_s: float, args: Mapping[str, object]) -> None:
        """Writes a request that has ended, or is in flight when the trace ends; a phase ends where the next begins."""
        self._num_requests += 1
        same = {"cat": "request", "id": self._num_requests}
        ends = [*(start_s for _, start_s in phases[1:]), end_s]
        self._event("request", "b", phases[0][1], **same, args=args)
        for (name, start_s), stop_s in zip(phases, ends, strict=True):
            self._event(name, "b", start_s, **same)
            self._event(name, "e", stop_s, **same)
        self._event("request", "e", end_s, **same)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Gives the file its name, also if the block failed, but not if it failed before the first event.

        Raises RequestError if the file could not be written.
        """
        self._write("\n]}\n", flush=True)
        if kind is not None and not self._end_s and not self._num_requests:
            self._discard()
        elif self._error is None:
            try:
                self._file.close()
                _check_replaceable(self._path)  # it may have become something else meanwhile
                self._part.replace(self._path)
            except OSError as problem:
                self._give_up(problem)
            except RequestError:
                self._discard()
                if kind is None:
                    raise
        if self._error is not None and kind is None:
            raise self._refusal(self._error) from self._error

    def _event(self, name: str, phase: str, at_s: float, **more: Any) -> None:
        self._write(",\n" + json.dumps({"name": name, "ph": phase, "ts": _us(at_s), **_PROCESS, **more}))

    def _write(self, text: str, *, flush: bool = False) -> None:
        """Writes to the file. A full disk ends the trace, not the requests; the end of the `with` block reports it."""
        if self._error is not None:
            return
        try:
            self._file.write(text)
            if flush:
                self._file.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._error = error
        self._discard()

    def _discard(self) -> None:
        with suppress(OSError):
            self._file.close()  # tries again to write what did not fit
        with suppress(OSError):
            self._part.unlink(missing_ok=True)

    def _refusal(self, error: OSError) -> RequestError:
        return RequestError(
            f"{quoted(str(self._path))}: the trace could not be written: {error.strerror or error}; give a file in a "
            "folder that exists, may be written and has room"
        )


def _check_replaceable(path: Path) -> None:
    """Raises RequestError unless the path is a regular file, or nothing yet; OSError if its folder cannot be read.

    A link is not followed: what is replaced is what the path itself names.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except ValueError as error:  # a null byte, or half a surrogate pair
        raise RequestError(f"{quoted(str(path))}: no file can have this name ({error}); give another one") from error
    if not stat.S_ISREG(mode):
        what = next((name for is_kind, name in _KINDS.items() if is_kind(mode)), "something else")
        raise RequestError(
            f"{quoted(str(path))}: the trace makes a new file or replaces a regular one, but this is {what}; "
            "give the name of a file"
        )


def _us(seconds: float) -> float:
    """Converts to microseconds, rounded to nanoseconds."""
    return round(seconds * 1e6, 3)

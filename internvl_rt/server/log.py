"""Writes what the server has to say as lines of JSON: to stderr, one object a line, nothing of prompts and answers."""

import sys
import time
import traceback
from contextlib import suppress
from typing import TextIO

import msgspec


class Log:
    """Any thread may write to it. A stream that cannot be written to loses its lines and disturbs nothing."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream

    def write(self, event: str, /, **facts: object) -> None:
        """Writes one line with the time, a level ("info" unless given), the event and its facts."""
        line = {"time": round(time.time(), 3), "level": "info", "event": event, **facts}
        text = msgspec.json.encode(line, enc_hook=str).decode("utf-8", "replace")
        with suppress(OSError, ValueError):
            print(text, file=self._stream or sys.stderr, flush=True)

    def error(self, event: str, error: BaseException, /, **facts: object) -> None:
        """Writes an error with its traceback, which no client gets to see."""
        trace = "".join(traceback.format_exception(error))
        self.write(event, **{**facts, "level": "error", "error": repr(error), "traceback": trace})

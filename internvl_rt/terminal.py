"""The program's standard streams and Ctrl-C: no text, closed stream, full disk or interrupt may end in a traceback."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from typing import NoReturn, TextIO

EXIT_INTERRUPT = 130


def prepare_streams() -> None:
    """Makes the streams take any text, and stderr exist. A closed stdin or stdout stays None in `sys`.

    What stdout's or stderr's encoding cannot show is written as escape sequences. Bytes of stdin that are no text of
    its encoding become lone surrogates, which name the same file as the bytes do.
    """
    for number in range(3):  # a file that is opened later must not take the place of a closed stream
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if sys.stderr is None:  # print would write to stdout instead
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    for stream, errors in (
        (sys.stdin, "surrogateescape"),
        (sys.stdout, "backslashreplace"),
        (sys.stderr, "backslashreplace"),
    ):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=errors)


def say(text: str, *, end: str = "\n") -> None:
    """Prints a line, or a part of one, to stderr, or drops it if nobody can read it."""
    with suppress(OSError):
        print(text, file=sys.stderr, end=end, flush=True)


def flush_or_discard(stream: TextIO | None) -> None:
    """Writes what the stream holds. If that fails, the rest goes nowhere, so that Python's own try at exit succeeds."""
    if stream is None:
        return
    try:
        stream.flush()
    except OSError:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def importing() -> Iterator[None]:
    """Makes Ctrl-C end the program at once: an import in C may swallow the exception, or turn it into another one."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _end_at_once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end_at_once(*_: object) -> NoReturn:
    with suppress(OSError):
        os.write(2, b"\ninterrupted\n")
    os._exit(EXIT_INTERRUPT)

"""What every process does that an engine has started: it listens to the engine, and ends when that is gone."""

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from internvl_rt.errors import InternVLError

_REPORT_AFTER_S = 0.3  # what ends one process makes others fail: then the engine notices the end first


class Parent:
    """The engine's process, as one that it has started sees it."""

    def __init__(self, socket: int, on_end: Callable[[], None]) -> None:
        """socket: the number of an open file. on_end: called when the engine is gone, before this process ends."""
        self._connection, self._on_end = Connection(socket), on_end
        self._messages: SimpleQueue[bytes] = SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def hear(self) -> bytes:
        """Waits for the next message."""
        return self._messages.get()

    def hear_facts(self) -> dict[str, Any]:
        """Waits for the next message, which is JSON."""
        facts: dict[str, Any] = json.loads(self.hear())
        return facts

    def answer(self, value: Any) -> None:
        """Sends a value as JSON."""
        self._connection.send_bytes(json.dumps(value).encode())

    def _listen(self) -> None:
        try:
            while True:
                self._messages.put(self._connection.recv_bytes())
        except (EOFError, OSError):  # the engine is closed, or gone
            self._on_end()
            _leave(0)


def run_child(socket: int, work: Callable[[Parent], None], on_end: Callable[[], None] = lambda: None) -> None:
    """Runs `work`, which ends with the engine; an error of it is told to the engine. Does not return."""
    # The engine's process gets the signals, and its end is what ends this one.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    parent = Parent(socket, on_end)
    try:
        work(parent)
    except InternVLError as error:
        parent.answer({"error": type(error).__name__, "text": str(error)})
    except BaseException as error:
        time.sleep(_REPORT_AFTER_S)
        traceback.print_exc()
        parent.answer({"error": "", "text": f"{type(error).__name__}: {error}"})
    _leave(1)


def _leave(code: int) -> None:
    """Ends the process at once, even if its main thread waits for a device or for another process."""
    sys.stderr.flush()
    os._exit(code)

"""The processes that an engine starts on its own machine: how it starts them, tells them things, and notices their end.

Each process has one socket, which no other process can open. When the engine's process ends, however it ends, the
sockets are closed, and the others end at once, whatever they are doing. When one of the others ends, the engine ends
the rest, because what they compute together is lost.
"""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from internvl_rt.errors import CheckpointError, ConfigError, EngineDeadError, InternVLError, RequestError, quoted

_PROGRAM = """# internvl_rt: {name}
import sys
sys.path[:] = {path!r}
from internvl_rt.engine.{module} import main
main({socket}, *{arguments!r})"""
_ERRORS = {kind.__name__: kind for kind in (CheckpointError, ConfigError, RequestError)}
_POLL_S = 0.05
_CAUSE_POLLS = 20
_STOP_S = 2.0  # after which a process that has not ended is killed

OnAnswer = Callable[[int, Any], None]


class Child(NamedTuple):
    """A process to be started. name: in messages. files: numbers of open files that it gets."""

    name: str
    module: str  # of this package; its `main` gets the number of the socket, and the arguments
    arguments: tuple[str | int, ...]
    files: tuple[int, ...] = ()


class Children:
    """Processes that have been started. Close it to end them; the garbage collector does, too."""

    def __init__(self, children: Items[Child], on_answer: OnAnswer | None = None) -> None:
        """on_answer: called by a thread with the number of a process and what it answers, from JSON."""
        self._processes, self._sending = _Processes(children, on_answer), threading.Lock()
        self._finalizer = weakref.finalize(self, self._processes.stop)

    def tell(self, facts: Mapping[str, Any]) -> None:
        """Sends the same facts to every process, as JSON."""
        self.send(json.dumps(facts).encode())

    def send(self, message: bytes, number: int | None = None) -> None:
        """Sends a message to a process, by default to every one. Raises EngineDeadError if one is lost.

        Any thread may call it.
        """
        self.check()
        with self._sending:
            for each, connection in enumerate(self._processes.connections):
                if number in (None, each):
                    try:
                        connection.send_bytes(message)
                    except OSError:
                        self._processes.lose(each)
        self.check()

    def check(self) -> None:
        """Raises EngineDeadError if a process is lost, or the error that ended one."""
        if self._processes.failure is not None:
            raise self._processes.failure()

    def on_loss(self, call: Callable[[], None]) -> None:
        """Calls this, from another thread, when a process is lost."""
        self._processes.on_loss = call

    def fail(self, error: BaseException) -> None:
        """Ends the processes, because this one has failed in the middle of what all do together."""
        if self.wait_for_failure() is None:
            self._processes.lose(None, f"{type(error).__name__}: {error}")

    def wait_for_failure(self) -> InternVLError | None:
        """Returns the error of what ended a process, which is noticed a moment after what it was part of fails."""
        for _ in range(_CAUSE_POLLS):
            if self._processes.failure is not None:
                return self._processes.failure()
            time.sleep(_POLL_S)
        return None

    def close(self) -> None:
        """Ends the processes, and returns when they have ended."""
        self._finalizer()


class _Processes:
    """What a `Children` owns; it does not refer to that, which could otherwise never be collected."""

    def __init__(self, children: Items[Child], on_answer: OnAnswer | None) -> None:
        self.failure: Callable[[], InternVLError] | None = None
        self.on_loss: Callable[[], None] = lambda: None
        self.connections: list[Connection] = []
        self._names = [child.name for child in children]
        self._on_answer = on_answer or (lambda number, answer: None)
        self._started: list[subprocess.Popen[bytes]] = []
        self._lock = threading.RLock()  # the garbage collector may call `stop` in the middle of any other call
        self._stopped = False
        self._watcher: threading.Thread | None = None
        try:
            for child in children:
                self._start(child)
        except BaseException:
            self.stop()
            raise
        _LIVING.add(self)
        self._watcher = threading.Thread(target=self._watch, name="internvl_rt watches its processes", daemon=True)
        self._watcher.start()

    def _start(self, child: Child) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            how = {"name": child.name, "module": child.module, "arguments": child.arguments}
            # In a session of its own no key of a terminal reaches it: the engine decides when it ends.
            started = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM.format(path=sys.path, socket=theirs.fileno(), **how)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno(), *child.files],
                start_new_session=True,
            )
        self._started.append(started)
        self.connections.append(Connection(ours.detach()))

    def _watch(self) -> None:
        """Passes on what the processes answer, and notices their end."""
        left = {id(connection): number for number, connection in enumerate(self.connections)}
        while left and not self._stopped:
            for ready in wait([self.connections[number] for number in left.values()], timeout=1.0):
                number = left[id(ready)]
                try:
                    answer = json.loads(self.connections[number].recv_bytes())
                except (EOFError, OSError):
                    del left[id(ready)]
                    self.lose(number)
                    continue
                if isinstance(answer, dict) and "error" in answer:
                    self.lose(number, answer["text"], _ERRORS.get(answer["error"]))
                    continue
                try:
                    self._on_answer(number, answer)
                except Exception as error:  # as when memory runs out; nobody else would notice
                    self.lose(number, f"{type(error).__name__}: {error}")

    def lose(self, number: int | None, text: str | None = None, kind: type[InternVLError] | None = None) -> None:
        """Records that a process, or this one, has failed, unless one has already, and ends the others."""
        with self._lock:
            if self.failure is not None or self._stopped:
                return
            self.failure = _failure("rank 0" if number is None else self._names[number], text, kind)
        for started in self._started:
            started.kill()
        self.on_loss()
        self._reap()

    def stop(self) -> None:
        """Ends the processes, and waits until they have ended. Does nothing in a forked process."""
        with self._lock:
            self._stopped = True
        _LIVING.discard(self)
        for connection in self.connections:
            with suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as ours:
                ours.shutdown(socket.SHUT_RDWR)  # both ends read to the end now; whoever waits here wakes up
        if self._watcher is not None and self._watcher is not threading.current_thread():
            self._watcher.join()
        for connection in self.connections:
            connection.close()
        self._reap()
        for started in self._started:
            started.kill()
        self._reap()

    def _reap(self) -> None:
        """Waits for the processes to end, for a while."""
        for started in self._started:
            with suppress(subprocess.TimeoutExpired):
                started.wait(_STOP_S)

    def close_in_fork(self) -> None:
        """Closes the sockets of a copy in a forked process, which would keep the others alive without this one."""
        self._stopped = True
        for connection in self.connections:
            connection.close()
        self.connections, self._started, self._watcher = [], [], None


def _failure(name: str, text: str | None, kind: type[InternVLError] | None) -> Callable[[], InternVLError]:
    if kind is not None and text is not None:
        return lambda: kind(text)
    how = "has ended" if text is None else f"has failed: {quoted(text)}"
    return lambda: EngineDeadError(
        f"{name} of this engine {how}, and what was being computed is lost; load the model again and send the request "
        "again"
    )


_LIVING: "weakref.WeakSet[_Processes]" = weakref.WeakSet()


def _close_all_in_fork() -> None:
    for processes in list(_LIVING):
        processes.close_in_fork()


os.register_at_fork(after_in_child=_close_all_in_fork)

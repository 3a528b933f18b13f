"""Sends requests, and says what became of each as its caller sees it; as a program, over HTTP to a server.

The program is a process of its own, so that it shares no interpreter lock with the server it measures. It imports
nothing of this package, and so starts at once. What it reads on stdin:

* a line of JSON with the server's `host` and `port`, and `sizes` of bytes that follow: texts that requests share;
* for each run a line with a `Load`, one for each `Request`, and a line `null` after the last one.

It reads no further ahead than its buffer goes, and writes a line for each `Outcome` of a run, and `null` after them.
"""

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, Protocol, TypeVar

PATH = "/v1/chat/completions"
QUEUE_FULL = 429


class Timed(Protocol):
    """A request, whatever it asks."""

    @property
    def at_s(self) -> float:
        """When it is to arrive."""

    @property
    def has_picture(self) -> bool: ...


R = TypeVar("R", bound=Timed)


@dataclass(frozen=True, slots=True)
class Request:
    at_s: float
    has_picture: bool
    parts: list[str | int]  # of its body: a text, or the index of one that requests share


@dataclass(frozen=True, slots=True)
class Load:
    """How requests are sent: each at its time, or, by `callers`, when the caller's last one has its answer."""

    seconds: float  # in which they are sent
    drain_s: float  # in which the last ones may get their answers
    callers: int | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a request. Seconds count from when it was to arrive, so that delaying it gains nothing."""

    end: Literal["answered", "refused", "unfinished"]
    has_picture: bool
    prompt_tokens: int = 0
    completion_tokens: int = 0
    ttft_s: float = 0.0  # to the first text
    total_s: float = 0.0
    queued_s: float | None = None  # where the engine tells it

    @property
    def token_s(self) -> float | None:
        """The mean time of a token after the first; None where there is none."""
        return (self.total_s - self.ttft_s) / (self.completion_tokens - 1) if self.completion_tokens > 1 else None


async def drive(
    take: Callable[[], Awaitable[R | None]], ask: Callable[[R, float], Coroutine[Any, Any, Outcome]], load: Load
) -> list[Outcome]:
    """Sends requests as a load says, and returns what became of each. The first error ends it and is raised.

    take: returns the next request, None after the last. ask: sends one, given when it was to arrive.
    """
    start_s = time.perf_counter()
    asked: list[tuple[R, asyncio.Task[Outcome]]] = []

    async def send_each_at_its_time() -> None:
        while (request := await take()) is not None:
            await asyncio.sleep(start_s + request.at_s - time.perf_counter())
            asked.append((request, group.create_task(ask(request, start_s + request.at_s))))

    async def send_one_by_one() -> None:
        while time.perf_counter() < start_s + load.seconds and (request := await take()) is not None:
            asked.append((request, group.create_task(ask(request, time.perf_counter()))))
            await asked[-1][1]

    try:
        async with asyncio.timeout(load.seconds + load.drain_s), asyncio.TaskGroup() as group:
            for _ in range(load.callers or 1):
                group.create_task(send_each_at_its_time() if load.callers is None else send_one_by_one())
    except TimeoutError:
        pass
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [
        Outcome("unfinished", request.has_picture) if task.cancelled() else task.result() for request, task in asked
    ]


class ResponseReader:
    """Reads the bytes of one HTTP response, wherever they are cut."""

    def __init__(self) -> None:
        self.status = 0  # until its head is there
        self.is_complete = False
        self._state: Literal["head", "size", "body", "chunk", "chunk end", "trailer"] = "head"
        self._held, self._left = b"", 0  # bytes that are not read yet; that the body or chunk still lacks

    def push(self, data: bytes) -> bytes:
        """Returns what new bytes add to the body."""
        self._held += data
        body: list[bytes] = []
        while not self.is_complete:
            if self._state in ("body", "chunk"):
                body.append(self._held[: self._left])
                self._held = self._held[len(body[-1]) :]
                self._left -= len(body[-1])
                if self._left:
                    break
                self.is_complete = self._state == "body"
                self._state = "chunk end"
                continue
            line, found, rest = self._held.partition(b"\r\n\r\n" if self._state == "head" else b"\r\n")
            if not found:
                break
            self._held = rest
            self._read_line(line)
        return b"".join(body)

    def _read_line(self, line: bytes) -> None:
        if self._state == "head":
            first, *fields = line.split(b"\r\n")
            self.status = int(first.split(b" ")[1])
            headers = {name.lower(): value.strip() for name, _, value in (each.partition(b":") for each in fields)}
            self._state = "size" if headers.get(b"transfer-encoding") == b"chunked" else "body"
            self._left = int(headers.get(b"content-length", 0))
        elif self._state == "size":
            self._left = int(line.partition(b";")[0], 16)
            self._state = "chunk" if self._left else "trailer"
        elif self._state == "chunk end":
            self._state = "size"
        else:
            self.is_complete = not line  # an empty line ends the trailer


class EventReader:
    """Reads the data of server-sent events, wherever they are cut."""

    def __init__(self) -> None:
        self._held = b""

    def push(self, body: bytes) -> list[bytes]:
        *events, self._held = (self._held + body).split(b"\n\n")
        return [event.removeprefix(b"data: ") for event in events if event.startswith(b"data: ")]


class Connection(asyncio.Protocol):
    """A connection to the server: one request after the other, each answered as a stream."""

    def __init__(self, host: str, port: int) -> None:
        self._head = f"POST {PATH} HTTP/1.1\r\nhost: {host}:{port}\r\ncontent-type: application/json\r\n"
        self._transport: asyncio.Transport | None = None
        self._ended: asyncio.Future[None] | None = None  # of the answer that is awaited
        self.is_lost = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    async def ask(self, request: Request, body: Sequence[bytes], planned_s: float) -> Outcome:
        """Sends a request, whose body comes in parts. Raises RuntimeError for an answer that is none."""
        assert self._transport is not None
        self._response, self._events, self._failure = ResponseReader(), EventReader(), b""
        self._first_s, self._end_s, self._usage = 0.0, 0.0, dict[str, int]()
        self._ended = asyncio.get_running_loop().create_future()
        head = f"{self._head}content-length: {sum(map(len, body))}\r\n\r\n"
        self._transport.writelines([head.encode(), *body])
        try:
            await self._ended
        finally:
            if not self._response.is_complete:
                self._transport.abort()
        if self._response.status == QUEUE_FULL:
            return Outcome("refused", request.has_picture)
        if self._failure or not self._usage:
            raise RuntimeError(f"the server answered {self._response.status}: {self._failure.decode()}")
        return Outcome(
            "answered",
            request.has_picture,
            self._usage["prompt_tokens"],
            self._usage["completion_tokens"],
            (self._first_s or self._end_s) - planned_s,
            self._end_s - planned_s,
        )

    def data_received(self, data: bytes) -> None:
        now_s = time.perf_counter()
        body = self._response.push(data)
        if self._response.status != 200:
            self._failure += body
            body = b""
        for event in self._events.push(body):
            if event != b"[DONE]":
                self._take(event, now_s)
        if self._response.is_complete and self._ended is not None and not self._ended.done():
            self._ended.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True
        if self._ended is not None and not self._ended.done():
            self._ended.set_exception(exc or ConnectionError("the server closed the connection"))

    def _take(self, event: bytes, now_s: float) -> None:
        chunk: dict[str, Any] = json.loads(event)
        if "error" in chunk:
            self._failure += event
            return
        if not self._first_s and any(choice["delta"].get("content") for choice in chunk["choices"]):
            self._first_s = now_s
        if usage := chunk.get("usage"):
            self._usage, self._end_s = usage, now_s


class _Requests:
    """The requests of one run, which stand on lines of stdin. Several callers may take one at a time."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader, self._lock, self._is_ended = reader, asyncio.Lock(), False

    async def take(self) -> Request | None:
        """Returns the next request; None after the last, and when the parent process has gone."""
        async with self._lock:
            found = None if self._is_ended else json.loads(await self._reader.readline() or b"null")
            self._is_ended = found is None
        return None if found is None else Request(**found)


async def run() -> None:
    """Runs the program until stdin ends, or a request fails, which its last line tells."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin.buffer)
    begun = json.loads(await reader.readline() or b"null")
    if begun is None:
        return
    host, port = begun["host"], begun["port"]
    shared = [await reader.readexactly(size) for size in begun["sizes"]]
    idle: list[Connection] = []

    async def ask(request: Request, planned_s: float) -> Outcome:
        while idle and idle[-1].is_lost:
            idle.pop()
        make = partial(Connection, host, port)
        connection = idle.pop() if idle else (await loop.create_connection(make, host, port))[1]
        body = [shared[part] if isinstance(part, int) else part.encode() for part in request.parts]
        outcome = await connection.ask(request, body, planned_s)
        idle.append(connection)
        return outcome

    while line := await reader.readline():
        requests = _Requests(reader)
        try:
            outcomes = await drive(requests.take, ask, Load(**json.loads(line)))
        except (RuntimeError, OSError) as error:
            print(json.dumps({"failure": str(error)}), flush=True)
            return
        for outcome in outcomes:
            print(json.dumps(asdict(outcome)))
        print("null", flush=True)
        while await requests.take() is not None:
            pass


if __name__ == "__main__":
    import uvloop

    uvloop.run(run())

"""HTTP over a bare connection, for tests that send what no library would, and see each byte of an answer."""

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

LIMIT_BYTES = 1 << 26


class CutError(Exception):
    """A connection ended before the answer on it was whole."""


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes = b""

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Events:
    """The events of a stream: what each holds, and how it ended. Raises ValueError for what is no event."""

    data: list[Any] = field(default_factory=list)
    num_comments: int = 0
    is_done: bool = False

    @classmethod
    def read(cls, body: bytes) -> "Events":
        events = cls()
        *whole, rest = body.split(b"\n\n")
        if rest:
            raise ValueError(f"the stream ends within an event: {rest[:200]!r}")
        for event in whole:
            if event == b": keep-alive":
                events.num_comments += 1
                continue
            if events.is_done:
                raise ValueError(f"an event after the last one: {event[:200]!r}")
            *names, data = event.split(b"\n")
            if not data.startswith(b"data: ") or any(not name.startswith(b"event: ") for name in names):
                raise ValueError(f"no event: {event[:200]!r}")
            if data == b"data: [DONE]":
                events.is_done = True
            else:
                events.data.append(json.loads(data.removeprefix(b"data: ")))
        return events


class Connection:
    """One connection to a server on loopback; use it in an `async with` block."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter

    async def __aenter__(self) -> "Connection":
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self._port, limit=LIMIT_BYTES)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.transport.abort()

    async def send(self, data: bytes) -> None:
        """Sends bytes. That the server has closed the connection is noticed by reading."""
        try:
            self.writer.write(data)
            await self.writer.drain()
        except ConnectionError:
            pass

    async def answer(self, pause_s: float = 0.0) -> Answer:
        """Reads an answer. Raises CutError. pause_s: to wait before each part of the body."""
        try:
            head = await self.reader.readuntil(b"\r\n\r\n")
            first, *lines = head.decode("latin-1").rstrip().split("\r\n")
            pairs = (line.split(": ", 1) for line in lines)
            answer = Answer(int(first.split(" ", 2)[1]), {name.lower(): value for name, value in pairs})
            if answer.headers.get("transfer-encoding") != "chunked":
                answer.body = await self.reader.readexactly(int(answer.headers["content-length"]))
                return answer
            while size := int(await self.reader.readuntil(b"\r\n"), 16):
                answer.body += (await self.reader.readexactly(size + 2))[:-2]
                await asyncio.sleep(pause_s)
            await self.reader.readexactly(2)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise CutError from error
        return answer


def head(method: str, path: str, *lines: str) -> bytes:
    return "\r\n".join((f"{method} {path} HTTP/1.1", "host: localhost", *lines, "\r\n")).encode("latin-1")


def request(path: str, body: bytes, *lines: str) -> bytes:
    return head("POST", path, f"content-length: {len(body)}", *lines) + body

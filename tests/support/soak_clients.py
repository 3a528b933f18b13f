"""Clients of every kind for the soak of a server: patient ones, and those that leave, stall or break off."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

from support.raw_http import Answer, Connection, CutError, head, request
from support.soak_requests import STREAMS, Kind, build_kinds, is_same, told_by

KEY = "a-key-of-the-soak"
OVERLOAD = {"queue_full", "too_many_bytes"}


class Clients:
    """Sends requests of all kinds to one server, checks what comes back, and notes what is wrong.

    Each way to send one returns, in a few words, what came of it.
    """

    def __init__(self, port: int, max_body_bytes: int) -> None:
        self._port, self.kinds = port, build_kinds(max_body_bytes)
        self.expected: dict[str, Any] = {}  # what the answers to each kind tell, by its name
        self.wrong: list[str] = []
        self.ways: dict[Callable[[random.Random, Kind], Awaitable[str]], int] = {  # with how often each is taken
            self.plain: 40,
            self.patient: 20,
            self.slow_reader: 3,
            self.slow_sender: 3,
            self.chunked: 5,
            self.pipelined: 4,
            self.leaves_in_the_head: 3,
            self.leaves_in_the_body: 4,
            self.leaves_before_the_answer: 8,
            self.leaves_in_the_stream: 8,
            self.reads_nothing: 2,
            self.a_broken_chunk: 2,
            self.a_length_that_is_too_small: 2,
            self.a_length_that_is_too_large: 1,
            self.a_head_that_does_not_end: 1,
            self.no_http: 2,
            self.a_wrong_key: 3,
            self.half_closed: 2,
        }

    def message(self, kind: Kind, *, stream: bool = False, key: str = KEY) -> bytes:
        return request(kind.path, kind.data(stream=stream), f"authorization: Bearer {key}")

    async def plain(self, rng: random.Random, kind: Kind) -> str:
        async with Connection(self._port) as connection:
            for _ in range(rng.choice([1, 1, 2])):  # on one connection
                await connection.send(self.message(kind, stream=self.streams(rng, kind)))
                outcome = self.check(kind, await connection.answer())
        return outcome

    async def patient(self, rng: random.Random, kind: Kind) -> str:
        """Asks again when the server is full, as OpenAI's client does."""
        outcome = "refused: overload"
        for _ in range(20):
            if outcome == "refused: overload":
                outcome = await self.plain(rng, kind)
                await asyncio.sleep(0.5 if outcome == "refused: overload" else 0)
        return outcome

    async def slow_reader(self, rng: random.Random, kind: Kind) -> str:
        async with Connection(self._port) as connection:
            await connection.send(self.message(kind, stream=self.streams(rng, kind)))
            return self.check(kind, await connection.answer(pause_s=0.05))

    async def slow_sender(self, rng: random.Random, kind: Kind) -> str:
        data = self.message(kind, stream=self.streams(rng, kind))
        async with Connection(self._port) as connection:
            size = len(data) // 8 + 1
            for start in range(0, len(data), size):
                await connection.send(data[start : start + size])
                await asyncio.sleep(0.1)
            return self.check(kind, await connection.answer(), "body_timeout")

    async def chunked(self, rng: random.Random, kind: Kind) -> str:
        data = kind.data(stream=self.streams(rng, kind))
        cut = rng.randrange(len(data)) + 1
        parts = [part for part in (data[:cut], data[cut:]) if part]
        async with Connection(self._port) as connection:
            await connection.send(self.open_head(kind, "transfer-encoding: chunked"))
            for part in parts:
                await connection.send(b"%x\r\n%b\r\n" % (len(part), part))
            await connection.send(b"0\r\n\r\n")
            return self.check(kind, await connection.answer())

    async def pipelined(self, rng: random.Random, kind: Kind) -> str:
        kinds = [kind, *(self.draw(rng) for _ in range(2))]
        async with Connection(self._port) as connection:
            await connection.send(b"".join(self.message(each) for each in kinds))
            for each in kinds:
                outcome = self.check(each, await connection.answer())
        return outcome

    async def leaves_in_the_head(self, rng: random.Random, kind: Kind) -> str:
        async with Connection(self._port) as connection:
            await connection.send(self.message(kind)[: rng.randrange(80)])
            await asyncio.sleep(rng.random() * 0.02)
        return "left"

    async def leaves_in_the_body(self, rng: random.Random, kind: Kind) -> str:
        data = self.message(kind)
        async with Connection(self._port) as connection:
            await connection.send(data[: rng.randrange(len(data) - 10, len(data)) if rng.random() < 0.5 else 200])
            await asyncio.sleep(rng.random() * 0.02)
        return "left"

    async def leaves_before_the_answer(self, rng: random.Random, kind: Kind) -> str:
        async with Connection(self._port) as connection:
            await connection.send(self.message(kind, stream=self.streams(rng, kind)) * rng.choice([1, 1, 2]))
            await asyncio.sleep(rng.random() ** 2 * 0.3)
        return "left"

    async def leaves_in_the_stream(self, rng: random.Random, kind: Kind) -> str:
        kind = self.kind("long")
        async with Connection(self._port) as connection:
            await connection.send(self.message(kind, stream=True))
            await connection.reader.read(rng.randrange(1, 4000))
        return "left"

    async def reads_nothing(self, rng: random.Random, kind: Kind) -> str:
        async with Connection(self._port) as connection:
            connection.writer.transport.pause_reading()  # type: ignore[attr-defined]
            await connection.send(self.message(kind, stream=self.streams(rng, kind)))
            await asyncio.sleep(rng.random() * 3)
        return "left"

    async def a_broken_chunk(self, rng: random.Random, kind: Kind) -> str:
        async with Connection(self._port) as connection:
            await connection.send(self.open_head(kind, "transfer-encoding: chunked") + b"3\r\n{}\r\nzz\r\n")
            return self.refused(await connection.answer(), {400})

    async def a_length_that_is_too_small(self, rng: random.Random, kind: Kind) -> str:
        async with Connection(self._port) as connection:
            data = b'{"messages": "x"}   {"more": 1}\r\n'
            await connection.send(self.open_head(self.kind("text"), "content-length: 20") + data)
            return self.refused(await connection.answer(), {400})

    async def a_length_that_is_too_large(self, rng: random.Random, kind: Kind) -> str:
        async with Connection(self._port) as connection:
            await connection.send(self.open_head(self.kind("text"), "content-length: 2000") + b'{"messages": "x"}')
            return self.refused(await connection.answer(), {408})

    async def a_head_that_does_not_end(self, rng: random.Random, kind: Kind) -> str:
        async with Connection(self._port) as connection:
            await connection.send(self.open_head(kind, "x-long: " + "x" * 100_000)[:-4])
            try:
                return self.refused(await connection.answer(), {431})
            except CutError:
                return "refused as expected"

    async def no_http(self, rng: random.Random, kind: Kind) -> str:
        async with Connection(self._port) as connection:
            await connection.send(rng.choice([b"\x16\x03\x01\x02\x00", b"GET /\xff HTTP/1.1\r\n\r\n", b"GET\r\n\r\n"]))
            return self.refused(await connection.answer(), {400})

    async def a_wrong_key(self, rng: random.Random, kind: Kind) -> str:
        async with Connection(self._port) as connection:
            await connection.send(self.message(kind, key="another-key"))
            return self.refused(await connection.answer(), {404 if kind.name == "nowhere" else 401})

    async def half_closed(self, rng: random.Random, kind: Kind) -> str:
        """Sends no more after the request: the server may take that as leaving, or answer."""
        async with Connection(self._port) as connection:
            await connection.send(self.message(kind))
            connection.writer.write_eof()
            try:
                return self.check(kind, await connection.answer())
            except CutError:
                return "left"

    def open_head(self, kind: Kind, *lines: str) -> bytes:
        return head("POST", kind.path, f"authorization: Bearer {KEY}", *lines)

    def streams(self, rng: random.Random, kind: Kind) -> bool:
        return kind.path in STREAMS and rng.random() < 0.5

    def draw(self, rng: random.Random) -> Kind:
        return rng.choices(self.kinds, [3 if kind.status == 200 else 1 for kind in self.kinds])[0]

    def kind(self, name: str) -> Kind:
        return next(kind for kind in self.kinds if kind.name == name)

    # What is checked

    def check(self, kind: Kind, answer: Answer, *also: str) -> str:
        """Returns what came of a request; notes what is wrong. also: codes of errors that may come too."""
        told = told_by(kind.path, answer)
        if isinstance(told, dict) and "error" in told:
            code = self.code(told, answer)
            if code in OVERLOAD and answer.status in (200, 429):  # a stream may have begun by a comment, or an echo
                return "refused: overload"
            has_begun = answer.status == 200 and "event-stream" in answer.headers["content-type"]  # by a comment
            if code in also or (code == kind.code and (has_begun or answer.status == kind.status)):
                return "refused as expected"
            self.wrong.append(f"{kind.name}: status {answer.status}, {told}")
            return "wrong"
        expected = self.expected.get(kind.name, told)
        is_right = is_beginning(told, expected) if kind.is_cut else is_same(told, expected)
        if answer.status != 200 or kind.status != 200 or not is_right:
            self.wrong.append(f"{kind.name}: status {answer.status}, {told}, expected {expected}")
            return "wrong"
        return "right, stream" if "event-stream" in answer.headers["content-type"] else "right, whole"

    def refused(self, answer: Answer, statuses: set[int]) -> str:
        self.code(answer.json(), answer)
        if answer.status in statuses:
            return "refused as expected"
        if answer.status != 429:
            self.wrong.append(f"status {answer.status}, expected {statuses}: {answer.body[:200]!r}")
        return "refused: overload"

    def code(self, told: Any, answer: Answer) -> str | None:
        """Returns the code of an error object, whose form is checked."""
        error = told["error"]
        assert set(error) == {"message", "type", "param", "code"}, error
        assert isinstance(error["message"], str), error
        assert answer.status in (200, 400, 401, 404, 408, 413, 429, 431), error
        return str(error["code"])


def is_beginning(told: Any, expected: Any) -> bool:
    """Says whether the one answer that was cut is the beginning of the one expected."""
    ((cut,), (whole,)) = told, expected
    return whole["text"].startswith(cut["text"]) or cut["text"].startswith(whole["text"])

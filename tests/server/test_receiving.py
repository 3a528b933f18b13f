"""Long bodies go past the parser into memory of their own: whole, in order, and never more memory than has come."""

import asyncio
import io
import tracemalloc
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from internvl_rt.server.connection import guarded
from internvl_rt.server.log import Log
from internvl_rt.server.options import ServerOptions
from internvl_rt.server.receiving import BLOCK_BYTES, Receiver

App = Callable[[Any, Any, Any], Awaitable[None]]


class Wire(asyncio.Transport):
    """A transport without a socket."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)})
        self.sent, self.is_paused, self.is_closed = b"", False, False

    def write(self, data: Any) -> None:
        self.sent += data

    def pause_reading(self) -> None:
        self.is_paused = True

    def resume_reading(self) -> None:
        self.is_paused = False

    def is_closing(self) -> bool:
        return self.is_closed

    def close(self) -> None:
        self.is_closed = True

    def abort(self) -> None:
        self.is_closed = True


def connect(app: App) -> tuple[Receiver, Wire]:
    make: Any = guarded(ServerOptions(), Log(io.StringIO()))
    config = uvicorn.Config(app, http=make, lifespan="off", log_config=None, ws="none")
    receiver, wire = make(config=config, server_state=ServerState(), app_state={}), Wire()
    receiver.connection_made(wire)
    return receiver, wire


async def give(receiver: Receiver, wire: Wire, data: bytes, most: int = 1 << 30) -> None:
    """Gives bytes as an event loop does: no more than fit, and none while reading is paused."""
    at = 0
    while at < len(data):
        for _ in range(100):
            if not wire.is_paused:
                break
            await asyncio.sleep(0)
        assert not wire.is_paused, "nobody takes what was read"
        room = memoryview(receiver.get_buffer(-1))
        num_bytes = min(len(room), len(data) - at, most)
        room[:num_bytes] = data[at : at + num_bytes]
        receiver.buffer_updated(num_bytes)
        at += num_bytes


def post(body: bytes, *, chunked: bool = False) -> bytes:
    length = "transfer-encoding: chunked" if chunked else f"content-length: {len(body)}"
    head = f"POST /{len(body)} HTTP/1.1\r\nhost: x\r\n{length}\r\n\r\n".encode()
    if not chunked:
        return head + body
    return head + (b"%x\r\n%b\r\n" % (len(body), body) if body else b"") + b"0\r\n\r\n"


async def answer(send: Any, status: int = 200) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it does not come to pass")


SIZES = (0, 1, 65_535, 65_536, 65_537, 200_000, 1_430_000, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 5_300_000)


@pytest.mark.parametrize("seed", range(30))
def test_bodies_arrive_whole_however_they_come(seed: int) -> None:
    rng = Random(seed)
    bodies = [rng.randbytes(rng.choice(SIZES)) for _ in range(4)]
    come: list[bytes] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        parts, more = list[bytes](), True
        while more:
            if rng.random() < 0.5:
                await asyncio.sleep(0)
            message = await receive()
            assert message["type"] == "http.request"
            parts.append(bytes(message["body"]))
            more = message["more_body"]
        come.append(b"".join(parts))
        await answer(send)

    async def run() -> None:
        receiver, wire = connect(app)
        for number, body in enumerate(bodies):
            data = post(body, chunked=rng.random() < 0.2)
            while data:  # in pieces that were written at moments of their own
                size = rng.choice((1, data.find(b"\r\n\r\n") + 4, 100, 70_000, 131_072, 1_000_000, len(data)))
                await give(receiver, wire, data[:size], most=rng.choice((1000, 16_384, 1 << 30)))
                data = data[size:]
                if rng.random() < 0.3:
                    await asyncio.sleep(0)
            if rng.random() < 0.7:  # else the next request comes before this one is answered
                await until(lambda number=number: len(come) > number)  # type: ignore[misc]
        await until(lambda: wire.sent.count(b"200 OK") == len(bodies))
        receiver.connection_lost(None)

    asyncio.run(run())
    assert come == bodies


def test_a_body_that_fits_one_block_is_not_copied() -> None:
    messages: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while not messages or messages[-1]["more_body"]:
            messages.append(await receive())
        await answer(send)

    async def run() -> None:
        receiver, wire = connect(app)
        await give(receiver, wire, post(bytes(1_430_000)))
        await until(lambda: b"ok" in wire.sent)
        receiver.connection_lost(None)

    asyncio.run(run())
    assert [len(message["body"]) for message in messages if message["body"]] == [1_430_000]
    assert isinstance(messages[-1]["body"], bytearray)


@pytest.mark.parametrize("come", [100, 70_000, 700_000, 3_000_000])
def test_an_answer_before_the_body_leaves_the_connection_in_order(come: int) -> None:
    statuses = iter((413, 200))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await answer(send, next(statuses))

    async def run() -> None:
        receiver, wire = connect(app)
        data = post(bytes(5_000_000))
        await give(receiver, wire, data[:come])
        await until(lambda: b" 413 " in wire.sent)
        await give(receiver, wire, data[come:] + post(b"{}"))
        await until(lambda: b" 200 OK" in wire.sent)
        assert receiver._protocol._block is None
        assert not receiver._protocol._full
        receiver.connection_lost(None)

    asyncio.run(run())


def test_memory_follows_what_has_come_and_not_what_is_promised() -> None:
    started = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        started.set()
        await asyncio.sleep(60)

    async def run() -> None:
        head = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 60000000\r\n\r\n"
        receiver, wire = connect(app)
        await give(receiver, wire, head)
        tracemalloc.start()
        await give(receiver, wire, bytes(1))
        block = receiver.get_buffer(-1)
        assert len(block) <= 65_536
        await give(receiver, wire, bytes(len(block)))
        await started.wait()
        assert wire.is_paused, "the next block waits until the application has taken this one"
        assert tracemalloc.get_traced_memory()[1] < 200_000
        tracemalloc.stop()
        receiver.connection_lost(None)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    asyncio.run(run())

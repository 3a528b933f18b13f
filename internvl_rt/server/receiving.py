"""How one connection under uvicorn receives a request: its head through the parser, a long body past it.

The parser and uvicorn copy what they are given four times, and take a millisecond for a picture of one megabyte. So the
rest of a long body, whose length the head has told, is read from the socket into the memory that the application gets.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

BLOCK_BYTES = 2 << 20  # most that is read of a body before the application takes it
_LONG = 64 << 10  # bytes of a body that are still to come, from which on they go past the parser
_GROWTH = 16  # a block beyond _LONG has at most so many times the bytes that have come: a promise gets no memory


class ReceivingProtocol(HttpToolsProtocol):
    """Uvicorn's protocol for a `Receiver`, which reads the rest of a long body into blocks."""

    _num_left = 0  # bytes of the body that are to come; below 0 if its length was not told
    _num_come = 0  # bytes of it that have come
    _is_past_parser = False
    _block: bytearray | None = None  # is being filled
    _num_filled = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._full: dict[RequestResponseCycle, list[bytearray]] = {}  # blocks that wait for the application

    def new_parser(self) -> None:
        """Sets a parser that has read nothing."""
        self.parser = type(self.parser)(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._num_left, self._num_come = int(dict(self.headers).get(b"content-length", 0)), 0

    def on_body(self, body: bytes) -> None:
        self._num_left -= len(body)
        self._num_come += len(body)
        if self.cycle.response_complete:
            return
        self.cycle.body += body
        if len(self.cycle.body) >= BLOCK_BYTES:
            self.flow.pause_reading()
        self.cycle.message_event.set()

    def block(self) -> memoryview | None:
        """Returns where the next bytes of a long body go; None if the parser is to have them."""
        if self._block is None:
            self._is_past_parser |= self._num_left >= _LONG and self._num_come > 0
            if not self._is_past_parser:
                return None
            begun = self.cycle.body  # unless the application has it already
            most = min(BLOCK_BYTES, max(_LONG, _GROWTH * self._num_come))
            self._block = bytearray(len(begun) + min(self._num_left, most))
            self._block[: len(begun)] = begun
            self._num_filled, self.cycle.body = len(begun), bytearray()
        return memoryview(self._block)[self._num_filled :]

    def block_updated(self, num_bytes: int) -> None:
        """Counts bytes that came where `block` said, and gives a block that is full to the application."""
        assert self._block is not None
        self._num_filled += num_bytes
        self._num_come += num_bytes
        self._num_left -= num_bytes
        if self._num_left and self._num_filled < len(self._block):
            return
        block, self._block = self._block, None
        if not self.cycle.response_complete:
            self._full.setdefault(self.cycle, []).append(block)
            self.flow.pause_reading()
            self.cycle.message_event.set()
        if not self._num_left:
            self._is_past_parser = False
            self.new_parser()
            self.on_message_complete()

    def on_response_complete(self) -> None:
        self._full = {cycle: blocks for cycle, blocks in self._full.items() if not cycle.response_complete}
        super().on_response_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        async def with_blocks(scope: Any, receive: Any, send: Any) -> None:
            async def receive_block() -> Any:
                message = await receive()
                blocks = self._full.pop(cycle, ())
                if blocks and message["type"] == "http.request":
                    parts = [message["body"], *blocks] if message["body"] else blocks
                    message["body"] = parts[0] if len(parts) == 1 else b"".join(parts)
                return message

            await app(scope, receive_block, send)

        super()._start_asgi_task(cycle, with_blocks)


class Receiver(asyncio.BufferedProtocol):
    """What the event loop calls for one connection: passes everything on, and what was received where it belongs."""

    def __init__(self, protocol: ReceivingProtocol, scratch: bytearray) -> None:
        """scratch: for bytes that the parser gets; connections of one event loop may share it."""
        self._protocol, self._scratch = protocol, scratch
        self._is_block = False  # whether bytes come into a block

    def get_buffer(self, sizehint: int) -> bytearray | memoryview:
        block = self._protocol.block()
        self._is_block = block is not None
        return self._scratch if block is None else block

    def buffer_updated(self, nbytes: int) -> None:
        if self._is_block:
            self._protocol.block_updated(nbytes)
        else:
            self._protocol.data_received(bytes(memoryview(self._scratch)[:nbytes]))

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._protocol.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._protocol.connection_lost(exc)

    def eof_received(self) -> None:
        self._protocol.eof_received()

    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._protocol.resume_writing()

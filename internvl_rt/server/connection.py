"""One connection under uvicorn, and what it bears: slow clients, endless heads, too many others, no HTTP at all."""

import asyncio
import logging
import sys
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from internvl_rt.server.call import Call, Receive, Scope, Send
from internvl_rt.server.fault import ApiError
from internvl_rt.server.gate import PROBES
from internvl_rt.server.log import Log
from internvl_rt.server.options import ServerOptions
from internvl_rt.server.protocol import encode
from internvl_rt.server.receiving import Receiver, ReceivingProtocol

MAX_HEAD_BYTES = 64 << 10
_READ_BYTES = 128 << 10  # most at once of what the parser gets


class _Lines(logging.Handler):
    """Writes what uvicorn has to say of connections into our log."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.ERROR)  # its warnings are about requests that their clients hear of themselves
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            self._log.error("connection failed", error)
        else:
            self._log.write("connection failed", level="warning", reason=record.getMessage())


def _refusing(app: Any) -> Any:
    """Returns what answers on a connection beyond the limit: that there are too many, and probes as ever."""
    error = ApiError(503, "the server has as many connections as it takes; try again later", "too_many_connections")
    headers = {"retry-after": "1", "connection": "close"}

    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in PROBES:
            await app(scope, receive, send)
        else:
            await Call(scope, receive, send).send_json(error.body(), error.status, headers)

    return refuse


def guarded(options: ServerOptions, log: Log) -> Callable[..., Receiver]:
    """Returns what makes the protocol of a connection, which gives up on a client that sends, or reads, too slowly."""
    connections = logging.Logger("connections", logging.ERROR)
    connections.addHandler(_Lines(log))

    class Guarded(ReceivingProtocol):
        _data = b""  # received last
        _answering: RequestResponseCycle | None = None  # the request that is answered; `cycle` is the one read last
        _num_head_bytes = 0
        _is_in_head = False
        _until_whole: asyncio.TimerHandle | None = None
        _until_read: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.logger = connections
            self._abort_after(options.header_timeout_s)
            if len(self.connections) > 2 * options.max_connections:
                transport.abort()
            elif len(self.connections) > options.max_connections:
                self.app = _refusing(self.app)

        def connection_lost(self, exc: Exception | None) -> None:
            self._abort_after(None)
            self.resume_writing()
            if (cycle := self._open_cycle()) is not None:
                cycle.disconnected = True
                cycle.message_event.set()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            self._data = data
            super().data_received(data)
            self._data = b""
            self._num_head_bytes += len(data)
            if self._is_in_head and self._num_head_bytes > MAX_HEAD_BYTES:
                what = f"the head of the request has more than {MAX_HEAD_BYTES:,} bytes; send shorter headers"
                self._refuse(ApiError(431, what, "head_too_large"))
            elif self._until_whole is None and self._open_cycle() is None:
                self._abort_after(options.header_timeout_s)

        def on_message_begin(self) -> None:
            self._is_in_head, self._num_head_bytes = True, -len(self._data)  # a body may end in the same data
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._is_in_head = False
            self._abort_after(2 * options.body_timeout_s)  # the application itself answers earlier
            if not self._offers_upgrade():
                super().on_headers_complete()

        def on_message_complete(self) -> None:
            self._abort_after(None)
            if not self._offers_upgrade():
                super().on_message_complete()

        def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
            self._answering = cycle
            super()._start_asgi_task(cycle, app)

        def _open_cycle(self) -> RequestResponseCycle | None:
            """Returns the request that is being answered."""
            cycle = self._answering
            return None if cycle is None or cycle.response_complete else cycle

        def _offers_upgrade(self) -> bool:
            return self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"

        def _unsupported_upgrade_warning(self) -> None:
            """Reads a request that offers HTTP/2 or a WebSocket again, without the offer.

            Java's client offers HTTP/2 with its first request, and the parser then skips the body.
            """
            error = sys.exception()
            assert error is not None, "the parser raises where the offer ends"
            rest, version = self._data[error.args[0] :], self.parser.get_http_version().encode()
            lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
            lines += [name + b": " + value for name, value in self.headers if name != b"upgrade"]
            self.new_parser()
            self.data_received(b"\r\n".join((*lines, b"\r\n")) + rest)

        def send_400_response(self, msg: str) -> None:
            self._refuse(ApiError(400, "this is not a valid HTTP request", "invalid_http"))

        def _refuse(self, error: ApiError) -> None:
            """Ends the connection with an error; nothing may be written into an answer that has begun."""
            if (cycle := self._open_cycle()) is not None and cycle.response_started:
                self.transport.abort()
                return
            body, reason = encode(error.body()), HTTPStatus(error.status).phrase
            head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close"
            self.transport.write(f"HTTP/1.1 {error.status} {reason}\r\n{head}\r\n\r\n".encode() + body)
            self.transport.close()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._until_read = self.loop.call_later(options.stall_timeout_s, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._until_read is not None:
                self._until_read.cancel()
                self._until_read = None

        def timeout_keep_alive_handler(self) -> None:
            self.transport.abort()  # a client that has not read its answer would keep the connection open

        def _abort_after(self, seconds: float | None) -> None:
            """Sets the time until the request must be whole; None: there is none."""
            if self._until_whole is not None:
                self._until_whole.cancel()
            self._until_whole = None if seconds is None else self.loop.call_later(seconds, self.transport.abort)

    scratch = bytearray(_READ_BYTES)
    return lambda *args, **kwargs: Receiver(Guarded(*args, **kwargs), scratch)

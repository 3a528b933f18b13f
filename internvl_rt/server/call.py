"""One HTTP request from head to last byte: its id, its body within limits, its answer, and its client's leaving.

It is written against ASGI alone, so that it works under any server. A client that has gone is noticed by waiting for
that beside the work, because servers differ in what else they tell.
"""

import asyncio
import re
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, MutableMapping
from contextlib import aclosing
from typing import Any

from internvl_rt.server.fault import ApiError
from internvl_rt.server.protocol import encode

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

JSON, EVENTS = "application/json", "text/event-stream; charset=utf-8"
DONE = b"data: [DONE]\n\n"
_KEEP_ALIVE = b": keep-alive\n\n"
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Call:
    """A request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self.method, self.path = str(scope["method"]), str(scope["path"])
        self.headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        given = self.headers.get(b"x-request-id", "")
        self.id = given if _REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
        self.wants_timings = self.headers.get(b"x-internvl-rt-timings", "0") not in ("", "0", "false")
        self.tenant: str | None = None  # of the API key
        self.start_s = time.perf_counter()
        self.num_body_bytes = self.num_taken_bytes = 0  # received; counted against the limit of all calls
        self.status = 0  # of the answer; 0 as long as there is none
        self.gone = False  # the client has left
        self.ending: ApiError | None = None  # why the server ends this call
        self.media_places: tuple[str, ...] = ()  # where each picture and video of the request stands
        self.facts: dict[str, object] = {}  # for the log
        self._task = asyncio.current_task()
        self._watcher: asyncio.Task[None] | None = None
        self._sending = asyncio.Lock()
        self._last_s = self.start_s  # when something was last sent
        self._is_stream = self._is_complete = self._is_over = False

    async def read(self, take: Callable[[int], None], max_bytes: int, max_s: float) -> bytes:
        """Reads the body. Raises ApiError as soon as it is too large or too slow.

        take: called with the number of bytes before they are kept; it may raise too.
        """
        declared = self.headers.get(b"content-length", "")
        if declared.isdecimal() and int(declared) > max_bytes:
            raise _too_large(max_bytes)
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(max_s):
                while True:
                    message = await self._receive()
                    if message["type"] != "http.request":
                        self.gone = True
                        raise asyncio.CancelledError
                    part = message.get("body", b"")
                    self.num_body_bytes += len(part)
                    if self.num_body_bytes > max_bytes:
                        raise _too_large(max_bytes)
                    take(len(part))
                    if part:
                        parts.append(part)
                    if not message.get("more_body", False):
                        return parts[0] if len(parts) == 1 else b"".join(parts)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {max_s:g} s; send it faster", "body_timeout") from None

    def watch(self, keep_alive_s: float) -> None:
        """From now on the work is cancelled when the client leaves. The body must have been read."""
        self._watcher = asyncio.create_task(self._watch(keep_alive_s))

    def end(self, error: ApiError) -> None:
        """Ends the call with an error, whatever it is doing."""
        if self.ending is None and self._task is not None and not self._is_over:
            self.ending = error
            self._task.cancel()

    async def send_json(self, value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """Answers with JSON: a value, or bytes that are JSON already."""
        await self.answer(value if isinstance(value, bytes) else encode(value), JSON, status, headers)

    async def answer(
        self, body: bytes, content_type: str, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        """Sends the whole answer."""
        async with self._sending:
            await self._begin(
                status, {"content-type": content_type, "content-length": str(len(body)), **(headers or {})}
            )
            self._is_complete = True  # comes first: servers report a client as gone when its answer is complete
            await self._send({"type": "http.response.body", "body": body})

    async def stream(self, events: AsyncGenerator[bytes, None]) -> None:
        """Sends events as they come, the head with the first one, so that earlier errors keep their status.

        An error that comes later is the last event.
        """
        self._is_stream = True
        async with aclosing(events):  # a client may leave between two events
            async for event in events:
                await self._event(event)
        await self._event(DONE, last=True)

    async def relay(self, message: MutableMapping[str, Any]) -> None:
        """Sends a message of an answer that another server has made. The call ends with that answer."""
        async with self._sending:
            if message["type"] == "http.response.start":
                self.status = message["status"]
                self._is_stream = (b"content-type", EVENTS.encode()) in map(tuple, message["headers"])
            else:
                self._is_complete = not message.get("more_body", False)
            await self._send(message)
            self._last_s = time.perf_counter()

    async def fail(self, error: ApiError) -> None:
        """Answers with an error, or ends the stream with it. Does nothing where an answer was sent already."""
        self.facts["error"] = error.code
        if not self.status:
            await self.send_json(error.body(), error.status, error.headers)
        elif self._is_stream:
            await self._event(b"data: " + encode(error.body()) + b"\n\n" + DONE, last=True)

    def finish(self) -> None:
        """Follows the answer, whole or not: from now on nothing cancels the task."""
        self._is_over = True
        if self._watcher is not None:
            self._watcher.cancel()

    async def _begin(self, status: int, headers: Mapping[str, str]) -> None:
        self.status = status
        pairs = [(name.encode("ascii"), value.encode("latin-1")) for name, value in headers.items()]
        pairs.append((b"x-request-id", self.id.encode("ascii")))
        await self._send({"type": "http.response.start", "status": status, "headers": pairs})

    async def _event(self, event: bytes, *, last: bool = False) -> None:
        async with self._sending:
            if not self.status:
                await self._begin(200, {"content-type": EVENTS, "cache-control": "no-cache", "x-accel-buffering": "no"})
            self._is_complete = last
            await self._send({"type": "http.response.body", "body": event, "more_body": not last})
            self._last_s = time.perf_counter()

    async def _watch(self, keep_alive_s: float) -> None:
        """Waits until the client leaves, and then cancels the work. A stream gets a comment whenever it is silent."""
        received = asyncio.ensure_future(self._receive())
        try:
            while True:
                silent_s = time.perf_counter() - self._last_s
                done, _ = await asyncio.wait({received}, timeout=max(keep_alive_s - silent_s, 0.05))
                if self._is_complete:
                    return
                if done and received.result()["type"] == "http.disconnect":
                    self.gone = True
                    if self._task is not None and self.ending is None and not self._is_over:
                        self._task.cancel()
                    return
                if done:
                    received = asyncio.ensure_future(self._receive())
                elif (
                    self._is_stream
                    and not self._sending.locked()
                    and time.perf_counter() - self._last_s >= keep_alive_s
                ):
                    await self._event(_KEEP_ALIVE)
                elif not self._is_stream:
                    self._last_s = time.perf_counter()
        finally:
            received.cancel()


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(413, f"the body has more than {max_bytes:,} bytes, which is the limit; send less", "body_too_large")

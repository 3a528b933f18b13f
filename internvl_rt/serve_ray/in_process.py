"""Calls an ASGI application in this process: a request goes in, and the messages of its answer come out."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from typing import Any, NamedTuple

from internvl_rt.server.call import Receive, Scope, Send

Message = MutableMapping[str, Any]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

END_S = 10.0  # for an application whose client has left


class Head(NamedTuple):
    """A request without its body."""

    method: str
    path: str
    headers: list[tuple[bytes, bytes]]  # names in lower case

    def scope(self) -> Scope:
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": self.method,
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": self.headers,
            "client": None,
            "server": None,
        }


async def answer(
    app: App, head: Head, body: bytes, gone: asyncio.Event | None = None
) -> AsyncGenerator[list[Message], None]:
    """Yields the messages of an application's answer, those together that have come since the last time.

    When this generator is closed or cancelled, the application is told that its client has left, and is waited for.
    gone: somebody may set it to tell the application the same.
    """
    sent: list[Message] = []
    changed, gone = asyncio.Event(), gone or asyncio.Event()
    unread, ended = True, False

    async def receive() -> Message:
        nonlocal unread
        if unread:
            unread = False
            return {"type": "http.request", "body": body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)
        changed.set()

    async def run() -> None:
        nonlocal ended
        try:
            await app(head.scope(), receive, send)
        finally:
            ended = True
            changed.set()

    task = asyncio.create_task(run())
    try:
        while not ended or sent:
            await changed.wait()
            changed.clear()
            taken, sent[:] = sent[:], []
            if taken:
                yield taken
        await task  # raises what the application has not caught
    finally:
        gone.set()
        if not task.done():
            await asyncio.wait({task}, timeout=END_S)
            task.cancel()

"""An application is called in this process as a server would call it, and hears of its client's leaving."""

import asyncio
from contextlib import aclosing
from typing import Any

import pytest

from internvl_rt.serve_ray.in_process import Head, Message, answer
from internvl_rt.server.call import Receive, Scope, Send

HEAD = Head("POST", "/v1/chat/completions", [(b"host", b"here")])


def read_all(app: Any, body: bytes = b"") -> list[Message]:
    async def read() -> list[Message]:
        return [message async for messages in answer(app, HEAD, body) for message in messages]

    return asyncio.run(read())


def test_the_request_goes_in_and_the_answer_comes_out_in_order() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert (scope["method"], scope["path"], scope["headers"]) == (HEAD.method, HEAD.path, HEAD.headers)
        assert await receive() == {"type": "http.request", "body": b"body", "more_body": False}
        for number in range(100):
            await send({"type": "http.response.body", "body": b"%d" % number})
            if number % 7 == 0:
                await asyncio.sleep(0)

    assert [message["body"] for message in read_all(app, b"body")] == [b"%d" % number for number in range(100)]


def test_messages_that_have_come_meanwhile_come_together() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for _ in range(3):
            await send({"type": "http.response.body"})

    async def read() -> list[int]:
        return [len(messages) async for messages in answer(app, HEAD, b"")]

    assert asyncio.run(read()) == [3]


def test_an_application_that_sends_nothing_ends() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.01)

    assert read_all(app) == []


def test_a_fault_of_the_application_is_raised_after_what_it_has_sent() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start"})
        raise ZeroDivisionError

    async def read() -> None:
        messages = answer(app, HEAD, b"")
        assert await anext(messages) == [{"type": "http.response.start"}]
        with pytest.raises(ZeroDivisionError):
            await anext(messages)

    asyncio.run(read())


@pytest.mark.parametrize("how", ["closed", "cancelled", "told"])
def test_a_client_that_leaves_is_told_to_the_application_which_may_end_in_its_own_way(how: str) -> None:
    heard: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start"})
        heard.append((await receive())["type"])
        await asyncio.sleep(0.01)
        heard.append("ended")

    async def leave() -> None:
        gone = asyncio.Event()

        async def read() -> None:
            async with aclosing(answer(app, HEAD, b"", gone)) as messages:
                async for _ in messages:
                    if how == "closed":
                        return
                    if how == "told":
                        gone.set()

        task = asyncio.create_task(read())
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert heard == ["http.disconnect", "ended"]

    asyncio.run(leave())

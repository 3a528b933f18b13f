"""A client that leaves ends its request: in the queue, in prefill, in decode, in a plain answer; under two servers."""

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from granian.constants import Interfaces
from granian.server.embed import Server as GranianServer

from internvl_rt.server.app import build_app
from internvl_rt.server.options import ServerOptions
from support.serving import Running, question, running

LONG = {"messages": question(), "max_tokens": 4000, "ignore_eos": True}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def granian(server: Running) -> Iterator[int]:
    """Runs the same application under another server."""
    port = free_port()
    other = GranianServer(build_app(server.service), port=port, interface=Interfaces.ASGI, websockets=False)
    loop = asyncio.new_event_loop()
    task: list[asyncio.Task[None]] = []

    async def serve() -> None:
        task.append(asyncio.current_task())
        await other.serve()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    for _ in range(500):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.02)
    try:
        yield port
    finally:
        loop.call_soon_threadsafe(other.stop)
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module", params=["uvicorn", "granian"])
def served(request: pytest.FixtureRequest) -> Iterator[tuple[Running, int]]:
    with running(ServerOptions(port=0, default_max_tokens=4000), max_num_seqs=2) as server:
        if request.param == "uvicorn":
            yield server, int(server.url.rpartition(":")[2])
        else:
            with granian(server) as port:
                yield server, port


def send(port: int, body: dict[str, object]) -> socket.socket:
    data = json.dumps(body).encode()
    client = socket.create_connection(("127.0.0.1", port), timeout=20)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n"
    client.sendall(head.encode() + data)
    return client


def wait(until: Callable[[], bool]) -> None:
    limit_s = time.perf_counter() + 15
    while not until():
        assert time.perf_counter() < limit_s
        time.sleep(0.005)


def stat(server: Running, name: str) -> float:
    return server.service.engine.stats().get(name, 0)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_leaving_in_decode_ends_the_request(served: tuple[Running, int], stream: bool) -> None:
    server, port = served
    cancelled = stat(server, "requests_cancelled")
    client = send(port, {**LONG, "stream": stream})
    wait(lambda: stat(server, "running") == 1 and stat(server, "kv_blocks_used") > 0)
    client.close()
    server.wait_until_idle()
    assert stat(server, "requests_cancelled") == cancelled + 1


def test_leaving_in_the_queue_ends_the_request(served: tuple[Running, int]) -> None:
    server, port = served
    cancelled = stat(server, "requests_cancelled")
    clients = [send(port, LONG) for _ in range(4)]
    wait(lambda: stat(server, "running") == 2 and stat(server, "waiting") == 2)
    clients[2].close()
    clients[3].close()
    wait(lambda: stat(server, "waiting") == 0)
    assert stat(server, "running") == 2
    for client in clients[:2]:
        client.close()
    server.wait_until_idle()
    assert stat(server, "requests_cancelled") == cancelled + 4


def test_leaving_in_prefill_ends_the_request(served: tuple[Running, int], monkeypatch: pytest.MonkeyPatch) -> None:
    server, port = served
    runner = server.service.core.runner
    launch, begun, go_on = runner.launch, threading.Event(), threading.Event()

    def slow(step: object) -> object:
        begun.set()
        go_on.wait(10)
        return launch(step)

    monkeypatch.setattr(runner, "launch", slow)
    client = send(port, LONG)
    assert begun.wait(10)
    client.close()
    wait(lambda: not server.service.calls)
    go_on.set()
    monkeypatch.undo()
    server.wait_until_idle()


def test_leaving_while_the_body_is_sent_ends_the_call(served: tuple[Running, int]) -> None:
    server, port = served
    client = socket.create_connection(("127.0.0.1", port), timeout=20)
    client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{")
    wait(lambda: bool(server.service.calls))
    client.close()
    wait(lambda: not server.service.calls)


def test_an_answer_is_whole_while_others_leave(served: tuple[Running, int]) -> None:
    server, port = served
    leaving = [send(port, {**LONG, "stream": bool(number % 2)}) for number in range(3)]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("POST", "/v1/chat/completions", json.dumps({"messages": question(), "max_tokens": 8}))
    for client in leaving:
        client.close()
    assert json.loads(connection.getresponse().read())["choices"][0]["message"]["content"] == "4719"
    connection.close()
    server.wait_until_idle()

"""A server on loopback in a thread of this process, so that a test can look into its engine, and clients for it."""

import asyncio
import base64
import io
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai

from internvl_rt.engine.async_engine import AsyncEngine
from internvl_rt.engine.engine import Engine
from internvl_rt.engine.reply import Choice, Piece, Reply, Timings, Usage
from internvl_rt.inputs.sampling_params import SamplingParams
from internvl_rt.server.app import build_app
from internvl_rt.server.keys import Keys
from internvl_rt.server.life import Server, bind
from internvl_rt.server.log import Log
from internvl_rt.server.options import ServerOptions
from internvl_rt.server.remote import Fetcher
from internvl_rt.server.service import Service

SAMPLES = Path(__file__).parents[2] / "internvl_rt/tiny/samples"
KEY = "a-key-of-the-tests"


class Running:
    """A server that runs, with its parts."""

    def __init__(self, service: Service, url: str, log: io.StringIO, stop: Callable[[], None]) -> None:
        """stop: ends the server and waits until it has ended."""
        self.service, self.url, self.log, self.stop = service, url, log, stop
        self.http = httpx2.Client(base_url=url, timeout=30)

    def client(self, key: str = "none", **more: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **{"max_retries": 0, "timeout": 30, **more})

    def post(self, path: str, body: object, **more: Any) -> httpx2.Response:
        return self.http.post(path, json=body, **more)

    def lines(self, event: str) -> list[dict[str, Any]]:
        """Returns the lines of the log about an event."""
        return [line for line in map(json.loads, self.log.getvalue().splitlines()) if line["event"] == event]

    def wait_until_idle(self, limit_s: float = 10.0) -> None:
        """Waits until the engine holds nothing of any request."""
        until_s = time.perf_counter() + limit_s
        while (stats := self.service.engine.stats()) and time.perf_counter() < until_s:
            if not (stats["running"] or stats["waiting"] or stats["preparing"] or self.service.calls):
                assert stats["kv_blocks_used"] == 0, stats
                return
            time.sleep(0.01)
        raise AssertionError(f"not idle after {limit_s} s: {stats}, {len(self.service.calls)} calls")


@contextmanager
def running(
    options: ServerOptions | None = None,
    *,
    keys: tuple[str, ...] = (),
    fetcher: Fetcher | None = None,
    model: str = "tiny",
    **engine_options: Any,
) -> Iterator[Running]:
    """Runs a server until the `with` block ends."""
    options = options or ServerOptions(port=0)
    log = io.StringIO()
    core = Engine.from_pretrained(model, **engine_options)
    names = options.served_model_name or ("tiny", "org/tiny")
    service = Service(core, AsyncEngine(core), names, options, Keys(keys), Log(log), fetcher)
    server = Server(build_app(service), service, bind("127.0.0.1", 0))
    loops: list[asyncio.AbstractEventLoop] = []

    def run() -> None:
        server.serve_until_stopped()

    original = server.startup

    async def startup(sockets: Any = None) -> None:
        loops.append(asyncio.get_running_loop())
        await original(sockets)

    server.startup = startup
    thread = threading.Thread(target=run, name="server of a test")
    thread.start()
    while not server.started:
        assert thread.is_alive(), log.getvalue()
        time.sleep(0.005)

    def stop() -> None:
        if thread.is_alive():
            loops[0].call_soon_threadsafe(server.stop)
        thread.join(60)
        assert not thread.is_alive()

    made = Running(service, server.url, log, stop)
    try:
        yield made
    finally:
        made.http.close()
        stop()


@contextmanager
def scripted(
    server: Running, text: str, *, piece_len: int = 1, pause_s: float = 0.0
) -> Iterator[list[tuple[Any, SamplingParams]]]:
    """Makes the engine answer with a text, whatever it is asked; yields what it was asked: messages and parameters."""
    service, asked = server.service, list[tuple[Any, SamplingParams]]()
    engine = service.engine

    def reply(params: SamplingParams) -> Reply:
        choices = tuple(Choice(text, [1] * len(text), "stop", None) for _ in range(params.n))
        return Reply(choices, Usage(10, 0, len(text)), Timings())

    class Scripted:
        async def chat(self, messages: Any, params: SamplingParams, **_: Any) -> Reply:
            asked.append((messages, params))
            return reply(params)

        async def stream(self, messages: Any, params: SamplingParams, **_: Any) -> AsyncIterator[Piece]:
            asked.append((messages, params))
            for start in range(0, len(text), piece_len):
                yield Piece(text[start : start + piece_len])
                await asyncio.sleep(pause_s)
            yield Piece("", reply(params))

        def __getattr__(self, name: str) -> Any:
            return getattr(engine, name)

    service.engine = Scripted()
    try:
        yield asked
    finally:
        service.engine = engine


def picture_url(name: str = "4719.png") -> str:
    return f"data:image/png;base64,{base64.b64encode((SAMPLES / name).read_bytes()).decode()}"


def question(text: str = "Read the digits.", *pictures: str) -> list[dict[str, Any]]:
    """Returns a conversation with one user message: pictures (by default one), then the text."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in pictures or (picture_url(),)]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]

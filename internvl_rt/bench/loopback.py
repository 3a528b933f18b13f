"""Sends requests over HTTP to an engine of this process: its server is a thread, its client another process."""

import asyncio
import base64
import io
import json
import sys
import threading
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from subprocess import PIPE
from typing import Any
from urllib.parse import urlsplit

import uvloop

from internvl_rt.bench import client
from internvl_rt.bench.arrivals import Arrival, Mix
from internvl_rt.bench.client import Load, Outcome, Request
from internvl_rt.engine.async_engine import AsyncEngine
from internvl_rt.engine.engine import Engine
from internvl_rt.server.app import build_app
from internvl_rt.server.keys import Keys
from internvl_rt.server.life import Server, bind
from internvl_rt.server.log import Log
from internvl_rt.server.options import ServerOptions
from internvl_rt.server.service import Service

_DAY_S = 86_400.0
# No limit of the server is to end a request that the engine takes.
_OPTIONS = ServerOptions(
    page=False,
    max_body_bytes=1 << 40,
    max_bodies_bytes=1 << 40,
    max_connections=1 << 20,
    body_timeout_s=_DAY_S,
    stall_timeout_s=_DAY_S,
    idle_timeout_s=_DAY_S,
    request_timeout_s=_DAY_S,
)
_PICTURE = "THE PICTURE"  # stands for the data of a picture while a body is written; texts are in lower case


class Loopback:
    """A client process, connected to a server by loopback."""

    def __init__(self, process: asyncio.subprocess.Process, log: io.StringIO) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._input, self._output, self._log = process.stdin, process.stdout, log

    async def begin(self, url: str, shared: Sequence[bytes]) -> None:
        """Tells the client where the server is, and the texts that requests share."""
        address = urlsplit(url)
        self._write({"host": address.hostname, "port": address.port, "sizes": [*map(len, shared)]})
        for text in shared:
            self._input.write(text)
            await self._input.drain()

    async def run(self, requests: Iterable[Request], load: Load) -> list[Outcome]:
        """Sends requests, which are taken as they are needed. Raises RuntimeError if one of them fails."""
        self._write(asdict(load))
        feeding = asyncio.create_task(self._feed(requests))
        outcomes: list[Outcome] = []
        try:
            while found := json.loads(await self._output.readline() or b'{"failure": "the client has ended"}'):
                if "failure" in found:
                    raise RuntimeError(f"a request over HTTP failed: {found['failure']}\n{self._log.getvalue()}")
                outcomes.append(Outcome(**found))
        finally:
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)
        return outcomes

    async def _feed(self, requests: Iterable[Request]) -> None:
        """Sends requests to the client until they end, or it needs no more and this is cancelled."""
        try:
            for request in requests:
                self._write(asdict(request))
                await self._input.drain()
                await asyncio.sleep(0)  # draining waits only while the pipe is full
        finally:
            self._write(None)

    def _write(self, value: dict[str, Any] | None) -> None:
        self._input.write(json.dumps(value).encode() + b"\n")


@asynccontextmanager
async def open_loopback(core: Engine, engine: AsyncEngine, shared: Sequence[bytes]) -> AsyncIterator[Loopback]:
    """Starts server and client, and ends both, and with them the engine.

    shared: texts that parts of requests may name by their index.
    """
    log = io.StringIO()
    async with _serving(core, engine, log) as url, _client() as process:
        loopback = Loopback(process, log)
        await loopback.begin(url, shared)
        yield loopback


def shared_texts(mix: Mix) -> list[bytes]:
    """Returns the long part of each picture of a mix, as in a data URL."""
    return [base64.b64encode(picture.rest) for picture in mix.pictures]


def request_of(mix: Mix, arrival: Arrival, salt: str) -> Request:
    """Writes a request over HTTP. salt: requests of another one share no prefix and no picture with it."""
    messages = mix.messages(arrival)
    beginning = ""
    if arrival.picture is not None:
        index, number = arrival.picture
        beginning = base64.b64encode(mix.pictures[index].beginning(number)).decode()
        url = {"url": f"data:image/png;base64,{_PICTURE}"}
        messages[1]["content"][0] = {"type": "image_url", "image_url": url}
    body = {
        "messages": messages,
        "max_tokens": arrival.max_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "cache_salt": salt,
    }
    parts: list[str | int] = [*json.dumps(body).split(_PICTURE)]
    if arrival.picture is not None:
        before, after = parts
        parts = [f"{before}{beginning}", arrival.picture[0], after]
    return Request(arrival.at_s, arrival.has_picture, parts)


@asynccontextmanager
async def _serving(core: Engine, engine: AsyncEngine, log: io.StringIO) -> AsyncIterator[str]:
    """Runs a server in a thread; yields its URL."""
    with bind("127.0.0.1", 0) as bound:
        service = Service(core, engine, ("bench",), _OPTIONS, Keys(()), Log(log))
        server, loop = Server(build_app(service), service, bound), uvloop.new_event_loop()

        def serve() -> None:
            with asyncio.Runner(loop_factory=lambda: loop) as runner:
                runner.run(server.serve(sockets=[bound]))

        serving = threading.Thread(target=serve, name="internvl_rt bench server", daemon=True)
        serving.start()
        try:
            while not server.started:
                if not serving.is_alive():
                    raise RuntimeError(f"the server did not start:\n{log.getvalue()}")
                await asyncio.sleep(0.005)
            yield server.url
        finally:
            if serving.is_alive():
                loop.call_soon_threadsafe(server.stop)
            await asyncio.to_thread(serving.join)


@asynccontextmanager
async def _client() -> AsyncIterator[asyncio.subprocess.Process]:
    """Runs the client's program, in a session of its own, so that Ctrl-C reaches this process alone."""
    program = (sys.executable, "-I", client.__file__)
    process = await asyncio.create_subprocess_exec(*program, stdin=PIPE, stdout=PIPE, start_new_session=True)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()

"""Runs the application under uvicorn, from the bound socket to the exit code, and ends without breaking answers off."""

import asyncio
import os
import signal
import socket
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from internvl_rt.errors import RequestError
from internvl_rt.server.connection import guarded
from internvl_rt.server.service import Service

_BACKLOG = 2048
_EXIT_INTERRUPT, _EXIT_DEAD, _EXIT_TERM = 130, 1, 143


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket that is bound, before anything is loaded. Raises RequestError if the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except OSError as error:
        raise RequestError(
            f"cannot listen on {host!r}, port {port}: {error.strerror or error}; give another --host or --port"
        ) from error
    bound.setblocking(False)
    return bound


def end_at_sigterm() -> None:
    """Makes SIGTERM end a process that does not serve yet; else one that is a container's first would ignore it."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(_EXIT_TERM))


class Server(uvicorn.Server):
    """Goes on answering after the first signal until all calls have ended; a second one ends them at once."""

    def __init__(self, app: Starlette, service: Service, bound: socket.socket) -> None:
        options = service.options
        super().__init__(
            uvicorn.Config(
                app,
                http=guarded(options, service.log),  # type: ignore[arg-type]  # it is only called
                loop="uvloop",
                ws="none",
                lifespan="on",
                log_config=None,
                log_level="critical",  # connections write into our log
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=_BACKLOG,
                timeout_keep_alive=max(1, round(options.idle_timeout_s)),
                timeout_graceful_shutdown=1,
            )
        )
        self._service, self._bound = service, bound
        host, port = bound.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._end = asyncio.Event()
        self._signal: int | None = None
        self._has_died = False

    def serve_until_stopped(self) -> int:
        """Serves until something ends it; returns the exit code: 1 if the engine has died, 130 after Ctrl-C, else 0."""
        self.run(sockets=[self._bound])
        if self._has_died:
            return _EXIT_DEAD
        return _EXIT_INTERRUPT if self._signal == signal.SIGINT else 0

    def stop(self) -> None:
        """Ends the server as the first signal does; called within its event loop."""
        self._end.set()

    async def on_tick(self, counter: int) -> bool:
        """Ends the server some time after its engine has died, so that who watches the process starts it again."""
        if counter % 10 == 0 and not (self._has_died or self._end.is_set() or self._service.is_alive):
            self._has_died = True
            self._service.log.write("engine died", level="error", exit_after_s=self._service.options.drain_s)
            asyncio.get_running_loop().call_later(self._service.options.drain_s, self._end.set)
        return await super().on_tick(counter)

    async def main_loop(self) -> None:
        service, drain_s = self._service, self._service.options.drain_s
        service.log.write("listening", url=self.url, model=service.names[0], page=service.options.page)
        ticks, ended = asyncio.create_task(super().main_loop()), asyncio.create_task(self._end.wait())
        await asyncio.wait({ticks, ended}, return_when=asyncio.FIRST_COMPLETED)
        service.log.write("stopping", calls=len(service.calls), limit_s=drain_s)
        ending = asyncio.create_task(service.end_calls(drain_s))
        await asyncio.wait({ticks, ending}, return_when=asyncio.FIRST_COMPLETED)  # a second signal ends the ticks
        for task in (ticks, ended, ending):
            task.cancel()
        await service.end_calls(0)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Takes SIGTERM and Ctrl-C, between two steps of the event loop."""
        if self._signal is None:
            self._signal = sig
            asyncio.get_running_loop().call_soon_threadsafe(self._end.set)
        else:
            self.should_exit = True

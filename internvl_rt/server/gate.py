"""What lets requests in, and sees each to its end: who may call, how much at a time, one form of every error."""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Generic, TypeVar

from internvl_rt.errors import InternVLError
from internvl_rt.server.body import Body, cut
from internvl_rt.server.call import Call, Receive, Scope, Send
from internvl_rt.server.fault import ApiError, error_of, internal_error
from internvl_rt.server.keys import Keys
from internvl_rt.server.log import Log
from internvl_rt.server.options import ServerOptions

PROBES = ("/health", "/ready")  # need no key, and are answered whatever the load
MAX_SALT = 128  # characters
END_S = 1.0  # for telling a client that the server ends
_LOOPBACK = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?")


class Gate:
    """The guards of one server, whatever is behind them. It knows no engine."""

    def __init__(self, options: ServerOptions, keys: Keys, log: Log) -> None:
        self.options, self.keys, self.log = options, keys, log
        self.calls: set[Call] = set()
        self.draining = False  # takes no new work
        self._num_body_bytes = 0

    def failed(self, code: str) -> None:
        """Counts a request that got an error, or whose client has left."""

    def salt(self, call: Call, given: str | None) -> str | None:
        """Returns what separates this request's prefixes from others': its API key, and what it asks for itself."""
        if given is not None and len(given) > MAX_SALT:
            what = f"cache_salt: at most {MAX_SALT} characters are taken, got {len(given):,}"
            raise ApiError(400, what, "limit_exceeded", "cache_salt")
        tenant = None if self.options.shared_prefixes else call.tenant
        return given if tenant is None else f"{tenant} {given or ''}"

    async def end_calls(self, limit_s: float) -> None:
        """Refuses new work, and waits until the calls in flight have ended; ends those that have not by then."""
        self.draining = True
        until_s = time.perf_counter() + limit_s
        while self.calls and time.perf_counter() < until_s:
            await asyncio.sleep(0.02)
        for call in list(self.calls):
            call.end(ApiError(503, "the server is being stopped; send the request again", "shutting_down"))
        while self.calls:
            await asyncio.sleep(0.02)

    def take_body(self, call: Call, num_bytes: int) -> None:
        """Counts bytes against the limit of all calls, until `give_back_body`. Raises ApiError beyond it."""
        if self._num_body_bytes + num_bytes > self.options.max_bodies_bytes:
            raise ApiError(
                429,
                "the requests in flight hold as many bytes as this server takes; try again later",
                "too_many_bytes",
                headers={"retry-after": "1"},
            )
        self._num_body_bytes += num_bytes
        call.num_taken_bytes += num_bytes

    def give_back_body(self, call: Call) -> None:
        self._num_body_bytes -= call.num_taken_bytes
        call.num_taken_bytes = 0

    def check_caller(self, call: Call, *, needs_key: bool) -> None:
        """Raises ApiError unless the call comes from a place, and with a key, that may call."""
        self._check_origin(call)
        if not (self.keys and needs_key):
            return
        scheme, _, key = call.headers.get(b"authorization", "").partition(" ")
        call.tenant = self.keys.tenant(key.strip()) if scheme.lower() == "bearer" else None
        if call.tenant is None:
            what = "the API key is missing or wrong; send the header authorization: Bearer KEY"
            raise ApiError(401, what, "invalid_api_key", headers={"www-authenticate": "Bearer"})

    def _check_origin(self, call: Call) -> None:
        """Refuses web pages of other hosts, which a browser would let send requests to a server of this machine."""
        origin = call.headers.get(b"origin")
        if origin is None or origin in self.options.allowed_origins:
            return
        host = call.headers.get(b"host", "")
        is_own = origin.partition("://")[2] == host
        is_local = self.options.host not in ("127.0.0.1", "localhost", "::1") or _LOOPBACK.fullmatch(host)
        if not (is_own and is_local):
            raise ApiError(403, "web pages of this origin may not use the server", "origin_not_allowed")


G = TypeVar("G", bound=Gate)
Handler = Callable[[G, Call], Awaitable[None]]


class Endpoint(Generic[G]):
    """An ASGI application of one path: checks who calls, reads nothing itself, and answers every error in one form."""

    def __init__(self, gate: G, handler: Handler[G], *, needs_key: bool = True, is_work: bool = False) -> None:
        """is_work: whether it computes something, so that it is refused while the server ends."""
        self._gate, self._handler = gate, handler
        self._needs_key, self._is_work = needs_key, is_work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gate, call = self._gate, Call(scope, receive, send)
        if self._is_work:
            gate.calls.add(call)
        try:
            try:
                await self._run(call)
            except ApiError as error:
                await self._fail(call, error)
            except InternVLError as error:
                fault = error_of(error, call.media_places)
                if fault.status >= 500:
                    gate.log.error("request failed", error, request_id=call.id)
                await self._fail(call, fault)
            except Exception as error:  # a mistake of ours: the client is told so, and the log has it
                gate.log.error("request failed", error, request_id=call.id)
                await self._fail(call, internal_error())
        except asyncio.CancelledError:
            if call.ending is not None:
                _uncancel()
                with suppress(TimeoutError):  # a client that reads nothing is not waited for
                    await asyncio.wait_for(self._fail(call, call.ending), END_S)
            elif call.gone:
                _uncancel()
                gate.failed("client_gone")
            else:
                raise
        finally:
            gate.give_back_body(call)
            call.finish()
            self._log(call)
            gate.calls.discard(call)

    async def _run(self, call: Call) -> None:
        self._gate.check_caller(call, needs_key=self._needs_key)
        if self._is_work and self._gate.draining:
            raise _stopped()
        await self._handler(self._gate, call)

    async def _fail(self, call: Call, error: ApiError) -> None:
        if self._is_work:
            self._gate.failed(error.code)
        await call.fail(error)

    def _log(self, call: Call) -> None:
        if self._gate.options.access_log:
            seconds = round(time.perf_counter() - call.start_s, 6)
            status = 499 if call.gone else call.status
            self._gate.log.write(
                "request",
                request_id=call.id,
                method=call.method,
                path=call.path,
                status=status,
                seconds=seconds,
                body_bytes=call.num_body_bytes,
                **call.facts,
            )


async def read_body(gate: Gate, call: Call) -> Body:
    """Reads the body of a call within the server's limits, and watches for the client's leaving from then on."""
    options = gate.options

    def take(num_bytes: int) -> None:
        gate.take_body(call, num_bytes)

    body = cut(await call.read(take, options.max_body_bytes, options.body_timeout_s), options.max_text_bytes)
    call.watch(options.keep_alive_s)
    return body


def _stopped() -> ApiError:
    return ApiError(
        503, "the server is being stopped; send the request again", "shutting_down", headers={"retry-after": "5"}
    )


def _uncancel() -> None:
    task = asyncio.current_task()
    if task is not None:
        task.uncancel()

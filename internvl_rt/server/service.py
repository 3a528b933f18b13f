"""What all endpoints of one server share: the engine, the options, who may ask, and how a call is run."""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

from internvl_rt.engine.async_engine import AsyncEngine
from internvl_rt.engine.engine import Engine
from internvl_rt.engine.reply import Reply, Timings
from internvl_rt.errors import InternVLError
from internvl_rt.inputs.sampling_params import SamplingParams
from internvl_rt.model.work import Roof
from internvl_rt.server.ask import Asking
from internvl_rt.server.body import Body, cut
from internvl_rt.server.call import Call, Receive, Scope, Send
from internvl_rt.server.fault import ApiError, error_of, internal_error
from internvl_rt.server.keys import Keys
from internvl_rt.server.log import Log
from internvl_rt.server.metrics import Metrics
from internvl_rt.server.options import ServerOptions
from internvl_rt.server.protocol import encode
from internvl_rt.server.remote import Fetcher

PROBES = ("/health", "/ready")  # need no key, and are answered whatever the load
TIMINGS_HEADER = "x-internvl-rt-timings"
MAX_SALT = 128  # characters
END_S = 1.0  # for telling a client that the server ends
_LOOPBACK = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?")

Handler = Callable[["Service", Call], Awaitable[None]]


class Service:
    """One model that is served. The endpoints are its callers; it knows none of them."""

    def __init__(
        self,
        core: Engine,
        engine: AsyncEngine,
        names: tuple[str, ...],
        options: ServerOptions,
        keys: Keys,
        log: Log,
        fetcher: Fetcher | None = None,
    ) -> None:
        """names: those of the model in requests; the first is the one in answers."""
        self.core, self.engine, self.names, self.options, self.log = core, engine, names, options, log
        self.keys, self.created = keys, int(time.time())
        fetcher = fetcher or Fetcher(options.remote_hosts, options.max_remote_bytes, options.remote_timeout_s)
        self.asking = Asking(options, core.config, fetcher, core.max_model_len)
        self.metrics = Metrics(names[0], lambda: {"alive": self.is_alive, **engine.stats()})
        self.calls: set[Call] = set()
        self.draining = False  # takes no new work
        self._num_body_bytes = 0

    @property
    def is_alive(self) -> bool:
        """Whether the engine takes requests, or would if the server did."""
        try:
            self.engine.check()
        except InternVLError:
            return False
        return True

    def check_model(self, name: str | None) -> None:
        """Raises ApiError for the name of another model; a request without one means this one."""
        if name is not None and name not in self.names:
            what = f"the model {name!r:.100} is not served here; send {self.names[0]!r}"
            raise ApiError(404, what, "model_not_found", "model")

    def salt(self, call: Call, given: str | None) -> str | None:
        """Returns what separates this request's prefixes from others': its API key, and what it asks for itself."""
        if given is not None and len(given) > MAX_SALT:
            what = f"cache_salt: at most {MAX_SALT} characters are taken, got {len(given):,}"
            raise ApiError(400, what, "limit_exceeded", "cache_salt")
        tenant = None if self.options.shared_prefixes else call.tenant
        return given if tenant is None else f"{tenant} {given or ''}"

    def timeout_s(self, given: float | None) -> float:
        """Returns the most seconds of a request."""
        if given is not None and not 0 < given <= self.options.request_timeout_s:
            what = f"timeout_s: expected seconds above 0 and at most {self.options.request_timeout_s:g}, got {given:g}"
            raise ApiError(400, what, "limit_exceeded", "timeout_s")
        return given or self.options.request_timeout_s

    def end_ids(self, params: SamplingParams) -> frozenset[int]:
        """Returns the tokens that end an answer and are not part of its text."""
        own = self.core.config.end_token_ids or (self.core.tokenizer.token_id("<|im_end|>"),)
        return frozenset((*(() if params.ignore_eos else own), *params.stop_ids))

    def answered(self, call: Call, reply: Reply, params: SamplingParams) -> None:
        """Counts a request that the engine has answered, and keeps its numbers for the log."""
        self.metrics.finished(reply, params, max(0.0, time.perf_counter() - call.start_s - reply.timings.total_s))
        call.facts |= {
            "prompt_tokens": reply.usage.prompt_tokens,
            "image_tokens": reply.usage.image_tokens,
            "cached_tokens": reply.usage.cached_tokens,
            "completion_tokens": reply.usage.completion_tokens,
            "finish": reply.finish_reason,
            **stages_of(reply.timings, None),
        }

    def timings(self, call: Call, reply: Reply) -> dict[str, object]:
        """Returns what the end of a stream says of the seconds of each stage, if the request wants that."""
        if not call.wants_timings:
            return {}
        return {"timings": {"floors": None, "roof": None} | stages_of(reply.timings, self.core.roof)}

    def timings_header(self, call: Call, reply: Reply) -> dict[str, str]:
        """Returns a header with the seconds of each stage, if the request wants it."""
        stages = self.timings(call, reply)
        return {TIMINGS_HEADER: encode(stages["timings"]).decode()} if stages else {}

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


def stages_of(timings: Timings, roof: Roof | None) -> dict[str, object]:
    """Returns the seconds of a request's stages. roof: adds the least that the device needs for each."""
    names = ("media_s", "tile_s", "queued_s", "vision_s", "prefill_s", "decode_s", "first_token_s", "total_s")
    stages: dict[str, object] = {name: round(getattr(timings, name), 6) for name in names}
    stages |= {"per_token_s": round(timings.per_token_s, 6), "num_decoded": timings.num_decoded}
    if roof is not None:
        works = ("vision", "prefill", "decode")
        floors = {f"{name}_s": round(roof.floor_s(getattr(timings, f"{name}_work")), 6) for name in works}
        stages |= {"floors": floors, "roof": roof.name}
    return stages


class Endpoint:
    """An ASGI application of one path: checks who calls, reads nothing itself, and answers every error in one form."""

    def __init__(self, service: Service, handler: Handler, *, needs_key: bool = True, is_work: bool = False) -> None:
        """is_work: whether it computes something, so that it is refused while the server ends."""
        self._service, self._handler = service, handler
        self._needs_key, self._is_work = needs_key, is_work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service, call = self._service, Call(scope, receive, send)
        if self._is_work:
            service.calls.add(call)
        try:
            try:
                await self._run(call)
            except ApiError as error:
                await self._fail(call, error)
            except InternVLError as error:
                fault = error_of(error, call.media_places)
                if fault.status >= 500:
                    service.log.error("request failed", error, request_id=call.id)
                await self._fail(call, fault)
            except Exception as error:  # a mistake of ours: the client is told so, and the log has it
                service.log.error("request failed", error, request_id=call.id)
                await self._fail(call, internal_error())
        except asyncio.CancelledError:
            if call.ending is not None:
                _uncancel()
                with suppress(TimeoutError):  # a client that reads nothing is not waited for
                    await asyncio.wait_for(self._fail(call, call.ending), END_S)
            elif call.gone:
                _uncancel()
                service.metrics.failed("client_gone")
            else:
                raise
        finally:
            service.give_back_body(call)
            call.finish()
            self._log(call)
            service.calls.discard(call)

    async def _run(self, call: Call) -> None:
        self._service.check_caller(call, needs_key=self._needs_key)
        if self._is_work and self._service.draining:
            raise _stopped()
        await self._handler(self._service, call)

    async def _fail(self, call: Call, error: ApiError) -> None:
        if self._is_work:
            self._service.metrics.failed(error.code)
        await call.fail(error)

    def _log(self, call: Call) -> None:
        if self._service.options.access_log:
            seconds = round(time.perf_counter() - call.start_s, 6)
            status = 499 if call.gone else call.status
            self._service.log.write(
                "request",
                request_id=call.id,
                method=call.method,
                path=call.path,
                status=status,
                seconds=seconds,
                body_bytes=call.num_body_bytes,
                **call.facts,
            )


async def read_body(service: Service, call: Call) -> Body:
    """Reads the body of a call within the server's limits, and watches for the client's leaving from then on."""
    options = service.options

    def take(num_bytes: int) -> None:
        service.take_body(call, num_bytes)

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

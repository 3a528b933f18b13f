"""What receives requests: the guards of the server, the choice of a replica by its cache, and the answer passed on.

It knows nothing of Ray: `Ask` sends a request to one of the replicas.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing

from internvl_rt.serve_ray.choice import advantages
from internvl_rt.serve_ray.holdings import Holdings, Report
from internvl_rt.serve_ray.in_process import App, Head, Message
from internvl_rt.serve_ray.metrics_text import join_metrics
from internvl_rt.serve_ray.options import Plan
from internvl_rt.serve_ray.prompts import PromptKeys
from internvl_rt.server.app import WORK, middleware_of
from internvl_rt.server.body import Body
from internvl_rt.server.call import Call, Receive, Scope, Send
from internvl_rt.server.fault import RETRY_MS, ApiError
from internvl_rt.server.gate import PROBES, Endpoint, Gate, read_body
from internvl_rt.server.keys import Keys
from internvl_rt.server.log import Log
from internvl_rt.server.metrics import CONTENT_TYPE

MAX_ATTEMPTS = 2  # of a request whose replica ends before it has answered anything: it may be what has ended it
SILENT_S = 10.0  # after which a replica that has not reported is forgotten
FORGET_S = 1.0  # between two looks for such
REPLICA_HEADER = b"x-internvl-rt-replica"  # of answers: which replica has made it
_NOT_PASSED = {b"origin", b"transfer-encoding", b"connection", b"x-request-id"}  # checked or written here

Part = str | list[Message]  # first the name of the replica that answers, then its messages
Ask = Callable[[Head, bytes, Mapping[str, float]], AsyncGenerator[Part, None]]


class LostReplicaError(Exception):
    """The replica that had a request has ended."""


class BusyError(Exception):
    """No replica takes a further request, and no more may wait."""


class Front(Gate):
    """One ingress. Its event loop's thread alone may use it."""

    def __init__(self, plan: Plan, keys: Keys, log: Log, ask: Ask) -> None:
        """ask: sends a request, with the share of its prompt that some replicas hold more than others, to one of them.

        It raises LostReplicaError or BusyError.
        """
        super().__init__(plan.server, keys, log)
        self._ask, self._is_routing = ask, plan.pool.prefix_routing
        self.holdings = Holdings(plan.pool.max_known_blocks)
        self._forget_s = 0.0  # when silent replicas are looked for next
        self.prompts: PromptKeys | None = None  # None: no replica has said yet what its engine is like
        self.app = _build_app(self)

    def take(self, report: Report) -> bool:
        """Takes a replica's report. False: a whole one is needed."""
        now_s = time.monotonic()
        if now_s >= self._forget_s:
            self._forget_s = now_s + FORGET_S
            self.holdings.forget(now_s - SILENT_S)
        return self.holdings.take(report, now_s)

    async def digests(self, call: Call, body: Body) -> list[bytes]:
        """Returns the digests of a prompt; none if prompts are not routed by them, or this one cannot be."""
        if not (self._is_routing and self.prompts is not None and len(self.holdings) > 1):
            return []
        try:
            return await self.prompts.digests(call.path, body, lambda given: self.salt(call, given))
        except Exception as error:  # a mistake of ours costs a hit, and no request
            self.log.error("digests failed", error, request_id=call.id)
            return []

    async def pass_on(self, call: Call, body: bytes, digests: Sequence[bytes] = ()) -> None:
        """Passes a request on and its answer back. Raises ApiError."""
        named = call.headers.items()
        headers = [(name, value.encode("latin-1")) for name, value in named if name not in _NOT_PASSED]
        head = Head(call.method, call.path, [*headers, (b"x-request-id", call.id.encode())])
        for _ in range(MAX_ATTEMPTS):
            try:
                await self._pass_once(call, head, body, digests)
                return
            except LostReplicaError:
                self.holdings.drop(str(call.facts.pop("replica", "")))
                if call.status:
                    raise _lost() from None
            except BusyError:
                raise _busy() from None
        raise _lost()

    async def _pass_once(self, call: Call, head: Head, body: bytes, digests: Sequence[bytes]) -> None:
        held = self.holdings.match(digests, time.monotonic()) if digests else {}
        advantage = advantages(held, len(digests))
        async with aclosing(self._ask(head, body, advantage)) as parts:
            try:
                async with asyncio.timeout(self.options.request_timeout_s):
                    replica = await anext(parts)
            except TimeoutError:
                raise _none_free(self.options.request_timeout_s) from None
            assert isinstance(replica, str), "a replica says its name first"
            call.facts |= {"replica": replica, "known_blocks": held.get(replica, 0)}
            self.holdings.expect(replica, digests, time.monotonic())
            async for messages in parts:
                assert not isinstance(messages, str)
                for message in messages:
                    if message["type"] == "http.response.start":
                        message["headers"] = [*message["headers"], (REPLICA_HEADER, replica.encode())]
                    await call.relay(message)


async def _work(front: Front, call: Call) -> None:
    body = await read_body(front, call)
    digests = await front.digests(call, body)
    await front.pass_on(call, body.whole, digests)


async def _look(front: Front, call: Call) -> None:
    """Passes on a request that has no body, or none that anybody reads."""
    call.watch(front.options.keep_alive_s)
    await front.pass_on(call, b"")


async def _probe(front: Front, call: Call) -> None:
    """Says whether some replica lives, and whether prompts are routed by what replicas hold."""
    if not len(front.holdings):
        raise ApiError(503, "no replica is there yet; try again later", "no_replica", headers={"retry-after": "1"})
    routes = front.prompts is not None
    await call.send_json({"status": "ok", "replicas": len(front.holdings), "routes_by_prefix": routes})


async def _metrics(front: Front, call: Call) -> None:
    await call.answer(join_metrics(front.holdings.metrics()), CONTENT_TYPE)


def _build_app(front: Front) -> App:
    work, look = Endpoint(front, _work, is_work=True), Endpoint(front, _look, needs_key=False)
    probe, metrics = Endpoint(front, _probe, needs_key=False), Endpoint(front, _metrics)

    async def app(scope: Scope, receive: Receive, send_any: Send) -> None:
        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":  # Serve's proxy writes the id of the request
                message["headers"] = [pair for pair in message["headers"] if pair[0] != b"x-request-id"]
            await send_any(message)

        if scope["type"] == "lifespan":
            await _live(receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close"})  # which refuses it
        elif scope["method"] == "POST" and scope["path"] in WORK:
            await work(scope, receive, send)
        elif scope["method"] == "GET" and scope["path"] in PROBES:
            await probe(scope, receive, send)
        elif scope["method"] == "GET" and scope["path"] == "/metrics":
            await metrics(scope, receive, send)
        else:
            await look(scope, receive, send)

    made: App = app
    for each in middleware_of(front.options):
        made = each.cls(made, *each.args, **each.kwargs)
    return made


async def _live(receive: Receive, send: Send) -> None:
    while (await receive())["type"] == "lifespan.startup":
        await send({"type": "lifespan.startup.complete"})
    await send({"type": "lifespan.shutdown.complete"})


def _lost() -> ApiError:
    what = "the replica that had this request has ended; send the request again"
    return ApiError(503, what, "replica_lost", headers={"retry-after": "1"})


def _busy() -> ApiError:
    what = "all replicas have as many requests as they take; try again later"
    return ApiError(429, what, "queue_full", headers={"retry-after-ms": str(RETRY_MS), "retry-after": "1"})


def _none_free(limit_s: float) -> ApiError:
    what = f"no replica took the request within {limit_s:g} s; try again later"
    return ApiError(503, what, "no_replica", headers={"retry-after": "1"})

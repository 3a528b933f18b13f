"""One replica: an engine, and the application of the server around it, that is called in this process."""

import asyncio
import sys
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import replace
from time import monotonic
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from internvl_rt.engine.async_engine import AsyncEngine
from internvl_rt.engine.engine import Engine
from internvl_rt.engine.host_memory import keep_large_buffers
from internvl_rt.engine.loading import load_parts
from internvl_rt.serve_ray.autoscaling import KV_USE
from internvl_rt.serve_ray.holdings import Ledger
from internvl_rt.serve_ray.in_process import Head, Message, answer
from internvl_rt.serve_ray.options import Plan
from internvl_rt.serve_ray.prompts import facts_of
from internvl_rt.server.app import build_app
from internvl_rt.server.keys import read_keys
from internvl_rt.server.log import Log
from internvl_rt.server.service import Service

INGRESS = "Ingress"  # the deployment that reports go to
HEARTBEAT_S = 2.0  # between reports without news
METRICS_S = 5.0  # between reports with metrics
REPORT_TIMEOUT_S = 5.0
LOST_S = 60.0  # without an answer to any report, after which an ingress and its requests are given up


class Replica:
    """Answers requests that an ingress passes on, and reports to all ingresses what its cache holds."""

    _reporting: asyncio.Task[None] | None = None  # None: the engine has not been loaded

    def __init__(self, plan: Plan, hash_key: bytes) -> None:
        """Loads the engine. Raises what `Engine.from_pretrained` raises."""
        keep_large_buffers()
        context = serve.get_replica_context()
        self._name, self._log = context.replica_id.unique_id, Log(sys.stderr)
        core = Engine(*load_parts(plan.model, plan.engine, hash_key=hash_key), plan.engine)
        options = replace(plan.server, allowed_origins=())  # the ingress asks where requests come from
        keys = read_keys(options.api_keys_file)
        self._service = Service(core, AsyncEngine(core), plan.names, options, keys, self._log)
        self._app, self._cache, self._facts = build_app(self._service), core.cache, facts_of(core, hash_key)
        self._ledger = Ledger()
        self._heard_s: dict[str, float] = {}  # when each ingress last sent a request or answered a report
        self._open: dict[asyncio.Event, str] = {}  # of each request: what ends it, and its ingress
        self._app_name = context.app_name
        self._ingresses: DeploymentHandle[Any] | None = None  # Serve makes the ingress after the replicas
        self._reporting = asyncio.get_running_loop().create_task(self._report_forever(plan.pool.report_interval_s))

    async def answer(
        self, head: Head, body: bytes, sender: str, advantage: Mapping[str, float] | None = None
    ) -> AsyncGenerator[str | list[Message], None]:
        """Yields this replica's name and then the messages of the answer.

        sender: the ingress that asks. advantage: is for the router.
        """
        gone = asyncio.Event()
        self._heard_s[sender] = monotonic()
        self._open[gone] = sender
        try:
            yield self._name
            async with aclosing(answer(self._app, head, body, gone)) as parts:
                async for messages in parts:
                    yield messages
        finally:
            del self._open[gone]

    async def check_health(self) -> None:
        """Raises EngineDeadError if this replica has to be started again."""
        self._service.engine.check()

    def record_autoscaling_stats(self) -> dict[str, float]:
        stats = self._service.engine.stats()
        return {KV_USE: stats["kv_blocks_used"] / stats["kv_blocks"]}

    async def __del__(self) -> None:
        """Ends the engine; Serve calls this when no request is left, or the time for them is over."""
        if self._reporting is None:
            return
        self._reporting.cancel()
        await self._service.end_calls(0)
        await self._service.engine.close()

    async def _report_forever(self, interval_s: float) -> None:
        sent_s = metrics_s = -METRICS_S
        while True:
            await asyncio.sleep(interval_s)
            self._ledger.follow(self._cache.drain_events())
            now_s = monotonic()
            if not self._ledger.has_news and now_s - sent_s < HEARTBEAT_S:
                continue
            metrics = self._service.metrics.render() if now_s - metrics_s >= METRICS_S else None
            report = self._ledger.report(self._name, self._facts, metrics)
            sent_s, metrics_s = now_s, metrics_s if metrics is None else now_s
            try:
                if self._ingresses is None:
                    self._ingresses = serve.get_deployment_handle(INGRESS, self._app_name)
                sending = self._ingresses.broadcast("take", report)
                answers = await sending.results_async(timeout_s=REPORT_TIMEOUT_S, return_exceptions=True)
            except Exception as error:  # no ingress is there, or one is busy: it gets a whole report later
                answers = [error]
            if not all(isinstance(each, tuple) and each[1] for each in answers):
                self._ledger.ask_for_whole()
            self._heard_s |= {each[0]: monotonic() for each in answers if isinstance(each, tuple)}
            self._give_up_lost()

    def _give_up_lost(self) -> None:
        """Ends the requests of ingresses that have ended: nobody reads their answers, and Ray does not say so."""
        lost = {name for name, heard_s in self._heard_s.items() if monotonic() - heard_s > LOST_S}
        for gone, sender in self._open.items():
            if sender in lost:
                gone.set()
        for name in lost - set(self._open.values()):
            del self._heard_s[name]

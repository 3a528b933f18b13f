"""One ingress: Serve's HTTP proxies call its application, and it passes requests on to the replicas."""

import asyncio
import sys
from collections.abc import AsyncGenerator, Mapping
from functools import partial
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from internvl_rt.serve_ray.front import BusyError, Front, LostReplicaError, Part
from internvl_rt.serve_ray.holdings import Report
from internvl_rt.serve_ray.in_process import App, Head
from internvl_rt.serve_ray.options import Plan
from internvl_rt.serve_ray.prompts import PromptKeys, key_id
from internvl_rt.server.keys import read_keys
from internvl_rt.server.log import Log


@serve.ingress()
class Ingress:
    """Receives requests. It needs the model's configuration and tokenizer, and no weights."""

    def __init__(self, plan: Plan, hash_key: bytes, replicas: DeploymentHandle[Any]) -> None:
        self._plan, self._hash_key = plan, hash_key
        self._replicas = replicas.options(stream=True)
        self._log, self._name = Log(sys.stderr), serve.get_replica_context().replica_id.unique_id
        self._front = Front(plan, read_keys(plan.server.api_keys_file), self._log, self._ask)
        self._preparing: asyncio.Task[None] | None = None

    def __serve_build_asgi_app__(self) -> App:
        return self._front.app

    async def take(self, report: Report) -> tuple[str, bool]:
        """Takes a replica's report. Returns this ingress' name, and False if a whole report is needed."""
        facts, own = report.facts or {}, key_id(self._hash_key)
        if self._preparing is None and self._plan.pool.prefix_routing and facts.get("key_id") == own:
            self._preparing = asyncio.create_task(self._prepare(facts))
        return self._name, self._front.take(report)

    async def _prepare(self, facts: Mapping[str, Any]) -> None:
        make = partial(PromptKeys, self._plan.model, self._plan.engine, self._plan.server, facts, self._hash_key)
        try:
            self._front.prompts = await asyncio.to_thread(make)
        except Exception as error:
            self._log.error("prefixes are not routed", error)

    async def _ask(self, head: Head, body: bytes, advantage: Mapping[str, float]) -> AsyncGenerator[Part, None]:
        """Sends a request to the replica that Serve's router chooses."""
        response: Any = self._replicas.answer.remote(head, body, self._name, advantage=dict(advantage))  # a generator
        try:
            async for part in response:
                yield part
        except (RayActorError, DeploymentUnavailableError) as error:
            raise LostReplicaError from error
        except BackPressureError as error:
            raise BusyError from error
        finally:
            response.cancel()  # does nothing if it has ended

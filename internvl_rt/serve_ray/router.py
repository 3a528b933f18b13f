"""The request router of Ray Serve for replicas with caches: it follows `choice`, and Serve does the rest.

Serve keeps the list of replicas and how many requests each has, sends a request elsewhere if a replica refuses it, and
drops replicas that have died.
"""

from random import Random
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from internvl_rt.serve_ray.choice import draw_two, prefer

ADVANTAGE = "advantage"  # the argument of a request that says how much of its prompt some replicas hold


class PrefixRouter(RequestRouter):
    """Prefers the replica that a prompt is worth most at."""

    def initialize_state(self, **options: Any) -> None:
        """options: load_share and max_imbalance, as in `choice`."""
        self._options, self._draw = options, Random()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Returns the preferred replica, if there is one, and then two others, of which Serve takes the less busy."""
        two = draw_two(candidate_replicas, self._draw)
        if pending_request is None:
            return [two]
        pending_request.routing_context.should_backoff = True  # between attempts when all are full
        advantage = pending_request.kwargs.get(ADVANTAGE)
        if not advantage:
            return [two]
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        requests = {name: self._num_requests(replica) for name, replica in by_name.items()}
        preferred = prefer(advantage, requests, **self._options, draw=self._draw)
        return [two] if preferred is None else [[by_name[preferred]], two]

    def _num_requests(self, replica: RunningReplica) -> int:
        return self.replica_queue_len_cache.get(replica.replica_id) or 0  # None: not heard of, or long ago

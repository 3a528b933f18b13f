"""Says how many replicas the load needs: by the requests that they have, and by how full their KV caches are."""

from typing import Any

from ray.serve.config import AutoscalingContext

KV_USE = "kv_use"  # what a replica records: the share of its KV cache that running sequences hold


class GrowByLoad:
    """A policy for Serve's autoscaler, which applies its delays and limits to what this wants."""

    def __init__(self, target_kv_use: float) -> None:
        self._target_kv_use = target_kv_use

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        if context.current_num_replicas == 0:
            return context.target_num_replicas, {}
        assert context.config is not None
        by_requests = context.total_num_requests / context.config.get_target_ongoing_requests()
        used = (context.aggregated_metrics or {}).get(KV_USE, {})
        return max(by_requests, sum(used.values()) / self._target_kv_use), {}

"""What Serve is told of the deployments, and the router and the policy that it calls."""

import asyncio
import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from internvl_rt.errors import RequestError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own
    from internvl_rt.serve_ray import application, build
    from internvl_rt.serve_ray.autoscaling import KV_USE, GrowByLoad
    from internvl_rt.serve_ray.router import ADVANTAGE, PrefixRouter

pytestmark = pytest.mark.filterwarnings("ignore")


def deployments(**options: Any) -> tuple[Any, Any]:
    """Returns the deployments of the replicas and of the ingress."""
    ingress = application("tiny", **options)._bound_deployment
    return ingress.init_args[2]._bound_deployment, ingress


def drain_s(deployment: Any) -> float:
    return float(deployment._deployment_config.graceful_shutdown_timeout_s)


def test_replicas_end_when_their_requests_have_and_take_twice_what_runs_together() -> None:
    replicas, ingress = deployments(num_replicas=3, max_num_seqs=8, request_timeout_s=100, num_ingresses=2)
    assert (replicas.num_replicas, replicas.max_ongoing_requests, drain_s(replicas)) == (3, 16, 115)
    assert (ingress.num_replicas, drain_s(ingress)) == (2, 130)
    assert replicas.init_args[1] == ingress.init_args[1], "both have one key"
    assert replicas.init_args[1] != deployments()[0].init_args[1]


@pytest.mark.parametrize(
    ("options", "gpus"),
    [({}, 0), ({"device": "cpu"}, 0), ({"device": "cuda"}, 1), ({"device": "cuda", "num_gpus": 0}, 0)],
)
def test_a_replica_has_the_gpus_of_its_device(options: dict[str, Any], gpus: int) -> None:
    replicas, _ = deployments(**options)
    assert replicas.ray_actor_options["num_gpus"] == gpus
    assert replicas._replica_config.placement_group_bundles is None


def test_the_ranks_of_a_replica_are_on_one_machine() -> None:
    replicas, _ = deployments(device="cuda", tensor_parallel_size=4, num_cpus=8)
    config = replicas._replica_config
    assert config.placement_group_bundles == [{"CPU": 8, "GPU": 4}]
    assert config.placement_group_strategy == "STRICT_PACK"
    assert replicas.ray_actor_options["num_gpus"] == 4
    replicas, _ = deployments(device="cuda", tensor_parallel_size=4, vision_processes=1)
    assert replicas._replica_config.placement_group_bundles == [{"CPU": 1, "GPU": 5}]


def test_a_pool_that_grows_has_limits_and_a_policy() -> None:
    replicas, _ = deployments(num_replicas=2, max_replicas=5, max_num_seqs=8, target_kv_use=0.5)
    config = replicas._deployment_config.autoscaling_config
    assert (config.min_replicas, config.max_replicas, config.target_ongoing_requests) == (2, 5, 4)
    assert config.policy.policy_kwargs == {"target_kv_use": 0.5}


def test_a_wrong_option_is_refused_before_anything_is_started() -> None:
    with pytest.raises(RequestError, match="unknown option 'replicas'"):
        build({"model": "tiny", "replicas": "2"})
    with pytest.raises(RequestError, match="api_keys_file"):
        application("tiny", api_keys_file="/nosuch")


@pytest.mark.parametrize(
    ("requests", "used", "expected"),
    [(8, {}, 2), (8, {"a": 0.1, "b": 0.2}, 2), (8, {"a": 0.9, "b": 0.9}, 3), (0, {}, 0)],
)
def test_the_pool_grows_by_requests_or_by_what_its_caches_hold(
    requests: float, used: dict[str, float], expected: float
) -> None:
    config = SimpleNamespace(get_target_ongoing_requests=lambda: 4)
    context: Any = SimpleNamespace(
        current_num_replicas=2, total_num_requests=requests, config=config, aggregated_metrics={KV_USE: used}
    )
    assert GrowByLoad(0.6)(context) == (pytest.approx(expected), {})
    context.current_num_replicas, context.target_num_replicas = 0, 1
    assert GrowByLoad(0.6)(context) == (1, {})


class FakeRouter(PrefixRouter):
    """A router that knows how many requests each replica has, and nothing of Serve."""

    def __init__(self, requests: dict[str, int]) -> None:
        self.initialize_state(load_share=0.1, max_imbalance=4)
        self._requests = requests

    def _num_requests(self, replica: Any) -> int:
        return self._requests[replica.replica_id.unique_id]


def ranks(requests: dict[str, int], advantage: dict[str, float] | None) -> list[list[str]]:
    replicas: Any = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in requests]
    pending: Any = SimpleNamespace(kwargs={ADVANTAGE: advantage}, routing_context=SimpleNamespace(should_backoff=False))
    chosen = asyncio.run(FakeRouter(requests).choose_replicas(replicas, pending))
    assert pending.routing_context.should_backoff, "a full pool is not asked without a pause"
    return [[replica.replica_id.unique_id for replica in rank] for rank in chosen]


def test_the_router_puts_the_preferred_replica_before_two_others() -> None:
    preferred, two = ranks({"a": 1, "b": 0, "c": 0}, {"a": 0.15})
    assert (preferred, len(set(two))) == (["a"], 2)
    for advantage in ({}, None, {"a": 0.05}, {"gone": 1.0}):
        (two,) = ranks({"a": 1, "b": 0, "c": 0}, advantage)
        assert len(set(two)) == 2
    assert ranks({"a": 7}, {"a": 1.0}) == [["a"], ["a"]]

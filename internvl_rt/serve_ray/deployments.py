"""Builds the application for Ray Serve: an ingress that receives requests, and replicas that answer them."""

import secrets
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from internvl_rt.serve_ray.autoscaling import GrowByLoad
from internvl_rt.serve_ray.ingress import Ingress
from internvl_rt.serve_ray.options import Plan, read_plan
from internvl_rt.serve_ray.replica import INGRESS, Replica
from internvl_rt.serve_ray.router import PrefixRouter
from internvl_rt.server.keys import read_keys

MANY = 1 << 20  # requests that an ingress may have: the limits of bytes and of the replicas count
END_S = 15.0  # for a replica to end when its last request has
HEALTH_PERIOD_S, HEALTH_TIMEOUT_S = 5.0, 30.0


def application(model: str, **options: Any) -> Application:
    """Builds the application for a model, with options of the pool, the server and the engine by their names.

    `serve.run` starts it. Raises RequestError for a wrong option, before anything is started.
    """
    return build({"model": model, **options})


def build(options: dict[str, Any]) -> Application:
    """Builds the application from `model` and options, which may be texts: for the command `serve run`."""
    plan = read_plan(options)
    read_keys(plan.server.api_keys_file)
    hash_key = secrets.token_bytes(16)  # of the digests that the processes of this application have in common
    replicas = _replicas(plan).bind(plan, hash_key)
    made: Application = _ingresses(plan).bind(plan, hash_key, replicas)
    return made


_deployment: Any = serve.deployment  # whose types leave out what it returns for a class
_LOG = {"enable_access_log": False}  # the ingress and its replicas write their own


def _replicas(plan: Plan) -> Any:
    pool, engine = plan.pool, plan.engine
    num_gpus = _num_gpus(plan)
    most = pool.max_ongoing_requests or 2 * engine.max_num_seqs
    where: dict[str, Any] = {"ray_actor_options": {"num_cpus": pool.num_cpus, "num_gpus": num_gpus}}
    if engine.num_processes > 1:  # they belong to the one actor, on one machine
        where["placement_group_bundles"] = [{"CPU": pool.num_cpus, **({"GPU": num_gpus} if num_gpus else {})}]
        where["placement_group_strategy"] = "STRICT_PACK"
    if pool.max_replicas is None:
        size: dict[str, Any] = {"num_replicas": pool.num_replicas}
    else:
        policy = {"policy_function": GrowByLoad, "policy_kwargs": {"target_kv_use": pool.target_kv_use}}
        size = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=pool.num_replicas,
                max_replicas=pool.max_replicas,
                target_ongoing_requests=pool.target_ongoing_requests or engine.max_num_seqs / 2,
                upscale_delay_s=pool.upscale_delay_s,
                downscale_delay_s=pool.downscale_delay_s,
                policy=AutoscalingPolicy.model_validate(policy),
            )
        }
    weights = {"load_share": pool.load_share, "max_imbalance": pool.max_imbalance}
    router = {"request_router_class": PrefixRouter, "request_router_kwargs": weights}
    return _deployment(Replica).options(
        name="Replica",
        max_ongoing_requests=most,
        max_queued_requests=max(1, engine.max_waiting),
        max_surge_percent=pool.max_surge_percent,
        graceful_shutdown_timeout_s=plan.drain_s + END_S,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        request_router_config=RequestRouterConfig.model_validate(router),
        logging_config=_LOG,
        **size,
        **where,
    )


def _ingresses(plan: Plan) -> Any:
    pool = plan.pool
    return _deployment(Ingress).options(
        name=INGRESS,
        num_replicas=pool.num_ingresses,
        max_ongoing_requests=MANY,
        max_surge_percent=100,  # it needs no GPU, so the next one is there before this one ends
        graceful_shutdown_timeout_s=plan.drain_s + 2 * END_S,
        graceful_shutdown_wait_loop_s=0.5,
        ray_actor_options={"num_cpus": pool.ingress_cpus},
        logging_config=_LOG,
    )


def _num_gpus(plan: Plan) -> int:
    if plan.pool.num_gpus is not None:
        return plan.pool.num_gpus
    if plan.engine.device == "auto":
        resources: dict[str, float] = ray.cluster_resources() if ray.is_initialized() else {}  # type: ignore[no-untyped-call]
        has_gpus = resources.get("GPU", 0) > 0
    else:
        has_gpus = plan.engine.device != "cpu"
    engine = plan.engine
    return 0 if not has_gpus else engine.tensor_parallel_size if engine.vision_device == "cpu" else engine.num_processes

"""The options of an application: those of the pool of replicas, of the server and of the engine, checked once."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from internvl_rt.engine.options import ENGINE_KINDS, EngineOptions
from internvl_rt.errors import RequestError, quoted
from internvl_rt.server.options import SERVER_KINDS, ServerOptions
from internvl_rt.values import Flag, Integer, Kind, Number, OrNone, Several, Text, UnfitError, read, read_fields

# Ray Serve accepts connections, so these would have no effect.
_OF_RAY = {
    "port": "http_options of serve.start, or of the configuration file",
    "max_connections": "a proxy before Ray Serve",
    "header_timeout_s": "a proxy before Ray Serve",
    "stall_timeout_s": "a proxy before Ray Serve",
    "idle_timeout_s": "keep_alive_timeout_s in http_options",
    "trace": "internvl-rt serve, for one replica",
}
_FLAGS = {"true": True, "false": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolOptions:
    """Options of the pool of replicas. Raises RequestError that names a value out of range.

    num_replicas: how many replicas there are, and with `max_replicas` the least.
    max_replicas: up to how many replicas the pool grows with its load; None: it does not grow.
    target_ongoing_requests: requests of a replica, waiting ones included, above which the pool grows; None is half of
        the engine's `max_num_seqs`.
    target_kv_use: share of a replica's KV cache above which the pool grows.
    upscale_delay_s: seconds for which the load must be higher before the pool grows.
    downscale_delay_s: seconds for which it must be lower before the pool shrinks.
    max_ongoing_requests: requests that a replica takes; more wait in the ingress. None is twice `max_num_seqs`.
    num_cpus: cores that Ray keeps for a replica, and threads that it computes with on a CPU.
    num_gpus: GPUs of a replica; None is one for each process of its engine if the cluster has GPUs and `device` allows
        them.
    num_ingresses: processes that receive requests, compute their prompts' digests and pass them on.
    ingress_cpus: cores that Ray keeps for each of them.
    max_surge_percent: by how many percent an update may exceed `num_replicas` for a while; 0 replaces a replica only
        when another one has ended, which needs no spare GPU.
    prefix_routing: whether a prompt goes to a replica that holds its beginning, or its picture.
    load_share: which share of a prompt a replica must hold more than another for each request that it has more.
    max_imbalance: requests that a replica may have more than another and still be preferred.
    max_known_blocks: blocks of each replica that an ingress remembers, at about 100 bytes each.
    report_interval_s: seconds between two reports of a replica about its cache.
    """

    num_replicas: int = 1
    max_replicas: int | None = None
    target_ongoing_requests: float | None = None
    target_kv_use: float = 0.8
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0
    max_ongoing_requests: int | None = None
    num_cpus: float = 1.0
    num_gpus: int | None = None
    num_ingresses: int = 1
    ingress_cpus: float = 1.0
    max_surge_percent: int = 0
    prefix_routing: bool = True
    load_share: float = 1 / 8
    max_imbalance: int = 16
    max_known_blocks: int = 1 << 16
    report_interval_s: float = 0.5

    def __post_init__(self) -> None:
        read_fields(self, POOL_KINDS)
        if self.max_replicas is not None and self.max_replicas < self.num_replicas:
            raise RequestError(
                f"max_replicas: expected at least num_replicas, {self.num_replicas}, got {self.max_replicas}; raise it"
            )


POOL_KINDS: dict[str, Kind] = {
    "num_replicas": Integer(1, 10_000),
    "max_replicas": OrNone(Integer(1, 10_000)),
    "target_ongoing_requests": OrNone(Number(0, 100_000, above=True)),
    "target_kv_use": Number(0, 1, above=True),
    "upscale_delay_s": Number(0, 86_400),
    "downscale_delay_s": Number(0, 86_400),
    "max_ongoing_requests": OrNone(Integer(1, 1 << 20)),
    "num_cpus": Number(0, 1024),
    "num_gpus": OrNone(Integer(0, 1024)),
    "num_ingresses": Integer(1, 1000),
    "ingress_cpus": Number(0, 1024),
    "max_surge_percent": Integer(0, 100),
    "prefix_routing": Flag(),
    "load_share": Number(0, 1),
    "max_imbalance": Integer(0, 1 << 20),
    "max_known_blocks": Integer(1, 1 << 24),
    "report_interval_s": Number(0, 3600, above=True),
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What an application consists of."""

    model: str
    pool: PoolOptions
    server: ServerOptions
    engine: EngineOptions

    @property
    def drain_s(self) -> float:
        """Seconds for the requests of a replica that is replaced."""
        return self.server.drain_s

    @property
    def names(self) -> tuple[str, ...]:
        """The names that requests may give as `model`."""
        given = self.server.served_model_name or (self.model.rstrip("/").rpartition("/")[2], self.model)
        return tuple(dict.fromkeys(given))


def read_plan(given: Mapping[str, object]) -> Plan:
    """Reads the model and all options by their names. Raises RequestError for one that is unknown or wrong.

    Values may be texts, as a command line gives them. `drain_s` is by default `request_timeout_s`, so that no request
    is broken off when its replica is replaced.
    """
    left = dict(given)
    model = read("model", left.pop("model", None), Text(1, 4096))
    for name in left:
        if name in _OF_RAY:
            what = f"{name} has no effect under Ray Serve, which accepts the connections"
            raise RequestError(f"{what}; use {_OF_RAY[name]}")
    tables = (POOL_KINDS, SERVER_KINDS, ENGINE_KINDS)
    unknown = [name for name in left if not any(name in kinds for kinds in tables)]
    if unknown:
        known = ", ".join(sorted(name for kinds in tables for name in kinds if name not in _OF_RAY))
        raise RequestError(f"unknown option {quoted(unknown[0])}; expected one of model, {known}")
    pool, server, engine = (
        {name: _plain(name, left[name], kind) for name, kind in kinds.items() if name in left} for kinds in tables
    )
    checked = ServerOptions(**server)
    if "drain_s" not in server:
        checked = ServerOptions(**server, drain_s=checked.request_timeout_s)
    return Plan(model, PoolOptions(**pool), checked, EngineOptions(**engine))


def _plain(name: str, value: object, kind: Kind) -> Any:
    """Returns a value that may be a text, such as true, 8 or 0.5, or several with commas between them."""
    if not isinstance(value, str):
        return value
    several = kind.kind if isinstance(kind, OrNone) else kind
    if isinstance(several, Several):
        return tuple(_plain(name, each, several.kind) for each in value.split(","))
    readings = (lambda text: text, lambda text: _FLAGS[text.lower()], int, float)
    for reading in readings:
        with suppress(UnfitError, ValueError, KeyError):
            return kind.read(reading(value))
    raise RequestError(f"{name} must be {kind.expected}, got {quoted(value)}")

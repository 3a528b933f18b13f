"""A local Ray with one application of replicas of a model, for tests; nothing of it is left afterwards."""

import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray import serve

from internvl_rt.serve_ray import application

SHARED_MEMORY = Path("/dev/shm")
LOGS = False  # whether what processes of Ray write is shown
NUM_CPUS = 8  # that Ray counts with, whatever there is


class Pool:
    """An application that runs."""

    def __init__(self, url: str, key: str) -> None:
        self.url, self.key = url, key
        self.http = httpx2.Client(base_url=url, timeout=60, headers={"authorization": f"Bearer {key}"})

    def client(self, **more: Any) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", **{"api_key": self.key, "max_retries": 0, "timeout": 120, **more}
        )

    def async_client(self, **more: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", **{"api_key": self.key, "max_retries": 0, "timeout": 120, **more}
        )

    def update(self, **options: Any) -> None:
        """Runs the application with other options, and waits until its replicas are replaced."""
        serve.run(application("tiny", **options))

    def actors(self, deployment: str = "Replica") -> dict[str, Any]:
        """Returns Ray's handles of the actors of a deployment by their names."""
        names = [each["name"] for each in ray.util.list_named_actors(all_namespaces=True)]
        own = [name for name in names if f"#{deployment}#" in name]
        return {name.rpartition("#")[2]: ray.get_actor(name, namespace="serve") for name in own}

    def kill(self, name: str, deployment: str = "Replica") -> int:
        """Ends an actor's process at once; returns its id."""
        pid = ray.get(self.actors(deployment)[name].__ray_call__.remote(lambda _: os.getpid()))
        os.kill(pid, signal.SIGKILL)
        return int(pid)

    def stats(self) -> dict[str, dict[str, float]]:
        """Returns what each replica's engine counts."""

        def stats(actor: Any) -> dict[str, float]:  # in here it is sent as it is: replicas do not have this module
            replica = actor._replica_impl._user_callable_wrapper.user_callable
            service = getattr(replica, "_service", None)  # None while it loads
            return {} if service is None else service.engine.stats()  # type: ignore[no-any-return]

        calls = {name: actor.__ray_call__.remote(stats) for name, actor in self.actors().items()}
        return {name: ray.get(call) for name, call in calls.items()}

    def numbers(self, name: str) -> dict[str, float]:
        """Returns a metric of each replica, as the ingress has last heard of it."""
        text = self.http.get("/metrics").text
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return {sample.labels["replica"]: sample.value for sample in samples if sample.name == f"internvl_rt:{name}"}

    def wait_for_replicas(self, number: int, *, without: str = "", limit_s: float = 60.0) -> None:
        """Waits until so many replicas serve and an ingress knows them, none of them the one that is named."""
        until_s = time.monotonic() + limit_s
        found: set[str] = set()
        while time.monotonic() < until_s:
            try:
                found = set(self.numbers("engine_alive"))
            except (httpx2.HTTPError, ValueError):  # the ingress has just been killed
                found = set()
            if without not in found and len(found) == number and self._num_running() == number and self._is_routing():
                return
            time.sleep(0.2)
        raise AssertionError(f"{number} replicas are not there after {limit_s} s: {found}, {self._num_running()} run")

    def wait_until_idle(self, limit_s: float = 30.0) -> None:
        """Waits until no replica computes anything, or holds anything of a request."""
        until_s = time.monotonic() + limit_s
        names = ("running", "waiting", "preparing", "kv_blocks_used")
        while any(stats.get(name) for stats in self.stats().values() for name in names):
            assert time.monotonic() < until_s, self.stats()
            time.sleep(0.05)

    def _is_routing(self) -> bool:
        return bool(self.http.get("/health").json().get("routes_by_prefix"))

    def _num_running(self) -> int:
        states = serve.status().applications["default"].deployments["Replica"].replica_states
        return int(states.get("RUNNING", 0)) if sum(states.values()) == states.get("RUNNING", 0) else -1


@contextmanager
def running_pool(*, key: str = "none", **options: Any) -> Iterator[Pool]:
    """Runs an application until the `with` block ends. Raises AssertionError if a process of Ray is left then."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # a short path: the names of Unix sockets have 107 bytes
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    before = set(SHARED_MEMORY.iterdir())
    try:
        ray.init(
            num_cpus=NUM_CPUS,
            include_dashboard=False,
            _temp_dir=folder,
            object_store_memory=128 << 20,
            logging_level="error",
            log_to_driver=LOGS,
        )
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(application("tiny", **options))
        pool = Pool(f"http://127.0.0.1:{port}", key)
        pool.wait_for_replicas(options.get("num_replicas", 1))
        yield pool
        pool.http.close()
    finally:
        serve.shutdown()
        ray.shutdown()
        _check_that_nothing_is_left(folder, before)
        shutil.rmtree(folder, ignore_errors=True)


def _check_that_nothing_is_left(folder: str, before: set[Path], limit_s: float = 20.0) -> None:
    """Waits for the processes of Ray to end, and asserts that none and no shared memory is left."""
    until_s = time.monotonic() + limit_s
    while left := _processes_of(folder):
        if time.monotonic() > until_s:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"processes of Ray are left after {limit_s} s: {left}")
        time.sleep(0.2)
    assert not [path for path in set(SHARED_MEMORY.iterdir()) - before if "plasma" in path.name]


def _processes_of(folder: str) -> dict[int, str]:
    """Returns the command lines of the processes whose environment or command line names a folder of Ray."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            if process.name != str(os.getpid()) and (
                folder in line or folder.encode() in (process / "environ").read_bytes()
            ):
                found[int(process.name)] = line[:200]
        except OSError:  # it has just ended, or is another user's
            continue
    return found

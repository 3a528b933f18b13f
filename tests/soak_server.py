"""Sends a server any number of random requests under random faults: no leak, no wrong answer, no connection that hangs.

    python tests/soak_server.py --requests 10000 --seed 1

The server is a process of its own with small limits. First each kind of request is sent alone: its answers are those
that are expected later, when 50 connections send all kinds at once, leave at any moment, read and write slowly, break
their bodies and ask for more than fits.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from support.raw_http import Answer, Connection, CutError, head
from support.soak_clients import KEY, Clients
from support.soak_requests import CHAT, STREAMS, Kind, told_by

MAX_BODY_BYTES = 300_000
CONNECTIONS = 50
HANGS_AFTER_S = 60.0
IDLE_S, DRAIN_S, BODY_S, HEAD_S = 2.0, 3.0, 4.0, 3.0
MAX_GROWTH_MB = 48  # of the server's memory in the last third
OPTIONS = {
    "port": 0,
    "max-body-bytes": MAX_BODY_BYTES,
    "max-bodies-bytes": 8 << 20,
    "header-timeout-s": HEAD_S,
    "body-timeout-s": BODY_S,
    "stall-timeout-s": 2,
    "idle-timeout-s": IDLE_S,
    "keep-alive-s": 0.2,
    "drain-s": DRAIN_S,
    "dtype": "float32",  # rounding to bfloat16 may change an answer with what runs beside it
    "max-model-len": 1024,
    "max-num-seqs": 8,
    "max-waiting": 32,
    "kv-cache-bytes": 8 << 20,
    "visual-cache-bytes": 1 << 20,
}


class ServerProcess:
    """A server with one API key, and what can be seen of it from outside."""

    def __init__(self, key_file: Path) -> None:
        key_file.write_text(KEY)
        options = [f"--{name}={value}" for name, value in OPTIONS.items()]
        command = [sys.executable, "-m", "internvl_rt", "serve", "tiny", "--no-page", f"--api-keys-file={key_file}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True, env=environment)
        self.lines: list[str] = []
        self._listens = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        assert self._listens.wait(60), self.lines
        assert self.process.poll() is None, self.lines
        self.port = int(json.loads(self.lines[-1])["url"].rpartition(":")[2])
        self._folder = Path(f"/proc/{self.process.pid}")

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if '"listening"' in line:
                self._listens.set()
        self._listens.set()

    def num_files(self) -> int:
        return len(list((self._folder / "fd").iterdir()))

    def num_threads(self) -> int:
        return len(list((self._folder / "task").iterdir()))

    def memory_mb(self) -> float:
        found = re.search(r"VmRSS:\s+(\d+) kB", (self._folder / "status").read_text())
        assert found is not None
        return int(found[1]) / 1024

    def bad_lines(self) -> list[str]:
        """Returns the lines of the log that no request should cause: errors, and what is no JSON."""
        return [line for line in self.lines if not line.startswith("{") or json.loads(line)["level"] == "error"]


class Soak:
    """Sends the requests of one seed, and notes what came of them."""

    def __init__(self, server: ServerProcess, seed: int) -> None:
        self.server, self.seed = server, seed
        self.clients = Clients(server.port, MAX_BODY_BYTES)
        self.wrong = self.clients.wrong
        self.outcomes, self.ways = Counter[str](), Counter[str]()
        self.memory_mb: list[float] = []
        self.worst_health_s = 0.0

    async def calm(self) -> None:
        """Sends each kind alone, and keeps its answer. A stream tells the same as a whole answer."""
        clients, expected = self.clients, self.clients.expected
        for kind in clients.kinds:
            for stream in (False, *([True] if kind.path in STREAMS and kind.status == 200 else [])):
                async with Connection(self.server.port) as connection:
                    await connection.send(clients.message(kind, stream=stream))
                    answer = await connection.answer()
                clients.check(kind, answer)
                if kind.status == 200 and not kind.is_cut:
                    expected.setdefault(kind.name, told_by(kind.path, answer))
        expected["cut"] = expected["long"]
        assert expected["read 4719"][0]["text"] == "4719", expected["read 4719"]

    async def run(self, num_requests: int) -> None:
        left = iter(range(num_requests))
        probing = asyncio.create_task(self.probe())
        await asyncio.gather(*(self.connection(left) for _ in range(CONNECTIONS)))
        probing.cancel()
        (ended,) = await asyncio.gather(probing, return_exceptions=True)
        if not isinstance(ended, asyncio.CancelledError):
            self.wrong.append(f"/health: {ended!r}")

    async def connection(self, left: Any) -> None:
        ways = self.clients.ways
        for number in left:
            rng = random.Random(f"{self.seed}/{number}")
            way, kind = rng.choices(list(ways), list(ways.values()))[0], self.clients.draw(rng)
            try:
                async with asyncio.timeout(HANGS_AFTER_S):
                    outcome = await way(rng, kind)
            except TimeoutError:
                outcome = "hung"
            except CutError:
                outcome = "cut"
            except (ValueError, AssertionError, KeyError, TypeError) as error:
                outcome = f"no answer that can be read: {error!r:.300}"
            if outcome in ("cut", "hung") or outcome.startswith("no answer"):
                self.wrong.append(f"{way.__name__}, {kind.name}: {outcome}")
            self.outcomes[outcome[:20]] += 1
            self.ways[way.__name__] += 1
            self.memory_mb.append(self.server.memory_mb())

    async def probe(self) -> None:
        while True:
            start_s = time.perf_counter()
            status = (await self.get("/health")).status
            self.worst_health_s = max(self.worst_health_s, time.perf_counter() - start_s)
            if status != 200:
                self.wrong.append(f"/health: status {status}")
            await asyncio.sleep(0.1)

    async def get(self, path: str) -> Answer:
        async with Connection(self.server.port) as connection:
            await connection.send(head("GET", path, f"authorization: Bearer {KEY}"))
            return await connection.answer()

    async def settle(self) -> dict[str, float]:
        """Waits until idle connections are closed and nothing runs; returns the engine's numbers."""
        for _ in range(100):
            await asyncio.sleep(0.2)
            numbers = await self.metrics()
            if not any(numbers.values()):
                break
        await asyncio.sleep(IDLE_S + 1)
        return numbers

    async def metrics(self) -> dict[str, float]:
        names = ("num_requests_running", "num_requests_waiting", "num_requests_preparing", "kv_cache_usage_perc")
        text = (await self.get("/metrics")).body.decode()
        found = {name: re.search(rf"^internvl_rt:{name}{{[^}}]*}} (\S+)$", text, re.MULTILINE) for name in names}
        return {name: float(value[1]) if value else -1.0 for name, value in found.items()}

    async def end(self) -> None:
        """Sends SIGTERM while streams run: each must end in order, and so must the process."""
        process, clients = self.server.process, self.clients

        async def stream() -> None:
            async with Connection(self.server.port) as connection:
                kind = Kind("to the end", CHAT, clients.kind("long").body | {"max_tokens": 700})
                await connection.send(clients.message(kind, stream=True))
                try:
                    told_by(CHAT, await connection.answer())
                except (ValueError, CutError) as error:
                    self.wrong.append(f"a stream at the end of the server: {error!r}")

        async def stalled() -> None:
            async with Connection(self.server.port) as connection:
                connection.writer.transport.pause_reading()  # type: ignore[attr-defined]
                await connection.send(clients.message(clients.kind("long"), stream=True))
                await asyncio.sleep(DRAIN_S + 1)

        tasks = [asyncio.create_task(each()) for each in (stream, stream, stream, stalled)]
        await asyncio.sleep(0.3)
        start_s = time.perf_counter()
        process.send_signal(signal.SIGTERM)
        try:
            code = await asyncio.to_thread(process.wait, DRAIN_S + 20)
        except subprocess.TimeoutExpired:
            code = None
        seconds = time.perf_counter() - start_s
        print(f"SIGTERM: code {code} after {seconds:.1f} s")
        if code != 0 or seconds > DRAIN_S + 10:
            self.wrong.append(f"after SIGTERM the server ended with code {code} in {seconds:.1f} s")
        await asyncio.gather(*tasks)


async def soak(server: ServerProcess, num_requests: int, seed: int) -> Soak:
    """Runs all of it; returns what was found."""
    run = Soak(server, seed)
    await run.calm()
    await run.run(min(200, num_requests // 4))  # until caches and pools have their size
    await run.settle()
    files, threads = server.num_files(), server.num_threads()
    for counted in (run.memory_mb, run.outcomes, run.ways):
        counted.clear()
    start_s = time.perf_counter()
    await run.run(num_requests)
    print(f"{num_requests} requests in {time.perf_counter() - start_s:.0f} s, seed {seed}")
    numbers = await run.settle()
    if any(numbers.values()):
        run.wrong.append(f"the engine still holds something: {numbers}")
    left = {"files": server.num_files() - files, "threads": server.num_threads() - threads}
    if left["files"] > 0 or left["threads"] > 0:
        run.wrong.append(f"left behind: {left}")
    third = len(run.memory_mb) // 3
    growth_mb = max(run.memory_mb[2 * third :]) - max(run.memory_mb[third : 2 * third])
    print(f"memory: {run.memory_mb[0]:.0f} MB, then {run.memory_mb[-1]:.0f} MB; the last third adds {growth_mb:.0f} MB")
    print(f"worst /health: {run.worst_health_s * 1e3:.0f} ms")
    if growth_mb > MAX_GROWTH_MB:
        run.wrong.append(f"memory grew by {growth_mb:.0f} MB in the last third")
    await run.calm()
    await run.end()
    run.wrong += [f"log: {line:.300}" for line in server.bad_lines()]
    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = ServerProcess(Path(folder) / "keys")
        try:
            run = asyncio.run(soak(server, arguments.requests, arguments.seed))
        finally:
            server.process.kill()
            server.process.wait()
    for title, counts in (("outcomes", run.outcomes), ("ways", run.ways)):
        print(f"{title}: " + ", ".join(f"{count} {name}" for name, count in counts.most_common()))
    for text, count in Counter(run.wrong).most_common(20):
        print(f"WRONG ({count}): {text:.600}")
    return 1 if run.wrong else 0


if __name__ == "__main__":
    sys.exit(main())

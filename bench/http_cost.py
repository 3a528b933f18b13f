"""Measures what HTTP costs beside the engine itself, against the goals: each number is a comparison within one run.

    OMP_NUM_THREADS=1 python bench/http_cost.py [--samples 40] [--rounds 4] [--streams 64]

The same requests are sent by turns to AsyncEngine in this process, and over loopback, from another process, to a server
of the same engine in a thread of this one. Both sides read streams as they come, in event loops of one kind.

* first token: the time to the first token about a new picture of 1 MB, over HTTP minus in process: the median of pairs
  that follow each other, in which a machine that others use too changes little. Beside it, the time in which as many
  bytes go over loopback, and one comes back, between plain sockets: what no server can save.
* streams: the tokens a second of so many streams together, over HTTP against in process; each a median of the rounds.
* 4 MB data URL: the median time to read the body of a request, and to decode and hash its picture.
"""

import argparse
import base64
import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from itertools import islice
from statistics import median
from typing import Any

import numpy as np
import torch
import uvloop
from options import count, exit_with

from internvl_rt import AsyncEngine, Engine
from internvl_rt.bench.arrivals import Arrival, Mix, draw_arrivals
from internvl_rt.bench.client import Load, Outcome
from internvl_rt.bench.loopback import open_loopback, request_of, shared_texts
from internvl_rt.bench.pictures import noise_png
from internvl_rt.bench.serve import ask_engine
from internvl_rt.engine.host_memory import keep_large_buffers
from internvl_rt.server.body import cut, parse
from internvl_rt.server.media import read_media
from internvl_rt.server.options import ServerOptions
from internvl_rt.server.protocol import ChatRequest, MediaLimits, Part
from internvl_rt.server.remote import Fetcher

FIRST_TOKEN_MS, STREAMS_PERCENT, DATA_URL_MS = 2.0, 15.0, 6.0  # goals: at most
PICTURE_SIDE = 780  # pixels; a file of 1 MB
DATA_URL_BYTES = 4_000_000
AHEAD_S = 0.05  # from the start of a run to the arrival of its requests, so that all are there by then
LOAD = Load(seconds=1.0, drain_s=600.0)
WARM_UP = 3

Side = Callable[[Sequence[Arrival], str], Awaitable[list[Outcome]]]


async def first_token(sides: dict[str, Side], num_samples: int) -> dict[str, float]:
    """Returns the median time to the first token in milliseconds, and as "cost" the median difference of two sides."""
    rng, times = np.random.default_rng(0), {name: list[float]() for name in sides}
    for sample in range(WARM_UP + num_samples):
        arrival = Arrival(AHEAD_S, "what is to be seen here", 1, (0, int(rng.integers(1 << 63))))
        for name, side in sides.items():
            (outcome,) = await side([arrival], f"first token {sample} {name}")
            assert outcome.end == "answered", outcome
            if sample >= WARM_UP:
                times[name].append(1e3 * outcome.ttft_s)
    pairs = zip(times["engine"], times["http"], strict=True)
    return {name: median(each) for name, each in times.items()} | {"cost": median(http - own for own, http in pairs)}


def loopback_ms(num_bytes: int, num_samples: int) -> float:
    """Returns the median time in milliseconds in which so many bytes go over loopback, and one comes back."""
    data, times = bytes(num_bytes), list[float]()

    def answer(listening: socket.socket) -> None:
        taken, _ = listening.accept()
        with taken:
            room = memoryview(bytearray(num_bytes))
            for _ in range(WARM_UP + num_samples):
                left = num_bytes
                while left:
                    left -= taken.recv_into(room[:left])
                taken.send(b"x")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        answering = threading.Thread(target=answer, args=(listening,))
        answering.start()
        with socket.create_connection(listening.getsockname()) as client:
            for _ in range(WARM_UP + num_samples):
                time.sleep(AHEAD_S)
                start_s = time.perf_counter()
                client.sendall(data)
                client.recv(1)
                times.append(1e3 * (time.perf_counter() - start_s))
        answering.join()
    return median(times[WARM_UP:])


async def streams(sides: dict[str, Side], mix: Mix, num_streams: int, num_rounds: int) -> dict[str, float]:
    """Returns the median of the tokens a second of texts that are answered together."""
    texts = Mix(mix.max_characters, mix.max_tokens, ())
    drawn = [Arrival(AHEAD_S, each.question, texts.max_tokens) for each in islice(draw_arrivals(mix, 0), num_streams)]
    rates = {name: list[float]() for name in sides}
    for number in range(1 + num_rounds):  # the first one warms up
        for name, side in sides.items():
            outcomes = await side(drawn, f"streams {number} {name}")
            assert all(outcome.end == "answered" for outcome in outcomes), outcomes
            if number:
                num_tokens = sum(outcome.completion_tokens for outcome in outcomes)
                rates[name].append(num_tokens / max(outcome.total_s for outcome in outcomes))
    return {name: median(each) for name, each in rates.items()}


async def data_url(num_samples: int) -> float:
    """Returns the median time in milliseconds to read a body with a data URL, and to decode and hash its picture."""
    start = "data:image/png;base64,"
    content = os.urandom((DATA_URL_BYTES - len(start)) // 4 * 3)
    url = start + base64.b64encode(content).decode()
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
    body = json.dumps({"messages": messages}).encode()
    options = ServerOptions()
    fetcher = Fetcher((), options.max_remote_bytes, options.remote_timeout_s)
    times, found = [], {}
    for _ in range(WARM_UP + num_samples):
        start_s = time.perf_counter()
        part: Any = parse(cut(body, options.max_text_bytes), ChatRequest).messages[0].content
        assert isinstance(part, list)
        assert isinstance(part[0], Part)
        found = await read_media(part[0], "messages[0].content[0]", fetcher, MediaLimits(), options.max_frames)
        hashlib.sha256(found["image"]).digest()
        times.append(1e3 * (time.perf_counter() - start_s))
    assert found["image"] == content
    return median(times[WARM_UP:])


async def measure(args: argparse.Namespace) -> dict[str, tuple[str, float, float, str]]:
    """Returns for each number what it was made from, its value, its goal and their unit."""
    picture = noise_png(PICTURE_SIDE, PICTURE_SIDE, 1, np.random.default_rng(0))
    mix = Mix(256, 128, (picture,))
    core = Engine.from_pretrained("tiny", device="cpu", max_num_seqs=args.streams, seed=0)
    async with AsyncEngine(core) as engine, open_loopback(core, engine, shared_texts(mix)) as loopback:

        async def in_process(arrivals: Sequence[Arrival], salt: str) -> list[Outcome]:
            return await ask_engine(engine, mix, iter(arrivals), LOAD, salt)

        async def over_http(arrivals: Sequence[Arrival], salt: str) -> list[Outcome]:
            return await loopback.run([request_of(mix, arrival, salt) for arrival in arrivals], LOAD)

        sides: dict[str, Side] = {"engine": in_process, "http": over_http}
        first = await first_token(sides, args.samples)
        rates = await streams(sides, mix, args.streams, args.rounds)
    url_ms = await data_url(args.samples)
    bare_ms = loopback_ms(len(picture.file(0)) * 4 // 3, args.samples)
    return {
        f"first token, picture of {len(picture.file(0)) / 1e6:.2f} MB": (
            f"engine {first['engine']:.2f} ms, http {first['http']:.2f} ms, loopback alone {bare_ms:.2f} ms",
            first["cost"],
            FIRST_TOKEN_MS,
            "ms",
        ),
        f"{args.streams} streams": (
            f"engine {rates['engine']:,.0f} tokens/s, http {rates['http']:,.0f} tokens/s",
            100 * (1 - rates["http"] / rates["engine"]),
            STREAMS_PERCENT,
            "%",
        ),
        f"{DATA_URL_BYTES / 1e6:.0f} MB data URL": ("read, decoded and hashed", url_ms, DATA_URL_MS, "ms"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=count, default=40, help="of each side (default: %(default)s)")
    parser.add_argument("--rounds", type=count, default=4, help="of each side (default: %(default)s)")
    parser.add_argument("--streams", type=count, default=64, help="together (default: %(default)s)")
    args = parser.parse_args()
    keep_large_buffers()  # as `internvl-rt serve` does
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, uvloop {uvloop.__version__}")
    for name, (made_from, value, goal, unit) in uvloop.run(measure(args)).items():
        verdict = "held" if value <= goal else "missed"
        print(f"{name:<34} {made_from:<62} cost {value:6.2f} {unit:<2} goal {goal:4.1f} {unit:<2} {verdict}")
    return 0


if __name__ == "__main__":
    exit_with(main)

"""Two replicas under a real Ray: requests, a replica that is killed, clients that leave, prefixes, a rolling update."""

import asyncio
import base64
import io
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from internvl_rt import Engine, SamplingParams
from support.ray_pool import Pool, running_pool
from support.serving import SAMPLES

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # Ray warns of its own libraries

NUM_REQUESTS = 500
AT_ONCE = 12
NUM_PICTURES = 24
NUM_LONG = 6  # streams that run while a replica is killed
LONG_TOKENS = 1500
OPTIONS: dict[str, Any] = {
    "num_replicas": 2,
    "num_cpus": 0.5,
    "ingress_cpus": 0.5,
    "device": "cpu",
    "dtype": "float32",
    "block_size": 16,
    "max_num_seqs": 16,
    "kv_cache_bytes": 64 << 20,
    "max_body_bytes": 4 << 20,
}
ENGINE = ("device", "dtype", "block_size", "max_num_seqs", "kv_cache_bytes")  # of these, those of the engine


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with running_pool(**OPTIONS) as made:
        yield made


def picture_part(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}}


def noise(number: int) -> dict[str, Any]:
    """Returns a picture of its own for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (168, 224, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return picture_part(file.getvalue())


def asked(*parts: dict[str, Any] | str) -> list[dict[str, Any]]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return [{"role": "user", "content": content}]


SAMPLE = picture_part((SAMPLES / "4719.png").read_bytes())
ENDLESS = {"extra_body": {"ignore_eos": True}}


async def run_one(client: openai.AsyncOpenAI, number: int) -> str:
    """Sends one of a mix of requests; returns what came of it."""
    kind = number % 8
    chat: dict[str, Any] = {"model": "tiny", "messages": asked(f"Say {number}."), "max_tokens": 12}
    if kind in (1, 5):
        chat["messages"] = asked(SAMPLE, f"Read the digits. {number}")
    if kind in (0, 1, 2):
        reply = await client.chat.completions.create(**chat)
        assert reply.usage is not None
        assert reply.choices[0].finish_reason in ("stop", "length")
    elif kind in (4, 5):
        stream = await client.chat.completions.create(**chat, stream=True)
        ends = [chunk.choices[0].finish_reason async for chunk in stream]
        assert ends[-1] in ("stop", "length")
    elif kind == 3:
        assert (await client.completions.create(model="tiny", prompt=f"One, {number}", max_tokens=8)).choices
    elif kind == 6:
        answer = await client.responses.create(model="tiny", input=f"Say {number}.", max_output_tokens=8)
        assert answer.status in ("completed", "incomplete")
    else:
        with pytest.raises(openai.BadRequestError, match="temperature"):
            await client.chat.completions.create(**{**chat, "temperature": 7})
    return "answered"


async def run_long(client: openai.AsyncOpenAI, began: list[str]) -> tuple[str, str]:
    """Reads a long stream; returns its replica, and how it ended."""
    messages = asked(f"{len(began)} is where you begin to count.")  # else the cache of one would attract all of them
    raw = await client.chat.completions.with_raw_response.create(
        model="tiny", messages=messages, max_tokens=LONG_TOKENS, stream=True, **ENDLESS
    )
    replica = raw.headers["x-internvl-rt-replica"]
    began.append(replica)
    reason: str | None = None
    try:
        async for chunk in raw.parse():
            reason = chunk.choices[0].finish_reason
    except openai.APIError as error:
        body: Any = error.body
        return replica, f"{body['type']} {body['code']}"
    return replica, str(reason)


def test_a_replica_is_killed_amid_500_requests_and_only_its_own_streams_end_with_an_error_to_try_again(
    pool: Pool,
) -> None:
    killed, killed_s = list[str](), list[float]()

    async def run() -> tuple[Counter[str], list[tuple[str, str]]]:
        client, places, done = pool.async_client(), asyncio.Semaphore(AT_ONCE), Counter[str]()
        began: list[str] = []

        async def one(number: int) -> None:
            async with places:
                try:
                    done[await run_one(client, number)] += 1
                except openai.APIError as error:
                    done[f"{'stream' if number % 8 in (4, 5) else 'whole'} {error.code}"] += 1

        others = asyncio.create_task(asyncio.wait([asyncio.create_task(one(n)) for n in range(NUM_REQUESTS)]))
        while done.total() < NUM_REQUESTS // 3:
            await asyncio.sleep(0.01)
        streams = list[asyncio.Task[tuple[str, str]]]()
        while len(streams) < NUM_LONG or len(set(began)) < 2:  # until both replicas have some
            streams.append(asyncio.create_task(run_long(client, began)))
            while len(began) < len(streams):
                await asyncio.sleep(0.01)
        killed.append(began[-1])  # whose newest stream is far from its end
        killed_s.append(time.monotonic())
        await asyncio.to_thread(pool.kill, killed[0])
        ended = await asyncio.gather(*streams)
        for task in (await others)[0]:
            task.result()
        await client.close()
        return done, ended

    done, ended = asyncio.run(run())
    (victim,) = killed
    assert {end for replica, end in ended if replica != victim} == {"length"}
    lost = {end for replica, end in ended if replica == victim}
    assert "server_error replica_lost" in lost <= {"server_error replica_lost", "length"}, "some had ended before"
    assert done.total() == NUM_REQUESTS
    assert done["answered"] >= NUM_REQUESTS - AT_ONCE
    assert set(done) <= {"answered", "stream replica_lost"}, "what had not begun was answered by the other one"
    pool.wait_for_replicas(2, without=victim)
    whole_s = time.monotonic() - killed_s[0]
    print(f"{dict(done)}, {dict(Counter(end for _, end in ended))}, whole again {whole_s:.0f} s later")
    pool.wait_until_idle()
    answering, until_s = set[str](), time.monotonic() + 30
    while answering != set(pool.actors()):  # Serve may believe for 10 s that one has something to do
        assert time.monotonic() < until_s, f"only {answering} answer"
        answering.add(pool.http.get("/v1/models").headers["x-internvl-rt-replica"])


def hit_rate(pool: Pool, trace: list[list[dict[str, Any]]]) -> float:
    """Sends prompts one after another; returns the share of those whose picture was in the cache."""
    client, hits = pool.client(), 0
    for messages in trace:
        usage = client.chat.completions.create(model="tiny", messages=messages, max_tokens=1).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        hits += bool(usage.prompt_tokens_details.cached_tokens)
    return hits / len(trace)


def hit_rate_by_turns(trace: list[list[dict[str, Any]]], num_replicas: int) -> float:
    """Answers prompts by engines in this process, one after another; returns the same."""
    engines = [Engine.from_pretrained("tiny", **{name: OPTIONS[name] for name in ENGINE}) for _ in range(num_replicas)]
    params = SamplingParams(max_tokens=1)
    replies = [engines[number % num_replicas].chat(messages, params) for number, messages in enumerate(trace)]
    for engine in engines:
        engine.close()
    return sum(bool(reply.usage.cached_tokens) for reply in replies) / len(trace)


def questions(first: int, *, times: int) -> list[list[dict[str, Any]]]:
    """Asks for each of some pictures, which no other test has, some times in a row."""
    pictures = [noise(first + number) for number in range(NUM_PICTURES)]
    return [asked(picture, f"What is it? {number}") for picture in pictures for number in range(times)]


def test_a_repeated_picture_is_found_twice_as_often_as_by_turns(pool: Pool) -> None:
    trace = questions(0, times=3)
    by_cache, by_turns = hit_rate(pool, trace), hit_rate_by_turns(trace, 2)
    print(f"hit rate: {by_cache:.3f} by cache, {by_turns:.3f} by turns")
    assert by_turns == pytest.approx(1 / 3)
    assert by_cache == pytest.approx(2 / 3), "all but the first question of each picture"


def test_a_new_ingress_learns_what_the_replicas_hold(pool: Pool) -> None:
    assert hit_rate(pool, questions(1000, times=1)) == 0
    pool.kill(next(iter(pool.actors("Ingress"))), "Ingress")
    pool.wait_for_replicas(2)
    assert hit_rate(pool, questions(1000, times=1)) == 1


def test_a_replica_stops_computing_when_its_client_has_left(pool: Pool) -> None:
    pool.wait_until_idle()
    for _ in range(3):
        stream = pool.client().chat.completions.create(
            model="tiny", messages=asked("Count."), max_tokens=20_000, stream=True, **ENDLESS
        )
        next(iter(stream))
        assert sum(stats["running"] for stats in pool.stats().values()) == 1
        stream.close()
        start_s = time.monotonic()
        pool.wait_until_idle()
        assert time.monotonic() - start_s < 5


def test_bodies_beyond_the_limits_are_refused_and_nothing_else_is_hurt(pool: Pool) -> None:
    large = json.dumps({"model": "tiny", "messages": asked("a" * (5 << 20))})
    refused = pool.http.post("/v1/chat/completions", content=large, headers={"content-type": "application/json"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "body_too_large")
    wrong = pool.http.post("/v1/chat/completions", content=b"\xff{", headers={"content-type": "application/json"})
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "invalid_json")
    assert pool.http.get("/nosuch").status_code == 404
    assert pool.http.request("DELETE", "/v1/models").status_code == 405
    for path in ("/health", "/ready", "/version", "/", "/v1/models/tiny"):
        assert pool.http.get(path).status_code == 200, path
    named = pool.http.get("/v1/models", headers={"x-request-id": "mine"})
    assert named.headers.get_list("x-request-id") == ["mine"]


def test_an_update_replaces_all_replicas_and_no_stream_is_lost(pool: Pool) -> None:
    before, ends = set(pool.actors()), Counter[str]()
    updated = threading.Event()

    def stream() -> None:
        client = pool.client()
        while not updated.is_set():
            chunks = client.chat.completions.create(
                model="tiny", messages=asked("Count."), max_tokens=300, stream=True, **ENDLESS
            )
            reason = None
            for chunk in chunks:
                reason = chunk.choices[0].finish_reason
            ends[str(reason)] += 1

    failed: list[BaseException] = []

    def guarded() -> None:
        try:
            stream()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        pool.update(**{**OPTIONS, "max_num_seqs": 12})
    finally:
        updated.set()
        for thread in threads:
            thread.join()
    assert not failed
    assert set(ends) == {"length"}
    pool.wait_for_replicas(2)
    assert not before & set(pool.actors())

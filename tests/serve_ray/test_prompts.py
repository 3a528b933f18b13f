"""An ingress computes, without a model, the digests under which the cache of a real engine stores a prompt."""

import asyncio
import base64
import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from internvl_rt.engine.async_engine import AsyncEngine
from internvl_rt.engine.engine import Engine
from internvl_rt.engine.loading import load_parts
from internvl_rt.engine.options import EngineOptions
from internvl_rt.errors import RequestError
from internvl_rt.serve_ray import prompts
from internvl_rt.serve_ray.prompts import PromptKeys, facts_of
from internvl_rt.server.app import build_app
from internvl_rt.server.body import Body, cut
from internvl_rt.server.keys import Keys
from internvl_rt.server.log import Log
from internvl_rt.server.options import ServerOptions
from internvl_rt.server.service import Service
from support.serving import SAMPLES

HASH_KEY = bytes(range(16))
KEY = "a-key-of-the-tests"
OPTIONS = EngineOptions(device="cpu", dtype="float32", block_size=16, max_num_seqs=4, kv_cache_bytes=32 << 20)
PICTURES = [
    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}}
    for data in ((SAMPLES / name).read_bytes() for name in ("42.png", "4719.png"))
]
VIDEO = {"type": "video_url", "video_url": PICTURES[0]["image_url"]}
LONG = "What is written there? " * 20


class Asked:
    """An engine with its server's application, and the keys of an ingress, which share nothing but the facts."""

    def __init__(self) -> None:
        self.engine = Engine(*load_parts("tiny", OPTIONS, hash_key=HASH_KEY), OPTIONS)
        server = ServerOptions()
        self.service = Service(self.engine, AsyncEngine(self.engine), ("tiny",), server, Keys((KEY,)), Log())
        self.facts = facts_of(self.engine, HASH_KEY)
        self.keys = PromptKeys("tiny", OPTIONS, server, self.facts, HASH_KEY)

    def digests(self, path: str, body: object, tenant: str | None = None) -> list[bytes]:
        async def compute() -> list[bytes]:
            sent = cut(json.dumps(body).encode(), 1 << 20)
            return await self.keys.digests(
                path, sent, lambda given: given if tenant is None else f"{tenant} {given or ''}"
            )

        return asyncio.run(compute())

    def stored_by(self, path: str, body: object) -> list[bytes]:
        """Sends a request, and returns the digests of what the cache has stored meanwhile."""
        self.engine.cache.drain_events()

        async def send() -> httpx2.Response:
            transport = httpx2.ASGITransport(build_app(self.service))
            async with httpx2.AsyncClient(transport=transport, base_url="http://here") as client:
                return await client.post(path, json=body, headers={"authorization": f"Bearer {KEY}"}, timeout=60)

        assert asyncio.run(send()).status_code == 200
        return [digest for kind, digest in self.engine.cache.drain_events() if kind == "stored"]


@pytest.fixture(scope="module")
def asked() -> Iterator[Asked]:
    made = Asked()
    yield made
    made.keys.close()
    asyncio.run(made.service.engine.close())


def user(*parts: object) -> list[dict[str, object]]:
    return [{"role": "user", "content": [*parts]}]


def text(of: str) -> dict[str, str]:
    return {"type": "text", "text": of}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "text": ("/v1/chat/completions", {"messages": user(text(LONG))}),
    "a picture": ("/v1/chat/completions", {"messages": user(PICTURES[0], text(LONG))}),
    "two pictures": ("/v1/chat/completions", {"messages": user(*PICTURES, text(LONG + "2"))}),
    "one tile": ("/v1/chat/completions", {"messages": user({**PICTURES[0], "max_tiles": 1}, text(LONG))}),
    "salt": ("/v1/chat/completions", {"messages": user(text(LONG)), "cache_salt": "somebody"}),
    "a turn": (
        "/v1/chat/completions",
        {"messages": [*user(text(LONG)), {"role": "assistant", "content": "8"}, *user(text("And now?"))]},
    ),
    "delta": ("/v1/chat/completions", {"messages": user(PICTURES[0], text(LONG)), "v2pe_delta": 0.25}),
    "tools": (
        "/v1/chat/completions",
        {"messages": user(text(LONG)), "tools": [{"type": "function", "function": {"name": "look"}}]},
    ),
    "completions": ("/v1/completions", {"prompt": LONG}),
    "ids": ("/v1/completions", {"prompt": list(range(10, 90))}),
    "responses": ("/v1/responses", {"input": LONG + "a response", "instructions": "Be short."}),
    "decisions": (
        "/v1/decisions",
        {"input": LONG + "a decision", "questions": [{"type": "predicate", "instructions": "It is a question."}]},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_digests_are_those_that_the_cache_stores(asked: Asked, case: str) -> None:
    path, body = CASES[case]
    body = {**body, "cache_salt": f"{case} {body.get('cache_salt', '')}"}  # so that no other case has stored anything
    tenant = asked.service.keys.tenant(KEY)
    expected = asked.digests(path, body, tenant)
    stored = asked.stored_by(path, {**body, **({} if path == "/v1/decisions" else _short(path))})
    assert len(expected) >= 3
    if path == "/v1/decisions":
        del expected[-1]  # in the cache a question follows the input
    assert stored[: len(expected)] == expected, "an answer may follow"
    assert asked.digests(path, body, "somebody else") != expected
    assert asked.digests(path, body) != expected


def _short(path: str) -> dict[str, int]:
    return {"max_output_tokens" if path == "/v1/responses" else "max_tokens": 2}


def test_a_prompt_that_continues_another_begins_with_its_digests(asked: Asked) -> None:
    one = asked.digests("/v1/chat/completions", {"messages": user(PICTURES[0], text(LONG))})
    other = asked.digests("/v1/chat/completions", {"messages": user(PICTURES[0], text(LONG + LONG))})
    another = asked.digests("/v1/chat/completions", {"messages": user(PICTURES[1], text(LONG + LONG))})
    num_common = sum(mine == its for mine, its in zip(one, other, strict=False))
    assert num_common >= len(one) - 1 > 1
    assert sum(mine == its for mine, its in zip(other, another, strict=False)) < num_common


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": "no list"}),
        ("/v1/chat/completions", {"messages": []}),
        ("/v1/chat/completions", {"messages": user({"type": "image_url", "image_url": {"url": "https://a.example/"}})}),
        ("/v1/chat/completions", {"messages": user({"type": "image_url", "image_url": {"url": "data:,no picture"}})}),
        ("/v1/chat/completions", {"messages": user(VIDEO)}),
        ("/v1/chat/completions", {"messages": user(text("word " * 100_000))}),
        ("/v1/completions", {"prompt": []}),
        ("/tokenize", {"prompt": LONG}),
    ],
)
def test_what_cannot_be_prepared_has_no_digests(asked: Asked, path: str, body: object) -> None:
    assert asked.digests(path, body) == []


def test_many_prompts_at_once_are_routed_without_digests(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "MAX_WAITING", 3)
    body = cut(json.dumps({"prompt": LONG}).encode(), 1 << 20)

    async def compute(sent: Body) -> list[list[bytes]]:
        return await asyncio.gather(*(asked.keys.digests("/v1/completions", sent, lambda _: None) for _ in range(8)))

    found = asyncio.run(compute(body))
    assert sum(map(bool, found)) == 3
    assert asked.digests("/v1/completions", {"prompt": LONG}), "nothing is left of them"


def test_another_version_of_the_model_is_refused(asked: Asked) -> None:
    facts = {**asked.facts, "made_for": "another"}
    with pytest.raises(RequestError, match="different versions of the model"):
        PromptKeys("tiny", OPTIONS, ServerOptions(), facts, HASH_KEY)
    with pytest.raises(RequestError, match="give a checkpoint"):
        PromptKeys("random:InternVL3-1B", OPTIONS, ServerOptions(), asked.facts, HASH_KEY)

"""A server of an InternVL3.5-Flash: usage and metrics say how many visual tokens compressed tiles save."""

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from internvl_rt.engine.engine import Engine
from internvl_rt.engine.loading import load_parts
from internvl_rt.engine.options import EngineOptions
from internvl_rt.serve_ray.prompts import PromptKeys, facts_of
from internvl_rt.server.body import cut
from internvl_rt.server.options import ServerOptions
from support.official_flash import write_flash
from support.serving import KEY, Running, running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flash(tmp_path_factory.mktemp("flash") / "v2")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    with running(model=str(folder), device="cpu", backend="torch") as made:
        yield made


def picture() -> dict[str, Any]:
    noise = np.random.default_rng(0).integers(0, 256, (14, 21, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"},
    }


def question() -> list[dict[str, Any]]:
    return [{"role": "user", "content": [picture(), {"type": "text", "text": "Read it. " * 20}]}]


def metric(server: Running, name: str) -> float:
    families = text_string_to_metric_families(server.service.metrics.render().decode())
    return next(one.value for family in families for one in family.samples if one.name == f"internvl_rt:{name}")


def test_usage_and_metrics_say_what_is_saved(server: Running) -> None:
    body = {"messages": question(), "max_tokens": 4}
    before = metric(server, "image_tokens_saved_total")
    usage = server.post("/v1/chat/completions", body).json()["usage"]
    details = usage["prompt_tokens_details"]
    assert details["saved_image_tokens"] > 0
    assert details["image_tokens"] + details["saved_image_tokens"] == 7 * 4
    assert metric(server, "image_tokens_saved_total") == before + details["saved_image_tokens"]
    counted = server.post("/tokenize", {"messages": question()}).json()
    assert counted["count"] == usage["prompt_tokens"]
    assert [one["tokens"] for one in counted["pictures"]] == [details["image_tokens"]]
    text = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    details = server.post("/v1/chat/completions", text).json()["usage"]["prompt_tokens_details"]
    assert (details["image_tokens"], details["saved_image_tokens"]) == (0, 0)


def test_a_tenant_learns_nothing_of_what_others_have_counted(folder: Path) -> None:
    with running(model=str(folder), device="cpu", backend="torch", keys=(KEY,)) as server:
        asked = server.post("/tokenize", {"messages": question()}, headers={"authorization": f"Bearer {KEY}"})
        assert asked.json()["count"] > 0
        known = server.service.core.preparer._decide.__self__._known
        assert [salt is None for _, salt in known] == [False]


def test_an_ingress_without_the_model_knows_no_prefix_of_pictures(folder: Path) -> None:
    """What a prompt becomes depends on the vision tower, which an ingress has not."""
    key, options = bytes(16), EngineOptions(device="cpu", dtype="float32", block_size=16, kv_cache_bytes=16 << 20)
    with Engine(*load_parts(str(folder), options, hash_key=key), options) as engine:
        keys = PromptKeys(str(folder), options, ServerOptions(), facts_of(engine, key), key)
    text = {"messages": [{"role": "user", "content": "Read it. " * 20}]}
    found = [
        asyncio.run(keys.digests("/v1/chat/completions", cut(json.dumps(body).encode(), 1 << 20), lambda given: given))
        for body in (text, {"messages": question()})
    ]
    keys.close()
    assert len(found[0]) > 2
    assert found[1] == []

"""Requests that are made to cost much are answered at once: while one is read, no other request goes on."""

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from internvl_rt.server.answer import logprobs_of
from internvl_rt.server.body import MAX_VALUES
from internvl_rt.server.options import ServerOptions
from internvl_rt.server.protocol import encode
from internvl_rt.steps.logprobs import TokenLogprob
from support.serving import Running, running

CHAT = "/v1/chat/completions"
ASKED = b'{"max_tokens": 2, "messages": [{"role": "user", "content": "Hello"}], '
CALL = {"type": "function_call", "name": "f", "arguments": ""}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(ServerOptions(port=0, max_text_bytes=64 << 20)) as made:
        yield made


@pytest.mark.parametrize(
    "body",
    [
        ASKED + b'"metadata": {"a": [' + b"[]," * 10_000_000 + b"[]]}}",
        ASKED + b'"metadata": {"a": [' + (b"[" * 400 + b"]" * 400 + b",") * 30_000 + b"0]}}",
        b'{"messages": [{"role": "user", "content": [' + b'"",' * 10_000_000 + b'""]}]}',
        ASKED + b'"tools": [' + b'{"type": "function"},' * 1_000_000 + b"{}]}",
        json.dumps({"messages": [{"role": "user", "content": "x"}], "stop": "[],{" * MAX_VALUES}).encode(),
    ],
    ids=["lists", "deep lists", "parts", "tools", "text"],
)
def test_a_body_with_too_many_values_is_refused_before_it_is_read(server: Running, body: bytes) -> None:
    start_s = time.perf_counter()
    answer = server.http.post(CHAT, content=body)
    assert time.perf_counter() - start_s < 1.5
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


def test_a_body_with_as_many_values_as_are_taken_is_read(server: Running) -> None:
    body = ASKED + b'"metadata": {"a": [' + b"1," * (MAX_VALUES - 100) + b"1]}}"
    assert server.http.post(CHAT, content=body).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "code"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "x"}, *[{"role": "tool", "content": "x" * 20_000}] * 2000]},
         "context_length_exceeded"),
        ("/v1/responses", {"input": [CALL] * 50_000}, "invalid_value"),
        ("/v1/responses", {"input": [{"type": "function_call_output", "output": [
            *[{"type": "input_image", "image_url": "x"}] * 20_000, *[{"type": "input_text", "text": "x"}] * 20_000,
        ]}]}, "limit_exceeded"),
    ],
    ids=["results", "calls", "parts of a result"],
)  # fmt: skip
def test_what_is_put_together_takes_a_time_that_grows_with_its_size(
    server: Running, path: str, body: Any, code: str
) -> None:
    content = json.dumps(body).encode()
    start_s = time.perf_counter()
    answer = server.http.post(path, content=content)
    assert time.perf_counter() - start_s < 2.5
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)


def test_results_and_calls_in_a_row_are_put_together(server: Running) -> None:
    def result(text: str) -> dict[str, Any]:
        return {"type": "function_call_output", "call_id": "c", "output": text}

    call = {"function": {"name": "f", "arguments": "{}"}}
    user, text = {"role": "user", "content": "x"}, [{"role": "tool", "content": each} for each in "ab"]
    messages = [user, {"role": "assistant", "tool_calls": [call, call]}, *text, user, text[0]]
    chat = server.post("/tokenize", {"messages": messages}).json()
    shown = server.post("/detokenize", {"tokens": chat["tokens"]}).json()["prompt"]
    assert shown.count("<tool_call>") == 2
    assert "a\n</tool_response>\n<tool_response>\nb\n</tool_response><|im_end|>" in shown
    items = [user, CALL, CALL, result("a"), result("b"), user, result("a")]
    answer = server.post("/v1/responses", {"input": items, "max_output_tokens": 1}).json()
    assert answer["usage"]["input_tokens"] == chat["count"]


def test_many_logprobs_are_written_at_once(server: Running) -> None:
    """As an answer of 16 times 1,250 tokens with 20 others each has them."""
    top = tuple((token_id, -float(token_id)) for token_id in range(20, 40))
    tokens = [TokenLogprob(number % 300, -1.5, top) for number in range(20_000)]
    start_s = time.perf_counter()
    written = encode(logprobs_of(tokens, server.service.core.tokenizer, lambda token_id: True))
    assert time.perf_counter() - start_s < 1.5
    first = json.loads(written)[30]
    assert set(first) == {"token", "logprob", "bytes", "top_logprobs"}
    assert first["top_logprobs"][10] == {key: first[key] for key in ("token", "bytes")} | {"logprob": -30.0}

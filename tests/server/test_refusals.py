"""What is wrong in a request is said at once, in OpenAI's form, with its place; nothing else is disturbed."""

from collections.abc import Iterator
from typing import Any

import pytest

from internvl_rt.server.options import ServerOptions
from support.serving import Running, picture_url, question, running

Json = dict[str, Any]
CHAT = "/v1/chat/completions"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    options = ServerOptions(
        port=0, max_media=2, max_messages=5, max_n=4, max_stops=4, max_request_tokens=2000, max_tools=2
    )
    with running(options, max_model_len=2048) as made:
        yield made


def parts(*given: object) -> Json:
    return {"messages": [{"role": "user", "content": list(given)}]}


def asked(**more: object) -> Json:
    return {"messages": question(), "max_tokens": 4, **more}


def image(url: object, **more: object) -> Json:
    return {"type": "image_url", "image_url": {"url": url, **more}}


HERE = "messages[0].content[0]"
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", "properties": {"a": {}}}}}

REFUSED: dict[str, tuple[Json, str, str]] = {
    "no messages": ({}, "messages", "limit_exceeded"),
    "too many messages": ({"messages": question() * 6}, "messages", "limit_exceeded"),
    "a role that does not exist": (
        {"messages": [{"role": "function", "content": ""}]},
        "messages[0].role",
        "invalid_value",
    ),
    "a content of another type": (
        {"messages": [{"role": "user", "content": 5}]},
        "messages[0].content",
        "invalid_type",
    ),
    "a user without content": (
        {"messages": [{"role": "user", "content": None}]},
        "messages[0].content",
        "invalid_type",
    ),
    "a conversation without a question": (
        {"messages": [{"role": "system", "content": "x"}]},
        "messages",
        "invalid_value",
    ),
    "audio": (
        parts({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}),
        HERE,
        "unsupported_content_part",
    ),
    "a file": (parts({"type": "file", "file": {"file_id": "x"}}), HERE, "unsupported_content_part"),
    "an unknown part": (parts({"type": "hologram"}), HERE, "unsupported_content_part"),
    "a part without a type": (parts({"text": "x"}), HERE, "invalid_type"),
    "a text part without text": (parts({"type": "text"}), f"{HERE}.text", "invalid_type"),
    "a picture in a system message": (
        {"messages": [{"role": "system", "content": [image(picture_url())]}, *question()]},
        HERE,
        "unsupported_content_part",
    ),
    "a picture's url of another type": (parts(image(5)), f"{HERE}.image_url", "invalid_type"),
    "no picture's url": (parts({"type": "image_url"}), f"{HERE}.image_url", "invalid_type"),
    "an empty url": (parts(image("")), f"{HERE}.image_url", "media_not_allowed"),
    "a path": (parts(image("/etc/passwd")), f"{HERE}.image_url", "media_not_allowed"),
    "a file url": (parts(image("file:///etc/passwd")), f"{HERE}.image_url", "media_not_allowed"),
    "a remote url": (parts(image("https://example.com/a.png")), f"{HERE}.image_url", "media_not_allowed"),
    "a data url that is not base64": (parts(image("data:image/png,abc")), f"{HERE}.image_url", "invalid_media"),
    "a data url with a wrong letter": (
        parts(image("data:image/png;base64,ab!d")),
        f"{HERE}.image_url",
        "invalid_media",
    ),
    "an empty picture": (parts(image("data:image/png;base64,")), f"{HERE}.image_url", "invalid_media"),
    "no picture": (parts(image("data:image/png;base64,aGVsbG8=")), f"{HERE}.image_url", "invalid_media"),
    "a broken second picture": (
        parts(image(picture_url()), image("data:image/png;base64,aGVsbG8=")),
        "messages[0].content[1].image_url",
        "invalid_media",
    ),
    "a video that is none": (
        parts({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,aGVsbG8="}}),
        f"{HERE}.video_url",
        "invalid_media",
    ),
    "too many frames": (
        parts({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,aGVsbG8=", "num_frames": 10_000}}),
        f"{HERE}.video_url",
        "limit_exceeded",
    ),
    "too many pictures": (parts(*[image(picture_url())] * 3), "messages[0].content", "limit_exceeded"),
    "tiles beyond the model's": (parts(image(picture_url(), max_tiles=999)), f"{HERE}.image_url", "invalid_request"),
    "a prompt that is too long": (asked(messages=question("1 2 " * 2000)), "messages", "context_length_exceeded"),
    "another model": (asked(model="gpt-6"), "model", "model_not_found"),
    "too many answers": (asked(n=5), "n", "limit_exceeded"),
    "no answer": (asked(n=0), "n", "limit_exceeded"),
    "too many tokens together": (asked(n=4, max_tokens=1000), "max_tokens", "limit_exceeded"),
    "no tokens": (asked(max_tokens=0), "max_tokens", "limit_exceeded"),
    "a number as text": (asked(max_tokens="4"), "max_tokens", "invalid_type"),
    "a temperature beyond 2": (asked(temperature=2.5), "temperature", "invalid_value"),
    "a negative temperature": (asked(temperature=-0.1), "temperature", "invalid_value"),
    "top_p of 0": (asked(top_p=0), "top_p", "invalid_request"),
    "a penalty beyond 2": (asked(presence_penalty=3), "presence_penalty", "invalid_value"),
    "too many stops": (asked(stop=["a"] * 5), "stop", "limit_exceeded"),
    "an empty stop": (asked(stop=[""]), "stop", "invalid_request"),
    "top_logprobs without logprobs": (asked(top_logprobs=2), "top_logprobs", "invalid_value"),
    "too many top_logprobs": (asked(logprobs=True, top_logprobs=21), "top_logprobs", "limit_exceeded"),
    "a bias of an unknown token": (asked(logit_bias={"99999999": 1}), "logit_bias", "invalid_request"),
    "a bias of no token": (asked(logit_bias={"cat": 1}), "logit_bias", "invalid_request"),
    "a bias that is too large": (asked(logit_bias={"5": 101}), "logit_bias", "invalid_request"),
    "too many biases": (asked(logit_bias={str(i): 1 for i in range(301)}), "logit_bias", "limit_exceeded"),
    "a seed that is too large": (asked(seed=2**70), "seed", "invalid_request"),
    "a format that does not exist": (
        asked(response_format={"type": "xml"}),
        "response_format.type",
        "unsupported_parameter",
    ),
    "a schema without a schema": (
        asked(response_format={"type": "json_schema", "json_schema": {"name": "x"}}),
        "response_format.json_schema.schema",
        "invalid_value",
    ),
    "a schema that is none": (
        asked(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "cat"}}}),
        "response_format",
        "invalid_request",
    ),
    "a tool that is no function": (asked(tools=[{"type": "web_search"}]), "tools[0].type", "unsupported_parameter"),
    "a tool without a name": (
        asked(tools=[{"type": "function", "function": {"name": ""}}]),
        "tools[0].function.name",
        "invalid_value",
    ),
    "too many tools": (
        asked(tools=[{**TOOL, "function": {"name": f"f{i}"}} for i in range(3)]),
        "tools",
        "limit_exceeded",
    ),
    "a tool twice": (asked(tools=[TOOL, TOOL]), "tools", "invalid_value"),
    "a choice of no tool": (asked(tools=[TOOL], tool_choice="always"), "tool_choice", "invalid_value"),
    "a choice of an unknown tool": (
        asked(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "g"}}),
        "tool_choice",
        "invalid_value",
    ),
    "a required call without tools": (asked(tool_choice="required"), "tool_choice", "invalid_value"),
    "a required call and a schema": (
        asked(tools=[TOOL], tool_choice="required", response_format=SCHEMA),
        "response_format",
        "invalid_value",
    ),
    "functions": (asked(functions=[{"name": "f"}]), "functions", "unsupported_parameter"),
    "audio as output": (asked(modalities=["audio"]), "modalities", "unsupported_parameter"),
    "an effort that does not exist": (asked(reasoning_effort="huge"), "reasoning_effort", "invalid_value"),
    "a structured output of no kind": (
        asked(structured_outputs={"grammar": "x"}),
        "structured_outputs",
        "unsupported_parameter",
    ),
    "a structured output and tools": (
        asked(structured_outputs={"regex": "x"}, tools=[TOOL]),
        "structured_outputs",
        "invalid_value",
    ),
    "tools of too many bytes": (
        asked(tools=[{"type": "function", "function": {"name": "f", "description": "x" * 70_000}}]),
        "tools",
        "limit_exceeded",
    ),
    "a salt that is too long": (asked(cache_salt="x" * 129), "cache_salt", "limit_exceeded"),
    "a time limit beyond the server's": (asked(timeout_s=1e6), "timeout_s", "limit_exceeded"),
    "arguments of a call that are no JSON": (
        {
            "messages": [
                *question(),
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
                {"role": "tool", "content": "x"},
            ]
        },
        "messages[1].tool_calls[0].function.arguments",
        "invalid_value",
    ),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_request_is_refused_with_its_place(server: Running, case: str, stream: bool) -> None:
    body, param, code = REFUSED[case]
    status = 404 if code == "model_not_found" else 400
    answer = server.post(CHAT, {**body, "stream": stream})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (status, param, code), error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] in ("invalid_request_error", "not_found_error")
    assert answer.headers["content-type"] == "application/json"
    server.wait_until_idle()


@pytest.mark.parametrize(
    "body",
    [b"", b"null", b"[]", b"{", b"\xff\xfe", b'{"messages": ' + b"[" * 100_000, b'{"a": 1} trailing', b"x" * 1000],
    ids=["empty", "null", "list", "cut", "no UTF-8", "deep", "trailing", "text"],
)
def test_a_body_that_is_no_json_object_is_refused(server: Running, body: bytes) -> None:
    answer = server.http.post(CHAT, content=body)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["code"] in ("invalid_json", "invalid_type")
    assert server.service.core.stats()["running"] == 0


def test_a_refusal_shows_nothing_of_the_machine(server: Running) -> None:
    for body, *_ in REFUSED.values():
        text = server.post(CHAT, body).text
        assert "Traceback" not in text
        assert " at 0x" not in text
        assert "/site-packages" not in text
        assert "internvl_rt/" not in text


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
        ("POST", "/terminate", 404, "not_found"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
        ("GET", "/../etc/passwd", 404, "not_found"),
    ],
)
def test_a_path_that_is_not_served_has_an_error_object(
    server: Running, method: str, path: str, status: int, code: str
) -> None:
    answer = server.http.request(method, path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_others_are_served_while_requests_are_refused(server: Running) -> None:
    for body, *_ in REFUSED.values():
        server.post(CHAT, body)
    assert server.post(CHAT, asked(max_tokens=8)).json()["choices"][0]["message"]["content"] == "4719"

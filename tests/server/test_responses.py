"""`/v1/responses` as OpenAI's own client, whose stream helper is strict, uses it."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest

from internvl_rt.server.options import ServerOptions
from support.serving import Running, picture_url, running


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(ServerOptions(port=0, default_max_tokens=64)) as made:
        yield made


class Digits(pydantic.BaseModel):
    digits: list[int]


TOOL: dict[str, Any] = {
    "type": "function",
    "name": "add",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    },
    "strict": True,
}


def asked(text: str = "Read the digits.") -> list[dict[str, Any]]:
    picture = {"type": "input_image", "image_url": picture_url(), "detail": "auto"}
    return [{"role": "user", "content": [picture, {"type": "input_text", "text": text}]}]


def test_an_answer_has_every_key_that_clients_read(server: Running) -> None:
    answer = server.client().responses.create(model="tiny", input=asked(), instructions="", metadata={"a": "b"})
    assert (answer.output_text, answer.status, answer.object) == ("4719", "completed", "response")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.input_tokens + 5
    body = server.post("/v1/responses", {"input": "Hello.", "max_output_tokens": 1}).json()
    required = "id object created_at status error incomplete_details instructions model tools output "
    required += "parallel_tool_calls metadata tool_choice temperature top_p usage"
    assert set(required.split()) <= set(body)
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})


def test_the_stream_helper_reads_every_event(server: Running) -> None:
    with server.client().responses.stream(model="tiny", input=asked()) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == "4719"
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    assert kinds.count("response.output_text.delta") == 4


def test_events_are_numbered_and_named(server: Running) -> None:
    answer = server.post("/v1/responses", {"input": asked(), "stream": True})
    blocks = answer.text.strip().split("\n\n")
    assert blocks.pop() == "data: [DONE]"
    events = []
    for block in blocks:
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))


def test_a_required_call_is_an_item_of_its_own(server: Running) -> None:
    asked_tool = {
        "model": "tiny",
        "input": asked(),
        "tools": [TOOL],
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }
    whole = server.client().responses.create(**asked_tool)
    assert [item.type for item in whole.output] == ["function_call"]
    assert json.loads(whole.output[0].arguments)["a"] in (True, False)
    with server.client().responses.stream(**asked_tool) as stream:
        kinds = {event.type for event in stream}
        assert stream.get_final_response().output[0].arguments == whole.output[0].arguments
    assert {"response.function_call_arguments.delta", "response.function_call_arguments.done"} <= kinds


def test_a_schema_is_kept_and_parsed(server: Running) -> None:
    parsed = server.client().responses.parse(model="tiny", input=asked(), text_format=Digits)
    assert parsed.output_parsed is None or isinstance(parsed.output_parsed, Digits)
    assert parsed.status in ("completed", "incomplete")


def test_calls_and_their_outputs_are_written_as_in_a_chat(server: Running) -> None:
    given = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": "Add."},
        {"type": "reasoning", "summary": [], "id": "rs_1"},
        {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a": 1}'},
        {"type": "function_call", "call_id": "c2", "name": "add", "arguments": '{"a": 2}'},
        {"type": "function_call_output", "call_id": "c1", "output": "2"},
        {
            "type": "function_call_output",
            "call_id": "c2",
            "output": [{"type": "input_text", "text": "see"}, {"type": "input_image", "image_url": picture_url()}],
        },
    ]
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}},
        {"id": "c2", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}},
    ]
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
        {"role": "tool", "tool_call_id": "c2", "content": "see"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": picture_url()}}]},
    ]
    client = server.client()
    ours = client.responses.create(model="tiny", input=given, max_output_tokens=4)
    theirs = client.chat.completions.create(model="tiny", messages=chat, max_tokens=4)
    assert ours.usage is not None
    assert theirs.usage is not None
    assert ours.usage.input_tokens == theirs.usage.prompt_tokens
    assert ours.output_text == theirs.choices[0].message.content


def test_what_agents_send_besides_is_taken(server: Running) -> None:
    """The fields of Codex, its tools that are no functions, and its probe with an empty input."""
    body = {
        "input": [],
        "instructions": "You are an agent.",
        "max_output_tokens": 1,
        "client_metadata": {"x": "y"},
        "include": ["reasoning.encrypted_content"],
        "parallel_tool_calls": True,
        "prompt_cache_key": "k",
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "tool_choice": "auto",
        "tools": [{"type": "web_search"}, {"type": "namespace", "name": "n"}, TOOL],
        "truncation": "auto",
    }
    answer = server.post("/v1/responses", body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["store"] is False


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": "a", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "a", "background": True}, "background"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "input[0].content[0]"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "file:///x"}]}]},
            "input[0].content[0].image_url",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:;base64,aGVsbG8="}]}]},
            "input[0].content[0].image_url",
        ),
        ({"input": "a", "text": {"format": {"type": "xml"}}}, "response_format.type"),
    ],
)
def test_a_wrong_request_is_refused_with_its_place(server: Running, body: dict[str, Any], param: str) -> None:
    for stream in (False, True):
        answer = server.post("/v1/responses", {**body, "stream": stream})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    with pytest.raises(openai.BadRequestError):
        server.client().responses.create(model="tiny", **body)

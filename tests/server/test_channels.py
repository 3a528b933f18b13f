"""A server of a GPT-OSS: contents are the final channel's, an analysis is reasoning, and headers are in neither."""

import json
from pathlib import Path

import pytest

from support.harmony import ANALYSIS, FINAL, NEXT, write_small
from support.scripted_tokens import script_tokens
from support.serving import Running, running

ASKED = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 100}
THOUGHT = f"{ANALYSIS}So.\n{NEXT}{FINAL}It is<|return|>"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    folder: Path = write_small(tmp_path_factory.mktemp("harmony") / "model")
    with running(model=str(folder), device="cpu") as made:
        yield made


@pytest.fixture
def script(server: Running, monkeypatch: pytest.MonkeyPatch):
    return lambda *texts: script_tokens(monkeypatch, server.service.core.tokenizer, *texts)


def events(text: str):
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


def test_a_chat_has_content_reasoning_and_the_count_of_its_tokens(server, script):
    script(THOUGHT, f"{FINAL}x<|end|>")
    answer = server.post("/v1/chat/completions", ASKED | {"n": 2, "temperature": 1}).json()
    first, second = (choice["message"] for choice in answer["choices"])
    assert (first["content"], first["reasoning"], first["reasoning_content"]) == ("It is", "So.", "So.")
    assert second["content"] == "x"
    assert "reasoning" not in second
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop", "stop"]
    details = answer["usage"]["completion_tokens_details"]
    assert details["reasoning_tokens"] == len("So.\n") + 1, "and what ends it"
    assert answer["usage"]["completion_tokens"] == len("analysisSo.\nassistantfinalIt is" + "finalx") + 7 + 3


def test_a_stream_has_the_same_in_pieces(server, script):
    script(THOUGHT)
    asked = ASKED | {"stream": True, "logprobs": True, "stream_options": {"include_usage": True}}
    *chunks, last = events(server.post("/v1/chat/completions", asked).text)
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    order = [key for delta in deltas for key in ("reasoning", "content") if delta.get(key)]
    assert order == ["reasoning"] * 3 + ["content"] * 4
    assert "".join(delta.get("reasoning", "") for delta in deltas) == "So."
    assert "".join(delta.get("content") or "" for delta in deltas) == "It is"
    found = [choice["logprobs"] for chunk in chunks for choice in chunk["choices"] if choice["logprobs"]]
    assert "".join(token["token"] for each in found for token in each["content"]) == "So.\nIt is"
    assert last["usage"]["completion_tokens_details"]["reasoning_tokens"] == 5
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_log_probabilities_are_of_what_is_read_and_stop_strings_act_behind_headers(server, script):
    script(f"{FINAL}one, two<|return|>")
    asked = ASKED | {"logprobs": True, "stop": [",", "final"]}
    (choice,) = server.post("/v1/chat/completions", asked).json()["choices"]
    assert choice["message"]["content"] == "one"
    assert [token["token"] for token in choice["logprobs"]["content"]] == ["o", "n", "e", ","]
    (choice,) = server.post("/v1/chat/completions", asked | {"max_tokens": 4}).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"], choice["logprobs"]["content"]) == ("", "length", [])
    whole = server.post("/v1/chat/completions", asked | {"stop": None, "skip_special_tokens": False}).json()
    assert whole["choices"][0]["message"]["content"] == f"{FINAL}one, two"


def test_responses_have_an_item_of_reasoning_before_the_message(server, script):
    script(THOUGHT)
    asked = {"input": "Hi", "max_output_tokens": 100}
    answer = server.post("/v1/responses", asked).json()
    reasoning, message = answer["output"]
    assert (reasoning["type"], reasoning["content"][0]["text"]) == ("reasoning", "So.")
    assert (message["type"], message["content"][0]["text"]) == ("message", "It is")
    assert answer["usage"]["output_tokens_details"]["reasoning_tokens"] == 5
    script(THOUGHT)
    streamed = events(server.post("/v1/responses", asked | {"stream": True}).text)
    kinds = [event["type"] for event in streamed]
    assert kinds.index("response.reasoning_text.done") < kinds.index("response.output_text.delta")
    assert [item["type"] for item in streamed[-1]["response"]["output"]] == ["reasoning", "message"]


def test_a_completion_of_a_rendered_prompt_is_the_final_text(server, script):
    script(f"{FINAL}It is<|return|>")
    prompt = "<|start|>user<|message|>Hi<|end|><|start|>assistant"
    answer = server.post("/v1/completions", {"prompt": prompt, "max_tokens": 100}).json()
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("It is", "stop")
    script("plain<|return|>")
    streamed = events(server.post("/v1/completions", {"prompt": "Hi", "max_tokens": 100, "stream": True}).text)
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == "plain"


def test_what_a_client_sends_back_is_rendered_with_its_header(server):
    messages = [*ASKED["messages"], {"role": "assistant", "content": "yo <|end|>"}, *ASKED["messages"]]
    counted = server.post("/tokenize", {"messages": messages, "return_token_strs": True}).json()
    text = "".join(counted["token_strs"])
    rest = f"<|start|>user<|message|>Hi<|end|><|start|>assistant{FINAL}yo <|end|><|end|>"
    assert text.endswith(f"{rest}<|start|>user<|message|>Hi<|end|><|start|>assistant")
    assert counted["tokens"].count(server.service.core.tokenizer.token_id("<|end|>")) == 4


def test_formats_tools_and_decisions_hold_behind_the_header(server):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "boolean"}}}
    answer = server.post("/v1/chat/completions", ASKED | {"response_format": form}).json()
    assert json.loads(answer["choices"][0]["message"]["content"]) in (True, False)
    function = {"name": "add", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}
    tools = {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
    (choice,) = server.post("/v1/chat/completions", ASKED | tools).json()["choices"]
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "add"
    asked = {"input": "It rains.", "questions": [{"type": "predicate", "name": "wet", "instructions": "Wet?"}]}
    (found,) = server.post("/v1/decisions", asked).json()["answers"]
    assert 0 < found["probability"] < 1
    assert server.http.get("/v1/models").json()["data"][0]["thinking"] is False
    assert server.post("/v1/chat/completions", ASKED | {"reasoning_effort": "high", "max_tokens": 1}).status_code == 200

"""Calls of tools and reasoning: what the model is shown, what it is made to write, and how clients get it."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from internvl_rt.inputs import thinking
from internvl_rt.server.options import ServerOptions
from support.serving import Running, question, running, scripted

CHAT = "/v1/chat/completions"
ADD: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "boolean"}},
            "required": ["a"],
            "additionalProperties": False,
        },
    },
}
STRICT = {"type": "function", "function": {**ADD["function"], "strict": True}}
OTHER = {"type": "function", "function": {"name": "other"}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": true}}\n</tool_call>'


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(ServerOptions(port=0, default_max_tokens=100)) as made:
        yield made


@pytest.fixture
def thinker(server: Running) -> Iterator[Running]:
    """A server whose model counts as one that was trained to reason."""
    asking = server.service.asking
    before = asking.config
    asking.config = replace(before, can_think=True)
    yield server
    asking.config = before


def create(server: Running, **more: Any) -> Any:
    return server.client().chat.completions.create(model="tiny", messages=question(), **more)


def test_tools_are_described_at_the_end_of_the_system_message(server: Running) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Add."}]
    tokens = server.post("/tokenize", {"messages": messages, "tools": [ADD]}).json()["tokens"]
    text = server.post("/detokenize", {"tokens": tokens}).json()["prompt"]
    line = json.dumps({"type": "function", "function": ADD["function"]})
    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n\n")
    assert f"<tools>\n{line}\n</tools>" in text
    assert text.count("<|im_start|>system") == 1
    default = server.post("/tokenize", {"messages": messages[1:], "tools": [ADD]}).json()["tokens"]
    text = server.post("/detokenize", {"tokens": default}).json()["prompt"]
    assert text.startswith(f"<|im_start|>system\n{server.service.core.config.system_message}\n\n# Tools")


def test_a_call_that_the_model_writes_is_a_tool_call(server: Running) -> None:
    with scripted(server, f"I add.\n{CALL}\n{CALL}"):
        choice = create(server, tools=[ADD]).choices[0]
        chunks = list(create(server, tools=[ADD], stream=True))
    assert (choice.message.content, choice.finish_reason) == ("I add.", "tool_calls")
    assert [(call.type, call.function.name) for call in choice.message.tool_calls] == [("function", "add")] * 2
    assert [json.loads(call.function.arguments) for call in choice.message.tool_calls] == [{"a": True}] * 2
    assert len({call.id for call in choice.message.tool_calls}) == 2
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    firsts = [call for call in deltas if call.id]
    assert [(call.index, call.type, call.function.name) for call in firsts] == [
        (0, "function", "add"),
        (1, "function", "add"),
    ]
    assert all(call.type is None and call.function.name is None for call in deltas if not call.id)
    for index in (0, 1):
        pieces = [call.function.arguments for call in deltas if call.index == index]
        assert json.loads("".join(pieces)) == {"a": True}
        assert len(pieces) > 3, "arguments are streamed"
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_the_stream_helper_puts_calls_together(server: Running) -> None:
    asked = {"model": "tiny", "messages": question(), "tools": [ADD]}
    with scripted(server, CALL), server.client().chat.completions.stream(**asked) as stream:
        for _ in stream:
            pass
        message = stream.get_final_completion().choices[0].message
    assert message.content is None or message.content == ""
    assert json.loads(message.tool_calls[0].function.arguments) == {"a": True}


def test_without_tools_or_with_none_a_call_is_text(server: Running) -> None:
    with scripted(server, CALL) as asked:
        for more in ({}, {"tools": [ADD], "tool_choice": "none"}):
            choice = create(server, **more).choices[0]
            assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (CALL, None, "stop")
    assert all(params.tagged is None for _, params in asked)


def test_one_call_alone_is_returned_if_parallel_calls_are_off(server: Running) -> None:
    with scripted(server, f"{CALL}\n{CALL}"):
        message = create(server, tools=[ADD], parallel_tool_calls=False).choices[0].message
    assert len(message.tool_calls) == 1


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        {"type": "function", "function": {"name": "add"}},
        {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "add"}}]},
        },
    ],
    ids=["required", "named", "allowed"],
)
def test_a_required_call_is_made_whatever_the_model_would_say(server: Running, choice: Any) -> None:
    tools = [STRICT] if choice == "required" else [STRICT, OTHER]
    found = create(server, tools=tools, tool_choice=choice, parallel_tool_calls=False).choices[0]
    assert found.finish_reason == "tool_calls"
    (call,) = found.message.tool_calls
    assert call.function.name == "add"
    assert set(json.loads(call.function.arguments)) == {"a"}


def test_a_strict_function_gets_arguments_of_its_schema_in_free_text(server: Running) -> None:
    with scripted(server, "plain") as asked:
        create(server, tools=[STRICT, OTHER])
        create(server, tools=[ADD])
    tagged = asked[0][1].tagged
    assert tagged.trigger == "<tool_call>"
    assert len(tagged.values) == 2
    assert asked[1][1].tagged is None


def test_an_answer_may_be_free_text_where_a_function_is_strict(server: Running) -> None:
    choice = create(server, tools=[STRICT]).choices[0]
    assert (choice.message.tool_calls, choice.finish_reason) == (None, "stop")


def test_a_form_and_tools_give_a_call_or_an_answer_of_the_form(server: Running) -> None:
    schema = {
        "type": "object",
        "properties": {"b": {"type": "boolean"}},
        "required": ["b"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    less, brace = (server.service.core.tokenizer.encode(text)[0] for text in ("<tool_call>", "{"))
    for bias, is_call in ((less, True), (brace, False)):
        message = create(server, tools=[STRICT], response_format=form, logit_bias={str(bias): 50}).choices[0].message
        assert bool(message.tool_calls) == is_call
        found = message.tool_calls[0].function.arguments if is_call else message.content
        assert set(json.loads(found)) == ({"a"} if is_call else {"b"})


def test_a_stop_string_counts_across_tokens_and_beside_tools(server: Running) -> None:
    """The text is the engine's own, so a stop string ends it wherever tokens and pieces are cut."""
    answers = [create(server, tools=[ADD], tool_choice=choice, stop=["71"]) for choice in ("none", "auto")]
    assert answers[0].choices[0].message.content == "4"
    text = "".join(
        chunk.choices[0].delta.content or "" for chunk in create(server, tools=[ADD], stop=["e", "a"], stream=True)
    )
    assert not set(text) & {"e", "a"}
    with scripted(server, "x") as asked:
        create(server, tools=[ADD], stop=["</tool", "7"])
    assert asked[0][1].stop_strings == ("</tool", "7")


def test_reasoning_is_asked_for_by_effort_or_template(thinker: Running) -> None:
    with scripted(thinker, "so.\n</think>\n\n42") as asked:
        for more in ({"reasoning_effort": "high"}, {"extra_body": {"chat_template_kwargs": {"enable_thinking": True}}}):
            message = create(thinker, **more).choices[0].message
            assert (message.content, message.reasoning, message.reasoning_content) == ("42", "so.\n", "so.\n")
            messages = asked[-1][0]
            assert messages[0] == {"role": "system", "content": thinking.SYSTEM_MESSAGE}
            assert messages[-1] == {"role": "assistant", "content": "<think>\n"}
        for more in (
            {},
            {"reasoning_effort": "none"},
            {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}},
        ):
            assert create(thinker, **more).choices[0].message.content == "so.\n</think>\n\n42"
            assert asked[-1][0][-1]["role"] == "user"


def test_the_prompt_is_that_of_the_engine_s_own_switch(thinker: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thinking, "can_think", lambda config: True)
    messages: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    core = thinker.service.core
    with scripted(thinker, "so.</think>42") as asked:
        for each in (messages, messages[1:]):
            thinker.client().chat.completions.create(model="tiny", messages=each, reasoning_effort="low")
            assert core.describe(asked[-1][0]) == core.describe(each, think=True)


def test_reasoning_is_streamed_apart_and_counted(thinker: Running) -> None:
    with scripted(thinker, "so.</think>42"):
        chunks = list(create(thinker, reasoning_effort="low", stream=True, stream_options={"include_usage": True}))
        response = thinker.client().responses.create(model="tiny", input="x", reasoning={"effort": "low"})
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "so."
    assert "".join(delta.content or "" for delta in deltas) == "42"
    assert chunks[-1].usage.completion_tokens_details.reasoning_tokens > 0
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert response.output_text == "42"


def test_a_model_that_was_not_trained_to_reason_ignores_the_switch(server: Running) -> None:
    assert create(server, reasoning_effort="high").choices[0].message.content == "4719"


def test_a_form_holds_after_the_reasoning(thinker: Running) -> None:
    with scripted(thinker, "so.</think>{}") as asked:
        create(thinker, reasoning_effort="low", response_format={"type": "json_object"})
        create(thinker, reasoning_effort="low", tools=[STRICT], tool_choice="required")
    assert [params.grammar_after for _, params in asked] == ["</think>"] * 2
    assert asked[0][1].json_schema is not None
    assert asked[1][1].tagged.trigger is None

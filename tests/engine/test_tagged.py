"""Answers of tagged values, and answers whose grammar holds after a text, through an engine."""

import json
import re
from dataclasses import replace

import pytest

from internvl_rt import RawPrompt, RequestError, SamplingParams, Tagged, TaggedValue
from support.calls import ask, check_idle, load

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9}, "on": {"type": "boolean"}},
    "required": ["x", "on"],
    "additionalProperties": False,
}
CALLS = (
    TaggedValue('<tool_call>\n{"name": "move", "arguments": ', POINT, "}\n</tool_call>"),
    TaggedValue('<tool_call>\n{"name": "stop", "arguments": ', {"const": {}}, "}\n</tool_call>"),
)
DRAWN = SamplingParams(max_tokens=400, temperature=1.0, seed=5, json_whitespace="compact")


@pytest.fixture(scope="module")
def engine():
    with load() as engine:
        yield engine


@pytest.fixture(autouse=True)
def nothing_is_left(engine):
    yield
    check_idle(engine)


def calls_in(text):
    """Returns the calls of tools that a text is made of."""
    parts = re.split(r"(?<=</tool_call>)\n", text)
    bodies = [re.fullmatch(r"<tool_call>\n(.*)\n</tool_call>", part, re.DOTALL) for part in parts]
    return [json.loads(body[1]) for body in bodies]


def check(calls):
    for call in calls:
        assert call["name"] in ("move", "stop")
        arguments = call["arguments"]
        assert arguments == {} if call["name"] == "stop" else 0 <= arguments["x"] <= 9 and arguments["on"] in (0, 1)


@pytest.mark.parametrize("messages", [ask("Hello"), RawPrompt("Hello")], ids=["chat", "raw"])
def test_answers_without_a_trigger_are_values_alone(engine, messages):
    params = replace(DRAWN, tagged=Tagged(CALLS, most=3), n=4)
    reply = engine.chat(messages, params)
    for choice in reply.choices:
        assert choice.finish_reason == "stop"
        calls = calls_in(choice.text)
        assert 1 <= len(calls) <= 3
        check(calls)
    pieces = list(engine.stream(messages, params))
    assert "".join(piece.text for piece in pieces if piece.choice == 0) == reply.text


def test_an_answer_is_free_until_the_model_writes_the_trigger(engine):
    """The bias brings the model to write "7" again and again, which opens a value."""
    digit = engine.tokenizer.encode("7")[0]
    tagged = Tagged((TaggedValue("7", POINT, "!"),), trigger="7", most=1)
    free = engine.chat(ask("Hello"), replace(DRAWN, tagged=tagged, max_tokens=40, logit_bias={digit: -100}))
    assert "7" not in free.text
    text = engine.chat(ask("Hello"), replace(DRAWN, tagged=tagged, logit_bias={digit: 9})).text
    value = text.partition("7")[2]
    assert value.endswith("!")
    assert set(json.loads(value[:-1])) == {"x", "on"}
    assert engine.chat(ask("Hello"), replace(DRAWN, tagged=tagged, logit_bias={digit: 100})).text.startswith("7{")


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        ({"json_schema": POINT}, r"""\{"x":[0-9],"on":(true|false)\}"""),
        ({"regex": "yes|no"}, "yes|no"),
        ({"tagged": Tagged((TaggedValue("<", {"const": 1}, ">"),), most=2)}, "<1>(\n<1>)?"),
    ],
    ids=["json_schema", "regex", "tagged"],
)
def test_a_grammar_holds_after_the_first_occurrence_of_a_text(engine, grammar, pattern):
    digit = engine.tokenizer.encode("7")[0]
    params = replace(DRAWN, grammar_after="77", logit_bias={digit: 5}, n=3, **grammar)
    for choice in engine.chat(ask("Hello"), params).choices:
        assert choice.finish_reason == "stop"
        _, found, rest = choice.text.partition("77")
        assert found
        assert re.fullmatch(pattern, rest)


def test_a_bad_schema_of_a_value_fails_its_own_request_alone(engine):
    bad = replace(DRAWN, tagged=Tagged((TaggedValue("a", {"not": {}}, "b"),)))
    with pytest.raises(RequestError, match="the tagged cannot be compiled: Unimplemented keys"):
        engine.chat(ask("Hello"), bad)
    assert engine.chat(ask("Hello"), replace(DRAWN, max_tokens=3)).token_ids

"""Structured output in a part of an answer: tagged values, and grammars that hold after a text."""

import json
import random
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internvl_rt import RequestError, Tagged, TaggedValue
from internvl_rt.inputs.grammar_limits import MAX_COMBINED_PATTERNS, MAX_PROPERTIES
from internvl_rt.inputs.grammar_source import MAX_GRAMMAR_BYTES, MAX_TAGGED_VALUES
from support.grammars import KINDS, allowed, fits, moved_on, subject

COUNT = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["n"],
    "additionalProperties": False,
}


def call_of(name, schema):
    return TaggedValue(f'<tool_call>\n{{"name": "{name}", "arguments": ', schema, "}\n</tool_call>")


def called(name, arguments):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


CALLS = (call_of("count", COUNT), call_of("counted", {"type": "boolean"}), call_of("any", True))
ONE, TWO = called("count", '{"n": 7}'), called("counted", "true")
TOOLS = Tagged(CALLS, trigger="<tool_call>")
ONLY_TOOLS = Tagged(CALLS, most=2)
MARKED = re.compile(
    r'\n\{"name": "(?:count", "arguments": \{\s*"n"\s*:\s*\d{1,2}\s*\}|counted", "arguments": (?:true|false))'
    r"\}\n</tool_call>"
)


def wander(compiled, tokenizer, draw, prefer, most=400):
    """Draws an answer within the masks, now and then the first token of `prefer` that is allowed."""
    matcher, ids = compiled.start(), []
    stop_id, preferred = tokenizer.token_id("<|im_end|>"), [tokenizer.find_token_id(text) for text in prefer]
    while not matcher.is_complete and len(ids) < most:
        choices = allowed(matcher, tokenizer)
        named = [token_id for token_id in preferred if token_id in choices]
        ids.append(named[0] if named and draw.random() < 0.6 else draw.choice(choices))
        if stop_id in choices and (len(ids) > 60 or draw.random() < 0.1):
            ids[-1] = stop_id
        assert matcher.accept(ids[-1])
    assert matcher.is_complete, tokenizer.decode(ids)
    return tokenizer.decode(ids[:-1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", True),
        ("No tool is needed: 1 < 2.\n", True),
        ("<tool_cal", True),
        ("  <tool_<tool> ", True),
        (ONE, True),
        (TWO, True),
        (f"First I count.\n{ONE}", True),
        (f"{ONE}\n{TWO}\n{ONE}", True),
        (f"你好 <too{TWO}", True),
        (called("any", '[{"a": [1, null]}, "</tool_call>"]'), True),
        ("<tool_call>", False),
        ("text <tool_call> more text", False),
        (called("other", "{}"), False),
        (called("count", '{"n": 100}'), False),
        (called("count", "true"), False),
        (called("counted", '{"n": 7}'), False),
        (f"{ONE} and more", False),
        (f"{ONE}\n", False),
        (f"{ONE}{TWO}", False),
        (f"{ONE}\n\n{TWO}", False),
        (f"{ONE}\ntext\n{TWO}", False),
        (ONE.removesuffix("</tool_call>"), False),
        (ONE.replace("\n", "", 1), False),
    ],
)
def test_text_is_free_until_the_trigger_and_then_values_follow(kind, text, expected):
    tokenizer, compiler = subject(kind)
    assert fits(compiler.compile("tagged", TOOLS), tokenizer, text) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ONE, True),
        (f"{TWO}\n{ONE}", True),
        ("", False),
        ("text", False),
        (f"text {ONE}", False),
        (f" {ONE}", False),
        (f"{ONE}\n{ONE}\n{ONE}", False),
    ],
)
def test_without_a_trigger_the_answer_is_values_alone_and_at_most_so_many(kind, text, expected):
    tokenizer, compiler = subject(kind)
    assert fits(compiler.compile("tagged", ONLY_TOOLS), tokenizer, text) == expected


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_every_answer_along_the_masks_is_free_text_and_then_calls(kind, seed):
    tokenizer, compiler = subject(kind)
    tagged = Tagged(CALLS[:2], trigger="<tool_call>", separator=" ; ")
    prefer = ["<tool_call>", "tool_call", "<", "t", "o", "l", "_", "}"]
    text = wander(compiler.compile("tagged", tagged), tokenizer, random.Random(seed), prefer)
    _, found, rest = text.partition("<tool_call>")
    for call in rest.split(" ; <tool_call>") if found else ():
        assert MARKED.fullmatch(call), text


def test_a_trigger_that_is_one_token_is_in_the_mask_wherever_a_value_may_begin():
    tokenizer, compiler = subject("byte-level")
    begin, end = tokenizer.token_id("<tool_call>"), tokenizer.token_id("</tool_call>")
    free, only = compiler.compile("tagged", TOOLS), compiler.compile("tagged", ONLY_TOOLS)
    assert begin in allowed(free.start(), tokenizer)
    assert begin in allowed(only.start(), tokenizer)
    assert len(allowed(only.start(), tokenizer)) < 20, "nothing but beginnings of <tool_call>"
    assert begin in allowed(moved_on(free, tokenizer.encode("Let me see, ")), tokenizer)
    half = moved_on(free, tokenizer.encode("<tool_ca"))
    assert begin in allowed(half, tokenizer), "it is the first trigger all the same"
    ids = [begin, *tokenizer.encode(ONE)[1:-1]]
    assert tokenizer.encode(ONE) == [*ids, end]
    inside = moved_on(free, ids[:5])
    assert not {begin, end, tokenizer.token_id("<|im_end|>")} & set(allowed(inside, tokenizer))
    assert end in allowed(moved_on(free, ids), tokenizer)
    done = moved_on(free, [*ids, end])
    assert tokenizer.token_id("<|im_end|>") in allowed(done, tokenizer)
    assert begin not in allowed(done, tokenizer)
    assert begin in allowed(moved_on(free, [*ids, end, *tokenizer.encode("\n")]), tokenizer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("begin", ["", " ", "  x", "a", '"\\/é🙂\n\x07'])
@pytest.mark.parametrize("end", ["", " ", "\n\n", '"\\/é🙂\n\x07'])
def test_the_texts_around_a_value_may_be_any(kind, begin, end):
    tokenizer, compiler = subject(kind)
    compiled = compiler.compile("tagged", Tagged((TaggedValue(begin, {"const": [1]}, end),), separator=", "))
    value = f"{begin}[1]{end}"
    for text in (value, f"{value}, {value}"):
        assert fits(compiled, tokenizer, text)
    for text in (f" {value}", f"{value} ", f"{begin}[2]{end}", f"{value}{value}"):
        assert not fits(compiled, tokenizer, text)


@pytest.mark.parametrize("kind", KINDS)
def test_a_trigger_may_begin_with_a_space(kind):
    """A tokenizer of sentencepiece drops the first space of an answer, which is then no part of a trigger."""
    tokenizer, compiler = subject(kind)
    compiled = compiler.compile("tagged", Tagged((TaggedValue(" go ", True, ""),), trigger=" go"))
    for text in ("go away", "let us go 1", "let us g", " go 1"):
        assert fits(compiled, tokenizer, text)
    for text in ("let us go away", " go away", " go"):
        assert not fits(compiled, tokenizer, text)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("grammar_kind", "source", "text", "expected"),
    [
        ("json_schema", json.dumps(COUNT), 'I think</thin></think>{"n": 7}', True),
        ("json_schema", json.dumps(COUNT), '</think>{"n": 7}', True),
        ("json_schema", json.dumps(COUNT), '{"n": 7}', False),
        ("json_schema", json.dumps(COUNT), '{"n": 7}</think>', False),
        ("json_schema", json.dumps(COUNT), 'a</think> {"n": 7}', False),
        ("json_schema", json.dumps(COUNT), 'a</think>b</think>{"n": 7}', False),
        ("json_schema", json.dumps(COUNT), "", False),
        ("json_schema", json.dumps(COUNT), "I think", False),
        ("regex", "[ab]*", "I think</think>", True),
        ("regex", "[ab]*", "</think>abba", True),
        ("regex", " [ab]+", "I think</think> ab", True),
        ("regex", "[ab]*", "I think</think>abc", False),
        ("regex", "[ab]*", "abba", False),
        ("tagged", TOOLS, f"Perhaps <tool_call>?</think>I call {ONE}", True),
        ("tagged", TOOLS, "Perhaps</think>No, I do not.</think>", True),
        ("tagged", TOOLS, f"Perhaps {ONE}", False),
        ("tagged", TOOLS, "Perhaps</think><tool_call>x", False),
        ("tagged", ONLY_TOOLS, f"Perhaps</think>{ONE}\n{TWO}", True),
        ("tagged", ONLY_TOOLS, f"Perhaps</think>\n{ONE}", False),
    ],
)
def test_a_grammar_may_hold_after_the_first_occurrence_of_a_text(kind, grammar_kind, source, text, expected):
    tokenizer, compiler = subject(kind)
    compiled = compiler.compile(grammar_kind, source, after="</think>")
    assert fits(compiled, tokenizer, text) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_before_the_text_that_a_grammar_holds_after_every_token_of_text_is_allowed_but_no_end(kind):
    tokenizer, compiler = subject(kind)
    free = set(allowed(compiler.compile("regex", "(?s).*").start(), tokenizer)) - {tokenizer.token_id("<|im_end|>")}
    assert set(allowed(compiler.compile("regex", "[ab]", after="</think>").start(), tokenizer)) == free
    tagged = compiler.compile("tagged", TOOLS).start()
    assert free - set(allowed(tagged, tokenizer)) == set(), "text is free as long as the trigger is not there"


@pytest.mark.parametrize(
    ("after", "text", "expected"), [(" x", "yes x1", True), (" x", " x1", True), ("x", "x1", True)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_grammar_may_hold_after_a_text_with_a_space(kind, after, text, expected):
    tokenizer, compiler = subject(kind)
    assert fits(compiler.compile("regex", "[0-9]", after=after), tokenizer, text) == expected


@pytest.mark.parametrize("whitespace", ["compact", "bounded", "free"])
def test_white_space_in_tagged_values_is_that_of_other_json(whitespace):
    tokenizer, compiler = subject("byte-level")
    compiled = compiler.compile("tagged", TOOLS, whitespace=whitespace)
    assert fits(compiled, tokenizer, called("count", '{"n":1}'))
    assert fits(compiled, tokenizer, called("count", '{ "n":1}')) == (whitespace != "compact")
    assert fits(compiled, tokenizer, called("count", '{\n\n"n":1}')) == (whitespace == "free")


def several(number, schema):
    return Tagged(tuple(call_of(f"f{index}", schema) for index in range(number)), trigger="<tool_call>")


def properties(number, offset=0):
    return {"type": "object", "properties": {f"p{offset + index}": {} for index in range(number)}}


@pytest.mark.parametrize(
    ("tagged", "message"),
    [
        (several(2, json.dumps({"const": "x" * (MAX_GRAMMAR_BYTES // 2)})), "tagged has 65,[0-9]+ bytes, at most 65,5"),
        (several(2, properties(501)), "the tagged has 1,002 properties, at most 1,000"),
        (
            Tagged(tuple(call_of(f"f{n}", {"type": "string", "pattern": f"{n}{'.*' * 200}"}) for n in range(3))),
            "the tagged has 600 repetitions and groups in its patterns, at most 512",
        ),
        (
            Tagged(tuple(call_of(f"f{n}", {"allOf": [{"pattern": f"a{n}"}, {"pattern": f"b{n}"}]}) for n in range(6))),
            "the tagged has 12 different patterns and formats, and combines them",
        ),
        (several(6, {"allOf": [{"pattern": "a"}, {"pattern": "b"}]}), "the tagged has 12 different patterns"),
        (several(1, "{"), "a json_schema of the tagged is not JSON: .* got '{'"),
        (several(1, '{"x-guidance": {}}'), "a json_schema of the tagged has x-guidance"),
        (
            several(1, '{"not": {}}'),
            "the tagged cannot be compiled: Unimplemented keys.*; expected JSON schemas without",
        ),
        (several(1, "false"), "the tagged cannot be compiled: .*schema is false"),
        (Tagged((TaggedValue("\ud800", True, ""),)), "the tagged is not valid Unicode"),
    ],
    ids=range(10),
)
def test_the_limits_hold_for_all_schemas_of_tagged_values_together(tagged, message):
    start_s = time.process_time()
    with pytest.raises(RequestError, match=message) as caught:
        subject("byte-level")[1].compile("tagged", tagged)
    assert time.process_time() - start_s < 2
    assert len(str(caught.value)) < 600


def test_the_text_that_a_grammar_holds_after_counts_too():
    with pytest.raises(RequestError, match="the regex has 65,537 bytes"):
        subject("byte-level")[1].compile("regex", "a" * (MAX_GRAMMAR_BYTES - 1), after="bc")


@pytest.mark.parametrize(
    "tagged",
    [
        several(MAX_TAGGED_VALUES, properties(MAX_PROPERTIES // MAX_TAGGED_VALUES)),
        Tagged(tuple(call_of(f"f{n}", properties(7, 7 * n)) for n in range(MAX_TAGGED_VALUES)), most=MAX_TAGGED_VALUES),
        several(MAX_TAGGED_VALUES, True),
        several(1, properties(MAX_PROPERTIES)),
        several(MAX_TAGGED_VALUES, {"type": "string", "pattern": ".*" * 150}),
        several(MAX_COMBINED_PATTERNS // 2, {"allOf": [{"pattern": ".*a.{9}b"}, {"pattern": ".*b.{7}c"}]}),
        several(MAX_TAGGED_VALUES, {"type": "array", "minItems": 10**6}),
        Tagged(tuple(TaggedValue("a" * n, True, "") for n in range(1, 1 + MAX_TAGGED_VALUES)), separator=""),
        Tagged((TaggedValue("<" * 1024, True, ">" * 1024),), trigger="<" * 1024, separator="-" * 1024),
    ],
    ids=range(9),
)
def test_no_tagged_values_take_long(tagged):
    """They are compiled anew, and followed for a while; they may be refused, but must not hang."""
    tokenizer, compiler = subject("byte-level")
    start_s, draw = time.process_time(), random.Random(0)
    first = tokenizer.encode(tagged.values[0].begin)
    try:
        matcher = compiler.compile("tagged", tagged, whitespace="free").start()
        for step in range(40):
            if matcher.is_complete:
                break
            choices = allowed(matcher, tokenizer)
            token_id = first[step] if step < len(first) and first[step] in choices else draw.choice(choices)
            assert matcher.accept(token_id)
    except RequestError as error:
        assert "too complex" in str(error)  # noqa: PT017
    assert time.process_time() - start_s < 3

"""Structured output: bad grammars are refused, and no grammar that a request can ask for takes long."""

import json
import random
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from internvl_rt.errors import RequestError
from internvl_rt.inputs import grammar
from internvl_rt.inputs.grammar import GrammarCompiler
from internvl_rt.inputs.grammar_limits import MAX_PROPERTIES, MAX_REGEX_OPERATORS
from internvl_rt.inputs.grammar_source import MAX_GRAMMAR_BYTES
from internvl_rt.inputs.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(Path(__file__).parents[1] / "data" / "tokenizer")
COMPILER = GrammarCompiler(TOKENIZER, TOKENIZER.vocab_size)


def allowed(matcher):
    mask_W = np.zeros(-(-TOKENIZER.vocab_size // 32), np.int32)
    matcher.fill_mask(mask_W)
    return np.flatnonzero(np.unpackbits(mask_W.view(np.uint8), bitorder="little")).tolist()


def follow(matcher, ids):
    for token_id in ids:
        assert token_id in allowed(matcher)
        assert matcher.accept(token_id)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("yaml", "a", "must be one of json_schema, regex, tagged, got 'yaml'"),
        ("regex", "a" * (MAX_GRAMMAR_BYTES + 1), "regex has 65,537 bytes, at most 65,536"),
        ("json_schema", "[" * (MAX_GRAMMAR_BYTES + 1), "json_schema has 65,537 bytes"),
        ("regex", "\ud800", "half a surrogate pair at character 0"),
        ("regex", "(a", "unclosed group; .* got '\\(a'; rewrite it"),
        ("regex", r"(a)\1", "backreferences are not supported"),
        ("regex", "(?=a)", "look-around, .* not supported"),
        ("regex", "a$b", "lookarounds not supported"),
        ("regex", "a\\", "backslash that escapes nothing"),
        ("regex", "(?ix)a\nb", "line breaks under the flag x"),
        ("regex", r"[^\x00-\x{10FFFF}]", "no text matches"),
        ("regex", "(a{0})*", "only the empty text"),
        ("regex", ".*" * 20_000, "20,000 repetitions and groups, at most 512"),
        ("regex", "(|.)" * 16_000, "16,000 repetitions and groups"),
        ("json_schema", "{", "is not JSON: .* got '{'; correct it"),
        ("json_schema", '{"minimum": NaN}', "NaN is no JSON value"),
        ("json_schema", "{}, {}", "Extra data"),
        ("json_schema", "[" * 30_000, "nested too deeply"),
        ("json_schema", '{"items":' * 200 + "{}" + "}" * 200, "recursion limit"),
        ("json_schema", "[]", "must be an object or boolean"),
        ("json_schema", "false", "schema is false"),
        ("json_schema", '{"type": "text"}', "Invalid type: text"),
        ("json_schema", '{"not": {}}', "Unimplemented keys"),
        ("json_schema", '{"oneOf": [{"type": "string"}, {"maxLength": 3}]}', "oneOf may overlap"),
        ("json_schema", '{"x-guidance": {"lenient": true}}', "x-guidance, which is no keyword"),
        ("json_schema", '{"$ref": "http://example.com/schema"}', "does not fetch resources"),
        ("json_schema", '{"type": "string", "pattern": "(?=a)"}', "look-around"),
        (
            "json_schema",
            json.dumps({"properties": {f"p{i}": 1 for i in range(5000)}}),
            "5,000 properties, at most 1,000",
        ),
        ("json_schema", json.dumps({"patternProperties": {f"^a{i}$": {} for i in range(999)}}), "999 different patt"),
        ("json_schema", json.dumps({"allOf": [{"pattern": f".*a.{{{i}}}b"} for i in range(16)]}), "16 different patt"),
        ("json_schema", json.dumps({"anyOf": [{"pattern": ".*" * i} for i in range(99)]}), "4,851 repetitions"),
    ],
    ids=lambda value: value[:20],
)
def test_what_cannot_be_compiled_is_refused_in_one_line(kind, text, message):
    start_s = time.process_time()
    with pytest.raises(RequestError, match=message) as caught:
        COMPILER.compile(kind, text)
    assert time.process_time() - start_s < 2
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def nested_references(combination):
    """Returns a schema whose size doubles at each of 30 levels of references."""
    levels = {f"d{i}": {combination: [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(30)}
    return {"$defs": levels | {"d30": {"type": "string"}}, "$ref": "#/$defs/d0"}


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("regex", "(a{1,1000}){1,1000}"),
        ("regex", "(((a{1,50}){1,50}){1,50}){1,50}"),
        ("regex", "(.*a){30}.{100}"),
        ("regex", "(x+x+)+y"),
        ("regex", ".*" * 250),
        ("regex", "[a-z]*" * MAX_REGEX_OPERATORS),
        ("regex", "|".join(map(str, range(10_000)))),
        ("json_schema", json.dumps({"type": "string", "maxLength": 10**9})),
        ("json_schema", json.dumps({"type": "array", "items": {}, "minItems": 10**6})),
        (
            "json_schema",
            json.dumps({"type": "object", "properties": {f"p{i}": {} for i in range(MAX_PROPERTIES)}}),
        ),
        ("json_schema", json.dumps({"enum": [f"x{i}" for i in range(6000)]})),
        ("json_schema", json.dumps(nested_references("allOf"))),
        ("json_schema", json.dumps(nested_references("anyOf"))),
        ("json_schema", json.dumps({"anyOf": [{"type": "array", "minItems": i} for i in range(1400)]})),
        ("json_schema", '{"items":' * 60 + "{}" + "}" * 60),
    ],
    ids=lambda value: value[:20],
)
def test_what_others_explode_on_takes_two_seconds_at_most(kind, text):
    start_s, draw = time.process_time(), random.Random(0)
    matcher = COMPILER.compile(kind, text).start()
    try:
        for _ in range(30):
            if matcher.is_complete:
                break
            assert matcher.accept(draw.choice(allowed(matcher)))
    except RequestError as error:
        assert "too complex" in str(error)  # noqa: PT017 (it may be refused, but must not hang)
    assert time.process_time() - start_s < 2


def test_an_answer_that_becomes_too_complex_by_itself_is_an_error(monkeypatch):
    monkeypatch.setattr(grammar, "_MAX_LEXER_STATES", 400)
    matcher = GrammarCompiler(TOKENIZER, TOKENIZER.vocab_size).compile("regex", "[ab]*a[ab]{40}").start()
    draw = random.Random(0)
    with pytest.raises(RequestError, match="no further token: it is too complex; simplify"):
        follow(matcher, (draw.choice([TOKENIZER.token_id("a"), TOKENIZER.token_id("b")]) for _ in range(10_000)))
    assert not matcher.is_complete


def test_a_schema_that_cannot_be_completed_is_an_error_and_not_an_empty_mask():
    with pytest.raises(RequestError, match="no text matches from here on"):
        COMPILER.compile("json_schema", '{"$ref": "#"}')
    endless = {"type": "object", "properties": {"a": {"$ref": "#/properties/a"}}, "required": ["a"]}
    matcher = COMPILER.compile("json_schema", json.dumps(endless)).start()
    with pytest.raises(RequestError, match="no text matches from here on"):
        follow(matcher, TOKENIZER.encode('{"a": '))


def test_as_many_properties_as_are_allowed_are_followed_to_the_end():
    schema = {"type": "object", "properties": {f"p{i}": {} for i in range(MAX_PROPERTIES)}}
    matcher = COMPILER.compile("json_schema", json.dumps(schema)).start()
    follow(matcher, TOKENIZER.encode('{"p3": 1, "p77": {"a": [true]}, "p998": null}'))
    assert matcher.is_complete


def test_missing_llguidance_is_reported_with_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RequestError, match=r"pip install 'internvl-rt\[grammar\]'"):
        GrammarCompiler(TOKENIZER, TOKENIZER.vocab_size).compile("regex", "a")

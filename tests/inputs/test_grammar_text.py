"""Structured output: how much white space an answer may have, and which special tokens."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.grammars import KINDS, allowed, fits, subject

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "ages": {"type": "array", "maxItems": 2}},
    "required": ["name", "ages"],
    "additionalProperties": False,
}
NESTED = {"a": [{"b": [{"c": [1, 2], "d": {}}], "e": []}, "f"], "g": None}  # six levels with the outermost
WHITE = frozenset(" \t\r\n")


def lean(compiled, tokenizer, ends, most):
    """Draws white space wherever it is allowed, else the first text of `ends` that is; returns the text."""
    matcher, ids = compiled.start(), []
    texts = {i: data.decode(errors="replace") for i, data in tokenizer.token_bytes.items()}
    while not matcher.is_complete and len(ids) < most:
        choices = allowed(matcher, tokenizer)
        white = [i for i in choices if texts.get(i) and not set(texts[i]) - WHITE]
        named = [i for end in ends for i in choices if texts.get(i) == end]
        ids.append(([i for i in white if "\n" in texts[i]] + white + named + choices)[0])
        assert matcher.accept(ids[-1])
    return tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("whitespace", ["bounded", "compact"])
def test_an_answer_that_prefers_white_space_comes_to_its_end(kind, whitespace):
    tokenizer, compiler = subject(kind)
    numbers = {"type": "object", "properties": {"a": {"const": 1}, "b": {"const": [True]}}, "required": ["a", "b"]}
    compiled = compiler.compile("json_schema", json.dumps(numbers), whitespace=whitespace)
    text = lean(compiled, tokenizer, ['"', "}"], most=1000)
    assert json.loads(text) == {"a": 1, "b": [True]}
    assert len(text) < (len('{"a":1,"b":[true]}') + 1 if whitespace == "compact" else 600)


@pytest.mark.parametrize("schema", ["true", "{}", json.dumps(PERSON)], ids=["true", "any", "object"])
@pytest.mark.parametrize("kind", KINDS)
def test_white_space_is_never_longer_than_an_indent(kind, schema):
    tokenizer, compiler = subject(kind)
    compiled = compiler.compile("json_schema", schema)
    text = lean(compiled, tokenizer, ["{", "}", "[", "]", ":", ",", "1"], most=400)
    runs = "".join(" " if letter in WHITE else "x" for letter in text).split("x")
    outside_strings = runs if '"' not in text else runs[:2]
    assert max(map(len, outside_strings)) <= 34


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("indent", [None, 1, 2, 4, "\t"])
def test_what_programs_print_keeps_to_bounded_white_space(kind, indent):
    tokenizer, compiler = subject(kind)
    for text in (json.dumps(NESTED, indent=indent), json.dumps(NESTED, indent=indent).replace("\n", "\r\n")):
        assert fits(compiler.compile("json_schema", "{}"), tokenizer, text)
        compact = compiler.compile("json_schema", "{}", whitespace="compact")
        assert not fits(compact, tokenizer, text)
    assert fits(compact, tokenizer, json.dumps(NESTED, separators=(",", ":")))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(spaces=st.lists(st.text(" \n\t\r", max_size=40), min_size=5, max_size=5))
def test_free_white_space_is_whatever_json_allows(kind, spaces):
    tokenizer, compiler = subject(kind)
    text = '{{{}"a"{}:{}[1{}]{}}}'.format(*spaces)
    assert fits(compiler.compile("json_schema", json.dumps({"type": "object"}), whitespace="free"), tokenizer, text)


def test_options_of_the_library_do_not_touch_the_schema():
    tokenizer, compiler = subject("byte-level")
    schema = ' {"const" : 12}\n'
    assert fits(compiler.compile("json_schema", schema), tokenizer, "12")
    assert fits(compiler.compile("json_schema", " { } "), tokenizer, "[1, 2]")


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_special_tokens_are_text_of_an_answer_that_shows_them(kind):
    tokenizer, compiler = subject(kind)
    regex = "<ref>[a-z ]+</ref>"
    ids = tokenizer.encode("<ref>the lake</ref>")
    assert ids[0] == tokenizer.token_id("<ref>")
    shown, left_out = (compiler.compile("regex", regex, skips_specials=skips) for skips in (False, True))
    assert all(map((matcher := shown.start()).accept, ids))
    assert matcher.is_complete
    assert not left_out.start().accept(ids[0]), "the text would lack it"
    hidden = {tokenizer.token_id(token) for token in ("<|im_start|>", "<img>", "<IMG_CONTEXT>")}
    anything = compiler.compile("regex", "(?s).*", skips_specials=False).start()
    assert not hidden & set(allowed(anything, tokenizer))

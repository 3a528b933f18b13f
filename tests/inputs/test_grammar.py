"""Structured output: the masks allow exactly what the grammar means, with every kind of tokenizer."""

import json
import random
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internvl_rt.inputs import grammar
from internvl_rt.inputs.grammar import GrammarCompiler
from internvl_rt.inputs.tokenizer import TEMPLATE_TOKENS, load_tokenizer
from support.grammars import DATA, KINDS, NUM_UNKNOWN, allowed, fits, moved_on, subject

INVOICE = {
    "type": "object",
    "properties": {
        "number": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,4}$"},
        "paid": {"type": "boolean"},
        "currency": {"enum": ["EUR", "¥"]},
        "lines": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"name": {"type": "string", "maxLength": 6}, "count": {"$ref": "#/$defs/count"}},
                "required": ["name", "count"],
                "additionalProperties": False,
            },
            "minItems": 1,
            "maxItems": 2,
        },
        "note": {"anyOf": [{"type": "null"}, {"type": "string", "maxLength": 3}]},
    },
    "required": ["number", "paid", "lines"],
    "additionalProperties": False,
    "$defs": {"count": {"type": "integer", "minimum": 1, "maximum": 99}},
}
REGEXES = [
    "[0-9]{4}-[0-9]{2}-[0-9]{2}",
    "yes|no|(not )?sure",
    "[a-z]{1,8}@[a-z]{1,8}[.](de|com)",
    "^a/b\\\\c\"'#\n\\n$",
    " ?x",
    "  a*b",
    " *",
    "a*?b+?",
    "é+|你好|[🙂-🙄]{1,2}",
    "(?i)the lake",
    "(?s).{0,9}",
]
# Grammars want U+007F escaped. Names of special tokens are read as these tokens, which are no text.
strings = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x7f"))
strings = strings.filter(lambda text: not re.search(r"<\S+>", text))
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | strings,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(strings, inner, max_size=4),
    max_leaves=8,
)
invoices = st.fixed_dictionaries(
    {
        "number": st.from_regex("[A-Z]{2}-[0-9]{1,4}", fullmatch=True),
        "paid": st.booleans(),
        "lines": st.lists(
            st.fixed_dictionaries({"name": st.text('ab 你\n\\"', max_size=6), "count": st.integers(1, 99)}),
            min_size=1,
            max_size=2,
        ),
    },
    optional={"currency": st.sampled_from(["EUR", "¥"]), "note": st.none() | st.text("x🙂", max_size=3)},
)


def is_invoice(value):
    keys = ["number", "paid", "currency", "lines", "note"]
    return (
        isinstance(value, dict)
        and {"number", "paid", "lines"} <= value.keys() <= set(keys)
        and re.fullmatch("[A-Z]{2}-[0-9]{1,4}", value["number"])
        and isinstance(value["paid"], bool)
        and value.get("currency", "EUR") in ("EUR", "¥")
        and 1 <= len(value["lines"]) <= 2
        and all(
            line.keys() == {"name", "count"} and len(line["name"]) <= 6 and line["count"] in range(1, 100)
            for line in value["lines"]
        )
        and len(value.get("note") or "") <= 3
    )


def wander(compiled, tokenizer, draw, num_free=40):
    """Draws an answer within the masks; after `num_free` tokens it prefers tokens that lead to an end."""
    stop_id, matcher, ids = tokenizer.token_id("<|im_end|>"), compiled.start(), []
    homing = [tokenizer.find_token_id(token) for token in ('"', "}", "]", "1", "b", ":", ",", "{", "[")]
    for step in range(num_free + 200):
        choices = allowed(matcher, tokenizer)
        assert matcher.is_complete == (choices == [stop_id])
        token_id = draw.choice(choices)
        if step >= num_free:
            token_id = next((t for t in [stop_id, *homing] if t in choices), token_id)
        assert matcher.accept(token_id)
        if token_id == stop_id:
            assert matcher.is_complete
            assert allowed(matcher, tokenizer) == [stop_id]
            assert matcher.accept(stop_id)
            assert not matcher.accept(ids[-1] if ids else 0)
            return tokenizer.decode(ids)
        ids.append(token_id)
    raise AssertionError(f"no end in sight: {tokenizer.decode(ids)!r}")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(value=json_values, indent=st.none() | st.integers(0, 2))
def test_every_json_text_fits_the_empty_schema(kind, value, indent):
    tokenizer, compiler = subject(kind)
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    assert fits(compiler.compile("json_schema", "{}"), tokenizer, text)
    assert fits(compiler.compile("json_schema", '{"type": "object"}'), tokenizer, text) == isinstance(value, dict)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(value=invoices, spread=st.booleans())
def test_every_value_of_a_schema_fits_it(kind, value, spread):
    tokenizer, compiler = subject(kind)
    ordered = {key: value[key] for key in INVOICE["properties"] if key in value}
    ordered["lines"] = [{"name": line["name"], "count": line["count"]} for line in value["lines"]]
    text = json.dumps(ordered, separators=None if spread else (",", ":"), ensure_ascii=False)
    assert fits(compiler.compile("json_schema", json.dumps(INVOICE)), tokenizer, text)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "text",
    [
        '{"number": "AB-1", "paid": true}',
        '{"number": "AB-12345", "paid": true, "lines": [{"name": "", "count": 1}]}',
        '{"number": "AB-1", "paid": 1, "lines": [{"name": "", "count": 1}]}',
        '{"number": "AB-1", "paid": true, "lines": [{"name": "", "count": 100}]}',
        '{"number": "AB-1", "paid": true, "lines": [{"name": "", "count": 1, "unit": "kg"}]}',
        '{"number": "AB-1", "paid": true, "lines": []}',
        '{"number": "AB-1", "paid": true, "lines": [{"name": "", "count": 1}]} ',
        '{"number": "AB-1", "paid": true, "lines": [{"name": "", "count": 1}]',
    ],
)
def test_a_value_that_breaks_a_schema_does_not_fit(kind, text):
    tokenizer, compiler = subject(kind)
    assert not fits(compiler.compile("json_schema", json.dumps(INVOICE)), tokenizer, text)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_every_answer_along_the_masks_is_json_that_satisfies_its_schema(kind, seed):
    tokenizer, compiler = subject(kind)
    draw = random.Random(seed)
    json.loads(wander(compiler.compile("json_schema", "{}"), tokenizer, draw))
    assert isinstance(json.loads(wander(compiler.compile("json_schema", '{"type": "object"}'), tokenizer, draw)), dict)
    assert is_invoice(json.loads(wander(compiler.compile("json_schema", json.dumps(INVOICE)), tokenizer, draw)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("regex", REGEXES)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_a_regex_takes_what_it_matches_whole_and_nothing_else(kind, regex, data):
    tokenizer, compiler = subject(kind)
    compiled = compiler.compile("regex", regex)
    answer = wander(compiled, tokenizer, random.Random(data.draw(st.integers(0, 10**6))))
    assert re.fullmatch(regex, answer)
    text = data.draw(
        st.from_regex(f"(?:{regex})" if "(?" not in regex else regex, fullmatch=True) | st.text(max_size=4)
    )
    text = tokenizer.decode(tokenizer.encode(text))  # the tokenizer normalises the text
    assert fits(compiled, tokenizer, text) == bool(re.fullmatch(regex, text))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("grammar_kind", "text"), [("json_schema", json.dumps(INVOICE)), ("regex", "(?s).{3,60}")])
def test_a_token_is_in_the_mask_just_if_it_is_accepted(kind, grammar_kind, text):
    tokenizer, compiler = subject(kind)
    compiled, before = compiler.compile(grammar_kind, text), []
    matcher = compiled.start()
    for token_id in tokenizer.encode('{"number": "AB-1", "paid": true, "lines": ['):
        accepted = [t for t in range(-1, tokenizer.vocab_size + 64) if moved_on(compiled, before).accept(t)]
        assert allowed(matcher, tokenizer) == accepted
        assert matcher.accept(token_id)
        before.append(token_id)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_equal_bytes_are_allowed_together_and_every_split_of_a_text_is(kind):
    tokenizer, compiler = subject(kind)
    choices = allowed(compiler.compile("regex", "the lake").start(), tokenizer)
    texts = {tokenizer.decode([token_id]) for token_id in choices}
    assert len(texts) > 1
    assert all("the lake".startswith(text) for text in texts)
    if kind == "sentencepiece":
        found = [tokenizer.token_id(piece) for piece in ("t", "<0x74>", "▁the", "▁", "<0x20>")]
        assert set(found) <= set(choices), "the first space of an answer is not part of its text"


@pytest.mark.parametrize("kind", KINDS)
def test_the_rest_of_an_answer_that_was_begun_has_all_its_spaces(kind):
    tokenizer, compiler = subject(kind)
    plain, spaced = (compiler.compile("regex", regex, begun=True).start() for regex in ("the lake", " the lake"))
    for matcher, expected in ((plain, "the lake"), (spaced, " the lake")):
        stream, text = tokenizer.stream(begun=True), ""
        while not matcher.is_complete:
            token_id = allowed(matcher, tokenizer)[0]
            assert matcher.accept(token_id)
            text += stream.push(token_id)
        assert text + stream.flush() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_no_text(kind):
    tokenizer, compiler = subject(kind)
    choices = set(allowed(compiler.compile("regex", "(?s).*").start(), tokenizer))
    ids = {tokenizer.find_token_id(token) for token in [*TEMPLATE_TOKENS, "<s>", "</s>", "<unk>", "[INST]"]} - {None}
    assert choices & ids == {tokenizer.token_id("<|im_end|>")}, "the empty text matches, so the answer may end"
    assert max(choices) < tokenizer.vocab_size
    in_string = compiler.compile("json_schema", '{"type": "string"}').start()
    assert all(map(in_string.accept, tokenizer.encode('"<')))
    assert not set(allowed(in_string, tokenizer)) & ids


def test_template_tokens_are_no_text_even_if_the_file_does_not_flag_them_special(tmp_path):
    folder = shutil.copytree(DATA, tmp_path / "checkpoint")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for fields in config["added_tokens_decoder"].values():
        fields["special"] = False
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(folder)
    compiled = GrammarCompiler(tokenizer, tokenizer.vocab_size + NUM_UNKNOWN).compile("regex", "(?s).+")
    choices = allowed(compiled.start(), tokenizer)
    assert not {tokenizer.token_id(token) for token in TEMPLATE_TOKENS} & set(choices)
    assert tokenizer.token_id("<tool_call>") in choices


def test_the_text_of_a_special_token_may_be_written_with_ordinary_ones():
    tokenizer, compiler = subject("byte-level")
    assert fits(compiler.compile("json_schema", "{}"), tokenizer, '"<|im_end|><IMG_CONTEXT>"')


def test_a_refused_token_leaves_the_answer_where_it_is():
    tokenizer, compiler = subject("byte-level")
    matcher = compiler.compile("regex", "ab+").start()
    a, b, stop = (tokenizer.token_id(token) for token in ("a", "b", "<|im_end|>"))
    assert [matcher.accept(t) for t in (b, stop, -1, 10**6, a, a, stop, b, a, b, stop, b)] == [
        *(False, False, False, False, True, False, False, True, False, True, True, False)
    ]


def test_answers_of_one_grammar_go_their_own_ways():
    tokenizer, compiler = subject("byte-level")
    compiled = compiler.compile("regex", "a(bc|c+)")
    a, b, c, stop = (tokenizer.token_id(token) for token in ("a", "b", "c", "<|im_end|>"))
    first = compiled.start()
    assert first.accept(a)
    second = moved_on(compiled, [a])
    assert second.accept(b)
    assert second.accept(c)
    assert second.is_complete
    assert not first.is_complete
    assert {b, c} <= set(allowed(first, tokenizer))
    assert first.accept(c)
    third = moved_on(compiled, [a, c])
    assert [third.accept(t) for t in (c, stop, c)] == [True, True, False]
    assert first.accept(c)
    assert a in allowed(compiled.start(), tokenizer), "the grammar itself is where it was"


def test_what_other_answers_used_up_does_not_end_an_answer(monkeypatch):
    tokenizer, _ = subject("byte-level")
    monkeypatch.setattr(grammar, "_MAX_LEXER_STATES", 600)
    regex = "[ab]*a[ab]{40}"  # it remembers 40 letters, so each answer makes new states
    compiled = GrammarCompiler(tokenizer, tokenizer.vocab_size + NUM_UNKNOWN).compile("regex", regex)
    letters, draw = [tokenizer.token_id(letter) for letter in "ab"], random.Random(0)
    answers = [(compiled.start(), []) for _ in range(20)]
    for step in range(90):
        if step == 40:
            answers += [(moved_on(compiled, ids), ids.copy()) for _, ids in [answers[0], *answers[-1:] * 20]]
        for matcher, ids in answers:
            ids.append(draw.choice(letters))
            assert matcher.accept(ids[-1])
            allowed(matcher, tokenizer)
    for matcher, ids in answers:
        may_end = tokenizer.token_id("<|im_end|>") in allowed(matcher, tokenizer)
        assert may_end == bool(re.fullmatch(regex, tokenizer.decode(ids)))

    monkeypatch.setattr(compiled, "build", builds := Mock(wraps=compiled.build))
    assert all(fits(compiled, tokenizer, "ab" * 20 + "a") for _ in range(3))
    assert builds.call_count == 1, "the next answers begin anew together, not each when it finds nothing left"


def test_a_grammar_is_compiled_once_while_it_is_among_the_latest():
    _, compiler = subject("byte-level")
    first = compiler.compile("regex", "kept")
    assert compiler.compile("regex", "kept") is first
    for number in range(64):
        compiler.compile("regex", f"other {number}")
    assert compiler.compile("regex", "kept") is not first


def test_threads_may_compile_and_answer_at_once():
    tokenizer, _ = subject("byte-level")
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size + NUM_UNKNOWN)

    def answer(seed):
        text = wander(compiler.compile("json_schema", json.dumps(INVOICE)), tokenizer, random.Random(seed))
        own = wander(compiler.compile("regex", f"<{seed % 5}>[a-c]{{3}}"), tokenizer, random.Random(seed))
        return is_invoice(json.loads(text)) and re.fullmatch(f"<{seed % 5}>[a-c]{{3}}", own)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(answer, range(40)))

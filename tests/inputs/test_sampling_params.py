"""SamplingParams refuses bad values and names the parameter."""

import dataclasses
import inspect
import itertools
import math
import re

import numpy as np
import pytest

from internvl_rt import RequestError, SamplingParams, Tagged, TaggedValue


def test_every_parameter_has_its_line_in_the_docstring_and_no_other_has():
    described = re.findall(r"^(\w+): \S", inspect.getdoc(SamplingParams), re.MULTILINE)
    assert described == [field.name for field in dataclasses.fields(SamplingParams)]


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 0},
        {"max_tokens": True},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_k": -1},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"seed": -1},
        {"min_tokens": 2000},
        {"max_tokens": 1 << 21},
        {"top_k": 2**31},
        {"n": 0},
        {"n": 129},
        {"logprobs": 21},
        {"logprobs": -1},
        {"logprobs": True},
        {"prompt_logprobs": 1.5},
        {"stop": ""},
        {"stop": ["a"] * 65},
        {"stop": ["a" * 1025]},
        {"stop_token_ids": ["a"]},
        {"stop_token_ids": [-1]},
        {"stop_token_ids": range(65)},
        {"temperature": math.inf},
        {"temperature": "1"},
        {"temperature": 10**400},
        {"temperature": True},
        {"top_p": None},
        {"top_k": 2.0},
        {"min_p": math.nan},
        {"repetition_penalty": math.inf},
        {"presence_penalty": -101},
        {"frequency_penalty": [1]},
        {"n": 1.0},
        {"n": None},
        {"seed": 2**64},
        {"seed": 1.0},
        {"ignore_eos": 1},
        {"ignore_eos": None},
        {"ignore_eos": "no"},
        {"stop": b"a"},
        {"stop": {"a": 1}},
        {"stop": 3},
        {"stop": np.array(3)},
        {"stop": itertools.repeat("a")},
        {"stop": ["a", None]},
        {"stop_token_ids": [True]},
        {"stop_token_ids": [1.0]},
        {"stop_token_ids": "12"},
        {"stop_token_ids": itertools.count()},
        {"regex": 3},
        {"regex": ["a"]},
        {"json_schema": ["a"]},
        {"json_schema": 7},
        {"json_schema": False},
        {"regex": b"a"},
        {"json_whitespace": "none"},
        {"json_whitespace": []},
        {"skip_special_tokens": 1},
        {"include_stop": 1},
        {"tagged": [TaggedValue("a", True, "b")]},
        {"tagged": True},
        {"grammar_after": ""},
        {"grammar_after": 1},
        {"logit_bias": {-1: 1}},
        {"logit_bias": {"x": 1}},
        {"logit_bias": {"-1": 1}},
        {"logit_bias": {"\u0661": 1}},
        {"logit_bias": {1.0: 1}},
        {"logit_bias": {True: 1}},
        {"logit_bias": {1: 100.5}},
        {"logit_bias": {1: math.nan}},
        {"logit_bias": {1: "1"}},
        {"logit_bias": {1: 1, "1": 1}},
        {"logit_bias": dict.fromkeys(range(1025), 1)},
        {"logit_bias": {2**31: 1}},
        {"logit_bias": [(1, 1)]},
        {"logit_bias": (1, 1)},
        {"logit_bias": "1"},
    ],
)
def test_values_outside_their_range_are_refused_by_name(fields):
    with pytest.raises(RequestError, match=next(iter(fields))):
        SamplingParams(**fields)


def test_none_stands_for_no_stops():
    params = SamplingParams(stop=None, stop_token_ids=None)
    assert (params.stop_strings, params.stop_ids) == ((), ())
    assert params == SamplingParams()


@pytest.mark.parametrize(
    "stops", [["a", "b"], ("a", "b"), iter(["a", "b"]), np.array(["a", "b"]), {"a": 1, "b": 2}.keys()]
)
def test_stops_may_come_in_any_iterable_and_are_read_once(stops):
    params = SamplingParams(stop=stops)
    assert params.stop_strings == ("a", "b") == params.stop_strings


def test_a_list_that_changes_later_changes_no_request():
    stops, ids, schema = ["a"], [1], {"type": "object"}
    params = SamplingParams(stop=stops, stop_token_ids=ids, json_schema=schema)
    stops.append("b")
    ids.append(2)
    schema["type"] = "string"
    assert (params.stop_strings, params.stop_ids) == (("a",), (1,))
    assert params.grammar == ("json_schema", '{"type": "object"}')


def test_numbers_of_numpy_become_plain_numbers():
    params = SamplingParams(max_tokens=np.int64(7), temperature=np.float32(0.5), seed=np.uint8(3), top_p=1)
    assert (type(params.max_tokens), type(params.temperature), type(params.seed)) == (int, float, int)
    assert params == SamplingParams(max_tokens=7, temperature=0.5, seed=3)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(SamplingParams)])
def test_an_error_is_one_short_line_however_long_the_value(name):
    for huge in ("\n\x1b[31m" * 1_000_000, 10**5000, ["\x1b" * 1_000_000], type("A\n" * 10_000, (), {})()):
        with pytest.raises(RequestError) as caught:
            SamplingParams(**{name: huge})
        assert str(caught.value).startswith(name)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 500


def test_biases_are_kept_in_one_form_that_nothing_changes():
    given = {"17": 1, 3: np.float32(-2.5)}
    params = SamplingParams(logit_bias=given)
    given[4] = 1
    assert params.biases == ((3, -2.5), (17, 1.0))
    assert params == dataclasses.replace(params) == SamplingParams(logit_bias={17: 1, 3: -2.5})
    assert hash(params) == hash(dataclasses.replace(params))
    assert len(SamplingParams(logit_bias=dict.fromkeys(range(1024), 1)).biases) == 1024
    assert SamplingParams(logit_bias={}) == SamplingParams(logit_bias=None) == SamplingParams()


def test_unknown_parameters_are_refused():
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)


TAGGED = Tagged((TaggedValue("<a>", True, "</a>"),))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"json_schema": "{}", "regex": "a"}, "json_schema and regex: expected at most one of them, got 2"),
        ({"tagged": TAGGED, "regex": "a"}, "regex and tagged: expected at most one"),
        ({"json_schema": "{}", "regex": "a", "tagged": TAGGED}, "json_schema and regex and tagged: .* got 3"),
    ],
)
def test_only_one_grammar_may_be_asked_for(fields, message):
    with pytest.raises(RequestError, match=message):
        SamplingParams(**fields)


def test_a_text_that_a_grammar_holds_after_needs_a_grammar():
    assert SamplingParams(regex="a", grammar_after="b").grammar_after == "b"
    with pytest.raises(RequestError, match=r"grammar_after: expected a grammar beside it .json_schema, regex, tagged."):
        SamplingParams(grammar_after="b")


def test_tagged_values_are_kept_as_text_that_nothing_changes():
    schema = {"type": "object"}
    values = [TaggedValue("<a>", schema, "</a>"), TaggedValue("<b>", True, "")]
    tagged = Tagged(values, trigger="<")
    schema["type"] = "string"
    values.clear()
    assert [value.schema for value in tagged.values] == ['{"type": "object"}', "true"]
    params = SamplingParams(tagged=tagged)
    assert params.grammar == ("tagged", tagged)
    assert hash(params) == hash(SamplingParams(tagged=dataclasses.replace(tagged)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TaggedValue(1, True, ""), "begin must be a string"),
        (lambda: TaggedValue("", None, ""), "json_schema must be a JSON schema as a dict"),
        (lambda: TaggedValue("", False, ""), "json_schema must be a JSON schema as a dict"),
        (lambda: TaggedValue("", True, None), "end must be a string"),
        (lambda: Tagged(()), "values must be a list of 1 to 128 of TaggedValue, got "),
        (lambda: Tagged(TAGGED.values * 129), "values must be a list of 1 to 128"),
        (lambda: Tagged([{"begin": "a"}]), "values must be a list of 1 to 128"),
        (lambda: Tagged(TAGGED.values, most=0), "most must be an integer from 1 to 128, or None, got 0"),
        (lambda: Tagged(TAGGED.values, most=129), "most must be an integer"),
        (lambda: Tagged(TAGGED.values, trigger=""), "trigger must be a string of 1 to 1,024 characters, or None"),
        (lambda: Tagged(TAGGED.values, trigger="<b"), r"values\[0\].begin must start with the trigger '<b', got '<a>'"),
        (lambda: Tagged(TAGGED.values, separator=None), "separator must be a string of 0 to 1,024 characters"),
    ],
)
def test_tagged_values_that_are_none_are_refused(make, message):
    with pytest.raises(RequestError, match=message):
        make()


def test_a_schema_is_written_no_further_than_it_is_compiled():
    shared: list[object] = ["a"] * 1000
    for _ in range(5):
        shared = [shared] * 1000  # 10**18 strings, were it written out
    with pytest.raises(RequestError, match=r"the json_schema has 65,5\d\d bytes or more, at most 65,536 are compiled"):
        _ = SamplingParams(json_schema={"enum": shared}).grammar


def test_grammars_come_as_text():
    assert SamplingParams().grammar is None
    assert SamplingParams(regex="a+").grammar == ("regex", "a+")
    assert SamplingParams(json_schema={"type": "object"}).grammar == ("json_schema", '{"type": "object"}')
    assert SamplingParams(json_schema=True).grammar == ("json_schema", "true")


def test_a_schema_that_is_no_json_is_refused():
    circle = {}
    circle["self"] = circle
    for schema in ({"a": object()}, circle):
        with pytest.raises(RequestError, match="json_schema: expected a JSON value"):
            SamplingParams(json_schema=schema)

"""SamplingParams refuses bad values and names the parameter."""

import math

import pytest

from internvl_rt import RequestError, SamplingParams


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
        {"json_schema": 7},
        {"json_schema": False},
        {"regex": b"a"},
        {"json_whitespace": "none"},
        {"json_whitespace": []},
        {"skip_special_tokens": 1},
    ],
)
def test_values_outside_their_range_are_refused_by_name(fields):
    with pytest.raises(RequestError, match=next(iter(fields))):
        SamplingParams(**fields)


def test_unknown_parameters_are_refused():
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)


def test_only_one_grammar_may_be_asked_for():
    with pytest.raises(RequestError, match="json_schema and regex: expected at most one"):
        SamplingParams(json_schema="{}", regex="a")


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
            SamplingParams(json_schema=schema).grammar  # noqa: B018  (reading the property raises)

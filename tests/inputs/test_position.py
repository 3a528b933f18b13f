from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internvl_rt.errors import RequestError
from internvl_rt.inputs.position import STRIDES, auto_stride, build_positions, parse_delta
from internvl_rt.inputs.prompt import VisualSpan

# A prompt is a list of runs: the number of text tokens up to a picture's <img>, and the number of its visual tokens.
prompts = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 700)), max_size=4)


def spans_of(runs):
    spans, start = [], 0
    for num_text, num_visual in runs:
        spans.append(VisualSpan(start + num_text, num_visual))
        start += num_text + num_visual
    return spans, start


def by_the_rule(num_tokens, spans, strides):
    """Computes the positions one token after the other, in exact fractions, by the rule of V2PE."""
    stride_of = {
        i: n for span, n in zip(spans, strides, strict=True) for i in range(span.start, span.start + span.num_tokens)
    }
    positions = [Fraction(-1)]
    for i in range(num_tokens + 1):
        last = positions[-1]
        positions.append(last + Fraction(stride_of[i], 256) if i in stride_of else Fraction(-(-last // 1)) + 1)
    return positions[1:-1], positions[-1]


@settings(deadline=None)
@given(prompts, st.integers(1, 9), st.data())
def test_positions_follow_the_rule_token_by_token(runs, num_last, data):
    spans, num_tokens = spans_of(runs)
    num_tokens += num_last
    strides = data.draw(st.lists(st.sampled_from(STRIDES), min_size=len(spans), max_size=len(spans)))
    positions, after = build_positions(num_tokens, spans, strides)
    expected, expected_after = by_the_rule(num_tokens, spans, strides)
    assert positions.dtype == np.float32
    assert positions.tolist() == expected
    assert after == expected_after


@settings(deadline=None)
@given(prompts)
def test_delta_one_gives_the_plain_positions(runs):
    spans, num_tokens = spans_of(runs)
    positions, after = build_positions(num_tokens, spans, [256] * len(spans))
    assert positions.tolist() == list(range(num_tokens))
    assert after == num_tokens


def test_a_picture_that_ends_between_two_integers_is_followed_by_the_next_but_one():
    positions, after = build_positions(52, [VisualSpan(1, 48)], [4])
    assert positions[[0, 1, 48, 49, 50, 51]].tolist() == [0, 4 / 256, 0.75, 2, 3, 4]
    assert after == 5


def test_every_delta_of_the_training_is_accepted_and_nothing_else():
    assert [parse_delta(2.0**-k) for k in range(9)] == list(STRIDES)
    assert parse_delta(1) == 256
    for delta in (0, 2, -0.25, 0.3, 1 / 512, float("nan"), float("inf"), True, "auto", None):
        with pytest.raises(RequestError, match="power of two from 1 to 1/256"):
            parse_delta(delta)


@pytest.mark.parametrize(("limit", "stride"), [(1000, 256), (1000 - 1, 128), (600, 128), (350, 32), (204, 1)])
def test_the_automatic_stride_is_the_largest_that_stays_within_the_limit(limit, stride):
    spans = [VisualSpan(10, 256), VisualSpan(300, 544)]
    assert auto_stride(1000, spans, limit) == stride
    assert build_positions(1000, spans, [stride] * 2)[1] <= limit
    if stride < 256:
        assert build_positions(1000, spans, [stride * 2] * 2)[1] > limit


def test_a_prompt_that_no_delta_fits_is_refused():
    with pytest.raises(RequestError, match=r"takes 204 positions even with v2pe_delta 1/256, expected at most 203"):
        auto_stride(1000, [VisualSpan(10, 256), VisualSpan(300, 544)], 203)
    with pytest.raises(RequestError, match="takes 11 positions"):
        auto_stride(11, [], 10)
    assert auto_stride(11, [], 11) == 256

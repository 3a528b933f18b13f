"""AnswerText decides when text becomes visible: at stop strings, whitespace and the end of an answer."""

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from internvl_rt import SamplingParams, Tagged, TaggedValue
from internvl_rt.engine.reply import AnswerText, unprepared_reply


def test_a_reply_to_a_request_that_was_late_counts_nothing():
    reply = unprepared_reply(SamplingParams(n=2, logprobs=1), time.perf_counter() - 1.0)
    assert [(choice.text, choice.finish_reason, choice.logprobs) for choice in reply.choices] == [
        ("", "timeout", ())
    ] * 2
    assert (reply.usage.total_tokens, reply.usage.cached_tokens, reply.timings.num_decoded) == (0, 0, 0)
    assert 1.0 <= reply.timings.total_s < 10.0
    assert reply.timings.render()


class Pieces:
    """Stands in for a tokenizer's TextStream: token id i means the i-th piece."""

    def __init__(self, pieces):
        self.pieces = pieces

    def push(self, token_id):
        return self.pieces[token_id]

    def flush(self):
        return ""


def visible_pieces(pieces, *, begun=False, strips=True, **params):
    answer = AnswerText(Pieces(pieces), SamplingParams(**params), begun=begun, strips=strips)
    out = []
    for token_id in range(len(pieces)):
        out.append(answer.push(token_id))
        if answer.stopped:
            break
    out.append(answer.finish())
    assert "".join(out) == answer.text
    return out, answer


def test_text_without_stop_strings_is_visible_at_once():
    assert visible_pieces(["Hel", "lo", " you"])[0] == ["Hel", "lo", " you", ""]


def test_surrounding_whitespace_never_becomes_visible():
    out, answer = visible_pieces([" ", "\n a", " \n", " b ", "\n"])
    assert answer.text == "a \n b"
    assert out == ["", "a", "", " \n b", "", ""]


def test_the_whitespace_with_which_a_begun_answer_goes_on_is_kept():
    out, answer = visible_pieces([" ", "\n a", " \n", " b ", "\n"], begun=True)
    assert answer.text == " \n a \n b"
    assert out == ["", " \n a", "", " \n b", "", ""]


def test_the_whitespace_around_what_follows_a_raw_prompt_is_kept():
    out, answer = visible_pieces([" ", "\n a", " \n", " b ", "\n"], begun=True, strips=False)
    assert answer.text == " \n a \n b \n"
    assert out == [" ", "\n a", " \n", " b ", "\n", ""]


TOOLS = Tagged((TaggedValue("<a>", True, "</a>"),), trigger="<a>")


@pytest.mark.parametrize("grammar", [{"regex": "(?s).*"}, {"json_schema": True}, {"tagged": TOOLS}])
def test_an_answer_with_a_grammar_keeps_all_its_text(grammar):
    out, answer = visible_pieces([" ", "\n a", " \n", " b ", "\n"], **grammar)
    assert answer.text == " \n a \n b \n"
    assert out == [" ", "\n a", " \n", " b ", "\n", ""]
    assert visible_pieces([" a", " E", "ND"], stop="END", **grammar)[1].text == " a "


def test_stop_string_across_pieces_ends_the_answer_before_it():
    out, answer = visible_pieces(["one E", "N", "D two"], stop="END")
    assert (out, answer.text, answer.stopped) == (["one", "", "", ""], "one", True)


def test_held_back_beginning_of_a_stop_string_is_released_when_it_does_not_come():
    out, answer = visible_pieces(["a E", "N", "x"], stop=["END"])
    assert (out, answer.stopped) == (["a", "", " ENx", ""], False)


def test_held_back_beginning_is_released_at_the_end_of_the_answer():
    assert visible_pieces(["a E", "N"], stop=["END"])[1].text == "a EN"


def test_earliest_stop_string_wins():
    assert visible_pieces(["a b c"], stop=["c", "b"])[1].text == "a"


def test_stop_string_before_min_tokens_is_text():
    assert visible_pieces(["x.", "y", ".z"], stop=".", min_tokens=3)[1].text == "x.y"


def test_an_included_stop_string_ends_the_text_with_the_whitespace_before_and_in_it():
    assert visible_pieces([" one \n E", "N", "D two"], stop="END", include_stop=True)[1].text == "one \n END"
    assert visible_pieces([" one", " \n", "two"], stop="\n", include_stop=True)[1].text == "one \n"
    assert visible_pieces([" ", " \n", "two"], stop="\n", include_stop=True)[1].text == "\n"
    assert visible_pieces(["a b c"], stop=["bc", " c", "b c"], include_stop=True)[1].text == "a b c"
    assert visible_pieces([" a EN "], stop=["END"], include_stop=True)[1].text == "a EN"
    assert visible_pieces(["a b"], stop=[" b", "b"], include_stop=False)[1].text == "a"


@settings(deadline=None, max_examples=1000)
@example(["ab", "b"], ["b", "abb"])  # the shorter stop string ends before the longer one
@example(["abb"], ["b", "abb"])
@given(st.lists(st.text("ab \n", max_size=4), max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_streamed_text_equals_cutting_the_whole_text(pieces, stops):
    whole = "".join(pieces)
    ends_and_starts = [(whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole]
    expected = whole[: min(ends_and_starts)[1]] if ends_and_starts else whole
    assert visible_pieces(pieces, stop=stops)[1].text == expected.strip()
    stop = whole[min(ends_and_starts)[1] : min(ends_and_starts)[0]] if ends_and_starts else ""
    included = f"{expected.lstrip()}{stop}" if stop else expected.strip()
    assert visible_pieces(pieces, stop=stops, include_stop=True)[1].text == included


@pytest.mark.parametrize("stop", ["", ["a", ""], [3]])
def test_useless_stop_strings_are_refused(stop):
    with pytest.raises(
        ValueError, match="stop must be a string of 1 to 1,024 characters, or a list of at most 64 such"
    ):
        SamplingParams(stop=stop)

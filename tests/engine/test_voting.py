"""A vote counts final answers, however they are written, and ends when it is decided."""

from pathlib import Path

import pytest

from internvl_rt import MajorityVote, RequestError, SamplingParams
from internvl_rt.engine.voting import count_votes, read_final_answer
from support.calls import ask, check_idle, load

SAMPLES = Path(__file__).parents[2] / "internvl_rt" / "tiny" / "samples"
ASKED = ask("Read the digits.", SAMPLES / "862053.png")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("4719", "4719"),
        ("4,719", "4719"),
        ("1,2,3", "1,2,3"),
        ("4719.0", "4719"),
        ("-0.50", "-0.5"),
        ("+007", "7"),
        ("0.0", "0"),
        ("-0", "0"),
        ("First 3.\nThen 4.\nFinal answer: 7", "7"),
        ("Final Answer: 3? No.\nFinal answer: **7**.", "7"),
        ("So the answer is  A. ", "a"),
        ("The answer is: (B)", "b"),
        ("步骤。\n答案\uff1a四。", "四"),
        (r"Thus \boxed{\frac{1}{2}} holds.", r"\frac{1}{2}"),
        (r"\boxed{1} or \boxed{2}", "2"),
        (r"\boxed{open", r"\boxed{open"),
        (r"\boxed{1} and \boxed{open", "1"),
        (r"\boxed{f(x)}", "f(x)"),
        ("(1,234)", "1234"),
        ("final answer" + "\n" * 5000 + "7", "7"),
        ("I think it is\nA  red Cat!", "a red cat"),
        ("", None),
        (" \n ", None),
        ("...", None),
    ],
)
def test_final_answers_that_say_the_same_are_equal(text, answer):
    assert read_final_answer(text) == answer


def test_the_answer_that_most_come_to_wins_and_the_earliest_of_them_is_shown():
    keys = [MajorityVote().key(text) for text in ("8", "It is\n7", "", "Final answer: 7.0", "9")]
    assert count_votes(keys) == [0.2, 0.4, 0.0, 0.4, 0.2]


@pytest.mark.parametrize(
    ("keys", "num_left", "decided"),
    [
        ([], 8, False),
        (["7", "7"], 2, False),  # the others may come to a tie
        (["7", "7", "7"], 2, True),
        (["7", "7", "7", "8"], 2, False),
        (["7", "7", "7", "8"], 1, True),
        (["7", "8"], 0, False),  # a tie, which the order of answers decides
        ([None, None, None], 1, False),
    ],
)
def test_a_vote_is_decided_when_no_answer_to_come_can_change_who_wins(keys, num_left, decided):
    assert MajorityVote(stop_decided=True).is_decided(keys, num_left) is decided
    assert MajorityVote().is_decided(keys, num_left) is False


@pytest.mark.parametrize("stop", [False, True])
def test_a_vote_ranks_the_answers_of_an_engine(stop):
    with load() as engine:
        likely = {engine.tokenizer.encode("7")[0]: 15.0}  # seven of nine answers are 7
        params = SamplingParams(regex="(7|8[0-9]{60})", temperature=5.0, seed=0, logit_bias=likely)
        ranking = engine.best_of(ASKED, 9, critic=MajorityVote(stop_decided=stop), params=params)
        assert ranking.text == "7"
        assert (ranking.num_unfinished > 0) is stop
        scores = [each.score for each in ranking.answers]
        assert scores == sorted(scores, reverse=True)
        assert scores[0] == sum(each.text == "7" for each in ranking.answers) / len(ranking.answers)
        check_idle(engine)


def test_final_answers_may_be_read_by_a_function_of_the_caller():
    params = SamplingParams(regex="[0-9]{4}", temperature=5.0, seed=1)
    with load() as engine:
        vote = MajorityVote(final_answer=lambda text: text[0] if text[0] > "4" else None)
        ranking = engine.best_of(ASKED, 8, critic=vote, params=params)
        assert all((each.score == 0) == (each.text[0] <= "4") for each in ranking.answers)
        with pytest.raises(RequestError, match="final_answer: expected a function that returns a text or None, got 7"):
            engine.best_of(ASKED, 8, critic=MajorityVote(final_answer=lambda _: 7), params=params)
        check_idle(engine)


@pytest.mark.parametrize("given", [{"final_answer": "abc"}, {"stop_decided": 1}])
def test_a_vote_of_wrong_arguments_is_refused(given):
    with pytest.raises(RequestError, match=next(iter(given))):
        MajorityVote(**given)


def test_a_text_of_many_boxes_is_read_fast():
    assert read_final_answer(r"\boxed{" * 100_000) == (r"\boxed{" * 100_000).lower()

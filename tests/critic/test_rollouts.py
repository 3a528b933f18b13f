"""Pairs of answers are made by the rules of MMPR: right with wrong ones, and continuations without the picture."""

from dataclasses import replace

import pytest

from internvl_rt import RequestError, SamplingParams
from internvl_rt.critic import rollouts as module
from internvl_rt.critic.pair_file import PairRecord
from internvl_rt.critic.rollouts import (
    Rollout,
    check_rollouts,
    continuation_pairs,
    correctness_pairs,
    extract_answer,
    same_answer,
)
from support.calls import check_idle, load

FINAL = "Two and two\nare four.\n\nFinal answer: 4"


@pytest.mark.parametrize(
    ("response", "result"),
    [
        (FINAL, "4"),
        ("Two\nlines.\nFinal Answer: 4 ", "4"),
        ("两行\n字。\n答案: 四", "四"),
        ("a\nFinal answer: 3? No.\nFinal answer: 4", "4"),
        ("a\nFinal answer: 1\nFinal answer: 2\nFinal answer: 3", None),  # three are too many
        ("One line.\nFinal answer: 4", None),  # no reasoning of several lines
        ("\n\nFinal answer: 4", None),  # no reasoning
        ("a\n\nFinal answer: 4\nand more", None),  # two lines
        ("Two\nlines.\nIt is 4.", None),
        ("a\n\nFinal answer:", ""),
    ],
)
def test_the_result_of_an_answer_stands_in_its_last_line(response, result):
    assert extract_answer(response) == result


@pytest.mark.parametrize(
    ("response", "result"),
    [
        (r"We add them. Answer: \boxed{4}", "4"),
        (r"First \boxed{1}, and then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"A box that nobody closes: \boxed{\frac{1}", r"A box that nobody closes: \boxed{\frac{1}"),
        ("There is no box in this one.", "There is no box in this one."),
        (r"Short: \boxed{4}", None),
    ],
)
def test_the_result_of_an_answer_stands_in_its_last_box(response, result):
    assert extract_answer(response, "boxed") == result


def test_another_form_is_refused():
    with pytest.raises(RequestError, match="form must be one of"):
        extract_answer(FINAL, "xml")


@pytest.mark.parametrize(
    ("result", "truth", "same"),
    [
        ("Seven", "seven", True),
        ("B. seven", "b", True),
        ("(B)", "B", True),
        ("(C)", "B", False),
        ("3.1416", "3.14159", True),
        ("3.15", "3.14159", False),
        ("45°", "45 degrees", True),
        ("3.7", "3", False),  # not option 3
        ("0.0", "0", False),  # a truth of 0 is compared as text, as officially
        ("nan", "7", False),
        ("7 or 8", "7", False),
        ("", "7", False),
    ],
)
def test_results_are_the_same_as_texts_as_options_or_as_numbers(result, truth, same):
    assert same_answer(result, truth) is same


def test_answers_are_judged_by_their_results():
    responses = [FINAL, FINAL.replace("4", "5"), "4"]
    assert check_rollouts(responses, "4") == [
        Rollout(FINAL, True, "4"),
        Rollout(responses[1], False, "5"),
        Rollout("4", False, None),
    ]
    asked = []
    judged = check_rollouts(responses, "four", is_same=lambda *pair: asked.append(pair) or pair[0] == "5")
    assert asked == [("4", "four"), ("5", "four")]
    assert [each.is_correct for each in judged] == [False, True, False]


def right(text, result=None):
    return Rollout(text, True, result)


def wrong(text, result=None):
    return Rollout(text, False, result)


def answers_of(records):
    return [(record.chosen, record.rejected) for record in records]


def test_every_right_answer_is_paired_with_every_wrong_one():
    records = correctness_pairs("Why?", "a.png", [right("r1"), wrong("w1"), right("r2"), wrong("w2")], answer="so")
    assert sorted(answers_of(records)) == [("r1", "w1"), ("r1", "w2"), ("r2", "w1"), ("r2", "w2")]
    assert set(records) == {PairRecord("Why?", *pair, ("a.png",), "so") for pair in answers_of(records)}


@pytest.mark.parametrize("given", [[], [right("r")], [wrong("w"), wrong("v")], [right("r"), wrong("")]])
def test_there_is_no_pair_without_a_right_and_a_wrong_answer(given):
    assert correctness_pairs("Why?", (), given) == []


def test_a_wrong_result_that_holds_the_right_one_makes_no_pair():
    given = [right("r", "Seven"), wrong("both", "seven or eight"), wrong("other", "eight"), wrong("none")]
    assert answers_of(correctness_pairs("Why?", (), given)) == [("r", "other"), ("r", "none")]
    assert len(correctness_pairs("Why?", (), [right("r"), wrong("both", "seven or eight")])) == 1


def test_wrong_answers_with_and_without_a_result_are_drawn_apart():
    given = [right(f"r{index}", "7") for index in range(6)]
    given += [wrong(f"w{index}", "8") for index in range(6)] + [wrong(f"n{index}") for index in range(6)]
    records = correctness_pairs("Why?", (), given)
    assert [record.rejected[0] for record in records] == ["w"] * 15 + ["n"] * 15
    assert len(set(records)) == 30
    assert correctness_pairs("Why?", (), given) == records
    assert correctness_pairs("Why?", (), given, seed=1) != records
    assert len(correctness_pairs("Why?", (), given, max_pairs=2)) == 4


def test_a_pair_that_occurs_twice_is_kept_once():
    assert len(correctness_pairs("Why?", (), [right("r"), right("r"), wrong("w"), wrong("w")])) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rollouts": right("r")}, "rollouts: expected a list"),
        ({"rollouts": [right("r"), "w"]}, r"rollouts\[1\]: expected a Rollout, got 'w'"),
        ({"max_pairs": 0}, "max_pairs must be an integer of at least 1, got 0"),
        ({"seed": None}, "seed must be"),
        ({"question": 7}, "question must be"),
        ({"images": {"a": 1}}, "images must be"),
        ({"images": ("a.png", "b.png")}, "question: expected a <image> for each of 2 pictures, got 0"),
    ],
)
def test_rollouts_that_cannot_be_paired_are_refused(given, message):
    with pytest.raises(RequestError, match=f"^{message}"):
        correctness_pairs(**{"question": "Why?", "images": (), "rollouts": [right("r"), wrong("w")]} | given)


@pytest.mark.parametrize("values", [(7, True), ("a", 1), ("a", True, 7)])
def test_a_rollout_of_wrong_types_is_refused(values):
    with pytest.raises(RequestError, match="must be"):
        Rollout(*values)


@pytest.fixture(scope="module")
def engine():
    return load(kv_cache_bytes=1 << 24, number_images=False, seed=3)


class Recorder:
    """Stands for an engine whose answers are short."""

    def __init__(self, engine):
        self.engine, self.calls = engine, []

    def generate(self, batch, params, **options):
        self.calls.append((batch, params, options))
        return self.engine.generate(batch, replace(params, max_tokens=8), **options)


def test_a_rejected_answer_continues_the_first_half_of_the_chosen_one_without_the_picture(engine):
    recorder = Recorder(engine)
    given = [
        PairRecord("<image>\nRead the digits.", "They are  4 7 1 9", images=("a.png",), answer="4719"),
        PairRecord("How many?", "Two"),
    ]
    records = continuation_pairs(recorder, given)
    ((batch, params, options),) = recorder.calls
    assert batch == [
        [{"role": "user", "content": "Read the digits."}, {"role": "assistant", "content": "They are"}],
        [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": ""}],
    ]
    assert (params.max_tokens, params.temperature, params.top_k, params.top_p) == (2048, 0.7, 50, 1.0)
    assert options == {"progress": False}
    assert [(each.question, each.chosen, each.images, each.answer) for each in records] == [
        (each.question, each.chosen, each.images, each.answer) for each in given
    ]
    assert records[0].rejected.startswith("They are")
    check_idle(engine)


def test_several_continuations_of_an_answer_are_several_pairs(engine):
    given = [PairRecord("Read.", "one two three"), PairRecord("Count.", "four five six", "old")]
    params = SamplingParams(max_tokens=6, temperature=2.0, n=3, ignore_eos=True)
    records = continuation_pairs(engine, given, params)
    assert [record.chosen for record in records] == ["one two three"] * 3 + ["four five six"] * 3
    assert all(record.rejected.startswith(record.chosen.split()[0]) for record in records)
    assert len({record.rejected for record in records}) > 2


def test_the_half_of_an_odd_number_of_words_is_rounded_down():
    assert module._first_half("a b c d e") == "a b"
    assert module._first_half(" a  b c") == "a"  # five words, of which two are empty


@pytest.mark.parametrize("given", [PairRecord("a", "b"), [("a", "b")]])
def test_what_is_no_list_of_records_is_not_continued(engine, given):
    recorder = Recorder(engine)
    with pytest.raises(RequestError, match=r"^records"):
        continuation_pairs(recorder, given)
    assert not recorder.calls

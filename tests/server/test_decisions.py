"""`/v1/decisions`: probabilities that belong to what the model would answer, on one prefix."""

import asyncio
import math
from collections.abc import Iterator
from typing import Any

import pytest

from support.serving import Running, picture_url, running

QUESTIONS: list[dict[str, Any]] = [
    {"type": "predicate", "instructions": "The picture shows digits.", "name": "digits"},
    {
        "type": "choice",
        "instructions": "Read the digits.",
        "choices": [{"value": "4719"}, {"value": "42", "description": "the answer"}],
    },
    {"type": "choice", "instructions": "Is it dark?", "choices": [{"value": True}, {"value": "maybe"}]},
    {
        "type": "score",
        "instructions": "How neat is it?",
        "levels": [{"label": "bad"}, {"label": "fair"}, {"label": "good"}],
    },
]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as made:
        yield made


def given(text: str = "Look. " * 100) -> list[dict[str, Any]]:
    content = [{"type": "input_image", "image_url": picture_url()}, {"type": "input_text", "text": text}]
    return [{"role": "user", "content": content}]


def test_questions_about_a_picture_are_answered_in_order(server: Running) -> None:
    answer = server.client().decisions.create(model="tiny", input=given(), questions=QUESTIONS)
    predicate, choice, typed, score = answer.answers
    assert (predicate.type, predicate.name) == ("predicate", "digits")
    assert 0 <= predicate.probability <= 1
    for each in (choice, typed, score):
        assert math.isclose(sum(one.probability for one in each.probabilities), 1)
        assert 0 <= each.confidence <= 1
    assert choice.choice == max(choice.probabilities, key=lambda one: one.probability).value
    assert typed.probabilities[0].value is True
    levels = score.probabilities
    assert [(one.label, one.value) for one in levels] == [("bad", 0), ("fair", 1), ("good", 2)]
    assert math.isclose(score.score, sum(one.value * one.probability for one in levels))


def test_probabilities_are_those_of_the_engines_scores(server: Running) -> None:
    answer = server.post("/v1/decisions", {"input": "Hello.", "questions": [QUESTIONS[0]]}).json()["answers"][0]
    text = "Hello.\n\nThe picture shows digits.\n\nIs this true? Answer with Yes or No alone."
    core = server.service.core
    messages = [{"role": "user", "content": text}]
    scores = asyncio.run(server.service.engine.score(messages, ["Yes", "No"], include_end=True))
    yes, no = (math.exp(score.total) for score in scores)
    assert math.isclose(answer["probability"], yes / (yes + no), rel_tol=1e-5)
    assert core.stats()["running"] == 0


def test_the_input_is_computed_once_for_all_questions(server: Running) -> None:
    before = server.service.engine.stats()
    questions = [{**QUESTIONS[0], "instructions": f"It shows {number} digits."} for number in range(40)]
    answer = server.client().decisions.create(model="tiny", input=given("Watch. " * 100), questions=questions)
    after = server.service.engine.stats()
    assert len(answer.answers) == 40
    num_tiles = 5
    assert after["encoded_tiles"] - before["encoded_tiles"] <= num_tiles
    hits = after["prefix_hit_tokens"] - before["prefix_hit_tokens"]
    queried = after["prefix_queried_tokens"] - before["prefix_queried_tokens"]
    num_input = answer.usage.input_tokens // 40
    assert hits / queried > 0.7, "all requests but the first one find the input"
    assert answer.usage.input_tokens_details.cached_tokens > 38 * (num_input // 64 * 64) * 0.7


@pytest.mark.slow
def test_400_questions_are_taken(server: Running) -> None:
    questions = [{"type": "predicate", "instructions": f"It has {number}."} for number in range(400)]
    answer = server.client(timeout=120).decisions.create(model="tiny", input=given("See."), questions=questions)
    assert len(answer.answers) == 400
    server.wait_until_idle()


@pytest.mark.parametrize(
    ("questions", "param"),
    [
        ([], "questions"),
        ([QUESTIONS[0]] * 401, "questions"),
        ([{"type": "guess", "instructions": "x"}], "questions[0].type"),
        ([{"type": "predicate", "instructions": " "}], "questions[0].instructions"),
        (
            [{"type": "predicate", "instructions": [{"type": "input_image", "image_url": "x"}]}],
            "questions[0].instructions[0]",
        ),
        ([QUESTIONS[0], {"type": "choice", "instructions": "x", "choices": [{"value": "a"}]}], "questions[1].choices"),
        (
            [{"type": "choice", "instructions": "x", "choices": [{"value": "a"}, {"value": "a"}]}],
            "questions[0].choices",
        ),
        (
            [{"type": "choice", "instructions": "x", "choices": [{"value": "true"}, {"value": True}]}],
            "questions[0].choices",
        ),
        (
            [{"type": "score", "instructions": "x", "levels": [{"label": str(i)} for i in range(11)]}],
            "questions[0].levels",
        ),
        (
            [{"type": "choice", "instructions": "x", "choices": [{"value": str(i)} for i in range(255)]}] * 17,
            "questions",
        ),
    ],
)
def test_a_wrong_question_is_refused(server: Running, questions: list[dict[str, Any]], param: str) -> None:
    answer = server.post("/v1/decisions", {"input": "x", "questions": questions})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_questions_may_be_asked_about_nothing(server: Running) -> None:
    for nothing in ([], "", [{"role": "system", "content": "Be brief."}]):
        answer = server.post("/v1/decisions", {"input": nothing, "questions": QUESTIONS[:1]})
        assert answer.status_code == 200, answer.text


def test_questions_have_a_time_limit(server: Running) -> None:
    answer = server.post("/v1/decisions", {"input": given(), "questions": QUESTIONS * 50, "timeout_s": 0.01})
    assert (answer.status_code, answer.json()["error"]["code"]) == (408, "timeout")
    assert answer.headers["x-should-retry"] == "false"
    server.wait_until_idle()


def test_a_broken_picture_is_named(server: Running) -> None:
    broken = [{"role": "user", "content": [{"type": "input_image", "image_url": "data:;base64,aGVsbG8="}]}]
    answer = server.post("/v1/decisions", {"input": broken, "questions": QUESTIONS})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input[0].content[0].image_url")
    server.wait_until_idle()


@pytest.mark.parametrize("given", [[], [{"type": "reasoning"}]], ids=["nothing", "reasoning alone"])
def test_an_input_without_messages_is_as_no_input(server: Running, given: list[dict[str, Any]]) -> None:
    questions = [{"type": "predicate", "instructions": "Is it warm?"}]
    without = server.post("/v1/decisions", {"questions": questions}).json()
    answer = server.post("/v1/decisions", {"questions": questions, "input": given})
    assert answer.status_code == 200
    assert answer.json()["answers"][0]["probability"] == pytest.approx(without["answers"][0]["probability"])

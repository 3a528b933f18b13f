"""VisualPRM's scores: the same alone, together, in chunks and from the cache; one pass; and what it refuses."""

import json
import math
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from internvl_rt import ContextLengthError, NotFiniteError, RawPrompt, RequestError, SamplingParams
from internvl_rt.critic import VisualPRM, split_steps
from internvl_rt.errors import CheckpointError
from support.calls import SHORT, advance, ask, check_idle, load, submit

SAMPLES = Path(__file__).parents[2] / "internvl_rt" / "tiny" / "samples"
QUESTION = ask("Read the digits.", SAMPLES / "862053.png")
ANSWERS = [
    "862053",
    "There are six digits.\n\n862053",
    "8\n\n86\n\n862\n\n8620\n\n86205\n\n862053",
    "I see\ntwo lines.\n\n\n\n7",
    "4719",
    "It is 862035.\n\nNo.\n\n862053",
]


@pytest.fixture(scope="module")
def critic():
    with VisualPRM(load(dtype="float32")) as critic:
        yield critic


@pytest.mark.parametrize(
    ("response", "max_steps", "steps"),
    [
        ("one", 12, ("one",)),
        ("one\n\ntwo\nlines\n\nthree", 12, ("one", "two\nlines", "three")),
        ("a\n\nb\n\nc\n\nd\n\ne", 2, ("a\n\nb\n\nc", "d\n\ne")),
        ("a\n\nb\n\nc", 1, ("a\n\nb\n\nc",)),
        ("a\n\n\n\nb", None, ("a", "", "b")),  # as the official code: what is between two breaks, nothing or not
        ("a\n\n\nb", None, ("a", "\nb")),
        (
            "\n\n".join("abcdefghijklmn"),
            12,
            tuple("\n\n".join(pair) for pair in ("ab", "cd", "ef", "gh", "ij", "kl", "mn")),
        ),
        ("\n\n".join("abcdefghijklmn"), None, tuple("abcdefghijklmn")),
    ],
)
def test_an_answer_is_split_at_blank_lines_and_neighbours_are_joined(response, max_steps, steps):
    assert split_steps(response, max_steps) == steps


WAYS = {
    "together": {},
    "in chunks": {"max_tokens_per_step": 16},
    "few places": {"max_num_seqs": 2},
    "without reuse": {"prefix_cache": False},
    "small blocks": {"block_size": 16},
    "a small cache": {"block_size": 16, "kv_cache_bytes": 900_000, "max_model_len": 320},
}


@pytest.mark.parametrize("way", WAYS)
def test_steps_score_the_same_however_they_are_computed(critic, way):
    alone = [critic.score_steps(QUESTION, answer) for answer in ANSWERS]
    with VisualPRM(load(dtype="float32", **WAYS[way])) as other:
        for _ in range(2):
            together = other.score_responses(QUESTION, ANSWERS)
            assert [each.steps for each in together] == [split_steps(answer) for answer in ANSWERS]
            assert [each.index for each in together] == list(range(len(ANSWERS)))
            for each, single in zip(together, alone, strict=True):
                assert len(each.scores) == len(each.steps)
                assert each.scores == pytest.approx(single.scores, abs=1e-5)
                assert all(0 < score < 1 for score in each.scores)
                assert each.score == pytest.approx(sum(single.scores) / len(single.scores), abs=1e-5)
        check_idle(other.engine)


def test_eight_answers_take_one_prompt_and_their_own_tokens():
    """At most 1.3 times as many tokens are computed as the question has once and the answers by themselves have."""
    answers = [f"There are six digits.\n\nThe first is {n}.\n\nThey are {n}62053." for n in range(8)]
    with VisualPRM(load(dtype="float32")) as critic:
        engine = critic.engine
        scored = critic.score_responses(QUESTION, answers)
        assert len({each.usage.prompt_tokens for each in scored}) <= 2
        computed = sum(each.usage.prompt_tokens - each.usage.cached_tokens for each in scored)
        num_own = [len(engine.tokenizer.encode("".join(each.steps))) for each in scored]
        num_frames = [9 * len(each.steps) for each in scored]  # of turns around a step
        num_question = scored[0].usage.prompt_tokens - num_own[0] - num_frames[0]
        assert computed <= 1.3 * (num_question + sum(num_own) + sum(num_frames))
        assert engine.stats()["encoded_tiles"] == engine.describe(QUESTION).layouts[0].num_tiles
        again = critic.score_responses(QUESTION, answers)
        assert sum(each.usage.prompt_tokens - each.usage.cached_tokens for each in again) <= computed
        assert engine.stats()["encoded_tiles"] == engine.describe(QUESTION).layouts[0].num_tiles


def test_eight_answers_take_no_longer_than_one_dialogue_of_all_of_them():
    """At most 1.3 times as long; measured 0.7 (FACTS 54)."""
    answers = [f"There are six digits.\n\nThe first is {n}.\n\nThey are {n}62053." for n in range(8)]

    def seconds(call):
        start_s = time.perf_counter()
        call()
        return time.perf_counter() - start_s

    with VisualPRM(load(dtype="float32", prefix_cache=False, visual_cache_bytes=0)) as critic:
        together = partial(critic.score_responses, QUESTION, answers)
        one = partial(VisualPRM(critic.engine, max_steps=None).score_steps, QUESTION, "\n\n".join(answers))
        times = [(seconds(together), seconds(one)) for _ in range(12)]
        assert min(first for first, _ in times) < 1.3 * min(second for _, second in times)


def test_the_best_answers_come_first_and_of_equal_ones_the_earlier(critic):
    best = critic.select_best(QUESTION, [*ANSWERS, ANSWERS[2]])
    assert [each.score for each in best] == sorted((each.score for each in best), reverse=True)
    places = [each.index for each in best]
    assert places.index(2) < places.index(6) or best[places.index(6)].score > best[places.index(2)].score
    assert sorted(places) == list(range(7))


def test_a_critic_is_a_function_of_a_conversation_and_an_answer(critic):
    found = critic(QUESTION, ANSWERS[1])
    assert found.scores == pytest.approx(critic.score_steps(QUESTION, ANSWERS[1]).scores, abs=1e-5)


def test_questions_without_a_picture_and_with_several_are_scored(critic):
    text = critic.score_steps(ask("What is 2 + 2?"), "4")
    two = critic.score_steps(ask("Which is larger?", SAMPLES / "42.png", SAMPLES / "905.png"), "905")
    assert text.usage.image_tokens == 0 < two.usage.image_tokens
    assert not math.isclose(text.score, two.score, abs_tol=1e-6)


def test_the_system_message_of_a_conversation_is_not_the_critic_s(critic):
    told = [{"role": "system", "content": "Answer with digits alone."}, *QUESTION]
    assert critic.score_steps(told, "4719").scores == pytest.approx(
        critic.score_steps(QUESTION, "4719").scores, abs=1e-5
    )
    other = VisualPRM(critic.engine, system="You are a critic.")
    assert other.score_steps(QUESTION, "4719").scores != pytest.approx(
        critic.score_steps(QUESTION, "4719").scores, abs=1e-5
    )


REFUSED = {
    "nothing": ("", "expected texts that are not empty, got ''"),
    "no step": (" \n\n ", r"response: expected an answer with at least one step, got ' \\n\\n '"),
    "a number": (7, "expected texts that are not empty, got 7"),
}


@pytest.mark.parametrize("response", REFUSED)
def test_an_answer_without_steps_is_refused_before_anything_is_read(critic, monkeypatch, response):
    monkeypatch.setattr(critic.engine.preparer, "read", None)
    given, message = REFUSED[response]
    with pytest.raises(RequestError, match=message):
        critic.score_steps(QUESTION, given)
    with pytest.raises(RequestError, match=message):
        critic.score_responses(QUESTION, ["4719", given])


@pytest.mark.parametrize("max_steps", [0, -1, True, "12", 1.5])
def test_a_wrong_number_of_steps_is_refused(critic, max_steps):
    with pytest.raises(RequestError, match="max_steps must be an integer"):
        VisualPRM(critic.engine, max_steps=max_steps)


CONVERSATIONS = {
    "two questions": [*QUESTION, {"role": "assistant", "content": "7"}, *ask("And now?")],
    "an answer begun": [*QUESTION, {"role": "assistant", "content": "The"}],
    "a raw prompt": RawPrompt("Read"),
}


@pytest.mark.parametrize("given", CONVERSATIONS)
def test_more_than_one_question_is_refused(critic, given):
    with pytest.raises(RequestError, match="messages: a critic"):
        critic.score_steps(CONVERSATIONS[given], "4719")


def test_more_steps_than_fit_are_refused_at_once_and_nothing_else_is_disturbed():
    with VisualPRM(load(max_model_len=400)) as critic:
        running = submit(critic.engine, ask("Hello"), SHORT)
        every = VisualPRM(critic.engine, max_steps=None)
        with pytest.raises(ContextLengthError, match="the answer has 1,000 steps, which cannot fit 400 tokens"):
            every.score_steps(QUESTION, "\n\n".join("a" * 1000))
        with pytest.raises(ContextLengthError, match="an answer has 2,999,998 characters, which cannot fit 400 tokens"):
            every.score_steps(QUESTION, "\n\n".join("a" * 1_000_000))
        with pytest.raises(ContextLengthError, match="tokens"):
            every.score_steps(QUESTION, "\n\n".join("a" * 40))
        with pytest.raises(ContextLengthError, match=r"responses\[1\]: .*tokens"):
            critic.score_responses(QUESTION, ["4719", "7 " * 1000, "4719"])
        assert len(critic.score_steps(QUESTION, "\n\n".join("a" * 40)).steps) == 10, "40 in groups of 4"
        while advance(critic.engine, running) is None:
            pass
        check_idle(critic.engine)


@pytest.mark.parametrize("given", CONVERSATIONS)
def test_what_a_critic_cannot_judge_is_refused_before_anything_is_drawn(critic, given, monkeypatch):
    monkeypatch.setattr(critic.engine, "new_request", None)
    with pytest.raises(RequestError, match="messages: a critic"):
        critic.engine.best_of(CONVERSATIONS[given], 2, critic=critic)


def test_a_critic_takes_delta_and_salt_of_the_call_that_draws():
    """Else a tenant's prompt would be found by requests without its salt."""
    params = SamplingParams(max_tokens=3, temperature=1.0)
    with load(block_size=16) as engine:
        engine.best_of(QUESTION, 2, critic=VisualPRM(engine), params=params, cache_salt="tenant", v2pe_delta=1 / 4)
        scored = VisualPRM(engine).score_steps(QUESTION, "4719")
        assert scored.usage.cached_tokens == 0
        assert VisualPRM(engine).score_steps(QUESTION, "4719").usage.cached_tokens > 0
        delta = VisualPRM(engine).score_steps(QUESTION, "4719", v2pe_delta=1 / 4)
        assert delta.scores != pytest.approx(scored.scores, abs=1e-6)
        with VisualPRM(load(v2pe_delta=1 / 4)) as other:
            assert other.score_steps(QUESTION, "4719").scores == pytest.approx(delta.scores, abs=1e-5)


def test_a_model_whose_tokenizer_has_no_marks_is_no_critic(monkeypatch):
    with load() as engine:
        encode = type(engine.tokenizer).encode
        spelled = {"assistant\n+": [1, 2, 3]}
        monkeypatch.setattr(
            type(engine.tokenizer), "encode", lambda self, text, **o: spelled.get(text) or encode(self, text, **o)
        )
        with pytest.raises(CheckpointError, match="does not make one token of '\\+' and one of '-' in a reply"):
            VisualPRM(engine)


def test_a_score_that_is_not_finite_is_one_error_and_nothing_else_is_disturbed(monkeypatch):
    with VisualPRM(load()) as critic:
        running = submit(critic.engine, ask("Hello"), SHORT)
        logits = critic.engine.model.logits
        plus = critic.engine.tokenizer.encode("assistant\n+")[-1]
        monkeypatch.setattr(
            critic.engine.model, "logits", lambda x_RD: logits(x_RD).index_fill(1, torch.tensor([plus]), -torch.inf)
        )
        with pytest.raises(NotFiniteError, match="the logits of token"):
            critic.score_steps(QUESTION, ANSWERS[1])
        monkeypatch.undo()
        while advance(critic.engine, running) is None:
            pass
        assert 0 < critic.score_steps(QUESTION, ANSWERS[1]).score < 1
        check_idle(critic.engine)


def test_a_checkpoint_of_the_official_reward_model_s_class_is_a_critic(tmp_path):
    """It has no other weights than a model that chats."""
    for file in SAMPLES.parent.iterdir():
        if file.is_file() and file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    config = json.loads((SAMPLES.parent / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["InternVLRewardModel"]}))
    with VisualPRM.from_pretrained(tmp_path, device="cpu", dtype="float32") as critic:
        assert critic.score_steps(ask("Hello"), "4").score > 0


def test_a_closed_critic_says_so():
    critic = VisualPRM.from_pretrained("tiny", device="cpu")
    critic.close()
    with pytest.raises(RequestError, match="the engine is closed"):
        critic.score_steps(QUESTION, "4719")
    with pytest.raises(TypeError):
        VisualPRM.from_pretrained("tiny", devise="cpu")

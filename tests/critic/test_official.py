"""The official reward model's methods score as `VisualPRM` does for the same question and pictures."""

from pathlib import Path

import pytest
import torch

from internvl_rt import RequestError
from internvl_rt.compat import AutoModel, AutoTokenizer, load_image
from internvl_rt.critic import VisualPRM
from support.calls import ask

SAMPLES = Path(__file__).parents[2] / "internvl_rt" / "tiny" / "samples"
ANSWERS = ["4719", "There are four digits.\n\n4719", "7\n\n8\n\n9"]


@pytest.fixture(scope="module")
def model():
    return AutoModel.from_pretrained("tiny", torch_dtype=torch.float32, device="cpu", trust_remote_code=True).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained("tiny", trust_remote_code=True, use_fast=False)


def tiles(model, name):
    return load_image(SAMPLES / f"{name}.png", input_size=model.engine.config.vision.image_size)


def test_steps_come_with_their_scores(model, tokenizer):
    pixels, asked = tiles(model, "4719"), ask("Read the digits.", SAMPLES / "4719.png")
    for answer in ANSWERS:
        steps = model.generate_steps_with_soft_score(tokenizer, "Read the digits.", answer, pixels)
        expected = VisualPRM(model.engine, max_steps=None).score_steps(asked, answer)
        assert [each["step"] for each in steps] == list(expected.steps)
        assert [each["score"] for each in steps] == pytest.approx(expected.scores, abs=1e-5)
    (joined,) = model.generate_steps_with_soft_score(tokenizer, "Read the digits.", ANSWERS[2], pixels, max_steps=1)
    assert joined["step"] == ANSWERS[2]


def test_the_best_response_comes_first(model, tokenizer):
    pixels = tiles(model, "4719")
    best = model.select_best_response(tokenizer, "Read the digits.", ANSWERS, pixels, return_scores=True)
    assert [score for _, score in best] == sorted((score for _, score in best), reverse=True)
    assert model.select_best_response(tokenizer, "Read the digits.", ANSWERS, pixels) == [text for text, _ in best]
    assert sorted(text for text, _ in best) == sorted(ANSWERS)


def test_several_pictures_and_none_are_as_in_a_chat(model, tokenizer):
    both = torch.cat((tiles(model, "42"), tiles(model, "905")))
    counts = [len(tiles(model, "42")), len(tiles(model, "905"))]
    question = "<image>\n<image>\nWhich is larger?"
    (step,) = model.generate_steps_with_soft_score(tokenizer, question, "905", both, num_patches_list=counts)
    assert 0 < step["score"] < 1
    (text,) = model.generate_steps_with_soft_score(tokenizer, "What is 2 + 2?", "4", None)
    assert text["score"] != pytest.approx(step["score"], abs=1e-6)
    with pytest.raises(RequestError, match="pictures were given, but the conversation has only 1"):
        model.generate_steps_with_soft_score(tokenizer, "<image>\nWhich?", "905", both, num_patches_list=counts)
    with pytest.raises(RequestError, match="num_patches_list"):
        model.generate_steps_with_soft_score(tokenizer, question, "905", both, num_patches_list=[1, 7])


def test_a_system_message_that_was_set_is_the_critic_s(model, tokenizer, monkeypatch):
    before = model.generate_steps_with_soft_score(tokenizer, "Hello", "4", None)
    monkeypatch.setattr(model, "system_message", "You are a critic.")
    assert model.generate_steps_with_soft_score(tokenizer, "Hello", "4", None) != before

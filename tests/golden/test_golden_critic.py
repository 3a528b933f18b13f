"""Step scores of each set agree with those of the official model class, alone, together, in chunks and from the cache.

One pass and one pass a step of the official code differ by up to 2e-6, so 1e-5 is ample (README of the sets).
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from golden import impl
from golden.test_golden_model import pixels_of
from internvl_rt import Engine
from internvl_rt.compat import ChatModel

SETS = sorted(path.parent for path in Path(os.environ["INTERNVL_RT_GOLDEN"]).glob("*/visualprm.json"))
TOLERANCE = 1e-5
WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "chunks": {"max_tokens_per_step": 32},
    "one by one": {"max_num_seqs": 1},
}


def cases(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "visualprm.json").read_text(encoding="utf-8"))["cases"]
    return found


@pytest.mark.parametrize("folder", SETS, ids=lambda path: path.name)
def test_scores_of_each_answer_alone(folder: Path) -> None:
    for case in cases(folder):
        pixels = pixels_of(folder, case["inputs"])
        for answer in case["responses"]:
            given = (case["question"], answer["response"], pixels, case["num_patches_list"], answer["max_steps"])
            scores = impl.visualprm(folder / "ckpt_a", *given)
            assert scores == pytest.approx(answer["step_scores"], abs=TOLERANCE), case["name"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("folder", SETS, ids=lambda path: path.name)
def test_answers_to_one_question_are_scored_and_ordered_together(folder: Path, way: str) -> None:
    """The second time all that the answers have in common comes from the cache."""
    with Engine.from_pretrained(folder / "ckpt_a", device="cpu", dtype="float32", block_size=16, **WAYS[way]) as engine:
        model = ChatModel(engine)
        for case in cases(folder):
            tiles = pixels_of(folder, case["inputs"])
            pixels, counts = (None, None) if tiles is None else (torch.from_numpy(tiles), case["num_patches_list"])
            answers, max_steps = case["responses"], case["responses"][0]["max_steps"]
            texts = [answer["response"] for answer in answers]
            for _ in range(2):
                best = model.select_best_response(
                    None, case["question"], texts, pixels, counts, max_steps, return_scores=True
                )
                assert [texts.index(text) for text, _ in best] == case["order_best_first"], case["name"]
                expected = [answers[index]["mean"] for index in case["order_best_first"]]
                assert [score for _, score in best] == pytest.approx(expected, abs=TOLERANCE), case["name"]
        cached = engine.stats()["prefix_hit_tokens"]
        assert cached > 0


@pytest.mark.parametrize("folder", SETS, ids=lambda path: path.name)
def test_the_dialogue_is_that_of_the_official_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours ends where the last step is scored, before its placeholder."""
    model = ChatModel(impl.engine(folder / "ckpt_a"))
    new_scoring, made = model.engine.new_scoring, []

    def watched(prompts: Any) -> Any:
        made.extend(prompts)
        return new_scoring(prompts)

    monkeypatch.setattr(model.engine, "new_scoring", watched)
    for case in cases(folder):
        tiles = pixels_of(folder, case["inputs"])
        pixels, counts = (None, None) if tiles is None else (torch.from_numpy(tiles), case["num_patches_list"])
        for answer in case["responses"]:
            given = (case["question"], answer["response"], pixels, counts, answer["max_steps"])
            model.generate_steps_with_soft_score(None, *given)
            last = answer["score_positions"][-1]
            assert list(made[-1].prompt.token_ids) == answer["input_ids"][: last + 1]
            assert made[-1].places.index_P.tolist() == answer["score_positions"]

"""Features, logits, greedy tokens and answers of each set's three checkpoints agree with the official code.

The official float32 results differ by up to 2.2e-5 from float64 on logits of size 15, so 1e-4 of the largest is
ample, and the error of a wrong operation is far larger.
"""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from golden import impl
from internvl_rt import Engine, SamplingParams

SETS = sorted(path.parent for path in Path(os.environ["INTERNVL_RT_GOLDEN"]).glob("*/outputs_a.json"))
CHECKPOINTS = [(path, letter) for path in SETS for letter in "abc"]
FEATURE_TOLERANCE, LOGIT_TOLERANCE, RANKS_TOLERANCE = 1e-5, 1e-4, 1e-5

Floats = NDArray[np.float32]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@cache
def outputs(folder: Path, letter: str) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    return read(folder / f"outputs_{letter}.json"), load_file(folder / f"outputs_{letter}.safetensors")


@cache
def pixels(folder: Path, name: str) -> Floats:
    stored = load_file(folder / "inputs.safetensors")
    case = read(folder / "inputs.json")[name]
    tiles = stored.get(f"{name}.tiles_u8")
    return impl.normalise(
        impl.tile(folder / case["file"], case["max_num"], case["image_size"]) if tiles is None else tiles
    )


def pixels_of(folder: Path, names: list[str]) -> Floats | None:
    return np.concatenate([pixels(folder, name) for name in names]) if names else None


def question_of(folder: Path, case: dict[str, Any]) -> tuple[Floats | None, Any, Any, Any]:
    """Returns pixels, question, history and tile counts of a case; a row of a batch is a chat of its own."""
    question, history, counts = case.get("question"), case.get("history_in"), case["num_patches_list"]
    if case["api"] == "batch_chat":
        question, counts = case["questions"][case["row"]], counts[case["row"] : case["row"] + 1]
    return pixels_of(folder, case["inputs"]), question, history, counts


def relative_error(got: Floats, want: Floats) -> float:
    assert got.shape == want.shape
    return float(np.abs(got.astype(np.float64) - want).max() / np.abs(want).max())


def every_case() -> list[Any]:
    return [
        pytest.param(folder, letter, name, id=f"{folder.name}-{letter}-{name}")
        for folder, letter in CHECKPOINTS
        for name in outputs(folder, letter)[0]["cases"]
    ]


def test_at_least_one_set_is_found() -> None:
    assert SETS


@pytest.mark.parametrize(("folder", "letter"), CHECKPOINTS)
def test_vision_features(folder: Path, letter: str) -> None:
    meta, want = outputs(folder, letter)
    for name, stored in meta["feature_tiles_stored"].items():
        got = impl.vision(folder / f"ckpt_{letter}", pixels(folder, name))
        assert relative_error(got["features"][stored], want[f"{name}.extract_feature"]) < FEATURE_TOLERANCE
        if (key := f"{name}.vit_last_hidden_state") in want:
            assert relative_error(got["last_hidden_state"], want[key]) < FEATURE_TOLERANCE


@pytest.mark.parametrize(("folder", "letter", "name"), every_case())
def test_logits_of_prompt_and_answer(folder: Path, letter: str, name: str) -> None:
    meta, want = outputs(folder, letter)
    case = meta["cases"][name]
    ids = case["input_ids"] + case["generated_ids"]
    got = impl.logits(folder / f"ckpt_{letter}", ids, pixels_of(folder, case["inputs"]))
    prompt, answer = got[: len(case["input_ids"])], got[len(case["input_ids"]) - 1 : -1]
    columns = meta["sampled_vocab_ids"]
    assert relative_error(prompt[-8:], want[f"{name}.logits_last8"]) < LOGIT_TOLERANCE
    assert relative_error(prompt[:, columns], want[f"{name}.logits_sampled"]) < LOGIT_TOLERANCE
    assert relative_error(np.logaddexp.reduce(prompt, axis=-1), want[f"{name}.logsumexp"]) < LOGIT_TOLERANCE
    assert relative_error(answer, want[f"{name}.step_logits"]) < LOGIT_TOLERANCE
    assert np.array_equal(prompt.argmax(-1), want[f"{name}.argmax"])
    if (key := f"{name}.logits_first8") in want:
        assert relative_error(prompt[:8], want[key]) < LOGIT_TOLERANCE


@pytest.mark.parametrize(("folder", "letter", "name"), every_case())
def test_greedy_tokens_and_answer_of_a_chat(folder: Path, letter: str, name: str) -> None:
    meta, _ = outputs(folder, letter)
    case = meta["cases"][name]
    text, ids = impl.chat(folder / f"ckpt_{letter}", *question_of(folder, case), meta["max_new_tokens"])
    assert ids == case["generated_ids"]
    assert text == case["response"]


@pytest.mark.parametrize(("folder", "letter"), CHECKPOINTS)
def test_greedy_tokens_of_all_chats_in_one_batch(folder: Path, letter: str) -> None:
    meta, _ = outputs(folder, letter)
    ckpt = folder / f"ckpt_{letter}"
    prepared = [impl.prepare(ckpt, *question_of(folder, case)) for case in meta["cases"].values()]
    params = [SamplingParams(max_tokens=meta["max_new_tokens"])] * len(prepared)
    replies = impl.engine(ckpt).generate_prepared(iter(prepared), params)
    for reply, each, case in zip(replies, prepared, meta["cases"].values(), strict=True):
        assert list(each.prompt.token_ids) == case["input_ids"]
        assert reply.token_ids == case["generated_ids"]


@pytest.mark.parametrize("how", [{"tensor_parallel_size": 2, "vision_processes": 1}, {"tensor_parallel_size": 4}])
@pytest.mark.parametrize(("folder", "letter"), CHECKPOINTS)
def test_several_ranks_give_the_tokens_and_logits_of_one(folder: Path, letter: str, how: dict[str, int]) -> None:
    """Some of the checkpoints have 7 query heads on one key/value head, or 25 heads in the vision tower."""
    meta, _ = outputs(folder, letter)
    ckpt, cases = folder / f"ckpt_{letter}", meta["cases"].values()
    prepared = [impl.prepare(ckpt, *question_of(folder, case)) for case in cases]
    params = [SamplingParams(max_tokens=meta["max_new_tokens"], logprobs=20)] * len(prepared)
    expected = impl.engine(ckpt).generate_prepared(iter(prepared), params)
    with Engine.from_pretrained(ckpt, device="cpu", dtype="float32", **how) as engine:
        replies = engine.generate_prepared(iter(prepared), params)
    for reply, one, case in zip(replies, expected, cases, strict=True):
        assert reply.token_ids == case["generated_ids"]
        for ours, theirs in zip(reply.logprobs, one.logprobs, strict=True):
            both = dict(ours.top).keys() & dict(theirs.top).keys()
            assert len(both) > 18, "only the least likely ones may change places"
            found, wanted = (np.array([dict(each.top)[token_id] for token_id in both]) for each in (ours, theirs))
            assert relative_error(found, wanted) < RANKS_TOLERANCE


@pytest.mark.parametrize("name", ["batch", "batch_text"])
@pytest.mark.parametrize(("folder", "letter"), CHECKPOINTS)
def test_answers_of_batch_chat(folder: Path, letter: str, name: str) -> None:
    meta, _ = outputs(folder, letter)
    batch = meta[name]
    answers = impl.batch_chat(
        folder / f"ckpt_{letter}",
        pixels_of(folder, batch.get("inputs", [])),
        batch["questions"],
        batch["num_patches_list"],
        meta["max_new_tokens"],
    )
    assert answers == batch["responses"]


@pytest.mark.parametrize("folder", SETS)
def test_logits_at_fractional_positions(folder: Path) -> None:
    meta, want = read(folder / "v2pe.json")["forward"], load_file(folder / "v2pe.safetensors")
    ids = want["forward.input_ids"].tolist()
    for run in (run["name"] for run in meta["runs"]):
        position_T = want[f"{run}.positions"]
        got = impl.forward_positions(folder / meta["checkpoint"], ids, pixels(folder, meta["inputs"]), position_T)
        assert relative_error(got[:8], want[f"{run}.logits_first8"]) < LOGIT_TOLERANCE
        assert relative_error(got[-8:], want[f"{run}.logits_last8"]) < LOGIT_TOLERANCE


@pytest.mark.parametrize("folder", SETS)
def test_delta_one_gives_the_logits_of_integer_positions_bit_for_bit(folder: Path) -> None:
    meta, want = read(folder / "v2pe.json")["forward"], load_file(folder / "v2pe.safetensors")
    ids, tiles = want["forward.input_ids"].tolist(), pixels(folder, meta["inputs"])
    plain = impl.logits(folder / meta["checkpoint"], ids, tiles)
    delta_1 = impl.forward_positions(folder / meta["checkpoint"], ids, tiles, want["forward_delta_1.positions"])
    assert np.array_equal(plain, delta_1)

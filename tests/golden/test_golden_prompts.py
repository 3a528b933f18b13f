"""Prompts, tokenizer round trips and V2PE positions equal those of the official code."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from internvl_rt.checkpoint.config import DEFAULT_SYSTEM_MESSAGE
from internvl_rt.errors import RequestError
from internvl_rt.inputs.position import build_positions
from internvl_rt.inputs.prompt import VisualSpan, build_prompt, tiles_per_image, turns_from_question
from internvl_rt.inputs.tokenizer import load_tokenizer

SETS = sorted(path.parent for path in Path(os.environ["INTERNVL_RT_GOLDEN"]).glob("*/prompts.json"))
PROMPTS = {path: json.loads((path / "prompts.json").read_text("utf-8")) for path in SETS}
V2PE = {path: json.loads((path / "v2pe.json").read_text("utf-8")) for path in SETS}
TOKENIZERS = {path: load_tokenizer(path / "ckpt_a") for path in SETS}


def every(table, key, keep=lambda case: True):
    return [
        pytest.param(path, case, id=f"{path.name}-{case.get('name', index)}")
        for path, content in table.items()
        for index, case in enumerate(content[key])
        if keep(case)
    ]


def prompt_of(path, case, tiles, *, question=None, user_specials=True):
    system = DEFAULT_SYSTEM_MESSAGE if case["system_is_default"] else str(case["system"])  # None is shown as "None"
    question = case["question"] if question is None else question
    turns, stored = turns_from_question(question, case["history"], num_images=len(tiles), system=system)
    counts = [n * PROMPTS[path]["num_image_token"] for n in tiles]
    return build_prompt(turns, TOKENIZERS[path], counts, user_specials=user_specials), stored


def expand(compact):
    return re.sub(r"<IMG_CONTEXT>\*(\d+)", lambda match: "<IMG_CONTEXT>" * int(match[1]), compact)


@pytest.mark.parametrize("path", SETS, ids=lambda path: path.name)
def test_the_default_system_message_is_the_official_one(path):
    assert PROMPTS[path]["default_system"] == DEFAULT_SYSTEM_MESSAGE


@pytest.mark.parametrize(("path", "case"), every(PROMPTS, "cases", lambda c: "error" not in c and "questions" not in c))
def test_a_question_is_rendered_and_tokenised_as_by_chat(path, case):
    tiles = tiles_per_image(case["n_tiles"], case["num_patches_list"])
    num_places = case["prompt_compact"].count("<img><IMG_CONTEXT>*")
    if num_places < len(tiles):  # chat leaves the other pictures out of the prompt and fails later, in the model
        with pytest.raises(RequestError, match="write <image>"):
            prompt_of(path, case, tiles)
        tiles = tiles[:num_places]
    prompt, stored = prompt_of(path, case, tiles)
    assert prompt.text == expand(case["prompt_compact"])
    assert list(prompt.token_ids) == case["input_ids"]
    assert stored == case["question_as_stored"]


@pytest.mark.parametrize(("path", "case"), every(PROMPTS, "cases", lambda c: "error" not in c and "questions" not in c))
def test_by_default_only_pictures_make_placeholders(path, case):
    tiles = tiles_per_image(case["n_tiles"], case["num_patches_list"])
    tiles = tiles[: case["prompt_compact"].count("<img><IMG_CONTEXT>*")]
    prompt, _ = prompt_of(path, case, tiles, user_specials=False)
    assert prompt.text == expand(case["prompt_compact"])
    assert prompt.token_ids.count(TOKENIZERS[path].token_id("<IMG_CONTEXT>")) == sum(s.num_tokens for s in prompt.spans)
    num_turns = 3 + 2 * len(case["history"] or ())  # system, question, opened answer
    assert prompt.token_ids.count(TOKENIZERS[path].token_id("<|im_start|>")) == num_turns


@pytest.mark.parametrize(("path", "case"), every(PROMPTS, "cases", lambda c: "questions" in c))
def test_rows_of_a_batch_are_rendered_and_tokenised_as_by_batch_chat(path, case):
    for row, question in enumerate(case["questions"]):
        tiles = [case["num_patches_list"][row]] if case["n_tiles"] else []
        prompt, _ = prompt_of(path, case, tiles, question=question)
        ids = [i for i, keep in zip(case["input_ids"][row], case["attention_mask"][row], strict=True) if keep]
        assert prompt.text == expand(case["prompt"][row])
        assert list(prompt.token_ids) == ids


@pytest.mark.parametrize(("path", "case"), every(PROMPTS, "cases", lambda c: "error" in c))
def test_what_the_official_code_refuses_is_refused(path, case):
    with pytest.raises(RequestError):
        prompt_of(path, case, tiles_per_image(case["n_tiles"], case["num_patches_list"]))


@pytest.mark.parametrize(("path", "case"), every(PROMPTS, "encode"))
def test_text_has_the_official_ids(path, case):
    assert TOKENIZERS[path].encode(case["text"], specials=True) == case["ids"]


@pytest.mark.parametrize(("path", "case"), every(PROMPTS, "decode"))
def test_ids_have_the_official_text(path, case):
    assert TOKENIZERS[path].decode(case["ids"]) == case["skip"]
    assert TOKENIZERS[path].decode(case["ids"], skip_specials=False) == case["keep"]


@pytest.mark.parametrize(("path", "case"), every(V2PE, "cases", lambda c: "error" not in c))
def test_positions_are_the_official_ones(path, case):
    spans, num_tokens = [], 0
    for kind, amount in case["segments"]:
        if kind == "image":  # <img>, visual tokens, </img>
            spans.append(VisualSpan(num_tokens + 1, amount * V2PE[path]["tokens_per_tile"]))
            num_tokens += spans[-1].num_tokens + 2
        else:
            num_tokens += amount
    strides = case["stride"] if isinstance(case["stride"], list) else [case["stride"]] * len(spans)
    positions, following = build_positions(num_tokens, spans, strides)
    padded = np.concatenate([np.ones(case["left_padding"], np.float32), positions])
    official = load_file(path / "v2pe.safetensors")[f"{case['name']}.positions"]
    assert padded.dtype == official.dtype == np.float32
    assert np.array_equal(padded, official)
    assert padded.sum(dtype=np.float64) == case["sum"]
    assert [following + n for n in range(3)] == case["next_positions"]


@pytest.mark.parametrize(("path", "run"), [(path, run) for path in SETS for run in V2PE[path]["forward"]["runs"]])
def test_positions_of_a_model_with_few_tokens_per_tile_are_rounded_up_after_the_picture(path, run):
    tensors = load_file(path / "v2pe.safetensors")
    ids = tensors["forward.input_ids"].tolist()
    context = TOKENIZERS[path].token_id("<IMG_CONTEXT>")
    span = VisualSpan(ids.index(context), ids.count(context))
    positions, _ = build_positions(len(ids), [span], [round(256 * run["delta"])])
    assert np.array_equal(positions, tensors[f"{run['name']}.positions"])

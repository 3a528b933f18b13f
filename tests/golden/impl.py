"""Gives this package the interface that `check_golden.py`, the checker beside the golden sets, calls."""

from collections.abc import Sequence as Items
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from internvl_rt import Engine, RequestError, SamplingParams
from internvl_rt.checkpoint.config import DEFAULT_SYSTEM_MESSAGE
from internvl_rt.compat import ChatModel
from internvl_rt.critic.preference import Shift, mpo_loss
from internvl_rt.inputs.image import open_image
from internvl_rt.inputs.position import build_positions
from internvl_rt.inputs.prepare import Prepared
from internvl_rt.inputs.prompt import (
    Prompt,
    VisualSpan,
    build_prompt,
    tiles_per_image,
    turns_from_question,
)
from internvl_rt.inputs.tiles import ImageOptions, choose_grid, plan_tiles
from internvl_rt.inputs.tokenizer import Tokenizer, load_tokenizer
from internvl_rt.inputs.video import choose_frame_indices
from internvl_rt.kernels.patch_embed import normalise_tiles_reference
from support.forward import all_logits, last_hidden_state

Folder = str | Path
Floats = NDArray[np.float32]
History = list[tuple[str, str]] | None


@cache
def engine(ckpt_dir: Folder) -> Engine:
    return Engine.from_pretrained(ckpt_dir, device="cpu", dtype="float32")


@cache
def tokenizer(ckpt_dir: Folder) -> Tokenizer:
    return load_tokenizer(Path(ckpt_dir))


def grid(width: int, height: int, max_num: int, image_size: int, min_num: int) -> tuple[int, int, int]:
    options = ImageOptions(image_size=image_size, min_tiles=min_num, max_tiles=max_num)
    return (*choose_grid(width, height, options), plan_tiles(width, height, options).num_tiles)


def tile(path: str | Path, max_num: int, image_size: int) -> NDArray[np.uint8]:
    options = ImageOptions(image_size=image_size, max_tiles=max_num)
    return open_image(path, options).tiles()


def normalise(tiles: NDArray[np.uint8]) -> Floats:
    return normalise_tiles_reference(torch.from_numpy(tiles)).numpy()


def vision(ckpt_dir: Folder, pixel_values: Floats) -> dict[str, Floats]:
    model, tiles = engine(ckpt_dir).model, torch.from_numpy(pixel_values)
    with torch.inference_mode():
        features = model.encode_tiles(tiles)
    return {"last_hidden_state": last_hidden_state(model, tiles).numpy(), "features": features.numpy()}


def logits(ckpt_dir: Folder, input_ids: Items[int], pixel_values: Floats | None) -> Floats:
    return forward_positions(ckpt_dir, input_ids, pixel_values, None)


def forward_positions(
    ckpt_dir: Folder, input_ids: Items[int], pixel_values: Floats | None, positions: Floats | None
) -> Floats:
    tiles = None if pixel_values is None else torch.from_numpy(pixel_values)
    context_id = tokenizer(ckpt_dir).token_id("<IMG_CONTEXT>")
    return all_logits(engine(ckpt_dir).model, input_ids, tiles, context_id=context_id, position_T=positions).numpy()


def prepare(
    ckpt_dir: Folder, pixel_values: Floats | None, question: str, history: History, num_patches_list: list[int] | None
) -> Prepared:
    """Prepares the prompt that the official `chat` makes."""
    model = ChatModel(engine(ckpt_dir))
    counts = [] if pixel_values is None else tiles_per_image(len(pixel_values), num_patches_list)
    turns, _ = turns_from_question(question, history, num_images=len(counts), system=model.system_message)
    tiles = [] if pixel_values is None else torch.split(torch.from_numpy(pixel_values), counts)
    return model.engine.prepare_turns(turns, tiles)


def chat(
    ckpt_dir: Folder,
    pixel_values: Floats | None,
    question: str,
    history: History,
    num_patches_list: list[int] | None,
    max_new_tokens: int,
) -> tuple[str, list[int]]:
    """Returns the answer of the official interface, and the token ids that the engine generates for its prompt."""
    model = ChatModel(engine(ckpt_dir))
    pixels = None if pixel_values is None else torch.from_numpy(pixel_values)
    config = {"max_new_tokens": max_new_tokens, "do_sample": False}
    response = model.chat(tokenizer(ckpt_dir), pixels, question, config, history, num_patches_list=num_patches_list)
    assert isinstance(response, str)
    prepared = prepare(ckpt_dir, pixel_values, question, history, num_patches_list)
    (reply,) = model.engine.generate_prepared(iter([prepared]), [SamplingParams(max_tokens=max_new_tokens)])
    return response, reply.token_ids


def batch_chat(
    ckpt_dir: Folder,
    pixel_values: Floats | None,
    questions: list[str],
    num_patches_list: list[int] | None,
    max_new_tokens: int,
) -> list[str]:
    pixels = None if pixel_values is None else torch.from_numpy(pixel_values)
    config = {"max_new_tokens": max_new_tokens, "do_sample": False}
    return ChatModel(engine(ckpt_dir)).batch_chat(tokenizer(ckpt_dir), pixels, questions, config, num_patches_list)


def prompt(ckpt_dir: Folder, case: dict[str, Any]) -> tuple[str, list[int] | list[list[int]]]:
    """Returns the text and ids of one conversation, or the joined texts and left-padded rows of a batch."""
    if "questions" not in case:
        rendered = _render(ckpt_dir, case, case["question"], tiles_per_image(case["n_tiles"], case["num_patches_list"]))
        return rendered.text, list(rendered.token_ids)
    pairs = zip(case["questions"], case["num_patches_list"], strict=True)
    rows = [_render(ckpt_dir, case, question, [count] if count else []) for question, count in pairs]
    pad = tokenizer(ckpt_dir).token_id("<|endoftext|>")
    columns = list(zip_longest(*(reversed(row.token_ids) for row in rows), fillvalue=pad))
    return "".join(row.text for row in rows), [list(row) for row in zip(*reversed(columns), strict=True)]


def _render(ckpt_dir: Folder, case: dict[str, Any], question: str, tiles: list[int]) -> Prompt:
    """Builds the official code's prompt, which reads special tokens in texts and drops pictures without a place."""
    system = DEFAULT_SYSTEM_MESSAGE if case["system_is_default"] else str(case["system"])
    try:
        turns, _ = turns_from_question(question, case["history"], num_images=len(tiles), system=system)
    except RequestError:
        return _render(ckpt_dir, case, question, tiles[:-1])
    counts = [count * engine(ckpt_dir).config.tokens_per_tile for count in tiles]
    return build_prompt(turns, tokenizer(ckpt_dir), counts, user_specials=True)


def encode(ckpt_dir: Folder, text: str) -> list[int]:
    return tokenizer(ckpt_dir).encode(text, specials=True)


def decode(ckpt_dir: Folder, ids: Items[int], skip_special_tokens: bool) -> str:
    return tokenizer(ckpt_dir).decode(ids, skip_specials=skip_special_tokens)


def video_indices(fps: float, frames: int, bound: tuple[float, float] | None, num_segments: int) -> list[int]:
    return choose_frame_indices(frames, fps, num_segments, bound)


def v2pe_positions(segments: Items[tuple[str, int]], strides: Items[int], tokens_per_tile: int) -> Floats:
    spans, num_tokens = [], 0
    for kind, amount in segments:
        if kind == "image":
            spans.append(VisualSpan(num_tokens + 1, amount * tokens_per_tile))
            num_tokens += amount * tokens_per_tile + 2
        else:
            num_tokens += amount
    return build_positions(num_tokens, spans, strides)[0]


def visualprm(
    ckpt_dir: Folder,
    question: str,
    response: str,
    pixel_values: Floats | None,
    num_patches_list: list[int],
    max_steps: int | None,
) -> list[float]:
    pixels = None if pixel_values is None else torch.from_numpy(pixel_values)
    model, counts = ChatModel(engine(ckpt_dir)), num_patches_list if pixels is not None else None
    steps = model.generate_steps_with_soft_score(
        tokenizer(ckpt_dir), question, response, pixels, num_patches_list=counts, max_steps=max_steps
    )
    return [step["score"] for step in steps]


def mpo(step: dict[str, Any], state: tuple[float, int]) -> tuple[float, tuple[float, int]]:
    names = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected", "nll")
    given = (torch.tensor(step[name], dtype=torch.float64) for name in names)
    loss = mpo_loss(*given, shift=Shift(*state))
    return loss.total.item(), (loss.shift.mean, loss.shift.count)

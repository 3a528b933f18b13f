"""Trains the checkpoint that ships in the package as model `tiny`, on the CPU, and measures it.

    .venv/bin/python tests/train_tiny.py --out /tmp/tiny        (the default is the package's own folder)

Only the loss is written here. Tiles, prompts, V2PE positions, the model, its reference operations and the checkpoint
writer are those of the package, and accuracy is measured through the engine. Each picture gets a new random V2PE delta
from 1, 1/2, ..., 1/256 whenever it is used, as in native V2PE pre-training.
"""

import argparse
import ctypes
import math
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from internvl_rt import Engine
from internvl_rt.checkpoint.config import ModelConfig, load_config
from internvl_rt.checkpoint.folder import open_checkpoint
from internvl_rt.inputs.messages import parse_messages
from internvl_rt.inputs.position import STRIDES, build_positions
from internvl_rt.inputs.prompt import VisualSpan, build_prompt, turns_from_messages
from internvl_rt.inputs.tiles import ImageOptions, tile_image
from internvl_rt.inputs.tokenizer import load_tokenizer
from internvl_rt.kernels.patch_embed import normalise_tiles_reference
from internvl_rt.model.dialects import DIALECTS
from internvl_rt.model.internvl import InternVL, ModelWeights, build_weights, named_parameters
from internvl_rt.model.linear import Linear
from internvl_rt.model.ops import FIRST_VISUAL_ID, TORCH, Ops
from internvl_rt.model.step_inputs import Batch, LayerCache, StepInputs
from internvl_rt.model.weights import load_weights, save_weights
from support.digits import (
    MAX_DIGITS,
    SIZES,
    Exercise,
    Task,
    draw_any_picture,
    draw_comparison,
    draw_picture,
    draw_reading,
    draw_size_readings,
    load_glyphs,
    measure_accuracy,
)
from support.optimiser import Trainer
from support.tiny_files import write_files
from support.visible import NUM_MARKS, mark_visible

SEED = 3
DTYPE = torch.bfloat16  # of the weights that ship and of the training's products; optimisers update float32
COMPARISONS, ANY_COMPARISONS = 0.4, 0.15  # shares of exercises that compare two pictures, of squares and of any kind
DISTORTION = 0.14  # strength of the distortion of tiles in a lesson's first stage; the second stage halves it
VISION_SHARE = 0.2  # factor of the vision tower's learning rates in a lesson's second stage
SORTED_BATCHES = 8  # the prompts of this many batches are sorted by length together, to pad less
NUM_MEASURED = 200  # accuracy is measured on this many pictures of each length, and comparisons
DELTAS = {"1": 1.0, "1/4": 1 / 4, "1/16": 1 / 16, "1/256": 1 / 256}
SAMPLES = ("7", "42", "905", "4719", "31415", "862053")


@dataclass(frozen=True, slots=True)
class Lesson:
    """One part of the training, which goes on from the weights that the lesson before has written."""

    exercises: range  # their numbers, which are their seeds
    squares: float  # share of exercises with pictures as the samples are; the others are drawn by `draw_any_picture`
    kinds: tuple[float, ...]  # how likely it draws each kind
    vision_steps: int  # first stage: the vision tower alone learns which digits a tile shows
    tiles_per_batch: int
    whole_steps: int  # second stage: the whole model learns to answer
    batch_size: int
    rate: float  # factor of all learning rates


LESSONS = (
    Lesson(range(10_000), 1.0, (), 2600, 256, 750, 48, 1.0),
    Lesson(range(10_000, 18_000), 0.4, (0.3, 0.25, 0.45, 0.0), 1000, 160, 1300, 32, 0.6),
    Lesson(range(18_000, 25_000), 0.35, (0.2, 0.1, 0.4, 0.3), 400, 160, 1200, 32, 0.6),
)


@dataclass(frozen=True, slots=True)
class Example:
    """A whole conversation, to which any V2PE deltas can be applied."""

    token_ids: tuple[int, ...]
    spans: tuple[VisualSpan, ...]
    tiles: np.ndarray  # uint8 [I, S, S, 3], the tiles of all pictures
    visible: np.ndarray  # int8 [visual tokens, NUM_MARKS], see support/visible.py
    answers: tuple[tuple[int, int], ...]  # [start, stop) of each answer and its <|im_end|>


def draw_exercise(number: int, lesson: Lesson) -> Exercise:
    rng = np.random.default_rng([SEED, number])
    glyphs = load_glyphs(held_out=False)
    is_square = rng.random() < lesson.squares
    draw = draw_picture if is_square else partial(draw_any_picture, kinds=lesson.kinds)
    if rng.random() < (COMPARISONS if is_square else ANY_COMPARISONS):
        return draw_comparison(rng, glyphs, draw=draw)
    tasks: list[Task] = ["read", "count"]
    if rng.random() < 0.3:
        tasks.reverse()
    return draw_reading(rng, glyphs, int(rng.integers(1, MAX_DIGITS + 1)), *tasks[: rng.integers(1, 3)], draw=draw)


def keep_freed_memory() -> None:
    """Tells glibc to reuse freed memory: giving it back after every tensor costs as much time as the training."""
    if sys.platform == "linux":
        arena_max, mmap_max, trim_threshold = -8, -4, -1  # the constants of malloc.h
        for name, value in ((arena_max, 1), (mmap_max, 0), (trim_threshold, 2**31 - 1)):
            ctypes.CDLL(None).mallopt(name, value)


def draw_example(number: int, lesson: Lesson, config: ModelConfig, tokenizer_folder: Path) -> Example:
    exercise = draw_exercise(number, lesson)
    tokenizer = load_tokenizer(tokenizer_folder)
    options = ImageOptions(image_size=config.vision.image_size)
    tiles = [tile_image(picture, options) for picture in exercise.pictures]
    side = math.isqrt(config.tokens_per_tile)
    marks = [
        mark_visible(picture.size, number, boxes, options, side)
        for picture, number, boxes in zip(exercise.pictures, exercise.numbers, exercise.boxes, strict=True)
    ]
    messages: list[dict[str, object]] = []
    answers = []
    counts = [len(picture) * config.tokens_per_tile for picture in tiles]
    for turn, (question, answer) in enumerate(exercise.turns):
        pictures = [{"type": "image", "image": picture} for picture in exercise.pictures] if turn == 0 else []
        messages.append({"role": "user", "content": [*pictures, {"type": "text", "text": question}]})
        turns = turns_from_messages(parse_messages(messages), [], system=config.system_message)
        prompt = build_prompt(turns, tokenizer, counts)
        ids = [*prompt.token_ids, *tokenizer.encode(answer), tokenizer.token_id("<|im_end|>")]
        answers.append((len(prompt.token_ids), len(ids)))
        messages.append({"role": "assistant", "content": answer})
    return Example(tuple(ids), prompt.spans, np.concatenate(tiles), np.concatenate(marks), tuple(answers))


def draw_batches(rng: np.random.Generator, examples: list[Example], lesson: Lesson) -> Iterator[list[Example]]:
    """Yields `whole_steps` batches; the prompts of a batch have similar lengths."""
    left, size = lesson.whole_steps, lesson.batch_size
    while left:
        order = rng.permutation(len(examples))
        for first in range(0, len(order) - SORTED_BATCHES * size + 1, SORTED_BATCHES * size):
            group = [examples[i] for i in order[first : first + SORTED_BATCHES * size]]
            group.sort(key=lambda example: len(example.token_ids))
            for place in rng.permutation(SORTED_BATCHES)[:left] * size:
                yield group[place : place + size]
                left -= 1


class DenseOps(Ops):
    """Operations on a cache whose block s holds all of sequence s, padded at its end.

    Attention is computed in float32, because its gradient in bfloat16 is slow on a CPU.
    """

    def attend_tiles(self, qkv_RK: Tensor, *shape: Any) -> Tensor:
        return super().attend_tiles(qkv_RK.float(), *shape).to(qkv_RK.dtype)

    def paged_attention(
        self,
        q_THC: Tensor,
        cache: LayerCache,
        batch: Batch,
        upcoming: tuple[Linear, ...] = (),
        *,
        sinks_H: Tensor | None = None,
        window: int | None = None,
    ) -> Tensor:
        assert sinks_H is None, "the tiny model has no sinks"
        assert window is None, "the tiny model has no windows"
        k_SGLC, v_SGLC = cache.k_cache_BGPC.float(), cache.v_cache_BGPC.float()
        num_sequences, _, seq_len, head_dim = k_SGLC.shape
        q_SHLC = q_THC.float().view(num_sequences, seq_len, -1, head_dim).transpose(1, 2)
        y_SHLC = F.scaled_dot_product_attention(q_SHLC, k_SGLC, v_SGLC, is_causal=True, enable_gqa=True)
        return y_SHLC.transpose(1, 2).reshape(q_THC.shape).to(q_THC.dtype)


def draw_distortions(rng: np.random.Generator, num_tiles: int, strength: float) -> Tensor:
    """Draws affine maps [num_tiles, 2, 3] near the identity, to add variety to the only 1600 glyphs."""
    turn, slant, wide, high, across, down = rng.uniform(-strength, strength, (6, num_tiles))
    maps = np.array([[np.cos(turn) + wide, np.sin(turn) + slant, across], [-np.sin(turn), np.cos(turn) + high, down]])
    return torch.from_numpy(maps.transpose(2, 0, 1)).float()


def distort(tiles: Tensor, maps: Tensor) -> Tensor:
    """Turns uint8 tiles into the model's pixel values and applies each tile's affine map."""
    pixels = normalise_tiles_reference(tiles)
    grid = F.affine_grid(maps, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False).to(DTYPE)


def run_padded(
    model: InternVL,
    token_ids: Sequence[Sequence[int]],
    spans: Sequence[Sequence[VisualSpan]],
    positions: Sequence[np.ndarray],
    visual_XD: Tensor,
) -> tuple[Tensor, int]:
    """Runs the decoder on S prompts, padded to the length L of the longest. Returns x_TD, T = S x L, and L.

    visual_XD: the visual tokens of all prompts, in the dtype of the model
    """
    num_sequences, seq_len = len(token_ids), max(map(len, token_ids))
    id_SL, position_SL = np.zeros((num_sequences, seq_len), np.int64), np.zeros((num_sequences, seq_len), np.float32)
    visual = []
    for row, (ids, places, position_T) in enumerate(zip(token_ids, spans, positions, strict=True)):
        id_SL[row, : len(ids)], position_SL[row, : len(ids)] = ids, position_T
        visual += [np.arange(span.num_tokens) + span.start + row * seq_len for span in places]
    token_id_T, visual_rows = torch.from_numpy(id_SL.ravel()), torch.from_numpy(np.concatenate(visual))
    token_id_T[visual_rows] = FIRST_VISUAL_ID + torch.arange(len(visual_rows))
    unused = torch.empty(0, dtype=torch.int32)
    step = StepInputs(
        token_id_T=token_id_T,
        drawn_R=torch.zeros(1, dtype=torch.int64),
        position_T=torch.from_numpy(position_SL.ravel()),
        slot_T=torch.arange(num_sequences * seq_len, dtype=torch.int32),
        batch=Batch(unused, unused, unused, num_decodes=0, max_query_len=seq_len),
        visual_XD=visual_XD,
    )
    c = model.config.decoder
    empty = torch.zeros(num_sequences, c.num_kv_heads, seq_len, c.head_dim, dtype=visual_XD.dtype)
    caches = tuple(LayerCache(empty.clone(), empty.clone()) for _ in range(c.num_layers))
    return model.run_step(step, caches), seq_len


def measure_loss(
    model: InternVL, head: Linear, batch: list[Example], strides: list[list[int]], maps: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the mean cross entropy of the answers' tokens, and the error of `head` (see measure_seen)."""
    token_ids, spans = [example.token_ids for example in batch], [example.spans for example in batch]
    positions = [
        build_positions(len(example.token_ids), example.spans, stride)[0]
        for example, stride in zip(batch, strides, strict=True)
    ]
    tiles = torch.from_numpy(np.concatenate([example.tiles for example in batch]))
    visible_XK = torch.from_numpy(np.concatenate([example.visible for example in batch]))
    visual_XD = model.encode_tiles(distort(tiles, maps)).flatten(0, 1)
    x_TD, seq_len = run_padded(model, token_ids, spans, positions, visual_XD)
    rows = [np.arange(start, stop) + row * seq_len for row, each in enumerate(batch) for start, stop in each.answers]
    targets = [each.token_ids[start:stop] for each in batch for start, stop in each.answers]
    x_RD = x_TD[torch.from_numpy(np.concatenate(rows)) - 1]
    answer_loss = F.cross_entropy(model.logits(x_RD).float(), torch.from_numpy(np.concatenate(targets)))
    return answer_loss, measure_seen(visual_XD, head, visible_XK)


def measure_seen(visual_XD: Tensor, head: Linear, visible_XK: Tensor) -> Tensor:
    """Returns the mean error of `head`, which tells the digits in each visual token; unsure digits do not count."""
    sure = visible_XK >= 0
    seen_XK = F.linear(visual_XD.float(), head.weight_NK, head.bias_N)
    seen_loss = F.binary_cross_entropy_with_logits(seen_XK[sure], visible_XK[sure].float(), reduction="sum")
    return seen_loss / seen_XK.numel() * 10


@torch.no_grad()
def initialise(weights: ModelWeights) -> None:
    generator = torch.Generator().manual_seed(SEED)
    for path, parameter in named_parameters(weights).items():
        *_, module, kind = path.split(".")
        if kind.startswith("bias"):
            parameter.zero_()
        elif kind.startswith("scale") or kind == "weight_D":
            parameter.fill_(1)
        elif kind in ("embedding_VD", "position_UE", "class_E") or module == "lm_head":
            parameter.normal_(0, {"embedding_VD": 0.3, "weight_NK": 0.02}.get(kind, 0.1), generator=generator)
        else:
            gain = 0.5 if module in ("o", "down", "proj") or (module == "fc2" and "vision" in path) else 1.0
            parameter.normal_(0, gain * parameter.shape[1] ** -0.5, generator=generator)


def train(model: InternVL, named: dict[str, Tensor], examples: list[Example], lesson: Lesson, num_threads: int) -> None:
    """Trains first the vision tower on single tiles, then the whole model on whole conversations.

    The parameters `named` are float32; the model's own are these, rounded to the dtype that it ships and computes in.
    """
    width, rounded = model.config.decoder.hidden_size, named_parameters(model.weights)
    head = Linear(torch.zeros(NUM_MARKS, width), torch.zeros(NUM_MARKS))  # the checkpoint does not include this head
    rng = np.random.default_rng([SEED, lesson.exercises.start])
    prepare = partial(Trainer, rounded=rounded, head=head, num_threads=num_threads)

    tiles = torch.from_numpy(np.concatenate([example.tiles for example in examples]))
    visible = torch.from_numpy(np.concatenate([example.visible for example in examples])).unflatten(0, (len(tiles), -1))
    vision = {path: tensor for path, tensor in named.items() if not path.startswith("decoder.")}
    rates = {"vision_rate": lesson.rate, "decoder_rate": lesson.rate}
    trainer = prepare(vision, num_steps=lesson.vision_steps, **rates, last_share=0.1)
    for _ in range(lesson.vision_steps):
        chosen = torch.from_numpy(rng.integers(0, len(tiles), (2, lesson.tiles_per_batch // 2)))
        maps = [draw_distortions(rng, len(half), DISTORTION) for half in chosen]
        trainer.step(
            lambda index, chosen=chosen, maps=maps: (
                measure_seen(
                    model.encode_tiles(distort(tiles[chosen[index]], maps[index])).flatten(0, 1),
                    head,
                    visible[chosen[index]].flatten(0, 1),
                ),
            )
        )

    rates["vision_rate"] *= VISION_SHARE
    trainer = prepare(named, num_steps=lesson.whole_steps, **rates, last_share=0.0)
    for batch in draw_batches(rng, examples, lesson):
        halves = [batch[0::2], batch[1::2]]
        strides = [[rng.choice(STRIDES, len(example.spans)).tolist() for example in half] for half in halves]
        maps = [draw_distortions(rng, sum(len(e.tiles) for e in half), DISTORTION / 2) for half in halves]
        trainer.step(
            lambda index, halves=halves, strides=strides, maps=maps: measure_loss(
                model, head, halves[index], strides[index], maps[index]
            )
        )


def teach(lesson: Lesson, config: ModelConfig, folder: Path, num_threads: int) -> None:
    """Trains the weights in `folder`, or for the first lesson new ones, and writes them there."""
    draw = partial(draw_example, lesson=lesson, config=config, tokenizer_folder=folder)
    with ProcessPoolExecutor(num_threads) as processes:
        examples = list(processes.map(draw, lesson.exercises, chunksize=100))
    if lesson is LESSONS[0]:
        weights = build_weights(config, dtype=torch.float32, device="cpu")
        initialise(weights)
    else:
        weights = load_weights(open_checkpoint(folder), config, dtype=torch.float32, device="cpu")
    named, rounded = named_parameters(weights), build_weights(config, dtype=DTYPE, device="cpu")
    for path, parameter in named_parameters(rounded).items():
        parameter.copy_(named[path])
    train(InternVL(config, rounded, DenseOps(**vars(TORCH))), named, examples, lesson, num_threads)
    for parameter in named_parameters(rounded).values():
        parameter.requires_grad_(False)
    save_weights(rounded, config, folder, dialect=DIALECTS["original"])


def write_samples(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, digits in enumerate(SAMPLES):
        rng = np.random.default_rng([SEED, 1, number])
        picture, _ = draw_picture(rng, load_glyphs(held_out=True), digits)
        picture.quantize(64).save(folder / f"{digits}.png", optimize=True)


def report_accuracy(folder: Path) -> None:
    """Prints a table of exact matches on glyphs outside the training set, for the README.md of the checkpoint."""
    glyphs, rng = load_glyphs(held_out=True), np.random.default_rng([SEED, 2])
    lengths = range(1, MAX_DIGITS + 1)
    readings = [[draw_reading(rng, glyphs, n, "read", "count") for _ in range(NUM_MEASURED)] for n in lengths]
    counts = [draw_reading(rng, glyphs, n, "count", "read") for _ in range(NUM_MEASURED // MAX_DIGITS) for n in lengths]
    comparisons = [draw_comparison(rng, glyphs) for _ in range(NUM_MEASURED)]
    rows = [(f"read {n} digits", exercises, 0) for n, exercises in zip(lengths, readings, strict=True)]
    together = [exercise for exercises in readings for exercise in exercises]
    rows += [
        ("read, all lengths", together, 0),
        ("then count, second turn", together, 1),
        ("count 1 to 6 digits", counts, 0),
        ("then read, second turn", counts, 1),
        ("compare two pictures", comparisons, 0),
    ]
    number = NUM_MEASURED // 20
    rows += [(f"read, {name}", draw_size_readings(rng, glyphs, draws, number), 0) for name, draws in SIZES.items()]
    print(
        "| task | questions | "
        + " | ".join(f"delta {delta}" for delta in DELTAS)
        + " |\n|"
        + "---|" * (2 + len(DELTAS))
    )
    with Engine.from_pretrained(folder, device="cpu") as engine:
        for name, exercises, turn in rows:
            shares = [measure_accuracy(engine, exercises, turn=turn, delta=delta) for delta in DELTAS.values()]
            print(f"| {name} | {len(exercises)} | " + " | ".join(f"{share:.1%}" for share in shares) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the tiny checkpoint and prints its accuracy.")
    default = Path(__file__).parents[1] / "internvl_rt" / "tiny"
    parser.add_argument("--out", type=Path, default=default, help="folder to write (default: %(default)s)")
    parser.add_argument("--first", type=int, default=1, help="number of the first lesson (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="1 or 2, with the same result (default: %(default)s)")
    arguments = parser.parse_args()
    folder, start_s = arguments.out, time.perf_counter()
    keep_freed_memory()
    write_samples(folder / "samples")
    write_files(folder)
    config = load_config(folder)
    for number, lesson in enumerate(LESSONS, 1):
        if number >= arguments.first:
            teach(lesson, config, folder, arguments.threads)
            print(f"lesson {number} ended after {time.perf_counter() - start_s:.0f} s", flush=True)
    report_accuracy(folder)


if __name__ == "__main__":
    main()

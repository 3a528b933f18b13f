"""Trains a critic of the checkpoint `tiny` on the CPU: it judges what is read in pictures of digits, as VisualPRM does.

    .venv/bin/python tests/train_tiny_critic.py --out /tmp/critic

It begins with the weights of `tiny`, whose vision tower stays as it is, so pictures are encoded once, by the engine.
Prompts and the places of scores are those of `VisualPRM` itself, at V2PE delta 1, and accuracy is measured through it.
The loss is the cross entropy of "+" or "-" among all tokens, not these two alone, so that a reply in a chat begins with
one of them, too. Besides, there is a loss at each token of an answer: without it, so few steps are not nearly enough.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor

from internvl_rt import Engine
from internvl_rt.checkpoint.config import load_config
from internvl_rt.checkpoint.folder import open_checkpoint
from internvl_rt.critic import VisualPRM
from internvl_rt.inputs.places import Places
from internvl_rt.inputs.prepare import Conversation, Prepared
from internvl_rt.model.dialects import DIALECTS
from internvl_rt.model.internvl import InternVL, build_weights, named_parameters
from internvl_rt.model.linear import Linear
from internvl_rt.model.ops import TORCH
from internvl_rt.model.weights import load_weights, save_weights
from support.digits import MAX_DIGITS, Exercise, build_messages, draw_reading, load_glyphs
from support.optimiser import Trainer
from support.tiny_files import write_files
from train_tiny import DTYPE, DenseOps, keep_freed_memory, run_padded

SEED = 5
TINY = Path(__file__).parents[1] / "internvl_rt" / "tiny"
NUM_PICTURES, NUM_STEPS, BATCH_SIZE = 2000, 1200, 32
RATE = 0.35  # factor of the decoder's learning rates
LENGTHS = range(1, MAX_DIGITS + 1)
NUM_MEASURED = 60  # pictures of each length on which the critic is measured
MISTAKES = {"replace": 0.5, "other token": 0.16, "drop": 0.12, "double": 0.1, "swap": 0.12}  # how likely each is
OTHERS = (*"+-.:$", " ", " are", " equal", "Picture", "st", "\n")  # what `tiny` says between digits when it is hot
COUNTED = "There are {} digits."  # the first step of an answer of two
TWO_STEPS = 0.25  # share of answers of two steps
REPLY_START = 5  # tokens from a step's last one to the place of its score: the turn's end and the reply's start
NUM_TOLD = 12  # what the head tells of a token: ten digits, whether it is right, and whether all up to it are
RIGHT_WEIGHT = 0.3  # of right tokens where the head tells whether a token is right: only one in a few is wrong
UNKNOWN = -100


@dataclass(frozen=True, slots=True)
class Dialogue:
    """An answer as the critic sees it, in A tokens from the answer's first one to the last place of a score."""

    prompt: Prepared
    places: Places  # where scores are read
    first: int  # index of the answer's first token
    first_wrong: int  # index of the first wrong token; the prompt's length if there is none
    digit_A: np.ndarray  # the digit that would be right in each token's place, up to the first wrong one, or UNKNOWN
    visual_XD: Tensor


@dataclass(frozen=True, slots=True)
class Picture:
    """A question about a picture of digits, which has been read and encoded."""

    digits: str
    question: Conversation  # one turn
    visual_XD: Tensor


def spoil(rng: np.random.Generator, digits: str) -> str:
    """Makes one of the mistakes that `tiny` makes; the answer is never empty and never right."""
    while True:
        kind, place = rng.choice(list(MISTAKES), p=list(MISTAKES.values())), int(rng.integers(len(digits)))
        before, digit, after = digits[:place], digits[place], digits[place + 1 :]
        spoilt = {
            "replace": before + str(rng.integers(10)) + after,
            "other token": before + str(rng.choice(OTHERS)) + after,
            "drop": before + after,
            "double": before + 2 * digit + after,
            "swap": before + after[:1] + digit + after[1:],
        }[str(kind)]
        if spoilt.strip() not in ("", digits):
            return spoilt


def draw_answer(rng: np.random.Generator, digits: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Draws the steps of an answer, half of the time with a mistake, and returns them and what would be right."""
    read = digits if rng.random() < 0.5 else spoil(rng, digits)
    if rng.random() >= TWO_STEPS:
        return (read,), (digits,)
    right = (COUNTED.format(len(digits)), digits)
    if read == digits or rng.random() < 0.5:
        return (right[0], read), right
    count = int(rng.choice([each for each in LENGTHS if each != len(digits)]))
    return (COUNTED.format(count), digits), right


def draw_pictures(rng: np.random.Generator, engine: Engine, number: int) -> list[Picture]:
    """Draws pictures of training glyphs."""
    glyphs = load_glyphs(held_out=False)
    exercises = [draw_reading(rng, glyphs, int(rng.integers(1, MAX_DIGITS + 1)), "read") for _ in range(number)]
    visual = engine.encode_images([exercise.pictures[0] for exercise in exercises])
    questions = [engine.preparer.read(build_messages(exercise), engine.loop.check) for exercise in exercises]
    return [
        Picture(exercise.numbers[0], replace(question, turns=question.turns[-1:]), visual_XD.to(DTYPE))
        for exercise, question, visual_XD in zip(exercises, questions, visual, strict=True)
    ]


def draw_dialogue(rng: np.random.Generator, critic: VisualPRM, picture: Picture) -> Dialogue:
    """Draws an answer about a picture. It becomes wrong where its dialogue begins to differ from the right one's."""
    steps, right_steps = draw_answer(rng, picture.digits)
    prompt, right = (critic._prompt(picture.question, each, None, None) for each in (steps, right_steps))
    assert prompt.places is not None
    encode = critic.engine.tokenizer.encode
    ids, right_ids = np.array(prompt.prompt.token_ids), np.array(right.prompt.token_ids)
    num_both = min(len(ids), len(right_ids))
    wrong = np.flatnonzero(ids[:num_both] != right_ids[:num_both])
    first_wrong = int(wrong[0]) if len(wrong) else len(ids)
    first, stop = (
        int(prompt.places.index_P[0]) - REPLY_START - len(encode(steps[0])) + 1,
        min(first_wrong + 1, num_both),
    )
    digit_A = np.full(len(ids) - first, UNKNOWN)
    for digit, token_id in enumerate(encode("0123456789")):
        digit_A[: stop - first][right_ids[first:stop] == token_id] = digit
    return Dialogue(prompt, prompt.places, first, first_wrong, digit_A, picture.visual_XD)


def measure_loss(model: InternVL, head: Linear, dialogues: Sequence[Dialogue]) -> tuple[Tensor, Tensor]:
    """Returns the mean cross entropy of the scores, and the error of `head`.

    A score alone says too little of what makes an answer wrong. So the head tells after every token of it which digit
    should stand there, whether the token is right (this does not count after a wrong one), and whether all so far are.
    """
    prompts = [each.prompt for each in dialogues]
    x_TD, seq_len = run_padded(
        model,
        [each.prompt.token_ids for each in prompts],
        [each.prompt.spans for each in prompts],
        [each.position_T for each in prompts],
        torch.cat([each.visual_XD for each in dialogues]),
    )

    def rows(indices: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate([each + row * seq_len for row, each in enumerate(indices)]))

    def gather(arrays: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(arrays))

    good, bad = dialogues[0].places.candidate_PK[0].tolist()
    is_good_R = gather([each.places.index_P < each.first_wrong for each in dialogues])
    logits_RV = model.logits(x_TD[rows([each.places.index_P for each in dialogues])]).float()
    score_loss = F.cross_entropy(logits_RV, torch.where(is_good_R, good, bad))

    indices = [each.first + np.arange(len(each.digit_A)) for each in dialogues]
    is_right_A = gather([index < each.first_wrong for index, each in zip(indices, dialogues, strict=True)]).float()
    counts_A = gather([index <= each.first_wrong for index, each in zip(indices, dialogues, strict=True)]).float()
    x_AD = x_TD[rows(indices)].float()
    told_AK = F.linear(F.rms_norm(x_AD, x_AD.shape[1:]), head.weight_NK, head.bias_N)
    weight_A = counts_A * torch.where(is_right_A > 0, RIGHT_WEIGHT, 1.0)
    told_loss = (
        F.cross_entropy(told_AK[:, :10], gather([each.digit_A for each in dialogues]), ignore_index=UNKNOWN)
        + 2 * F.binary_cross_entropy_with_logits(told_AK[:, 10], is_right_A, weight=weight_A)
        + F.binary_cross_entropy_with_logits(told_AK[:, 11], is_right_A)
    )
    return score_loss, told_loss


def train(critic: VisualPRM, model: InternVL, named: dict[str, Tensor]) -> None:
    """Trains the decoder; every step draws new answers to some of the pictures.

    The parameters `named` are float32; the model's own are these, rounded.
    """
    rng, start_s = np.random.default_rng(SEED), time.perf_counter()
    pictures = draw_pictures(rng, critic.engine, NUM_PICTURES)
    print(f"{NUM_PICTURES} pictures after {time.perf_counter() - start_s:.0f} s", flush=True)
    width = model.config.decoder.hidden_size
    head = Linear(torch.zeros(NUM_TOLD, width), torch.zeros(NUM_TOLD))  # the checkpoint does not include this head
    rates = {"vision_rate": 1.0, "decoder_rate": RATE, "last_share": 0.0}
    decoder = {path: each for path, each in named.items() if path.startswith("decoder.")}
    trainer = Trainer(decoder, named_parameters(model.weights), head, NUM_STEPS, **rates, num_threads=2)
    for _ in range(NUM_STEPS):
        batch = [draw_dialogue(rng, critic, pictures[n]) for n in rng.integers(0, len(pictures), BATCH_SIZE)]
        halves = [batch[0::2], batch[1::2]]
        trainer.step(lambda index, halves=halves: measure_loss(model, head, halves[index]))


def report_accuracy(folder: Path) -> None:
    """Prints how well right answers and answers with a mistake are told apart, on glyphs outside the training set."""
    glyphs, rng = load_glyphs(held_out=True), np.random.default_rng([SEED, 1])
    print("| digits | answers | right by 0.5 | AUC |\n|---|---|---|---|")
    with VisualPRM.from_pretrained(folder, device="cpu", dtype="float32") as critic:
        for length in LENGTHS:
            exercises = [draw_reading(rng, glyphs, length, "read") for _ in range(NUM_MEASURED)]
            scores = np.array([score_pair(critic, rng, exercise) for exercise in exercises])
            is_right = np.broadcast_to([True, False], scores.shape)
            accuracy, area = np.mean((scores > 0.5) == is_right), roc_auc_score(is_right.ravel(), scores.ravel())
            print(f"| {length} | {scores.size} | {accuracy:.1%} | {area:.3f} |", flush=True)


def score_pair(critic: VisualPRM, rng: np.random.Generator, exercise: Exercise) -> list[float]:
    """Returns the scores of the right answer and of one with a mistake."""
    (digits,) = exercise.numbers
    return [each.score for each in critic.score_responses(build_messages(exercise), [digits, spoil(rng, digits)])]


def train_critic(folder: Path) -> None:
    """Writes the critic's checkpoint into a folder, which may be missing."""
    folder.mkdir(parents=True, exist_ok=True)
    write_files(folder)
    config = load_config(folder)
    named = named_parameters(load_weights(open_checkpoint(TINY), config, dtype=torch.float32, device="cpu"))
    rounded = build_weights(config, dtype=DTYPE, device="cpu")
    for path, parameter in named_parameters(rounded).items():
        parameter.copy_(named[path])
    with Engine.from_pretrained(TINY, device="cpu", dtype="float32") as engine:
        train(VisualPRM(engine), InternVL(config, rounded, DenseOps(**vars(TORCH))), named)
    for parameter in named_parameters(rounded).values():
        parameter.requires_grad_(False)
    save_weights(rounded, config, folder, dialect=DIALECTS["original"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains a critic of the tiny checkpoint and prints its accuracy.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    folder, start_s = parser.parse_args().out, time.perf_counter()
    keep_freed_memory()
    torch.set_num_threads(1)  # the trainer has two threads of its own
    train_critic(folder)
    print(f"trained in {time.perf_counter() - start_s:.0f} s", flush=True)
    report_accuracy(folder)


if __name__ == "__main__":
    main()

"""Draws requests of texts and pictures, the same for the same seed; they arrive as a Poisson process, or one by one."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from internvl_rt.bench.pictures import Png, noise_png

SYSTEM = "You are a careful assistant. Answer in full sentences, and say so where you are not certain. " * 2
PICTURES = 0.5  # share of the requests that have a picture
AGAIN = 0.3  # share of the pictures that came before, with another question
GRIDS = ((1, 1), (2, 1), (1, 2), (2, 2), (3, 2), (2, 3), (3, 4))  # columns and rows of tiles


@dataclass(frozen=True, slots=True)
class Arrival:
    at_s: float
    question: str
    max_tokens: int
    picture: tuple[int, int] | None = None  # its index in the mix, and its number

    @property
    def has_picture(self) -> bool:
        return self.picture is not None


@dataclass(frozen=True, slots=True)
class Mix:
    """Limits of a request's parts, so that every request fits the model, and the pictures of all requests."""

    max_characters: int
    max_tokens: int
    pictures: tuple[Png, ...]

    def messages(self, arrival: Arrival) -> list[dict[str, Any]]:
        """Returns a request's messages for the engine."""
        content: list[dict[str, Any]] = [{"type": "text", "text": arrival.question}]
        if arrival.picture is not None:
            index, number = arrival.picture
            content.insert(0, {"type": "image", "image": self.pictures[index].file(number)})
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]


def fitting_mix(max_model_len: int, tile_side: int, tokens_per_tile: int, max_tiles: int) -> Mix:
    """Gives a picture at most half of the window, question and answer at most an eighth each.

    tile_side: in pixels. max_tiles: of a picture, without the thumbnail.
    """
    room, rng = max_model_len // 8, np.random.default_rng(0)
    most = max(1, min(max_tiles, max_model_len // 2 // tokens_per_tile - 1))  # one tile is for the thumbnail
    grids = [(columns, rows) for columns, rows in GRIDS if columns * rows <= most]
    pictures = tuple(noise_png(w * tile_side, h * tile_side, w * h, rng) for w, h in grids)
    return Mix(min(1024, room), min(128, room), pictures)


def draw_arrivals(mix: Mix, seed: int, rate: float | None = None) -> Iterator[Arrival]:
    """Draws requests without end, at `rate` a second; without a rate all are there at once.

    Lengths of questions and answers are log-uniform: most are short.
    """
    rng = np.random.default_rng(seed)
    known: list[tuple[int, int]] = []  # pictures that came before
    at_s = 0.0
    while True:
        at_s += rng.exponential(1 / rate) if rate else 0.0
        num_characters = int(mix.max_characters ** rng.uniform(0.5, 1))
        question = bytes(rng.integers(ord("a"), ord("z") + 1, num_characters, dtype=np.uint8)).decode()
        picture = None
        if rng.random() < PICTURES:
            if not known or rng.random() >= AGAIN:
                known.append((int(rng.integers(len(mix.pictures))), int(rng.integers(1 << 63))))
                picture = known[-1]
            else:
                picture = known[rng.integers(len(known))]
        yield Arrival(at_s, question, max(2, int(mix.max_tokens ** rng.uniform(0.5, 1))), picture)

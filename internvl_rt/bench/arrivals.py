"""Draws requests that arrive at random: a Poisson process of texts and pictures, the same for the same seed."""

from dataclasses import dataclass
from typing import Any

import numpy as np

SYSTEM = "You are a careful assistant. Answer in full sentences, and say so where you are not certain. " * 2
PICTURES = 0.5  # share of the requests that have a picture
AGAIN = 0.3  # share of the pictures that came before, with another question
GRIDS = ((1, 1), (2, 1), (1, 2), (2, 2), (3, 2), (2, 3), (3, 4))  # columns and rows of tiles


@dataclass(frozen=True, slots=True)
class Arrival:
    at_s: float
    messages: list[dict[str, Any]]
    has_picture: bool
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Mix:
    """Limits of a request's parts, so that every request fits the model."""

    tile_side: int  # pixels
    max_tiles: int  # without the thumbnail
    max_characters: int
    max_tokens: int


def fitting_mix(max_model_len: int, tile_side: int, tokens_per_tile: int, max_tiles: int) -> Mix:
    """Gives a picture at most half of the window, question and answer at most an eighth each."""
    room = max_model_len // 8
    tiles = min(max_tiles, max_model_len // 2 // tokens_per_tile - 1)  # one tile is for the thumbnail
    return Mix(tile_side, max(1, tiles), max_characters=min(1024, room), max_tokens=min(128, room))


def draw_arrivals(rate: float, seconds: float, mix: Mix, seed: int) -> list[Arrival]:
    """Draws requests at `rate` a second. Lengths of questions and answers are log-uniform: most are short."""
    rng = np.random.default_rng(seed)
    side = mix.tile_side
    grids = [grid for grid in GRIDS if grid[0] * grid[1] <= mix.max_tiles]
    columns, rows = (max(grid[axis] for grid in grids) for axis in (0, 1))
    noise = rng.integers(0, 256, ((rows + 1) * side, (columns + 1) * side, 3), dtype=np.uint8)
    arrivals: list[Arrival] = []
    pictures: list[np.ndarray] = []  # views of the noise, so that none takes memory
    at_s = rng.exponential(1 / rate)
    while at_s < seconds:
        num_characters = int(mix.max_characters ** rng.uniform(0.5, 1))
        question = bytes(rng.integers(ord("a"), ord("z") + 1, num_characters, dtype=np.uint8)).decode()
        content: list[dict[str, Any]] = [{"type": "text", "text": question}]
        has_picture = rng.random() < PICTURES
        if has_picture:
            if not pictures or rng.random() >= AGAIN:
                width, height = (count * side for count in grids[rng.integers(len(grids))])
                top, left = rng.integers(0, side, 2).tolist()
                pictures.append(noise[top : top + height, left : left + width])
                chosen = pictures[-1]
            else:
                chosen = pictures[rng.integers(len(pictures))]
            content.insert(0, {"type": "image", "image": chosen})
        messages: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
        max_tokens = max(2, int(mix.max_tokens ** rng.uniform(0.5, 1)))
        arrivals.append(Arrival(at_s, messages, has_picture, max_tokens))
        at_s += rng.exponential(1 / rate)
    return arrivals

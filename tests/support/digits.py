"""Draws pictures of handwritten digits and questions about them, to train and measure the tiny checkpoint.

The glyphs are scikit-learn's copy of the UCI "Optical Recognition of Handwritten Digits" set (1797 of 8 x 8 pixels).
Every eighth glyph is held out: training pictures use none of these, and accuracy is measured on these alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from sklearn.datasets import load_digits

from internvl_rt import Engine, SamplingParams

READ = (
    "Read the digits.",
    "Read the number.",
    "Which digits are shown?",
    "What number do you see?",
    "What is written in the picture?",
    "What does the picture say?",
    "Transcribe the picture.",
)
COUNT = (
    "How many digits are there?",
    "How many digits do you see?",
    "How many digits does the picture show?",
    "How many digits are in the picture?",
    "Count the digits.",
    "What is the number of digits?",
)
COMPARE = (
    "Which picture shows the larger number?",
    "Which picture has the larger number?",
    "Which number is larger?",
    "Where is the larger number?",
    "In which picture is the number larger?",
    "Compare the numbers.",
)
MAX_DIGITS = 6
MAX_COMPARED = 2  # digits of each of two compared numbers

SCALES = (0.6, 4.0)  # of `draw_any_picture`: digits of about 24 to 160 pixels
FILTERS = ("NEAREST", "NEAREST", "BILINEAR", "BICUBIC", "LANCZOS")  # how plain glyphs are enlarged

Glyphs = tuple[npt.NDArray[np.float32], ...]  # one array [n, 8, 8] for each digit, ink from 0 to 1
Ink = npt.NDArray[np.float32]  # [height, width], from 0 to 1

Task = Literal["read", "count"]
Boxes = npt.NDArray[np.float64]  # [digits, 4]: left, top, right, bottom of each digit in pixels
DrawPicture = Callable[[np.random.Generator, Glyphs, str], tuple[Image.Image, Boxes]]


@dataclass(frozen=True, slots=True)
class Exercise:
    numbers: tuple[str, ...]  # what each picture shows
    pictures: tuple[Image.Image, ...]  # the first turn's message holds them all
    boxes: tuple[Boxes, ...]  # one entry for each picture
    turns: tuple[tuple[str, str], ...]  # (question, answer)


@cache
def load_glyphs(*, held_out: bool) -> Glyphs:
    ink, labels = load_digits(return_X_y=True)
    chosen = (np.arange(len(labels)) % 8 == 7) == held_out
    return tuple((ink[chosen & (labels == digit)] / 16).reshape(-1, 8, 8).astype(np.float32) for digit in range(10))


def draw_digits(rng: np.random.Generator, length: int, *, number: bool = False) -> str:
    """Draws random digits; a `number` of several digits does not begin with 0."""
    digits = rng.integers(0, 10, length)
    if number and length > 1:
        digits[0] = rng.integers(1, 10)
    return "".join(map(str, digits))


def draw_picture(
    rng: np.random.Generator, glyphs: Glyphs, digits: str, *, scale: float = 1.0
) -> tuple[Image.Image, Boxes]:
    """Draws each digit near the middle of its own square, in random size, colour and light; also returns the boxes.

    A square has 42 to 77 pixels, times `scale`.
    """
    height = rng.uniform(32, 48) * scale
    side = height * rng.uniform(1.3, 1.6)
    canvas_height, canvas_width = round(side), round(side * len(digits) * rng.uniform(0.97, 1.03))
    ink = np.zeros((canvas_height, canvas_width), np.float32)
    boxes = []
    for place, digit in enumerate(digits):
        stroke = _draw_stroke(rng, glyphs[int(digit)], height)[:canvas_height, : canvas_width // len(digits)]
        rows, columns = stroke.shape
        middle = (place + 0.5 + rng.uniform(-0.06, 0.06)) * canvas_width / len(digits)
        left = min(max(0, round(middle - columns / 2)), canvas_width - columns)
        top = round((canvas_height - rows) * rng.uniform(0.2, 0.8))
        np.maximum(
            ink[top : top + rows, left : left + columns], stroke, out=ink[top : top + rows, left : left + columns]
        )
        boxes.append((left, top, left + columns, top + rows))
    return _colour(rng, ink), np.array(boxes, np.float64)


def draw_any_picture(
    rng: np.random.Generator, glyphs: Glyphs, digits: str, *, kinds: Sequence[float]
) -> tuple[Image.Image, Boxes]:
    """Draws digits of any size.

    kinds: how likely each kind is: squares as of `draw_picture`, plain squares, free spacing, and plain squares of 80
        to 200 pixels, of which one to three are cut into two or three rows of tiles
    """
    scale = float(np.exp(rng.uniform(*np.log(SCALES))))
    kind = rng.choice(4, p=kinds)
    if kind == 0:
        return draw_picture(rng, glyphs, digits, scale=scale)
    if kind == 2:
        return draw_free_picture(rng, glyphs, digits, 40 * scale)
    return draw_plain_squares(rng, glyphs, digits, round(40 * scale) if kind == 1 else int(rng.integers(80, 200)))


def draw_plain_squares(rng: np.random.Generator, glyphs: Glyphs, digits: str, side: int) -> tuple[Image.Image, Boxes]:
    """Draws the glyphs as they are, each enlarged to a square of `side` pixels; the squares have no space between."""
    strokes = _enlarge_plainly(rng, glyphs, digits, (side, side))
    corners = [(place * side, 0) for place in range(len(digits))]
    return _colour_plainly(rng, np.concatenate(strokes, axis=1)), _find_boxes(strokes, corners)


def draw_free_picture(
    rng: np.random.Generator, glyphs: Glyphs, digits: str, height: float
) -> tuple[Image.Image, Boxes]:
    """Draws a row of digits of about `height` pixels with any gaps and margins, as plain glyphs or as handwriting."""
    if rng.random() < 0.5:
        width = height * rng.choice((1, rng.uniform(0.75, 1.2)))
        strokes = _enlarge_plainly(rng, glyphs, digits, (round(width), round(height)), is_cropped=rng.random() < 0.5)
    else:
        strokes = [_draw_stroke(rng, glyphs[int(digit)], height) for digit in digits]
    gap, margin = rng.choice((0, 0.3, 1.0)), rng.choice((0, 0.4, 0.4, 1.2))
    gaps = height * gap * rng.uniform(0.2, 1) * rng.uniform(0.6, 1.4, len(digits))
    left, top, right, bottom = height * margin * rng.uniform(0, 1, 4)
    falls = height * rng.choice((0, 0.15)) * rng.uniform(0, 1, len(digits))
    lefts = left + np.cumsum([0, *(stroke.shape[1] for stroke in strokes)])[:-1] + np.cumsum([0, *gaps])[:-1]
    corners = [(round(x), round(top + fall)) for x, fall in zip(lefts, falls, strict=True)]
    ends = [(x + s.shape[1], y + s.shape[0]) for (x, y), s in zip(corners, strokes, strict=True)]
    width, height = np.max(ends, axis=0)
    ink = np.zeros((int(height + bottom), int(width + right)), np.float32)
    for (x, y), stroke in zip(corners, strokes, strict=True):
        ink[y : y + stroke.shape[0], x : x + stroke.shape[1]] = stroke
    return (_colour if rng.random() < 0.5 else _colour_plainly)(rng, ink), _find_boxes(strokes, corners)


def _enlarge_plainly(
    rng: np.random.Generator, glyphs: Glyphs, digits: str, size: tuple[int, int], *, is_cropped: bool = False
) -> list[Ink]:
    """Enlarges a glyph of each digit to `size` (width, height) by one filter; `is_cropped` leaves out empty columns."""
    resample = Image.Resampling[rng.choice(FILTERS)]
    strokes = []
    for digit in map(int, digits):
        glyph = glyphs[digit][rng.integers(len(glyphs[digit]))]
        if is_cropped:
            inked = np.flatnonzero(glyph.max(0) > 0.1)
            glyph = glyph[:, inked[0] : inked[-1] + 1]
        width = max(1, round(size[0] * glyph.shape[1] / 8))
        strokes.append(np.clip(np.asarray(Image.fromarray(glyph).resize((width, size[1]), resample)), 0, 1))
    return strokes


def _find_boxes(strokes: list[Ink], corners: list[tuple[int, int]]) -> Boxes:
    """Returns the boxes of strokes at (left, top) `corners`, without their empty columns at the sides."""
    inked = [np.flatnonzero(stroke.max(0) > 0.1) for stroke in strokes]
    return np.array(
        [
            (x + columns[0], y, x + columns[-1] + 1, y + stroke.shape[0])
            for stroke, columns, (x, y) in zip(strokes, inked, corners, strict=True)
        ],
        np.float64,
    )


def _colour_plainly(rng: np.random.Generator, ink: Ink) -> Image.Image:
    """Colours the ink white on black, black on white, or in two shades of grey."""
    paper, pen = ((0, 255), (255, 0), (rng.uniform(0, 90), rng.uniform(160, 255)))[rng.choice(3, p=(0.4, 0.3, 0.3))]
    if rng.random() < 0.15:
        paper, pen = pen, paper
    return Image.fromarray((paper + ink * (pen - paper)).astype(np.uint8)).convert("RGB")


def _draw_stroke(rng: np.random.Generator, glyphs: npt.NDArray[np.float32], height: float) -> Ink:
    """Draws one glyph: cropped to its ink, enlarged to about `height` pixels, turned and slanted a little."""
    glyph = glyphs[rng.integers(len(glyphs))]
    inked = np.flatnonzero(glyph.max(0) > 0.1)
    glyph = np.pad(glyph[:, inked[0] : inked[-1] + 1], 1)
    scale = height / 8 * rng.uniform(0.88, 1.12, 2) * (1.0, rng.uniform(0.9, 1.1))
    rows, columns = np.round(np.array(glyph.shape) * scale).astype(int)
    turn, slant = rng.uniform(-0.08, 0.08, 2)
    inverse = np.array([[np.cos(turn), np.sin(turn) + slant], [-np.sin(turn), np.cos(turn)]]) / scale[::-1, None]
    offset = np.array(glyph.shape[::-1]) / 2 - inverse @ (columns / 2, rows / 2)
    matrix = np.column_stack((inverse, offset)).ravel().tolist()
    size = (int(columns), int(rows))
    stroke = Image.fromarray(glyph).transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    return np.clip((np.asarray(stroke) - 0.12) * rng.uniform(1.2, 1.7), 0, 1)


def _colour(rng: np.random.Generator, ink: Ink) -> Image.Image:
    """Colours the ink dark on light paper, or sometimes light on a dark board, with uneven light and some noise."""
    paper, pen = rng.uniform(190, 255) + rng.uniform(-25, 0, 3), rng.uniform(0, 70) + rng.uniform(0, 60, 3)
    if rng.random() < 0.2:
        paper, pen = pen * 0.8, paper
    across, down = rng.uniform(-12, 12, 2)
    height, width = ink.shape
    light = (
        np.linspace(-across, across, width, dtype=np.float32)
        + np.linspace(-down, down, height, dtype=np.float32)[:, None]
    )
    light += rng.standard_normal(ink.shape, np.float32) * np.float32(rng.uniform(0, 6))
    pixels = np.multiply.outer(ink, (pen - paper).astype(np.float32)) + paper.astype(np.float32) + light[..., None]
    return Image.fromarray(np.clip(pixels, 0, 255, out=pixels).astype(np.uint8))


def draw_reading(
    rng: np.random.Generator, glyphs: Glyphs, length: int, *tasks: Task, draw: DrawPicture = draw_picture
) -> Exercise:
    """Draws one picture and, for each task, a question about it."""
    digits = draw_digits(rng, length)
    questions, answers = {"read": READ, "count": COUNT}, {"read": digits, "count": str(length)}
    turns = tuple((str(rng.choice(questions[task])), answers[task]) for task in tasks)
    picture, boxes = draw(rng, glyphs, digits)
    return Exercise((digits,), (picture,), (boxes,), turns)


def draw_size_readings(
    rng: np.random.Generator, glyphs: Glyphs, drawings: Sequence[DrawPicture], number: int
) -> list[Exercise]:
    """Draws `number` pictures of each length by each of the `drawings`, with a question that asks to read them."""
    lengths = range(1, MAX_DIGITS + 1)
    return [
        draw_reading(rng, glyphs, n, "read", draw=draw) for draw in drawings for n in lengths for _ in range(number)
    ]


def draw_comparison(rng: np.random.Generator, glyphs: Glyphs, *, draw: DrawPicture = draw_picture) -> Exercise:
    """Draws two pictures and asks which number is larger; at least one pair in six shows the same number twice."""
    numbers = [draw_digits(rng, int(rng.integers(1, MAX_COMPARED + 1)), number=True) for _ in range(2)]
    if rng.random() < 1 / 3:
        numbers[1] = draw_digits(rng, len(numbers[0]), number=True)
    if rng.random() < 1 / 6:
        numbers[1] = numbers[0]
    pictures, boxes = zip(*(draw(rng, glyphs, number) for number in numbers), strict=True)
    first, second = map(int, numbers)
    answer = "Both are equal" if first == second else f"Picture {1 if first > second else 2}"
    return Exercise(tuple(numbers), pictures, boxes, ((str(rng.choice(COMPARE)), answer),))


SIZES: dict[str, tuple[DrawPicture, ...]] = {  # what accuracy over sizes and spacings is measured on
    "enlarged 0.6 to 8 times": tuple(partial(draw_picture, scale=scale) for scale in (0.6, 1.5, 2, 4, 8)),
    "plain squares of 24 to 72 pixels": tuple(partial(draw_plain_squares, side=side) for side in (24, 40, 56, 72)),
    "plain squares of 80 to 300 pixels": tuple(
        partial(draw_plain_squares, side=side) for side in (80, 112, 168, 224, 300)
    ),
    "free spacing, 24 to 300 pixels": tuple(
        partial(draw_free_picture, height=height) for height in (24, 40, 80, 160, 300)
    ),
}


def build_messages(exercise: Exercise, turn: int = 0) -> list[dict[str, Any]]:
    """Returns the messages up to the question of `turn`; the earlier turns have their right answers."""
    messages: list[dict[str, Any]] = []
    for question, answer in exercise.turns[: turn + 1]:
        pictures = [] if messages else [{"type": "image", "image": picture} for picture in exercise.pictures]
        messages.append({"role": "user", "content": [*pictures, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": answer})
    return messages[:-1]


def measure_accuracy(engine: Engine, exercises: Sequence[Exercise], *, turn: int = 0, delta: float = 1.0) -> float:
    """Returns the share of answers to the question of `turn` that match exactly."""
    batch = [build_messages(exercise, turn) for exercise in exercises]
    replies = engine.generate(batch, SamplingParams(max_tokens=12), v2pe_delta=delta)
    answers = [exercise.turns[turn][1] for exercise in exercises]
    return float(np.mean([reply.text == answer for reply, answer in zip(replies, answers, strict=True)]))

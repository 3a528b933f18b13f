"""Draws the data of the task in digits.yaml: pictures of handwritten digits, which "tiny" has not been trained on.

python examples/lmms_eval/draw_digits.py --number 40 --out digits
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))  # where those that train "tiny" are drawn

from support.digits import MAX_DIGITS, Exercise, draw_reading, load_glyphs


def draw_exercises(number: int) -> list[Exercise]:
    """Draws pictures of 1 to 6 digits, always the same ones, each with a question that asks to read them."""
    rng, glyphs = np.random.default_rng(2), load_glyphs(held_out=True)
    return [draw_reading(rng, glyphs, 1 + index % MAX_DIGITS, "read") for index in range(number)]


def write_folder(exercises: list[Exercise], folder: Path) -> None:
    """Writes the pictures as PNG files, and a line for each to metadata.jsonl, as `datasets` reads an image folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as lines:
        for index, exercise in enumerate(exercises):
            (picture,), ((question, answer),) = exercise.pictures, exercise.turns
            picture.save(folder / f"{index:04}.png")
            line = {"file_name": f"{index:04}.png", "question": question, "answer": answer}
            print(json.dumps(line), file=lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--number", type=int, default=300, help="pictures to draw (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("digits"), help="folder to write (default: %(default)s)")
    arguments = parser.parse_args()
    write_folder(draw_exercises(arguments.number), arguments.out)

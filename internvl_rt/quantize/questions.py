"""The questions of a calibration: a folder of pictures with `questions.jsonl`, or with a text beside each picture."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl_rt.checkpoint.files import read_file
from internvl_rt.checkpoint.json_section import parse_object
from internvl_rt.errors import RequestError, quoted

SAMPLES = Path(__file__).parents[1] / "tiny" / "samples"
MAX_QUESTIONS = 10_000
_FILE = "questions.jsonl"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")
_DEFAULT, _SAMPLES = "Describe this picture.", "Read the digits."
_REMEDY = "docs/quantisation.md says how it looks"


@dataclass(frozen=True, slots=True)
class Question:
    """A question about pictures, and perhaps the answer, whose tokens then take part in the calibration.

    where: the file, and perhaps the line, for messages
    """

    where: Path
    pictures: tuple[Path, ...]
    text: str
    answer: str = ""

    def messages(self) -> list[dict[str, Any]]:
        pictures = [{"type": "image", "image": picture} for picture in self.pictures]
        return [{"role": "user", "content": [*pictures, {"type": "text", "text": self.text}]}]


def read_questions(folder: Path | None) -> list[Question]:
    """Returns the questions of a folder; None: of the sample pictures in the package.

    Raises RequestError if there are none, or none with a picture.
    """
    if folder is None:
        return [Question(file, (file,), _SAMPLES, file.stem) for file in sorted(SAMPLES.glob("*.png"))]
    if not folder.is_dir():
        raise RequestError(f"calibration: {quoted(str(folder))} is no folder; give a folder of pictures")
    file = folder / _FILE
    questions = list(_read_lines(file)) if file.exists() else list(_beside_pictures(folder))
    if not any(question.pictures for question in questions):
        where = f"{file}: no question names a picture" if file.exists() else f"{folder} holds no picture"
        raise RequestError(f"calibration: {where}; expected at least one ({', '.join(_SUFFIXES)}), {_REMEDY}")
    return questions


def _beside_pictures(folder: Path) -> Iterator[Question]:
    """Takes every picture in a folder, with the question in the .txt of the same name if there is one.

    The case of suffixes does not matter, and hidden files are left out.
    """
    files = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    texts = {file.stem: file for file in files if file.suffix.lower() == ".txt"}
    for picture in (file for file in files if file.suffix.lower() in _SUFFIXES):
        text = texts.get(picture.stem)
        yield Question(picture, (picture,), ("" if text is None else _text(text).strip()) or _DEFAULT)


def _read_lines(file: Path) -> Iterator[Question]:
    numbered = [(number, line) for number, line in enumerate(_text(file).split("\n"), 1) if line.strip()]
    if len(numbered) > MAX_QUESTIONS:
        raise RequestError(
            f"{file} has {len(numbered):,} questions, expected at most {MAX_QUESTIONS:,}; leave some out"
        )
    for number, line in numbered:
        where = Path(f"{file} line {number}")
        values = parse_object(where, line.encode(), RequestError, remedy=_REMEDY)
        given = values.get("image", [])
        names = [given] if isinstance(given, str) else given
        text, answer = values.get("question", _DEFAULT), values.get("answer", "")
        is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
        unknown = sorted(values.keys() - {"image", "question", "answer"})
        if unknown:
            raise RequestError(
                f"{where} has {', '.join(map(quoted, unknown))}, expected image, question and answer alone"
            )
        if not (is_list and isinstance(text, str) and text.strip() and isinstance(answer, str)):
            raise RequestError(
                f'{where} is {quoted(values)}, expected {{"image": a name or a list of names, "question": a text, '
                f'"answer": a text, if it is known}}; {_REMEDY}'
            )
        yield Question(where, tuple(file.parent / name for name in names), text, answer)


def _text(file: Path) -> str:
    try:
        return read_file(file, RequestError, remedy="mend it, or remove it").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"{file}: expected UTF-8 text; save it so") from error

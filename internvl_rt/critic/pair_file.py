"""Files of preference pairs, one JSON object a line, which the official trainer of MPO reads.

Source: the data set in internvl_chat_mpo.py of InternVL, and the files of MMPR.
"""

import json
import os
import secrets
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Items
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl_rt.checkpoint.files import open_file
from internvl_rt.critic.preference import ANSWER, Pair
from internvl_rt.errors import RequestError, TranslateErrors, quoted, utf8
from internvl_rt.inputs.prompt import MARKER
from internvl_rt.values import Integer, Kind, OrNone, Several, Text, read, read_fields

MAX_LINE_BYTES = 1 << 26  # of one pair in a file: the longest texts that are allowed, escaped
MAX_PICTURES = 1000  # of one question
_QUESTION, _TEXT, _PATH = Text(1, 1 << 20), Text(0, 1 << 20), Text(1, 4096)


@dataclass(frozen=True, slots=True)
class PairRecord:
    """A pair as it stands in a line of an MMPR file: a question with its pictures as text, and two answers.

    question: as the model is asked; "<image>" marks the place of each picture, and may be left out for a single one.
    images: paths of the pictures, each relative to a folder that the reader of a file is given, or whole.
    chosen, rejected: a better and a worse answer; `rejected` may be empty until `continuation_pairs` makes one.
    answer: what the right answer comes to, if that is known; it is written to the file and not read again.

    Raises RequestError for wrong types, an empty question or chosen answer, and pictures without a place.
    """

    question: str
    chosen: str
    rejected: str = ""
    images: Items[str] = ()  # read as a tuple; one text is one picture
    answer: str | None = None

    def __post_init__(self) -> None:
        kinds: dict[str, Kind] = {
            "question": _QUESTION,
            "chosen": ANSWER,
            "rejected": _TEXT,
            "answer": OrNone(_TEXT),
        }
        read_fields(self, {**kinds, "images": Several(_PATH, MAX_PICTURES)})
        num_places = self.question.count(MARKER)
        if len(self.images) > max(num_places, 1):
            raise RequestError(
                f"question: expected a {MARKER} for each of {len(self.images)} pictures, got {num_places}; write "
                f"{MARKER} where each belongs"
            )

    def to_pair(self, root: str | Path, *, max_tiles: int | None = None) -> Pair:
        """Makes the question a conversation, as the official trainer reads it, with the pictures' paths under `root`.

        max_tiles: most tiles of all pictures together, which share them evenly (official: 12); None: the engine's
            limit holds for each picture.

        The prompt is the trainer's if a line break follows each <image>, as MMPR has it; otherwise there is one more.
        With several pictures, that holds for an engine with `number_images=False`. Raises RequestError for an empty
        answer.
        """
        read("max_tiles", max_tiles, OrNone(Integer(1)))
        options = {} if max_tiles is None else {"max_tiles": max(1, max_tiles // max(1, len(self.images)))}
        has_place = not self.images or MARKER in self.question
        question = self.question if has_place else f"{MARKER}\n{self.question}"
        first, *others = question.split(MARKER, len(self.images))
        texts = [first, *(text.removeprefix("\n") for text in others)]
        parts: list[dict[str, Any]] = []
        for index, text in enumerate(texts):
            if index:
                parts.append({"type": "image", "image": str(Path(root, self.images[index - 1])), **options})
            if text:
                parts.append({"type": "text", "text": text})
        return Pair([{"role": "user", "content": parts}], self.chosen, self.rejected)


def write_pairs(path: str | Path, records: Iterable[PairRecord]) -> None:
    """Writes pairs to a file that the official trainer reads as an "annotation": one JSON object a line, in ASCII.

    The file appears when it is whole: an error, a full disk or an interrupt leaves what was there before. Raises
    RequestError for a record without a rejected answer, no record at all, and a file that cannot be written.
    """
    path = _path_of("path", path)

    def translate(error: BaseException) -> RequestError | None:
        if not isinstance(error, OSError | ValueError):
            return None
        return RequestError(
            f"{quoted(str(path))}: the pairs could not be written: {getattr(error, 'strerror', None) or error}; give a "
            "file in a folder that exists, may be written and has room"
        )

    errors, num_records = TranslateErrors(translate), 0
    with errors:
        if path.exists() and not path.is_file():  # a folder, a device or a pipe, which a rename would replace
            raise RequestError(f"{quoted(str(path))} is no file that can be replaced; give the name of a file")
        draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        file = draft.open("x", encoding="ascii")
    try:
        for num_records, record in enumerate(records, start=1):
            line = _line(record, f"records[{num_records - 1}]")
            with errors:
                file.write(line)
        if not num_records:
            raise RequestError("records: expected at least one pair, got none; the trainer reads no empty file")
        with errors:
            file.flush()
            os.fsync(file.fileno())
            file.close()
            draft.replace(path)
    finally:
        with suppress(OSError):
            file.close()  # tries again to write what did not fit
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def _line(record: PairRecord, where: str) -> str:
    """Returns the line of a record with the keys of the official files: one picture is a text, several are a list."""
    if not isinstance(record, PairRecord) or not record.rejected:
        raise RequestError(f"{where}: expected a PairRecord with a rejected answer, got {quoted(record)}; make one")
    fields: dict[str, Any] = {}
    if record.images:
        fields["image"] = record.images[0] if len(record.images) == 1 else list(record.images)
    fields |= {"question": record.question, "chosen": record.chosen, "rejected": record.rejected}
    if record.answer is not None:
        fields["answer_gt"] = record.answer
    for name, value in fields.items():
        for text in [value] if isinstance(value, str) else value:
            utf8(f"{where}.{name}", text)
    return f"{json.dumps(fields)}\n"


def read_pairs(path: str | Path, root: str | Path, *, max_tiles: int | None = None) -> list[Pair]:
    """Reads a file of MMPR, or one of `write_pairs`, for `score_pairs`.

    root: the folder that the paths of pictures start from, as in the official list of data sets. max_tiles: that of
    `PairRecord.to_pair`. Other keys of a line than image, question, chosen and rejected are not read; lines without
    text are left out.

    Raises RequestError that names the line for the first one that is no pair, is longer than 64 MiB, or names a picture
    that is no file. Pictures are not opened.
    """
    path, root = _path_of("path", path), _path_of("root", root)
    pairs = []
    for where, line in _lines(path):
        try:
            record = _record(line)
            for image in record.images:
                if not os.path.isfile(root / image):
                    raise RequestError(
                        f"picture {quoted(image)} is no file in {quoted(str(root))}; give its root folder"
                    )
            pairs.append(record.to_pair(root, max_tiles=max_tiles))
        except RequestError as error:
            raise RequestError(f"{where}: {error}") from error
    if not pairs:
        raise RequestError(f"{quoted(str(path))}: expected at least one pair, got an empty file; give another one")
    return pairs


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yields the place and the bytes of each line that is not empty."""
    with open_file(path, RequestError, remedy="give a file of pairs") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"{quoted(str(path))} line {number}"
            if len(line) > MAX_LINE_BYTES:
                raise RequestError(f"{where}: expected at most {MAX_LINE_BYTES:,} bytes, got more; take it out")
            if line.strip():
                yield where, line


def _record(line: bytes) -> PairRecord:
    try:
        fields = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise RequestError(f"expected a JSON object in UTF-8, got {quoted(line)} ({error}); correct it") from error
    if not isinstance(fields, dict) or not {"question", "chosen", "rejected"} <= fields.keys():
        raise RequestError(
            f"expected an object with the keys question, chosen, rejected, got {quoted(fields)}; correct it"
        )
    if fields.get("video"):
        raise RequestError("expected no video, got one; the official trainer reads none either, so take the line out")
    question, chosen, rejected = (fields[key] for key in ("question", "chosen", "rejected"))
    return PairRecord(question, chosen, rejected, fields.get("image") or ())


def _path_of(name: str, value: str | Path) -> Path:
    if not isinstance(value, str | Path) or not str(value):
        raise RequestError(f"{name} must be a string or a Path, got {quoted(value)}")
    return Path(value)

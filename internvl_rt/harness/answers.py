"""A file of answers, so that an evaluation that was killed goes on where it stopped.

Each line is a JSON object `{"key": digest, "answer": text}`, written as soon as the answer is known. The digest is of
all that the answer depends on, so a file serves any number of tasks and models.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internvl_rt.errors import RequestError, quoted

LINE_START = b'{"key": '


class AnswerFile:
    """The answers in a file, which is made if it is missing. A last line that a kill cut off is removed.

    Raises RequestError if the file cannot be read and written, or is no file of answers, which is left as it is.
    """

    def __init__(self, path: str | Path) -> None:
        self.answers: dict[str, str] = {}  # by key
        self._path = Path(path)
        try:
            with self._path.open("a+b") as file:
                file.seek(0)
                *lines, rest = (content := file.read()).split(b"\n")
                for number, line in enumerate(lines, 1):
                    self._read(number, line)
                if not (LINE_START.startswith(rest) or rest.startswith(LINE_START)):
                    raise self._foreign(len(lines) + 1)
                file.truncate(len(content) - len(rest))
        except RequestError:
            raise
        except (OSError, ValueError) as error:  # a name may have a null byte
            why = getattr(error, "strerror", None) or error
            raise RequestError(
                f"resume: {quoted(str(path))} cannot be read and written: {why}; name another file"
            ) from error

    def add(self, key: str, answer: str) -> None:
        """Writes an answer. It outlives a kill of this process from when this returns."""
        self.answers[key] = answer
        with self._path.open("ab") as file:
            file.write(json.dumps({"key": key, "answer": answer}).encode() + b"\n")

    def _read(self, number: int, line: bytes) -> None:
        try:
            entry = json.loads(line)
            key, answer = entry["key"], entry["answer"]
            if not isinstance(key, str) or not isinstance(answer, str):
                raise TypeError
            self.answers[key] = answer
        except (ValueError, TypeError, KeyError) as error:
            raise self._foreign(number) from error

    def _foreign(self, number: int) -> RequestError:
        return RequestError(
            f"resume: line {number} of {quoted(str(self._path))} is no answer of an evaluation; name another file"
        )


def digest_of(*values: Any) -> str:
    """Returns the SHA-256 of nested values: texts, numbers, bytes, lists, mappings, pictures, arrays and tensors.

    Pictures and arrays count by their pixels, and the path of a file by its name and size, not by its content.
    """
    digest = hashlib.sha256()

    def add(kind: str, *contents: bytes) -> None:
        for content in (kind.encode(), *contents):
            digest.update(len(content).to_bytes(8, "little"))
            digest.update(content)

    def add_value(value: Any) -> None:
        if isinstance(value, str):
            add("text", value.encode(errors="surrogatepass"), _size_of_file(value))
        elif isinstance(value, bytes):
            add("bytes", value)
        elif isinstance(value, Mapping):
            add_items(
                "mapping", [item for pair in sorted(value.items(), key=lambda pair: str(pair[0])) for item in pair]
            )
        elif isinstance(value, list | tuple):
            add_items("list", value)
        elif isinstance(value, Tensor):
            add_value(value.detach().cpu().contiguous().view(torch.uint8).numpy())
            add("tensor", repr((value.dtype, value.shape)).encode())
        elif hasattr(value, "tobytes"):
            form = [getattr(value, name, None) for name in ("mode", "size", "dtype", "shape")]
            add("pixels", repr(form).encode(), value.tobytes())
        elif value is None or isinstance(value, bool | int | float):
            add("value", repr(value).encode())
        else:
            raise RequestError(f"resume: an answer cannot be kept under a {type(value).__name__}; leave resume out")

    def add_items(kind: str, values: Iterable[Any]) -> None:
        items = list(values)
        add(f"{kind} of {len(items)}")
        for item in items:
            add_value(item)

    add_items("values", values)
    return digest.hexdigest()


def _size_of_file(text: str) -> bytes:
    """Returns the size of the file that a text names, or nothing if it names none."""
    try:
        return str(Path(text).stat().st_size).encode() if len(text) < 4096 and Path(text).is_file() else b""
    except (OSError, ValueError):
        return b""

"""Result documents: how they are read and written.

Here it is seen to that a document has the parts which programs read; tests hold it to the whole of
bench/results/schema.json, with a package that a GPU machine need not have.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

RESULTS = ("schema", "environment", "budget_s", "parts")  # what a file of results must have
DOCUMENT = ("part", "schema", "rows", "environment", "command")  # what the last line of a bench must have


class DocumentError(ValueError):
    """A file or a bench's last line is not what schema.json asks for."""


def check(value: Any, keys: Iterable[str]) -> dict[str, Any]:
    """The value itself; raises DocumentError where a program that reads it would fail: a key is missing, say."""
    if not isinstance(value, dict):
        raise DocumentError(f"expected an object, got {str(value)[:80]!r}")
    missing = [key for key in keys if key not in value]
    if missing:
        raise DocumentError(f"expected {', '.join(keys)}, got an object without {', '.join(missing)}")
    if value["schema"] != 1:
        raise DocumentError(f"expected schema 1, got {value['schema']!r}")
    rows = value.get("rows", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DocumentError(f"rows: expected a list of objects, got {str(rows)[:80]!r}")
    return value


def parse(text: str) -> Any:
    """JSON without NaN and Infinity, which are no measurements; raises DocumentError."""

    def refuse(constant: str) -> None:
        raise DocumentError(f"expected finite numbers, got {constant}")

    try:
        return json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise DocumentError(f"expected JSON, got {text[:80]!r} ({error})") from None


def parse_last_line(lines: list[str]) -> dict[str, Any]:
    """The document at the end of a bench's output; raises DocumentError."""
    last = next((line for line in reversed(lines) if line.strip()), "")
    return check(parse(last), DOCUMENT)


def load(path: Path) -> dict[str, Any]:
    """A file that bench/gpu.py wrote; raises DocumentError naming it."""
    try:
        return check(parse(path.read_text(encoding="utf-8")), RESULTS)
    except (OSError, DocumentError) as error:
        raise DocumentError(f"{path}: {error}") from None


def save(document: dict[str, Any], path: Path) -> None:
    """Whole or not at all: whoever is killed while writing leaves the file before it."""
    check(document, RESULTS)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".json.new")
    try:
        draft.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        os.replace(draft, path)
    except OSError:  # the disk is full, say
        draft.unlink(missing_ok=True)
        raise


def rows_of(document: Mapping[str, Any], kind: str) -> list[dict[str, Any]]:
    """The rows of all parts whose documents are of this kind, each with the name of its part (`decode_1b`) in `in`."""
    documents = {name: part["document"] for name, part in document["parts"].items() if "document" in part}
    return [{"in": name, **row} for name, each in documents.items() if each["part"] == kind for row in each["rows"]]

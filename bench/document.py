"""Result documents: what bench/results/schema.json allows, and how they are read and written.

The checker knows the keywords that the schema uses and no others, so that a machine without the package `jsonschema`
checks too what it is about to keep.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SCHEMA = json.loads((Path(__file__).parent / "results" / "schema.json").read_text(encoding="utf-8"))
TYPES: dict[str, type | tuple[type, ...]] = {
    "array": list,
    "boolean": bool,
    "integer": int,
    "null": type(None),
    "number": (int, float),
    "object": dict,
    "string": str,
}
KEYWORDS = {
    *("$schema", "title", "description", "$defs", "$ref", "const", "enum", "type", "pattern", "minimum"),
    *("required", "properties", "additionalProperties", "items"),
}


class DocumentError(ValueError):
    """A file or a bench's last line is not what schema.json asks for."""


def violations(value: Any, schema: Mapping[str, Any] | bool, where: str = "document") -> Iterator[str]:
    """Each as `where: expected ..., got ...`."""
    if isinstance(schema, bool):
        if not schema:
            yield f"{where}: not expected here"
        return
    assert schema.keys() <= KEYWORDS, f"the checker does not know {schema.keys() - KEYWORDS}"
    if "$ref" in schema:
        yield from violations(value, SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")], where)
    if "const" in schema and value != schema["const"]:
        yield f"{where}: expected {schema['const']!r}, got {value!r}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{where}: expected one of {schema['enum']}, got {value!r}"
    if "type" in schema:
        names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        if not any(_is(value, name) for name in names):
            yield f"{where}: expected {' or '.join(names)}, got {value!r}"
            return
    if "pattern" in schema and not re.search(schema["pattern"], value):
        yield f"{where}: expected text that fits {schema['pattern']}, got {value!r}"
    if "minimum" in schema and value < schema["minimum"]:
        yield f"{where}: expected at least {schema['minimum']}, got {value!r}"
    if isinstance(value, dict):
        yield from (f"{where}: {key!r} is missing" for key in schema.get("required", []) if key not in value)
        known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        for key, each in value.items():
            yield from violations(each, known.get(key, others), f"{where}.{key}")
    if isinstance(value, list):
        for index, each in enumerate(value):
            yield from violations(each, schema.get("items", True), f"{where}[{index}]")


def _is(value: Any, name: str) -> bool:
    """True is no number here, though it is an int to Python."""
    return isinstance(value, TYPES[name]) and (not isinstance(value, bool) or name == "boolean")


def check(value: Any, schema: Mapping[str, Any] = SCHEMA) -> dict[str, Any]:
    """The value itself; raises DocumentError naming the first few things that are wrong."""
    found = list(violations(value, schema))
    if found:
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        raise DocumentError("; ".join(found[:3]) + more)
    result: dict[str, Any] = value
    return result


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
    return check(parse(last), {"$ref": "#/$defs/document"})


def load(path: Path) -> dict[str, Any]:
    """A file that bench/gpu.py wrote; raises DocumentError naming it."""
    try:
        return check(parse(path.read_text(encoding="utf-8")))
    except (OSError, DocumentError) as error:
        raise DocumentError(f"{path}: {error}") from None


def save(document: dict[str, Any], path: Path) -> None:
    """Whole or not at all: whoever is killed while writing leaves the file before it."""
    check(document)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".json.new")
    draft.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, path)


def rows_of(document: Mapping[str, Any], kind: str) -> list[dict[str, Any]]:
    """The rows of all parts whose documents are of this kind, each with the name of its part (`decode_1b`) in `in`."""
    documents = {name: part["document"] for name, part in document["parts"].items() if "document" in part}
    return [{"in": name, **row} for name, each in documents.items() if each["part"] == kind for row in each["rows"]]

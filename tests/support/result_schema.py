"""bench/results/schema.json, to which tests hold every document that a bench writes."""

import json
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

PATH = Path(__file__).parents[2] / "bench" / "results" / "schema.json"
SCHEMA = json.loads(PATH.read_text(encoding="utf-8"))
RESULTS = Draft202012Validator(SCHEMA)
DOCUMENT = Draft202012Validator({"$ref": "#/$defs/document", "$defs": SCHEMA["$defs"]})


def violations(value: Any, validator: Draft202012Validator = RESULTS) -> list[str]:
    """Where and how a file of results breaks the schema."""
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(value)]


def valid(document: dict[str, Any]) -> dict[str, Any]:
    """The last line of a bench, which fails the test if it breaks the schema."""
    assert not violations(document, DOCUMENT)
    return document

"""Checks the documents that benches write against bench/results/schema.json."""

import json
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

PATH = Path(__file__).parents[2] / "bench" / "results" / "schema.json"
SCHEMA = json.loads(PATH.read_text(encoding="utf-8"))
RESULTS = Draft202012Validator(SCHEMA)
DOCUMENT = Draft202012Validator({"$ref": "#/$defs/document", "$defs": SCHEMA["$defs"]})


def violations(value: Any, validator: Draft202012Validator = RESULTS) -> list[str]:
    """Returns where and how a results file breaks the schema."""
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(value)]


def valid(document: dict[str, Any]) -> dict[str, Any]:
    """Returns the document on a bench's last line; fails the test if it breaks the schema."""
    assert not violations(document, DOCUMENT)
    return document

"""Bounds the cost of grammars, which come from requests: one that would explode is refused before it is compiled.

The library does not bound its own work for what is counted here: its time grows with the square of the properties, with
a higher power of the operators, and doubles with each combined pattern. Within these limits no call takes a second.
"""

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from internvl_rt.errors import RequestError, quoted, utf8
from internvl_rt.inputs.grammar_source import MAX_GRAMMAR_BYTES, GrammarKind, Tagged

MAX_PROPERTIES = 1000
MAX_REGEX_OPERATORS = 512
MAX_COMBINED_PATTERNS = 10

_OPERATOR = re.compile(r"[*+{(]|(?<!\()\?")  # repetitions and groups; escaped ones count too
_VERBOSE = re.compile(r"\(\?[a-zA-Z-]*x")
# A schema with a `_REFERENCES` keyword and another one of either set is an intersection of two schemas.
_REFERENCES = {"$ref", "anyOf", "oneOf"}
_ASSERTIONS = {"additionalProperties", "format", "items", "pattern", "prefixItems", "properties"}


def check_grammar_size(kind: GrammarKind, source: str | Tagged, after: str = "") -> None:
    """Raises RequestError for a grammar beyond the limits above, and for a JSON schema that is not JSON.

    source: the schema or regular expression as text, or the tagged values, whose schemas count together.
    """
    texts = [*([source] if isinstance(source, str) else source.texts), after]
    _check_count(kind, "bytes", sum(len(utf8(f"the {kind}", text)) for text in texts), MAX_GRAMMAR_BYTES)
    if isinstance(source, Tagged):
        _check_schemas(kind, [value.schema for value in source.values])
    elif kind == "json_schema":
        _check_schemas(kind, [source])
    else:
        _check_regex(source)


def _check_count(kind: GrammarKind, what: str, count: int, limit: int) -> None:
    if count > limit:
        raise RequestError(f"the {kind} has {count:,} {what}, at most {limit:,} are compiled; simplify it")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _check_regex(text: str) -> None:
    """Refuses text that the library would silently read in another sense, and too many operators."""
    if (len(text) - len(text.rstrip("\\"))) % 2:
        raise RequestError(f"the regex ends in a backslash that escapes nothing: {quoted(text)}; remove or double it")
    if "\n" in text and _VERBOSE.search(text):
        raise RequestError(f"the regex has line breaks under the flag x: {quoted(text)}; write it in one line")
    _check_count("regex", "repetitions and groups", len(_OPERATOR.findall(text)), MAX_REGEX_OPERATORS)


class _Cost(NamedTuple):
    """What costs time in a schema."""

    num_properties: int
    patterns: set[str]  # different ones, and formats
    combined: bool  # whether they may be combined


def _count(schema: object) -> _Cost:
    num_properties, patterns, combined = 0, set[str](), False
    pending = [schema]
    while pending:
        node = pending.pop()
        if isinstance(node, list):
            pending += node
        elif isinstance(node, dict):
            pending += node.values()
            properties, by_pattern = node.get("properties"), node.get("patternProperties")
            num_properties += len(properties) if isinstance(properties, dict) else 0
            patterns |= {node[word] for word in ("pattern", "format") if isinstance(node.get(word), str)}
            patterns |= by_pattern.keys() if isinstance(by_pattern, dict) else set()
            references = node.keys() & _REFERENCES
            combined |= bool(references) and len(references) + len(node.keys() & _ASSERTIONS) > 1
            combined |= not node.keys().isdisjoint(("allOf", "patternProperties"))
    return _Cost(num_properties, patterns, combined)


def _check_schemas(kind: GrammarKind, texts: Sequence[str]) -> None:
    costs = [_count(_parse_schema(kind, text)) for text in texts]
    _check_count(kind, "properties", sum(cost.num_properties for cost in costs), MAX_PROPERTIES)
    patterns = set[str]().union(*(cost.patterns for cost in costs))
    num_operators = sum(len(_OPERATOR.findall(pattern)) for pattern in patterns)
    _check_count(kind, "repetitions and groups in its patterns", num_operators, MAX_REGEX_OPERATORS)
    num_combined = sum(len(cost.patterns) for cost in costs if cost.combined)
    what = "different patterns and formats, and combines them (allOf, patternProperties, $ref or anyOf with more)"
    _check_count(kind, what, num_combined, MAX_COMBINED_PATTERNS)


def _parse_schema(kind: GrammarKind, text: str) -> Any:
    what = "the json_schema" if kind == "json_schema" else f"a json_schema of the {kind}"
    try:
        schema = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise RequestError(f"{what} is not JSON: {reason}; got {quoted(text)}; correct it") from error
    if isinstance(schema, dict) and "x-guidance" in schema:  # sets options of the library: lenient, separators, ...
        raise RequestError(f"{what} has x-guidance, which is no keyword of JSON Schema; remove it")
    return schema

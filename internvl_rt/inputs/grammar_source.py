"""What an answer may have to fit, as a caller gives it: a JSON schema, a regular expression, or tagged JSON values."""

import json
from dataclasses import dataclass
from typing import Any, Literal

from internvl_rt.errors import RequestError, quoted
from internvl_rt.values import Integer, Kind, OrNone, Text, UnfitError, read_fields

GrammarKind = Literal["json_schema", "regex", "tagged"]
JsonWhitespace = Literal["bounded", "compact", "free"]

MAX_GRAMMAR_BYTES = 64 << 10  # of UTF-8, and no more characters
MAX_TAGGED_VALUES = 128
MAX_MARK_CHARACTERS = 1024  # of the text that a grammar holds after, a trigger or a separator


class _Schema:
    """A JSON schema as text; a dict is written at once, so that a later change of it changes no answer."""

    expected = "a JSON schema as a dict or as text of at most 65,536 characters, or True for any JSON value"

    def read(self, value: object) -> str:
        if isinstance(value, str):
            return PATTERN.read(value)
        if value is not True and not isinstance(value, dict):
            raise UnfitError
        return _write_schema(value)


def _write_schema(schema: object) -> str:
    """Writes a schema as JSON, no more of it than its size may be."""
    pieces, num_bytes = list[str](), 0
    try:
        for piece in json.JSONEncoder().iterencode(schema):
            pieces.append(piece)
            num_bytes += len(piece)
            if num_bytes > MAX_GRAMMAR_BYTES:
                raise RequestError(
                    f"the json_schema has {num_bytes:,} bytes or more, at most {MAX_GRAMMAR_BYTES:,} are compiled; "
                    "simplify it"
                )
    except RequestError:
        raise
    except (TypeError, RecursionError, ValueError) as error:
        raise RequestError(
            f"json_schema: expected a JSON value, got one that json cannot write: {quoted(str(error))}"
        ) from error
    return "".join(pieces)


PATTERN = Text(0, MAX_GRAMMAR_BYTES)
SCHEMA = _Schema()
MARK = Text(1, MAX_MARK_CHARACTERS)


@dataclass(frozen=True, slots=True)
class TaggedValue:
    """A JSON value between two fixed texts. Raises RequestError for a field that is not what it should be."""

    begin: str
    json_schema: str | dict[str, Any] | bool  # as in SamplingParams; kept as text
    end: str

    def __post_init__(self) -> None:
        read_fields(self, _VALUE_KINDS)

    @property
    def schema(self) -> str:
        """`json_schema` as text."""
        assert isinstance(self.json_schema, str), "read as text"
        return self.json_schema


@dataclass(frozen=True, slots=True)
class Tagged:
    """One or more JSON values, each between two fixed texts, as calls of tools are written.

    Of two texts or numbers that fit in one place the longer one is read: with the beginnings "a" and "a1", "a12" is the
    value 2. Raises RequestError for a field that is not what it should be.

    values: what each value may be, from 1 to 128.
    trigger: with it, the answer may begin with any text that does not contain it, and there may be no value at all. As
        soon as it is written, the rest of a `begin` and a value must follow. Every `begin` starts with it.
    most: how many values there may be at most, up to 128; None: any number.
    separator: stands between two values.
    """

    values: tuple[TaggedValue, ...]
    trigger: str | None = None
    most: int | None = None
    separator: str = "\n"

    def __post_init__(self) -> None:
        read_fields(self, _TAGGED_KINDS)
        for index, value in enumerate(self.values):
            if self.trigger is not None and not value.begin.startswith(self.trigger):
                raise RequestError(
                    f"values[{index}].begin must start with the trigger {quoted(self.trigger)}, got "
                    f"{quoted(value.begin)}; change one of them"
                )

    @property
    def texts(self) -> list[str]:
        """All texts of this value, the schemas included."""
        texts = [text for value in self.values for text in (value.begin, value.schema, value.end)]
        return [*texts, self.trigger or "", self.separator]


class _Values:
    expected = f"a list of 1 to {MAX_TAGGED_VALUES} of TaggedValue"

    def read(self, value: object) -> tuple[TaggedValue, ...]:
        if not isinstance(value, list | tuple) or not 0 < len(value) <= MAX_TAGGED_VALUES:
            raise UnfitError
        if not all(isinstance(each, TaggedValue) for each in value):
            raise UnfitError
        return tuple(value)


class _Tagged:
    expected = "of type Tagged"

    def read(self, value: object) -> Tagged:
        if not isinstance(value, Tagged):
            raise UnfitError
        return value


TAGGED = _Tagged()
_VALUE_KINDS: dict[str, Kind] = {"begin": PATTERN, "json_schema": SCHEMA, "end": PATTERN}
_TAGGED_KINDS: dict[str, Kind] = {
    "values": _Values(),
    "trigger": OrNone(MARK),
    "most": OrNone(Integer(1, MAX_TAGGED_VALUES)),
    "separator": Text(0, MAX_MARK_CHARACTERS),
}

"""JSON files of a checkpoint: one reader of objects, and access to one key by key with types.

Every refusal names the file, the key and the value.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from internvl_rt.checkpoint.files import read_file
from internvl_rt.errors import ConfigError, InternVLError, quoted

_S = TypeVar("_S", bound=str)
MAX_SIZE = 1 << 24  # the largest dimension that is accepted: above every model's, and a product of two fits 64 bits
_DOWNLOAD = "download the file again"
UNSUPPORTED = "this kind of model is not supported; choose another of the InternVL family"


def parse_object(file: Path, text: bytes, refusal: type[InternVLError], *, remedy: str = _DOWNLOAD) -> dict[str, Any]:
    """Parses the JSON object in `text`, the content of `file` or of a part of it.

    Raises `refusal`, which asks for the remedy, if there is none, or if any object in it names a key twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in pairs:
            if key in values:
                raise ValueError(f"{quoted(key)} is there twice")
            values[key] = value
        return values

    try:
        values = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        reason = str(error).partition(";")[0]  # Python goes on with advice about its own limits
        raise refusal(f"{file} is not JSON: {reason}; {remedy}") from error
    if not isinstance(values, dict):
        raise refusal(f"{file}: expected a JSON object, got {type(values).__name__}; {remedy}")
    return values


def read_json(file: Path) -> "Section":
    """Reads the object in `file`. Raises ConfigError if there is none."""
    if not os.path.lexists(file):
        raise ConfigError(f"{file}: no such file; give the folder of a checkpoint, with its config.json")
    return Section(file, "", parse_object(file, read_file(file, ConfigError), ConfigError))


class Section:
    """One JSON object of a file, read key by key with its type. Every refusal names key, value and file."""

    def __init__(self, file: Path, path: str, values: Mapping[str, Any]) -> None:
        self.file, self.path, self.values = file, path, values

    def refusal(self, key: str, expected: str, remedy: str = _DOWNLOAD) -> ConfigError:
        given = f"is {quoted(self.values[key])}" if key in self.values else "is missing"
        return ConfigError(f"{self.file}: {self.path}{key} {given}, expected {expected}; {remedy}")

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None, *, maximum: int = MAX_SIZE) -> int:
        value = self.values.get(key, default)
        if type(value) is not int or not 1 <= value <= maximum:
            raise self.refusal(key, f"an integer from 1 to {maximum}")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key, default)
        if type(value) not in (int, float) or not 1e-30 < value < 1e30:
            raise self.refusal(key, "a positive number")
        return float(value)

    def part_of_one(self, key: str) -> float:
        value = self.values.get(key, -1)
        if type(value) not in (int, float) or not 0 <= value <= 1:
            raise self.refusal(key, "a number from 0 to 1")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if type(value) is not bool:
            raise self.refusal(key, "true or false")
        return value

    def choice(self, key: str, options: tuple[_S, ...], default: _S | None = None, *, remedy: str = UNSUPPORTED) -> _S:
        value = self.values.get(key, default)
        for option in options:
            if value == option:
                return option
        raise self.refusal(key, " or ".join(map(repr, options)), remedy)

    def side(self, key: str, default: int) -> int:
        """Returns the side of a square, which the file gives as one number or as [height, width]."""
        value = self.values.get(key)
        if not isinstance(value, list):
            return self.integer(key, default)
        if len(value) != 2 or type(value[0]) is not int or value[0] != value[1]:
            raise self.refusal(key, "two equal integers", UNSUPPORTED)
        return Section(self.file, self.path, {key: value[0]}).integer(key)

    def text(self, key: str) -> str:
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            raise self.refusal(key, "a text")
        return value or ""

    def section(self, key: str, *, remedy: str = _DOWNLOAD) -> "Section":
        value = self.values.get(key)
        if not isinstance(value, dict):
            raise self.refusal(key, "an object", remedy)
        return Section(self.file, f"{self.path}{key}.", value)

    def support(self, key: str, *supported: object, remedy: str = UNSUPPORTED) -> None:
        """Refuses any value but the `supported` ones; a missing key means the first of them."""
        value = self.values.get(key, supported[0])
        if not any(type(value) is type(one) and value == one for one in supported):
            raise self.refusal(key, " or ".join(map(repr, supported)), remedy)

"""What an argument may be: kinds of values with their ranges, each of which says what it expects.

A table of names and kinds stands beside the arguments that it describes. A value may come from JSON, from numpy or from
a caller's mistake; what is read is a plain Python value, or a RequestError that names the argument.
"""

import math
import sys
from collections.abc import Hashable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from numbers import Integral, Real
from typing import Any, Protocol

from internvl_rt.errors import RequestError, quoted


class UnfitError(Exception):
    """A value is not of the kind that reads it; `read` makes a RequestError of it."""


class Kind(Protocol):
    @property
    def expected(self) -> str: ...

    def read(self, value: object) -> Any:
        """Returns the plain value. Raises UnfitError if it is not of this kind."""


@dataclass(frozen=True, slots=True)
class Integer:
    """Integers of Python and numpy, but no bool."""

    least: int
    most: float = math.inf
    note: str = ""

    @property
    def expected(self) -> str:
        limits = f"of at least {self.least}" if self.most == math.inf else f"from {self.least} to {self.most}"
        return f"an integer {limits}{self.note}"

    def read(self, value: object) -> int:
        if not isinstance(value, Integral) or isinstance(value, bool) or not self.least <= int(value) <= self.most:
            raise UnfitError
        return int(value)


@dataclass(frozen=True, slots=True)
class Number:
    """Finite real numbers of Python and numpy, but no bool."""

    least: float
    most: float
    above: bool = False  # whether `least` itself is left out

    @property
    def expected(self) -> str:
        return f"a number {f'above {self.least} and at most' if self.above else f'from {self.least} to'} {self.most}"

    def read(self, value: object) -> float:
        if not isinstance(value, Real) or isinstance(value, bool):
            raise UnfitError
        try:
            number = float(value)
        except OverflowError:  # an integer beyond all floats
            raise UnfitError from None
        if not self.least <= number <= self.most or (self.above and number == self.least):
            raise UnfitError
        return number


@dataclass(frozen=True, slots=True)
class Seconds:
    """A span of time, as a list or tuple of two numbers, such as the part of a video that is looked at."""

    most: float  # before and after second 0

    @property
    def expected(self) -> str:
        return f"[start, end] in seconds, start first, both from {-self.most:g} to {self.most:g}"

    def read(self, value: object) -> tuple[float, float]:
        if not isinstance(value, list | tuple) or len(value) != 2:
            raise UnfitError
        start, end = map(Number(-self.most, self.most).read, value)
        if start > end:
            raise UnfitError
        return start, end


@dataclass(frozen=True, slots=True)
class Flag:
    @property
    def expected(self) -> str:
        return "True or False"

    def read(self, value: object) -> bool:
        value = _plain(value)
        if not isinstance(value, bool):
            raise UnfitError
        return value


@dataclass(frozen=True, slots=True)
class Text:
    least: int  # characters
    most: int
    printable: bool = False  # whether each of them must be, so that none breaks a line of a log

    @property
    def expected(self) -> str:
        return f"a string of {self.least} to {self.most:,} {'printable ' * self.printable}characters"

    def read(self, value: object) -> str:
        if not isinstance(value, str) or not self.least <= len(value) <= self.most:
            raise UnfitError
        text = str.__str__(value)  # of a subclass, whose own methods may say something else
        if self.printable and not text.isprintable():
            raise UnfitError
        return text


@dataclass(frozen=True, slots=True)
class OneOf:
    """Some values; a bool is not taken for a number, nor 16.0 for 16."""

    choices: tuple[Hashable, ...]
    description: str = ""

    @property
    def expected(self) -> str:
        return self.description or f"one of {self.choices}"

    def read(self, value: object) -> Any:
        value = _plain(value)
        for choice in self.choices:
            same_type = type(choice) is type(value) or (isinstance(choice, str) and isinstance(value, str))
            if same_type and choice == value:
                return choice
        raise UnfitError


@dataclass(frozen=True, slots=True)
class OrNone:
    kind: Kind

    @property
    def expected(self) -> str:
        return f"{self.kind.expected}, or None"

    def read(self, value: object) -> Any:
        return None if value is None else self.kind.read(value)


@dataclass(frozen=True, slots=True)
class Several:
    """Up to `most` values of a kind, as a tuple; one value stands for itself, and None for no value.

    Any iterable will do but bytes and a mapping, and no more of it is read than is needed.
    """

    kind: Kind
    most: int

    @property
    def expected(self) -> str:
        return f"{self.kind.expected}, or a list of at most {self.most} such"

    def read(self, value: object) -> tuple[Any, ...]:
        if value is None:
            return ()
        with suppress(UnfitError):
            return (self.kind.read(value),)
        if not isinstance(value, Iterable) or isinstance(value, str | bytes | bytearray | Mapping):
            raise UnfitError
        try:
            values = tuple(islice(value, self.most + 1))
        except TypeError:  # an array of no dimension, which is an iterable all the same
            raise UnfitError from None
        if len(values) > self.most:
            raise UnfitError
        return tuple(self.kind.read(each) for each in values)


def _plain(value: object) -> object:
    """Returns the Python value of a number or bool of numpy, and anything else as it is."""
    numpy = sys.modules.get("numpy")  # only a program that has imported it can give one
    return value.item() if numpy and isinstance(value, numpy.number | numpy.bool_) else value


def read(name: str, value: object, kind: Kind) -> Any:
    """Returns the plain value of an argument. Raises RequestError that names the argument."""
    try:
        return kind.read(value)
    except UnfitError:
        raise RequestError(f"{name} must be {kind.expected}, got {quoted(value)}") from None


def read_fields(options: object, kinds: Mapping[str, Kind]) -> None:
    """Makes the fields of a frozen dataclass plain values. Raises RequestError that names the first wrong one."""
    for name, kind in kinds.items():
        object.__setattr__(options, name, read(name, getattr(options, name), kind))

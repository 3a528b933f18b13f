"""Values that make a message long, slow, of several lines, or impossible, wherever one of them is given."""

from typing import Any

import numpy as np


class Unprintable:
    """All that a message may ask of a value raises."""

    def __repr__(self) -> str:
        raise RuntimeError("this object cannot be printed")

    __str__ = __format__ = __hash__ = __eq__ = __bool__ = __len__ = __repr__  # type: ignore[assignment]


def _nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def _loop() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


HOSTILE: dict[str, Any] = {
    "text_of_10_MB": "a" * 10_000_000,
    "line_breaks_and_escape_codes": "\x1b[2J\r\n\u2028\u202e\x00" * 1000,
    "half_a_surrogate_pair": "\ud800" * 1000,
    "bytes_of_10_MB": bytes(10_000_000),
    "integer_of_a_million_digits": 1 << 4_000_000,
    "negative_integer_of_a_million_digits": -(1 << 4_000_000),
    "nan": float("nan"),
    "list_of_a_million": [7] * 1_000_000,
    "list_of_long_texts": ["a" * 1_000_000] * 50,
    "object_with_long_keys": {"k" * 1_000_000: "\n" * 1_000_000, 1 << 4_000_000: None},
    "list_in_itself": _loop(),
    "deeply_nested_list": _nested(100_000),
    "array": np.zeros((1000, 1000)),
    "unprintable_object": Unprintable(),
    "type_of_long_name": type("N" * 1_000_000, (), {})(),
}

"""Damages bytes and plain objects at random, as a hostile or an unlucky user would."""

import struct
from collections.abc import Iterator
from random import Random
from typing import Any

import numpy as np

_DEPTH = 20  # of what is damaged: some values are nested deeper than Python recurses
_ODD_KEYS = ("", "unknown", "\x1b[31m\nred\u2028", "\ud800", "y" * 100_000)
_EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF)


def damage_bytes(data: bytes, others: list[bytes], random: Random) -> bytes:
    """Applies one to six changes; `others` are inputs of the same kind, from which pieces are taken."""
    damaged = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 3, 6))):
        # Headers decide most, so half of the changes are in the first bytes.
        at = random.randrange(max(1, min(len(damaged), random.choice((64, 512, 1 << 30)))))
        length = random.choice((1, 2, 4, 16, 256, 4096))
        match random.randrange(8):
            case 0:
                damaged[at : at + 1] = bytes([random.randrange(256)])
            case 1:
                damaged[at : at + 1] = bytes([damaged[at] ^ 1 << random.randrange(8)] if damaged else [])
            case 2:
                number = struct.pack(random.choice("<>") + "I", random.choice(_EXTREMES))
                size = random.choice((1, 2, 4))
                damaged[at : at + size] = number[-size:] if random.random() < 0.5 else number[:size]
            case 3:
                del damaged[at : at + length]
            case 4:
                damaged[at:at] = damaged[at : at + length] * random.choice((1, 2, 100))
            case 5:
                damaged[at:at] = random.randbytes(length)
            case 6:
                del damaged[at:]
            case 7:
                other = random.choice(others)
                start = random.randrange(len(other))
                damaged[at : at + length] = other[start : start + length]
    return bytes(damaged)


def odd_value(random: Random) -> Any:
    """Returns a value that is seldom expected where it is put."""
    deep: list[Any] = []
    for _ in range(random.choice((3, 5000))):
        deep = [deep]
    values: tuple[Any, ...] = (
        None, True, False, 0, -1, 1, 2, 16, 0.5, -0.0, 1e308, float("nan"), float("inf"), 2**31, 2**63, 2**70,
        10**5000, "", "x", "\x1b[31m\nred\u2028", "\ud800", "\0", "y" * 100_000, "<|im_end|>", "auto", "../../etc",
        b"", b"\xff\xd8\xff", [], {}, [None], {"type": "text"}, [[]], deep, (), {1: 2}, {"": {}}, object(),
        np.zeros((2, 2, 3), np.uint8), np.zeros((0, 5, 3)), np.float32(1), np.int64(3), range(3), 3 + 4j,
    )  # fmt: skip
    return random.choice(values)


def damage_object(value: Any, random: Random, odd: Any = odd_value) -> Any:
    """Returns a copy in which one to three places of nested lists and dicts are replaced, left out or doubled.

    odd: makes the value that is put into a place.
    """
    damaged = [_copy(value)]
    for _ in range(random.choice((1, 1, 2, 3))):
        places = list(_places(damaged))
        holder, key = random.choice(places)
        match random.randrange(5):
            case 0 | 1:
                holder[key] = odd(random)
            case 2 if holder is not damaged:
                del holder[key]
            case 3:
                other, other_key = random.choice(places)
                holder[key] = _copy(other[other_key])
            case _:
                if isinstance(holder, dict):
                    holder[random.choice(_ODD_KEYS)] = holder[key]
                elif holder is not damaged:
                    holder.insert(key, _copy(holder[key]))
    return damaged[0]


def _copy(value: Any, depth: int = 0) -> Any:
    """Copies lists and dicts as deep as `_places` goes, and shares everything else."""
    if isinstance(value, dict) and depth < _DEPTH:
        return {key: _copy(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list) and depth < _DEPTH:
        return [_copy(item, depth + 1) for item in value]
    return value


def _places(holder: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    items = holder.items() if isinstance(holder, dict) else enumerate(holder)
    for key, value in items:
        yield holder, key
        if isinstance(value, dict | list) and depth < _DEPTH:
            yield from _places(value, depth + 1)

"""What rank 0 tells the other ranks to compute: a few numbers, and the int32 buffers that a step consists of anyway.

One message a step crosses to each rank, as bytes: the kind of order, then its arrays of int32. A rank that follows one
order after another calls the same operations as rank 0, so that ranks meet wherever they have to (`model/shard.py`).
"""

from collections.abc import Sequence as Items
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from internvl_rt.model.shard import Lead
from internvl_rt.steps.step import StepShape

Key = tuple[int, ...]  # names a CUDA graph, see `step_graph.py`
Words = NDArray[np.int32]


class Drawing(NamedTuple):
    """What follows the layers of a step.

    scored_X: tokens of the chunks whose logits are scored
    num_visual: visual tokens of the step, which rank 0 shares before the layers
    num_draws: tokens that rank 0 draws and shares, but for those that a graph draws
    """

    scored_X: Words
    num_visual: int
    num_draws: int


class Pass(NamedTuple):
    """A step without graphs. flat: [shape.size]; row_R: tokens whose logits are needed for draws."""

    shape: StepShape
    max_query_len: int
    row_R: Words
    flat: Words
    drawing: Drawing


class Replays(NamedTuple):
    """A step from graphs. flat: what the graphs read; num_tokens: of the chunks."""

    keys: tuple[Key, ...]
    num_tokens: int
    flat: Words
    drawing: Drawing


class Encoding(NamedTuple):
    """Tiles to be encoded, which rank 0 shares. is_uint8: else they are in the model's dtype."""

    num_tiles: int
    is_uint8: bool


class Capturing(NamedTuple):
    """Graphs to be captured; the fields are arguments of `Executor.capture`."""

    block_size: int
    max_num_seqs: int
    max_model_len: int
    max_tokens_per_step: int
    everything: bool


class Copies(NamedTuple):
    """Blocks to be copied in the KV cache: pairs [number, 2]."""

    pairs: Words


Order = Pass | Replays | Encoding | Capturing | Copies


class _Kind(IntEnum):
    PASS = 0
    REPLAYS = 1
    ENCODING = 2
    CAPTURING = 3
    COPIES = 4


class Orders:
    """Sends orders to the other ranks, if there are any."""

    def __init__(self, lead: Lead | None) -> None:
        self._lead = lead

    def give(self, order: Order) -> None:
        if self._lead is not None:
            self._lead.order(write_order(order))

    def copy_blocks(self, pairs: Words) -> None:
        self.give(Copies(pairs))


def write_order(order: Order) -> bytes:
    match order:
        case Pass(shape, max_query_len, row_R, flat, drawing):
            return _join(_Kind.PASS, [*shape.sizes, max_query_len, *drawing[1:]], row_R, flat, drawing.scored_X)
        case Replays(keys, num_tokens, flat, drawing):
            named = [number for key in keys for number in (len(key), *key)]
            return _join(_Kind.REPLAYS, [num_tokens, *drawing[1:]], named, flat, drawing.scored_X)
        case Encoding(num_tiles, is_uint8):
            return _join(_Kind.ENCODING, [num_tiles, is_uint8])
        case Capturing():
            return _join(_Kind.CAPTURING, order)
        case Copies(pairs):
            return _join(_Kind.COPIES, pairs.reshape(-1))


def read_order(message: bytes) -> Order:
    words = np.frombuffer(message, np.int32)
    kind, number = words[:2].tolist()
    sizes, rest = words[2 : 2 + number], words[2 + number :]
    facts, *arrays = np.split(rest, np.cumsum(sizes)[:-1])
    match _Kind(kind):
        case _Kind.PASS:
            *shape, max_query_len, num_visual, num_draws = facts.tolist()
            row_R, flat, scored_X = arrays
            return Pass(StepShape(*shape), max_query_len, row_R, flat, Drawing(scored_X, num_visual, num_draws))
        case _Kind.REPLAYS:
            num_tokens, num_visual, num_draws = facts.tolist()
            named, flat, scored_X = arrays
            return Replays(_read_keys(named.tolist()), num_tokens, flat, Drawing(scored_X, num_visual, num_draws))
        case _Kind.ENCODING:
            num_tiles, is_uint8 = facts.tolist()
            return Encoding(num_tiles, bool(is_uint8))
        case _Kind.CAPTURING:
            *sizes, everything = facts.tolist()
            return Capturing._make([*sizes, bool(everything)])
        case _Kind.COPIES:
            return Copies(facts.reshape(-1, 2))


def _read_keys(named: list[int]) -> tuple[Key, ...]:
    keys, at = [], 0
    while at < len(named):
        size = named[at]
        keys.append(tuple(named[at + 1 : at + 1 + size]))
        at += 1 + size
    return tuple(keys)


def _join(kind: _Kind, *arrays: Items[int] | Words) -> bytes:
    parts = [np.asarray(array, np.int32) for array in arrays]
    header = np.array([kind, len(parts), *map(len, parts)], np.int32)
    return np.concatenate([header, *parts]).tobytes()

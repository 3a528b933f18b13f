"""What rank 0 orders is what the other ranks read, and a message is little more than what a step consists of anyway."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internvl_rt.steps.orders import (
    Capturing,
    Copies,
    Drawing,
    Encoding,
    Order,
    Orders,
    Pass,
    Replays,
    read_order,
    write_order,
)
from internvl_rt.steps.step import StepShape

LARGEST = 2**31 - 1
counts = st.integers(0, LARGEST)
words = st.lists(st.integers(-LARGEST - 1, LARGEST), max_size=20).map(lambda numbers: np.array(numbers, np.int32))
drawings = st.builds(Drawing, words, counts, counts)
shapes = st.builds(StepShape, *[st.integers(0, 5)] * 5, st.integers(1, 2))
keys = st.lists(st.lists(counts, min_size=1, max_size=3).map(tuple), min_size=1, max_size=3).map(tuple)


@st.composite
def passes(draw: Any) -> Pass:
    """A step's array has the size that its shape says."""
    shape = draw(shapes)
    flat = np.random.default_rng(draw(st.integers(0, 99))).integers(-9, 9, shape.size, dtype=np.int32)
    return Pass(shape, draw(counts), draw(words), flat, draw(drawings))


orders = st.one_of(
    passes(),
    st.builds(Replays, keys, counts, words, drawings),
    st.builds(Encoding, counts, st.booleans()),
    st.builds(Capturing, *[counts] * 4, st.booleans()),
    st.builds(Copies, words.map(lambda numbers: numbers[: len(numbers) // 2 * 2].reshape(-1, 2))),
)


def listed(order: Order) -> list[Any]:
    """Returns an order's kind and values, arrays as lists, so that they can be compared."""
    values: list[Any] = [type(order).__name__]
    for value in order:
        if isinstance(value, Drawing):
            value = listed(value)
        values.append((value.shape, value.tolist()) if isinstance(value, np.ndarray) else value)
    return values


@settings(deadline=None)
@given(orders)
def test_every_order_survives_its_way(order: Order) -> None:
    read = read_order(write_order(order))
    assert listed(read) == listed(order)
    types = [[type(value) for value in each] for each in (read, order)]
    assert types[0] == types[1], "numbers are Python's again, and a flag is a bool"
    assert all(value.dtype == np.int32 for value in read if isinstance(value, np.ndarray))


@settings(deadline=None)
@given(passes())
def test_a_message_has_the_arrays_of_a_step_and_a_few_words_more(order: Pass) -> None:
    num_words = order.shape.size + len(order.row_R) + len(order.drawing.scored_X)
    assert len(write_order(order)) == 4 * (num_words + 2 + 4 + 9), "the kind and number of arrays, their sizes, facts"


class Listener:
    """A `Lead` that keeps what it is told."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []

    def order(self, message: bytes) -> None:
        self.messages.append(message)


@pytest.mark.parametrize("number", [1, 3])
def test_copies_of_blocks_are_ordered_as_the_cache_lists_them(number: int) -> None:
    lead, pairs = Listener(), np.arange(2 * number, dtype=np.int32).reshape(-1, 2)
    Orders(lead).copy_blocks(pairs)  # type: ignore[arg-type]
    (message,) = lead.messages
    (read,) = read_order(message)
    assert read.tolist() == pairs.tolist()


def test_one_rank_gives_no_orders() -> None:
    Orders(None).give(Encoding(3, True))

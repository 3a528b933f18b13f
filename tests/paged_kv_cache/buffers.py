"""Builds the buffers of a step and checks split plans."""

import math
import re
from typing import Any

import numpy as np

from internvl_rt._C import PagedKVCache

POISON = -7  # fills every buffer before a step, to show the entries that are not written
MAX_UNSPLIT_BLOCKS = 4  # a row with at most this many blocks is never split


def int32(values: list[int]) -> np.ndarray:
    return np.array(values, np.int32)


def length_of(cache: PagedKVCache, seq_id: int) -> int:
    """Returns how many tokens of a sequence have slots, read from the error message of a rollback that is refused."""
    refusal = ""
    try:
        cache.rollback(seq_id, -1)
    except ValueError as error:
        refusal = str(error)
    named = re.search(r"expected 0 to (\d+) \(the length of sequence", refusal)
    assert named, f"a rollback by -1 was not refused for its number: {refusal}"
    return int(named[1])


def step_buffers(
    num_rows: int, table_width: int, num_tokens: int, num_items: int | None = None, *, has_window: bool = False
) -> dict[str, Any]:
    shapes: dict[str, Any] = {
        "query_start_S1": num_rows + 1,
        "seq_len_S": num_rows,
        "block_table_SN": (num_rows, table_width),
        "slot_T": num_tokens,
    }
    if has_window:
        shapes |= {"window_table_SN": (num_rows, table_width), "window_slot_T": num_tokens}
    if num_items is not None:
        shapes |= {"split_start_S1": num_rows + 1, "split_W3": (num_items, 3)}
    return {name: np.full(shape, POISON, np.int32) for name, shape in shapes.items()}


def check_split_plan(starts: list[int], items: list[list[int]], num_blocks: list[int]) -> None:
    """Checks that a plan covers each row's blocks once. num_blocks: each row's number, 0 for a row not to be split."""
    assert starts[0] == 0
    assert len(starts) == len(num_blocks) + 1
    resident = max(1, len(items) - len(num_blocks) + 1)
    even = max(1, math.ceil(sum(num_blocks) / resident))
    for row, end in enumerate(num_blocks):
        splits = items[starts[row] : starts[row + 1]]
        assert [split[0] for split in splits] == [row] * len(splits)
        borders = [split[1] for split in splits] + [end]
        assert borders[0] == 0
        assert [split[2] for split in splits] == borders[1:]
        lengths = [end - start for _, start, end in splits]
        if end <= MAX_UNSPLIT_BLOCKS:
            assert lengths == [end] * bool(end)
            continue
        assert len(set(lengths[:-1])) <= 1, "splits of different lengths"
        assert 0 < lengths[-1] <= lengths[0]
        shortest = math.ceil(math.sqrt(end / 8))
        assert lengths[0] <= max(2 * even, shortest), "a split longer than two even ones"
        assert len(lengths) <= math.ceil(end / shortest), "splits shorter than pays"
    assert all(item == [-1, -1, -1] for item in items[starts[-1] :])

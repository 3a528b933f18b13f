"""The buffers of a step, and what a split plan must look like."""

from typing import Any

import numpy as np

POISON = -7  # in every buffer before a step, so that an entry which is not written shows
MIN_BLOCKS_PER_SPLIT = 4


def int32(values: list[int]) -> np.ndarray:
    return np.array(values, np.int32)


def step_buffers(num_rows: int, table_width: int, num_tokens: int, num_items: int | None = None) -> dict[str, Any]:
    shapes: dict[str, Any] = {
        "query_start_S1": num_rows + 1,
        "seq_len_S": num_rows,
        "block_table_SN": (num_rows, table_width),
        "slot_T": num_tokens,
    }
    if num_items is not None:
        shapes |= {"split_start_S1": num_rows + 1, "split_W3": (num_items, 3)}
    return {name: np.full(shape, POISON, np.int32) for name, shape in shapes.items()}


def check_split_plan(starts: list[int], items: list[list[int]], num_blocks: list[int]) -> None:
    """num_blocks: of each row, 0 for those that are not to be split."""
    assert starts[0] == 0
    assert len(starts) == len(num_blocks) + 1
    sizes = set()
    for row, end in enumerate(num_blocks):
        splits = items[starts[row] : starts[row + 1]]
        assert [split[0] for split in splits] == [row] * len(splits)
        borders = [split[1] for split in splits] + [end]
        assert borders[0] == 0
        assert [split[2] for split in splits] == borders[1:]
        lengths = [end - start for _, start, end in splits]
        sizes |= set(lengths[:-1])
        assert not lengths or 0 < lengths[-1] <= min(sizes, default=lengths[-1])
    assert len(sizes) <= 1, "splits of different lengths"
    assert min(sizes, default=MIN_BLOCKS_PER_SPLIT) >= MIN_BLOCKS_PER_SPLIT
    assert all(item == [-1, -1, -1] for item in items[starts[-1] :])

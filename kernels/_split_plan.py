"""How decode attention is split over the chip: the rule in Python. csrc/ fills the engine's plans by the same rule.

A plan lists items (row, first block, end block): a run of the blocks of one sequence, which is a row of the batch. A
program reads one item for one kv head. The programs that are resident at once share the memory's bandwidth, and a few
programs alone do not use all of it. Hence two rules:

  * There are no more items than can be resident at once, so that no program begins only when the others end, provided
    that this makes no item more than twice as long as an even division of all blocks would; else that division holds.
  * The splits of a row are equally long, and not too short. The last program of a row to finish adds up the results of
    all n splits, which takes time in proportion to n, while a program reads for a time in proportion to blocks / n. By
    an H100's times for both, sqrt(blocks / 8) blocks a split is best, and one program best reads a row of up to four.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, chain

import torch
from torch import Tensor

from internvl_rt.kernels._launch import target_of

MAX_UNSPLIT_BLOCKS = 4


def num_split_items(num_sequences: int, num_kv_heads: int, num_sms: int) -> int:
    """Counts the items that the split plan of a batch needs room for: two programs a multiprocessor, one a sequence.

    With 128 channels two programs are resident on a multiprocessor and saturate the memory. Where the rows are too many
    or too unequal to run in one such wave, an even division of all blocks needs up to one item more for every row but
    the first. Items that a plan leaves empty cost next to nothing.
    """
    return max(0, num_sequences - 1) + max(1, 2 * num_sms // num_kv_heads)


def build_splits(
    seq_lens: Sequence[int], block_size: int, num_kv_heads: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Plans a call of decode attention for sequences of these lengths: its `split_start_S1` and `split_W3`.

    One plan serves all layers of a step. An engine's plans are filled by its KV cache, into memory that it keeps.
    """
    num_items = num_split_items(len(seq_lens), num_kv_heads, target_of(device).num_sms)
    return split_tensors(plan_splits([-(-length // block_size) for length in seq_lens], num_items), num_items, device)


def split_tensors(rows: list[list[list[int]]], num_items: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Puts the items of each row behind each other, and (-1, -1, -1) after the last, up to `num_items`."""
    starts, items = [0, *accumulate(map(len, rows))], list(chain.from_iterable(rows))
    items += [[-1, -1, -1]] * (num_items - len(items))
    split_W3 = torch.tensor(items, dtype=torch.int32, device=device).view(-1, 3)
    return torch.tensor(starts, dtype=torch.int32, device=device), split_W3


def plan_splits(num_blocks: Sequence[int], num_items: int) -> list[list[list[int]]]:
    """Lists the items of each row in order. num_blocks: of each row, 0 for one not to be read; num_items: in all."""
    resident = max(1, num_items - len(num_blocks) + 1)

    def count(longest: int) -> int:
        return sum(_num_splits(blocks, longest) for blocks in num_blocks)

    even = max(1, -(-sum(num_blocks) // resident))
    longest = even
    if count(2 * even) <= resident:  # then the longest split is the shortest with which all items are resident
        longest += bisect_left(range(even, 2 * even), True, key=lambda length: count(length) <= resident)
    return [_splits(row, blocks, _num_splits(blocks, longest)) for row, blocks in enumerate(num_blocks)]


def _num_splits(blocks: int, longest: int) -> int:
    if blocks <= MAX_UNSPLIT_BLOCKS:
        return min(blocks, 1)
    return -(-blocks // max(longest, math.ceil(math.sqrt(blocks / 8))))


def _splits(row: int, blocks: int, num_splits: int) -> list[list[int]]:
    if not blocks:
        return []
    length = -(-blocks // num_splits)
    return [[row, first, min(first + length, blocks)] for first in range(0, blocks, length)]

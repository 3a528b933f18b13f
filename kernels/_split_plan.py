"""How decode attention is split over the chip: the rule in Python. csrc/ fills the plans of the engine by the same one.

A plan lists items (row, first block, end block); a program reads one for one kv head. All programs that are resident at
once share the memory's bandwidth, and a few alone do not fill it. Hence:

  * no more items than are resident at once, so that none begins when the others end, if that makes none of them more
    than twice as long as an even division of all blocks would be; otherwise that even division;
  * the splits of a row are equally long, and not shorter than pays: what the last of them to finish adds up grows with
    their number n, what one reads with blocks / n. In an H100's times for both that is best at sqrt(blocks / 8) blocks,
    and a row of up to four is better read by one program.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence

MAX_UNSPLIT_BLOCKS = 4


def num_split_items(num_sequences: int, num_kv_heads: int, num_sms: int) -> int:
    """How many items the split plan of a batch should have room for: two programs a multiprocessor, and one a sequence.

    Two are resident at 128 channels and saturate the memory. Where the rows are too many or too unequal for one such
    wave, an even division of all blocks needs up to one item a row beyond it; the first row's is in the division. Items
    that a plan leaves empty cost next to nothing.
    """
    return max(0, num_sequences - 1) + max(1, 2 * num_sms // num_kv_heads)


def plan_splits(num_blocks: Sequence[int], num_items: int) -> list[list[list[int]]]:
    """The items of each row, in order. num_blocks: of each row, 0: it is not to be read; num_items: of the plan."""
    resident = max(1, num_items - len(num_blocks) + 1)

    def count(longest: int) -> int:
        return sum(_num_splits(blocks, longest) for blocks in num_blocks)

    even = max(1, -(-sum(num_blocks) // resident))
    longest = even
    if count(2 * even) <= resident:  # the shortest that makes one wave
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

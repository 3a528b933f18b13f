"""Decides how prefill attention is cut into programs, and describes the memory in which splits of a block meet.

A block of queries is one program, which reads all keys that its last query sees. A short chunk behind a long prefix has
so few blocks that most multiprocessors would do nothing; then programs share a block and each reads a run of its keys,
a split. A CUDA graph serves any lengths, so the programs themselves compute their splits from them, by this rule:

  * There are no more items, splits of blocks, than can be resident at once, so that no program begins when others end.
    Only blocks with queries count: rows without any, which pad a batch, take nothing from the others.
  * All splits of a batch are equally long, so a long row is split more often than a short one beside it.
  * A split is not too short, because a program of the block adds up the results of all of them, [rows, C] in float32
    each: to read one takes about half as long as to read and multiply 64 keys. By that, sqrt(keys / 32) splits are
    best, and between half and twice as many are hardly worse: hence a least length and a greatest number.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from internvl_rt.kernels._contract import require
from internvl_rt.kernels._launch import Target, cdiv, next_power_of_2, target_of

SPLIT_ROWS = 64  # (query, head) pairs of a block whose keys may be split
RESIDENT = 2  # programs for such blocks that a multiprocessor runs at once, limited by registers and shared memory
SPLIT_REGISTERS = 255  # of a thread of such a program, so that the compiler does not spill to make room for a third
MAX_SPLITS = 32
MAX_BLOCK_N = 64  # keys that are read at once
MAX_FLAT_ROWS = 16  # sequences of a batch, where every program reads each one's length


@dataclass(frozen=True, slots=True)
class SplitRule:
    """How the keys of a block are split: into runs of at least `min_keys`; or, with `num_splits`, the keys of each
    sequence into so many runs whatever else the batch holds (1: none is split).
    """

    min_keys: int
    num_splits: int | None = None

    def __post_init__(self) -> None:
        require(self.min_keys > 0, "splits", "min_keys of 1 or more", self.min_keys)
        require(self.num_splits is None or self.num_splits > 0, "splits", "num_splits of 1 or more", self.num_splits)


def split_rule(head_dim: int) -> SplitRule:
    return SplitRule(min_keys=4 * head_dim)


class Tiling(NamedTuple):
    block_m: int  # (query, head) pairs of a block
    block_n: int  # keys that are read at once
    num_warps: int
    num_stages: int
    num_items: int = 0  # splits of blocks for which each kv head has programs; 0: a program takes a block
    max_registers: int | None = None  # see Launch


@dataclass(frozen=True, slots=True)
class PrefillWorkspace:
    """Memory where splits leave partial results for the last one. It serves one call at a time: one a CUDA stream."""

    parts: Tensor  # float32
    stats: Tensor  # float32
    arrived: Tensor  # int32, zeros between calls


def build_prefill_workspace(device: torch.device, programs: int | None = None, head_dim: int = 128) -> PrefillWorkspace:
    """Makes a workspace for a number of programs; None: for the most that `split_rule` leads to on `device`.

    A program takes 33 kB with 128 channels, so those of an H100 take 8.8 MB.
    """
    if programs is None:
        programs = RESIDENT * target_of(device).num_sms
    rows = programs * SPLIT_ROWS
    return PrefillWorkspace(
        torch.empty(rows * head_dim, dtype=torch.float32, device=device),
        torch.empty(rows * 2, dtype=torch.float32, device=device),
        torch.zeros(programs, dtype=torch.int32, device=device),
    )


def require_room(workspace: PrefillWorkspace, programs: int, block_m: int, head_dim: int, device: torch.device) -> None:
    """Raises ValueError unless the workspace lies on the device and has room for the programs of a launch."""
    sizes = {"parts": block_m * head_dim, "stats": 2 * block_m, "arrived": 1}
    for name, size in sizes.items():
        tensor: Tensor = getattr(workspace, name)
        require(tensor.device == device, "workspace", f"{name} on {device}", tensor.device)
        require(tensor.numel() >= programs * size, "workspace", f"{programs * size} {name}", tensor.numel())


def choose_tiling(
    num_tokens: int,
    max_query_len: int,
    table_SN: Tensor,
    cache_BGPC: Tensor,
    group: int,
    rule: SplitRule,
    target: Target,
    dtype: torch.dtype,
    window: int | None = None,
) -> Tiling:
    """Decides from what is known when a graph is captured: the queries of all rows and of the longest, and the most
    keys that the block table has room for. dtype: of the queries
    """
    _, num_kv_heads, block_size, head_dim = cache_BGPC.shape
    num_rows, most_keys = table_SN.shape[0], keys_to_split(table_SN.shape[1] * block_size, window, MAX_BLOCK_N)
    forced = rule.num_splits is not None and rule.num_splits > 1

    def blocks_of(block_m: int) -> int:
        return most_blocks(num_rows, num_tokens, max_query_len, block_m // group)

    def num_items(block_m: int) -> int:
        blocks, resident = blocks_of(block_m), RESIDENT * target.num_sms // num_kv_heads
        if rule.num_splits is not None:
            return blocks * rule.num_splits if forced else 0
        most_splits = min(MAX_SPLITS, cdiv(most_keys, rule.min_keys))
        pays = num_rows <= MAX_FLAT_ROWS and most_splits > 1 and 2 * blocks <= resident
        return min(blocks * most_splits, resident) if pays else 0

    if dtype == torch.float32:  # float32 is for tests only: no matrix units
        return Tiling(32, 32, 4, 1, num_items(32))
    wide = target.capability in (90, 100, 103)  # matrix units read keys from shared memory, not from registers
    block_n = 64 if wide or head_dim < 128 else 32
    # Numbers in 8 bits and their scales take registers while they become operands, the more so in small cache blocks.
    is_tight = cache_BGPC.itemsize == 1 and not (wide and block_size >= 64)
    # Blocks are small if large ones would leave multiprocessors without work.
    if rule.num_splits is not None or blocks_of(128) * num_kv_heads < target.num_sms:
        items = num_items(SPLIT_ROWS)
        max_registers = SPLIT_REGISTERS if is_tight or ((items or window is not None) and not wide) else None
        if is_tight:
            return Tiling(SPLIT_ROWS, 32, 8 if head_dim == 128 else 4, 3, items, max_registers)
        return Tiling(SPLIT_ROWS, block_n, 4, 3, items, max_registers)
    has_tcgen05 = target.capability in (100, 103)
    if cache_BGPC.itemsize == 1 and head_dim == 128:
        return Tiling(128, 16 if is_tight else 32 if has_tcgen05 else block_n, 8, 3)
    # tcgen05 gives each thread of four warps a whole row of scores; with 128 channels, or with numbers in 8 bits and
    # their scales, it would have too few registers.
    num_warps = 4 if has_tcgen05 and head_dim < 128 and cache_BGPC.itemsize > 1 else 8
    return Tiling(128, block_n, num_warps, 3)


def most_blocks(num_rows: int, num_tokens: int, max_query_len: int, queries: int) -> int:
    """Counts the blocks, of `queries` queries of a kv head, of the rows whose lengths give the most."""
    return min(num_rows * cdiv(max_query_len, queries), cdiv(num_tokens, queries) + max(num_rows - 1, 0))


def sum_pairs(block_m: int, head_dim: int, target: Target) -> int:
    """Returns how many of a block's pairs the parts are added up for at once.

    A thread then has 16 values of each of 8 parts on their way, or 4 where the compiler would spill some of the 128.
    """
    values = {90: 2048, 100: 2048, 103: 2048}.get(target.capability, 512)  # of 128 threads
    return min(values // head_dim, block_m)


def padded_rows(num_rows: int) -> int:
    """Returns for how many rows a kernel is built that reads the lengths of all: few numbers, so few kernels."""
    return 1 if num_rows == 1 else max(MAX_FLAT_ROWS, next_power_of_2(num_rows))


def split_lens(
    query_lens: Sequence[int],
    seq_lens: Sequence[int],
    block_queries: int,
    num_items: int,
    block_n: int,
    rule: SplitRule,
    window: int | None = None,
) -> list[int]:
    """Returns the keys of a split, for each row. The kernel computes the same (`own_item`), in 32-bit integers."""
    seq_lens = [keys_to_split(keys, window, block_n) for keys in seq_lens]
    if rule.num_splits is not None:
        return [_whole(max(1, cdiv(keys, rule.num_splits)), block_n) for keys in seq_lens]
    blocks = [cdiv(length, block_queries) for length in query_lens]
    total = max(1, sum(blocks))
    work = sum(count * keys for count, keys in zip(blocks, seq_lens, strict=True))
    longest = max((keys for count, keys in zip(blocks, seq_lens, strict=True) if count), default=0)
    # Each of these lengths gives no more than num_items: equally many splits for all, or one for each so many keys.
    keys = cdiv(longest, min(max(num_items // total, 1), MAX_SPLITS))
    if num_items > total:
        keys = min(keys, cdiv(work, num_items - total))
    keys = max(keys, cdiv(longest, MAX_SPLITS), rule.min_keys)
    return [_whole(keys, block_n)] * len(seq_lens)


def keys_to_split(num_keys: int, window: int | None, block_n: int) -> int:
    """Returns the most keys of a sequence before the last split's end: from the first one that is read for a block of
    queries, at a multiple of block_n, to the block's first query.
    """
    return num_keys if window is None else min(num_keys, window + block_n - 1)


def block_splits(first_position: int, end: int, split_len: int, first_key: int = 0) -> list[tuple[int, int]]:
    """Returns the first and the last key + 1 of each split of a block whose first query is at `first_position`.

    first_key: the first one that is read. Without a window, where it is 0, every query sees the first key of every
    split. The last split goes to the `end` of what any of the queries sees.
    """
    starts = range(first_key, first_position + 1, split_len)
    return list(zip(starts, [*starts[1:], end], strict=True))


def _whole(keys: int, block_n: int) -> int:
    return cdiv(keys, block_n) * block_n

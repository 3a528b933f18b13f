"""How a product of few rows is parted among programs, and what the parts leave for each other.

The constants are of an H200 and estimated, not measured; bench/tune.py measures the neighbours of every plan.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from internvl_rt.kernels._contract import require
from internvl_rt.kernels._launch import Target, cdiv, target_of

MAX_ROWS = 16  # of x; more are a matrix product's business
# Bandwidth times latency, for a multiprocessor of an H200: 4.3 TB/s * 0.9 us / 132. To be measured.
BYTES_IN_FLIGHT = 32 * 1024
LARGE_WEIGHT = 16 * 2**20  # bytes from which device memory, not latency, is what a product waits for
# On matrix units a multiprocessor holds two programs of 8 warps, by their registers; one of the small q, k, v products,
# which are a single round. Each has one chunk on its way at a time, so a chunk takes a program about one latency of the
# memory, and the exchange of partial sums about two.
RESIDENT = 2
EXCHANGE_CHUNKS = 2
MAX_SPLIT_PROGRAMS = 4  # of a product with splits, for each multiprocessor: the workspace has room for so many
MAX_SPLITS = 64


@dataclass(frozen=True, slots=True)
class GemvPlan:
    """A program takes `block_n` rows of the weight (of a paired product block_n / 2 pairs) and 1 / split_k of K.

    With `matrix`, x is padded to 16 rows for the matrix units; else one or two rows are multiplied by the CUDA cores.
    """

    block_n: int
    block_k: int
    num_warps: int
    split_k: int = 1
    matrix: bool = False

    def __post_init__(self) -> None:
        require(self.block_n in (4, 8, 16, 32, 64), "plan", "block_n one of 4, 8, 16, 32, 64", self.block_n)
        require(self.num_warps in (1, 2, 4, 8), "plan", "num_warps one of 1, 2, 4, 8", self.num_warps)
        per_warp = self.block_k // self.num_warps
        whole = per_warp * self.num_warps == self.block_k and per_warp.bit_count() == 1
        require(whole and per_warp >= 16, "plan", "block_k a power of two, 16 or more a warp", self.block_k)
        require(1 <= self.split_k <= MAX_SPLITS, "plan", f"split_k from 1 to {MAX_SPLITS}", self.split_k)


@dataclass(frozen=True, slots=True)
class GemvWorkspace:
    """What the splits of a product leave for the last of them; for one call at a time, so one for each stream."""

    partial: Tensor  # float32
    arrived: Tensor  # int32, zeros between calls


def build_gemv_workspace(device: torch.device, programs: int | None = None) -> GemvWorkspace:
    """For so many programs; None: as many as any plan has that `choose_gemv_plan` makes for `device`."""
    if programs is None:
        programs = MAX_SPLIT_PROGRAMS * target_of(device).num_sms
    partial = torch.empty(programs * MAX_ROWS * (64 + 1), dtype=torch.float32, device=device)
    return GemvWorkspace(partial, torch.zeros(programs, dtype=torch.int32, device=device))


@lru_cache(1024)
def choose_gemv_plan(rows: int, n: int, k: int, dtype: torch.dtype, target: Target) -> GemvPlan:
    """For x [rows, k] and a weight [n, k]. Rows up to 2, and rows from 3 on, share one plan each.

    One or two rows need no splits: a block is 4 or 8 rows of the weight, so there are many, and all of a block's warps
    share K. On matrix units a program reads 16 rows of x beside its rows of the weight; where device memory is the
    limit these are therefore 64, and blocks are few. K is split into as many parts as let the last program end first:
    those that run at once should fill the chip, and a last round of a few leaves most of it idle.
    """
    load = 16 // dtype.itemsize  # elements that a thread loads at once
    if rows <= 2:
        block_n = 8 if n >= 8 * 4 * target.num_sms else 4
        in_flight = n * min(k * dtype.itemsize, 4 * 32 * 16)  # one chunk of four warps, of every row
        num_warps = 8 if in_flight < BYTES_IN_FLIGHT * target.num_sms and k > 4 * 32 * load else 4
        return GemvPlan(block_n, 32 * num_warps * load, num_warps)
    if n * k * dtype.itemsize >= LARGE_WEIGHT:
        block_n, block_k, num_warps = 64, 128, 8
    else:
        block_n, block_k, num_warps = 16, 64 * load, 8
    chunks, tiles = cdiv(k, block_k), cdiv(n, block_n)

    def chunks_in_turn(splits: int) -> int:
        rounds = cdiv(tiles * splits, RESIDENT * target.num_sms)
        return rounds * (cdiv(chunks, splits) + (EXCHANGE_CHUNKS if splits > 1 else 0))

    most = max(1, min(chunks, MAX_SPLIT_PROGRAMS * target.num_sms // tiles, MAX_SPLITS))
    per_split = cdiv(chunks, min(range(1, most + 1), key=chunks_in_turn))
    return GemvPlan(block_n, block_k, num_warps, cdiv(chunks, per_split), matrix=True)

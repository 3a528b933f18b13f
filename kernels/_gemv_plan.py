"""Decides how a product of few rows is split among programs, and describes the memory that splits share.

bench/tune.py measures the neighbours of every plan.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from internvl_rt.kernels._contract import require
from internvl_rt.kernels._launch import Target, cdiv, target_of

MAX_ROWS = 16  # of x; a product of more rows is a matrix product, gemm_epilogue
# The bytes that must be on their way to a multiprocessor of an H200, bandwidth times latency: 4.3 TB/s * 0.9 us / 132.
# Estimated.
BYTES_IN_FLIGHT = 32 * 1024
LARGE_WEIGHT = 16 * 2**20  # bytes; for a weight this large, device memory's bandwidth is the limit, not its latency
# On matrix units a multiprocessor's registers hold two programs of 8 warps, or one program of the small q, k, v
# products, which all run at once. A program waits for one chunk at a time, so a chunk takes about one latency of the
# memory; the exchange of partial sums takes about two.
RESIDENT = 2
EXCHANGE_CHUNKS = 2
MAX_SPLIT_PROGRAMS = 4  # of a product with splits, for each multiprocessor; the workspace has room for this many
MAX_SPLITS = 64
# For plans that pass the weight through shared memory: the shared memory that the programs of a multiprocessor may use
# together, and the share of all multiprocessors that have to load at once to reach the bandwidth of device memory.
STAGED_BYTES = 216 * 1024
BUSY_SHARE = 0.8
# With an early trigger: how many registers of a thread may hold chunks of the weight before the kernel waits. 48 hold
# the whole part of a program in the 1B's products of one or two rows. More would leave room for fewer programs. Not
# measured.
AHEAD_REGISTERS = 48
SMALL_WEIGHT = 7 * 2**20  # bytes; a product up to this size takes about one latency, an exchange two more


@dataclass(frozen=True, slots=True)
class GemvPlan:
    """A program takes `block_n` rows of the weight (for a paired product block_n / 2 pairs) and 1 / split_k of K.

    With `matrix`, x is padded to 16 rows for the matrix units; otherwise the CUDA cores multiply one or two rows. With
    `num_stages` as well, the weight is the matrix units' tall operand and shared memory has room for num_stages chunks
    of it; otherwise chunks pass through registers.
    """

    block_n: int
    block_k: int
    num_warps: int
    split_k: int = 1
    matrix: bool = False
    num_stages: int = 0

    def __post_init__(self) -> None:
        require(self.num_stages == 0 or 2 <= self.num_stages <= 8, "plan", "num_stages 0 or 2 to 8", self.num_stages)
        if self.num_stages:
            require(self.matrix, "plan", "matrix with num_stages", self.matrix)
            require(self.block_n in (16, 32, 64, 128), "plan", "block_n one of 16, 32, 64, 128", self.block_n)
            require(self.num_warps in (4, 8), "plan", "num_warps 4 or 8 with num_stages", self.num_warps)
        else:
            require(self.block_n in (4, 8, 16, 32, 64), "plan", "block_n one of 4, 8, 16, 32, 64", self.block_n)
            require(self.num_warps in (1, 2, 4, 8), "plan", "num_warps one of 1, 2, 4, 8", self.num_warps)
        per_warp = self.block_k // (1 if self.num_stages else self.num_warps)
        whole = self.block_k.bit_count() == 1
        require(whole and per_warp >= 16, "plan", "block_k a power of two, 16 or more a warp", self.block_k)
        require(1 <= self.split_k <= MAX_SPLITS, "plan", f"split_k from 1 to {MAX_SPLITS}", self.split_k)

    @property
    def prefetched(self) -> int:
        """Elements of each row that are brought to L2 while the kernel before this one ends."""
        return (1 << ((self.num_stages - 1).bit_length() - 1)) * self.block_k if self.num_stages else 0

    def chunks_ahead(self, k: int, column_bytes: int) -> int:
        """Returns how many chunks can be loaded before the wait: all of a program's if AHEAD_REGISTERS are enough.

        column_bytes: of a weight's row

        On matrix units it is one, because chunks of 16 rows of x take registers too: with two, some kernels spill.
        """
        if self.matrix:
            return 1
        registers = self.block_n * self.block_k * column_bytes // (4 * 32 * self.num_warps)
        return max(1, min(cdiv(cdiv(k, self.block_k), self.split_k), AHEAD_REGISTERS // max(registers, 1)))


@dataclass(frozen=True, slots=True)
class GemvWorkspace:
    """Memory in which splits leave partial sums for the last split. It serves one call at a time: one a CUDA stream."""

    partial: Tensor  # float32
    arrived: Tensor  # int32, zeros between calls


def build_gemv_workspace(device: torch.device, programs: int | None = None) -> GemvWorkspace:
    """Makes a workspace for a number of programs; None: for the most in any plan of `choose_gemv_plan` on `device`."""
    if programs is None:
        programs = MAX_SPLIT_PROGRAMS * target_of(device).num_sms
    partial = torch.empty(programs * MAX_ROWS * (64 + 1), dtype=torch.float32, device=device)
    return GemvWorkspace(partial, torch.zeros(programs, dtype=torch.int32, device=device))


@lru_cache(1024)
def choose_gemv_plan(
    rows: int, n: int, k: int, dtype: torch.dtype, target: Target, *, normed: bool = False
) -> GemvPlan:
    """Returns the plan for x [rows, k] and a weight [n, k]; `normed`: with RMSNorm. It is the same for 1 and 2 rows,
    and for all numbers of rows from 3 on.

    One or two rows need no splits: a program takes only 4 or 8 rows of the weight, so there are many programs, and all
    warps of a program share K. On sm_90 eight warps are faster than four wherever K has a chunk for each warp (on an
    H100 by 14 % for the 8B's o, 12 % for its q, k, v, 2 % for gate and up). Elsewhere this is not measured: there eight
    warps are used only where four would load too few bytes at once.
    """
    load = 16 // dtype.itemsize  # elements that a thread loads at once
    if rows <= 2:
        block_n = 8 if n >= 8 * 4 * target.num_sms else 4
        in_flight = n * min(k * dtype.itemsize, 4 * 32 * 16)  # one chunk of four warps for every row of the weight
        few = target.capability == 90 or in_flight < BYTES_IN_FLIGHT * target.num_sms
        num_warps = 8 if few and k > 4 * 32 * load else 4
        return GemvPlan(block_n, 32 * num_warps * load, num_warps)
    if _can_be_staged(dtype, target, normed) and n * k * dtype.itemsize > SMALL_WEIGHT:
        return _staged_plan(n, k, dtype.itemsize, dtype, target)
    return _matrix_plan(n, k, dtype.itemsize, target)


def _can_be_staged(dtype: torch.dtype, target: Target, normed: bool) -> bool:
    """float16 with a norm multiplies in tf32, whose operands cannot both be read from shared memory."""
    return target.capability == 90 and dtype.itemsize == 2 and not (normed and dtype == torch.float16)


@lru_cache(1024)
def choose_8bit_plan(
    rows: int, n: int, k: int, dtype: torch.dtype, target: Target, *, normed: bool = False
) -> GemvPlan:
    """Returns the plan for x [rows, k] in `dtype` and a weight [n, k] of 8-bit numbers; `normed`: with RMSNorm.

    It follows `choose_gemv_plan`, for half the bytes. On the CUDA cores a number takes about four instructions, so as
    many warps share K as find work for three quarters of their threads. Not measured.
    """
    if rows <= 2:
        block_n = 8 if n >= 8 * 8 * target.num_sms else 4
        per_warp = 32 * 16  # columns of one load of each thread
        num_warps = next((w for w in (8, 4) if k >= 0.75 * cdiv(k, w * per_warp) * w * per_warp), 2)
        return GemvPlan(block_n, num_warps * per_warp, num_warps)
    if _can_be_staged(dtype, target, normed) and n * k > SMALL_WEIGHT:
        return _staged_plan(n, k, 1, dtype, target)
    return _matrix_plan(n, k, 1, target)


def _matrix_plan(n: int, k: int, itemsize: int, target: Target) -> GemvPlan:
    """Makes a plan in which a program reads 16 rows of x beside its rows of the weight, both through registers.

    A large weight is limited by device memory; there a program takes 64 rows of it, so that x is read less often. K is
    split into the number of parts with which the last program ends first: the programs that run at once should fill
    the chip, and a last round of a few programs would leave most of it idle.
    """
    num_warps = 8
    if n * k * itemsize >= LARGE_WEIGHT:
        block_n, block_k = (
            64,
            256 if itemsize == 1 and target.capability >= 100 else 128,
        )  # faster memory, more on its way
    elif itemsize == 1:  # x and the norm's weight take registers for each column, so there are more rows instead
        block_n, block_k = 32, 256
    else:
        block_n, block_k = 16, 64 * (16 // itemsize)
    chunks, tiles = cdiv(k, block_k), cdiv(n, block_n)

    def chunks_in_turn(splits: int) -> int:
        rounds = cdiv(tiles * splits, RESIDENT * target.num_sms)
        return rounds * (cdiv(chunks, splits) + (EXCHANGE_CHUNKS if splits > 1 else 0))

    most = max(1, min(chunks, MAX_SPLIT_PROGRAMS * target.num_sms // tiles, MAX_SPLITS))
    per_split = cdiv(chunks, min(range(1, most + 1), key=chunks_in_turn))
    return GemvPlan(block_n, block_k, num_warps, cdiv(chunks, per_split), matrix=True)


def _staged_plan(n: int, k: int, itemsize: int, dtype: torch.dtype, target: Target) -> GemvPlan:
    """Makes a plan in which the weight is the matrix units' tall operand and passes through shared memory.

    `itemsize` is that of the weight, `dtype` that of x. It has the fewest splits that keep most multiprocessors
    loading: an exchange of partial sums takes time, and programs that run at once share device memory evenly whether
    they fill the chip or not. Few programs on a multiprocessor have deep pipelines; many leave no gap where one ends
    and the next begins. So up to three are resident, and fewer where three would leave a short last round, which would
    wait for its own short pipelines.
    """
    block_n, block_k = 64, 128
    chunks, tiles = cdiv(k, block_k), cdiv(n, block_n)
    wanted = min(cdiv(int(BUSY_SHARE * target.num_sms), tiles), chunks, MAX_SPLITS)
    per_split = cdiv(chunks, wanted)
    splits = cdiv(chunks, per_split)
    programs = tiles * splits
    stage_bytes = (block_n * itemsize + MAX_ROWS * dtype.itemsize) * block_k
    saturating = BYTES_IN_FLIGHT * target.num_sms / (block_n * block_k * itemsize)  # chunks on their way

    def stages(resident: int) -> int:
        return max(2, min(6, per_split + 1, STAGED_BYTES // resident // stage_bytes))

    def chunk_times(resident: int) -> float:
        last_round = programs % (resident * target.num_sms)
        slowest = 1 / (stages(resident) - 1) if last_round else 0.0
        return (programs - last_round) / saturating + max(last_round / saturating, slowest)

    resident = min(range(min(3, cdiv(programs, target.num_sms)), 0, -1), key=chunk_times)
    return GemvPlan(block_n, block_k, 4, splits, matrix=True, num_stages=stages(resident))

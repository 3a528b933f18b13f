"""CUDA graphs: a pass of the vision tower, or a decode step, as one launch.

Each is some two hundred kernels of a few microseconds; launched one by one, the CPU takes longer than the GPU. The
graphs of a kind share one memory pool: the largest is captured first and the others find its memory. They must not run
at the same time, and a result is dead after the next replay.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from internvl_rt.kernels.decode_attention import num_split_items
from internvl_rt.kv_cache import KVCache
from internvl_rt.step import Chunk, StepInputs, StepShape, fill_step, wrap_step


class Replay(NamedTuple):
    """What a capture gives: `run` computes again, into `result`."""

    run: Callable[[], None]
    result: Tensor


Capture = Callable[[Callable[[], Tensor]], Replay]

TILE_BUCKETS = (*range(1, 14), 16)  # the next larger bucket runs, on whatever lies in the tiles behind


class TileGraphs:
    """Runs `encode`, uint8 tiles [I, S, S, 3] to visual tokens [I, M, D], from graphs that are captured here."""

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        image_size: int,
        device: torch.device,
        *,
        buckets: Sequence[int] = TILE_BUCKETS,
        capture: Capture | None = None,
    ) -> None:
        capture = capture or cuda_capture(device)
        self._tiles = torch.zeros(max(buckets), image_size, image_size, 3, dtype=torch.uint8, device=device)
        self._replays: dict[int, Replay] = {}
        for num_tiles in sorted(buckets, reverse=True):
            self._replays[num_tiles] = capture(partial(encode, self._tiles[:num_tiles]))

    @property
    def max_tiles(self) -> int:
        return len(self._tiles)

    def encode(self, tiles: Tensor) -> Tensor:
        """Visual tokens [I, M, D], memory of their own, of 1 to `max_tiles` uint8 tiles on any device."""
        num_tiles = len(tiles)
        replay = self._replays[min(bucket for bucket in self._replays if bucket >= num_tiles)]
        self._tiles[:num_tiles].copy_(tiles, non_blocking=True)
        replay.run()
        return replay.result[:num_tiles].clone()


class DecodeGraphs:
    """Runs steps in which every sequence has one new token from graphs, one for each number of sequences.

    `compute` takes a step's inputs to logits [S, V]. A graph reads its inputs from one buffer on the device; the host
    fills one of several staging buffers, so that it never writes what a copy may still read.
    """

    NUM_STAGES = 4

    def __init__(
        self,
        compute: Callable[[StepInputs], Tensor],
        cache: KVCache,
        device: torch.device,
        *,
        max_num_seqs: int,
        max_model_len: int,
        capture: Capture | None = None,
    ) -> None:
        capture = capture or cuda_capture(device)
        self._cache = cache
        self._buckets: dict[int, tuple[StepShape, Replay]] = {}
        table_width = -(-max_model_len // cache.block_size)
        for num_rows in reversed(decode_buckets(max_num_seqs)):
            num_items = num_split_items(num_rows, cache.num_kv_heads, cache.num_sms) if cache.num_sms else 0
            shape = StepShape(num_rows, num_rows, table_width, num_items)
            if not self._buckets:  # the largest comes first
                self._flat = torch.from_numpy(_padding(shape)).to(device)
                stages = torch.empty(self.NUM_STAGES, shape.size, dtype=torch.int32, pin_memory=device.type == "cuda")
                self._stages, self._copied = list(stages), [_Event(device) for _ in stages]
            flat = self._flat[: shape.size]
            flat.copy_(torch.from_numpy(_padding(shape)))
            inputs = wrap_step(
                shape,
                flat,
                num_decodes=num_rows,
                max_query_len=1,
                logit_row_R=torch.arange(num_rows, device=device),
                visual_XD=None,
                visual_row_X=torch.empty(0, dtype=torch.int64, device=device),
            )
            self._buckets[num_rows] = shape, capture(partial(compute, inputs))
        self._next_stage = 0

    def takes(self, chunks: Sequence[Chunk]) -> bool:
        """Whether a step of these chunks can run here: one token each, none of a picture."""
        return len(chunks) <= max(self._buckets) and all(
            chunk.num_tokens == 1 and chunk.start >= chunk.sequence.num_prompt for chunk in chunks
        )

    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        """Logits [S, V], which the next call overwrites."""
        shape, replay = self._buckets[min(bucket for bucket in self._buckets if bucket >= len(chunks))]
        stage, copied = self._stages[self._next_stage], self._copied[self._next_stage]
        self._next_stage = (self._next_stage + 1) % self.NUM_STAGES
        copied.wait()
        staged = stage[: shape.size]
        fill_step(chunks, self._cache, shape, staged.numpy())
        self._flat[: shape.size].copy_(staged, non_blocking=True)
        copied.record()
        replay.run()
        return replay.result[: len(chunks)]


def decode_buckets(max_num_seqs: int) -> list[int]:
    """1, 2, 4, 8, 16, 24, 32, ... and `max_num_seqs`, ascending."""
    return sorted({n for n in (1, 2, 4, *range(8, max_num_seqs, 8)) if n < max_num_seqs} | {max_num_seqs})


def _padding(shape: StepShape) -> NDArray[np.int32]:
    """A step without sequences: lengths 0, no slots, nothing to split."""
    flat = np.zeros(shape.size, np.int32)
    found = shape.views(flat, np.float32)
    for name in found.keys() & {"slot_T", "block_table_SN", "split_W3"}:
        found[name][...] = -1
    return flat


class _Event:
    """A CUDA event that has nothing to wait for until it is recorded; on the CPU copies are made at once."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def record(self) -> None:
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()


def cuda_capture(device: torch.device) -> Capture:
    """Captures on one stream and into one pool."""
    pool = torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def capture(compute: Callable[[], Tensor]) -> Replay:
        with torch.cuda.device(device):
            return capture_here(compute)

    def capture_here(compute: Callable[[], Tensor]) -> Replay:
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            compute()  # compiles what is not compiled yet, which a capture cannot
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            result = compute()
        return Replay(graph.replay, result)

    return capture

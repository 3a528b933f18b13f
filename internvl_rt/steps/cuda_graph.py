"""CUDA graphs launch many kernels at once: here a pass of the vision tower, in `step_graph` the decoder's steps.

A pass is some two hundred kernels of a few microseconds, which the CPU launches more slowly than the GPU runs them. All
graphs of an engine share one memory pool: of each kind the largest is captured first, and the others reuse its memory.
So they must not run at the same time, and a replay overwrites earlier results.
"""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor


class Replay(NamedTuple):
    """A captured graph: `run` computes again, into `result`."""

    run: Callable[[], None]
    result: Tensor


Capture = Callable[[Callable[[], Tensor]], Replay]


class Job(NamedTuple):
    """A part of what is done before the first request, with a name for who waits for it."""

    name: str
    run: Callable[[], object]


TILE_BUCKETS = (*range(1, 14), 16)  # other numbers of tiles run in the next larger bucket, padded with old tiles


class TileGraphs:
    """Runs `encode`, from uint8 tiles [I, S, S, 3] to visual tokens [I, M, D], from graphs.

    A graph is captured when it is first needed, or before.
    """

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        image_size: int,
        device: torch.device,
        capture: Capture,
        buckets: Sequence[int] = TILE_BUCKETS,
    ) -> None:
        self._encode, self._capture, self._buckets = encode, capture, sorted(buckets)
        self._tiles = torch.zeros(max(buckets), image_size, image_size, 3, dtype=torch.uint8, device=device)
        self._replays: dict[int, Replay] = {}

    def warm_up(self, encode: Callable[[Tensor], Tensor]) -> list[Job]:
        """Lists runs of `encode`, which needs the same kernels, for every graph: so these kernels are built."""
        return [Job(f"kernels for {bucket} tiles", partial(encode, self._tiles[:bucket])) for bucket in self._buckets]

    def captures(self, *, everything: bool) -> list[Job]:
        """Lists captures of the graphs of the most tiles and of one, or of all, the largest first."""
        first = self._buckets if everything else {self._buckets[0], self._buckets[-1]}
        buckets = [bucket for bucket in reversed(self._buckets) if bucket in first]
        return [Job(f"graph of {bucket} tiles", partial(self._replay_of, bucket)) for bucket in buckets]

    @property
    def max_tiles(self) -> int:
        return len(self._tiles)

    @torch.inference_mode()
    def encode(self, tiles: Tensor) -> Tensor:
        """Returns visual tokens [I, M, D] in new memory, for 1 to `max_tiles` uint8 tiles on any device."""
        num_tiles = len(tiles)
        replay = self._replay_of(next(bucket for bucket in self._buckets if bucket >= num_tiles))
        self._tiles[:num_tiles].copy_(tiles, non_blocking=True)
        replay.run()
        return replay.result[:num_tiles].clone()

    @torch.inference_mode()
    def _replay_of(self, bucket: int) -> Replay:
        if bucket not in self._replays:
            self._replays[bucket] = self._capture(partial(self._encode, self._tiles[:bucket]))
        return self._replays[bucket]


# Every capture changes torch's one state of random numbers, so a process captures one graph at a time.
_CAPTURING = threading.Lock()


def cuda_capture() -> Capture:
    """Captures what is launched on the current stream, into one pool. Replays belong on the same stream.

    Other threads may meanwhile launch on other streams and allocate, but must not wait for the whole device;
    `torch.cuda.graph` does that, so it is not used.
    """
    pool = torch.cuda.graph_pool_handle()
    with _CAPTURING:
        torch.cuda.empty_cache()  # a capture cannot take memory that the allocator keeps

    def capture(compute: Callable[[], Tensor]) -> Replay:
        compute()  # compiles kernels, which cannot be done within a capture
        graph = torch.cuda.CUDAGraph()
        with _CAPTURING:
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                result = compute()
            finally:
                graph.capture_end()
        return Replay(graph.replay, result)

    return capture

"""CUDA graphs: many kernels as one launch; here a pass of the vision tower, in `step_graph` the decoder's steps.

A pass is some two hundred kernels of a few microseconds; launched one by one, the CPU takes longer than the GPU. The
graphs of a kind share one memory pool: the largest is captured first and the others find its memory. They must not run
at the same time, and a result is dead after the next replay.
"""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor


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
        capture: Capture,
        buckets: Sequence[int] = TILE_BUCKETS,
    ) -> None:
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


# torch keeps one state of its random numbers, which every capture begins and ends: captures of a process exclude each
# other.
_CAPTURING = threading.Lock()


def cuda_capture() -> Capture:
    """Captures what is launched on the current stream, into one pool. Replays belong on the same stream.

    Other threads may go on working on other streams meanwhile, and allocate. What they must not do is to wait for the
    whole device, which is why `torch.cuda.graph`, which does that, is not used.
    """
    pool = torch.cuda.graph_pool_handle()
    with _CAPTURING:
        torch.cuda.empty_cache()  # a capture cannot ask for what the allocator keeps for others

    def capture(compute: Callable[[], Tensor]) -> Replay:
        compute()  # compiles what is not compiled yet, which a capture cannot
        graph = torch.cuda.CUDAGraph()
        with _CAPTURING:
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                result = compute()
            finally:
                graph.capture_end()
        return Replay(graph.replay, result)

    return capture

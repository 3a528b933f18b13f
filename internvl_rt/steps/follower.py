"""Follows the orders of rank 0 on another rank: the same passes on its part of the model."""

from collections.abc import Iterator
from itertools import cycle

import torch
from torch import Tensor

from internvl_rt.model.shard import Group
from internvl_rt.steps.device_stream import host_memory
from internvl_rt.steps.executor import Executor
from internvl_rt.steps.kv_pool import KVPool
from internvl_rt.steps.orders import Capturing, Copies, Drawing, Encoding, Pass, Replays, Words, read_order
from internvl_rt.steps.step_graph import NUM_STAGES


class Follower:
    """Computes what one order after another says, and keeps nothing but the cache's memory and the drawn tokens."""

    def __init__(self, executor: Executor, pool: KVPool) -> None:
        self._executor, self._pool, self._model = executor, pool, executor.model
        self._stages: Iterator[Tensor] = iter(())  # memory of the host, for steps from graphs

    def obey(self, message: bytes) -> None:
        order = read_order(message)
        with self._executor.use():
            match order:
                case Pass():
                    self._pass(order)
                case Replays():
                    x_TD = self._executor.replay(order, self._stage(order.flat, next(self._stages)), None)
                    self._finish(x_TD, order.drawing)
                case Encoding():
                    self._encode(order)
                case Capturing():
                    self._capture(order)
                case Copies(pairs):
                    self._pool.copy_blocks(pairs)

    def _pass(self, order: Pass) -> None:
        flat = self._stage(order.flat, host_memory(len(order.flat), torch.int32, self._executor.device))
        x_TD = self._executor.run_pass(order, flat, None)
        self._executor.logits(x_TD, order.row_R)
        self._finish(x_TD[order.shape.num_decodes :], order.drawing)

    def _finish(self, x_TD: Tensor | None, drawing: Drawing) -> None:
        if len(drawing.scored_X):
            assert x_TD is not None, "scored tokens are in chunks"
            for _ in self._executor.scored_logits(x_TD, drawing.scored_X):
                pass
        if drawing.num_draws:
            self._group.share(self._executor.drawn_R[: drawing.num_draws])

    def _encode(self, order: Encoding) -> None:
        side, device = self._model.config.vision.image_size, self._executor.device
        shape = (side, side, 3) if order.is_uint8 else (3, side, side)
        dtype = torch.uint8 if order.is_uint8 else self._model.dtype
        self._executor.encode_together(torch.empty(order.num_tiles, *shape, dtype=dtype, device=device))

    def _capture(self, order: Capturing) -> None:
        self._executor.capture(order)
        graphs = self._executor.step_graphs
        assert graphs is not None, "they were captured"
        # A copy to the device has ended when so many others have begun, because rank 0 has waited for its step.
        self._stages = cycle([host_memory(graphs.size, torch.int32, self._executor.device) for _ in range(NUM_STAGES)])

    @property
    def _group(self) -> Group:
        group = self._model.shard.group
        assert group is not None, "there are several ranks"
        return group

    @staticmethod
    def _stage(words: Words, memory: Tensor) -> Tensor:
        """Copies words to memory of the host from which they can be copied to the device."""
        part = memory[: len(words)]
        part.numpy()[:] = words
        return part

"""The memory of the paged KV cache on one device: blocks of keys and values of every layer."""

import math
import mmap
from collections.abc import Sequence as Items
from contextlib import suppress
from itertools import count

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from internvl_rt.checkpoint.config import DecoderConfig
from internvl_rt.model.ops import Ops
from internvl_rt.model.step_inputs import LayerCache
from internvl_rt.model.work import layers_of_block
from internvl_rt.steps.device_stream import to_device


class KVPool:
    """`layers` is the memory, zeroed at first.

    Layers with a window have other blocks than those without one: the first layers of both kinds share their memory,
    the second ones, and so on.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        ops: Ops,
        static_scale_L2: Tensor | None = None,
    ) -> None:
        """Allocates `num_blocks * kv_block_bytes(config, dtype, block_size)` bytes on the device.

        dtype: of keys and values: the model's, or float8_e4m3fn or int8, numbers with a scale for each token and head.
        ops: copies blocks on the device.
        static_scale_L2: float32, each layer's scales of all keys and of all values in 8 bits, if a checkpoint has any.
        """
        self.dtype, self._ops = dtype, ops
        block_shape = (config.num_kv_heads, block_size, config.head_dim)
        # One tensor for all layers, keys and values, so that a block is copied by one operation.
        num_layers, next_of = layers_of_block(config), (count(), count())
        pool = _zeros((num_layers, 2, num_blocks, *block_shape), dtype, device)
        self._pools: tuple[Tensor, ...] = (pool,)
        scales: Items[Tensor | None] = [None] * num_layers
        if dtype.itemsize == 1:
            scale = _zeros((num_layers, 1, num_blocks, *block_shape[:2], 2), torch.bfloat16, device)
            self._pools, scales = (pool, scale), scale[:, 0].unbind()
        places = [next(next_of[config.window_of(layer) is not None]) for layer in range(config.num_layers)]
        static_L = [None] * config.num_layers if static_scale_L2 is None else static_scale_L2.unbind()
        self.layers = tuple(
            LayerCache(pool[place, 0], pool[place, 1], scales[place], static_scale_2)
            for place, static_scale_2 in zip(places, static_L, strict=True)
        )
        # The tensors that `layers` are views of.
        self.buffers = self._pools if static_scale_L2 is None else (*self._pools, static_scale_L2)

    def copy_blocks(self, copies: NDArray[np.int32]) -> None:
        """Copies blocks from (source, destination) pairs [number, 2].

        One operation copies all layers (another one their scales), and the host does not wait for it.
        """
        pairs = torch.from_numpy(np.ascontiguousarray(copies.T, np.int64))
        source, destination = to_device(pairs, self._pools[0].device)
        for pool in self._pools:
            self._ops.copy_blocks(pool, source, destination)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # The system commits a page when it is first written, but torch.zeros writes every page. Pages are small, because
    # the first token takes one for its keys in each layer, and one for its values; numpy.zeros asks for 2 MiB each.
    memory = mmap.mmap(-1, dtype.itemsize * math.prod(shape), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):  # of a system that has no large pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)

"""The paged KV cache: C++ decides which block holds which token, torch owns the memory.

A block holds `block_size` tokens of every layer. Sequences hold whole blocks and share those of a common prefix.
Kernels find a sequence's tokens by its row of the block table and write new ones by slot: `block * block_size +
offset`.
"""

import math
import mmap
from collections.abc import Sequence as Items
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from internvl_rt._C import PagedKVCache
from internvl_rt.checkpoint.config import DecoderConfig
from internvl_rt.errors import RequestError
from internvl_rt.inputs.picture import Picture
from internvl_rt.model.ops import Ops
from internvl_rt.model.step_inputs import LayerCache
from internvl_rt.model.work import kv_bytes_per_token
from internvl_rt.steps.device_stream import to_device
from internvl_rt.steps.sequence import Sequence

BLOCK_SIZES = (16, 32, 64, 128)
WATERMARK = 50  # admission leaves this fraction of the blocks, 1 / WATERMARK, for running sequences to grow


class KVCache:
    """`blocks` (csrc/paged_kv_cache.h) knows which block holds what; `layers` is the memory, zeroed at first."""

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
        """Allocates `num_blocks * block_size * kv_bytes_per_token(config, dtype)` bytes on the device.

        dtype: of keys and values: the model's, or float8_e4m3fn or int8, numbers with a scale for each token and head.
        ops: copies blocks on the device, and says how attention is split.
        block_size: one of BLOCK_SIZES. Raises ValueError for no blocks at all.
        static_scale_L2: float32, each layer's scales of all keys and of all values in 8 bits, if a checkpoint has any.
        """
        self.block_size, self._num_kv_heads, self._ops = block_size, config.num_kv_heads, ops
        self.dtype = dtype
        self.blocks = PagedKVCache(num_blocks, block_size, watermark_blocks=num_blocks // WATERMARK)
        block_shape = (config.num_kv_heads, block_size, config.head_dim)
        # One tensor for all layers, keys and values, so that a block is copied by one operation.
        pool = _zeros((config.num_layers, 2, num_blocks, *block_shape), dtype, device)
        self._pools: tuple[Tensor, ...] = (pool,)
        scale_L: Items[Tensor | None] = [None] * config.num_layers
        static_L: Items[Tensor | None] = scale_L if static_scale_L2 is None else static_scale_L2.unbind()
        if dtype.itemsize == 1:
            scales = _zeros((config.num_layers, 1, num_blocks, *block_shape[:2], 2), torch.bfloat16, device)
            self._pools, scale_L = (pool, scales), scales[:, 0].unbind()
        self.layers = tuple(
            LayerCache(k_cache_BGPC, v_cache_BGPC, scale_BGP2, static_scale_2)
            for (k_cache_BGPC, v_cache_BGPC), scale_BGP2, static_scale_2 in zip(pool, scale_L, static_L, strict=True)
        )
        # The tensors that `layers` are views of.
        self.buffers = self._pools if static_scale_L2 is None else (*self._pools, static_scale_L2)

    def num_split_items(self, num_rows: int) -> int:
        """Length of the plan that splits attention of `num_rows` sequences with one new token; 0: no plan."""
        return self._ops.num_split_items(num_rows, self._num_kv_heads)

    def match(self, token_ids: Items[int], pictures: Items[Picture], identity: bytes | None) -> int:
        """Counts the leading tokens of a prompt that are cached: whole blocks, and at most all tokens but one.

        Any thread may call it, because it calls C++ once.
        """
        return self.blocks.match(np.array(token_ids, np.int32), _spans(pictures), identity)

    def admit(self, sequence: Sequence) -> int | None:
        """Takes blocks for all tokens of a sequence.

        Returns how many leading tokens are cached, or None if there is no room; then nothing has changed.
        """
        return self.blocks.admit(
            sequence.seq_id,
            np.array(sequence.token_ids, np.int32),
            _spans(sequence.pictures),
            sequence.identity,
            num_reserved=len(sequence.token_ids),
            max_cached=sequence.max_cached,
        )

    def append(self, seq_ids: ArrayLike, num_tokens: ArrayLike) -> bool:
        """Takes slots for each sequence's next tokens. False: there is no room, and nothing has changed."""
        return self.blocks.append(np.ascontiguousarray(seq_ids, np.int32), np.ascontiguousarray(num_tokens, np.int32))

    def discard(self, seq_id: int) -> None:
        """Returns the blocks of a sequence that may have been admitted or not."""
        with suppress(ValueError):  # not admitted
            self.blocks.release(seq_id)

    def publish(self, final: Items[tuple[Sequence, int]]) -> None:
        """Lets others reuse the first tokens of sequences, given with their number, once their steps have ended.

        The ids must be known, and steps that have not failed must compute the tokens or have computed them.
        """
        if not final:
            return
        for sequence, num_tokens in final:
            if num_tokens > sequence.num_told:  # the ids of the prompt are known since admission
                self.blocks.extend(
                    sequence.seq_id, np.array(sequence.token_ids[sequence.num_told : num_tokens], np.int32)
                )
                sequence.num_told = num_tokens
        ids_and_counts = np.array([(sequence.seq_id, num_tokens) for sequence, num_tokens in final], np.int32)
        self.blocks.publish(*np.ascontiguousarray(ids_and_counts.T))

    def end_step(self, step: int, *, failed: bool = False) -> None:
        """Records that all steps up to this one have ended.

        failed: those not recorded before have failed. Nothing that they wrote will be reused, and nothing that later
        steps of their sequences compute from it.
        """
        self.blocks.complete(step, failed=failed)

    def end_all_steps(self) -> None:
        """Records, after a failure, that all steps have ended, and makes the block copies that wait for a step.

        Nothing that the failed step wrote will be reused.
        """
        self.copy_blocks(self.blocks.take_copies())
        none, zero = np.empty(0, np.int32), np.zeros(1, np.int32)
        step = self.blocks.fill_step(none, none, zero, none, np.empty((0, 1), np.int32), none)
        self.end_step(step, failed=True)

    def copy_blocks(self, copies: NDArray[np.int32]) -> None:
        """Copies blocks from (source, destination) pairs [number, 2], as `take_copies` lists them.

        One operation copies all layers (another one their scales), and the host does not wait for it.
        """
        if len(copies):
            pairs = torch.from_numpy(np.ascontiguousarray(copies.T, np.int64))
            source, destination = to_device(pairs, self._pools[0].device)
            for pool in self._pools:
                self._ops.copy_blocks(pool, source, destination)


def _spans(pictures: Items[Picture]) -> list[tuple[int, int, bytes]]:
    return [(picture.span.start, picture.span.num_tokens, picture.digest) for picture in pictures]


def least_num_blocks(block_size: int, max_model_len: int | None) -> int:
    """Counts the blocks of one sequence of `max_model_len` tokens; without a `max_model_len` any block will do."""
    return 1 if max_model_len is None else -(-max_model_len // block_size)


def plan_num_blocks(
    config: DecoderConfig,
    dtype: torch.dtype,
    *,
    block_size: int,
    cache_bytes: int,
    max_num_seqs: int,
    max_model_len: int | None,
) -> int:
    """Counts blocks for `max_num_seqs` sequences of `max_model_len` tokens, at most those that fit `cache_bytes`.

    dtype: of keys and values.
    Without a `max_model_len` the trained window is planned for. Raises RequestError if the cache cannot hold
    `least_num_blocks`.
    """
    bytes_per_block = kv_bytes_per_token(config, dtype) * block_size
    affordable = cache_bytes // bytes_per_block
    required = least_num_blocks(block_size, max_model_len)
    if affordable < required:
        raise RequestError(
            f"a KV cache of {cache_bytes:,} bytes holds {affordable * block_size:,} tokens, but one sequence needs "
            f"room for {max_model_len or block_size:,} ({required * bytes_per_block:,} bytes); "
            "raise kv_cache_bytes or lower max_model_len"
        )
    used = max_num_seqs * -(-(max_model_len or config.max_position) // block_size)
    return min(affordable, used + (used - 1) // (WATERMARK - 1))  # the watermark comes on top of what is used


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # The system commits a page when it is first written, but torch.zeros writes every page. Pages are small, because
    # the first token takes one for its keys in each layer, and one for its values; numpy.zeros asks for 2 MiB each.
    memory = mmap.mmap(-1, dtype.itemsize * math.prod(shape), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):  # of a system that has no large pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)

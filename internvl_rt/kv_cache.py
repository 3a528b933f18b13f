"""The paged KV cache: C++ decides which block holds which token, torch owns the memory.

A block holds `block_size` tokens of every layer. Sequences own whole blocks; the kernels find a sequence's tokens
through its row of the block table and write new ones by slot, `block * block_size + offset`.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from internvl_rt._C import PagedKVCache
from internvl_rt.config import DecoderConfig
from internvl_rt.errors import RequestError

BLOCK_SIZES = (16, 32, 64, 128)


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Keys (rotated) and values of one decoder layer, by block, head, place in the block and channel."""

    k_cache_BGPC: Tensor
    v_cache_BGPC: Tensor


class KVCache:
    """`blocks` keeps the books (see csrc/paged_kv_cache.h), `layers` holds the memory, zeroed."""

    def __init__(
        self, config: DecoderConfig, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Takes `num_blocks * block_size * kv_bytes_per_token(config, dtype)` bytes.

        Raises RequestError for a block size that is not in BLOCK_SIZES, ValueError for no blocks at all.
        """
        if block_size not in BLOCK_SIZES:
            raise RequestError(f"block_size must be one of {BLOCK_SIZES}, got {block_size}")
        self.block_size = block_size
        self.blocks = PagedKVCache(num_blocks, block_size)
        shape_BGPC = (num_blocks, config.num_kv_heads, block_size, config.head_dim)
        self.layers = tuple(
            LayerCache(_zeros(shape_BGPC, dtype, device), _zeros(shape_BGPC, dtype, device))
            for _ in range(config.num_layers)
        )


def kv_bytes_per_token(config: DecoderConfig, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize


def plan_num_blocks(
    config: DecoderConfig,
    dtype: torch.dtype,
    *,
    block_size: int,
    cache_bytes: int,
    max_num_seqs: int,
    max_model_len: int | None,
) -> int:
    """Blocks for `max_num_seqs` sequences of `max_model_len` tokens, or as many of them as `cache_bytes` holds.

    Without a `max_model_len` the trained window is planned for, and any cache of at least one block will do.
    Raises RequestError when the cache cannot hold a single sequence of `max_model_len`.
    """
    bytes_per_block = kv_bytes_per_token(config, dtype) * block_size
    affordable = cache_bytes // bytes_per_block
    required = 1 if max_model_len is None else _ceil_div(max_model_len, block_size)
    if affordable < required:
        raise RequestError(
            f"a KV cache of {cache_bytes:,} bytes holds {affordable * block_size:,} tokens, but one sequence needs "
            f"room for {max_model_len or block_size:,} ({required * bytes_per_block:,} bytes); "
            "raise kv_cache_bytes or lower max_model_len"
        )
    return min(affordable, max_num_seqs * _ceil_div(max_model_len or config.max_position, block_size))


def _ceil_div(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy's zeros are calloc's: the system commits a page when a token is first written to it. torch's are written.
    num_bytes = dtype.itemsize * int(np.prod(shape))
    return torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(dtype).view(shape)

"""The paged KV cache: C++ decides which block holds which token, torch owns the memory.

A block holds `block_size` tokens of every layer. Sequences hold whole blocks and share those of a common prefix.
Kernels find a sequence's tokens by its row of the block table and write new ones by slot: `block * block_size +
offset`.

If there are layers with a window, a block holds tokens of these layers or of the others, and a sequence has two tables.
Blocks that left the window are freed; until its prompt is computed, a sequence has blocks for all of it in both.
"""

from collections.abc import Callable
from collections.abc import Sequence as Items
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from internvl_rt._C import PagedKVCache
from internvl_rt.checkpoint.config import DecoderConfig
from internvl_rt.errors import RequestError
from internvl_rt.inputs.picture import Picture
from internvl_rt.model.ops import Ops
from internvl_rt.model.work import kv_block_bytes
from internvl_rt.steps.kv_pool import KVPool
from internvl_rt.steps.sequence import Sequence

BLOCK_SIZES = (16, 32, 64, 128)
WINDOW_ARRAYS = "window_table_SN", "window_slot_T"  # what `fill_step` writes for layers with a window
WATERMARK = 50  # admission leaves this fraction of the blocks, 1 / WATERMARK, for running sequences to grow


class KVCache:
    """`blocks` (csrc/paged_kv_cache.h) knows which block holds what; `pool` is the memory."""

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
        on_copy: Callable[[NDArray[np.int32]], None] | None = None,
        hash_key: bytes | None = None,
    ) -> None:
        """Builds the books, and a `KVPool` with the same arguments.

        ops: says how attention is split, too.
        block_size: one of BLOCK_SIZES. Raises ValueError for no blocks at all.
        on_copy: tells the other ranks, whose pools have the same blocks, what this one copies.
        hash_key: 16 bytes; with them `drain_events` lists what changes, under the digests of `PrefixDigests`.
        """
        self.block_size, self._num_kv_heads, self._ops = block_size, config.num_kv_heads, ops
        self.dtype, self._on_copy = dtype, on_copy
        self.num_tables = config.num_tables
        how: dict[str, Any] = {"watermark_blocks": num_blocks // WATERMARK, "window": config.window}
        self.blocks = PagedKVCache(num_blocks, block_size, events=hash_key is not None, hash_key=hash_key, **how)
        sizes = {"num_blocks": num_blocks, "block_size": block_size}
        self.pool = KVPool(config, **sizes, dtype=dtype, device=device, ops=ops, static_scale_L2=static_scale_L2)

    @property
    def max_sequence_len(self) -> int:
        """How many tokens a sequence can have that is alone: each of its tables may have all of them."""
        return self.blocks.num_blocks // self.num_tables * self.block_size

    def num_blocks_for(self, num_sequences: int, num_tokens: int) -> int:
        """Counts the blocks that sequences of `num_tokens` tokens need together, admitted one after another."""
        in_all, in_window = -(-num_tokens // self.block_size), 0
        if self.blocks.window is not None:
            in_window = min(in_all, (self.blocks.window - 2) // self.block_size + 2)
        return num_sequences * in_all + (num_sequences - 1) * in_window + (self.num_tables - 1) * in_all

    def num_split_items(self, num_rows: int) -> int:
        """Length of the plan that splits attention of `num_rows` sequences with one new token; 0: no plan."""
        return self._ops.num_split_items(num_rows, self._num_kv_heads)

    def match(self, token_ids: Items[int], pictures: Items[Picture], identity: bytes | None) -> int:
        """Counts the leading tokens of a prompt that are cached: whole blocks, and at most all tokens but one.

        Any thread may call it, because it calls C++ once.
        """
        return self.blocks.match(np.array(token_ids, np.int32), _spans(pictures), identity)

    def drain_events(self) -> Items[tuple[str, bytes]]:
        """Lists what has changed since the last call: "stored" or "removed" and a block's digest, or "cleared".

        After too many changes it is "cleared" and all blocks that are stored now. Any thread may call it, because it
        calls C++ once.
        """
        return [(kind, digest) for kind, digest, _, _ in self.blocks.drain_events()]

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
        tables = [np.empty((0, 1), np.int32), none]
        windowed = dict(zip(WINDOW_ARRAYS, tables, strict=True)) if self.num_tables > 1 else {}
        step = self.blocks.fill_step(none, none, zero, none, *tables, **windowed)
        self.end_step(step, failed=True)

    def copy_blocks(self, copies: NDArray[np.int32]) -> None:
        """Copies blocks from (source, destination) pairs [number, 2], as `take_copies` lists them, on every rank."""
        if len(copies):
            if self._on_copy is not None:
                self._on_copy(copies)
            self.pool.copy_blocks(copies)


class PrefixDigests:
    """Computes the digests under which caches of the same key list the blocks of a prompt. It needs no cache itself."""

    def __init__(self, block_size: int, hash_key: bytes) -> None:
        """hash_key: 16 bytes, which whoever sends prompts must not know."""
        self._blocks = PagedKVCache(1, block_size, hash_key=hash_key)

    def of(self, token_ids: Items[int], pictures: Items[Picture], identity: bytes | None) -> list[bytes]:
        """Returns the digest of each whole block that the prompt may take from a cache, in order."""
        return self._blocks.digests(np.array(token_ids, np.int32), _spans(pictures), identity)


def _spans(pictures: Items[Picture]) -> list[tuple[int, int, bytes]]:
    return [(picture.span.start, picture.span.num_tokens, picture.span_digest) for picture in pictures]


def least_num_blocks(config: DecoderConfig, block_size: int, max_model_len: int | None) -> int:
    """Counts the blocks of one sequence of `max_model_len` tokens; without a `max_model_len` one token will do."""
    return config.num_tables * -(-(max_model_len or 1) // block_size)


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
    bytes_per_block = kv_block_bytes(config, dtype, block_size)
    affordable = cache_bytes // bytes_per_block
    required = least_num_blocks(config, block_size, max_model_len)
    if affordable < required:
        held = affordable // config.num_tables * block_size
        raise RequestError(
            f"a KV cache of {cache_bytes:,} bytes holds {held:,} tokens, but one sequence needs "
            f"room for {max_model_len or block_size:,} ({required * bytes_per_block:,} bytes); "
            "raise kv_cache_bytes or lower max_model_len"
        )
    used = max_num_seqs * least_num_blocks(config, block_size, max_model_len or config.max_position)
    return min(affordable, used + (used - 1) // (WATERMARK - 1))  # the watermark comes on top of what is used

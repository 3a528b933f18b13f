"""Three managers of KV blocks that do the same job: ours, the plainest one in Python, and vLLM's if it is installed.

The calls for a batch are: `prefill` for each sequence; `start_batch`; any number of `append` (each sequence gets a slot
for one more token) and `finish` (that token's id is known, and full blocks can be found by others); and `release`.
"""

import hashlib
import importlib.util
from collections import deque
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from internvl_rt._C import PagedKVCache

BLOCK_SIZE = 64
NUM_BLOCKS = 65_536
MAX_MODEL_LEN = 16_384
SAMPLED_ID = 5  # every sequence samples this token in every step


@dataclass(frozen=True)
class Prompt:
    token_ids: np.ndarray  # int32
    pictures: tuple[tuple[int, int, bytes], ...] = ()

    @cached_property
    def token_list(self) -> list[int]:
        return self.token_ids.tolist()


class Manager(Protocol):
    def prepare(self, seq_id: int, prompt: Prompt) -> None: ...  # work before admission; not measured
    def prefill(self, seq_id: int, prompt: Prompt) -> int: ...  # returns how many tokens were cached
    def start_batch(self, seq_ids: list[int]) -> None: ...
    def append(self) -> None: ...
    def finish(self) -> None: ...
    def release(self, seq_id: int) -> None: ...


class Ours:
    """PagedKVCache as a scheduler uses it: with one call per step for the whole batch. It fills the step's buffers too.
    """

    def __init__(self) -> None:
        self.cache = PagedKVCache(NUM_BLOCKS, BLOCK_SIZE)
        self.table_SN = np.empty((256, 64), np.int32)
        self.query_start_S1, self.seq_len_S = np.empty(257, np.int32), np.empty(256, np.int32)
        self.slot_T = np.empty(MAX_MODEL_LEN, np.int32)
        self.step = 0
        self.length: dict[int, int] = {}  # tokens, by sequence

    def prepare(self, seq_id: int, prompt: Prompt) -> None:
        pass

    def admit(self, seq_id: int, prompt: Prompt) -> int:
        cached = self.cache.admit(seq_id, prompt.token_ids, prompt.pictures, num_reserved=prompt.token_ids.size)
        assert cached is not None
        return cached

    def prefill(self, seq_id: int, prompt: Prompt) -> int:
        cached = self.admit(seq_id, prompt)
        num_new = prompt.token_ids.size - cached
        ids, counts = np.array([seq_id], np.int32), np.array([num_new], np.int32)
        self.cache.append(ids, counts)
        self.length[seq_id] = prompt.token_ids.size
        self.fill(ids, counts, num_rows=1, num_tokens=num_new)
        self.cache.publish(ids, np.array([prompt.token_ids.size], np.int32))
        self.cache.complete(self.step)
        return cached

    def fill(self, seq_ids: np.ndarray, num_new: np.ndarray, *, num_rows: int, num_tokens: int) -> None:
        rows = (self.query_start_S1[: num_rows + 1], self.seq_len_S[:num_rows], self.table_SN[:num_rows])
        self.step = self.cache.fill_step(seq_ids, num_new, *rows, self.slot_T[:num_tokens])

    def start_batch(self, seq_ids: list[int]) -> None:
        self.seq_ids = np.array(seq_ids, np.int32)
        self.lengths = np.array([self.length[seq_id] for seq_id in seq_ids], np.int32)
        self.ones = np.ones(len(seq_ids), np.int32)
        self.sampled = np.array([SAMPLED_ID], np.int32)

    def append(self) -> None:
        self.cache.append(self.seq_ids, self.ones)

    def fill_batch(self) -> None:
        self.fill(self.seq_ids, self.ones, num_rows=self.seq_ids.size, num_tokens=self.seq_ids.size)

    def finish(self) -> None:
        self.fill_batch()
        for seq_id in self.seq_ids.tolist():
            self.cache.extend(seq_id, self.sampled)
        self.lengths += 1
        self.cache.publish(self.seq_ids, self.lengths)
        self.cache.complete(self.step)

    def release(self, seq_id: int) -> None:
        self.cache.release(seq_id)


@dataclass
class PlainSequence:
    token_ids: list[int]
    length: int  # tokens with a slot
    table: list[int] = field(default_factory=list)
    digest: bytes = b""  # digest of the last full block


class Plain:
    """A deque of free blocks, a dict from chained digests to blocks, and the blocks' tokens to compare on a hit: how
    nano-vllm does its bookkeeping. No pictures, fences, copies or buffers."""

    def __init__(self) -> None:
        self.free = deque(range(NUM_BLOCKS))
        self.references = [0] * NUM_BLOCKS
        self.digests = [b""] * NUM_BLOCKS
        self.tokens: list[list[int]] = [[]] * NUM_BLOCKS
        self.block_of: dict[bytes, int] = {}
        self.sequences: dict[int, PlainSequence] = {}

    def prepare(self, seq_id: int, prompt: Prompt) -> None:
        _ = prompt.token_list  # this manager takes a list

    def digest(self, parent: bytes, tokens: list[int]) -> bytes:
        return hashlib.blake2b(parent + np.array(tokens, np.int32).tobytes(), digest_size=16).digest()

    def take(self) -> int:
        block = self.free.popleft()
        if self.block_of.get(self.digests[block]) == block:
            del self.block_of[self.digests[block]]
        self.digests[block] = b""
        self.references[block] = 1
        return block

    def publish(self, block: int, digest: bytes, tokens: list[int]) -> None:
        self.digests[block], self.tokens[block] = digest, tokens
        self.block_of[digest] = block

    def prefill(self, seq_id: int, prompt: Prompt) -> int:
        ids = prompt.token_list
        sequence = self.sequences[seq_id] = PlainSequence(ids.copy(), len(ids))
        num_cached, missed = 0, False
        for start in range(0, len(ids), BLOCK_SIZE):
            tokens = ids[start : start + BLOCK_SIZE]
            if len(tokens) < BLOCK_SIZE:
                sequence.table.append(self.take())
                break
            sequence.digest = self.digest(sequence.digest, tokens)
            block = -1 if missed else self.block_of.get(sequence.digest, -1)
            if missed := missed or block < 0 or self.tokens[block] != tokens:
                block = self.take()
                self.publish(block, sequence.digest, tokens)
            else:
                if self.references[block] == 0:
                    self.free.remove(block)
                self.references[block] += 1
                num_cached += BLOCK_SIZE
            sequence.table.append(block)
        return num_cached

    def start_batch(self, seq_ids: list[int]) -> None:
        self.batch = [self.sequences[seq_id] for seq_id in seq_ids]

    def append(self) -> None:
        for sequence in self.batch:
            if sequence.length % BLOCK_SIZE == 0:
                sequence.table.append(self.take())
            sequence.length += 1

    def finish(self) -> None:
        for sequence in self.batch:
            sequence.token_ids.append(SAMPLED_ID)
            if len(sequence.token_ids) % BLOCK_SIZE == 0:
                tokens = sequence.token_ids[-BLOCK_SIZE:]
                sequence.digest = self.digest(sequence.digest, tokens)
                self.publish(sequence.table[-1], sequence.digest, tokens)

    def release(self, seq_id: int) -> None:
        for block in reversed(self.sequences.pop(seq_id).table):
            self.references[block] -= 1
            if self.references[block] == 0:
                self.free.append(block)


class VLLM:
    """vLLM's KVCacheManager with one group of full attention and its default hash, SHA-256."""

    def __init__(self) -> None:
        import torch
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
        spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
        config = KVCacheConfig(NUM_BLOCKS, [], [KVCacheGroupSpec(["layer"], spec)])
        self.manager = KVCacheManager(config, MAX_MODEL_LEN, BLOCK_SIZE, BLOCK_SIZE)
        self.requests: dict[int, Any] = {}

    def prepare(self, seq_id: int, prompt: Prompt) -> None:
        """Makes the request object without its block hashes, which are part of what is measured."""
        from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        pictures = [
            MultiModalFeatureSpec(None, "image", digest.hex(), PlaceholderRange(start, num_tokens))
            for start, num_tokens, digest in prompt.pictures
        ]
        ids = prompt.token_list  # type: ignore[attr-defined]
        request = Request(
            str(seq_id), ids, SamplingParams(max_tokens=MAX_MODEL_LEN), None, mm_features=pictures or None
        )
        request._block_hasher = self.hasher
        self.requests[seq_id] = request

    def prefill(self, seq_id: int, prompt: Prompt) -> int:
        request = self.requests[seq_id]
        request.update_block_hashes()
        blocks, num_cached, _ = self.manager.get_computed_blocks(request)
        allocated = self.manager.allocate_slots(request, request.num_tokens - num_cached, num_cached, blocks)
        assert allocated is not None
        return num_cached

    def start_batch(self, seq_ids: list[int]) -> None:
        self.batch = [self.requests[seq_id] for seq_id in seq_ids]
        for request in self.batch:
            self.know(request, request.num_tokens)

    def know(self, request: Any, num_computed: int) -> None:
        request.num_computed_tokens = num_computed
        request.append_output_token_ids(SAMPLED_ID)

    def append(self) -> None:
        for request in self.batch:
            self.manager.allocate_slots(request, 1)

    def finish(self) -> None:
        for request in self.batch:
            self.know(request, request.num_computed_tokens + 1)

    def release(self, seq_id: int) -> None:
        self.manager.free(self.requests.pop(seq_id))


MANAGERS: dict[str, type[Manager]] = {"ours": Ours, "plain": Plain}
if importlib.util.find_spec("vllm"):
    MANAGERS["vllm"] = VLLM

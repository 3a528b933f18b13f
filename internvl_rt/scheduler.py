"""Which tokens run in the next step: continuous batching with chunked prefill, decodes first.

What the cache holds of a prompt is not computed again. A sequence is admitted only when the cache has room for its
whole length, prompt and answer, so a running sequence never waits for memory and nothing has to be preempted.
Admission is first come, first served.
"""

from collections import deque
from collections.abc import Sequence as Items

from internvl_rt.kv_cache import KVCache
from internvl_rt.sequence import Picture, Sequence
from internvl_rt.step import Chunk


class Scheduler:
    def __init__(self, cache: KVCache, *, max_num_seqs: int, max_tokens_per_step: int) -> None:
        self._cache = cache
        self._max_num_seqs = max_num_seqs
        self._max_tokens_per_step = max_tokens_per_step
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    @property
    def num_unfinished(self) -> int:
        return len(self._waiting) + len(self._running)

    def num_cached(self, token_ids: Items[int], pictures: Items[Picture], identity: bytes | None) -> int:
        return self._cache.match(token_ids, pictures, identity)

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence that can fit the empty cache."""
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forgets a sequence, finished or not, and returns its blocks."""
        if sequence in self._running:
            self._running.remove(sequence)
            self._cache.blocks.release(sequence.seq_id)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
        sequence.visual.clear()

    def schedule(self) -> list[Chunk]:
        """The next step's chunks, at most the token budget together; empty when nothing is left to do."""
        budget = self._max_tokens_per_step
        chunks: list[Chunk] = []

        def take(sequence: Sequence) -> None:
            nonlocal budget
            stop = self._chunk_stop(sequence, budget)
            if stop > sequence.num_computed:
                chunks.append(Chunk(sequence, sequence.num_computed, stop))
                budget -= stop - sequence.num_computed

        for sequence in sorted(self._running, key=lambda s: s.num_computed < s.num_prompt):  # stable: decodes first
            take(sequence)
        while self._waiting and budget > 0 and len(self._running) < self._max_num_seqs:
            if not self._admit(self._waiting[0]):
                break
            self._running.append(self._waiting.popleft())
            take(self._running[-1])
        return sorted(chunks, key=lambda chunk: chunk.stop - chunk.start > 1)  # attention takes single tokens apart

    def _admit(self, sequence: Sequence) -> bool:
        """Takes blocks for the whole sequence; what the cache holds of its prompt need not be computed."""
        num_cached = self._cache.admit(sequence)
        if num_cached is not None:
            sequence.num_computed = sequence.num_cached = num_cached
        return num_cached is not None

    def _chunk_stop(self, sequence: Sequence, budget: int) -> int:
        """Where the next chunk ends: at the budget, moved back to a picture's start if it would cut the picture."""
        start = sequence.num_computed
        stop = min(len(sequence.token_ids), start + budget)
        for picture in sequence.pictures:
            inside = picture.span.start < stop < picture.span.start + picture.span.num_tokens
            if inside and picture.span.start > start and picture.span.num_tokens <= self._max_tokens_per_step:
                return picture.span.start
        return stop

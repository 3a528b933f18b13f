"""Chooses the tokens that run in the next step: continuous batching with chunked prefill, decodes first.

Cached tokens of a prompt are not computed again. A sequence is admitted when the cache has room for all its tokens.
Running sequences grow block by block; when no block is left, the one that was admitted last is preempted: it returns
its blocks and starts again later. Admission is first come, first served, but a sequence that does not fit, or that the
step has no tokens for, is overtaken by those at most half as long. While it waits it holds no place and no blocks, and
what others compute may become its cached prefix.

The answers to one prompt fork off when it is computed. Those that find no place then wait before all that came later,
like sequences of their own; the prefix cache gives them the prompt.
"""

import math
from collections import deque
from collections.abc import Sequence as Items

import numpy as np

from internvl_rt.steps.decodes import NO_DECODES, Decodes, build_decodes
from internvl_rt.steps.kv_cache import KVCache
from internvl_rt.steps.sequence import Sequence
from internvl_rt.steps.step import Chunk, Step

MAX_OVERTAKEN = 16  # how often others are admitted before a sequence that waits for blocks
LOOK_AHEAD = 8  # how many waiting sequences are tried


class Scheduler:
    """Holds the sequences that wait and those that run, and chooses the chunks of each step."""

    def __init__(
        self,
        cache: KVCache,
        *,
        max_num_seqs: int,
        max_tokens_per_step: int,
        max_tiles_per_step: int = 1 << 30,
        double_cost_context: float = math.inf,
    ) -> None:
        """Takes the limits of a step.

        double_cost_context: behind how many tokens of its sequence a token of a prompt takes twice the time of the
            first. A step's tokens are counted at that price, so that no step takes longer than one at a prompt's start.
        """
        self._cache = cache
        self._max_num_seqs = max_num_seqs
        self._max_tokens_per_step = max_tokens_per_step
        self._max_tiles_per_step = max_tiles_per_step
        self._double_cost_context = double_cost_context
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # in the order of admission
        self._last: Decodes | None = None  # the last step, if all that run decoded in it, and none came or went since
        # Of the answers to one prompt that run, one is like any other sequence. The further ones, of all prompts
        # together, leave a quarter of the places to others, an idle engine's too, so that a new request finds one.
        self._max_further = max(0, max_num_seqs - 1 - max(1, max_num_seqs // 4))
        self.num_preemptions = 0

    @property
    def max_answers(self) -> int:
        """How many answers to one prompt may run at once."""
        return 1 + self._max_further

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence, with its siblings, that can fit the empty cache."""
        num_cached = self._cache.match(sequence.token_ids, sequence.pictures, sequence.identity)
        if sequence.max_cached is not None:
            num_cached = min(num_cached, sequence.max_cached)
        sequence.num_expected = sequence.num_tokens - num_cached
        for sibling in sequence.siblings:
            sibling.first_id = sequence.seq_id
            num_left = max(1, sibling.num_tokens - sequence.num_tokens)
            sibling.num_expected = sibling.num_tokens if sequence.identity is None else num_left
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forgets a sequence, finished or not, and returns its blocks."""
        if sequence in self._running:
            self._leave(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
        sequence.visual.clear()
        sequence.siblings.clear()

    def clear(self, sequences: Items[Sequence]) -> None:
        """Forgets all sequences and returns the blocks of the given ones, whatever an error has left half changed."""
        self._running.clear()
        self._last = None
        self._waiting.clear()
        for sequence in sequences:
            self._cache.discard(sequence.seq_id)
            sequence.visual.clear()
            sequence.siblings.clear()

    def schedule(self, *, in_flight: bool = False) -> tuple[Decodes, list[Chunk]] | None:
        """Takes slots for the next step and returns the sequences that decode in it, and the chunks of the others.

        Both are empty if nothing can run before tokens are read.
        in_flight: whether steps are under way. They may give back blocks and tokens, so meanwhile nothing is preempted:
        None says that there is no room now, and that nothing has changed.
        """
        has_place = bool(self._waiting) and len(self._running) < self._max_num_seqs
        last = self._last
        if last is not None and last.num_repeats > 0 and not has_place and self._append(last):
            self._last = last.following()
            return self._last, []
        self._last = None
        preempted = False
        while True:
            decoding, drafted, prefilling = self._decoding()
            decodes = build_decodes(decoding)
            if self._append(decodes, drafted):
                break
            if in_flight:
                return None
            self._preempt(self._running[-1])
            preempted = True
        prefilling = self._make_room_for_forks(prefilling)
        budget = self._max_tokens_per_step - len(decodes) - sum([chunk.stop - chunk.start for chunk in drafted])
        if self._waiting and not preempted and budget > 0 and len(self._running) < self._max_num_seqs:
            self._admit_waiting(budget, prefilling)
        if not prefilling:
            if len(decodes) == len(self._running):
                self._last = decodes
            return decodes, drafted
        prefills = self._prefills(budget, prefilling)
        assert self._append(NO_DECODES, prefills), "admission took room for all tokens that a sequence has"
        self._place_siblings(prefills)
        return decodes, [*drafted, *prefills]

    def launched(self, step: Step) -> None:
        """Records that a step was launched; siblings fork off when their prompt is computed."""
        for row, sequence in enumerate(step.decodes.sequences):
            sequence.num_computed += 1
            sequence.num_tokens += 1
            sequence.unread_row = row
        for row in reversed(range(len(step.chunk_draws))):
            sequence, _, counter = step.chunk_draws[row]
            if counter == sequence.num_tokens - sequence.num_prompt:  # not a draw after a draft token
                sequence.unread_row = len(step.decodes) + row
                sequence.num_tokens += 1
        for sequence, _, stop, _ in step.chunks:
            sequence.num_computed = stop
            if stop >= sequence.num_prompt and (sequence.visual or sequence.siblings):
                sequence.visual.clear()
                for sibling in sequence.siblings:
                    self._fork(sequence, sibling)
                sequence.siblings.clear()

    def _place_siblings(self, chunks: Items[Chunk]) -> None:
        """Lets siblings whose prompt is now computed fork off as far as there are places; the others wait for one."""
        num_further = len(self._running) - len({sequence.first_id for sequence in self._running})
        free = max(0, min(self._max_num_seqs - len(self._running), self._max_further - num_further))
        for sequence, _, stop, _ in chunks:
            if sequence.siblings and stop >= sequence.num_prompt:
                if sequence.max_tokens == 0 and len(self._running) + free < self._max_num_seqs:
                    free += 1  # it leaves when this step has ended, so one of them is the one that is like any other
                self._waiting.extendleft(reversed(sequence.siblings[free:]))
                del sequence.siblings[free:]
                free -= len(sequence.siblings)

    def _fork(self, sequence: Sequence, sibling: Sequence) -> None:
        self._cache.blocks.fork(sequence.seq_id, sibling.seq_id)
        sibling.num_computed, sibling.num_told = sequence.num_computed, sequence.num_told
        sibling.num_published_blocks = sequence.num_published_blocks
        sibling.has_room = sibling.num_prompt == sequence.num_prompt
        sibling.num_cached = sequence.num_cached if sibling.has_room else sequence.num_computed
        sibling.was_admitted = True
        self._running.append(sibling)
        self._last = None

    def _make_room_for_forks(self, prefilling: list[Sequence]) -> list[Sequence]:
        """Takes blocks for the prompts of forks that go on behind a common beginning; those that find none wait again.

        Returns the others. What a rollback takes back stays reserved, and a step follows, as the copies need.
        """
        without: list[Sequence] = []
        for sequence in prefilling:
            if sequence.has_room:
                continue
            if self._cache.append([sequence.seq_id], [sequence.num_uncomputed]):
                self._cache.blocks.rollback(sequence.seq_id, sequence.num_uncomputed)
                sequence.has_room = True
            else:
                without.append(sequence)
        for sequence in without:
            self._leave(sequence)
            sequence.num_computed, sequence.was_admitted = 0, False
        self._waiting.extendleft(reversed(without))
        return [sequence for sequence in prefilling if sequence not in without] if without else prefilling

    def publish(self, sequences: Items[Sequence]) -> None:
        """Lets other sequences reuse what steps have computed of the given ones, as far as their ids are known."""
        final = []
        block_size = self._cache.block_size
        for sequence in sequences:
            if sequence.num_computed < (sequence.num_published_blocks + 1) * block_size:
                continue  # as in nearly every step, no further block is full
            num_blocks = min(sequence.num_computed, len(sequence.token_ids)) // block_size
            if num_blocks > sequence.num_published_blocks and sequence.identity is not None:
                final.append((sequence, num_blocks * block_size))
                sequence.num_published_blocks = num_blocks
        self._cache.publish(final)

    def reject(self, sequence: Sequence, num_tokens: int) -> None:
        """Takes back the last tokens that a step computed, because they were wrong draft tokens."""
        if num_tokens:
            self._cache.blocks.rollback(sequence.seq_id, num_tokens)
            sequence.num_computed -= num_tokens

    def _decoding(self) -> tuple[list[Sequence], list[Chunk], list[Sequence]]:
        """Chooses the sequences that lack only their last token, within the budget; chunks are those with draft tokens.

        Also returns the sequences that have more to compute, or a part of their prompt.
        """
        decoding: list[Sequence] = []
        chunks: list[Chunk] = []
        prefilling: list[Sequence] = []
        budget = self._max_tokens_per_step
        for sequence in self._running:
            start, num_tokens = sequence.num_computed, sequence.num_tokens
            if start < sequence.num_prompt or start + 1 < num_tokens:
                prefilling.append(sequence)
                continue
            room = sequence.max_tokens - (num_tokens - sequence.num_prompt)  # tokens still to be drawn
            if room <= 0 or budget == 0 or (sequence.needs_tokens and sequence.num_unread):
                continue
            drafts: tuple[int, ...] = ()
            if sequence.drafter is not None and room > 1 and budget > 1:
                drafts = tuple(sequence.drafter.draft(sequence.token_ids, min(room, budget) - 1))
            if drafts:
                chunks.append(Chunk(sequence, start, num_tokens + len(drafts), drafts))
            else:
                decoding.append(sequence)
            budget -= 1 + len(drafts)
        return decoding, chunks, prefilling

    def _prefills(self, budget: int, prefilling: Items[Sequence]) -> list[Chunk]:
        """Chooses chunks of the sequences that have more to compute.

        The oldest may take at least half of the budget, so that it progresses. The others follow, the shortest first,
        so that a short prompt does not wait for a long one.
        """
        stops: dict[Sequence, int] = {}
        tiles = self._max_tiles_per_step

        def add_chunk(sequence: Sequence, most: int) -> None:
            nonlocal budget, tiles
            start = stops.get(sequence, sequence.num_computed)
            price = 1 + start / self._double_cost_context
            num_tokens = int(most / price)
            if most > 0 and not stops:
                num_tokens = max(num_tokens, 1)  # so that the oldest progresses
            stop, num_tiles = self._chunk_stop(sequence, start, num_tokens, tiles)
            if stop > start:
                stops[sequence] = stop
                budget -= min(most, math.ceil((stop - start) * price))
                tiles -= num_tiles

        if prefilling:
            oldest = prefilling[0]
            others = sorted(prefilling[1:], key=lambda sequence: sequence.num_uncomputed)
            add_chunk(oldest, -(-budget // 2) if others else budget)
            for sequence in others:
                add_chunk(sequence, budget)
            add_chunk(oldest, budget)
        return [Chunk(sequence, sequence.num_computed, stop) for sequence, stop in stops.items()]

    def _chunk_stop(self, sequence: Sequence, start: int, budget: int, tiles: int) -> tuple[int, int]:
        """Returns where a chunk from `start` on ends, and how many tiles must be encoded for it.

        It ends at the budget, moved back to a picture's start if it would cut a picture that fits a step, or at the
        picture that exceeds the step's tiles, of which `tiles` are left. The first picture of a step is always taken.
        """
        stop = min(sequence.num_tokens, start + budget)
        num_tiles = 0
        for index, picture in enumerate(sequence.pictures):
            first, behind = picture.span.start, picture.span.start + picture.span.num_tokens
            if behind <= start:
                continue
            if first >= stop:
                break
            uncut = start < first or (start == first and start > sequence.num_computed)
            if stop < behind and uncut and picture.span.num_tokens <= self._max_tokens_per_step:
                return first, num_tiles
            if picture.is_unseen and index not in sequence.visual:
                is_first = num_tiles == 0 and tiles == self._max_tiles_per_step
                if num_tiles + picture.num_tiles > tiles and not is_first:
                    return max(first, start), num_tiles
                num_tiles += picture.num_tiles
        return stop, num_tiles

    def _admit_waiting(self, budget: int, prefilling: list[Sequence]) -> None:
        """Admits sequences that the step has tokens for, while there are places and blocks."""
        first_ids = {sequence.first_id for sequence in self._running}
        unread_ids = {sequence.seq_id for sequence in self._running if len(sequence.token_ids) == sequence.num_prompt}
        passed: list[Sequence] = []  # sequences that did not fit
        longest = _longest_to_admit(budget, prefilling)
        for sequence in tuple(self._waiting):
            if len(self._running) == self._max_num_seqs:
                break
            if sequence.num_expected > longest:
                continue
            if sequence.first_id in first_ids and len(self._running) - len(first_ids) >= self._max_further:
                continue
            if sequence.first_id in unread_ids:  # its prompt is not cached before the step under way has ended
                continue
            if any(
                each.first_id == sequence.first_id or sequence.num_expected > each.num_tokens // 2 for each in passed
            ):
                continue
            if not self._admit(sequence):
                passed.append(sequence)
                if sequence.num_overtaken >= MAX_OVERTAKEN or len(passed) == LOOK_AHEAD:
                    break
                continue
            self._waiting.remove(sequence)
            self._running.append(sequence)
            first_ids.add(sequence.first_id)
            prefilling.append(sequence)
            longest = _longest_to_admit(budget, prefilling)
            for overtaken in passed:
                overtaken.num_overtaken += 1

    def _admit(self, sequence: Sequence) -> bool:
        """Takes blocks for a sequence's tokens, if there is room; cached tokens need not be computed."""
        num_cached = self._cache.admit(sequence)
        if num_cached is None:
            return False
        sequence.num_computed, sequence.num_told = num_cached, len(sequence.token_ids)
        sequence.num_published_blocks = num_cached // self._cache.block_size
        if not sequence.was_admitted:
            sequence.num_cached, sequence.was_admitted = num_cached, True
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Takes a sequence's blocks; it is the next to be admitted, and computes its tokens again."""
        assert sequence.num_unread == 0, "no step is under way"
        assert len(self._running) > 1, "a sequence that is alone fits the cache"
        self._leave(sequence)
        sequence.visual.clear()
        sequence.num_computed = 0
        self._waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _append(self, decodes: Decodes, chunks: Items[Chunk] = ()) -> bool:
        """Takes slots for the tokens of a step. False: there is no room for all of them, and nothing has changed."""
        seq_ids, num_tokens = decodes.seq_id_S, decodes.one_S
        if not chunks:
            return self._cache.append(seq_ids, num_tokens)
        counts = [(chunk.sequence.seq_id, chunk.stop - chunk.start) for chunk in chunks]
        return self._cache.append(*np.concatenate(((seq_ids, num_tokens), np.array(counts, np.int32).T), axis=1))

    def _leave(self, sequence: Sequence) -> None:
        """Ends the run of a sequence, and returns its blocks."""
        self._running.remove(sequence)
        sequence.has_room = True
        self._last = None
        self._cache.blocks.release(sequence.seq_id)


def _longest_to_admit(budget: int, prefilling: Items[Sequence]) -> float:
    """Returns the most tokens that a sequence may have to compute to be admitted beside those in prefill.

    Those less than twice as long must leave it some of the tokens that the budget has besides the oldest's half. So a
    sequence waits for none that is much longer than itself; and of long prompts of about one length, the oldest and one
    other hold places and blocks.
    """
    left = budget - sum([sequence.num_uncomputed for sequence in prefilling])
    if left > 0:
        return math.inf
    left = max(budget - prefilling[0].num_uncomputed, budget // 2)
    for num_tokens in (0, *sorted([sequence.num_uncomputed for sequence in prefilling[1:]])):
        left -= num_tokens
        if left <= 0:
            return num_tokens // 2
    return math.inf

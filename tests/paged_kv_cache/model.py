"""Does what PagedKVCache must do in the simplest way: with lists and dicts, and with little stored state."""

from collections import Counter
from collections.abc import Sequence as Listing
from dataclasses import dataclass

from paged_kv_cache.contents import Contents, PictureSpan, Sequence, in_table


class RefusedError(Exception):
    """The model refuses a call; the cache must raise ValueError for it and change nothing."""


@dataclass
class Publication:
    steps: set[int]  # those that computed the block's tokens, and all tokens before them
    block: int
    content: int
    parent: int
    token_ids: list[int]


class Model:
    def __init__(self, num_blocks: int, block_size: int, watermark_blocks: int = 0, window: int | None = None) -> None:
        self.num_blocks, self.block_size, self.watermark_blocks = num_blocks, block_size, watermark_blocks
        self.window = window
        self.all_contents = Contents()
        self.sequences: dict[int, Sequence] = {}
        self.free = list(range(num_blocks))[::-1]  # the last block is allocated next
        self.cached: list[int] = []  # the first block is evicted next
        self.waiting: list[tuple[int, int | None]] = []  # (step, block free after it); None: the block was taken again
        self.published: dict[int, int] = {}  # block -> content of its last token
        self.pending: list[Publication] = []
        self.copied_until: Counter[int] = Counter()  # block -> the step that makes the copies from or to it
        self.busy_until: Counter[int] = Counter()  # block -> the latest step that uses it
        self.copies: list[list[int]] = []
        self.latest = self.completed = 0
        self.counts: Counter[str] = Counter()
        self.events: list[tuple[str, int, int, list[int]]] = []

    # --- queries

    def find(self, seq_id: int) -> Sequence:
        if seq_id not in self.sequences:
            raise RefusedError(f"sequence {seq_id} is not admitted")
        return self.sequences[seq_id]

    def find_batch(self, seq_ids: list[int], values: list[int]) -> list[Sequence]:
        if len(seq_ids) != len(values):
            raise RefusedError("sizes differ")
        if len(set(seq_ids)) != len(seq_ids):
            raise RefusedError("a sequence is listed twice")
        return [self.find(seq_id) for seq_id in seq_ids]

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def num_unseen(self, token: int) -> int:
        """Counts the blocks of which no token from this one on sees any in the window."""
        return 0 if self.window is None else max(0, token + 1 - self.window) // self.block_size

    def blocks_of(self, sequence: Sequence) -> list[int]:
        return [block for table in sequence.tables for block in table if block >= 0]

    def references(self, block: int) -> int:
        return sum(block in self.blocks_of(s) for s in self.sequences.values())

    def writable(self, block: int) -> bool:
        is_private = block not in self.published and all(p.block != block for p in self.pending)
        return is_private and self.references(block) == 1

    def num_available(self) -> int:
        return len(self.free) + len(self.cached)

    def deferred(self) -> list[int]:
        return [block for _, block in self.waiting if block is not None]

    def stats(self) -> dict[str, int]:
        used = {block for s in self.sequences.values() for block in self.blocks_of(s)}
        everywhere = [*self.free, *self.cached, *self.deferred(), *used]
        assert sorted(everywhere) == list(range(self.num_blocks)), "the model itself lost a block"
        return {
            "num_blocks": self.num_blocks,
            "num_free": len(self.free),
            "num_cached": len(self.cached),
            "num_used": len(used),
            "num_deferred": len(self.deferred()),
            "num_sequences": len(self.sequences),
            **{name: self.counts[name] for name in ("queried_tokens", "hit_tokens", "num_evictions", "num_copies")},
        }

    # --- allocation of blocks

    def allocate(self) -> int:
        block = (self.free or self.cached[:1])[-1]
        assert self.busy_until[block] <= self.completed, "a step or a copy may still use the block"
        if self.free:
            return self.free.pop()
        self.cached.pop(0)
        self.events.append(("removed", self.published.pop(block), 0, []))
        self.counts["num_evictions"] += 1
        return block

    def take(self, block: int) -> None:
        """Makes a published block unavailable, before another sequence's table gets it."""
        if block in self.cached:
            self.cached.remove(block)
        self.waiting = [(fence, None if waits == block else waits) for fence, waits in self.waiting]

    def drop(self, block: int, fence: int) -> None:
        """Frees a block that a table has lost, if no other table holds it: after step `fence` and pending copies."""
        if self.references(block) == 0:
            self.waiting.append((max(fence, self.copied_until[block]), block))
            self.settle()

    def settle(self) -> None:
        """Publishes and frees the blocks that waited for the steps completed by now."""
        for done in [p for p in self.pending if max(p.steps) <= self.completed]:
            self.pending.remove(done)
            if done.content not in self.published.values():
                self.published[done.block] = done.content
                self.events.append(("stored", done.content, done.parent, done.token_ids))
        while self.waiting and self.waiting[0][0] <= self.completed:
            _, block = self.waiting.pop(0)
            if block is not None:
                (self.cached if block in self.published else self.free).append(block)

    def copy(self, source: int, destination: int) -> None:
        self.counts["num_copies"] += 1
        source = next((s for s, d in self.copies if d == source), source)
        for block in (source, destination):
            self.copied_until[block] = self.busy_until[block] = self.latest + 1
        self.copies.append([source, destination])

    def choose_ids(self, sequence: Sequence, token_ids: list[int]) -> None:
        """Adds the ids of the sequence's next tokens, which the cache may not know yet."""
        for token_id in token_ids:
            place = len(sequence.token_ids)
            picture, cut = sequence.pictures.get(place), place == sequence.cut
            sequence.contents.append(self.all_contents.after(sequence.contents[-1], token_id, picture, cut))
            sequence.token_ids.append(token_id)

    # --- the interface of PagedKVCache

    def prompt(self, token_ids: list[int], pictures: Listing[PictureSpan], identity: bytes | None) -> Sequence:
        end = 0
        for start, num_tokens, digest in pictures:
            if start < end or num_tokens < 1 or start + num_tokens > len(token_ids) or len(digest) != 32:
                raise RefusedError("malformed pictures")
            end = start + num_tokens
        begins = {start: (num_tokens, digest) for start, num_tokens, digest in pictures}
        sequence = Sequence(identity, begins, [], len(token_ids), [self.all_contents.root(identity)])
        self.choose_ids(sequence, token_ids)
        return sequence

    def matched_blocks(self, prompt: Sequence, max_cached: int | None) -> list[list[int]]:
        """Returns the blocks of each table, as many as are of use; -1 for those that no later token sees."""
        if max_cached is not None and max_cached < 0:
            raise RefusedError("max_cached")
        holder = {content: block for block, content in self.published.items()}
        most = min(len(prompt.token_ids) - 1, len(prompt.token_ids) if max_cached is None else max_cached)
        ends = range(self.block_size, most + 1, self.block_size)
        blocks, in_window = ([holder.get(in_table(table, prompt.contents[end])) for end in ends] for table in (0, 1))
        for number in range(len(ends), 0, -1):
            unseen = self.num_unseen(number * self.block_size)
            if self.window is None and None not in blocks[:number]:
                return [blocks[:number]]
            if self.window is not None and None not in blocks[:number] + in_window[unseen:number]:
                return [blocks[:number], [-1] * unseen + in_window[unseen:number]]
        return [[]] if self.window is None else [[], []]

    def match(
        self,
        token_ids: list[int],
        pictures: Listing[PictureSpan] = (),
        identity: bytes | None = b"",
        max_cached: int | None = None,
    ) -> int:
        return len(self.matched_blocks(self.prompt(token_ids, pictures, identity), max_cached)[0]) * self.block_size

    def admit(
        self,
        seq_id: int,
        token_ids: list[int],
        pictures: Listing[PictureSpan] = (),
        identity: bytes | None = b"",
        num_reserved: int = 0,
        max_cached: int | None = None,
    ) -> int | None:
        if seq_id in self.sequences or not 0 <= seq_id < 2**31 or num_reserved < 0:
            raise RefusedError("seq_id or num_reserved")
        sequence = self.prompt(token_ids, pictures, identity)
        matched = self.matched_blocks(sequence, max_cached)
        length = len(matched[0]) * self.block_size
        num_new = self.blocks_for(max(length, num_reserved)) - len(matched[0])
        num_kept_free = self.watermark_blocks if self.sequences else 0
        reused = {block for table in matched for block in table if block >= 0}
        if num_new * len(matched) > self.num_available() - len(reused & set(self.cached)) - num_kept_free:
            return None
        for block in reused:
            self.take(block)
        sequence.tables = [table + [self.allocate() for _ in range(num_new)] for table in matched]
        sequence.num_freed = self.num_unseen(length)
        sequence.steps = [0] * length
        sequence.num_published = len(matched[0])
        self.sequences[seq_id] = sequence
        if identity is not None:
            self.counts["queried_tokens"] += len(token_ids)
            self.counts["hit_tokens"] += length
        return length

    def touched(self, sequence: Sequence, num_tokens: int) -> range:
        """Returns the table indices of the blocks that the next `num_tokens` tokens are written to."""
        end = self.blocks_for(sequence.length + num_tokens)
        return range(sequence.length // self.block_size, end) if num_tokens else range(0)

    def num_needed(self, sequence: Sequence, num_tokens: int) -> int:
        places = self.touched(sequence, num_tokens)
        return sum(i >= len(table) or not self.writable(table[i]) for table in sequence.tables for i in places)

    def append(self, seq_ids: list[int], num_tokens: list[int]) -> bool:
        sequences = self.find_batch(seq_ids, num_tokens)
        if any(count < 0 for count in num_tokens):
            raise RefusedError("num_tokens")
        if sum(map(self.num_needed, sequences, num_tokens)) > self.num_available():
            return False
        for sequence, count in zip(sequences, num_tokens, strict=True):
            for table, i in [(table, i) for table in sequence.tables for i in self.touched(sequence, count)]:
                if i >= len(table):
                    table.append(self.allocate())
                elif not self.writable(table[i]):
                    old, table[i] = table[i], self.allocate()
                    if i * self.block_size < sequence.length:
                        self.copy(old, table[i])
                    self.drop(old, self.latest + 1)
            sequence.steps += [None] * count
        return True

    def extend(self, seq_id: int, token_ids: list[int]) -> None:
        sequence = self.find(seq_id)
        chosen = sequence.token_ids[sequence.num_known :]
        assert chosen[: len(token_ids)] == token_ids[: len(chosen)], "the driver reveals other ids than it chose"
        self.choose_ids(sequence, token_ids[len(chosen) :])
        sequence.num_known += len(token_ids)

    def publish(self, seq_ids: list[int], num_tokens: list[int]) -> None:
        sequences = self.find_batch(seq_ids, num_tokens)
        for sequence, count in zip(sequences, num_tokens, strict=True):
            if not 0 <= count <= min(sequence.num_in_steps, sequence.num_known):
                raise RefusedError("num_tokens")
        size = self.block_size
        for sequence, count in zip(sequences, num_tokens, strict=True):
            if sequence.identity is None:
                continue
            if sequence.cut is not None:
                count = min(count, sequence.cut)  # no prompt has the text that follows a part of a picture
            for i in range(sequence.num_published, count // size):
                end = (i + 1) * size
                steps = {step for step in sequence.steps[:end] if step is not None}
                parent, ids = sequence.contents[i * size], sequence.token_ids[i * size : end]
                for number, table in enumerate(sequence.tables):
                    block, content = table[i], in_table(number, sequence.contents[end])
                    if block >= 0 and block not in self.published and all(p.block != block for p in self.pending):
                        self.pending.append(Publication(steps, block, content, parent, ids))
            sequence.num_published = max(sequence.num_published, count // size)
        self.settle()

    def fork(self, seq_id: int, new_seq_id: int) -> None:
        old = self.find(seq_id)
        if new_seq_id in self.sequences or not 0 <= new_seq_id < 2**31:
            raise RefusedError("new_seq_id")
        new = Sequence(old.identity, dict(old.pictures), list(old.token_ids), old.num_known, list(old.contents))
        new.steps, new.cut, new.num_published = list(old.steps), old.cut, old.num_published
        new.tables = [table[: self.blocks_for(old.length)] for table in old.tables]
        new.num_freed = old.num_freed
        self.sequences[new_seq_id] = new

    def rollback(self, seq_id: int, num_tokens: int) -> None:
        sequence = self.find(seq_id)
        if not 0 <= num_tokens <= sequence.length:
            raise RefusedError("num_tokens")
        end = sequence.length - num_tokens
        if self.num_unseen(end) < sequence.num_freed:
            raise RefusedError("num_tokens: the next token would see a freed block")
        sequence.roll_back_to(end)
        sequence.num_published = min(sequence.num_published, end // self.block_size)

    def release(self, seq_id: int) -> None:
        sequence = self.find(seq_id)
        del self.sequences[seq_id]
        for block in [block for table in sequence.tables for block in reversed(table) if block >= 0]:
            self.drop(block, self.latest)

    def fill_step(self, seq_ids: list[int], num_new_tokens: list[int]) -> int:
        sequences = self.find_batch(seq_ids, num_new_tokens)
        if self.copies:
            raise RefusedError("copies are waiting")
        for s, count in zip(sequences, num_new_tokens, strict=True):
            if not 0 <= count <= s.length:
                raise RefusedError("num_new_tokens")
            new = range(s.length - count, s.length)
            blocks = [table[t // self.block_size] for table in s.tables for t in new]
            if any(s.steps[t] == 0 for t in new) or not all(map(self.writable, blocks)):
                raise RefusedError("num_new_tokens: it may not write them")
            if count and self.num_unseen(new.start) < s.num_freed:
                raise RefusedError("num_new_tokens: they see freed blocks")
        self.latest += 1
        for s, count in zip(sequences, num_new_tokens, strict=True):
            first = s.length - count
            if count and first <= s.num_in_steps:  # else a token before them has not been computed
                s.steps[first:] = [self.latest] * count
                for i in range(s.num_freed, self.num_unseen(first)):
                    block, s.tables[1][i] = s.tables[1][i], -1
                    self.drop(block, self.latest - 1)
                s.num_freed = max(s.num_freed, self.num_unseen(first))
        for block in {block for s in sequences for block in self.blocks_of(s)}:
            self.busy_until[block] = self.latest
        return self.latest

    def complete(self, step: int, failed: bool = False) -> None:
        if not self.completed <= step <= self.latest:
            raise RefusedError("step")
        if failed:
            lost = set(range(self.completed + 1, step + 1))
            self.pending = [p for p in self.pending if not p.steps & lost]
            for sequence in self.sequences.values():
                sequence.lose(lost)
                sequence.num_published = min(sequence.num_published, sequence.num_in_steps // self.block_size)
        self.completed = step
        self.settle()

    def take_copies(self) -> list[list[int]]:
        copies, self.copies = self.copies, []
        return copies

    def reset(self) -> None:
        self.published, self.pending = {}, []
        self.free += self.cached
        self.cached = []
        for sequence in self.sequences.values():
            sequence.num_published = 0
        self.events = [("cleared", 0, 0, [])]

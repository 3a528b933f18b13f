"""Runs random operations on a cache whose digests are so short that they collide all the time.

A model cannot know which prefixes a collision hides. So this compares nothing but the memory: what the cache finds for
a prompt, and what it keeps for a sequence, must be what the tokens depend on.
"""

from collections import Counter

from internvl_rt._C import PagedKVCache
from paged_kv_cache.buffers import int32, step_buffers
from paged_kv_cache.contents import Contents, PictureSpan, Sequence
from paged_kv_cache.device import Device
from paged_kv_cache.draws import Draw

NUM_BLOCKS, BLOCK_SIZE, MAX_SEQUENCES = 16, 2, 6


class Collisions:
    def __init__(self, draw: Draw, hash_bits: int, window: int | None) -> None:
        self.integer = draw.integer
        self.window = window
        num_blocks = NUM_BLOCKS * (1 if window is None else 2)  # for two tables
        self.cache = PagedKVCache(num_blocks, BLOCK_SIZE, hash_bits=hash_bits, window=window)
        self.device = Device(num_blocks, BLOCK_SIZE, window)
        self.contents = Contents()
        self.sequences: dict[int, Sequence] = {}
        self.counts: Counter[str] = Counter()

    def pick(self) -> int:
        return sorted(self.sequences)[self.integer(0, len(self.sequences) - 1)]

    def choose_ids(self, s: Sequence, token_ids: list[int]) -> None:
        for token_id in token_ids:
            picture, cut = s.pictures.get(len(s.token_ids)), len(s.token_ids) == s.cut
            s.contents.append(self.contents.after(s.contents[-1], token_id, picture, cut))
            s.token_ids.append(token_id)

    def admit(self) -> None:
        vacant = set(range(MAX_SEQUENCES)) - self.sequences.keys()
        if not vacant:
            return self.release()
        seq_id, identity = min(vacant), (b"", b"", b"a")[self.integer(0, 2)]
        token_ids = [int(self.integer(0, 5) == 0) for _ in range(self.integer(1, 12))]  # few texts, which often match
        start, num_tokens = self.integer(0, 2), self.integer(1, 3)
        fits = start + num_tokens <= len(token_ids) and self.integer(0, 2) == 0
        pictures: list[PictureSpan] = [(start, num_tokens, bytes(32))] if fits else []
        num_matched = self.cache.admit(seq_id, int32(token_ids), pictures, identity)
        if num_matched is None:
            return self.release() if self.sequences else self.complete()
        begins = {start: (num_tokens, bytes(32))} if fits else {}
        s = self.sequences[seq_id] = Sequence(identity, begins, [], len(token_ids), [self.contents.root(identity)])
        self.choose_ids(s, token_ids)
        s.steps = [0] * num_matched
        self.counts["hits"] += num_matched > 0
        self.launch(seq_id, 0)

    def append(self) -> None:
        seq_id = self.pick()
        s = self.sequences[seq_id]
        count = self.integer(1, max(3, len(s.token_ids) - s.length))
        if not self.cache.append(int32([seq_id]), int32([count])):
            return self.release()
        s.steps += [None] * count
        ids = [self.integer(0, 1) for _ in range(s.length - len(s.token_ids))]
        self.choose_ids(s, ids)
        self.cache.extend(seq_id, int32(ids))
        self.launch(seq_id, s.length - s.num_in_steps)

    def launch(self, seq_id: int, count: int) -> None:
        """Fills a step of one sequence, which may fail; checks what the sequence reads."""
        has_window = self.window is not None
        s, out = self.sequences[seq_id], step_buffers(1, NUM_BLOCKS, count, has_window=has_window)
        self.device.copy(self.cache.take_copies().tolist())
        try:
            step = self.cache.fill_step(int32([seq_id]), int32([count]), **out)
        except ValueError:
            self.counts["refused"] += 1
            return self.release(seq_id)
        names = ["block_table_SN", "window_table_SN"][: 1 + has_window]
        s.tables = [out[name][0, : -(-s.length // BLOCK_SIZE)].tolist() for name in names]
        s.num_freed = s.tables[-1].count(-1)
        self.device.check_sequence(seq_id, s)
        fails = self.integer(0, 9) == 0
        if fails:
            self.device.doomed.add(step)
        self.device.compute(s, count, fails)
        s.steps[s.length - count :] = [step] * count
        self.device.check_sequence(seq_id, s)

    def publish(self) -> None:
        seq_id = self.pick()
        s = self.sequences[seq_id]
        most = min(s.num_in_steps, len(s.token_ids))
        self.cache.publish(int32([seq_id]), int32([most if self.integer(0, 3) else self.integer(0, most)]))

    def fork(self) -> None:
        vacant = set(range(MAX_SEQUENCES)) - self.sequences.keys()
        if vacant:
            seq_id, new = self.pick(), min(vacant)
            self.cache.fork(seq_id, new)
            s = self.sequences[seq_id]
            copied = {"pictures": dict(s.pictures), "token_ids": list(s.token_ids), "contents": list(s.contents)}
            self.sequences[new] = Sequence(s.identity, num_known=s.num_known, steps=list(s.steps), cut=s.cut, **copied)

    def rollback(self) -> None:
        seq_id = self.pick()
        s = self.sequences[seq_id]
        end = self.integer(0, s.length)
        try:
            self.cache.rollback(seq_id, s.length - end)
        except ValueError:  # the next token would see a freed block
            self.counts["refused"] += 1
            return
        s.roll_back_to(end)

    def release(self, seq_id: int | None = None) -> None:
        seq_id = self.pick() if seq_id is None else seq_id
        self.cache.release(seq_id)
        del self.sequences[seq_id]

    def complete(self) -> None:
        """Ends one or more steps, one by one."""
        for step in range(
            self.counts["completed"] + 1, self.integer(self.counts["completed"], self.cache.num_steps) + 1
        ):
            failed = step in self.device.doomed
            self.cache.complete(step, failed=failed)
            self.counts["completed"] = step
            for s in self.sequences.values() if failed else ():
                s.lose({step})

    def run(self, num_operations: int) -> Counter[str]:
        operations = [self.append, self.append, self.append, self.publish, self.publish, self.fork, self.rollback]
        operations += [self.admit, self.admit, self.release, self.complete, self.complete]
        for _ in range(num_operations):
            operation = operations[self.integer(0, len(operations) - 1)] if self.sequences else self.admit
            operation()
            self.cache.check_invariants()
        return self.counts

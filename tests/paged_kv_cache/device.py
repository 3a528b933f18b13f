"""Replaces the pool of keys and values: each slot holds the content number (see contents.py) of its token."""

from paged_kv_cache.contents import Sequence, in_table
from paged_kv_cache.model import Model

GARBAGE = -1  # what a step writes that fails, or that reads garbage


class Device:
    def __init__(self, num_blocks: int, block_size: int, window: int | None = None) -> None:
        self.block_size, self.window = block_size, window
        self.memory = [[GARBAGE] * block_size for _ in range(num_blocks)]
        self.doomed: set[int] = set()  # steps of which the host does not know yet, or knows, that they failed

    def copy(self, copies: list[list[int]]) -> None:
        """Makes all copies of a list at once; the destination of a copy must not occur in another copy."""
        destinations = [destination for _, destination in copies]
        assert len(set(destinations)) == len(copies), f"one block is the destination of two copies: {copies}"
        assert not set(destinations) & {source for source, _ in copies}, f"copied to and from at once: {copies}"
        for source, destination in copies:
            self.memory[destination] = list(self.memory[source])

    def compute(self, s: Sequence, count: int, fails: bool) -> None:
        """Writes the last `count` tokens, which depend on all tokens before them."""
        first = s.length - count
        right = not fails and self.is_right(s, first)
        for number, table in enumerate(s.tables):
            for t in range(first, s.length):
                content = in_table(number, s.contents[t + 1]) if right else GARBAGE
                self.memory[table[t // self.block_size]][t % self.block_size] = content

    def is_right(self, s: Sequence, end: int) -> bool:
        """Says whether the token after the first `end` ones would read what it depends on, in all tables."""
        for number, table in enumerate(s.tables):
            first = 0 if number == 0 or self.window is None else max(0, end + 1 - self.window)
            read = [self.memory[table[t // self.block_size]][t % self.block_size] for t in range(first, end)]
            if read != [in_table(number, content) for content in s.contents[first + 1 : end + 1]]:
                return False
        return True

    def check(self, model: Model) -> None:
        """Checks that all published blocks, and all tokens that no failed step has spoilt, are where the model says."""
        if not model.copies:
            for seq_id, s in model.sequences.items():
                self.check_sequence(seq_id, s)
        for block, content in model.published.items():
            assert self.memory[block][-1] == content, f"block {block} is published and holds something else"

    def check_sequence(self, seq_id: int, s: Sequence) -> None:
        end = next((t for t, step in enumerate(s.steps) if step is None or step in self.doomed), s.length)
        sees_freed = self.window is not None and max(0, end + 1 - self.window) < s.num_freed * self.block_size
        assert sees_freed or self.is_right(s, end), f"sequence {seq_id} reads"

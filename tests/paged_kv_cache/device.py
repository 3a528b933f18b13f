"""Replaces the pool of keys and values: each slot holds the content number (see contents.py) of its token."""

from paged_kv_cache.contents import Sequence
from paged_kv_cache.model import Model


class Device:
    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.memory = [[-1] * block_size for _ in range(num_blocks)]

    def copy(self, copies: list[list[int]]) -> None:
        """Makes all copies of a list at once; the destination of a copy must not occur in another copy."""
        destinations = [destination for _, destination in copies]
        assert len(set(destinations)) == len(copies), f"one block is the destination of two copies: {copies}"
        assert not set(destinations) & {source for source, _ in copies}, f"copied to and from at once: {copies}"
        for source, destination in copies:
            self.memory[destination] = list(self.memory[source])

    def write(self, slots: list[int], contents: list[int]) -> None:
        for slot, content in zip(slots, contents, strict=True):
            self.memory[slot // self.block_size][slot % self.block_size] = content

    def read(self, blocks: list[int]) -> list[int]:
        return [content for block in blocks for content in self.memory[block]]

    def check(self, model: Model) -> None:
        """Checks that every computed token and every published block is where the model says."""
        for seq_id, s in model.sequences.items():
            self.check_sequence(seq_id, s)
        for block, content in model.published.items():
            assert self.memory[block][-1] == content, f"block {block} is published and holds something else"

    def check_sequence(self, seq_id: int, s: Sequence) -> None:
        blocks = s.table[: -(-s.num_in_steps // self.block_size)]
        assert self.read(blocks)[: s.num_in_steps] == s.contents[1 : s.num_in_steps + 1], f"sequence {seq_id} reads"

"""A pool of numbers in place of keys and values: slot by slot, the content (see contents.py) that is there."""

from paged_kv_cache.contents import Sequence
from paged_kv_cache.model import DEVICE_COPY, TO_DEVICE, TO_HOST, Model


class Device:
    def __init__(self, num_blocks: int, block_size: int, num_host_blocks: int) -> None:
        self.block_size = block_size
        self.memory = [[-1] * block_size for _ in range(num_blocks)]
        self.host = [[-1] * block_size for _ in range(num_host_blocks)]

    def copy(self, copies: list[list[int]]) -> None:
        """Copies of one kind that follow each other are made at once, so none of them may meet another's block."""
        while copies:
            kind = copies[0][0]
            run = [copies[i][1:] for i in range(len(copies)) if all(c[0] == kind for c in copies[: i + 1])]
            copies = copies[len(run) :]
            destinations = [destination for _, destination in run]
            assert len(set(destinations)) == len(run), f"one block is the destination of two copies: {run}"
            if kind == DEVICE_COPY:
                assert not set(destinations) & {source for source, _ in run}, f"copied to and from at once: {run}"
            sources = self.host if kind == TO_DEVICE else self.memory
            targets = self.host if kind == TO_HOST else self.memory
            for source, destination in run:
                targets[destination] = list(sources[source])

    def write(self, slots: list[int], contents: list[int]) -> None:
        for slot, content in zip(slots, contents, strict=True):
            self.memory[slot // self.block_size][slot % self.block_size] = content

    def read(self, blocks: list[int]) -> list[int]:
        return [content for block in blocks for content in self.memory[block]]

    def check(self, model: Model) -> None:
        """Every token that was computed, and every published block, is where the books say."""
        for seq_id, s in model.sequences.items():
            if not s.swapped:
                self.check_sequence(seq_id, s)
        for block, content in model.published.items():
            assert self.memory[block][-1] == content, f"block {block} is published and holds something else"

    def check_sequence(self, seq_id: int, s: Sequence) -> None:
        blocks = s.table[: -(-s.num_in_steps // self.block_size)]
        assert self.read(blocks)[: s.num_in_steps] == s.contents[1 : s.num_in_steps + 1], f"sequence {seq_id} reads"

"""Draws random arguments: small pools, lengths near block boundaries, and few texts, so that prefixes often match."""

from typing import Any, Protocol

from paged_kv_cache.contents import PictureSpan
from paged_kv_cache.model import Model

Prompt = tuple[list[int], tuple[PictureSpan, ...], bytes | None]  # token ids, pictures, identity

MAX_SEQUENCES = 6


class Draw(Protocol):
    def integer(self, low: int, high: int) -> int: ...


class Draws:
    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        num_blocks, size = self.pick([1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24]), self.pick([1, 2, 3, 16])
        window = self.pick([None, None, None, 1, 2, size, size + 1, 2 * size, 3 * size + 1])
        num_blocks *= 1 if window is None else 2  # for two tables
        self.model = Model(num_blocks, size, self.integer(0, min(2, num_blocks - 1)), window)
        self.deck = self.draw_deck()
        self.text: dict[int, int] = {}  # sequence -> the text that its next tokens are taken from

    def integer(self, low: int, high: int) -> int:
        return self.draw.integer(low, high)

    def pick(self, values: Any) -> Any:
        return values[self.integer(0, len(values) - 1)]

    def rarely(self) -> bool:
        return self.integer(0, 7) == 7

    def beside_boundary(self, length: int, most_blocks: int) -> int:
        """Returns how many tokens lead from `length` to a block boundary, or to one token before or after it."""
        end = (length // self.model.block_size + self.integer(0, most_blocks)) * self.model.block_size
        return max(0, end + self.integer(-1, 1) - length)

    def draw_deck(self) -> list[PictureSpan]:
        """Draws pictures that differ in one property only and could be confused."""
        size = self.model.block_size
        start = max(0, self.integer(0, 2) * size + self.integer(-1, 1))
        num_tokens = self.pick([1, size, size + 1, 2 * size])
        cat, dog = bytes(32), b"d" * 32
        base = (start, num_tokens, cat)
        return [base, base, (start, num_tokens, dog), (start + 1, num_tokens, cat), (start, num_tokens + 1, cat)]

    def text_ids(self, text: int, start: int, count: int) -> list[int]:
        return [(0, t % 2, t // 3 % 2)[text] for t in range(start, start + count)]

    def draw_prompt(self) -> tuple[int, Prompt]:
        """Returns the number of a text, and a prompt taken from it."""
        if self.model.sequences and self.integer(0, 2) == 0:
            return self.draw_repeated_prompt()
        text, end = self.pick([0, 0, 1, 2]), 0
        pictures: list[PictureSpan] = []
        token_ids = self.text_ids(text, 0, self.beside_boundary(0, min(4, self.model.num_blocks + 1)))
        if token_ids and self.rarely():
            token_ids[self.integer(0, len(token_ids) - 1)] = 5
        for start, num_tokens, digest in (self.pick(self.deck) for _ in range(self.integer(0, 2))):
            start = max(start, end)
            if start + num_tokens <= len(token_ids):
                pictures.append((start, num_tokens, digest))
                end = start + num_tokens
        return text, (token_ids, tuple(pictures), self.pick([*[b""] * 5, b"a", b"b", None]))

    def draw_repeated_prompt(self) -> tuple[int, Prompt]:
        """Draws a prompt of all tokens of a sequence and one more, as in the next turn of a conversation."""
        seq_id = self.pick(sorted(self.model.sequences))
        s = self.model.sequences[seq_id]
        token_ids = [*s.token_ids, self.integer(0, 1)]
        spans = ((start, *picture) for start, picture in s.pictures.items())
        pictures = tuple(p for p in spans if p[0] + p[1] <= len(token_ids))  # a rollback may have cut other pictures
        return self.text[seq_id], (token_ids, pictures, s.identity)

    def draw_max_cached(self, prompt: Prompt) -> int | None:
        """Draws a limit for cached tokens, mostly near a block boundary inside the prefix that would match."""
        if self.rarely() and self.rarely():
            return -1
        bound = self.beside_boundary(0, self.model.match(*prompt) // self.model.block_size)
        return self.pick([None, None, bound, bound, bound, len(prompt[0]), 2**63 - 1])

    def draw_sequence(self) -> int:
        return self.pick(sorted(self.model.sequences)) if self.model.sequences and not self.rarely() else self.draw_id()

    def draw_id(self) -> int:
        return self.integer(0, MAX_SEQUENCES - 1)

    def draw_new_id(self) -> int:
        vacant = [seq_id for seq_id in range(MAX_SEQUENCES) if seq_id not in self.model.sequences]
        return self.pick(vacant) if vacant and not self.rarely() else self.draw_id()

    def draw_some(self) -> list[int]:
        rest = sorted(self.model.sequences)
        if not rest or self.rarely():
            return []
        return [rest.pop(self.integer(0, len(rest) - 1)) for _ in range(self.integer(1, len(rest)))]

    def draw_count(self, seq_id: int) -> int:
        """Draws how many tokens to append: up to the end of the prompt, up to near a block boundary, or one."""
        s = self.model.sequences[seq_id]
        counts = [max(1, len(s.token_ids) - s.length), self.beside_boundary(s.length, 2), 1]
        return self.pick(counts)

"""Gives numbers to what the keys and values of a token depend on, and holds the tokens of a sequence.

A sequence has one table of blocks, and another one if there are layers with a window.
"""

from dataclasses import dataclass, field

PictureSpan = tuple[int, int, bytes]


class Contents:
    """Gives a number to what a token's keys and values depend on. Two tokens have the same number exactly when their
    identities, all token ids up to them, and all pictures that begin up to them (start, length, digest) and where such
    a picture was cut by a rollback are equal."""

    def __init__(self) -> None:
        self.numbers: dict[object, int] = {}

    def root(self, identity: bytes | None) -> int:
        return self.number(object() if identity is None else identity)

    def after(self, parent: int, token_id: int, picture: tuple[int, bytes] | None, cut: bool = False) -> int:
        return self.number((parent, token_id, picture, cut))

    def number(self, key: object) -> int:
        return self.numbers.setdefault(key, len(self.numbers))


def in_table(table: int, content: int) -> int:
    """Returns what a block of a table holds of a token: layers with a window have other keys and values."""
    return content if table == 0 else -2 - content


@dataclass
class Sequence:
    identity: bytes | None
    pictures: dict[int, tuple[int, bytes]]  # first token -> (number of tokens, digest)
    token_ids: list[int]  # the cache knows the first num_known; it learns the others later
    num_known: int
    contents: list[int] = field(default_factory=list)  # numbers: [0] for the root, [t + 1] for token t
    # For each token that has a slot: the last step that computes it, 0 if it came from the cache, None if it has been
    # in no step, or only in one that failed.
    steps: list[int | None] = field(default_factory=list)
    cut: int | None = None  # where a rollback has cut a picture
    num_published: int = 0  # blocks
    tables: list[list[int]] = field(default_factory=list)  # blocks; the first num_freed of the second table are -1
    num_freed: int = 0

    @property
    def length(self) -> int:
        return len(self.steps)

    @property
    def num_in_steps(self) -> int:
        return self.steps.index(None) if None in self.steps else self.length

    def roll_back_to(self, end: int) -> None:
        self.num_known = min(self.num_known, end)
        del self.steps[end:], self.token_ids[end:], self.contents[end + 1 :]
        self.pictures = {start: picture for start, picture in self.pictures.items() if start < end}
        inside = {at for start, (num, _) in self.pictures.items() for at in range(start + 1, start + num)}
        self.cut = min({end, self.cut} & inside, default=None)

    def lose(self, steps: set[int]) -> None:
        """Forgets what these steps computed, since they have failed, and what was computed from it."""
        first = next((t for t, step in enumerate(self.steps) if step in steps), self.length)
        self.steps[first:] = [None] * (self.length - first)

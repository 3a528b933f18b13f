"""Gives numbers to what the keys and values of a token depend on, and holds the tokens of a sequence."""

from dataclasses import dataclass, field

PictureSpan = tuple[int, int, bytes]


class Contents:
    """Gives a number to what a token's keys and values depend on. Two tokens have the same number exactly when their
    identities, all token ids up to them, and all pictures that begin up to them (start, length, digest) are equal."""

    def __init__(self) -> None:
        self.numbers: dict[object, int] = {}

    def root(self, identity: bytes | None) -> int:
        return self.number(object() if identity is None else identity)

    def after(self, parent: int, token_id: int, picture: tuple[int, bytes] | None) -> int:
        return self.number((parent, token_id, picture))

    def number(self, key: object) -> int:
        return self.numbers.setdefault(key, len(self.numbers))


@dataclass
class Sequence:
    identity: bytes | None
    pictures: dict[int, tuple[int, bytes]]  # first token -> (number of tokens, digest)
    token_ids: list[int]  # the cache knows the first num_known; it learns the others later
    num_known: int
    contents: list[int] = field(default_factory=list)  # numbers: [0] for the root, [t + 1] for token t
    length: int = 0
    num_in_steps: int = 0
    num_published: int = 0  # blocks
    table: list[int] = field(default_factory=list)  # blocks

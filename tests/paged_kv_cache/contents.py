"""What a token's keys and values depend on, and a sequence of tokens."""

from dataclasses import dataclass, field

PictureSpan = tuple[int, int, bytes]


class Contents:
    """Numbers for what a token's keys and values depend on. Two tokens have the same number exactly if their
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
    pictures: dict[int, tuple[int, bytes]]  # by first token: number of tokens, digest
    token_ids: list[int]  # the first num_known are known to the cache, the others will be
    num_known: int
    contents: list[int] = field(default_factory=list)  # [0] of the root, [t + 1] of token t
    length: int = 0
    num_in_steps: int = 0
    num_published: int = 0  # blocks
    table: list[int] = field(default_factory=list)  # blocks

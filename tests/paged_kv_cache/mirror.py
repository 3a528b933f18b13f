"""Rebuilds the prefix index from its events alone."""

Event = tuple[str, bytes, bytes, list[int]]


class Mirror:
    def __init__(self) -> None:
        self.hash_of: dict[int, bytes] = {}  # content number, which only the model knows -> hash
        self.content_of: dict[bytes, int] = {}
        self.hashes: set[bytes] = set()

    def contents(self) -> set[int]:
        return {self.content_of[hash_] for hash_ in self.hashes}

    def replay(self, expected: list[tuple[str, int, int, list[int]]], events: list[Event]) -> None:
        """Compares the events with `expected`; a content number there must always have the same hash in the events."""
        for (kind, content, parent, token_ids), event in zip(expected, events, strict=True):
            assert event[0] == kind, f"expected the event {kind}, got {event[0]}"
            if kind == "cleared":
                self.hashes = set()
                continue
            assert event[3] == token_ids, "an event has other token ids"
            self.identify(content, event[1])
            if kind == "removed":
                self.hashes.remove(event[1])
                continue
            self.identify(parent, event[2])
            assert event[1] not in self.hashes, "an event stores what is stored"
            self.hashes.add(event[1])

    def identify(self, content: int, hash_: bytes) -> None:
        assert self.hash_of.setdefault(content, hash_) == hash_, "one content has two hashes"
        assert self.content_of.setdefault(hash_, content) == content, "one hash stands for two contents"

"""Which replica holds which blocks of prompts: replicas report how their caches change, and an ingress remembers it.

A block is named by its digest, as `steps.kv_cache.PrefixDigests` computes it. A report counts up; an ingress that has
missed one, or that has just begun, asks for a whole one. What an ingress believes may be late or wrong: a replica then
computes what it was believed to hold, and nothing else happens.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

DIGEST_BYTES = 16
EXPECTED_S = 20.0  # how long a replica that got a prompt is believed to hold it without having said so
MAX_EXPECTED = 1 << 14  # blocks of one replica


@dataclass(frozen=True, slots=True)
class Report:
    """What a replica says of itself: how its cache has changed since its last report, or all that it holds."""

    replica: str
    number: int  # of this report, counted from 0
    whole: bool  # whether `stored` is all that it holds
    stored: bytes  # digests, one after another
    removed: bytes
    facts: Mapping[str, Any] | None = None  # what an ingress must know to compute digests; in whole reports alone
    metrics: bytes | None = None  # in the text format of Prometheus, now and then


class Ledger:
    """Follows the events of one cache, in its replica."""

    def __init__(self) -> None:
        self._held: set[bytes] = set()
        self._stored: set[bytes] = set()  # since the last report
        self._removed: set[bytes] = set()
        self._whole = True  # the next report must be whole
        self._number = 0

    def __len__(self) -> int:
        return len(self._held)

    def follow(self, events: Iterable[tuple[str, bytes]]) -> None:
        """Takes the events of a cache in their order. What is undone before a report is not in it."""
        for kind, digest in events:
            if kind == "stored":
                self._held.add(digest)
                _move(digest, self._removed, self._stored)
            elif kind == "removed":
                self._held.discard(digest)
                _move(digest, self._stored, self._removed)
            else:
                self._held.clear()
                self._whole = True

    def ask_for_whole(self) -> None:
        """Makes the next report a whole one, because somebody has missed one."""
        self._whole = True

    @property
    def has_news(self) -> bool:
        return bool(self._whole or self._stored or self._removed)

    def report(self, replica: str, facts: Mapping[str, Any], metrics: bytes | None = None) -> Report:
        """Returns what has changed since the last report."""
        whole = self._whole
        stored = self._held if whole else self._stored
        removed = b"" if whole else b"".join(self._removed)
        made = Report(replica, self._number, whole, b"".join(stored), removed, facts if whole else None, metrics)
        self._number, self._whole = self._number + 1, False
        self._stored, self._removed = set(), set()
        return made


def _move(digest: bytes, undone: set[bytes], done: set[bytes]) -> None:
    if digest in undone:
        undone.discard(digest)
    else:
        done.add(digest)


@dataclass(slots=True)
class _Known:
    """What an ingress knows of one replica."""

    heard_s: float  # when it last reported
    number: int = -1
    blocks: set[bytes] = field(default_factory=set)
    expected: dict[bytes, float] = field(default_factory=dict)  # until when each is believed in
    metrics: bytes = b""

    def holds(self, digest: bytes, now_s: float) -> bool:
        return digest in self.blocks or self.expected.get(digest, now_s) > now_s


class Holdings:
    """What one ingress knows of all replicas. Its memory is bounded: `max_blocks` for each replica that is heard of."""

    def __init__(self, max_blocks: int) -> None:
        """max_blocks: further blocks of a replica are not known, which costs hits and nothing else."""
        self._max_blocks = max_blocks
        self._replicas: dict[str, _Known] = {}

    def take(self, report: Report, now_s: float) -> bool:
        """Takes a report. False: it does not follow the last one, and a whole one is needed."""
        known = self._replicas.get(report.replica)
        if known is None:
            known = self._replicas[report.replica] = _Known(now_s)
        known.heard_s = now_s
        if report.metrics is not None:
            known.metrics = report.metrics
        if report.whole:
            known.blocks = set()
        elif report.number != known.number + 1:
            known.blocks, known.number = set(), -2  # no report follows that number
            return False
        known.number = report.number
        known.blocks.difference_update(_cut(report.removed))
        for digest in _cut(report.removed):
            known.expected.pop(digest, None)
        stored = _cut(report.stored)
        known.blocks.update(stored[: max(0, self._max_blocks - len(known.blocks))])
        return True

    def expect(self, replica: str, digests: Sequence[bytes], now_s: float) -> None:
        """Believes for a while that a replica, which has just got a prompt, holds its blocks."""
        known = self._replicas.get(replica)
        if known is None:
            return
        for digest in digests:
            known.expected.pop(digest, None)  # so that the oldest belief stands first
            known.expected[digest] = now_s + EXPECTED_S
        while known.expected and (len(known.expected) > MAX_EXPECTED or _first(known.expected) <= now_s):
            del known.expected[next(iter(known.expected))]

    def match(self, digests: Sequence[bytes], now_s: float) -> dict[str, int]:
        """Counts the leading blocks of a prompt that each replica holds."""
        return {name: _num_leading(known, digests, now_s) for name, known in self._replicas.items()}

    def drop(self, replica: str) -> None:
        """Forgets a replica that has ended, if it is known."""
        self._replicas.pop(replica, None)

    def forget(self, before_s: float) -> None:
        """Forgets the replicas that have not been heard of since then."""
        self._replicas = {name: known for name, known in self._replicas.items() if known.heard_s >= before_s}

    def metrics(self) -> dict[str, bytes]:
        """Returns the latest metrics of each replica that has sent any."""
        return {name: known.metrics for name, known in self._replicas.items() if known.metrics}

    def __len__(self) -> int:
        return len(self._replicas)


def _num_leading(known: _Known, digests: Sequence[bytes], now_s: float) -> int:
    for index, digest in enumerate(digests):
        if not known.holds(digest, now_s):
            return index
    return len(digests)


def _first(expected: Mapping[bytes, float]) -> float:
    return next(iter(expected.values()))


def _cut(digests: bytes) -> list[bytes]:
    return [digests[start : start + DIGEST_BYTES] for start in range(0, len(digests), DIGEST_BYTES)]

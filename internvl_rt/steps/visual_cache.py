"""Keeps the visual tokens of pictures, so that a picture that comes again is neither decoded nor encoded."""

import threading
from collections import OrderedDict

from torch import Tensor

Key = tuple[bytes, str | None]  # digest, salt


class VisualCache:
    """Keeps the visual tokens that were used last, up to `capacity_bytes`. Any thread may use it.

    The key is a picture's digest, which covers its bytes and how it is cut, and the request's salt: timings tell
    whether a picture is here, and a tenant must not learn what another has sent.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._entries: OrderedDict[Key, Tensor] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()
        self.num_bytes = 0
        self.num_queries = 0
        self.num_hits = 0

    def has(self, digest: bytes, salt: str | None) -> bool:
        """Says whether a picture's visual tokens are here, and counts no query."""
        return (digest, salt) in self._entries

    def get(self, digest: bytes, salt: str | None) -> Tensor | None:
        """Returns visual tokens [X, D], or None if they are not here."""
        with self._lock:
            self.num_queries += 1
            visual_XD = self._entries.get((digest, salt))
            if visual_XD is not None:
                self.num_hits += 1
                self._entries.move_to_end((digest, salt))
            return visual_XD

    def put(self, digest: bytes, salt: str | None, visual_XD: Tensor) -> None:
        """Keeps visual tokens, unless they are larger than the whole cache."""
        with self._lock:
            if visual_XD.nbytes > self._capacity_bytes or (digest, salt) in self._entries:
                return
            self._entries[digest, salt] = visual_XD
            self.num_bytes += visual_XD.nbytes
            while self.num_bytes > self._capacity_bytes:
                _, oldest = self._entries.popitem(last=False)
                self.num_bytes -= oldest.nbytes

"""Keeps the visual tokens of pictures, so that a picture that comes again is neither decoded nor encoded."""

import threading
from collections import OrderedDict
from weakref import WeakKeyDictionary

from torch import Tensor

from internvl_rt.inputs.picture import Picture

Key = tuple[bytes, str | None]  # digest, salt


class VisualCache:
    """Keeps the visual tokens that were used last, up to `capacity_bytes`. Any thread may use it.

    Of a Flash model it keeps what the vision tower gives for a tile, whether it is compressed or not.

    The key is a picture's digest, which covers its bytes and how it is cut, and the request's salt: timings tell
    whether a picture is here, and a tenant must not learn what another has sent.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._entries: OrderedDict[Key, Tensor] = OrderedDict()  # least recently used first
        self._held: WeakKeyDictionary[Picture, Tensor] = WeakKeyDictionary()
        self._lock = threading.Lock()
        self.num_bytes = 0
        self.num_queries = 0
        self.num_hits = 0

    def hold(self, picture: Picture, salt: str | None) -> bool:
        """Says whether a picture's visual tokens are here, and if so keeps them for it as long as it lives.

        So a request that found them when it was made finds them when it runs. Counts no query.
        """
        with self._lock:
            visual_XD = self._entries.get((picture.digest, salt))
            if visual_XD is not None:
                self._held[picture] = visual_XD
            return picture in self._held

    def get(self, picture: Picture, salt: str | None) -> Tensor | None:
        """Returns visual tokens [X, D], or None if they are not here."""
        with self._lock:
            self.num_queries += 1
            key = picture.digest, salt
            if key in self._entries:
                self._entries.move_to_end(key)
            visual_XD = self._entries.get(key, self._held.get(picture))
            self.num_hits += visual_XD is not None
            return visual_XD

    def put(self, picture: Picture, salt: str | None, visual_XD: Tensor) -> None:
        """Keeps visual tokens, unless they are larger than the whole cache."""
        with self._lock:
            key = picture.digest, salt
            if visual_XD.nbytes > self._capacity_bytes or key in self._entries:
                return
            self._entries[key] = visual_XD
            self.num_bytes += visual_XD.nbytes
            while self.num_bytes > self._capacity_bytes:
                _, oldest = self._entries.popitem(last=False)
                self.num_bytes -= oldest.nbytes

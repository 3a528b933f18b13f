"""Decides which tiles of a request InternVL3.5-Flash sees with fewer visual tokens, before its prompt is laid out."""

import threading
from collections import OrderedDict
from collections.abc import Sequence as Items
from itertools import islice

import torch

from internvl_rt.engine.encoding import PictureEncoder
from internvl_rt.inputs.flash import compress
from internvl_rt.inputs.picture import Picture
from internvl_rt.inputs.proceed import Proceed
from internvl_rt.model.internvl import InternVL
from internvl_rt.steps.visual_cache import Key

MAX_KNOWN_TILES = 1 << 16

Odds = tuple[float, ...]  # of each tile of a picture


class TileDecider:
    """Encodes the pictures of a request, and compares what the router says of their tiles.

    The odds of pictures stay known for longer than their visual tokens: so a picture whose keys and values are cached
    is neither decoded nor encoded when it comes again. Any thread may use it.
    """

    def __init__(self, encoder: PictureEncoder, model: InternVL) -> None:
        self._encoder, self._config, self._dtype = encoder, model.config, model.dtype
        self._known: OrderedDict[Key, Odds] = OrderedDict()  # the least recently used first
        self._num_known = 0  # tiles
        self._lock = threading.Lock()

    def decide(self, pictures: Items[Picture], salt: str | None, proceed: Proceed) -> Items[Picture]:
        """Returns the pictures of one request with what is decided of their tiles.

        proceed: called before each picture is decoded; it may raise. Raises MediaError for a broken picture, StepError
        for a fault.
        """
        own = [picture for picture in pictures if picture.visual_XD is None]
        odds = {picture: self._recall((picture.digest, salt)) for picture in own}
        odds |= self._compute([picture for picture in own if odds[picture] is None], salt, proceed)
        in_order = [number for picture in own for number in odds[picture] or ()]
        return compress(pictures, in_order, self._config, self._dtype)

    def _compute(self, pictures: Items[Picture], salt: str | None, proceed: Proceed) -> dict[Picture, Odds]:
        """Encodes pictures, and waits for the device once, for all their odds."""
        parts = []
        for picture in pictures:
            proceed()
            rows_XD = self._encoder.encode(picture, salt, proceed)
            parts.append(rows_XD.view(picture.num_tiles, -1, rows_XD.shape[1])[:, -1, 0].clone())
        numbers = iter(torch.cat(parts).tolist() if parts else ())
        found = {picture: tuple(islice(numbers, picture.num_tiles)) for picture in pictures}
        for picture, odds in found.items():
            self._remember((picture.digest, salt), odds)
        return found

    def _recall(self, key: Key) -> Odds | None:
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
            return self._known.get(key)

    def _remember(self, key: Key, odds: Odds) -> None:
        with self._lock:
            if key not in self._known:
                self._known[key] = odds
                self._num_known += len(odds)
            while self._num_known > MAX_KNOWN_TILES:
                self._num_known -= len(self._known.popitem(last=False)[1])

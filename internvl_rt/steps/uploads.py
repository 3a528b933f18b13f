"""Copies the tiles or visual tokens of pictures to the device while a step runs there."""

from weakref import WeakKeyDictionary

import numpy as np
import torch

from internvl_rt.inputs.image import OpenImage
from internvl_rt.inputs.picture import Picture
from internvl_rt.model.ops import Ops
from internvl_rt.model.shard import Arriving as LaterArriving
from internvl_rt.model.shard import Tower
from internvl_rt.steps.device_stream import Arriving, DeviceStream, host_memory, to_device

AnyArriving = Arriving | LaterArriving


class Uploads:
    """Decodes, cuts and copies each picture once, and keeps the result as long as the picture lives.

    Any thread may use it.
    """

    def __init__(self, ops: Ops, device: torch.device, tower: Tower | None = None) -> None:
        """tower: encodes pictures elsewhere, so that their visual tokens arrive and not their tiles."""
        self._ops, self._device, self._tower = ops, device, tower
        self._stream = DeviceStream(device)
        self._arriving: WeakKeyDictionary[Picture, AnyArriving] = WeakKeyDictionary()

    def load(self, picture: Picture) -> AnyArriving:
        """Returns a picture's tiles, or the visual tokens that it was given with.

        The first call for a picture does the work, in the calling thread; a tensor that is on a GPU already is read in
        the order of that thread's stream. Raises MediaError for a picture that turns out to be broken.
        """
        if (arriving := self._arriving.get(picture)) is None:
            arriving = self._arriving[picture] = self._load(picture)
        return arriving

    def _load(self, picture: Picture) -> AnyArriving:
        if self._tower is not None and picture.visual_XD is None:
            return self._tower.encode(_host_tiles(picture))
        if picture.image is not None:
            return self._cut(picture.image)
        given = picture.tiles if picture.visual_XD is None else picture.visual_XD
        assert given is not None, "a picture has an image, tiles or visual tokens"
        return self._send(given)

    def _cut(self, image: OpenImage) -> Arriving:
        """Cuts an image into tiles on the device; if that is the CPU, Pillow resizes them, to the same bits."""
        if not self._ops.resizes_on_device:
            return self._send(torch.from_numpy(image.tiles()))
        pixels = image.pixels()
        if isinstance(pixels, np.ndarray):  # torch warns of an array that must not be written into
            host = host_memory(pixels.shape, torch.uint8, self._device)
            host.numpy()[...] = pixels
            pixels = host
        given = Arriving.on_current_stream(pixels)
        with self._stream.use():
            pixels = to_device(given.get(), self._device)
            cut, size = image.layout, image.options.image_size
            tiles = self._ops.resize_tiles(pixels, cut.columns, cut.rows, size, cut.thumbnail)
            return Arriving.on_current_stream(tiles)

    def _send(self, tensor: torch.Tensor) -> Arriving:
        if tensor.device.type != "cpu":
            return Arriving.on_current_stream(tensor)
        with self._stream.use():
            return Arriving.on_current_stream(to_device(tensor, self._device))


def _host_tiles(picture: Picture) -> torch.Tensor:
    """Returns a picture's tiles in memory of the host."""
    if picture.image is not None:
        return torch.from_numpy(picture.image.tiles())
    assert picture.tiles is not None, "a picture has an image, tiles or visual tokens"
    return picture.tiles.cpu()

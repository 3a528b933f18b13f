"""Encodes pictures in the threads of their callers, between the steps of the loop."""

from collections.abc import Sequence as Items

from torch import Tensor

from internvl_rt.engine.failures import memory_faults
from internvl_rt.engine.loop import StepLoop
from internvl_rt.errors import MediaError
from internvl_rt.inputs.picture import Picture
from internvl_rt.inputs.proceed import Proceed
from internvl_rt.steps.uploads import AnyArriving, Uploads
from internvl_rt.steps.visual_cache import VisualCache

_POLL_S = 0.05


class PictureEncoder:
    """Decodes pictures and encodes them. Any thread may use it. A broken picture is the error of its own caller."""

    def __init__(self, loop: StepLoop, uploads: Uploads, visual_cache: VisualCache) -> None:
        self._loop, self._uploads, self._visual_cache = loop, uploads, visual_cache

    def upload(self, picture: Picture) -> AnyArriving:
        """Decodes a picture and begins to send its tiles to the device, or to who encodes them. Raises MediaError."""
        try:
            with memory_faults():
                return self._uploads.load(picture)
        except MediaError as error:
            error.media_id = picture.media_id
            raise

    def wait(self, arriving: Items[AnyArriving], proceed: Proceed) -> None:
        """Waits for visual tokens that other processes compute. Meanwhile it runs the steps of other requests."""
        for each in arriving:
            while not each.wait(0):
                if not self._loop.help():
                    each.wait(_POLL_S)
                proceed()

    def encode(self, picture: Picture, salt: str | None, proceed: Proceed) -> Tensor:
        """Returns what the vision tower gives for a picture, `rows_per_tile` rows [X, D] for each tile."""
        if not self._visual_cache.hold(picture, salt):
            self.wait([self.upload(picture)], proceed)  # decodes it before the loop of steps is locked
        return self._loop.encode(picture, salt)

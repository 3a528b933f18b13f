"""Decodes and uploads pictures in the threads of their callers, before the loop of steps needs them."""

from collections.abc import Sequence as Items

from torch import Tensor

from internvl_rt.engine.failures import memory_faults
from internvl_rt.engine.loop import StepLoop
from internvl_rt.errors import MediaError, NotFiniteError, not_finite
from internvl_rt.inputs.image import ImageSource
from internvl_rt.inputs.prepare import SALT, Prepared, Preparer
from internvl_rt.inputs.proceed import Proceed, go_on
from internvl_rt.steps.kv_cache import KVCache
from internvl_rt.steps.uploads import AnyArriving, Uploads
from internvl_rt.steps.visual_cache import VisualCache
from internvl_rt.values import read

_POLL_S = 0.05


class PictureLoader:
    """Knows which pictures need no decoding, because their visual tokens, or keys and values, are in a cache.

    Any thread may use it. A broken picture is the error of its own caller alone.
    """

    def __init__(
        self, loop: StepLoop, preparer: Preparer, cache: KVCache, visual_cache: VisualCache, uploads: Uploads
    ) -> None:
        self._loop, self._preparer = loop, preparer
        self._cache, self._visual_cache, self._uploads = cache, visual_cache, uploads

    def load(self, prepared: Prepared, proceed: Proceed = go_on) -> None:
        """Decodes and uploads the pictures of a prompt, once. Raises MediaError, StepError, or what `proceed` raises.

        Skips an image whose visual tokens are kept, which then stay as long as this picture, or whose keys and values
        are in the KV cache; if they leave it before the request runs, its step decodes the picture.
        """
        token_ids, pictures = prepared.prompt.token_ids, prepared.pictures
        num_cached = self._cache.match(token_ids, pictures, prepared.identity) if pictures else 0
        arriving = []
        for picture in pictures:
            proceed()
            is_cached = picture.span.start + picture.span.num_tokens <= num_cached
            if picture.image is None or not (self._visual_cache.hold(picture, prepared.salt) or is_cached):
                try:
                    with memory_faults():
                        arriving.append(self._uploads.load(picture))
                except MediaError as error:
                    error.media_id = picture.media_id
                    raise
        self._wait(arriving, proceed)

    def _wait(self, arriving: Items[AnyArriving], proceed: Proceed) -> None:
        """Waits for visual tokens that other processes compute. Meanwhile it runs the steps of other requests."""
        for each in arriving:
            while not each.wait(0):
                if not self._loop.help():
                    each.wait(_POLL_S)
                proceed()

    def encode(self, images: Items[ImageSource], cache_salt: str | None, proceed: Proceed = go_on) -> list[Tensor]:
        """Computes the visual tokens [X, D] of pictures. proceed: called before each is decoded; it may raise.

        Raises RequestError or MediaError.
        """
        self._loop.check()
        cache_salt = read("cache_salt", cache_salt, SALT)
        visual = []
        for picture in self._preparer.open_images(images):
            proceed()
            with memory_faults():
                arriving = self._uploads.load(picture)  # decodes it before the loop of steps is locked
            self._wait([arriving], proceed)
            # The caller may write into its visual tokens, which are also kept for pictures that come again.
            visual.append(self._loop.encode(picture, cache_salt).clone())
        for index, visual_XD in enumerate(visual):
            if not visual_XD.isfinite().all():
                what = not_finite(visual_XD.dtype, "check the checkpoint")
                raise NotFiniteError(f"picture {index}: its visual tokens are {what}")
        return visual

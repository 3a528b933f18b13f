"""Decodes and uploads pictures in the threads of their callers, before the loop of steps needs them."""

from collections.abc import Sequence as Items

from torch import Tensor

from internvl_rt.engine.encoding import PictureEncoder
from internvl_rt.engine.loop import StepLoop
from internvl_rt.errors import NotFiniteError, not_finite
from internvl_rt.inputs.image import ImageSource
from internvl_rt.inputs.prepare import SALT, Prepared, Preparer
from internvl_rt.inputs.proceed import Proceed, go_on
from internvl_rt.steps.kv_cache import KVCache
from internvl_rt.steps.visual_cache import VisualCache
from internvl_rt.values import read


class PictureLoader:
    """Knows which pictures need no decoding, because their visual tokens, or keys and values, are in a cache.

    Any thread may use it. A broken picture is the error of its own caller alone.
    """

    def __init__(
        self,
        loop: StepLoop,
        encoder: PictureEncoder,
        preparer: Preparer,
        cache: KVCache,
        visual_cache: VisualCache,
        tokens_per_tile: int,
    ) -> None:
        self._loop, self._encoder, self._preparer = loop, encoder, preparer
        self._cache, self._visual_cache, self._tokens_per_tile = cache, visual_cache, tokens_per_tile

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
            is_quick = picture.image is None and picture.compressed is None  # to load, and it was not encoded already
            if is_quick or not (self._visual_cache.hold(picture, prepared.salt) or is_cached):
                arriving.append(self._encoder.upload(picture))
        self._encoder.wait(arriving, proceed)

    def encode(self, images: Items[ImageSource], cache_salt: str | None, proceed: Proceed = go_on) -> list[Tensor]:
        """Computes the visual tokens [X, D] of pictures, with no tile compressed.

        proceed: called before each is decoded; it may raise. Raises RequestError or MediaError.
        """
        self._loop.check()
        cache_salt = read("cache_salt", cache_salt, SALT)
        visual = []
        for picture in self._preparer.open_images(images):
            proceed()
            rows_XD = self._encoder.encode(picture, cache_salt, proceed)
            kept = rows_XD.view(picture.num_tiles, -1, rows_XD.shape[1])[:, : self._tokens_per_tile]
            # The caller may write into its visual tokens, which are also kept for pictures that come again.
            visual.append(kept.flatten(0, 1).clone())
        for index, visual_XD in enumerate(visual):
            if not visual_XD.isfinite().all():
                what = not_finite(visual_XD.dtype, "check the checkpoint")
                raise NotFiniteError(f"picture {index}: its visual tokens are {what}")
        return visual

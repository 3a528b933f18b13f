"""Makes prompts of a given length from random ids: times depend on their lengths, not on their ids."""

import time

import numpy as np
import torch

from internvl_rt.engine.engine import Engine
from internvl_rt.inputs.picture import Picture
from internvl_rt.inputs.prepare import Prepared
from internvl_rt.inputs.prompt import Prompt, VisualSpan


class Prompter:
    """Draws prompts and pictures for an engine. None shares a prefix or visual tokens with another."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self._config, self._device, self._made_for = engine.config, engine.device, engine.preparer.made_for
        tokenizer = engine.tokenizer
        self._plain = np.array(sorted(tokenizer.token_bytes.keys() - tokenizer.special_ids))
        self._context_id = tokenizer.token_id("<IMG_CONTEXT>")
        self._rng = np.random.default_rng(seed)

    def picture(self, num_tiles: int) -> Picture:
        """Makes a picture after a prompt's first token: uint8 tiles [I, S, S, 3] of noise on the engine's device.

        The tiles are not zeros, since products of zeros run faster than others.
        """
        side = self._config.vision.image_size
        noise = self._rng.integers(0, 256, (num_tiles, side, side, 3), dtype=np.uint8)
        tiles = torch.from_numpy(noise).to(self._device)
        span = VisualSpan(1, num_tiles * self._config.tokens_per_tile)
        compressed = None if self._config.flash is None else (False,) * num_tiles  # so that a length is as asked for
        return Picture(self._rng.bytes(32), num_tiles, tiles=tiles, span=span, compressed=compressed)

    def prompt(self, num_tokens: int, picture: Picture | None = None) -> Prepared:
        """num_tokens: all tokens, those of the picture included."""
        ids = self._rng.choice(self._plain, num_tokens)
        pictures = () if picture is None else (picture,)
        for span in (each.span for each in pictures):
            ids[span.start : span.start + span.num_tokens] = self._context_id
        return Prepared(
            prompt=Prompt(tuple(ids.tolist()), tuple(each.span for each in pictures), ""),
            pictures=pictures,
            position_T=np.arange(num_tokens, dtype=np.float32),
            next_position=num_tokens,
            identity=None,
            salt=None,
            made_for=self._made_for,
            start_s=time.perf_counter(),
        )

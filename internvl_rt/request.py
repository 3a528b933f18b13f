"""Messages to a sequence that can run: media read and tiled, prompt rendered, positions laid out, limits checked."""

import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from internvl_rt.config import ModelConfig
from internvl_rt.errors import RequestError
from internvl_rt.image import ImageOptions, OpenImage, content_digest, open_image
from internvl_rt.kv_cache import build_identity
from internvl_rt.position import auto_stride, build_positions, parse_delta
from internvl_rt.prompt import Media, Prompt, Turn, build_prompt, parse_messages, turns_from_messages
from internvl_rt.sequence import Picture, SamplingParams, Sequence
from internvl_rt.tokenizer import Tokenizer
from internvl_rt.video import load_video

Delta = float | Literal["auto"]  # rotary positions per visual token


@dataclass(frozen=True, slots=True)
class Prepared:
    """A prompt ready to run, independent of how its answer will be drawn."""

    prompt: Prompt
    pictures: tuple[Picture, ...]
    position_T: np.ndarray  # float32, of the prompt
    next_position: int
    identity: bytes | None  # what its keys and values depend on besides; None: it shares no prefix
    start_s: float  # perf_counter when the call began
    media_s: float
    tile_s: float


class Preparer:
    """Holds what preparing a request needs to know of the model; keeps nothing of a request."""

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        max_model_len: int,
        *,
        max_tiles: int | None,
        v2pe_delta: Delta,
        cut: Callable[[OpenImage], Tensor],
        identity: dict[str, str | int] | None,
        num_cached: Callable[[Prepared], int],
    ) -> None:
        """cut: decodes a picture and cuts it into tiles. identity: the engine's share of what keys and values depend
        on; None: no prefix is shared. num_cached: how many leading tokens of a prompt the cache holds; pictures among
        them need not be decoded.
        """
        self._cut, self._identity, self._num_cached = cut, identity, num_cached
        self._config, self._tokenizer, self._max_model_len = config, tokenizer, max_model_len
        most = config.max_tiles if max_tiles is None else max_tiles
        self._options = ImageOptions(
            image_size=config.vision.image_size,
            min_tiles=min(config.min_tiles, most),
            max_tiles=most,
            thumbnail=config.thumbnail,
        )
        self._frame_options = replace(self._options, min_tiles=1, max_tiles=1)
        self._v2pe_delta = v2pe_delta
        self._stop_id = tokenizer.token_id("<|im_end|>")
        if v2pe_delta != "auto":
            parse_delta(v2pe_delta)

    def prepare(
        self, messages: Items[dict[str, Any]], v2pe_delta: Delta | None = None, cache_salt: str | None = None
    ) -> Prepared:
        """Reads, tiles and renders a conversation. Raises RequestError or MediaError."""
        if not isinstance(cache_salt, str | None):
            raise RequestError(f"cache_salt must be a string or None, got {cache_salt!r}")
        start_s = time.perf_counter()
        parsed = parse_messages(messages)
        images: list[OpenImage] = []
        frames_per_video: list[int] = []
        for media in (part for message in parsed for part in message.parts if isinstance(part, Media)):
            if media.kind == "image":
                images.append(open_image(media.source, self._options))
            else:
                frames = load_video(media.source)
                frames_per_video.append(len(frames))
                images += [open_image(frame, self._frame_options) for frame in frames]
        media_s = time.perf_counter() - start_s
        turns = turns_from_messages(
            parsed,
            frames_per_video,
            system=self._config.system_message,
            number_images=self._config.format == "original",
        )
        prepared = self._prepare(turns, [self._tiles_of(image) for image in images], v2pe_delta, cache_salt)
        tile_start_s = time.perf_counter()
        num_cached = self._num_cached(prepared)
        for picture in prepared.pictures:
            if picture.span.start + picture.span.num_tokens > num_cached:
                picture.tiles()  # now, in the caller's thread, where a broken picture is this caller's error alone
        tile_s = time.perf_counter() - tile_start_s
        return replace(prepared, start_s=start_s, media_s=media_s, tile_s=tile_s)

    def prepare_turns(self, turns: Items[Turn], tiles: Items[Tensor], *, v2pe_delta: Delta | None = None) -> Prepared:
        """The same from rendered turns and one tensor of tiles (as `patch_embed` takes them) for each picture."""
        return self._prepare(turns, [_given_tiles(picture) for picture in tiles], v2pe_delta)

    def _tiles_of(self, image: OpenImage) -> "_Tiles":
        return _Tiles(image.digest, image.num_tiles, cache(lambda: self._cut(image)))

    def _prepare(
        self,
        turns: Items[Turn],
        pictures: Items["_Tiles"],
        v2pe_delta: Delta | None,
        cache_salt: str | None = None,
    ) -> Prepared:
        start_s = time.perf_counter()
        counts = [picture.num_tiles * self._config.tokens_per_tile for picture in pictures]
        prompt = build_prompt(turns, self._tokenizer, counts)
        num_tokens = len(prompt.token_ids)
        if num_tokens >= self._max_model_len:
            raise RequestError(
                f"the prompt has {num_tokens:,} tokens ({sum(counts):,} of pictures), but prompt and answer together "
                f"may have {self._max_model_len:,}; shorten it, lower max_tiles, or raise max_model_len"
            )
        delta = self._v2pe_delta if v2pe_delta is None else v2pe_delta
        window = self._config.decoder.max_position
        stride = auto_stride(num_tokens, prompt.spans, window - 1) if delta == "auto" else parse_delta(delta)
        position_T, next_position = build_positions(num_tokens, prompt.spans, [stride] * len(prompt.spans))
        if next_position >= window:
            raise RequestError(
                f"the prompt reaches position {next_position:,}, beyond the trained window of {window:,}; shorten it, "
                "lower max_tiles, or choose a smaller v2pe_delta (or 'auto')"
            )
        return Prepared(
            prompt=prompt,
            pictures=tuple(
                Picture(span, picture.digest, picture.load)
                for span, picture in zip(prompt.spans, pictures, strict=True)
            ),
            position_T=position_T,
            next_position=next_position,
            identity=None
            if self._identity is None
            else build_identity(**self._identity, v2pe_stride=stride, cache_salt=cache_salt),
            start_s=start_s,
            media_s=0.0,
            tile_s=0.0,
        )

    def sequence(self, seq_id: int, prepared: Prepared, params: SamplingParams, seed: int) -> Sequence:
        """A fresh sequence; `max_tokens` is cut to the room left in the context window."""
        room = min(
            self._max_model_len - len(prepared.prompt.token_ids),
            self._config.decoder.max_position - prepared.next_position,
        )
        for token_id in params.stop_token_ids:
            if not 0 <= token_id < self._config.decoder.vocab_size:
                raise RequestError(f"stop_token_ids: {token_id} is not in the vocabulary")
        eos = () if params.ignore_eos else (self._stop_id,)
        return Sequence(
            seq_id=seq_id,
            token_ids=list(prepared.prompt.token_ids),
            position_T=prepared.position_T,
            next_position=prepared.next_position,
            pictures=prepared.pictures,
            params=params,
            max_tokens=min(params.max_tokens, room),
            stop_ids=frozenset((*eos, *params.stop_token_ids)),
            seed=seed,
            identity=prepared.identity,
        )


class _Tiles(NamedTuple):
    digest: bytes
    num_tiles: int
    load: Callable[[], Tensor]


def _given_tiles(tiles: Tensor) -> _Tiles:
    content = tiles.detach().cpu().contiguous().view(torch.uint8).numpy().data
    digest = content_digest("tiles", f"{tiles.dtype} {tuple(tiles.shape)}", content)
    return _Tiles(digest, len(tiles), lambda: tiles)

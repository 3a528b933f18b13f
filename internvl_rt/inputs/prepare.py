"""Messages to sequences that can run: media read and tiled, prompt rendered, positions laid out, limits checked."""

import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from internvl_rt.checkpoint.config import ModelConfig
from internvl_rt.errors import RequestError
from internvl_rt.inputs.grammar import GrammarCompiler, Matcher
from internvl_rt.inputs.image import ImageOptions, ImageSource, OpenImage, content_digest, open_image
from internvl_rt.inputs.position import auto_stride, build_positions, parse_delta
from internvl_rt.inputs.prompt import (
    Media,
    Message,
    Prompt,
    Turn,
    VisualSpan,
    build_prompt,
    parse_messages,
    turns_from_messages,
)
from internvl_rt.inputs.sampling_params import SamplingParams
from internvl_rt.inputs.tokenizer import Tokenizer
from internvl_rt.inputs.video import load_video
from internvl_rt.steps.device_stream import Arriving
from internvl_rt.steps.kv_cache import build_identity
from internvl_rt.steps.sampler import derive_seed
from internvl_rt.steps.sequence import Picture, Sequence
from internvl_rt.steps.speculation import PromptLookup

Delta = float | Literal["auto"]  # rotary positions per visual token

MAX_CHARACTERS_PER_TOKEN = 128  # the longest tokens are runs of so many spaces: longer texts cannot fit


@dataclass(frozen=True, slots=True)
class Prepared:
    """A prompt ready to run, independent of how its answer will be drawn."""

    prompt: Prompt
    pictures: tuple[Picture, ...]
    position_T: np.ndarray  # float32, of the prompt
    next_position: int
    identity: bytes | None  # what its keys and values depend on besides; None: it shares no prefix
    salt: str | None
    start_s: float  # perf_counter when the call began
    media_s: float = 0.0
    tile_s: float = 0.0
    score_from: int | None = None  # nothing is drawn: the log-probabilities of its tokens from this one on are wanted


class Preparer:
    """Holds what preparing a request needs to know of the model; keeps nothing of a request. Any thread may use it."""

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        max_model_len: int,
        *,
        max_tiles: int | None,
        v2pe_delta: Delta,
        num_draft_tokens: int,
        cut: Callable[[OpenImage], Arriving],
        send: Callable[[Tensor], Arriving],
        identity: dict[str, str | int] | None,
        num_cached: Callable[[Prepared], int],
        is_encoded: Callable[[bytes, str | None], bool],
    ) -> None:
        """cut: decodes a picture and cuts it into tiles. send: brings a tensor to the model's device.

        identity: the engine's share of what keys and values depend on; None: no prefix is shared. Pictures among the
        leading tokens of a prompt that the cache holds (num_cached) need not be decoded, nor those whose visual tokens
        are kept under their digest and salt (is_encoded).
        """
        self._cut, self._send, self._identity = cut, send, identity
        self._num_cached, self._is_encoded = num_cached, is_encoded
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
        self._num_draft_tokens = num_draft_tokens
        self._stop_id = tokenizer.token_id("<|im_end|>")
        self._grammars = GrammarCompiler(tokenizer, config.decoder.vocab_size)
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
        self._check_size(parsed)
        sources: list[_Source] = []
        frames_per_video: list[int] = []
        for media in (part for message in parsed for part in message.parts if isinstance(part, Media)):
            if media.kind == "image":
                sources.append(self._source(open_image(media.source, self._options)))
            elif media.kind == "image_embeds":
                sources.append(self._given_visual(media.source))
            else:
                frames = load_video(media.source)
                frames_per_video.append(len(frames))
                sources += [self._source(open_image(frame, self._frame_options)) for frame in frames]
        media_s = time.perf_counter() - start_s
        turns = turns_from_messages(
            parsed,
            frames_per_video,
            system=self._config.system_message,
            number_images=self._config.format == "original",
        )
        prepared = self._prepare(turns, sources, v2pe_delta, cache_salt)
        tile_start_s = time.perf_counter()
        num_cached = self._num_cached(prepared)
        for picture in prepared.pictures:
            is_cached = picture.span.start + picture.span.num_tokens <= num_cached
            if not is_cached and picture.visual_XD is None and not self._is_encoded(picture.digest, cache_salt):
                picture.tiles()  # now, in the caller's thread, where a broken picture is this caller's error alone
        tile_s = time.perf_counter() - tile_start_s
        return replace(prepared, start_s=start_s, media_s=media_s, tile_s=tile_s)

    def prepare_turns(self, turns: Items[Turn], tiles: Items[Tensor], *, v2pe_delta: Delta | None = None) -> Prepared:
        """The same from rendered turns and one tensor of tiles (as `patch_embed` takes them) for each picture."""
        return self._prepare(turns, [self._given_tiles(picture) for picture in tiles], v2pe_delta)

    def prepare_score(self, prepared: Prepared, response: str, *, include_end: bool) -> Prepared:
        """The prompt with an answer behind it, whose tokens' log-probabilities are wanted."""
        if not isinstance(response, str) or not response:
            raise RequestError(f"responses: expected texts that are not empty, got {response!r}")
        added = [*self._tokenizer.encode(response), *([self._stop_id] if include_end else [])]
        prompt, num_prompt = prepared.prompt, len(prepared.prompt.token_ids)
        next_position = prepared.next_position + len(added)
        if num_prompt + len(added) > self._max_model_len or next_position > self._config.decoder.max_position:
            raise RequestError(
                f"prompt and response have {num_prompt + len(added):,} tokens together, but may have "
                f"{min(self._max_model_len, self._config.decoder.max_position):,}; shorten them"
            )
        added_position_T = np.arange(prepared.next_position, next_position, dtype=np.float32)
        return replace(
            prepared,
            prompt=Prompt((*prompt.token_ids, *added), prompt.spans, prompt.text + response),
            position_T=np.concatenate((prepared.position_T, added_position_T)),
            next_position=next_position,
            score_from=num_prompt,
        )

    def tiles_of(self, images: Items[ImageSource]) -> list[Picture]:
        """Pictures without a prompt, decoded."""
        sources = [self._source(open_image(image, self._options)) for image in images]
        pictures = _place(sources, [VisualSpan(0, self._num_visual(source)) for source in sources])
        for picture in pictures:
            picture.tiles()
        return pictures

    def sequences(self, prepared: Prepared, params: SamplingParams, seed: int, ids: Iterator[int]) -> list[Sequence]:
        """A fresh sequence for each answer: the first computes the prompt, the others wait for it as its siblings.

        `max_tokens` is cut to the room left in the context window. Raises RequestError.
        """
        room = min(
            self._max_model_len - len(prepared.prompt.token_ids),
            self._config.decoder.max_position - prepared.next_position,
        )
        vocab_size = self._config.decoder.vocab_size
        for token_id in params.stop_token_ids:
            if token_id >= vocab_size:
                raise RequestError(f"stop_token_ids: {token_id} is not in the vocabulary of {vocab_size:,} tokens")
        grammar = self._grammars.compile(*params.grammar) if params.grammar else None
        speculates = self._num_draft_tokens > 0 and grammar is None and not params.has_penalties
        score_from = prepared.score_from
        if score_from is None and params.prompt_logprobs is not None:
            score_from = 1
        eos = () if params.ignore_eos and grammar is None else (self._stop_id,)
        made = [
            Sequence(
                seq_id=next(ids),
                token_ids=list(prepared.prompt.token_ids),
                position_T=prepared.position_T,
                next_position=prepared.next_position,
                pictures=prepared.pictures,
                params=params,
                max_tokens=min(params.max_tokens, room) if prepared.score_from is None else 0,
                stop_ids=frozenset((*eos, *params.stop_token_ids)),
                seed=derive_seed(seed, index) if index else seed,
                identity=prepared.identity,
                salt=prepared.salt,
                matcher=(matcher := grammar.start()) if grammar else None,
                mask_W=self._first_mask(matcher) if grammar else None,
                score_from=score_from if index == 0 else None,
                drafter=PromptLookup(self._num_draft_tokens) if speculates else None,
            )
            for index in range(params.n)
        ]
        made[0].siblings = made[1:]
        return made

    def _prepare(
        self, turns: Items[Turn], sources: Items["_Source"], v2pe_delta: Delta | None, cache_salt: str | None = None
    ) -> Prepared:
        start_s = time.perf_counter()
        counts = [self._num_visual(source) for source in sources]
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
        identity = None
        if self._identity is not None:
            identity = build_identity(**self._identity, v2pe_stride=stride, cache_salt=cache_salt)
        return Prepared(
            prompt=prompt,
            pictures=tuple(_place(sources, prompt.spans)),
            position_T=position_T,
            next_position=next_position,
            identity=identity,
            salt=cache_salt,
            start_s=start_s,
        )

    def _check_size(self, messages: Items[Message]) -> None:
        """What cannot fit is refused before anything is read."""
        parts = [part for message in messages for part in message.parts]
        num_media = sum(isinstance(part, Media) for part in parts)
        most = self._max_model_len // self._config.tokens_per_tile
        if num_media > most:
            raise RequestError(
                f"the conversation has {num_media} pictures and videos, but only {most} tiles of "
                f"{self._config.tokens_per_tile} tokens fit; send fewer, or raise max_model_len"
            )
        num_characters = sum(len(part) for part in parts if isinstance(part, str))
        if num_characters > self._max_model_len * MAX_CHARACTERS_PER_TOKEN:
            raise RequestError(
                f"the conversation has {num_characters:,} characters, which cannot fit {self._max_model_len:,} tokens; "
                "shorten it, or raise max_model_len"
            )

    def _first_mask(self, matcher: Matcher) -> NDArray[np.int32]:
        mask_W = np.empty(-(-self._config.decoder.vocab_size // 32), np.int32)
        matcher.fill_mask(mask_W)
        return mask_W

    def _num_visual(self, source: "_Source") -> int:
        return source.num_tiles * self._config.tokens_per_tile

    def _source(self, image: OpenImage) -> "_Source":
        return _Source(image.digest, image.num_tiles, cache(lambda: self._cut(image)))

    def _given_visual(self, visual_XD: object) -> "_Source":
        """Visual tokens that were computed elsewhere, `Engine.encode_images` for one."""
        width, per_tile = self._config.decoder.hidden_size, self._config.tokens_per_tile
        if isinstance(visual_XD, np.ndarray):
            visual_XD = torch.from_numpy(visual_XD)
        if not isinstance(visual_XD, Tensor):
            raise RequestError(f"image_embeds: expected a tensor [tokens, {width}], got {type(visual_XD).__name__}")
        shape = tuple(visual_XD.shape)
        if len(shape) != 2 or shape[1] != width or shape[0] == 0 or shape[0] % per_tile:
            raise RequestError(
                f"image_embeds: expected shape [tokens, {width}] with a multiple of {per_tile} tokens, "
                f"got {list(shape)}"
            )
        if shape[0] > self._max_model_len:
            raise RequestError(f"image_embeds: expected at most {self._max_model_len:,} tokens, got {shape[0]:,}")
        if not visual_XD.is_floating_point():
            raise RequestError(f"image_embeds: expected floating-point numbers, got {visual_XD.dtype}")
        visual_XD = visual_XD.detach()
        if not visual_XD.isfinite().all():
            raise RequestError("image_embeds: expected finite numbers, got NaN or infinity")
        return _Source(_digest("visual", visual_XD), shape[0] // per_tile, _no_tiles, self._send(visual_XD))

    def _given_tiles(self, tiles: Tensor) -> "_Source":
        digest, sent = _digest("tiles", tiles), self._send(tiles)
        return _Source(digest, len(tiles), lambda: sent)


class _Source(NamedTuple):
    """What stands in a picture's place, before the place is known."""

    digest: bytes
    num_tiles: int
    tiles: Callable[[], Arriving]
    visual_XD: Arriving | None = None


def _place(sources: Items[_Source], spans: Items[VisualSpan]) -> list[Picture]:
    return [Picture(span, *source) for span, source in zip(spans, sources, strict=True)]


def _no_tiles() -> Arriving:
    raise AssertionError("a picture with visual tokens of its own is not encoded")


def _digest(kind: str, tensor: Tensor) -> bytes:
    content = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data
    return content_digest(kind, f"{tensor.dtype} {tuple(tensor.shape)}", content)

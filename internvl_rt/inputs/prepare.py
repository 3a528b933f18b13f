"""Makes messages a prompt that can run: reads media, renders the template, computes positions, checks limits.

It knows no engine, and the result is plain data.
"""

import time
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from internvl_rt.checkpoint.config import ModelConfig
from internvl_rt.errors import RequestError
from internvl_rt.inputs.identity import build_identity, content_digest
from internvl_rt.inputs.image import ImageSource, open_image
from internvl_rt.inputs.picture import Picture
from internvl_rt.inputs.position import Delta, auto_stride, build_positions, parse_delta
from internvl_rt.inputs.prompt import Media, Message, Prompt, Turn, build_prompt, parse_messages, turns_from_messages
from internvl_rt.inputs.tiles import ImageOptions
from internvl_rt.inputs.tokenizer import Tokenizer
from internvl_rt.inputs.video import VideoLimits, load_video

MAX_CHARACTERS_PER_TOKEN = 128  # the longest tokens are 128 spaces: a text of more characters per token cannot fit


@dataclass(frozen=True, slots=True)
class Prepared:
    """A prompt that can run, without sampling parameters."""

    prompt: Prompt
    pictures: tuple[Picture, ...]
    position_T: np.ndarray  # float32 rotary positions of the prompt
    next_position: int  # position of the first token after the prompt
    identity: bytes | None  # what keys and values depend on besides tokens and pictures; None: no prefix is shared
    salt: str | None  # only prompts of equal salt share visual tokens
    start_s: float  # by perf_counter, when the call began
    media_s: float = 0.0
    tile_s: float = 0.0
    score_from: int | None = None  # not None: draw no token, return log-probabilities from this token on


class Preparer:
    """Prepares prompts for one model, and keeps nothing of any prompt. Any thread may use it."""

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        max_model_len: int,
        *,
        images: ImageOptions,
        videos: VideoLimits,
        v2pe_delta: Delta,
        identity: Mapping[str, str | int] | None,
    ) -> None:
        """images: how pictures are read and cut; frames of videos become one tile each.

        identity: what keys and values depend on in the engine; None: no prefix is shared.
        """
        self._config, self._tokenizer, self._max_model_len = config, tokenizer, max_model_len
        self._images, self._frames, self._videos = images, replace(images, min_tiles=1, max_tiles=1), videos
        self._v2pe_delta, self._identity = v2pe_delta, identity
        self._stop_id = tokenizer.token_id("<|im_end|>")
        if v2pe_delta != "auto":
            parse_delta(v2pe_delta)

    def prepare(
        self, messages: Items[dict[str, Any]], v2pe_delta: Delta | None = None, cache_salt: str | None = None
    ) -> Prepared:
        """Reads the media of a conversation and renders it; pictures are hashed, but not decoded.

        Raises RequestError or MediaError.
        """
        if not isinstance(cache_salt, str | None):
            raise RequestError(f"cache_salt must be a string or None, got {cache_salt!r}")
        start_s = time.perf_counter()
        parsed = parse_messages(messages)
        self._check_size(parsed)
        pictures: list[Picture] = []
        frames_per_video: list[int] = []
        for media in (part for message in parsed for part in message.parts if isinstance(part, Media)):
            if media.kind == "image":
                pictures.append(_open(media.source, self._images))
            elif media.kind == "image_embeds":
                pictures.append(self._given_visual(media.source))
            else:
                frames = [*load_video(media.source, limits=self._videos)][::-1]
                frames_per_video.append(len(frames))
                if sum(frames_per_video) > (most := self._max_model_len // self._config.tokens_per_tile):
                    raise RequestError(
                        f"the videos have {sum(frames_per_video)} frames, but only {most} tiles of "
                        f"{self._config.tokens_per_tile} tokens fit; give fewer frames, or raise max_model_len"
                    )
                while frames:  # each frame is freed as soon as its pixels are copied
                    pictures.append(_open(frames.pop(), self._frames))
        media_s = time.perf_counter() - start_s
        turns = turns_from_messages(
            parsed,
            frames_per_video,
            system=self._config.system_message,
            number_images=self._config.format == "original",
        )
        return replace(self._prepare(turns, pictures, v2pe_delta, cache_salt), start_s=start_s, media_s=media_s)

    def prepare_turns(self, turns: Items[Turn], tiles: Items[Tensor]) -> Prepared:
        """Prepares rendered turns and one tensor of tiles (as `patch_embed` takes them) for each picture."""
        own = [each.detach().clone() for each in tiles]  # the caller may change its own
        pictures = [Picture(_tensor_digest("tiles", each), len(each), tiles=each) for each in own]
        return self._prepare(turns, pictures, v2pe_delta=None)

    def prepare_score(self, prepared: Prepared, response: str, *, include_end: bool) -> Prepared:
        """Appends a response to a prompt; the log-probabilities of its tokens will be returned."""
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

    def open_images(self, images: Iterable[ImageSource]) -> list[Picture]:
        """Opens pictures without a prompt. Raises MediaError."""
        return [_open(image, self._images) for image in images]

    def _prepare(
        self, turns: Items[Turn], pictures: Items[Picture], v2pe_delta: Delta | None, cache_salt: str | None = None
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
        identity = None
        if self._identity is not None:
            identity = build_identity(**self._identity, v2pe_stride=stride, cache_salt=cache_salt)
        return Prepared(
            prompt=prompt,
            pictures=tuple(replace(picture, span=span) for picture, span in zip(pictures, prompt.spans, strict=True)),
            position_T=position_T,
            next_position=next_position,
            identity=identity,
            salt=cache_salt,
            start_s=start_s,
        )

    def _check_size(self, messages: Items[Message]) -> None:
        """Refuses what cannot fit before any media are read."""
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

    def _given_visual(self, visual_XD: object) -> Picture:
        """Checks visual tokens that were computed elsewhere, for example by `Engine.encode_images`."""
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
        visual_XD = visual_XD.detach().clone()  # the caller may change its own
        if not visual_XD.isfinite().all():
            raise RequestError("image_embeds: expected finite numbers, got NaN or infinity")
        return Picture(_tensor_digest("visual", visual_XD), shape[0] // per_tile, visual_XD=visual_XD)


def _open(source: ImageSource, options: ImageOptions) -> Picture:
    image = open_image(source, options)
    return Picture(image.digest, image.num_tiles, image=image)


def _tensor_digest(kind: str, tensor: Tensor) -> bytes:
    content = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data
    return content_digest(kind, f"{tensor.dtype} {tuple(tensor.shape)}", content)

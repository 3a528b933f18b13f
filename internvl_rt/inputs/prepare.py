"""Makes messages a prompt that can run: reads media, renders the template, computes positions, checks limits.

It knows no engine, and the result is plain data.
"""

import time
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Items
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from internvl_rt.checkpoint.config import ModelConfig
from internvl_rt.checkpoint.template import TEMPLATES
from internvl_rt.errors import ContextLengthError, MediaError, RequestError, check_list, quoted
from internvl_rt.inputs.channels import find_channels
from internvl_rt.inputs.flash import Decide, cannot_decide, check_least
from internvl_rt.inputs.identity import build_identity
from internvl_rt.inputs.image import ImageSource, check_image_source, open_image
from internvl_rt.inputs.messages import Media, Message, parse_messages
from internvl_rt.inputs.picture import Picture, open_picture, picture_of_tiles, picture_of_visual_tokens
from internvl_rt.inputs.places import places_of_tokens
from internvl_rt.inputs.position import DELTA, STRIDES, Delta, auto_stride, build_positions, parse_delta
from internvl_rt.inputs.prepared import Conversation as Conversation
from internvl_rt.inputs.prepared import Prepared as Prepared
from internvl_rt.inputs.prepared import PromptDescription as PromptDescription
from internvl_rt.inputs.proceed import Proceed, go_on
from internvl_rt.inputs.prompt import Prompt, Turn, build_prompt, check_turns, turns_from_messages
from internvl_rt.inputs.raw_prompt import RawPrompt, build_raw_prompt, raw_pictures, shorten
from internvl_rt.inputs.thinking import is_begun, shall_think, with_thinking, without_thinking
from internvl_rt.inputs.tiles import ImageOptions
from internvl_rt.inputs.tokenizer import Tokenizer
from internvl_rt.inputs.video import VideoLimits, count_frames, load_video
from internvl_rt.values import Flag, OrNone, Text, read

Messages = Items[dict[str, Any]]
PromptSource = Messages | RawPrompt

SALT = OrNone(Text(0, 4096))
NORMALISED_BYTES = 3  # the most bytes of a text, such as those of U+212A, that normalisation makes one byte


def check_sharing(v2pe_delta: Delta | None, cache_salt: str | None) -> tuple[Delta | None, str | None]:
    """Checks what a call says of its positions, and of whom it shares cached tokens with. Raises RequestError."""
    return read("v2pe_delta", v2pe_delta, OrNone(DELTA)), read("cache_salt", cache_salt, SALT)


class Preparer:
    """Prepares prompts for one model, and keeps nothing of any prompt. Any thread may use it."""

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        max_model_len: int,
        *,
        dtype: torch.dtype,
        images: ImageOptions,
        number_images: bool,
        videos: VideoLimits,
        v2pe_delta: Delta,
        identity: Mapping[str, str | int] | None,
        decide: Decide = cannot_decide,
    ) -> None:
        """dtype: the model's; numbers that a caller gives are cast to it.
        images: how pictures are read and cut; frames of videos become one tile each.
        number_images: whether several pictures in one message are called "Image-1: " and so on.
        identity: what keys and values depend on in the engine; None: no prefix is shared.
        decide: decides which tiles of a prompt's pictures are compressed, for a model that compresses any.
        """
        self._config, self._tokenizer, self._max_model_len = config, tokenizer, max_model_len
        self._window = config.decoder.max_position
        self._dtype, self.made_for = dtype, f"{config!r} {dtype} {identity}"
        self._images, self._frames, self._videos = images, replace(images, min_tiles=1, max_tiles=1), videos
        self._number_images, self._ends_empty = number_images, config.format == "hf"
        self._v2pe_delta, self.identity, self._decide = v2pe_delta, identity, decide
        self._template, self.channels = TEMPLATES[config.template], find_channels(config, tokenizer)
        self._stop_id = tokenizer.token_id(self._template.stop.token)
        self._bytes_per_token = NORMALISED_BYTES * max(map(len, tokenizer.token_bytes.values()))

    def prepare(
        self,
        messages: PromptSource,
        v2pe_delta: Delta | None = None,
        cache_salt: str | None = None,
        proceed: Proceed = go_on,
        *,
        think: bool | None = False,
    ) -> Prepared:
        """Reads the media of a conversation and renders it, or encodes a `RawPrompt`.

        Pictures are hashed, and encoded ones are not decoded; frames of videos are decoded and cut to their tiles.
        proceed: called before each picture is opened, and before each frame of a video is decoded; it may raise.
        think: whether the answer reasons first. None: as the model does by default.
        Raises RequestError or MediaError.
        """
        v2pe_delta, cache_salt = check_sharing(v2pe_delta, cache_salt)
        think = read("think", think, OrNone(Flag()))
        if not isinstance(messages, RawPrompt):
            return self.render(self.read(messages, proceed, think=think), v2pe_delta, cache_salt, proceed)
        if think:
            raise RequestError("think: a RawPrompt has no system message to ask for it; send messages, or leave it out")
        start_s = time.perf_counter()
        prompt = self._build_raw(messages)
        given = raw_pictures(messages, prompt, self._config, self._dtype, self._max_model_len)
        pictures, tile_s = self._decided(given, cache_salt, proceed)
        if any(picture.num_saved for picture in pictures):
            prompt = shorten(prompt, [picture.num_saved for picture in pictures])
        placed = self._place(prompt, pictures, v2pe_delta, cache_salt)
        return replace(placed, start_s=start_s, tile_s=tile_s, begun=True, raw=True)

    def read(self, messages: Messages, proceed: Proceed = go_on, *, think: bool | None = False) -> Conversation:
        """Reads the media of a conversation, and leaves it to be rendered, perhaps changed. Raises as `prepare`."""
        start_s = time.perf_counter()
        parsed = parse_messages(messages, self._max_model_len)
        thinks = shall_think(think, self._config) and not (think is None and is_begun(parsed))
        parsed = (with_thinking if thinks else without_thinking)(parsed, self._config)
        self._check_size(parsed)
        pictures: list[Picture] = []
        frames_per_video: list[int] = []
        media = [part for message in parsed for part in message.parts if isinstance(part, Media)]
        for media_id, each in enumerate(media):
            proceed()
            try:
                found = self._read(each, proceed)
            except (MediaError, RequestError) as error:
                error.media_id = media_id
                raise
            if each.kind == "video":
                frames_per_video.append(len(found))
            pictures += [replace(picture, media_id=media_id) for picture in found]
        media_s = time.perf_counter() - start_s
        turns = turns_from_messages(
            parsed,
            frames_per_video,
            system=self._config.system_message,
            number_images=self._number_images,
            template=self._template,
        )
        return Conversation(turns, tuple(pictures), start_s, media_s, thinks)

    def render(
        self,
        conversation: Conversation,
        v2pe_delta: Delta | None = None,
        cache_salt: str | None = None,
        proceed: Proceed = go_on,
    ) -> Prepared:
        """Renders a conversation that `read` or `read_turns` has returned, its turns changed perhaps.

        v2pe_delta and cache_salt: as `check_sharing` returns them. Raises RequestError, or of a Flash model MediaError.
        """
        turns = conversation.turns
        pictures, tile_s = self._decided(conversation.pictures, cache_salt, proceed)
        counts = [picture.count_tokens(self._config) for picture in pictures]
        prompt = build_prompt(
            turns,
            self._tokenizer,
            counts,
            template=self._template,
            ends_empty=self._ends_empty,
            limit=self._max_model_len,
            remedy=self._remedy(pictures),
        )
        placed = self._place(prompt, pictures, v2pe_delta, cache_salt)
        begun = turns[-1].open and any(turns[-1].parts)
        start_s, media_s = conversation.start_s, conversation.media_s
        thinks = conversation.thinks
        return replace(placed, begun=begun, thinks=thinks, start_s=start_s, media_s=media_s, tile_s=tile_s)

    def fixed(self, raw: RawPrompt) -> RawPrompt:
        """Returns a prompt that its caller cannot change. Raises RequestError for one that cannot fit."""
        return raw.fixed(self._config, self._dtype, self._max_model_len, self._remedy())

    def describe(
        self,
        messages: PromptSource,
        proceed: Proceed = go_on,
        *,
        think: bool | None = False,
        cache_salt: str | None = None,
    ) -> PromptDescription:
        """Renders a conversation as `prepare` does, and keeps nothing of its pictures. Raises what `prepare` raises."""
        prepared = self.prepare(messages, None, cache_salt, proceed, think=think)
        return PromptDescription(prepared.prompt, tuple(picture.layout for picture in prepared.pictures))

    def read_turns(self, turns: Items[Turn], tiles: Items[Tensor]) -> Conversation:
        """Takes rendered turns and one tensor or array of tiles for each picture. Raises RequestError.

        tiles: uint8 [I, S, S, 3], or normalised floating point [I, 3, S, S]
        """
        start_s = time.perf_counter()
        check_turns(turns)
        check_list("tiles", tiles, "tensors or arrays of tiles, one for each picture")
        self.check_texts("the conversation", [part for turn in turns for part in turn.parts if isinstance(part, str)])
        pictures: list[Picture] = []
        left = self._max_model_len
        for each in tiles:
            pictures.append(picture_of_tiles(each, self._config, self._dtype, left))
            left -= pictures[-1].num_tiles * self._config.least_tokens_per_tile
        return Conversation(tuple(turns), tuple(pictures), start_s)

    def prepare_score(self, prepared: Prepared, response: str, *, include_end: bool, num_top: int = 0) -> Prepared:
        """Appends a response, which is not empty, to a prompt; its tokens' log-probabilities will be returned.

        num_top: of how many of the likeliest tokens besides, in the place of each.
        """
        self.check_texts("a response", [response])
        prepared = self.begin_answer(prepared)
        num_prompt = len(prepared.prompt.token_ids)
        ids = self._tokenizer.encode(response, limit=self._max_model_len - num_prompt)
        added = [*ids, *([self._stop_id] if include_end else [])]
        extended = prepared.followed_by(added, response, most=self._max_model_len, window=self._window)
        return replace(extended, places=places_of_tokens(num_prompt - 1, added, num_top))

    def begin_answer(self, prepared: Prepared) -> Prepared:
        """Appends the header that the model itself would write before a text, if it writes any and none is there.

        That is for an answer of which the text is given: one that is scored, or keeps to a grammar.
        """
        if self.channels is None or prepared.begun or prepared.raw:
            return prepared
        begun = replace(prepared, begun=True)
        header_ids, header = self.channels.header_ids, self.channels.header
        return begun.followed_by(header_ids, header, most=self._max_model_len, window=self._window)

    def open_images(self, images: Items[ImageSource]) -> Iterator[Picture]:
        """Opens pictures without a prompt, each when it is asked for; what is no picture is refused before the first.

        Raises RequestError or MediaError.
        """
        check_list("images", images, "pictures")
        for image in images:
            check_image_source(image, self._images)
        return (open_picture(image, self._images) for image in images)

    def _build_raw(self, raw: RawPrompt) -> Prompt:
        if isinstance(raw.content, str):
            self.check_texts("the prompt", [raw.content])
        return build_raw_prompt(
            raw,
            self._tokenizer,
            vocab_size=self._config.decoder.vocab_size,
            limit=raw.most_ids(self._config, self._max_model_len),
            remedy=self._remedy(),
        )

    def _decided(
        self, pictures: Items[Picture], cache_salt: str | None, proceed: Proceed
    ) -> tuple[Items[Picture], float]:
        """Decides which tiles of a request are compressed, if the model compresses any; returns the seconds too."""
        if self._config.flash is None or not pictures:
            return pictures, 0.0
        start_s = time.perf_counter()
        check_least(pictures, self._config, self._max_model_len, self._remedy(pictures))
        return self._decide(pictures, cache_salt, proceed), time.perf_counter() - start_s

    def _place(
        self, prompt: Prompt, pictures: Items[Picture], v2pe_delta: Delta | None, cache_salt: str | None
    ) -> Prepared:
        """Gives a prompt its positions, and its pictures their places. Raises RequestError if it does not fit."""
        start_s = time.perf_counter()
        num_tokens, num_visual = len(prompt.token_ids), sum(span.num_tokens for span in prompt.spans)
        if num_tokens >= self._max_model_len:
            raise ContextLengthError(
                f"the prompt has {num_tokens:,} tokens ({num_visual:,} of pictures), but prompt and answer together "
                f"may have {self._max_model_len:,}; {self._remedy(pictures)}"
            )
        delta = self._v2pe_delta if v2pe_delta is None else v2pe_delta
        window = self._window
        stride = auto_stride(num_tokens, prompt.spans, window - 1) if delta == "auto" else parse_delta(delta)
        position_T, next_position = build_positions(num_tokens, prompt.spans, [stride] * len(prompt.spans))
        if next_position >= window:
            remedy = "shorten it"
            if pictures:
                remedy += ", or lower max_tiles"
                remedy += ", or choose a smaller v2pe_delta (or 'auto')" if stride > STRIDES[-1] else ""
            raise ContextLengthError(
                f"the prompt reaches position {next_position:,}, beyond the trained window of {window:,}; {remedy}"
            )
        identity = None
        if self.identity is not None:
            identity = build_identity(**self.identity, v2pe_stride=stride, cache_salt=cache_salt)
        return Prepared(
            prompt=prompt,
            pictures=tuple(replace(picture, span=span) for picture, span in zip(pictures, prompt.spans, strict=True)),
            position_T=position_T,
            next_position=next_position,
            identity=identity,
            salt=cache_salt,
            made_for=self.made_for,
            start_s=start_s,
        )

    def _remedy(self, pictures: Items[Picture] = ()) -> str:
        """Says what helps a prompt of too many tokens. More than the trained window are of no use to a text."""
        ways = ["shorten it", *(["lower max_tiles"] if pictures else [])]
        if self._max_model_len < self._config.decoder.max_position:
            ways.append("raise max_model_len")
        return ", or ".join(ways)

    def _read(self, media: Media, proceed: Proceed) -> list[Picture]:
        """Opens a picture, or decodes the frames of a video."""
        if media.kind == "image":
            return [open_picture(media.source, self._options_of(media))]
        if media.kind == "image_embeds":
            return [picture_of_visual_tokens(media.source, self._config, self._dtype, self._max_model_len)]
        return load_video(
            media.source,
            make=self._cut_frame,
            num_segments=media.num_frames,
            bound=media.bound,
            limits=self._videos,
            proceed=proceed,
        )

    def _check_size(self, messages: Items[Message]) -> None:
        """Refuses what cannot fit before any media are read."""
        parts = [part for message in messages for part in message.parts]
        media = [part for part in parts if isinstance(part, Media)]
        num_media = sum(count_frames(one.source, one.num_frames) if one.kind == "video" else 1 for one in media)
        per_tile = self._config.least_tokens_per_tile
        most = self._max_model_len // per_tile
        if num_media > most:
            raise ContextLengthError(
                f"the conversation has {quoted(num_media)} pictures and frames of videos, but only {most} tiles of "
                f"{per_tile} tokens fit; send fewer, or raise max_model_len"
            )
        self.check_texts("the conversation", [part for part in parts if isinstance(part, str)])

    def check_texts(self, what: str, texts: Items[str]) -> None:
        """Refuses texts that cannot fit, whatever is in them, before any of them is encoded."""
        most = self._max_model_len * self._bytes_per_token
        num_characters = sum(map(len, texts))  # no more than there are bytes, and known at once
        if num_characters > most or sum(len(text.encode("utf-8", "surrogatepass")) for text in texts) > most:
            raise ContextLengthError(
                f"{what} has {num_characters:,} characters, which cannot fit {self._max_model_len:,} tokens of at most "
                f"{self._bytes_per_token} bytes; {self._remedy()}"
            )

    def _cut_frame(self, frame: ImageSource) -> Picture:
        """Cuts a frame of a video to its one tile at once, since the pixels of all frames could fill the memory."""
        image = open_image(frame, self._frames)
        picture = picture_of_tiles(torch.from_numpy(image.tiles()), self._config, self._dtype, self._max_model_len)
        return replace(picture, layout=image.layout)

    def _options_of(self, media: Media) -> ImageOptions:
        most = self._images.max_tiles
        if media.max_tiles is None or media.max_tiles == most:
            return self._images
        if media.max_tiles > most:
            raise RequestError(
                f"max_tiles of a picture: expected at most the engine's {most}, got {quoted(media.max_tiles)}; "
                "lower it, or raise max_tiles"
            )
        return replace(self._images, max_tiles=media.max_tiles, min_tiles=min(self._images.min_tiles, media.max_tiles))

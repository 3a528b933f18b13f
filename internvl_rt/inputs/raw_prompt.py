"""Prompts that a caller has rendered, with tiles that a caller has cut: what a processor of transformers returns."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from internvl_rt.checkpoint.config import ModelConfig
from internvl_rt.errors import RequestError, check_list
from internvl_rt.inputs.foreign import ForeignArray, adopted
from internvl_rt.inputs.picture import Picture, count_tiles, describe_array, own_copy, picture_of_tiles
from internvl_rt.inputs.prompt import Prompt, VisualSpan
from internvl_rt.inputs.tokenizer import Tokenizer
from internvl_rt.values import Integer, read

PLACEHOLDER = "<IMG_CONTEXT>"


@dataclass(frozen=True, slots=True, eq=False)
class RawPrompt:
    """A prompt without any template, for a call that takes messages; the answer is the text that follows it.

    content: a text, in which special tokens are read, or token ids, which are taken as they are: a list, or an array or
        tensor of integers [n] or [1, n].
    pixel_values: the tiles of all pictures in order, as a processor of transformers or the official `load_image` makes
        them, floating point [tiles, 3, S, S], or uint8 [tiles, S, S, 3]. Each run of <IMG_CONTEXT> in the content is
        the place of a picture then. Without them there are no pictures, and <IMG_CONTEXT> is a token like any other.
    """

    content: "str | Sequence[int] | npt.NDArray[np.integer[Any]] | Tensor"
    pixel_values: "npt.NDArray[Any] | Tensor | ForeignArray | None" = None

    def fixed(self, config: ModelConfig, dtype: torch.dtype, limit: int, remedy: str) -> "RawPrompt":
        """Returns a prompt that its caller cannot change. Raises RequestError for more than `limit` tokens."""
        content, tiles = self.content, self.pixel_values
        if not isinstance(content, str):
            content = tuple(_token_ids(content, self.most_ids(config, limit), remedy))
        if tiles is not None:
            tiles = adopted(tiles)
            fits = count_tiles(tiles, config) * config.least_tokens_per_tile <= limit
            tiles = own_copy("pixel_values", tiles, dtype) if fits else tiles  # which will be refused
        return RawPrompt(content, tiles)

    def most_ids(self, config: ModelConfig, limit: int) -> int:
        """Returns the most ids that may be given for a prompt of `limit` tokens: of a tile always the full number."""
        if self.pixel_values is None or config.flash is None:
            return limit
        num_tiles = count_tiles(adopted(self.pixel_values), config)
        return limit + num_tiles * (config.tokens_per_tile - config.least_tokens_per_tile)


def build_raw_prompt(raw: RawPrompt, tokenizer: Tokenizer, *, vocab_size: int, limit: int, remedy: str) -> Prompt:
    """Encodes a text after the tokenizer's `prefix_ids`, or checks ids; finds the places of pictures if it has any.

    vocab_size: rows of the model's embedding. limit and remedy: as for `build_prompt`.

    Raises RequestError for an empty prompt, one that is seen to have more than `limit` tokens, before all of it is
    read, and ids that are no rows of the embedding.
    """
    content, ids = raw.content, tuple[int, ...]()
    if isinstance(content, str):
        prefix, text = tokenizer.prefix_ids, content
        encoded = tokenizer.encode(content, specials=True, limit=limit - len(prefix), remedy=remedy)
        if not encoded:
            raise RequestError("the prompt is an empty text, which no answer can follow; send at least a token")
        ids = (*prefix, *encoded)
    else:
        kind = Integer(0, vocab_size - 1, " (the rows of the embedding)")
        given = enumerate(_token_ids(content, limit, remedy))
        ids = tuple(read(f"token {index} of the prompt", token_id, kind) for index, token_id in given)
        text = tokenizer.decode(ids, skip_specials=False)
    spans = () if raw.pixel_values is None else tuple(_runs(ids, tokenizer.token_id(PLACEHOLDER)))
    return Prompt(ids, spans, text)


def raw_pictures(
    raw: RawPrompt, prompt: Prompt, config: ModelConfig, dtype: torch.dtype, max_tokens: int
) -> list[Picture]:
    """Gives each place of `prompt` its tiles. Raises RequestError where they do not account for every placeholder."""
    if raw.pixel_values is None:
        return []
    tiles: Any = adopted(raw.pixel_values)
    per_tile, num_tiles = config.tokens_per_tile, count_tiles(tiles, config)
    places = [span.num_tokens for span in prompt.spans]
    if sum(places) != num_tiles * per_tile or any(place % per_tile for place in places):
        raise RequestError(
            f"pixel_values: {num_tiles} tiles need {num_tiles * per_tile:,} {PLACEHOLDER} in the prompt, in runs of a "
            f"multiple of {per_tile}, but it has {sum(places):,} in {len(places)} runs; give the processor's own ids"
        )
    ends = np.cumsum([place // per_tile for place in places]).tolist()
    parts = (tiles[start:end] for start, end in zip([0, *ends], ends, strict=False))
    return [picture_of_tiles(part, config, dtype, max_tokens) for part in parts]


def shorten(prompt: Prompt, num_saved: Sequence[int]) -> Prompt:
    """Leaves out placeholders of pictures of which tiles are compressed. num_saved: how many of each picture."""
    ids, spans, end, num_gone = list[int](), list[VisualSpan](), 0, 0
    for span, saved in zip(prompt.spans, num_saved, strict=True):
        spans.append(VisualSpan(span.start - num_gone, span.num_tokens - saved))
        ids += prompt.token_ids[end : span.start + span.num_tokens - saved]
        end, num_gone = span.start + span.num_tokens, num_gone + saved
    counts = (span.num_tokens for span in spans)
    text = re.sub(f"(?:{PLACEHOLDER})+", lambda _: PLACEHOLDER * next(counts), prompt.text)
    return Prompt((*ids, *prompt.token_ids[end:]), tuple(spans), text)


def _token_ids(content: Any, limit: int, remedy: str) -> Sequence[int]:
    """Returns ids that were given as a list, array or tensor. Raises RequestError for others, and for too many."""
    shape = None
    if isinstance(content, np.ndarray | Tensor):
        shape = describe_array("the prompt", content)[1]
    if shape is None:
        check_list("the prompt", content, "token ids, or a text")
    elif len(shape) not in (1, 2) or (len(shape) == 2 and shape[0] != 1):
        raise RequestError(f"the prompt: expected ids [n] or [1, n], got {list(shape)}; send one prompt in a call")
    num_ids = len(content) if shape is None else shape[-1]
    if not 0 < num_ids <= limit:
        raise RequestError(f"the prompt must have from 1 to {limit:,} token ids, got {num_ids:,}; {remedy}")
    found: Sequence[int] = content if shape is None else content.reshape(-1).tolist()
    return found


def _runs(ids: Sequence[int], token_id: int) -> Iterator[VisualSpan]:
    """Yields the runs of one id."""
    start = 0
    for is_run, group in groupby(ids, key=token_id.__eq__):
        length = len(list(group))
        if is_run:
            yield VisualSpan(start, length)
        start += length

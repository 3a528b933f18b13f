"""What a prompt is on its way: a conversation whose media are read, and a prompt that can run. Both are plain data."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from internvl_rt.errors import ContextLengthError
from internvl_rt.inputs.picture import Picture
from internvl_rt.inputs.places import Places
from internvl_rt.inputs.prompt import Prompt, Turn
from internvl_rt.inputs.tiles import TileLayout


@dataclass(frozen=True, slots=True)
class Prepared:
    """A prompt that can run, without sampling parameters."""

    prompt: Prompt
    pictures: tuple[Picture, ...]
    position_T: np.ndarray  # float32 rotary positions of the prompt
    next_position: int  # position of the first token after the prompt
    identity: bytes | None  # what keys and values depend on besides tokens and pictures; None: no prefix is shared
    salt: str | None  # only prompts of equal salt share visual tokens
    made_for: str  # what an engine must have in common with the one that prepared this
    start_s: float  # by perf_counter, when the call began
    media_s: float = 0.0
    tile_s: float = 0.0
    begun: bool = False  # the prompt ends with the beginning of the answer
    thinks: bool = False  # that beginning is <think>, and the answer reasons first
    raw: bool = False  # it has no template, and the answer's text keeps the whitespace around it
    places: Places | None = None  # not None: draw no token, but return scores of these places

    def followed_by(self, token_ids: Sequence[int], text: str, *, most: int, window: int) -> "Prepared":
        """Appends tokens. Raises ContextLengthError for more than `most` together, or positions from `window` on."""
        added, num_prompt, next_position = len(token_ids), len(self.prompt.token_ids), self.next_position
        if num_prompt + added > most or next_position + added > window:
            raise ContextLengthError(
                f"prompt and response have {num_prompt + added:,} tokens together, but may have {min(most, window):,}; "
                "shorten them"
            )
        added_position_T = np.arange(next_position, next_position + added, dtype=np.float32)
        return replace(
            self,
            prompt=Prompt((*self.prompt.token_ids, *token_ids), self.prompt.spans, self.prompt.text + text),
            position_T=np.concatenate((self.position_T, added_position_T)),
            next_position=next_position + added,
        )


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns whose media are read, and which are not rendered yet."""

    turns: tuple[Turn, ...]
    pictures: tuple[Picture, ...]  # in the order of the turns' places for pictures
    start_s: float  # by perf_counter, when the call began
    media_s: float = 0.0
    thinks: bool = False  # its last turn is the beginning of an answer that reasons first


@dataclass(frozen=True, slots=True)
class PromptDescription:
    """What a prompt is made of, for a caller who asks without a request."""

    prompt: Prompt  # its ids hold a placeholder for each visual token, its spans say where
    layouts: tuple[TileLayout | None, ...]  # of each picture or frame, in order; None for given visual tokens

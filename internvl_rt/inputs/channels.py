"""How an answer is written in tokens: what ends it, and the channels that models such as GPT-OSS write it in.

Such an answer has parts, each behind a header that names its channel, as in
`<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...<|return|>`. The name is of
ordinary tokens, so that only their place tells them from text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from internvl_rt.checkpoint.config import ModelConfig
from internvl_rt.checkpoint.template import TEMPLATES, Special, spelt
from internvl_rt.inputs.tokenizer import Tokenizer

Part = Literal["text", "reasoning"]  # what a user reads, and what comes before it


def end_ids(config: ModelConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the tokens that end an answer: those that the folder names, or the template's, and its guard."""
    template = TEMPLATES[config.template]
    own = config.end_token_ids or (tokenizer.token_id(template.stop.token),)
    return own if template.guard is None else (*own, tokenizer.token_id(template.guard.token))


@dataclass(frozen=True, slots=True)
class ChannelIds:
    """The tokens of a template with channels, for one tokenizer."""

    turn_id: int  # begins a turn, whose role follows
    name_id: int  # begins a header
    text_id: int  # ends it
    guard_id: int | None  # ends a part; the answer, if it is the text
    header_ids: tuple[int, ...]  # of the text
    header: str  # the same, spelt
    part_of: Callable[[Sequence[int]], Part | None]  # what is behind a header with these tokens; None: neither part

    def reader(self, prompt_ids: Sequence[int]) -> "ChannelReader":
        """Returns what reads an answer to a prompt, which may hold its beginning."""
        return ChannelReader(self, prompt_ids)

    def count_reasoning(self, token_ids: Sequence[int]) -> int:
        """Counts the tokens of an answer's reasoning and what ends it, without headers."""
        reader = self.reader(())
        return sum(reader.push(token_id) == "reasoning" for token_id in token_ids)


def find_channels(config: ModelConfig, tokenizer: Tokenizer) -> ChannelIds | None:
    """Returns the tokens of the channels that a model writes, or None. Raises CheckpointError if one is missing."""
    template = TEMPLATES[config.template]
    marks = template.channels
    if marks is None:
        return None
    parts: dict[str, Part] = {"": "text", marks.final: "text", marks.analysis: "reasoning"}

    def part_of(token_ids: Sequence[int]) -> Part | None:
        words = tokenizer.decode(token_ids).split()  # others than the name may follow, such as a recipient
        return parts.get(words[0] if words else "")

    def encode(piece: str | Special) -> list[int]:
        return [tokenizer.token_id(piece.token)] if isinstance(piece, Special) else tokenizer.encode(piece)

    return ChannelIds(
        turn_id=tokenizer.token_id(template.turn.token),
        name_id=tokenizer.token_id(marks.name.token),
        text_id=tokenizer.token_id(marks.text.token),
        guard_id=None if template.guard is None else tokenizer.token_id(template.guard.token),
        header_ids=tuple(token_id for piece in template.header for token_id in encode(piece)),
        header=spelt(template.header),
        part_of=part_of,
    )


class ChannelReader:
    """Says of each token of an answer which part it belongs to. An answer without any header is text."""

    def __init__(self, ids: ChannelIds, prompt_ids: Sequence[int]) -> None:
        self._ids = ids
        self._part: Part | None = "text"
        self._header: list[int] | None = None  # the tokens of the header so far; None: behind one, or without one
        self._is_named = False  # whether that header has come to its channel
        if ids.turn_id in prompt_ids:
            for token_id in prompt_ids[-1 - prompt_ids[::-1].index(ids.turn_id) :]:
                self.push(token_id)
        if self._header and not self._is_named:  # the prompt ends with a role, and the answer begins
            self._header = None

    def push(self, token_id: int) -> Part | None:
        """Takes the next token; returns the part whose text it is, or None."""
        ids = self._ids
        if token_id == ids.turn_id or token_id == ids.name_id:
            self._header, self._is_named = [], token_id == ids.name_id
            return None
        if token_id == ids.text_id:
            if self._header is not None:
                self._part = ids.part_of(self._header if self._is_named else ())
                self._header = None
            return None
        if self._header is not None:
            self._header.append(token_id)
            return None
        return self._part

    def goes_on(self, token_id: int) -> bool:
        """Says whether the answer goes on behind this end token, since only a part before the text ends with it."""
        return token_id == self._ids.guard_id and self._header is None and self._part != "text"

"""The text of an answer that is written in channels, and its reasoning, as they become visible."""

from collections.abc import Callable

from internvl_rt.engine.reply import AnswerText
from internvl_rt.inputs.channels import ChannelReader, Part


class ChannelText:
    """Grows the text and the reasoning of an answer token by token, each as an `AnswerText` of its own.

    Headers, and what is in other channels, are in neither.
    """

    def __init__(self, reader: ChannelReader, make: Callable[[Part], AnswerText], *, whole: bool) -> None:
        """make: begins a part. whole: all that is written is the text, headers and other channels included."""
        self._reader, self._whole = reader, whole
        self._text, self._reasoning = make("text"), make("reasoning")
        self._part: Part | None = "text"  # that of the token before
        self._new_reasoning = ""  # that the caller has not taken

    @property
    def text(self) -> str:
        return self._text.text

    @property
    def reasoning(self) -> str | None:
        """The reasoning so far; None if there is none."""
        return self._reasoning.text or None

    @property
    def stopped(self) -> bool:
        """Whether a stop string was seen, in either part."""
        return self._text.stopped or self._reasoning.stopped

    def take_reasoning(self) -> str:
        """Returns what is new of the reasoning since the last call."""
        new, self._new_reasoning = self._new_reasoning, ""
        return new

    def push(self, token_id: int) -> str:
        """Adds a token; returns the text that becomes visible, often empty."""
        before, part = self._part, self._reader.push(token_id)
        self._part = part = "text" if self._whole else part
        if before == "reasoning" and part != before:
            self._new_reasoning += self._reasoning.finish()
        for each, name in ((self._text, "text"), (self._reasoning, "reasoning")):
            if name != part:
                each.skip()
        if part == "reasoning":
            self._new_reasoning += self._reasoning.push(token_id)
        return self._text.push(token_id) if part == "text" else ""

    def finish(self) -> str:
        """Returns the text that was held back and now turns out to belong to the answer."""
        self._new_reasoning += self._reasoning.finish()
        return self._text.finish()

    def goes_on(self, token_id: int) -> bool:
        """Says whether the answer goes on behind this end token, which is not pushed yet."""
        return self._reader.goes_on(token_id)

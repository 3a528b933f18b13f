"""What a request gives back: the text as it becomes visible, and the finished reply with its costs."""

from dataclasses import dataclass

from internvl_rt.sequence import FinishReason, SamplingParams
from internvl_rt.tokenizer import TextStream


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int  # with the visual ones
    image_tokens: int
    completion_tokens: int  # with the stop token
    cached_tokens: int = 0  # of the prompt, whose keys and values were still in the cache

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Timings:
    """Wall-clock seconds by stage, as this request saw them; a step shared with others counts in full for each."""

    media_s: float  # reading and identifying pictures, decoding videos
    tile_s: float  # decoding pictures, resizing, cutting; nothing for those that the cache holds
    vision_s: float  # vision tower and projector
    prefill_s: float  # decoder steps up to the first token, that token's draw included
    decode_s: float  # decoder steps after the first token
    first_token_s: float  # from the call to the first token
    total_s: float
    num_decoded: int  # tokens after the first

    @property
    def per_token_s(self) -> float:
        """Mean time of a token after the first; 0 when there is none."""
        return self.decode_s / self.num_decoded if self.num_decoded else 0.0


@dataclass(frozen=True, slots=True)
class Reply:
    text: str  # without special tokens, surrounding whitespace removed, as the official chat returns it
    token_ids: list[int]  # as generated, the stop token included
    finish_reason: FinishReason  # "stop": a stop token or string; "length": max_tokens or the context window
    usage: Usage
    timings: Timings


@dataclass(frozen=True, slots=True)
class Piece:
    """Newly visible text of a streamed answer. The last piece has the finished reply; the texts add up to its text."""

    text: str
    reply: Reply | None = None


class AnswerText:
    """Grows an answer's visible text token by token.

    Held back until it is certain: the beginning of what may become a stop string, whitespace that may turn out to be
    trailing, and (by `TextStream`) incomplete UTF-8.
    """

    def __init__(self, stream: TextStream, params: SamplingParams) -> None:
        self._stream, self._stops, self._min_tokens = stream, params.stop_strings, params.min_tokens
        self._pending = ""
        self._num_tokens = 0
        self.text = ""
        self.stopped = False  # a stop string was seen; nothing becomes visible after it

    def push(self, token_id: int) -> str:
        """The text that becomes visible with the next token, often empty."""
        self._num_tokens += 1
        return self._add(self._stream.push(token_id), final=False)

    def finish(self) -> str:
        """The text that was held back and now turns out to belong to the answer."""
        return self._add(self._stream.flush(), final=True)

    def _add(self, text: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        pending = self._pending + text
        hold = 0
        if self._num_tokens >= self._min_tokens:
            found = [place for stop in self._stops if (place := pending.find(stop)) >= 0]
            if found:
                self.stopped = final = True
                pending = pending[: min(found)]
            elif not final:
                hold = max((_overlap(pending, stop) for stop in self._stops), default=0)
        ready = pending[: len(pending) - hold].rstrip()
        visible = ready if self.text else ready.lstrip()
        self._pending = "" if final else pending[len(ready) :]
        self.text += visible
        return visible


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0

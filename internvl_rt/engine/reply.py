"""What a request gives back: the text as it becomes visible, and the finished reply with its costs."""

from collections.abc import Iterator
from dataclasses import dataclass

from internvl_rt.inputs.sampling_params import SamplingParams
from internvl_rt.inputs.tokenizer import TextStream
from internvl_rt.model.work import Roof, Work
from internvl_rt.steps.logprobs import TokenLogprob
from internvl_rt.steps.sequence import FinishReason


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int  # with the visual ones
    image_tokens: int
    completion_tokens: int  # with the stop tokens, of all answers
    cached_tokens: int = 0  # of the prompt, whose keys and values were still in the cache

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Timings:
    """Wall-clock seconds by stage, as this request saw them; a step shared with others counts in full for each.

    So does the work: that of the steps which the seconds count, whoever they worked for. Work over time is what the
    device achieved while it served this request; it is not this request's share, and does not add up over requests.
    """

    media_s: float  # reading and identifying pictures, decoding videos
    tile_s: float  # decoding pictures, resizing, cutting; nothing for those that the cache holds
    vision_s: float  # vision tower and projector
    prefill_s: float  # decoder steps up to the first token, that token's draw included
    decode_s: float  # decoder steps after the first token
    queued_s: float  # from the call's end of preparation until the first step with one of its tokens began
    first_token_s: float  # from the call to the first token
    total_s: float
    num_decoded: int  # tokens after the first, of the longest answer
    vision_work: Work
    prefill_work: Work
    decode_work: Work  # pictures of others that were encoded between its steps included, as in decode_s

    @property
    def per_token_s(self) -> float:
        """Mean time of a token after the first; 0 when there is none."""
        return self.decode_s / self.num_decoded if self.num_decoded else 0.0

    def render(self, roof: Roof | None = None) -> str:
        """A table for people. With a roof: the least time for a stage's work, and its share of the time it took.

        The least time is that of the whole stage's work at once. Where long prefills and short decode steps of others
        are mixed, each step's own least times add up to more, so the share is never too high.
        """
        worked = {
            "vision": (self.vision_s, self.vision_work),
            "prefill": (self.prefill_s, self.prefill_work),
            "decode": (self.decode_s, self.decode_work),
        }
        rows = [["stage", "seconds", "TFLOP", "GB", *(["floor s", "share"] if roof else [])]]
        rows += [[name, f"{s:.4f}"] for name, s in (("media", self.media_s), ("tile", self.tile_s))]
        rows.append(["queued", f"{self.queued_s:.4f}"])
        for name, (seconds, work) in worked.items():
            rows.append([name, f"{seconds:.4f}", _figure(work.flops / 1e12), _figure(work.bytes / 1e9)])
            if roof and seconds:
                rows[-1] += [_figure(roof.floor_s(work)), f"{roof.floor_s(work) / seconds:.0%}"]
        ends = {"per token": self.per_token_s, "first token": self.first_token_s, "total": self.total_s}
        rows += [[name, f"{seconds:.4f}"] for name, seconds in ends.items()]
        lines = [row[0].ljust(11) + "".join(cell.rjust(10) for cell in row[1:]) for row in rows]
        return "\n".join([*lines, *([f"floor by {roof.name}"] if roof else [])])


def _figure(value: float) -> str:
    """Three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer."""

    text: str  # without special tokens, surrounding whitespace removed, as the official chat returns it
    token_ids: list[int]  # as generated, the stop token included
    finish_reason: FinishReason  # "stop": a stop token or string; "length": max_tokens or the context window; "timeout"
    logprobs: tuple[TokenLogprob, ...] | None  # one for each token, where asked for


@dataclass(frozen=True, slots=True)
class Reply:
    """What a request gets: its answers, `n` of them, and what they took. The first one's parts can be read directly."""

    choices: tuple[Choice, ...]
    usage: Usage
    timings: Timings
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None  # one for each token; None for the first

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        return self.choices[0].finish_reason

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...] | None:
        return self.choices[0].logprobs


@dataclass(frozen=True, slots=True)
class Piece:
    """Newly visible text of a streamed answer; of each choice the texts add up to its text.

    The last piece has the finished reply.
    """

    text: str
    reply: Reply | None = None
    choice: int = 0  # index of the answer that the text belongs to


def pieces_of(new_texts: list[tuple[int, str]], reply: Reply | None) -> Iterator[Piece]:
    """A piece for each text, given with its answer's index. The last piece carries the reply, if there is one."""
    *others, (index, text) = new_texts or [(0, "")]
    for other_index, other_text in others:
        yield Piece(other_text, choice=other_index)
    if text or reply is not None:
        yield Piece(text, reply, index)


@dataclass(frozen=True, slots=True)
class Score:
    """How likely a response is, token by token."""

    tokens: tuple[TokenLogprob | None, ...]

    @property
    def logprobs(self) -> list[float]:
        return [token.logprob for token in self.tokens if token is not None]

    @property
    def total(self) -> float:
        """The logarithm of the probability of the whole response."""
        return sum(self.logprobs)


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
        text = self._stream.push(token_id)
        if self._stops or self._pending or not self.text:
            return self._add(text, final=False)
        ready = text.rstrip()
        if len(ready) != len(text):
            self._pending = text[len(ready) :]
        self.text += ready
        return ready

    def finish(self) -> str:
        """The text that was held back and now turns out to belong to the answer."""
        return self._add(self._stream.flush(), final=True)

    def _add(self, text: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        pending = self._pending + text
        hold = 0
        if self._stops and self._num_tokens >= self._min_tokens:
            found = [(place + len(stop), place) for stop in self._stops if (place := pending.find(stop)) >= 0]
            if found:  # the one that ended first counts, so that nothing depends on how tokens cut the text
                self.stopped = final = True
                pending = pending[: min(found)[1]]
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

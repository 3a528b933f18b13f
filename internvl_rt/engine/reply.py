"""The text of an answer as it becomes visible, and the finished reply with its costs."""

import time
from dataclasses import dataclass

from internvl_rt.inputs.marks import overlap
from internvl_rt.inputs.sampling_params import SamplingParams
from internvl_rt.inputs.tokenizer import TextStream
from internvl_rt.model.work import NO_WORK, Roof, Work
from internvl_rt.steps.logprobs import TokenLogprob, TokenScores
from internvl_rt.steps.sequence import FinishReason


@dataclass(frozen=True, slots=True)
class Usage:
    """The tokens that a request took."""

    prompt_tokens: int = 0  # visual tokens included
    image_tokens: int = 0
    completion_tokens: int = 0  # of all answers, stop tokens included
    cached_tokens: int = 0  # prompt tokens whose keys and values were in the cache
    accepted_draft_tokens: int = 0  # guessed tokens that are part of an answer; 0 without speculation
    rejected_draft_tokens: int = 0  # the other guessed tokens
    saved_image_tokens: int = 0  # visual tokens fewer than if no tile were compressed, as Flash models do

    @property
    def total_tokens(self) -> int:
        """Tokens of the prompt and of all answers."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Timings:
    """Wall-clock seconds and work by stage. A step that requests share counts in full for each of them.

    So work over time is what the device achieved while it served this request; it is not this request's share, and does
    not add up over requests.
    """

    media_s: float = 0.0  # reading and identifying pictures, decoding videos
    tile_s: float = 0.0  # decoding, resizing and cutting pictures; 0 for pictures in the cache
    vision_s: float = 0.0  # vision tower and projector; of a Flash model a part of tile_s, which comes before any step
    prefill_s: float = 0.0  # decoder steps up to the first token, that token's draw included
    decode_s: float = 0.0  # decoder steps after the first token
    queued_s: float = 0.0  # from the end of preparation until the request's first step began
    first_token_s: float = 0.0  # from the call to the first token
    total_s: float = 0.0
    num_decoded: int = 0  # tokens of the longest answer after its first
    vision_work: Work = NO_WORK
    prefill_work: Work = NO_WORK
    decode_work: Work = NO_WORK  # includes other requests' pictures, as decode_s does

    @property
    def per_token_s(self) -> float:
        """Mean time of a token after the first; 0 when there is none."""
        return self.decode_s / self.num_decoded if self.num_decoded else 0.0

    def render(self, roof: Roof | None = None) -> str:
        """Formats a table. A roof adds the least time for a stage's work, and its share of the time taken.

        The least time is that of the whole stage's work at once. The steps' own least times add up to more, where long
        prefills are mixed with short decode steps, so the share is never too high.
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
    """Formats a number with at least three significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer to a request."""

    # As the official chat returns it: without special tokens, and without the whitespace around it, which is kept where
    # there is a grammar or no template, and before what continues a begun answer.
    text: str
    token_ids: list[int]  # as generated, the stop token included
    finish_reason: FinishReason  # "stop": a stop token or string; "length": max_tokens or the context window; "timeout"
    logprobs: tuple[TokenLogprob, ...] | None  # one for each token, if requested
    # What was thought before the text; None if the request did not ask for it, and the model wrote none by itself.
    reasoning: str | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """The `n` answers to a request, and what they cost. `text` and so on read the first answer."""

    choices: tuple[Choice, ...]
    usage: Usage
    timings: Timings
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = (
        None  # if requested: of each prompt token, None for the first
    )
    scored: "tuple[Scored, ...]" = ()  # of each prompt, in a request that scores prompts and draws nothing

    @property
    def text(self) -> str:
        """The first answer's text."""
        return self.choices[0].text

    @property
    def reasoning(self) -> str | None:
        """The first answer's reasoning, if it was asked for or written anyway."""
        return self.choices[0].reasoning

    @property
    def token_ids(self) -> list[int]:
        """The first answer's tokens, the one that ended it included."""
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        """Why the first answer ended."""
        return self.choices[0].finish_reason

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...] | None:
        """The first answer's log-probabilities, if they were asked for."""
        return self.choices[0].logprobs


def unprepared_reply(params: SamplingParams, start_s: float, *, think: bool = False) -> Reply:
    """Returns the reply to a request whose time was over before its prompt was known. start_s: by perf_counter."""
    reasoning = "" if think else None
    empty = Choice("", [], "timeout", logprobs=None if params.logprobs is None else (), reasoning=reasoning)
    return Reply(
        choices=(empty,) * params.n,
        usage=Usage(),
        timings=Timings(total_s=time.perf_counter() - start_s),
        prompt_logprobs=None if params.prompt_logprobs is None else (),
    )


@dataclass(frozen=True, slots=True)
class Piece:
    """What is new of a streamed answer; the texts of all pieces add up to its text. The last one has the reply.

    A token's log-probability comes as soon as the token is known, its text when that is certain, which may be a later
    piece. Only a piece with log-probabilities or the reply may have neither text nor reasoning.
    """

    text: str
    reply: Reply | None = None
    choice: int = 0  # index of the answer that the text belongs to
    tokens: tuple[TokenLogprob, ...] = ()  # if requested; those of all pieces add up to the answer's `logprobs`
    reasoning: str = ""  # new text of what is thought before the answer's text


@dataclass(frozen=True, slots=True)
class Scored:
    """The scores of the places of one prompt, in order."""

    places: tuple[TokenScores, ...]
    usage: Usage


@dataclass(frozen=True, slots=True)
class Score:
    """Says how likely each token of a response is."""

    tokens: tuple[TokenLogprob, ...]
    usage: Usage = Usage()  # of computing it; the response counts as a part of the prompt

    @property
    def logprobs(self) -> list[float]:
        """The log-probabilities of the response's tokens."""
        return [token.logprob for token in self.tokens]

    @property
    def total(self) -> float:
        """The log-probability of the whole response."""
        return sum(self.logprobs)


class AnswerText:
    """Grows an answer's visible text token by token.

    It holds text back until it is certain: the beginning of what may become a stop string, whitespace that may turn out
    to be trailing, and (by `TextStream`) incomplete UTF-8. Whitespace around an answer is left out, as in the official
    chat, unless the answer keeps to a grammar, which its whole text then matches, or follows a prompt without template;
    and before the text that continues a begun answer it is kept.
    """

    def __init__(self, stream: TextStream, params: SamplingParams, *, begun: bool = False, strips: bool = True) -> None:
        """begun: the text continues an answer. strips: whether whitespace around it is left out without a grammar."""
        self._stream, self._stops, self._min_tokens = stream, params.stop_strings, params.min_tokens
        self._include_stop = params.include_stop
        self._strips = strips and params.grammar is None
        self._begun = begun or not self._strips  # whitespace at the beginning belongs to the text
        self._pending = ""
        self._num_tokens = 0
        self.text = ""
        self.stopped = False  # a stop string was seen; nothing becomes visible after it

    def push(self, token_id: int) -> str:
        """Adds a token; returns the text that becomes visible, often empty."""
        self._num_tokens += 1
        return self._add(self._stream.push(token_id), final=False)

    def skip(self) -> None:
        """Counts a token of the answer that is no part of this text."""
        self._num_tokens += 1

    def finish(self) -> str:
        """Returns the text that was held back and now turns out to belong to the answer."""
        return self._add(self._stream.flush(), final=True)

    def _add(self, text: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        pending = self._pending + text
        hold, stop = 0, ""
        if self._stops and self._num_tokens >= self._min_tokens:
            found = [(place + len(each), place) for each in self._stops if (place := pending.find(each)) >= 0]
            if found:  # the stop string that ends first counts, however tokens cut the text
                self.stopped = final = True
                end, start = min(found)
                pending, stop = pending[:start], pending[start:end] if self._include_stop else ""
            elif not final:
                hold = max((overlap(pending, each) for each in self._stops), default=0)
        ready = pending[: len(pending) - hold]
        ready = ready.rstrip() if self._strips and not stop else ready
        visible = (ready if self.text or self._begun else ready.lstrip()) + stop
        self._pending = "" if final else pending[len(ready) :]
        self.text += visible
        return visible

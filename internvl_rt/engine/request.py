"""A request with its growing answers, and the reply built from them."""

import math
import time
from dataclasses import asdict, dataclass, field, replace

from internvl_rt.engine.channel_text import ChannelText
from internvl_rt.engine.reply import AnswerText, Choice, Piece, Reply, Scored, Timings, Usage
from internvl_rt.errors import RequestError
from internvl_rt.inputs.prepare import Prepared
from internvl_rt.inputs.thinking import ThoughtReader
from internvl_rt.model.work import Tally
from internvl_rt.steps.logprobs import TokenLogprob, TokenScores
from internvl_rt.steps.sequence import Sequence


@dataclass(slots=True, eq=False)
class Answer:
    """One of a request's answers while it grows."""

    sequence: Sequence
    text: AnswerText | ChannelText
    thought: ThoughtReader | None = None  # splits the text that the caller takes; None: nothing is thought before it
    num_read: int = 0  # generated tokens that were added to `text`
    new_text: str = ""  # visible text that the caller has not taken
    logprobs: list[TokenLogprob] = field(default_factory=list)
    num_drafts: int = 0  # draft tokens that steps have checked
    num_accepted: int = 0  # those of them that are tokens of the answer
    num_taken: int = 0  # log-probabilities that the caller has taken
    scores: dict[int, TokenScores] = field(default_factory=dict)  # by number of the place in `sequence.places`

    def take(self, index: int) -> Piece | None:
        """Returns what is new since the last call, for the answer of this index; None if there is nothing."""
        text, tokens, reasoning = self.new_text, tuple(self.logprobs[self.num_taken :]), ""
        self.new_text, self.num_taken = "", len(self.logprobs)
        if isinstance(self.text, ChannelText):
            reasoning = self.text.take_reasoning()
        elif self.thought is not None:
            reasoning, text = self.thought.push(text, final=self.sequence.finish_reason is not None)
        return Piece(text, None, index, tokens, reasoning) if text or tokens or reasoning else None

    def read(self, num_tokens: int) -> None:
        """Adds the first `num_tokens` generated tokens to the text, except those that it has."""
        start = self.sequence.num_prompt
        for token_id in self.sequence.token_ids[start + self.num_read : start + num_tokens]:
            self.new_text += self.text.push(token_id)
        self.num_read = max(self.num_read, num_tokens)

    def goes_on(self, token_id: int, num_before: int) -> bool:
        """Says whether an end token behind `num_before` others ends a part before the text, and not the answer."""
        if not isinstance(self.text, ChannelText) or token_id in self.sequence.params.stop_ids:
            return False
        self.read(num_before)
        return self.text.goes_on(token_id)


@dataclass(slots=True, eq=False)
class Request:
    """The answers to one prompt, or several prompts to be scored, and the reply or error that the caller waits for.

    Nothing that it holds refers to it, so it is freed when its caller forgets it. An error refers to it by the frames
    that it was raised in, so it is raised once and kept no longer.
    """

    prepared: Prepared
    deadline_s: float = math.inf  # by perf_counter
    request_id: str | None = None  # the caller's own name for it, in logs and traces
    answers: list[Answer] = field(default_factory=list)
    beginning: Answer | None = None  # that the answers' prompts have in common; it draws nothing
    submitted_s: float = 0.0
    started_s: float = 0.0
    vision: Tally = field(default_factory=Tally)
    prefill: Tally = field(default_factory=Tally)
    decode: Tally = field(default_factory=Tally)
    first_token_s: float = 0.0
    reply: Reply | None = None
    error: BaseException | None = None  # until it is raised
    done: bool = False

    def take_error(self) -> BaseException:
        """Returns the error of a request that has ended without a reply, and forgets it."""
        error, self.error = self.error, None
        return error or RequestError("the request has ended, and its error was raised already; send it again")

    def take_pieces(self) -> list[Piece]:
        """Returns a piece of each answer of which something is new since the last call; the last one has the reply."""
        taken = [answer.take(index) for index, answer in enumerate(self.answers)]
        pieces = [piece for piece in taken if piece is not None]
        if self.reply is not None:
            *pieces, last = pieces or [Piece("")]
            pieces.append(replace(last, reply=self.reply))
        return pieces

    @property
    def num_saved(self) -> int:
        """Visual tokens fewer in the prompt than if no tile were compressed."""
        return sum(picture.num_saved for picture in self.prepared.pictures)

    @property
    def parts(self) -> list[Answer]:
        """What steps compute for this request: the answers, after the beginning if they have one in common."""
        return self.answers if self.beginning is None else [self.beginning, *self.answers]

    def end(self) -> None:
        """Follows the reply or the error; pictures are not needed any more."""
        self.done = True
        self.prepared = replace(self.prepared, pictures=())
        for part in self.parts:
            part.sequence.pictures = ()


def choice_of(answer: Answer) -> Choice:
    """Returns an answer that has ended."""
    text, reasoning = answer.text.text, None
    if isinstance(answer.text, ChannelText):
        reasoning = answer.text.reasoning
    elif answer.thought is not None:
        reasoning, text = ThoughtReader(strips=answer.thought.strips).push(text, final=True)
    return Choice(
        text=text,
        token_ids=answer.sequence.generated_ids,
        finish_reason=answer.sequence.finish_reason or "stop",
        logprobs=None if answer.sequence.params.logprobs is None else tuple(answer.logprobs),
        reasoning=reasoning,
    )


def usage_of(request: Request) -> Usage:
    """Counts the tokens of a request so far."""
    first = request.answers[0].sequence
    return Usage(
        prompt_tokens=first.num_prompt,
        image_tokens=sum(picture.span.num_tokens for picture in first.pictures),
        completion_tokens=sum(len(answer.sequence.generated_ids) for answer in request.answers),
        cached_tokens=first.num_cached,
        accepted_draft_tokens=sum(answer.num_accepted for answer in request.answers),
        rejected_draft_tokens=sum(answer.num_drafts - answer.num_accepted for answer in request.answers),
        saved_image_tokens=request.num_saved,
    )


def build_reply(request: Request) -> Reply:
    """Builds the reply to a request whose answers have ended."""
    prepared, first = request.prepared, request.answers[0].sequence
    longest = max(len(answer.sequence.generated_ids) for answer in request.answers)
    prompt_logprobs = None
    if first.params.prompt_logprobs is not None:
        scores = request.answers[0].scores
        known = (scores[index].of_first() if index in scores else None for index in range(first.num_prompt - 1))
        prompt_logprobs = None, *known
    return Reply(
        choices=tuple(map(choice_of, request.answers)),
        usage=usage_of(request),
        timings=Timings(
            media_s=prepared.media_s,
            tile_s=prepared.tile_s,
            queued_s=(request.started_s or time.perf_counter()) - request.submitted_s,
            vision_s=request.vision.seconds,
            prefill_s=request.prefill.seconds,
            decode_s=request.decode.seconds,
            first_token_s=request.first_token_s,
            total_s=time.perf_counter() - prepared.start_s,
            num_decoded=max(longest - 1, 0),
            vision_work=request.vision.work,
            prefill_work=request.prefill.work,
            decode_work=request.decode.work,
        ),
        prompt_logprobs=prompt_logprobs,
        scored=tuple(_build_scored(request, answer) for answer in request.answers if prepared.places is not None),
    )


def _build_scored(request: Request, answer: Answer) -> Scored:
    """Returns the scores of one prompt. What prompts have in common counts as computed for the first of them."""
    sequence = answer.sequence
    num_cached = sequence.num_cached
    if request.beginning is not None and answer is request.answers[0]:
        num_cached = min(num_cached, request.beginning.sequence.num_cached)
    usage = Usage(
        prompt_tokens=sequence.num_prompt,
        image_tokens=sum(picture.span.num_tokens for picture in sequence.pictures),
        cached_tokens=num_cached,
        saved_image_tokens=sum(picture.num_saved for picture in sequence.pictures),
    )
    return Scored(tuple(answer.scores[place] for place in range(len(answer.scores))), usage)


def figures_of(request: Request, outcome: str) -> dict[str, object]:
    """Returns a request's numbers for logs and traces, and no text of prompt or answer."""
    first = request.answers[0].sequence
    line: dict[str, object] = {} if request.request_id is None else {"request_id": request.request_id}
    line |= {"outcome": outcome, "prompt_tokens": first.num_prompt}
    if request.reply is not None:
        line |= asdict(request.reply.usage) | asdict(request.reply.timings)
    return line

"""Best of n: draws several answers to one prompt and ranks them, by a critic that scores each as soon as it ends."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from internvl_rt.engine.failures import without_frames
from internvl_rt.engine.loop import StepLoop
from internvl_rt.engine.reply import Choice, Usage, unprepared_reply
from internvl_rt.engine.request import Request, choice_of, usage_of
from internvl_rt.engine.voting import MajorityVote, count_votes
from internvl_rt.errors import InternVLError, RequestError, quoted
from internvl_rt.inputs.prepare import PromptSource
from internvl_rt.inputs.sampling_params import MAX_ANSWERS, SamplingParams
from internvl_rt.values import Flag, Integer, Number, OrNone, UnfitError, read

_NUMBER = Number(-1e300, 1e300)
STOP_SCORE = OrNone(_NUMBER)
OFFICIAL = SamplingParams(temperature=0.6, top_p=0.95, max_tokens=4096)  # VLMEvalKit, internvl_chat.py


class Judgement(Protocol):
    """What a critic says of an answer, such as `internvl_rt.critic.StepScores`."""

    @property
    def score(self) -> float:
        """How good the answer is; more is better."""


Critic = Callable[[PromptSource, str], "float | Judgement"]


@dataclass(frozen=True, slots=True)
class RankedAnswer:
    """An answer with what its critic says of it."""

    choice: Choice
    index: int  # among the answers that were drawn
    score: float | None = None  # None: it has none
    judgement: Any = None  # what the critic returned, such as the scores of the answer's steps
    error: InternVLError | None = None  # why the critic gave it no score

    @property
    def text(self) -> str:
        """The answer's text."""
        return self.choice.text


@dataclass(frozen=True, slots=True)
class Ranking:
    """Answers to one prompt, the best first; those without a score come last, and of equal ones the earlier first."""

    answers: tuple[RankedAnswer, ...]  # those that have ended
    num_unfinished: int  # answers that were given up by an early stop
    usage: Usage  # of the answers; a critic's own tokens are in its judgements
    drawing_s: float  # from the call until the last answer ended
    total_s: float

    @property
    def best(self) -> RankedAnswer:
        """The first answer."""
        return self.answers[0]

    @property
    def text(self) -> str:
        """The first answer's text."""
        return self.best.text


class _Opinion(NamedTuple):
    """What a critic says of a text."""

    score: float | None
    judgement: Any = None
    error: InternVLError | None = None


class _Scoring:
    """Scores answers in a thread of its own, one after the other, while others are drawn; of equal texts the first."""

    def __init__(self, critic: Critic, messages: PromptSource, stop_score: float | None) -> None:
        self._critic, self._messages, self._stop_score = critic, messages, stop_score
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="internvl_rt critic")
        self._opinions: dict[str, Future[_Opinion]] = {}  # by text
        self._choices: dict[int, Choice] = {}

    def add(self, index: int, choice: Choice) -> None:
        self._choices[index] = choice
        if choice.text not in self._opinions:
            self._opinions[choice.text] = self._thread.submit(self._score, choice.text)

    def is_decided(self, num_left: int) -> bool:
        """Says whether an answer is good enough to stop."""
        if self._stop_score is None:
            return False
        scores = [each.result().score for each in self._opinions.values() if each.done()]
        return any(score is not None and score >= self._stop_score for score in scores)

    def results(self) -> list[RankedAnswer]:
        """Waits for the scores that are still wanted. Raises the first error if no answer has a score."""
        known = {text: each.result() for text, each in self._opinions.items() if each.done() or not self.is_decided(0)}
        errors = [each.error for each in known.values() if each.error is not None]
        if errors and all(each.score is None for each in known.values()):
            raise errors[0]
        choices = [(index, choice) for index, choice in self._choices.items() if choice.text in known]
        return [RankedAnswer(choice, index, *known[choice.text]) for index, choice in choices]

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _score(self, text: str) -> _Opinion:
        try:
            if not text.strip():
                raise RequestError("the answer has no text to be scored")
            found = self._critic(self._messages, text)
            return _Opinion(_NUMBER.read(getattr(found, "score", found)), found)
        except UnfitError:
            what = "critic: expected a function that returns a finite number, or something with a score that is one"
            return _Opinion(None, found, RequestError(f"{what}, got {quoted(found)} for {quoted(text)}; correct it"))
        except InternVLError as error:
            return _Opinion(None, error=without_frames(error))


class _Counting:
    """Counts the votes of answers."""

    def __init__(self, vote: MajorityVote) -> None:
        self._vote = vote
        self._choices: dict[int, Choice] = {}
        self._keys: list[str | None] = []  # what each of these answers comes to

    def add(self, index: int, choice: Choice) -> None:
        self._keys.append(self._vote.key(choice.text))
        self._choices[index] = choice

    def is_decided(self, num_left: int) -> bool:
        return self._vote.is_decided(self._keys, num_left)

    def results(self) -> list[RankedAnswer]:
        shares = count_votes(self._keys)
        pairs = zip(self._choices.items(), shares, strict=True)
        return [RankedAnswer(choice, index, share) for (index, choice), share in pairs]

    def close(self) -> None:
        pass


def check_ranking(
    n: int, critic: Critic | MajorityVote, params: SamplingParams, greedy_first: bool, stop_score: float | None
) -> SamplingParams:
    """Returns the parameters of `n` answers. Raises RequestError for what `Engine.best_of` does not take."""
    if read("n", n, Integer(1, MAX_ANSWERS)) != params.n != 1:
        raise RequestError(f"n is {n}, but the n of params is {params.n}; leave out one of them")
    if not isinstance(critic, MajorityVote) and not callable(critic):
        raise RequestError(f"critic: expected a critic, a function or a MajorityVote, got {quoted(critic)}; give one")
    read("greedy_first", greedy_first, Flag())
    if read("stop_score", stop_score, STOP_SCORE) is not None and isinstance(critic, MajorityVote):
        raise RequestError("stop_score: a vote has stop_decided instead; leave it out")
    return replace(params, n=n)


def rank_answers(
    loop: StepLoop,
    request: Request,
    messages: PromptSource,
    critic: Critic | MajorityVote,
    *,
    stop_score: float | None,
) -> Ranking:
    """Runs a request, and ranks its answers. An answer that its deadline ends has no score."""
    judge = _Counting(critic) if isinstance(critic, MajorityVote) else _Scoring(critic, messages, stop_score)
    ended: dict[int, Choice] = {}
    num_answers, start_s = len(request.answers), request.prepared.start_s

    def take_ended() -> None:
        for index, answer in enumerate(request.answers):
            if index not in ended and answer.sequence.finish_reason is not None:
                choice = ended[index] = choice_of(answer)
                if choice.finish_reason != "timeout":
                    judge.add(index, choice)

    try:
        loop.submit(request)
        while not request.done and not judge.is_decided(num_answers - len(ended)):
            loop.advance(request)
            take_ended()
        if request.done:  # perhaps in another thread that ran the last step
            loop.poll(request)  # raises the request's error
            take_ended()
        usage, drawing_s = usage_of(request), time.perf_counter() - start_s
        loop.cancel(request)
        scored = {each.index: each for each in judge.results()}
    finally:
        loop.cancel(request)
        judge.close()
    answers = [scored.get(index) or RankedAnswer(choice, index) for index, choice in ended.items()]
    answers.sort(key=lambda each: (each.score is None, -(each.score or 0.0), each.index))
    return Ranking(tuple(answers), num_answers - len(ended), usage, drawing_s, time.perf_counter() - start_s)


def unprepared_ranking(params: SamplingParams, start_s: float) -> Ranking:
    """Returns the answers to a request whose time was over before its prompt was known. start_s: by perf_counter."""
    reply = unprepared_reply(params, start_s)
    answers = (RankedAnswer(choice, index) for index, choice in enumerate(reply.choices))
    return Ranking(tuple(answers), 0, reply.usage, 0.0, reply.timings.total_s)

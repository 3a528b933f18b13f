"""Best of n: draws several answers to one prompt and ranks them, by a critic that scores each as soon as it ends."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

from internvl_rt.engine.failures import without_frames
from internvl_rt.engine.loop import StepLoop
from internvl_rt.engine.options import PARAMS
from internvl_rt.engine.reply import Choice, Usage, unprepared_reply
from internvl_rt.engine.request import Request, choice_of, usage_of
from internvl_rt.engine.voting import MajorityVote, count_votes
from internvl_rt.errors import InternVLError, RequestError, quoted
from internvl_rt.inputs.position import Delta
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


# One with a method `about(messages, v2pe_delta=..., cache_salt=...)`, which returns a function of an answer's text, is
# called by that, so that it reads the conversation once, and refuses it before anything is drawn.
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

    score: float | None = None
    judgement: Any = None
    error: InternVLError | None = None


class _Scoring:
    """Scores answers in a thread of its own, one after the other, while others are drawn; of equal texts the first."""

    def __init__(self, judge: Callable[[str], "float | Judgement"], stop_score: float | None) -> None:
        self._judge, self._stop_score = judge, stop_score
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="internvl_rt critic")
        self._opinions: dict[str, Future[_Opinion]] = {}  # by text
        self._choices: dict[int, Choice] = {}
        self._error: BaseException | None = None  # a mistake of the critic, to be raised
        self._has_ended = False  # an answer is good enough, or the critic has made a mistake: nothing more is scored

    def add(self, index: int, choice: Choice) -> None:
        self._choices[index] = choice
        if choice.text not in self._opinions:
            self._opinions[choice.text] = self._thread.submit(self._score, choice.text)

    def is_decided(self, num_left: int) -> bool:
        """Says whether no more answers are wanted."""
        return self._has_ended

    def results(self) -> list[RankedAnswer]:
        """Waits for the scores that are still wanted. Raises the first error if no answer has a score."""
        ranked = [
            RankedAnswer(choice, index, *self._opinions[choice.text].result())
            for index, choice in self._choices.items()
        ]
        if self._error is None and all(each.score is None for each in ranked):
            self._error = next((each.error for each in ranked if each.error is not None), None)
        if self._error is not None:
            ranked.clear()  # the error's frames are this one's, which would keep it
            raise self._take_error()
        return ranked

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._opinions.clear()

    def _take_error(self) -> BaseException:
        assert self._error is not None
        error, self._error = self._error, None
        self._opinions.clear()
        return error

    def _score(self, text: str) -> _Opinion:
        if self._has_ended:
            return _Opinion()
        try:
            opinion = self._opinion_of(text)
        except BaseException as error:
            self._error, self._has_ended = error, True
            return _Opinion()
        if self._stop_score is not None and opinion.score is not None and opinion.score >= self._stop_score:
            self._has_ended = True
        return opinion

    def _opinion_of(self, text: str) -> _Opinion:
        try:
            if not text.strip():
                raise RequestError("the answer has no text to be scored")
            found = self._judge(text)
            return _Opinion(_NUMBER.read(getattr(found, "score", found)), found)
        except UnfitError:
            what = "critic: expected a function that returns a finite number, or something with a score that is one"
            return _Opinion(None, found, RequestError(f"{what}, got {quoted(found)} for {quoted(text)}; correct it"))
        except InternVLError as error:
            return _Opinion(error=without_frames(error))


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
    n: int, critic: Critic | MajorityVote, params: SamplingParams | None, greedy_first: bool, stop_score: float | None
) -> SamplingParams:
    """Returns the parameters of `n` answers. Raises RequestError for what `Engine.best_of` does not take."""
    params = OFFICIAL if params is None else read("params", params, PARAMS)
    if read("n", n, Integer(1, MAX_ANSWERS)) != params.n != 1:
        raise RequestError(f"n is {n}, but the n of params is {params.n}; leave out one of them")
    if isinstance(critic, type) or not (isinstance(critic, MajorityVote) or callable(critic)):
        raise RequestError(f"critic: expected a critic, a function or a MajorityVote, got {quoted(critic)}; give one")
    read("greedy_first", greedy_first, Flag())
    if read("stop_score", stop_score, STOP_SCORE) is not None and isinstance(critic, MajorityVote):
        raise RequestError("stop_score: a vote has stop_decided instead; leave it out")
    return replace(params, n=n)


def begin_judging(
    critic: Critic | MajorityVote,
    messages: PromptSource,
    v2pe_delta: Delta | None,
    cache_salt: str | None,
    stop_score: float | None,
) -> _Scoring | _Counting:
    """Returns what ranks the answers to a conversation. Raises RequestError for one that the critic does not judge."""
    if isinstance(critic, MajorityVote):
        return _Counting(critic)
    about = getattr(critic, "about", None)
    if about is None:
        return _Scoring(partial(critic, messages), stop_score)
    return _Scoring(about(messages, v2pe_delta=v2pe_delta, cache_salt=cache_salt), stop_score)


def rank_answers(loop: StepLoop, request: Request, judge: _Scoring | _Counting) -> Ranking:
    """Runs a request, and ranks its answers. An answer that its deadline ends has no score."""
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
        usage = usage_of(request) if request.reply is None else request.reply.usage
        drawing_s = time.perf_counter() - start_s
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

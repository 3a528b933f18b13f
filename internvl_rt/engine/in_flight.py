"""Gives the tokens that a step drew to the requests in flight, and makes replies of requests that end."""

import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from internvl_rt.engine.request import Answer, Request, build_reply, figures_of
from internvl_rt.engine.trace import Trace
from internvl_rt.errors import NotFiniteError, RequestError, not_finite
from internvl_rt.inputs.grammar import Matcher
from internvl_rt.model.work import Tally
from internvl_rt.steps.logprobs import TokenLogprob, TokenScores
from internvl_rt.steps.runner import LaunchedStep, StepResult
from internvl_rt.steps.scheduler import Scheduler
from internvl_rt.steps.sequence import FinishReason, Sequence
from internvl_rt.steps.step import Chunk, Step

LOG = logging.getLogger("internvl_rt")

Notify = Callable[[], None]


@dataclass(slots=True)
class _Together:
    """What requests share whose sequences decode in one step after another; `tally` is still to be charged."""

    sequences: tuple[Sequence, ...]
    requests: dict[Request, None]  # those that have not ended
    ending_ids: frozenset[int]  # stop tokens of all sequences, and -1 of a row of logits that is not finite
    is_complete: bool  # no sequence has ended
    tally: Tally = field(default_factory=Tally)


class InFlight:
    """Holds the requests in flight, and how to tell their callers. One thread at a time may call it."""

    def __init__(self, scheduler: Scheduler, dtype: torch.dtype) -> None:
        """dtype: that of the logits, which messages name"""
        self._scheduler, self._dtype = scheduler, dtype
        self._requests: dict[Request, None] = {}
        self._notifies: dict[Request, Notify] = {}  # of the requests whose callers want to be told
        self._next_deadline_s = math.inf  # no request's deadline is earlier
        self._answers: dict[int, tuple[Request, Answer]] = {}  # by seq_id
        self._together: _Together | None = None  # of the step that was collected last
        self.trace: Trace | None = None
        self.num_generated = 0
        self.num_saved = 0  # visual tokens of prompts, by compressed tiles
        self.finished: Counter[str] = Counter()  # number of ended requests, by outcome

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request: Request, notify: Notify | None) -> None:
        """notify: called between steps when there is text, a reply or an error."""
        request.submitted_s = time.perf_counter()
        self._requests[request] = None
        self.num_saved += request.num_saved
        if notify is not None:
            self._notifies[request] = notify
        self._next_deadline_s = min(self._next_deadline_s, request.deadline_s)
        for part in request.parts:
            self._answers[part.sequence.seq_id] = request, part
        later = {sibling.seq_id for part in request.parts for sibling in part.sequence.siblings}
        for part in request.parts:
            if part.sequence.seq_id not in later:
                self._scheduler.add(part.sequence)

    def fail(self, request: Request, error: BaseException, outcome: str) -> None:
        """Ends a request without a reply and returns its blocks."""
        request.error = error
        self._forget(request, outcome)
        self._tell(request)

    def fail_all(self, error: Callable[[], BaseException], outcome: str) -> None:
        """Fails every request, each with an error of its own, because raising an error adds a traceback to it."""
        for request in list(self._requests):
            self.fail(request, error(), outcome)

    def fail_sequences(self, sequences: Iterable[Sequence], error: Callable[[], BaseException]) -> None:
        """Fails the requests that the sequences belong to, each with an error of its own."""
        for sequence in sequences:
            if owned := self._answers.get(sequence.seq_id):
                self.fail(owned[0], error(), "error")

    def holds(self, sequence: Sequence) -> bool:
        """Says whether the answer of a sequence has not ended."""
        return sequence.seq_id in self._answers

    def start_over(self, error: Callable[[], BaseException]) -> None:
        """Fails every request and empties the scheduler, which an error may have left in any state, as this object."""
        self._scheduler.clear([part.sequence for request in self._requests for part in request.parts])
        self.abandon(error)

    def abandon(self, error: Callable[[], BaseException]) -> None:
        """Fails every request without a call to the scheduler. If this is interrupted, it may be called again."""
        self._answers.clear()
        self._together = None
        while self._requests:
            request = next(iter(self._requests))
            if not request.done and request.reply is None:
                request.error = error()
                self.finished["error"] += 1
            request.end()
            del self._requests[request]
        for request in list(self._notifies):
            self._tell(request)

    def end_late(self) -> None:
        """Ends the requests whose deadline has passed; their answers keep the text so far."""
        now_s = time.perf_counter()
        if now_s < self._next_deadline_s:
            return
        for request in [request for request in self._requests if request.deadline_s <= now_s]:
            for answer in request.answers:
                if answer.sequence.finish_reason is None:
                    answer.read(len(answer.sequence.generated_ids))
                    self._finish(request, answer, "timeout")
            self._tell(request)
        self._next_deadline_s = min((request.deadline_s for request in self._requests), default=math.inf)

    def collect(self, launched: LaunchedStep, result: StepResult) -> None:
        """Gives the tokens that a step drew to their answers, and skips answers that have ended meanwhile."""
        step, token_ids, decodes = launched.step, result.token_ids, launched.step.decodes
        self.num_generated += len(token_ids)
        together = self._together
        if together is None or together.sequences is not decodes.sequences:
            self._charge_together()
            together = self._together = self._join(decodes.sequences)
        together.tally.add(result.vision_s + result.decoder_s, result.decoder_work)
        if result.num_tiles:
            together.tally.add(0.0, result.vision_work)
        touched = tuple(together.requests) if self._notifies else ()
        all_go_on = together.is_complete and decodes.is_plain and decodes.num_repeats > 0
        if all_go_on and not step.chunks and together.ending_ids.isdisjoint(token_ids):
            self._scheduler.publish(decodes.sequences)
            for sequence, token_id in zip(decodes.sequences, token_ids, strict=True):
                sequence.token_ids.append(token_id)
        else:
            touched = (*touched, *self._collect_each(launched, result))
        if self._notifies:
            for request in touched:
                self._tell(request)

    def _collect_each(self, launched: LaunchedStep, result: StepResult) -> Iterable[Request]:
        """Looks at every token and every chunk of a step; returns the requests that the chunks belong to."""
        step, token_ids, answers, draws = launched.step, result.token_ids, self._answers, launched.step.draws
        final = [sequence for sequence in step.sequences if sequence.seq_id in answers]
        if token_ids and min(token_ids) < 0:  # the logits of some sequences were broken
            broken = {draws[row].sequence for row, token_id in enumerate(token_ids) if token_id < 0}
            final = [sequence for sequence in final if sequence not in broken]
        self._scheduler.publish(final)
        computed = [(owned[0], chunk) for chunk in step.chunks if (owned := answers.get(chunk.sequence.seq_id))]
        touched = self._charge(computed, launched, result)
        if step.scored:
            self._accept_scores(step, result.scores)
        for _, chunk in computed:
            self._end_prompt(chunk)
        rejected: set[int] = set()
        confirming: set[int] = set()
        if any(chunk.drafts for _, chunk in computed):
            confirming, rejected = self._check_drafts(step, token_ids)
            self.num_generated -= len(rejected)
        for row, (sequence, _, _) in enumerate(draws):
            owned = answers.get(sequence.seq_id)
            if owned is None or row in rejected:
                continue
            token_id = token_ids[row]
            if token_id < 0:
                self._fail_broken(*owned, f"token {len(sequence.generated_ids) + 1} of the answer")
                continue
            sequence.token_ids.append(token_id)
            if row in confirming:
                owned[1].num_accepted += 1
            num_generated = len(sequence.token_ids) - sequence.num_prompt
            if sequence.is_plain and 1 < num_generated < sequence.max_tokens and token_id not in sequence.stop_ids:
                continue  # nearly every token needs nothing more
            self._accept(*owned, token_id, result.logprobs[row], num_generated)
        return touched

    def _join(self, sequences: tuple[Sequence, ...]) -> "_Together":
        """Begins to count what the requests of sequences share that decode together."""
        owned = [self._answers.get(sequence.seq_id) for sequence in sequences]
        requests = dict.fromkeys(each[0] for each in owned if each is not None)
        ending_ids = frozenset({-1}).union(*(sequence.stop_ids for sequence in sequences))
        return _Together(sequences, requests, ending_ids, is_complete=None not in owned)

    def _charge_together(self) -> None:
        """Adds what was counted for requests that decode together to each of them."""
        if (together := self._together) is not None:
            for request in together.requests:
                request.decode += together.tally
            together.tally = Tally()

    def trace_unfinished(self) -> None:
        """Writes the requests in flight to the trace, with their numbers so far."""
        self._charge_together()
        for request in self._requests:
            self._trace_request(request, "in flight")

    def _check_drafts(self, step: Step, token_ids: list[int]) -> tuple[set[int], set[int]]:
        """Takes back what was computed for wrong draft tokens.

        Returns the rows of the draws that gave a draft token, and of the void draws after a wrong one.
        """
        confirming: set[int] = set()
        rejected: set[int] = set()
        row_of = {(draw.sequence, draw.counter): row for row, draw in enumerate(step.draws)}
        for sequence, start, _, drafts in step.chunks:
            owned = self._answers.get(sequence.seq_id)
            if not drafts or owned is None:
                continue
            owned[1].num_drafts += len(drafts)
            first = row_of[sequence, start + 1 - sequence.num_prompt]
            num_right = next((i for i, draft in enumerate(drafts) if token_ids[first + i] != draft), len(drafts))
            confirming |= set(range(first, first + num_right))
            rejected |= set(range(first + num_right + 1, first + len(drafts) + 1))
            self._scheduler.reject(sequence, len(drafts) - num_right)
            sequence.num_tokens += num_right
        return confirming, rejected

    def _accept_scores(self, step: Step, scores: list[list[TokenScores]]) -> None:
        """Keeps the scores of places in prompts, or fails the request of those that are not finite."""
        for scored, found in zip(step.scored, scores, strict=True):
            owned = self._answers.get(scored.sequence.seq_id)
            if owned is None:
                continue
            broken = next((place for place, each in enumerate(found, scored.first) if not each.is_finite), None)
            if broken is not None:
                number = int(scored.places.index_P[broken]) + 2
                behind = number > scored.sequence.num_prompt
                self._fail_broken(*owned, "the token after the prompt" if behind else f"token {number} of the prompt")
                continue
            owned[1].scores |= enumerate(found, scored.first)

    def _end_prompt(self, chunk: Chunk) -> None:
        """Ends a sequence that draws no token, if its prompt is computed."""
        sequence = chunk.sequence
        if sequence.max_tokens > 0 or chunk.stop < sequence.num_prompt:
            return
        owned = self._answers.get(sequence.seq_id)
        if owned is None:
            return
        if owned[1] is owned[0].beginning:
            self._release(owned[1])
        else:
            self._finish(*owned, "length")

    def _charge(
        self, computed: list[tuple[Request, Chunk]], launched: LaunchedStep, result: StepResult
    ) -> Iterable[Request]:
        """Adds a step's time and work to each request of its chunks, once; returns these requests."""
        prefills: dict[Request, bool] = {}  # whether the step computed a part of the request's prompt
        for request, (sequence, start, _, _) in computed:
            if self._together is None or request not in self._together.requests:
                prefills[request] = start < sequence.num_prompt or prefills.get(request, False)
        seconds, work = result.vision_s + result.decoder_s, result.vision_work + result.decoder_work
        for request, is_prefill in prefills.items():
            if is_prefill:
                request.started_s = request.started_s or launched.start.host_s
                request.vision.add(result.vision_s, result.vision_work)
                request.prefill.add(result.decoder_s, result.decoder_work)
            else:
                request.decode.add(seconds, work)
        return prefills

    def _accept(
        self, request: Request, answer: Answer, token_id: int, logprob: TokenLogprob | None, num_generated: int
    ) -> None:
        """Handles token number `num_generated`, just appended; ends the answer if it was the last."""
        sequence = answer.sequence
        if logprob is not None:
            answer.logprobs.append(logprob)
        if not request.first_token_s:
            request.first_token_s = time.perf_counter() - request.prepared.start_s
        if token_id in sequence.stop_ids and not answer.goes_on(token_id, num_generated - 1):
            answer.read(num_generated - 1)
            self._finish(request, answer, "stop")
            return
        if sequence.params.stop:  # without stop strings, text is made when a caller takes it
            answer.read(num_generated)
        if answer.text.stopped:
            self._finish(request, answer, "stop")
        elif num_generated == sequence.max_tokens:
            answer.read(num_generated)
            self._finish(request, answer, "length")
        elif sequence.matcher is not None and sequence.mask_W is not None:
            self._follow(request, sequence.matcher, token_id, sequence.mask_W)

    def _fail_broken(self, request: Request, answer: Answer, where: str) -> None:
        """Fails the request of an answer whose logits are NaN or infinite, or leave no token that may be drawn."""
        kind: type[RequestError] = NotFiniteError
        remedy = "check the checkpoint"
        if answer.sequence.matcher is not None and answer.sequence.params.min_tokens:
            remedy, kind = f"{remedy}, and that min_tokens leaves a token that the grammar allows", RequestError
        error = kind(f"the logits of {where} are {not_finite(self._dtype, remedy)}")
        self.fail(request, error, "error")

    def _follow(self, request: Request, matcher: Matcher, token_id: int, mask_W: NDArray[np.int32]) -> None:
        """Advances an answer's grammar by a token, or fails the request if the grammar forbids it."""
        try:
            if not matcher.accept(token_id):
                raise RequestError(f"the answer's token {token_id} breaks its grammar; report this as a bug")
            matcher.fill_mask(mask_W)
        except RequestError as error:
            self.fail(request, error, "error")

    def _finish(self, request: Request, answer: Answer, reason: FinishReason) -> None:
        """Ends an answer, and with the last one its request."""
        answer.new_text += answer.text.finish()
        answer.sequence.finish_reason = reason
        self._release(answer)
        if any(each.sequence.finish_reason is None for each in request.answers):
            return
        self._charge_together()
        request.reply = build_reply(request)
        self._forget(request, reason)

    def _tell(self, request: Request) -> None:
        """Tells the caller of a request, if it wants to be told; the last time when the request is done."""
        if (notify := self._notifies.get(request)) is not None:
            notify()
            if request.done:
                del self._notifies[request]

    def _release(self, answer: Answer) -> None:
        if self._answers.pop(answer.sequence.seq_id, None) is not None:
            self._scheduler.remove(answer.sequence)
            if self._together is not None:
                self._together.is_complete = False

    def _forget(self, request: Request, outcome: str) -> None:
        if request not in self._requests:
            return
        for part in request.parts:
            self._release(part)
        self._charge_together()
        if self._together is not None:
            self._together.requests.pop(request, None)
            if not self._together.requests:
                self._together = None
        self.finished[outcome] += 1
        if LOG.isEnabledFor(logging.DEBUG):
            LOG.debug("%s", json.dumps(figures_of(request, outcome)))
        self._trace_request(request, outcome)
        request.end()
        del self._requests[request]  # comes last, so that `start_over` finds what an error left here half done

    def _trace_request(self, request: Request, outcome: str) -> None:
        if self.trace is None:
            return
        first_s = request.prepared.start_s + request.first_token_s if request.first_token_s else 0.0
        phases = (("queued", request.submitted_s), ("prefill", request.started_s), ("decode", first_s))
        begun = [(name, start_s) for name, start_s in phases if start_s]
        self.trace.request(begun, time.perf_counter(), figures_of(request, outcome))

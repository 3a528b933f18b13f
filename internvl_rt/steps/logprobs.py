"""Computes how likely tokens are, on the device; the host reads that when the step has ended."""

import math
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from internvl_rt.steps.device_stream import to_host
from internvl_rt.steps.step import Step


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log-probability before penalties and temperature, and the likeliest tokens in its place."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # token ids with their log-probabilities, the likeliest first


@dataclass(frozen=True, slots=True)
class TokenScores:
    """How likely candidate tokens are in one place: their logits, before penalties and temperature."""

    token_ids: tuple[int, ...]
    logits: tuple[float, ...]
    logsumexp: float  # of the logits of the whole vocabulary
    top: tuple[tuple[int, float], ...] = ()  # the likeliest tokens, if requested, with their log-probabilities

    @property
    def logprobs(self) -> tuple[float, ...]:
        """The log-probability of each candidate among all tokens."""
        return tuple(logit - self.logsumexp for logit in self.logits)

    @property
    def probabilities(self) -> tuple[float, ...]:
        """The probability of each candidate among the candidates alone."""
        largest = max(self.logits)
        weights = [math.exp(logit - largest) for logit in self.logits]
        total = sum(weights)
        return tuple(weight / total for weight in weights)

    @property
    def is_finite(self) -> bool:
        """Whether the model's output in this place was finite."""
        return math.isfinite(self.logsumexp) and all(map(math.isfinite, self.logits))

    def of_first(self) -> TokenLogprob:
        """Returns the log-probability of the first candidate."""
        return TokenLogprob(self.token_ids[0], self.logprobs[0], self.top)


class Scores:
    """Computes the scores of candidate tokens, and the likeliest tokens, and copies them to the host."""

    def __init__(self, logits_RV: Tensor, candidate_RK: Tensor, num_top: int) -> None:
        """num_top: how many of the likeliest tokens `read` can return for a row, at most.

        The `logsumexp` of a row that is not finite is NaN. A candidate may be -1 in such a row.
        """
        logits_RV = logits_RV.float()
        total_R1 = logits_RV.logsumexp(-1, keepdim=True)
        total_R1 = total_R1.masked_fill(~total_R1.isfinite(), torch.nan)
        top = logits_RV.topk(min(num_top, logits_RV.shape[1]), dim=-1)
        self.num_rows = len(candidate_RK)
        self._candidate_RK = to_host(candidate_RK)
        self._logit_RK, self._total_R = to_host(logits_RV.gather(1, candidate_RK.clamp_min(0))), to_host(total_R1[:, 0])
        self._top_id_RL, self._top_logprob_RL = to_host(top.indices), to_host(top.values - total_R1)

    def read(self, counts: Items[tuple[int, int]]) -> list[TokenScores]:
        """Returns one entry for each row, with its first candidates and likeliest tokens. The step must have ended.

        counts: of each row, how many candidates and how many of the likeliest tokens
        """
        columns = (self._candidate_RK, self._logit_RK, self._total_R, self._top_id_RL, self._top_logprob_RL)
        return [
            TokenScores(
                tuple(ids[:k]), tuple(logits[:k]), total, tuple(zip(top[:num_top], values[:num_top], strict=True))
            )
            for ids, logits, total, top, values, (k, num_top) in zip(
                *(column.tolist() for column in columns), counts, strict=True
            )
        ]


def read_drawn(step: Step, drawn: Scores | None) -> list[TokenLogprob | None]:
    """Returns the log-probability of each draw of a step that has ended; None for a draw that requests none."""
    if drawn is None:
        return [None] * step.num_draws
    counts = [draw.sequence.params.logprobs for draw in step.draws]
    found = iter(drawn.read([(1, count) for count in counts if count is not None]))
    return [None if count is None else next(found).of_first() for count in counts]


def targets_of(step: Step) -> NDArray[np.int64]:
    """Returns the candidates [R, K] of all scored places of a step; those of a place that has fewer are repeated."""
    most = max(scored.places.candidate_PK.shape[1] for scored in step.scored)
    rows = [scored.places.candidate_PK[scored.first : scored.stop] for scored in step.scored]
    return np.concatenate([np.pad(row, ((0, 0), (0, most - row.shape[1])), mode="edge") for row in rows])


def read_scores(step: Step, parts: Items[Scores]) -> list[list[TokenScores]]:
    """Returns one list for each entry of `step.scored`, from the parts in which its rows were computed."""
    counts = [
        (scored.places.candidate_PK.shape[1], scored.places.num_top)
        for scored in step.scored
        for _ in range(scored.num_places)
    ]
    flat: list[TokenScores] = []
    for part in parts:
        flat += part.read(counts[len(flat) : len(flat) + part.num_rows])
    rest = iter(flat)
    return [[next(rest) for _ in range(scored.num_places)] for scored in step.scored]

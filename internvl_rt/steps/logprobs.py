"""Computes log-probabilities of tokens on the device; the host reads them when the step has ended."""

from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from internvl_rt.steps.device_stream import to_host
from internvl_rt.steps.step import Step


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log-probability before penalties and temperature, and the likeliest tokens in its place."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # token ids with their log-probabilities, the likeliest first


class Logprobs:
    """Computes log-probabilities of target tokens and of the likeliest tokens, and copies them to the host."""

    def __init__(self, logits_RV: Tensor, target_R: Tensor, num_top: int) -> None:
        """num_top: how many of the likeliest tokens `read` can return for a target, at most.

        All log-probabilities of a row that is not finite are NaN. A target may be -1 in such a row.
        """
        logits_RV = logits_RV.float()
        total_R1 = logits_RV.logsumexp(-1, keepdim=True)
        total_R1 = total_R1.masked_fill(~total_R1.isfinite(), torch.nan)
        top = logits_RV.topk(min(num_top, logits_RV.shape[1]), dim=-1)
        self.num_tokens = len(target_R)
        self._target_R = to_host(target_R)
        self._logprob_R = to_host((logits_RV.gather(1, target_R.clamp_min(0)[:, None]) - total_R1)[:, 0])
        self._top_id_RK, self._top_logprob_RK = to_host(top.indices), to_host(top.values - total_R1)

    def read(self, num_top_R: list[int]) -> list[TokenLogprob]:
        """Returns one entry for each target, with its `num_top_R` likeliest tokens. The step must have ended."""
        columns = (self._target_R, self._logprob_R, self._top_id_RK, self._top_logprob_RK)
        return [
            TokenLogprob(token_id, logprob, tuple(zip(ids[:count], logprobs[:count], strict=True)))
            for token_id, logprob, ids, logprobs, count in zip(*(c.tolist() for c in columns), num_top_R, strict=True)
        ]


def read_drawn(step: Step, drawn: Logprobs | None) -> list[TokenLogprob | None]:
    """Returns the log-probability of each draw of a step that has ended; None for a draw that requests none."""
    if drawn is None:
        return [None] * step.num_draws
    counts = [draw.sequence.params.logprobs for draw in step.draws]
    found = iter(drawn.read([count for count in counts if count is not None]))
    return [None if count is None else next(found) for count in counts]


def read_scores(step: Step, parts: Items[Logprobs]) -> list[list[TokenLogprob]]:
    """Returns one list for each scored span of a prompt, from the parts in which its rows were computed."""
    if not step.scored:
        return []
    tops = [span.sequence.params.prompt_logprobs or 0 for span in step.scored for _ in range(span.num_tokens)]
    flat: list[TokenLogprob] = []
    for part in parts:
        flat += part.read(tops[len(flat) : len(flat) + part.num_tokens])
    rest = iter(flat)
    return [[next(rest) for _ in range(span.num_tokens)] for span in step.scored]

"""Logits to token ids. A row's result depends on its own logits, parameters and seed, never on its neighbours."""

import numpy as np
import torch
from torch import Tensor

from internvl_rt.sequence import SamplingParams, Sequence


def sample(logits_RV: Tensor, sequences: list[Sequence]) -> list[int]:
    """One token id per row; `sequences[r]` says how row r is drawn."""
    logits_RV = logits_RV.float()
    greedy: list[int] = logits_RV.argmax(-1).tolist()
    return [
        token if _is_plain_greedy(sequence) else _sample_row(logits_RV[row].clone(), sequence)
        for row, (token, sequence) in enumerate(zip(greedy, sequences, strict=True))
    ]


def _is_plain_greedy(sequence: Sequence) -> bool:
    p = sequence.params
    unchanged = p.repetition_penalty == 1 and p.presence_penalty == 0 and p.frequency_penalty == 0
    return p.temperature == 0 and unchanged and sequence.num_generated >= p.min_tokens


def _sample_row(logits_V: Tensor, sequence: Sequence) -> int:
    params = sequence.params
    _penalise(logits_V, sequence.generated_ids, params)
    if sequence.num_generated < params.min_tokens and sequence.stop_ids:
        logits_V[list(sequence.stop_ids)] = -torch.inf
    if params.temperature == 0:
        return int(logits_V.argmax())
    # float64 and a stable sort: which tokens are kept does not hinge on rounding, ties go to the lower id
    probs_V, id_V = torch.sort(torch.softmax(logits_V.double() / params.temperature, -1), descending=True, stable=True)
    kept = min(params.top_k or len(probs_V), len(probs_V))
    probs_V = probs_V[:kept] / probs_V[:kept].sum()
    before_V = probs_V.cumsum(-1) - probs_V
    probs_V = probs_V[(before_V < params.top_p) & (probs_V >= params.min_p * probs_V[0])]
    total_V = probs_V.cumsum(-1)
    place = torch.searchsorted(total_V, _uniform(sequence.seed, sequence.num_generated) * total_V[-1], right=True)
    return int(id_V[min(int(place), len(probs_V) - 1)])


def _penalise(logits_V: Tensor, generated_ids: list[int], params: SamplingParams) -> None:
    if not generated_ids:
        return
    token_ids, counts = np.unique(np.array(generated_ids), return_counts=True)
    index = torch.from_numpy(token_ids).to(logits_V.device)
    count = torch.from_numpy(counts).to(logits_V)
    seen = logits_V[index]
    seen = torch.where(seen > 0, seen / params.repetition_penalty, seen * params.repetition_penalty)
    logits_V[index] = seen - params.presence_penalty - params.frequency_penalty * count


def _uniform(seed: int, index: int) -> float:
    """The draw for the index-th token of a seed, in [0, 1): counter-based, so it needs no state."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=index)).random())


def derive_seed(engine_seed: int, request_number: int) -> int:
    """The seed of a request that brings none."""
    return int(np.random.SeedSequence((engine_seed, request_number)).generate_state(1, np.uint64)[0])

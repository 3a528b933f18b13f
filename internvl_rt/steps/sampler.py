"""Arguments of a step's draws, as arrays for the device. A draw depends on its logits, parameters, seed and counter."""

from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence as Items
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from internvl_rt.model.step_inputs import Sampling
from internvl_rt.steps.device_stream import host_memory, to_device
from internvl_rt.steps.sequence import Bias, Sequence
from internvl_rt.steps.step import Draw

_NAMES = ("seed_R", "counter_R", *Sampling._fields[:-2])  # the order in memory: the wider numbers first
assert set(_NAMES) == set(Sampling._fields)
WORDS_PER_ROW = 11  # seed and counter two each, temperature, top_k, top_p, min_p, three penalties


class Sampler:
    """Builds the arguments of `Ops.sample`; one copy brings them to the device.

    From one decode step to the next only the counters change, so the other arguments are kept.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seq_ids: list[int] = []  # of the sequences whose arguments `_flat` holds
        self._flat = torch.empty(0, dtype=torch.int32)

    def build(self, draws: Items[Draw]) -> Sampling:
        """Returns one row for each draw."""
        seq_ids = [sequence.seq_id for sequence, _, _ in draws]
        lists = [_listed(draw) if draw.sequence.lists_tokens else {} for draw in draws]
        num_rows, num_listed = len(draws), sum(map(len, lists))
        if num_listed or seq_ids != self._seq_ids:
            filled = torch.empty(num_rows * WORDS_PER_ROW + num_rows + 1 + 2 * num_listed, dtype=torch.int32)
            views = _on_host(_split(filled, num_rows, num_listed))
            _fill(views, [sequence for sequence, _, _ in draws], lists)
            self._flat, self._seq_ids = filled, [] if num_listed else seq_ids
        flat = host_memory(len(self._flat), torch.int32, self._device)
        flat.copy_(self._flat)
        sampling = _split(flat, num_rows, num_listed)
        sampling.counter_R.numpy()[:] = [counter for _, _, counter in draws]
        if self._device.type == "cpu":
            return sampling
        return _split(flat.to(self._device, non_blocking=True), num_rows, num_listed)


class UnlistedArguments:
    """The arguments of draws that list no tokens, in host memory that one copy brings to the device.

    They lie at fixed places, so a CUDA graph can read them: `num_rows` rows; rows after those of the draws are greedy.
    """

    def __init__(self, flat: Tensor, num_rows: int) -> None:
        """flat: int32 [unlisted_words(num_rows)] on the host, which nobody else writes."""
        self._flat, self._views = flat, _on_host(wrap_unlisted(flat, num_rows))
        self._seq_id_R: NDArray[np.int32] | None = None  # of the sequences whose arguments the memory holds

    def fill(
        self, sequences: Items[Sequence], seq_id_R: NDArray[np.int32], counter_R: NDArray[np.int64] | list[int]
    ) -> None:
        """Writes the arguments of draws for these sequences; the counters alone, if `seq_id_R` is the last call's."""
        num_draws = len(sequences)
        if seq_id_R is not self._seq_id_R:
            self._seq_id_R = None  # until all is written, since an interrupt may come before that
            self._flat.zero_()
            ends = {"listed_start_R1": num_draws + 1}
            if sequences:
                views = {name: view[: ends.get(name, num_draws)] for name, view in self._views.items()}
                _fill(views, sequences, [{} for _ in sequences])
            self._seq_id_R = seq_id_R
        self._views["counter_R"][:num_draws] = counter_R


def listing_sampling(device: torch.device) -> Sampling:
    """Returns the arguments of one greedy draw that lists token 0, for a kernel that is run to be built."""
    flat = torch.zeros(WORDS_PER_ROW + 4, dtype=torch.int32)
    sampling = _split(flat, 1, 1)
    sampling.listed_start_R1[1] = sampling.listed_count[0] = 1
    sampling.penalty_R3[0, 0] = 1.0
    return _split(flat.to(device), 1, 1)


def unlisted_words(num_rows: int) -> int:
    """Returns the length of UnlistedArguments in words of 32 bits; a multiple of 16 bytes."""
    return -(-(num_rows * WORDS_PER_ROW + num_rows + 1) // 4) * 4


def wrap_unlisted(flat: Tensor, num_rows: int) -> Sampling:
    """Returns what UnlistedArguments wrote, in its memory or a copy of that."""
    return _split(flat[: num_rows * WORDS_PER_ROW + num_rows + 1], num_rows, 0)


def _split(flat: Tensor, num_rows: int, num_listed: int) -> Sampling:
    """Splits int32 memory into arguments, by one call: every slice of a tensor takes a microsecond."""
    sizes = [2 * num_rows] * 2 + [num_rows] * 4 + [3 * num_rows, num_rows + 1, num_listed, num_listed]
    found = dict(zip(_NAMES, torch.split(flat, sizes), strict=True))
    for name in ("seed_R", "counter_R"):  # the first in memory, so that they are aligned
        found[name] = found[name].view(torch.int64)
    for name in ("temperature_R", "top_p_R", "min_p_R", "penalty_R3"):
        found[name] = found[name].view(torch.float32)
    found["penalty_R3"] = found["penalty_R3"].reshape(num_rows, 3)
    return Sampling(**found)


def _on_host(sampling: Sampling) -> dict[str, NDArray[Any]]:
    return {name: tensor.numpy() for name, tensor in sampling._asdict().items()}


def _fill(out: dict[str, NDArray[Any]], sequences: Items[Sequence], lists: list[dict[int, int]]) -> None:
    """Fills all arrays but the counters."""
    params = [sequence.params for sequence in sequences]
    out["seed_R"].view(np.uint64)[:] = [sequence.seed for sequence in sequences]
    for name in ("temperature", "top_k", "top_p", "min_p"):
        out[f"{name}_R"][:] = [getattr(each, name) for each in params]
    out["penalty_R3"][:] = [(p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for p in params]
    out["listed_start_R1"][:] = [0, *accumulate(map(len, lists))]
    out["listed_id"][:] = [token_id for each in lists for token_id in each]
    out["listed_count"][:] = [count for each in lists for count in each.values()]


def _listed(draw: Draw) -> dict[int, int]:
    """Returns the tokens that penalties act on, with how often each was generated; -1 forbids a token."""
    sequence = draw.sequence
    listed: dict[int, int] = Counter(sequence.generated_ids) if sequence.params.has_penalties else {}
    is_complete = sequence.matcher is not None and sequence.matcher.is_complete  # then only a stop token may follow
    if draw.counter < sequence.params.min_tokens and not is_complete:
        listed |= dict.fromkeys(sequence.stop_ids, -1)
    return listed


def add_biases(logits_RV: Tensor, biases: Mapping[int, Bias]) -> None:
    """Adds to the logits of some tokens of some rows, given by the row's index. A sum has the logits' dtype."""
    rows = np.repeat([*biases], [len(bias.token_id_B) for bias in biases.values()])
    token_ids = np.concatenate([bias.token_id_B for bias in biases.values()])
    values = np.concatenate([bias.value_B for bias in biases.values()])
    row_N, token_id_N = to_device(torch.from_numpy(np.stack([rows, token_ids])), logits_RV.device)
    value_N = to_device(torch.from_numpy(values), logits_RV.device)
    logits_RV[row_N, token_id_N] = (logits_RV[row_N, token_id_N] + value_N).to(logits_RV.dtype)


def forbid(logits_RV: Tensor, rows: Items[int], mask_RW: np.ndarray) -> None:
    """Sets to -inf, in some rows of logits, every token t whose bit, t % 32 of word t // 32, is not set.

    NaN and +inf stay, so that the draw notices them.
    """
    mask = to_device(torch.from_numpy(mask_RW), logits_RV.device)
    bits = torch.arange(32, dtype=torch.int32, device=logits_RV.device)
    allowed = (mask[:, :, None] >> bits & 1).flatten(1)[:, : logits_RV.shape[1]].bool()
    index = to_device(torch.tensor(rows), logits_RV.device)
    raw_RV = logits_RV[index]
    logits_RV[index] = raw_RV.masked_fill(~allowed & (raw_RV < torch.inf), -torch.inf)


def derive_seed(seed: int, number: int) -> int:
    """Derives the seed of an engine's request `number`, or of a request's answer `number`."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0])

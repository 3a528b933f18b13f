"""Arguments of a step's draws, as arrays for the device. A draw depends on its logits, parameters, seed and index."""

from collections import Counter
from collections.abc import Sequence as Items
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from internvl_rt.model.step_inputs import Sampling
from internvl_rt.steps.device_stream import host_memory, to_device
from internvl_rt.steps.sequence import Sequence
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
        self._sequences: list[Sequence] = []  # the sequences whose arguments `_flat` holds
        self._flat = np.empty(0, np.int32)

    def build(self, draws: Items[Draw]) -> Sampling:
        """Returns one row for each draw."""
        sequences = [draw.sequence for draw in draws]
        lists = [_listed(draw) if draw.sequence.lists_tokens else {} for draw in draws]
        num_rows, num_listed = len(draws), sum(map(len, lists))
        if num_listed or sequences != self._sequences:
            self._flat = np.empty(num_rows * WORDS_PER_ROW + num_rows + 1 + 2 * num_listed, np.int32)
            _fill(_views(self._flat, num_rows, num_listed, np.int64, np.float32), sequences, lists)
            self._sequences = [] if num_listed else sequences
        flat = host_memory(len(self._flat), torch.int32, self._device)
        flat.numpy()[:] = self._flat
        views = _views(flat, num_rows, num_listed, torch.int64, torch.float32)
        views["counter_R"].numpy()[:] = [draw.place for draw in draws]
        if self._device.type != "cpu":
            on_device = flat.to(self._device, non_blocking=True)
            views = _views(on_device, num_rows, num_listed, torch.int64, torch.float32)
        return Sampling(**views)


class PlainArguments:
    """The arguments of draws that list no tokens, in host memory that one copy brings to the device.

    They lie at fixed places, so a CUDA graph can read them: `num_rows` rows; rows after those of the draws are greedy.
    """

    def __init__(self, flat: NDArray[np.int32], num_rows: int) -> None:
        """flat: [plain_words(num_rows)]."""
        self._flat, self._views = flat, _plain_views(flat, num_rows, np.int64, np.float32)
        self._sequences: list[Sequence] | None = None  # the sequences whose arguments the memory holds

    def forget(self) -> None:
        """Must be called when something else has been written to the memory."""
        self._sequences = None

    def fill(self, draws: Items[Draw]) -> None:
        sequences, num_draws = [draw.sequence for draw in draws], len(draws)
        if sequences != self._sequences:
            self._flat[:] = 0
            ends = {"listed_start_R1": num_draws + 1}
            if draws:
                _fill({n: v[: ends.get(n, num_draws)] for n, v in self._views.items()}, sequences, [{} for _ in draws])
            self._sequences = sequences
        self._views["counter_R"][:num_draws] = [draw.place for draw in draws]


def plain_words(num_rows: int) -> int:
    """Returns the length of PlainArguments in words of 32 bits; a multiple of 16 bytes."""
    return -(-(num_rows * WORDS_PER_ROW + num_rows + 1) // 4) * 4


def wrap_plain(flat: Tensor, num_rows: int) -> Sampling:
    """Wraps what PlainArguments wrote, in a copy `flat` of its memory."""
    return Sampling(**_plain_views(flat, num_rows, torch.int64, torch.float32))


def _plain_views(flat: Any, num_rows: int, int64: Any, float32: Any) -> dict[str, Any]:
    return _views(flat[: num_rows * WORDS_PER_ROW + num_rows + 1], num_rows, 0, int64, float32)


def _views(flat: Any, num_rows: int, num_listed: int, int64: Any, float32: Any) -> dict[str, Any]:
    """Splits `flat` into arrays.

    int64, float32: those types of numpy or torch. 64-bit arrays come first, so that they are aligned.
    """
    sizes = [2 * num_rows] * 2 + [num_rows] * 4 + [3 * num_rows, num_rows + 1, num_listed, num_listed]
    is_tensor = isinstance(flat, Tensor)  # one split is faster: every slice of a tensor takes a microsecond
    parts: Any = torch.split(flat, sizes) if is_tensor else np.split(flat, list(accumulate(sizes))[:-1])
    found = dict(zip(_NAMES, parts, strict=True))
    for name in ("seed_R", "counter_R"):
        found[name] = found[name].view(int64)
    for name in ("temperature_R", "top_p_R", "min_p_R", "penalty_R3"):
        found[name] = found[name].view(float32)
    found["penalty_R3"] = found["penalty_R3"].reshape(num_rows, 3)
    return found


def _fill(out: dict[str, np.ndarray], sequences: Items[Sequence], lists: list[dict[int, int]]) -> None:
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
    if draw.place < sequence.params.min_tokens and not is_complete:
        listed |= dict.fromkeys(sequence.stop_ids, -1)
    return listed


def forbid(logits_RV: Tensor, rows: Items[int], mask_RW: np.ndarray) -> None:
    """Sets to -inf, in some rows of logits, every token t whose bit, t % 32 of word t // 32, is not set."""
    mask = to_device(torch.from_numpy(mask_RW), logits_RV.device)
    bits = torch.arange(32, dtype=torch.int32, device=logits_RV.device)
    allowed = (mask[:, :, None] >> bits & 1).flatten(1)[:, : logits_RV.shape[1]].bool()
    index = to_device(torch.tensor(rows), logits_RV.device)
    logits_RV[index] = logits_RV[index].masked_fill(~allowed, -torch.inf)


def derive_seed(seed: int, number: int) -> int:
    """Derives the seed of an engine's request `number`, or of a request's answer `number`."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0])

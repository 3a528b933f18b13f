"""One step's plan and inputs, as frozen values: nothing about a step travels any other way.

All numbers that the host decides lie in one flat int32 array, so that one copy brings a step to the device.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from internvl_rt.inputs.places import Places
from internvl_rt.model.ops import FIRST_VISUAL_ID
from internvl_rt.model.step_inputs import Batch, StepInputs
from internvl_rt.steps.decodes import Decodes
from internvl_rt.steps.device_stream import host_memory
from internvl_rt.steps.kv_cache import WINDOW_ARRAYS, KVCache
from internvl_rt.steps.sequence import Sequence


class Chunk(NamedTuple):
    """Tokens [start, stop) of a sequence, computed in one step; the last ones are its draft tokens."""

    sequence: Sequence
    start: int
    stop: int
    drafts: tuple[int, ...] = ()


class Draw(NamedTuple):
    """A token to be drawn for a sequence, from a row of the step's logits."""

    sequence: Sequence
    row: int
    counter: int  # how many tokens the sequence has generated before this one


@dataclass(frozen=True, slots=True)
class ScoredPlaces:
    """Places [first, stop) of a sequence's prompt whose scores are requested; their logits are rows of the step."""

    places: Places
    sequence: Sequence
    first: int
    stop: int

    @property
    def num_places(self) -> int:
        return self.stop - self.first


class Step(NamedTuple):
    """What runs together and the tokens that are drawn, planned before any sequence changes.

    The step's tokens are one of each sequence that decodes, then those of the chunks. The first draws are those of the
    sequences that decode, each from its own row of logits.
    """

    decodes: Decodes
    chunks: tuple[Chunk, ...]  # of the other sequences: parts of prompts, and decodes with draft tokens
    counts: tuple[int, ...]  # tokens of each chunk
    num_tokens: int  # of the chunks
    chunk_draws: tuple[Draw, ...]
    scored: tuple[ScoredPlaces, ...]
    # Indices into the chunks' tokens of those whose logits are needed: for their draws, then for the scored places.
    logit_rows: tuple[int, ...]
    num_draws: int  # of the decodes and of the chunks
    num_draw_rows: int  # rows of logits that they are drawn from
    has_prompts: bool  # some prompt tokens are computed
    is_plain: bool  # one draw from each row, no grammar, no bias, no log-probabilities

    @property
    def draw_rows(self) -> tuple[int, ...]:
        """Indices into the chunks' tokens of those that tokens are drawn after."""
        return self.logit_rows[: self.num_draw_rows - len(self.decodes)]

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """Those that the step computes tokens of."""
        return (*self.decodes.sequences, *(chunk.sequence for chunk in self.chunks))

    @property
    def draws(self) -> list[Draw]:
        """All draws, in the order of their tokens."""
        decodes = self.decodes
        rows = zip(decodes.sequences, range(len(decodes)), decodes.counter_S.tolist(), strict=True)
        return [*map(Draw._make, rows), *self.chunk_draws]


def plan_step(decodes: Decodes, chunks: Items[Chunk] = ()) -> Step:
    """Plans draws: a chunk with its sequence's last token draws the next one, and one more after each draft token.

    Siblings that wait for their prompt draw from the same row.
    """
    num_decodes = len(decodes)
    if not chunks:
        return Step(decodes, (), (), 0, (), (), (), num_decodes, num_decodes, False, decodes.is_plain)
    draws: list[Draw] = []
    scored: list[ScoredPlaces] = []
    draw_rows: list[int] = []
    scored_rows: list[int] = []
    counts: list[int] = []
    first_row = 0
    has_prompts, is_plain = False, decodes.is_plain
    for sequence, start, stop, drafts in chunks:
        if start < sequence.num_prompt:
            has_prompts = True
        if (places := sequence.places) is not None and start < sequence.num_prompt:
            first, behind = np.searchsorted(places.index_P, (start, stop)).tolist()
            if first < behind:
                scored.append(ScoredPlaces(places, sequence, first, behind))
                scored_rows += (places.index_P[first:behind] + (first_row - start)).tolist()
        counts.append(stop - start)
        first_row += stop - start
        if stop != sequence.num_tokens + len(drafts) or sequence.max_tokens == 0:
            continue
        is_plain = is_plain and sequence.is_plain and not sequence.siblings
        counter = sequence.num_tokens - sequence.num_prompt
        for ahead in range(len(drafts) + 1):
            row = num_decodes + len(draw_rows)
            draws.append(Draw(sequence, row, counter + ahead))
            draws += [Draw(sibling, row, 0) for sibling in sequence.siblings]
            draw_rows.append(first_row - len(drafts) - 1 + ahead)
    return Step(
        decodes=decodes,
        chunks=tuple(chunks),
        counts=tuple(counts),
        num_tokens=first_row,
        chunk_draws=tuple(draws),
        scored=tuple(scored),
        logit_rows=(*draw_rows, *scored_rows),
        num_draws=num_decodes + len(draws),
        num_draw_rows=num_decodes + len(draw_rows),
        has_prompts=has_prompts,
        is_plain=is_plain,
    )


@dataclass(frozen=True, slots=True)
class StepShape:
    """Sizes of a step's arrays; rows and tokens beyond those of its sequences are padding."""

    num_decodes: int
    num_chunks: int
    num_tokens: int  # of the chunks
    table_width: int
    num_items: int  # items of the plan that splits the decodes' attention; 0: no plan
    num_tables: int = 1  # of blocks, for each sequence; the second one is of layers with a window

    @property
    def sizes(self) -> tuple[int, ...]:
        """The arguments that make this shape."""
        counts = self.num_decodes, self.num_chunks, self.num_tokens
        return *counts, self.table_width, self.num_items, self.num_tables

    @property
    def size(self) -> int:
        return _layout(self)[-1][2]

    def views(self, flat: Any, float32: Any) -> dict[str, Any]:
        """Splits `flat`, int32 [size] of numpy or torch, into arrays; float32 is the type of its positions."""
        layout = _layout(self)
        if isinstance(flat, Tensor):  # one split is faster: every slice of a tensor takes a microsecond
            parts: Any = torch.split(flat, [stop - start for _, start, stop, _ in layout])
        else:
            parts = [flat[start:stop] for _, start, stop, _ in layout]
        found = {
            name: part if len(shape) == 1 else part.reshape(shape)
            for (name, _, _, shape), part in zip(layout, parts, strict=True)
        }
        found["position_T"] = found["position_T"].view(float32)
        return found


@lru_cache(maxsize=4096)
def _layout(shape: StepShape) -> list[tuple[str, int, int, tuple[int, ...]]]:
    """Returns name, start, stop and shape of each array."""
    per_token, num_rows = (shape.num_decodes + shape.num_tokens,), shape.num_decodes + shape.num_chunks
    arrays: dict[str, tuple[int, ...]] = {"token_id_T": per_token, "position_T": per_token, "slot_T": per_token}
    table = num_rows, shape.table_width
    arrays |= {"seq_len_S": (num_rows,), "block_table_SN": table}
    if shape.num_tables > 1:
        arrays |= dict(zip(WINDOW_ARRAYS, (table, per_token), strict=True))
    arrays |= {"query_start_R1": (shape.num_chunks + 1,)}
    if shape.num_items:
        arrays |= {"split_start_S1": (shape.num_decodes + 1,), "split_W3": (shape.num_items, 3)}
    stops = list(accumulate(prod(sizes) for sizes in arrays.values()))
    return [(name, stop - prod(sizes), stop, sizes) for (name, sizes), stop in zip(arrays.items(), stops, strict=True)]


def shape_of(step: Step, cache: KVCache) -> StepShape:
    """Returns the shape that a step needs, without padding."""
    num_decodes = len(step.decodes)
    longest = max([*(s.num_tokens for s in step.decodes.sequences), *(chunk.stop for chunk in step.chunks)])
    return StepShape(
        num_decodes=num_decodes,
        num_chunks=len(step.chunks),
        num_tokens=step.num_tokens,
        table_width=-(-longest // cache.block_size),
        num_items=cache.num_split_items(num_decodes) if num_decodes else 0,
        num_tables=cache.num_tables,
    )


class StepArrays:
    """A step's numbers on the host, in `flat`, int32 [shape.size]."""

    def __init__(self, shape: StepShape, flat: NDArray[np.int32]) -> None:
        found = shape.views(flat, np.float32)
        self._num_decodes = n = shape.num_decodes
        self._token_id_T, self._position_T = found["token_id_T"], found["position_T"]
        self._query_start_R1 = found["query_start_R1"]
        self._query_start_R1[:] = n
        names = "slot_T", "seq_len_S", "block_table_SN", *(WINDOW_ARRAYS if shape.num_tables > 1 else ())
        rows = {name: found[name] for name in names}
        # The arguments of PagedKVCache.fill_step, once for the decodes and once for the chunks.
        self._decodes = {name: array[:n] for name, array in rows.items()}
        self._decodes["query_start_S1"] = np.empty(n + 1, np.int32)  # it is known without this
        self._decodes |= {name: found[name] for name in ("split_start_S1", "split_W3") if name in found}
        self._chunks = {name: array[n:] for name, array in rows.items()} | {"query_start_S1": self._query_start_R1}

    def fill(self, step: Step, cache: KVCache) -> None:
        """Writes a step, and makes the block copies that it needs. The cache must have slots for the step's tokens."""
        n, decodes = self._num_decodes, step.decodes
        token_id_T, position_T = self._token_id_T, self._position_T
        cache.copy_blocks(cache.blocks.take_copies())
        if n:
            num_rows = len(decodes)
            token_id_T[:num_rows], position_T[:num_rows] = decodes.token_id_S, decodes.position_S
            if num_rows < n:
                token_id_T[num_rows:n], position_T[num_rows:n] = 0, 0
            cache.blocks.fill_step(decodes.seq_id_S, decodes.one_S, **self._decodes)
        if not step.chunks:
            return
        token, visual_id = n, FIRST_VISUAL_ID
        for (sequence, start, stop, drafts), count in zip(step.chunks, step.counts, strict=True):
            token_id_T[token : token + count] = [*sequence.token_ids[start : stop - len(drafts)], *drafts]
            position_T[token : token + count] = sequence.positions(start, stop)
            for first, last, _ in visual_parts(sequence, start, stop):
                ids = np.arange(visual_id, visual_id + last - first, dtype=np.int32)
                token_id_T[token + first - start : token + last - start] = ids
                visual_id += last - first
            token += count
        token_id_T[token:], position_T[token:] = 0, 0
        seq_id_R = np.array([chunk.sequence.seq_id for chunk in step.chunks], np.int32)
        cache.blocks.fill_step(seq_id_R, np.array(step.counts, np.int32), **self._chunks)
        self._query_start_R1 += n


def visual_parts(sequence: Sequence, start: int, stop: int) -> list[tuple[int, int, Tensor]]:
    """Returns the runs of visual tokens in [start, stop) of a sequence: first, last + 1, and their values [X, D].

    Every picture that has tokens there must be encoded (`Sequence.visual`).
    """
    found = []
    for index in sequence.pictures_within(start, stop) if sequence.visual else ():
        span = sequence.pictures[index].span
        first, last = max(start, span.start), min(stop, span.start + span.num_tokens)
        found.append((first, last, sequence.visual[index][first - span.start : last - span.start]))
    return found


def visual_of(step: Step) -> list[Tensor]:
    """Returns the visual tokens of a step in the order of their ids, which `StepArrays` writes."""
    if not step.has_prompts:
        return []
    return [part for chunk in step.chunks for _, _, part in visual_parts(chunk.sequence, chunk.start, chunk.stop)]


def scored_rows(step: Step) -> NDArray[np.int32]:
    """Returns the indices into the chunks' tokens of those whose logits are scored."""
    return np.array(step.logit_rows[len(step.draw_rows) :], np.int32) if step.scored else _NO_ROWS


_NO_ROWS = np.empty(0, np.int32)


def wrap_step(shape: StepShape, flat: Tensor, *, max_query_len: int, **rest: Any) -> StepInputs:
    """Builds StepInputs whose numbers lie in `flat` on the device; `rest` are its other fields."""
    found = shape.views(flat, torch.float32)
    per_token = {name: found.pop(name) for name in ("token_id_T", "position_T", "slot_T")}
    table_SN, window_slot_T = (found.pop(name, None) for name in WINDOW_ARRAYS)
    batch = Batch(**found, num_decodes=shape.num_decodes, max_query_len=max_query_len)
    if table_SN is not None:
        rest |= {"window_slot_T": window_slot_T, "window_batch": replace(batch, block_table_SN=table_SN)}
    return StepInputs(**per_token, batch=batch, **rest)


def empty_step(shape: StepShape, flat: Tensor, *, drawn_R: Tensor, visual_XD: Tensor | None = None) -> StepInputs:
    """Builds inputs in `flat`, int32 [shape.size] on the device, and fills them with a step without sequences.

    It has no slots, no blocks and nothing to split, so it changes nothing in a cache.
    """
    arrays = shape.views(flat.zero_(), torch.float32)
    for name in arrays.keys() & {"slot_T", "block_table_SN", "split_W3", *WINDOW_ARRAYS}:
        arrays[name].fill_(-1)
    max_query_len = max(shape.num_tokens, 1)
    return wrap_step(shape, flat, max_query_len=max_query_len, drawn_R=drawn_R, visual_XD=visual_XD)


def lay_out(step: Step, cache: KVCache, device: torch.device) -> tuple[StepShape, Tensor]:
    """Writes a step, without padding, to memory of the host that is copied to the device without waiting.

    Its pictures must be encoded, as for `visual_parts`.
    """
    shape = shape_of(step, cache)
    flat = host_memory(shape.size, torch.int32, device)
    StepArrays(shape, flat.numpy()).fill(step, cache)
    return shape, flat

"""One step's plan and inputs, as frozen values: nothing about a step travels any other way.

All numbers that the host decides lie in one flat int32 array, so that one copy brings a step to the device.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from internvl_rt.model.step_inputs import Batch, StepInputs
from internvl_rt.steps.device_stream import host_memory, to_device
from internvl_rt.steps.kv_cache import KVCache
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
class ScoredSpan:
    """Tokens [first, last] of a prompt whose log-probabilities are requested; their logits are rows of the step."""

    sequence: Sequence
    first: int
    last: int

    @property
    def num_tokens(self) -> int:
        return self.last - self.first + 1


@dataclass(frozen=True, slots=True)
class Step:
    """The chunks that run together and the tokens that are drawn, planned before any sequence changes."""

    chunks: tuple[Chunk, ...]  # chunks of one token first
    counts: tuple[int, ...]  # tokens of each chunk
    num_tokens: int
    draws: tuple[Draw, ...]
    scored: tuple[ScoredSpan, ...]
    # Indices into all chunks' tokens of those whose logits are needed: for the draws, then for the scored spans.
    logit_rows: tuple[int, ...]
    num_draw_rows: int
    has_prompts: bool  # some prompt tokens are computed
    is_plain: bool  # one draw from each row, no grammar, no log-probabilities


def plan_step(chunks: Items[Chunk]) -> Step:
    """Plans draws: a chunk with its sequence's last token draws the next one, and one more after each draft token.

    Siblings that wait for their prompt draw from the same row.
    """
    draws: list[Draw] = []
    scored: list[ScoredSpan] = []
    draw_rows: list[int] = []
    scored_rows: list[int] = []
    counts: list[int] = []
    first_row = 0
    has_prompts, is_plain = False, True
    for sequence, start, stop, drafts in chunks:
        if start < sequence.num_prompt:
            has_prompts = True
        if sequence.score_from is not None and start < sequence.num_prompt:
            first, last = max(sequence.score_from, start + 1), min(stop, sequence.num_prompt - 1)
            if first <= last:
                scored.append(ScoredSpan(sequence, first, last))
                scored_rows += range(first_row + first - 1 - start, first_row + last - start)
        counts.append(stop - start)
        first_row += stop - start
        if stop != sequence.num_tokens + len(drafts) or sequence.max_tokens == 0:
            continue
        is_plain = is_plain and sequence.is_plain and not sequence.siblings
        counter = sequence.num_tokens - sequence.num_prompt
        if not drafts and not sequence.siblings:
            draws.append(Draw(sequence, len(draw_rows), counter))
            draw_rows.append(first_row - 1)
            continue
        for ahead in range(len(drafts) + 1):
            draws.append(Draw(sequence, len(draw_rows), counter + ahead))
            draws += [Draw(sibling, len(draw_rows), 0) for sibling in sequence.siblings]
            draw_rows.append(first_row - len(drafts) - 1 + ahead)
    return Step(
        chunks=tuple(chunks),
        counts=tuple(counts),
        num_tokens=first_row,
        draws=tuple(draws),
        scored=tuple(scored),
        logit_rows=(*draw_rows, *scored_rows),
        num_draw_rows=len(draw_rows),
        has_prompts=has_prompts,
        is_plain=is_plain,
    )


@dataclass(frozen=True, slots=True)
class StepShape:
    """Sizes of a step's arrays; rows and tokens beyond those of its chunks are padding."""

    num_tokens: int
    num_rows: int
    table_width: int
    num_items: int  # items of the plan that splits attention; 0: no plan

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
    per_token, starts = (shape.num_tokens,), (shape.num_rows + 1,)
    arrays: dict[str, tuple[int, ...]] = {"token_id_T": per_token, "position_T": per_token, "slot_T": per_token}
    arrays |= {"query_start_S1": starts, "seq_len_S": (shape.num_rows,)}
    arrays |= {"block_table_SN": (shape.num_rows, shape.table_width)}
    if shape.num_items:
        arrays |= {"split_start_S1": starts, "split_W3": (shape.num_items, 3)}
    stops = list(accumulate(prod(sizes) for sizes in arrays.values()))
    return [(name, stop - prod(sizes), stop, sizes) for (name, sizes), stop in zip(arrays.items(), stops, strict=True)]


def shape_of(step: Step, cache: KVCache) -> StepShape:
    """Returns the shape that a step needs, without padding."""
    num_rows = len(step.chunks)
    return StepShape(
        num_tokens=step.num_tokens,
        num_rows=num_rows,
        table_width=-(-max([chunk.stop for chunk in step.chunks]) // cache.block_size),
        num_items=cache.num_split_items(num_rows),
    )


def fill_step(step: Step, cache: KVCache, out: Mapping[str, NDArray[Any]]) -> None:
    """Writes a step into the arrays `out` of a shape (`StepShape.views`), and makes the block copies that it needs.

    The cache must have slots for the chunks' tokens. Chunks of one token come first.
    """
    chunks, counts = step.chunks, step.counts
    num_decodes = counts.count(1)
    assert counts[:num_decodes] == (1,) * num_decodes, "chunks of one token come first"
    token_id_T, position_T = out["token_id_T"], out["position_T"]
    token_ids: list[int] = []
    positions: list[float] = []
    for sequence, index, _, _ in chunks[:num_decodes]:
        known, ahead = sequence.token_ids, index - sequence.num_prompt
        token_ids.append(known[index] if index < len(known) else -1 - sequence.unread_row)
        positions.append(sequence.next_position + ahead if ahead >= 0 else sequence.position_T[index])
    token_id_T[:num_decodes], position_T[:num_decodes] = token_ids, positions
    row = num_decodes
    for chunk, count in zip(chunks[num_decodes:], counts[num_decodes:], strict=True):
        known = chunk.sequence.token_ids[chunk.start : chunk.stop]
        unread = [-1 - chunk.sequence.unread_row] * (count - len(known) - len(chunk.drafts))
        token_id_T[row : row + count] = [*known, *unread, *chunk.drafts]
        position_T[row : row + count] = chunk.sequence.positions(chunk.start, chunk.stop)
        row += count
    token_id_T[row:] = 0
    position_T[row:] = 0
    cache.copy_blocks(cache.blocks.take_copies())
    seq_id_S = np.array([chunk.sequence.seq_id for chunk in chunks], np.int32)
    rest = {name: array for name, array in out.items() if name not in ("token_id_T", "position_T")}
    cache.blocks.fill_step(seq_id_S, np.array(counts, np.int32), **rest)


def wrap_step(shape: StepShape, flat: Tensor, *, num_decodes: int, max_query_len: int, **rest: Any) -> StepInputs:
    """Builds StepInputs whose numbers lie in `flat` on the device; `rest` are its other fields."""
    found = shape.views(flat, torch.float32)
    per_token = {name: found.pop(name) for name in ("token_id_T", "position_T", "slot_T")}
    return StepInputs(**per_token, batch=Batch(**found, num_decodes=num_decodes, max_query_len=max_query_len), **rest)


def picked_rows(step: Step, device: torch.device) -> dict[str, Any]:
    """Returns fields of StepInputs: the rows whose logits are needed, visual tokens, and the rows they go to.

    Every picture that a chunk touches must be encoded (`Sequence.visual`).
    """
    visual: list[Tensor] = []
    visual_rows: list[np.ndarray] = []
    num_tokens = 0
    for sequence, start, stop, _ in step.chunks if step.has_prompts else ():
        if sequence.visual:
            for index in sequence.pictures_within(start, stop):
                span = sequence.pictures[index].span
                first, last = max(start, span.start), min(stop, span.start + span.num_tokens)
                visual.append(sequence.visual[index][first - span.start : last - span.start])
                visual_rows.append(np.arange(first, last) - start + num_tokens)
        num_tokens += stop - start
    picks_logits = len(step.logit_rows) != step.num_tokens or bool(step.scored)
    found: dict[str, Any] = {"logit_row_R": None}
    if not visual and not picks_logits:
        return found
    logit_rows = np.array(step.logit_rows if picks_logits else (), np.int64)
    rows = np.concatenate((*visual_rows, logit_rows))
    row_on_device = to_device(torch.from_numpy(rows), device)
    num_visual = len(rows) - len(logit_rows)
    if picks_logits:
        found["logit_row_R"] = row_on_device[num_visual:]
    if visual:
        found |= {"visual_XD": torch.cat(visual), "visual_row_X": row_on_device[:num_visual]}
    return found


def build_step(step: Step, cache: KVCache, drawn_R: Tensor) -> StepInputs:
    """Builds a step's inputs, without padding. Its pictures must be encoded, as for `picked_rows`."""
    device = drawn_R.device
    shape = shape_of(step, cache)
    flat = host_memory(shape.size, torch.int32, device)
    fill_step(step, cache, shape.views(flat.numpy(), np.float32))
    return wrap_step(
        shape,
        flat.to(device, non_blocking=True),
        num_decodes=step.counts.count(1),
        max_query_len=max(step.counts),
        drawn_R=drawn_R,
        **picked_rows(step, device),
    )

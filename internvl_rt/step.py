"""One step's inputs, as one frozen value: nothing about a step travels any other way.

All numbers that the host decides lie in one flat int32 array, so that one copy brings a step to the device.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from internvl_rt.kernels.decode_attention import num_split_items
from internvl_rt.kv_cache import KVCache
from internvl_rt.ops import Batch
from internvl_rt.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, stop) of a sequence, computed in one step."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start

    @property
    def samples(self) -> bool:
        """Whether the chunk reaches the sequence's last token, so that the next one can be drawn."""
        return self.stop == len(self.sequence.token_ids)


@dataclass(frozen=True, slots=True)
class StepInputs:
    """A ragged batch: the new tokens of S sequences, one after another; prefill chunks and decodes alike."""

    token_id_T: Tensor  # int32; any id at rows that visual tokens overwrite
    position_T: Tensor  # float32 rotary positions, fractions allowed
    slot_T: Tensor  # int32, place of each token's key and value in the pool
    batch: Batch
    logit_row_R: Tensor  # int64, rows whose logits are wanted
    visual_XD: Tensor | None  # visual tokens of this step, or None
    visual_row_X: Tensor  # int64, the rows they overwrite


@dataclass(frozen=True, slots=True)
class StepShape:
    """Sizes of a step's arrays; rows and tokens beyond those of its chunks are padding."""

    num_tokens: int
    num_rows: int
    table_width: int
    num_items: int  # of the split plan; 0: none is wanted

    def _fields(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        per_token, starts = (self.num_tokens,), (self.num_rows + 1,)
        yield from (("token_id_T", per_token), ("position_T", per_token), ("slot_T", per_token))
        yield from (("query_start_S1", starts), ("seq_len_S", (self.num_rows,)))
        yield "block_table_SN", (self.num_rows, self.table_width)
        if self.num_items:
            yield from (("split_start_S1", starts), ("split_W3", (self.num_items, 3)))

    @property
    def size(self) -> int:
        return sum(int(np.prod(shape)) for _, shape in self._fields())

    def views(self, flat: Any, float32: Any) -> dict[str, Any]:
        """The arrays inside `flat`, int32 [size] of numpy or torch, whose float32 is given; positions are floats."""
        found, start = {}, 0
        for name, shape in self._fields():
            size = int(np.prod(shape))
            found[name] = flat[start : start + size].reshape(shape)
            start += size
        found["position_T"] = found["position_T"].view(float32)
        return found


def shape_of(chunks: Items[Chunk], cache: KVCache) -> StepShape:
    """What a step of these chunks needs, without padding."""
    return StepShape(
        num_tokens=sum(chunk.num_tokens for chunk in chunks),
        num_rows=len(chunks),
        table_width=max(-(-chunk.stop // cache.block_size) for chunk in chunks),
        num_items=num_split_items(len(chunks), cache.num_kv_heads, cache.num_sms) if cache.num_sms else 0,
    )


def fill_step(chunks: Items[Chunk], cache: KVCache, shape: StepShape, flat: NDArray[np.int32]) -> None:
    """Writes the step into `flat`.

    Appends the chunks' tokens to the cache's sequences and makes the block copies that this needs. Chunks of one token
    come first.
    """
    counts = [chunk.num_tokens for chunk in chunks]
    assert all(count == 1 for count in counts[: counts.count(1)]), "chunks of one token come first"
    blocks, out = cache.blocks, shape.views(flat, np.float32)
    seq_id_S = np.array([chunk.sequence.seq_id for chunk in chunks], np.int32)
    num_new_S = np.array(counts, np.int32)
    for chunk in chunks:
        if chunk.stop > chunk.sequence.num_prompt:  # the prompt's ids are known since admission
            generated = chunk.sequence.token_ids[max(chunk.start, chunk.sequence.num_prompt) : chunk.stop]
            blocks.extend(chunk.sequence.seq_id, np.array(generated, np.int32))
    assert blocks.append_batch(seq_id_S, num_new_S), "admission reserves room for a whole sequence"
    cache.copy_blocks(blocks.take_copies())
    token_id_T, position_T = out.pop("token_id_T"), out.pop("position_T")
    row = 0
    for chunk, count in zip(chunks, counts, strict=True):
        token_id_T[row : row + count] = chunk.sequence.token_ids[chunk.start : chunk.stop]
        position_T[row : row + count] = chunk.sequence.positions(chunk.start, chunk.stop)
        row += count
    token_id_T[row:] = 0
    position_T[row:] = 0
    blocks.fill_step(seq_id_S, num_new_S, **out)


def wrap_step(shape: StepShape, flat: Tensor, *, num_decodes: int, max_query_len: int, **rest: Any) -> StepInputs:
    """The step whose numbers lie in `flat` on the device; `rest` are the other fields of StepInputs."""
    found = shape.views(flat, torch.float32)
    per_token = {name: found.pop(name) for name in ("token_id_T", "position_T", "slot_T")}
    return StepInputs(**per_token, batch=Batch(**found, num_decodes=num_decodes, max_query_len=max_query_len), **rest)


def build_step(chunks: Items[Chunk], cache: KVCache, device: torch.device) -> StepInputs:
    """The inputs of `chunks`; every picture that a chunk touches must be encoded (`Sequence.visual`)."""
    shape = shape_of(chunks, cache)
    flat = torch.empty(shape.size, dtype=torch.int32, pin_memory=device.type == "cuda")
    fill_step(chunks, cache, shape, flat.numpy())

    visual: list[Tensor] = []
    visual_rows: list[np.ndarray] = []
    logit_rows: list[int] = []
    first_row = 0
    for chunk in chunks:
        sequence = chunk.sequence
        for index in sequence.pictures_within(chunk.start, chunk.stop):
            span = sequence.pictures[index].span
            first = max(chunk.start, span.start)
            last = min(chunk.stop, span.start + span.num_tokens)
            visual.append(sequence.visual[index][first - span.start : last - span.start])
            visual_rows.append(np.arange(first, last) - chunk.start + first_row)
        first_row += chunk.num_tokens
        if chunk.samples:
            logit_rows.append(first_row - 1)
    return wrap_step(
        shape,
        flat.to(device, non_blocking=True),
        num_decodes=sum(chunk.num_tokens == 1 for chunk in chunks),
        max_query_len=max(chunk.num_tokens for chunk in chunks),
        logit_row_R=torch.tensor(logit_rows, dtype=torch.int64).to(device),
        visual_XD=torch.cat(visual) if visual else None,
        visual_row_X=torch.from_numpy(np.concatenate(visual_rows) if visual_rows else np.empty(0, np.int64)).to(device),
    )

"""One step's inputs, as one frozen value: nothing about a step travels any other way."""

from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

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
    def samples(self) -> bool:
        """Whether the chunk reaches the sequence's last token, so that the next one can be drawn."""
        return self.stop == len(self.sequence.token_ids)


@dataclass(frozen=True, slots=True)
class StepInputs:
    """A ragged batch: the new tokens of S sequences, one after another; prefill chunks and decodes alike."""

    number: int  # of this step, as the cache counts them
    token_id_T: Tensor  # int64; any id at rows that visual tokens overwrite
    position_T: Tensor  # float32 rotary positions, fractions allowed
    slot_T: Tensor  # int32, place of each token's key and value in the pool
    batch: Batch
    logit_row_R: Tensor  # int64, rows whose logits are wanted
    visual_XD: Tensor | None  # visual tokens of this step, or None
    visual_row_X: Tensor  # int64, the rows they overwrite


def build_step(chunks: Items[Chunk], cache: KVCache, device: torch.device) -> StepInputs:
    """The inputs of `chunks`; appends their tokens to the cache's sequences and makes the block copies that this needs.

    Chunks of one token come first. Every picture that a chunk touches must be encoded (`Sequence.visual`).
    """
    counts = [chunk.stop - chunk.start for chunk in chunks]
    assert all(count == 1 for count in counts[: counts.count(1)]), "chunks of one token come first"
    seq_id_S = np.array([chunk.sequence.seq_id for chunk in chunks], np.int32)
    num_new_S = np.array(counts, np.int32)
    for chunk in chunks:
        if chunk.stop > chunk.sequence.num_prompt:  # the prompt's ids are known since admission
            generated = chunk.sequence.token_ids[max(chunk.start, chunk.sequence.num_prompt) : chunk.stop]
            cache.blocks.extend(chunk.sequence.seq_id, np.array(generated, np.int32))
    assert cache.blocks.append_batch(seq_id_S, num_new_S), "admission reserves room for a whole sequence"
    cache.copy_blocks(cache.blocks.take_copies())
    table_width = max(-(-chunk.stop // cache.block_size) for chunk in chunks)
    query_start_S1 = np.empty(len(chunks) + 1, np.int32)
    seq_len_S = np.empty(len(chunks), np.int32)
    block_table_SN = np.empty((len(chunks), table_width), np.int32)
    slot_T = np.empty(sum(counts), np.int32)
    number = cache.blocks.fill_step(seq_id_S, num_new_S, query_start_S1, seq_len_S, block_table_SN, slot_T)

    token_ids: list[int] = []
    visual: list[Tensor] = []
    visual_rows: list[np.ndarray] = []
    for chunk, first_row in zip(chunks, query_start_S1.tolist(), strict=False):
        sequence = chunk.sequence
        token_ids += sequence.token_ids[chunk.start : chunk.stop]
        for index in sequence.pictures_within(chunk.start, chunk.stop):
            span = sequence.pictures[index].span
            first = max(chunk.start, span.start)
            last = min(chunk.stop, span.start + span.num_tokens)
            visual.append(sequence.visual[index][first - span.start : last - span.start])
            visual_rows.append(np.arange(first, last) - chunk.start + first_row)
    positions = [chunk.sequence.positions(chunk.start, chunk.stop) for chunk in chunks]
    logit_rows = [int(query_start_S1[i + 1]) - 1 for i, chunk in enumerate(chunks) if chunk.samples]

    def to_device(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    return StepInputs(
        number=number,
        token_id_T=to_device(np.array(token_ids, np.int64)),
        position_T=to_device(np.concatenate(positions)),
        slot_T=to_device(slot_T),
        batch=Batch(
            query_start_S1=to_device(query_start_S1),
            seq_len_S=to_device(seq_len_S),
            block_table_SN=to_device(block_table_SN),
            num_decodes=counts.count(1),
            max_query_len=max(counts),
        ),
        logit_row_R=to_device(np.array(logit_rows, np.int64)),
        visual_XD=torch.cat(visual) if visual else None,
        visual_row_X=to_device(np.concatenate(visual_rows) if visual_rows else np.empty(0, np.int64)),
    )

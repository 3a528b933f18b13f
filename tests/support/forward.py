"""Computes a model's logits at every position, over a real paged cache, for the parity and golden tests."""

from collections.abc import Sequence as Items
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from internvl_rt.inputs.picture import Picture
from internvl_rt.inputs.prompt import VisualSpan
from internvl_rt.inputs.sampling_params import SamplingParams
from internvl_rt.kernels._split_plan import num_split_items
from internvl_rt.model.internvl import InternVL
from internvl_rt.model.ops import Ops
from internvl_rt.model.vision import encode_tiles
from internvl_rt.steps.decodes import NO_DECODES, Decodes
from internvl_rt.steps.kv_cache import KVCache
from internvl_rt.steps.sequence import Sequence
from internvl_rt.steps.step import Chunk, Step, lay_out, plan_step, visual_of, wrap_step


@torch.inference_mode()
def last_hidden_state(model: InternVL, tiles: Tensor) -> Tensor:
    """Returns the ViT features [I, U, E], class token first, of tiles as `InternVL.encode_tiles` takes them."""
    x_RE = encode_tiles(model.ops, model.config.vision, model.weights.vision, tiles)
    patches_RE, class_IE = x_RE[: -len(tiles)], x_RE[-len(tiles) :]
    return torch.cat((class_IE[:, None], patches_RE.unflatten(0, (len(tiles), -1))), dim=1)


@torch.inference_mode()
def all_logits(
    model: InternVL,
    token_ids: Items[int],
    tiles: Tensor | None,
    *,
    context_id: int,
    position_T: np.ndarray | None = None,
    chunk_lens: Items[int] | None = None,
    block_size: int = 16,
    after: Items[int] = (),
    kv_dtype: torch.dtype | None = None,
) -> Tensor:
    """Computes the logits [T, V] of one sequence, in chunks of `chunk_lens` tokens (by default all at once).

    tiles: the tiles of all pictures, in order; their visual tokens replace the first `context_id`s in `token_ids`.
    position_T: the float32 rotary positions, 0, 1, 2, ... by default.
    after: a sequence with the same pictures that is computed in the same cache first. The prefix that both share is
    read from the cache, and its tokens have no logits.
    kv_dtype: of keys and values in the cache, by default the model's.
    """
    cache = KVCache(
        model.part,
        num_blocks=((len(after) + len(token_ids)) // block_size + 2) * model.part.num_tables,
        block_size=block_size,
        dtype=kv_dtype or model.dtype,
        device=model.device,
        ops=_of_few_items(model.ops),
    )
    if after:
        first = _build_sequence(model, 0, after, tiles, context_id, None)
        assert cache.admit(first) == 0
        _compute(model, cache, first, [0, len(after)])
        cache.publish([(first, len(after))])
        cache.end_step(cache.blocks.num_steps)
    sequence = _build_sequence(model, 1, token_ids, tiles, context_id, position_T)
    num_cached = cache.admit(sequence)
    assert num_cached is not None
    assert (num_cached > 0) == bool(after)
    places = [num_cached, *(num_cached + np.cumsum(chunk_lens or [len(token_ids) - num_cached])).tolist()]
    assert places[-1] == len(token_ids)
    return _compute(model, cache, sequence, places)


def _of_few_items(ops: Ops) -> Ops:
    """Makes split plans short, as on a small GPU, because the interpreter runs their items one after another."""
    return replace(ops, num_split_items=partial(num_split_items, num_sms=8)) if ops.num_split_items(1, 1) else ops


def _build_sequence(
    model: InternVL,
    seq_id: int,
    token_ids: Items[int],
    tiles: Tensor | None,
    context_id: int,
    position_T: np.ndarray | None,
) -> Sequence:
    spans = _find_spans(token_ids, context_id, 0 if tiles is None else len(tiles) * model.config.tokens_per_tile)
    counts = [span.num_tokens // model.config.tokens_per_tile for span in spans]
    parts = [] if tiles is None else list(torch.split(tiles, counts))
    sequence = Sequence(
        seq_id=seq_id,
        token_ids=list(token_ids),
        position_T=np.arange(len(token_ids), dtype=np.float32) if position_T is None else position_T,
        next_position=0,
        pictures=tuple(
            Picture(bytes(32), len(part), tiles=part, span=span) for span, part in zip(spans, parts, strict=True)
        ),
        params=SamplingParams(),
        max_tokens=1,
        stop_ids=frozenset(),
        seed=0,
        identity=bytes(32),
    )
    sequence.visual = {index: model.encode_tiles(part).flatten(0, 1) for index, part in enumerate(parts)}
    return sequence


def _compute(model: InternVL, cache: KVCache, sequence: Sequence, places: Items[int]) -> Tensor:
    """Computes the logits of the tokens from `places[0]` to `places[-1]`, one step between two neighbouring places."""
    logits = []
    for start, stop in pairwise(places):
        assert cache.append([sequence.seq_id], [stop - start])
        if stop == start + 1:
            step = plan_step(_decode(sequence, start))
        else:
            step = plan_step(NO_DECODES, [Chunk(sequence, start, stop)])
        logits.append(run_step(model, step, cache))
    return torch.cat(logits)


def run_step(model: InternVL, step: Step, cache: KVCache) -> Tensor:
    """Returns the logits of all tokens of a step, those of the decodes first."""
    shape, flat = lay_out(step, cache, model.device)
    visual = visual_of(step)
    inputs = wrap_step(
        shape,
        flat.to(model.device),
        max_query_len=max(step.counts, default=1),
        drawn_R=torch.zeros(1, dtype=torch.int64, device=model.device),
        visual_XD=torch.cat(visual) if visual else None,
    )
    return model.logits(model.run_step(inputs, cache.pool.layers))


def _decode(sequence: Sequence, index: int) -> Decodes:
    """Returns rows that compute the token at `index`, which is not visual, as if it had just been drawn."""
    return Decodes(
        sequences=(sequence,),
        seq_id_S=np.array([sequence.seq_id], np.int32),
        one_S=np.ones(1, np.int32),
        token_id_S=np.array([sequence.token_ids[index]], np.int32),
        position_S=sequence.position_T[index : index + 1],
        counter_S=np.zeros(1, np.int64),
        num_context=index + 1,
        num_repeats=0,
        is_plain=True,
        lists_tokens=False,
    )


def _find_spans(token_ids: Items[int], context_id: int, num_visual: int) -> list[VisualSpan]:
    """Returns the runs of consecutive placeholders, one run for each picture, among the first `num_visual`."""
    rows = np.flatnonzero(np.array(token_ids) == context_id)[:num_visual]
    runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
    return [VisualSpan(int(run[0]), len(run)) for run in runs if len(run)]

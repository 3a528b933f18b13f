"""Where the values of stored tensors belong: a plan that cuts every parameter into rows without overlap or gap.

So weights are complete exactly if every planned tensor is there.
"""

from collections.abc import Iterable
from itertools import accumulate
from typing import NamedTuple

import torch

from internvl_rt.checkpoint.config import DecoderConfig, ModelConfig
from internvl_rt.model.dialects import GROUPED, Dialect, find_names
from internvl_rt.model.internvl import build_weights, named_parameters
from internvl_rt.model.shard import Shard, cut_of


class Placement(NamedTuple):
    """Rows [start, stop) of a parameter, and the part of a stored tensor that fills them.

    rows, columns: they count in the stored tensor as a matrix, whose columns are its last dimension; by default all.
    """

    parameter: str
    start: int
    stop: int
    rows: slice = slice(None)
    columns: slice = slice(None)


class PlannedTensor(NamedTuple):
    """A tensor that a checkpoint must hold: its shape there, and where its values belong."""

    shape: tuple[int, ...]
    placements: tuple[Placement, ...]


def plan_tensors(config: ModelConfig, dialect: Dialect) -> dict[str, PlannedTensor]:
    """Lists every tensor that a checkpoint in this dialect must hold, by name."""
    v, d, table = config.vision, config.decoder, dialect.table()
    shapes_in_file = {
        "vision.class_E": (1, 1, v.hidden_size),
        "vision.position_UE": (1, 1 + v.num_patches, v.hidden_size),
        "vision.patch.weight_NK": (v.hidden_size, 3, v.patch_size, v.patch_size),
    }
    plan = {}
    for path, parameter in named_parameters(build_weights(config, dtype=torch.bfloat16, device="meta")).items():
        num_rows = len(parameter)
        pattern, names = find_names(table, path)
        if pattern.endswith(GROUPED):
            (name,) = names
            plan[name] = PlannedTensor(tuple(parameter.shape), _place_heads(path, d))
            continue
        sizes = [num_rows // len(names)] * len(names)
        if len(names) == 3:  # q, k and v
            kv_rows = v.hidden_size if path.startswith("vision.") else d.num_kv_heads * d.head_dim
            sizes = [num_rows - 2 * kv_rows, kv_rows, kv_rows]
        for name, size, stop in zip(names, sizes, accumulate(sizes), strict=True):
            shape = shapes_in_file.get(path, (size, *parameter.shape[1:]))
            plan[name] = PlannedTensor(shape, (Placement(path, stop - size, stop),))
    return plan


def _place_heads(parameter: str, c: DecoderConfig) -> tuple[Placement, ...]:
    """Says where rows of a tensor that is grouped by key/value head belong in a parameter of all q, all k, all v."""
    placements, stored = [], 0
    for group in range(c.num_kv_heads):
        for first, heads in ((0, c.num_heads // c.num_kv_heads), (c.num_heads, 1), (c.num_heads + c.num_kv_heads, 1)):
            start, size = (first + group * heads) * c.head_dim, heads * c.head_dim
            placements.append(Placement(parameter, start, start + size, slice(stored, stored + size)))
            stored += size
    return tuple(placements)


def cut_placements(
    placements: Iterable[Placement], config: DecoderConfig, shard: Shard, *, is_vector: bool = False
) -> list[Placement]:
    """Returns where what a rank has of a stored tensor belongs in the rank's parameters.

    config: of the whole decoder. is_vector: whether the tensor is one, whose only row the parameter's rows are in
    """
    found = []
    for place in placements:
        cut = cut_of(place.parameter, config, shard)
        if cut is None:
            found.append(place)
            continue
        rank_start = 0  # of these rows in the rank's parameter
        for rows in cut.rows:
            start, stop = max(rows.start, place.start), min(rows.stop, place.stop)
            if start < stop:
                part = slice(start - place.start, stop - place.start)
                ours = rank_start + start - rows.start
                taken = (
                    (place.rows, _within(place.columns, part))
                    if is_vector
                    else (_within(place.rows, part), _within(place.columns, cut.columns))
                )
                found.append(Placement(place.parameter, ours, ours + stop - start, *taken))
            rank_start += rows.stop - rows.start
    return found


def _within(outer: slice, inner: slice) -> slice:
    """Returns where a slice of a slice lies."""
    if inner == slice(None):
        return outer
    return slice((outer.start or 0) + inner.start, (outer.start or 0) + inner.stop)

"""Where the values of stored tensors belong: a plan that cuts every parameter into rows without overlap or gap.

So weights are complete exactly if every planned tensor is there.
"""

import math
from collections.abc import Iterable
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from internvl_rt.checkpoint.config import DecoderConfig, ModelConfig
from internvl_rt.checkpoint.folder import Checkpoint
from internvl_rt.model.dialects import GROUPED, Dialect, find_names
from internvl_rt.model.internvl import build_weights, is_of_experts, named_parameters
from internvl_rt.model.shard import Shard, cut_of

# Numbers in 4 bits, two in a byte, low bits first, which share the exponent of a power of two; by the OCP Microscaling
# Formats (MX) Specification.
MXFP4_END, MXFP4_GROUP, _MXFP4_BIAS = "_blocks", 32, 127
_MXFP4_NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class Placement(NamedTuple):
    """Rows [start, stop) of a parameter, and the part of a stored tensor that fills them.

    rows, columns: they count in the stored tensor as a matrix, whose columns are its last dimension; by default all.
        Columns may have a step. In MXFP4 they count numbers, and rows may have one.
    transposed: whether the parameter's rows are columns there, as those of every vector are
    """

    parameter: str
    start: int
    stop: int
    rows: slice = slice(None)
    columns: slice = slice(None)
    transposed: bool = False


class PlannedTensor(NamedTuple):
    """A tensor that a checkpoint must hold: its shape there, and where its values belong."""

    shape: tuple[int, ...]
    placements: tuple[Placement, ...]


def plan_tensors(config: ModelConfig, dialect: Dialect) -> dict[str, PlannedTensor]:
    """Lists every tensor that a checkpoint in this dialect must hold, by name."""
    v, d, table = config.vision, config.decoder, dialect.table()
    num_experts = d.experts.num_experts if d.experts else 0
    shapes_in_file = {
        "vision.class_E": (1, 1, v.hidden_size),
        "vision.position_UE": (1, 1 + v.num_patches, v.hidden_size),
        "vision.patch.weight_NK": (v.hidden_size, 3, v.patch_size, v.patch_size),
    }
    plan = {}
    for path, parameter in named_parameters(build_weights(config, dtype=torch.bfloat16, device="meta")).items():
        num_rows = len(parameter)
        pattern, names = find_names(table, path, num_experts)
        if pattern.endswith(GROUPED):
            (name,) = names
            plan[name] = PlannedTensor(tuple(parameter.shape), _place_heads(path, d))
            continue
        sizes = [num_rows // len(names)] * len(names)
        if ".qkv." in path and len(names) == 3:
            kv_rows = v.hidden_size if path.startswith("vision.") else d.num_kv_heads * d.head_dim
            sizes = [num_rows - 2 * kv_rows, kv_rows, kv_rows]
        for name, size, stop in zip(names, sizes, accumulate(sizes), strict=True):
            shape = shapes_in_file.get(path, (size, *parameter.shape[1:]))
            if dialect.experts != "apart" and is_of_experts(path.rpartition(".")[0]):
                plan[name] = _place_experts(path, parameter, num_experts, dialect)
                continue
            is_vector = len(shape) == 1
            place = Placement(path, stop - size, stop, transposed=is_vector)
            plan[name] = PlannedTensor(shape, (place,))
    return plan


def _place_experts(path: str, parameter: Tensor, num_experts: int, dialect: Dialect) -> PlannedTensor:
    """Says where the rows of a layer's experts are in one tensor that holds all of them."""
    size, *width = len(parameter) // num_experts, *parameter.shape[1:]
    if dialect.experts == "stacked":
        return PlannedTensor((num_experts, size, *width), (Placement(path, 0, len(parameter)),))
    height = width[0] if width else 1  # rows of an expert there, which are its inputs
    parts = 2 if ".all_gate_up." in path else 1  # by turns there
    if dialect.experts == "mxfp4" and width:
        each, firsts = size // parts, [(expert, part) for expert in range(num_experts) for part in range(parts)]
        starts = [(expert * size + part * each, expert * size + part, (expert + 1) * size) for expert, part in firsts]
        return PlannedTensor(
            (num_experts, size, height // MXFP4_GROUP, MXFP4_GROUP // 2),
            tuple(Placement(path, ours, ours + each, slice(first, stop, parts)) for ours, first, stop in starts),
        )
    places = tuple(
        Placement(
            path,
            (expert * parts + part) * (size // parts),
            (expert * parts + part + 1) * (size // parts),
            slice(expert * height, (expert + 1) * height),
            slice(part, size, parts) if parts > 1 else slice(None),
            transposed=True,
        )
        for expert in range(num_experts)
        for part in range(parts)
    )
    return PlannedTensor((num_experts, *width, size), places)


def _place_heads(parameter: str, c: DecoderConfig) -> tuple[Placement, ...]:
    """Says where rows of a tensor that is grouped by key/value head belong in a parameter of all q, all k, all v."""
    placements, stored = [], 0
    for group in range(c.num_kv_heads):
        for first, heads in ((0, c.num_heads // c.num_kv_heads), (c.num_heads, 1), (c.num_heads + c.num_kv_heads, 1)):
            start, size = (first + group * heads) * c.head_dim, heads * c.head_dim
            placements.append(Placement(parameter, start, start + size, slice(stored, stored + size)))
            stored += size
    return tuple(placements)


def cut_placements(placements: Iterable[Placement], config: DecoderConfig, shard: Shard) -> list[Placement]:
    """Returns where what a rank has of a stored tensor belongs in its parameters. config: of the whole decoder."""
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
                rows_there, columns_there = (cut.columns, part) if place.transposed else (part, cut.columns)
                taken = _within(place.rows, rows_there), _within(place.columns, columns_there)
                found.append(Placement(place.parameter, ours, ours + stop - start, *taken, place.transposed))
            rank_start += rows.stop - rows.start
    return found


def _within(outer: slice, inner: slice) -> slice:
    """Returns where a slice of a slice lies."""
    if inner == slice(None):
        return outer
    start, step = outer.start or 0, outer.step or 1
    return slice(start + inner.start * step, start + inner.stop * step, outer.step)


def read_placed(checkpoint: Checkpoint, name: str, place: Placement, rows: Tensor) -> None:
    """Reads what a placement says of a tensor into rows of a parameter, which lie together in memory."""
    if name.endswith(MXFP4_END):
        rows.copy_(_read_mxfp4(checkpoint, name, place.rows)[:, place.columns])
        return
    if place.columns.step is None and (not place.transposed or rows.ndim == 1):
        checkpoint.read_into(name, rows, place.rows, place.columns)
        return
    entry = checkpoint.entries[name]
    columns = range(entry.shape[-1])[place.columns]
    height = len(range(math.prod(entry.shape[:-1]))[place.rows])
    found = torch.empty(height, columns[-1] + 1 - columns[0], dtype=entry.dtype, device=rows.device)
    checkpoint.read_into(name, found, place.rows, slice(columns[0], columns[-1] + 1))
    found = found[:, :: columns.step]
    rows.copy_((found.t() if place.transposed else found).reshape(rows.shape))


def mxfp4_scales(name: str) -> str:
    """Returns the name of the exponents beside numbers in MXFP4."""
    return f"{name.removesuffix(MXFP4_END)}_scales"


def _read_mxfp4(checkpoint: Checkpoint, name: str, rows: slice) -> Tensor:
    """Reads rows of a matrix in MXFP4, whose step may leave some out, in float32. An exponent of 255 means NaN."""
    num_groups = checkpoint.entries[name].shape[-2]
    wanted = range(math.prod(checkpoint.entries[name].shape[:-2]))[rows]
    first, stop = wanted[0], wanted[-1] + 1
    byte_RGB = torch.empty(stop - first, num_groups, MXFP4_GROUP // 2, dtype=torch.uint8)
    checkpoint.read_into(name, byte_RGB, slice(first * num_groups, stop * num_groups))
    exponent_RG = torch.empty(stop - first, num_groups, dtype=torch.uint8)
    checkpoint.read_into(mxfp4_scales(name), exponent_RG, slice(first, stop))
    byte_RGB, exponent_RG = byte_RGB[:: wanted.step], exponent_RG[:: wanted.step].int()
    numbers = torch.tensor([*_MXFP4_NUMBERS, *(-number for number in _MXFP4_NUMBERS)])
    number_RGK = numbers[torch.stack((byte_RGB & 15, byte_RGB >> 4), -1).flatten(2).long()]
    made_RGK = torch.ldexp(number_RGK, exponent_RG[..., None] - _MXFP4_BIAS)
    return made_RGK.masked_fill_((exponent_RG == 255)[..., None], torch.nan).flatten(1)

"""The tensors of a rounded layer, under the names and in the rows of the checkpoint that it comes from."""

from collections.abc import Mapping
from collections.abc import Sequence as Items
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from internvl_rt.model.placement import Placement
from internvl_rt.quantize.rounding import Rounded
from internvl_rt.quantize.source import DenseSource


def tensors_of(source: DenseSource, prefix: str, layer: Any, rounded: Mapping[str, Rounded]) -> dict[str, Tensor]:
    """Returns a layer's tensors by name: modules of the rounded linears, and the others as the layer has them.

    prefix: of the paths of its parameters. layer: a DecoderLayer or a VisionLayer. rounded: by the linear's name in it
    """
    tensors: dict[str, Tensor] = {}
    for name in source.names_below(prefix):
        planned = source.plan[name]
        rows, path = _rows_of(planned.placements), planned.placements[0].parameter.removeprefix(prefix)
        linear, _, last = path.rpartition(".")
        if linear in rounded and last == "weight_NK":
            module = name.removesuffix(".weight")
            tensors |= {f"{module}.{end}": one for end, one in rounded[linear].stored(rows).items()}
        else:
            parameter: Tensor = reduce(getattr, path.split("."), layer)
            tensors[name] = parameter.cpu()[rows].reshape(planned.shape).to(source.checkpoint.entries[name].dtype)
    return tensors


def stored_dtype(source: DenseSource, prefix: str) -> torch.dtype:
    """Returns the dtype in which the weights of a layer are stored, which its scales will have."""
    of_weights = (n for n in source.names_below(prefix) if source.plan[n].placements[0].parameter.endswith("weight_NK"))
    return source.checkpoint.entries[next(of_weights)].dtype


def _rows_of(placements: Items[Placement]) -> Tensor:
    """Returns the rows of a parameter in the order in which a stored tensor holds them."""
    ordered = sorted(placements, key=lambda place: place.rows.start or 0)
    return torch.cat([torch.arange(place.start, place.stop) for place in ordered])

"""The projector: patch features to visual tokens of the decoder's width."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from internvl_rt.model.linear import AnyLinear, Norm
from internvl_rt.model.ops import Ops


@dataclass(frozen=True, slots=True)
class ProjectorWeights:
    norm: Norm
    fc1: AnyLinear
    fc2: AnyLinear


def project_tiles(
    ops: Ops, weights: ProjectorWeights, x_RE: Tensor, num_tiles: int, factor: int, version: Literal["v1", "v2"]
) -> Tensor:
    """Returns visual tokens [I, M, D] of ViT features [I * U, E]."""
    y_IMD = ops.merge_patches(x_RE, num_tiles, weights.norm, weights.fc1, factor, version)
    return ops.linear(y_IMD, weights.fc2)

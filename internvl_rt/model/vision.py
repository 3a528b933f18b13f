"""InternViT: tiles to patch features."""

from dataclasses import dataclass
from itertools import zip_longest

from torch import Tensor

from internvl_rt.checkpoint.config import VisionConfig
from internvl_rt.model.linear import AnyLinear, Linear, Norm
from internvl_rt.model.ops import Ops


@dataclass(frozen=True, slots=True)
class VisionLayer:
    norm1: Norm
    qkv: AnyLinear  # rows: all of q, all of k, all of v
    q_norm: Norm | None
    k_norm: Norm | None
    proj: AnyLinear
    scale1_E: Tensor  # LayerScale
    norm2: Norm
    fc1: AnyLinear
    fc2: AnyLinear
    scale2_E: Tensor


@dataclass(frozen=True, slots=True)
class VisionWeights:
    class_E: Tensor
    position_UE: Tensor  # row 0 belongs to the class token
    patch: Linear  # the checkpoint's convolution, viewed as [E, 3 * patch * patch]
    layers: tuple[VisionLayer, ...]


def encode_tiles(ops: Ops, config: VisionConfig, weights: VisionWeights, tiles: Tensor) -> Tensor:
    """Returns features [I * U, E], patches first, of tiles for `Ops.embed_tiles`. No norm follows the last layer."""
    x_RE = ops.embed_tiles(tiles, weights.patch, weights.class_E, weights.position_UE)
    n_RE = ops.norm(x_RE, weights.layers[0].norm1)
    for layer, next_layer in zip_longest(weights.layers, weights.layers[1:]):
        # One name for all results between the moves: a second would keep its tensor alive to the end of the layer.
        y_RK = ops.linear(n_RE, layer.qkv)
        y_RK = ops.attend_tiles(y_RK, len(tiles), config.head_dim, layer.q_norm, layer.k_norm)
        x_RE, n_RE = ops.linear_residual_norm(y_RK, layer.proj, x_RE, layer.scale1_E, layer.norm2)
        y_RK = ops.linear(n_RE, layer.fc1, activation="gelu")
        next_norm = next_layer.norm1 if next_layer else None
        x_RE, n_RE = ops.linear_residual_norm(y_RK, layer.fc2, x_RE, layer.scale2_E, next_norm)
    return x_RE

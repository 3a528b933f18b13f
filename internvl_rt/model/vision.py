"""InternViT: tiles to patch features."""

from dataclasses import dataclass

from torch import Tensor

from internvl_rt.config import VisionConfig
from internvl_rt.ops import Linear, Norm, Ops


@dataclass(frozen=True, slots=True)
class VisionLayer:
    norm1: Norm
    qkv: Linear  # rows: all of q, all of k, all of v
    q_norm: Norm | None
    k_norm: Norm | None
    proj: Linear
    scale1_E: Tensor  # LayerScale
    norm2: Norm
    fc1: Linear
    fc2: Linear
    scale2_E: Tensor


@dataclass(frozen=True, slots=True)
class VisionWeights:
    class_E: Tensor
    position_UE: Tensor  # row 0 belongs to the class token
    patch: Linear  # the checkpoint's convolution, viewed as [E, 3 * patch * patch]
    layers: tuple[VisionLayer, ...]


def encode_tiles(ops: Ops, config: VisionConfig, weights: VisionWeights, tiles: Tensor) -> Tensor:
    """Features [I, U, E] after the last layer (there is no final norm) of tiles, as `patch_embed` takes them."""
    x_IUE = ops.patch_embed(tiles, weights.patch, weights.class_E, weights.position_UE)
    for layer in weights.layers:
        qkv_IUK = ops.norm_linear(x_IUE, layer.norm1, layer.qkv)
        y_IUE = ops.vit_attention(qkv_IUK, config.head_dim, layer.q_norm, layer.k_norm)
        x_IUE = ops.linear_residual(y_IUE, layer.proj, x_IUE, layer.scale1_E)
        y_IUF = ops.norm_linear_gelu(x_IUE, layer.norm2, layer.fc1)
        x_IUE = ops.linear_residual(y_IUF, layer.fc2, x_IUE, layer.scale2_E)
    return x_IUE

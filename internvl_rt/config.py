"""The model's configuration: every field the runtime decides by, read once from config.json, frozen.

One `VisionConfig` and one `DecoderConfig` cover the whole family (InternViT-300M and -6B; Qwen2, Qwen3 and
InternLM2-layout language models) through explicit flags; there is no class per model.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """InternViT: pre-norm blocks with LayerScale, a class token, learned positions and no final norm."""

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    image_size: int  # side of a tile, pixels
    patch_size: int  # pixels
    norm: Literal["layer_norm", "rms_norm"]
    norm_eps: float
    qkv_bias: bool
    qk_norm: bool  # RMS norm over all heads' channels together, before attention

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def num_patches(self) -> int:
        """Patches per tile, the class token not counted."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True, slots=True)
class DynamicRope:
    """Dynamic NTK scaling: acts only beyond `max_position` (model-facts 3.4)."""

    factor: float


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """A Llama-shaped decoder: RMS norm, rotary positions, grouped-query attention, SiLU-gated MLP."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    rope_scaling: DynamicRope | None
    max_position: int  # the trained window, tokens
    qkv_bias: bool
    qk_norm: bool  # RMS norm per head on q and k, before the rotation (Qwen3)
    tie_embeddings: bool


@dataclass(frozen=True, slots=True)
class ModelConfig:
    vision: VisionConfig
    decoder: DecoderConfig
    format: Literal["original", "hf"]
    downsample: int  # patches per visual token, along one side (2)
    unshuffle: Literal["v1", "v2"]  # v1 transposes the grid of visual tokens
    min_tiles: int
    max_tiles: int
    thumbnail: bool
    system_message: str | None  # None: no system turn
    dtype: Literal["bfloat16", "float16", "float32"]  # of the checkpoint, as config.json says

    @property
    def tokens_per_tile(self) -> int:
        return self.vision.num_patches // self.downsample**2

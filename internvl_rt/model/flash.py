"""What InternVL3.5-Flash has besides: a projector to few visual tokens of a tile, and the odds that they are enough.

Which tiles of a request are compressed depends on the odds of all of them (`inputs/flash.py`), so the vision tower
gives for each tile what is needed either way, as `ModelConfig.rows_per_tile` rows: its visual tokens, those of the
compressed tile, and a last row whose first number is its odds.

Source: `generate_flash`, `CrossAttentionPooling` and `Gating` in modeling_internvl_chat.py of the Flash repositories.
Their two last rounds of attention are in the files and are never computed: `attn2` is used three times instead.
"""

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from internvl_rt.checkpoint.config import FLASH_HEADS, ModelConfig
from internvl_rt.model.linear import AnyLinear, Linear, Norm
from internvl_rt.model.ops import Ops

NUM_ROUNDS = 3  # of `attention2`
NORM_EPS = 1e-5  # torch's default


@dataclass(frozen=True, slots=True)
class Pooling:
    """Attention of one query to all patches of a tile."""

    in_proj: Linear  # rows: all of q, all of k, all of v
    out_proj: Linear


@dataclass(frozen=True, slots=True)
class GatingBlock:
    fc1: Linear
    fc2: Linear
    norm: Norm


@dataclass(frozen=True, slots=True)
class RouterWeights:
    """All of them are dense: the router is small, and it decides."""

    query_1E: Tensor
    attention1: Pooling
    norm1: Norm
    attention2: Pooling
    norm2: Norm
    block1: GatingBlock
    block2: GatingBlock
    block3: GatingBlock
    block4: GatingBlock
    gate_norm: Norm
    gate: Linear  # rows: compress, keep

    @property
    def blocks(self) -> tuple[GatingBlock, ...]:
        return self.block1, self.block2, self.block3, self.block4


@dataclass(frozen=True, slots=True)
class CompressorWeights:
    """The projector of compressed tiles."""

    norm: Norm
    fc1: AnyLinear
    fc2: AnyLinear
    fc3: AnyLinear


@dataclass(frozen=True, slots=True)
class FlashWeights:
    router: RouterWeights
    projector: CompressorWeights


def build_flash(config: ModelConfig, empty: Callable[..., Tensor]) -> FlashWeights:
    """Allocates uninitialised parameters of the configuration's shapes. empty: makes a tensor of a shape."""
    width, visual = config.vision.hidden_size, config.decoder.hidden_size
    merged = width * config.downsample**4

    def linear(num_outputs: int, num_inputs: int) -> Linear:
        return Linear(empty(num_outputs, num_inputs), empty(num_outputs))

    def norm(width: int) -> Norm:
        return Norm(empty(width), empty(width), NORM_EPS)

    def pooling() -> Pooling:
        return Pooling(linear(3 * width, width), linear(width, width))

    def block() -> GatingBlock:
        return GatingBlock(linear(4 * width, width), linear(width, 4 * width), norm(width))

    return FlashWeights(
        router=RouterWeights(
            query_1E=empty(1, width),
            attention1=pooling(),
            norm1=norm(width),
            attention2=pooling(),
            norm2=norm(width),
            block1=block(),
            block2=block(),
            block3=block(),
            block4=block(),
            gate_norm=norm(width),
            gate=linear(2, width),
        ),
        projector=CompressorWeights(
            norm=norm(merged),
            fc1=linear(2 * visual, merged),
            fc2=linear(2 * visual, 2 * visual),
            fc3=linear(visual, 2 * visual),
        ),
    )


def flash_rows(ops: Ops, config: ModelConfig, weights: FlashWeights, x_RE: Tensor, visual_IMD: Tensor) -> Tensor:
    """Returns `ModelConfig.rows_per_tile` rows of each tile, [I, rows, D], given its features and visual tokens."""
    num_tiles, projector = len(visual_IMD), weights.projector
    last_I1D = torch.zeros_like(visual_IMD[:, :1])
    last_I1D[:, 0, 0] = compression_odds(ops, weights.router, x_RE, num_tiles)
    y_IMD = ops.merge_patches(x_RE, num_tiles, projector.norm, projector.fc1, config.downsample**2, config.unshuffle)
    y_IMD = ops.linear(ops.linear(y_IMD, projector.fc2, activation="gelu"), projector.fc3)
    return torch.cat((visual_IMD, y_IMD, last_I1D), dim=1)


def rows_of_tiles(compressed: Items[bool], config: ModelConfig) -> NDArray[np.int64]:
    """Returns which rows [X] of a picture's `flash_rows` are its visual tokens. compressed: whether each tile is."""
    kept, stop = config.tokens_per_tile, config.rows_per_tile - 1
    parts = (np.arange(kept, stop) if each else np.arange(kept) for each in compressed)
    return np.concatenate([part + tile * config.rows_per_tile for tile, part in enumerate(parts)])


def compression_odds(ops: Ops, weights: RouterWeights, x_RE: Tensor, num_tiles: int) -> Tensor:
    """Returns for each tile the odds [I], from 0 to 1, that few visual tokens are enough. x_RE: [I * U, E] features."""
    patch_RE = x_RE[: len(x_RE) - num_tiles]  # class rows come last
    y_IE = weights.query_1E.repeat(num_tiles, 1)
    kv_2HLC = _keys_and_values(ops, weights.attention1, patch_RE, num_tiles)
    y_IE = ops.norm(_attend(ops, weights.attention1, y_IE, kv_2HLC), weights.norm1)
    kv_2HLC = _keys_and_values(ops, weights.attention2, patch_RE, num_tiles)
    for _ in range(NUM_ROUNDS):
        y_IE = ops.norm(_attend(ops, weights.attention2, y_IE, kv_2HLC), weights.norm2)
    for block in weights.blocks:
        update_IE = ops.linear(ops.linear(y_IE, block.fc1, activation="gelu"), block.fc2)
        y_IE = y_IE + ops.norm(update_IE, block.norm)
    return ops.linear(y_IE, weights.gate, norm=weights.gate_norm).softmax(-1)[:, 0]


def _keys_and_values(ops: Ops, pooling: Pooling, patch_RE: Tensor, num_tiles: int) -> Tensor:
    """Returns keys and values [2, H, L, C] of L patches for the H heads of all tiles."""
    width = patch_RE.shape[1]
    kv = ops.linear(patch_RE, pooling.in_proj.take_rows(slice(width, 3 * width)))
    return kv.view(num_tiles, -1, 2, FLASH_HEADS, width // FLASH_HEADS).permute(2, 0, 3, 1, 4).flatten(1, 2)


def _attend(ops: Ops, pooling: Pooling, query_IE: Tensor, kv_2HLC: Tensor) -> Tensor:
    """Attends in the model's dtype throughout, as the official code does."""
    num_tiles, width = query_IE.shape
    k_HLC, v_HLC = kv_2HLC
    q_IE = ops.linear(query_IE, pooling.in_proj.take_rows(slice(0, width)))
    q_H1C = (q_IE * k_HLC.shape[-1] ** -0.5).view(len(k_HLC), 1, -1)
    share_H1L = torch.bmm(q_H1C, k_HLC.transpose(1, 2)).softmax(-1)
    return ops.linear(torch.bmm(share_H1L, v_HLC).view(num_tiles, width), pooling.out_proj)

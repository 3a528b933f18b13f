"""The whole model as one value: configuration, weights and operations, with a pass over each tower."""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from internvl_rt.checkpoint.config import DecoderConfig, ModelConfig, VisionConfig
from internvl_rt.model.decoder import DecoderLayer, DecoderWeights, rotary_frequencies, run_layers
from internvl_rt.model.linear import Linear, Norm
from internvl_rt.model.ops import TORCH, Ops
from internvl_rt.model.projector import ProjectorWeights, project_tiles
from internvl_rt.model.step_inputs import LayerCache, StepInputs
from internvl_rt.model.vision import VisionLayer, VisionWeights, encode_tiles

PROJECTOR_NORM_EPS = 1e-5  # torch's default, which the official projector uses; not the ViT's 1e-6


@dataclass(frozen=True, slots=True)
class ModelWeights:
    vision: VisionWeights
    projector: ProjectorWeights
    decoder: DecoderWeights


class InternVL:
    """A model ready to run: frozen weights and a table of operations.

    buffers: tensors on the device that are no weights
    """

    def __init__(self, config: ModelConfig, weights: ModelWeights, ops: Ops) -> None:
        self.config, self.weights, self.ops = config, weights, ops
        self._inv_freq_C = rotary_frequencies(config.decoder, weights.decoder.embedding_VD.device)
        self.buffers = (self._inv_freq_C,)

    def cut(self, num_layers: int) -> "InternVL":
        """Returns this model with the first layers of each tower alone: it runs the same kernels, in less time."""
        vision = replace(self.weights.vision, layers=self.weights.vision.layers[:num_layers])
        decoder = replace(self.weights.decoder, layers=self.weights.decoder.layers[:num_layers])
        return InternVL(self.config, replace(self.weights, vision=vision, decoder=decoder), self.ops)

    @property
    def device(self) -> torch.device:
        return self.weights.decoder.embedding_VD.device

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.decoder.embedding_VD.dtype

    def encode_tiles(self, tiles: Tensor) -> Tensor:
        """Computes visual tokens [I, M, D]. Tiles are uint8 [I, S, S, 3], or normalised floats [I, 3, S, S]."""
        x_RE = encode_tiles(self.ops, self.config.vision, self.weights.vision, tiles)
        return project_tiles(
            self.ops, self.weights.projector, x_RE, len(tiles), self.config.downsample, self.config.unshuffle
        )

    def embed(self, step: StepInputs, out: Tensor | None = None) -> Tensor:
        """Returns x_TD of a step's tokens, the visual ones among them, in `out` if that is given."""
        embedding_VD = self.weights.decoder.embedding_VD
        return self.ops.embed_tokens(step.token_id_T, step.drawn_R, embedding_VD, step.visual_XD, out=out)

    def run_layers(self, step: StepInputs, x_TD: Tensor, caches: tuple[LayerCache, ...]) -> Tensor:
        """Returns x_TD after the decoder's last layer, perhaps in the given one's memory. Fills the caches' slots."""
        return run_layers(self.ops, self.weights.decoder, self._inv_freq_C, caches, step, x_TD)

    def run_step(self, step: StepInputs, caches: tuple[LayerCache, ...], out: Tensor | None = None) -> Tensor:
        """Returns x_TD after the decoder's last layer, in `out` if that is given. Fills the caches' slots."""
        x_TD = self.run_layers(step, self.embed(step, out), caches)
        return x_TD if out is None or x_TD.data_ptr() == out.data_ptr() else out.copy_(x_TD)

    def logits(self, x_RD: Tensor, out: Tensor | None = None) -> Tensor:
        """Returns logits [R, V] of rows of what `run_step` returns, in `out` if that is given."""
        weights = self.weights.decoder
        if out is None and self.ops.row_multiple > 1:
            out = self.logits_memory(len(x_RD))
        return self.ops.linear(x_RD, weights.lm_head, norm=weights.norm, out=out)

    def logits_memory(self, num_rows: int) -> Tensor:
        """Allocates logits [num_rows, V], every row of which begins at a multiple of `Ops.row_multiple` elements."""
        num_columns, multiple = self.weights.decoder.lm_head.num_outputs, self.ops.row_multiple
        stride = -(-num_columns // multiple) * multiple
        return torch.empty(num_rows, stride, dtype=self.dtype, device=self.device)[:, :num_columns]


def build_weights(config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str) -> ModelWeights:
    """Allocates uninitialised parameters of the configuration's shapes; `device="meta"` takes no memory."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def linear(num_outputs: int, num_inputs: int, bias: bool) -> Linear:
        return Linear(empty(num_outputs, num_inputs), empty(num_outputs) if bias else None)

    def norm(width: int, eps: float, bias: bool) -> Norm:
        return Norm(empty(width), empty(width) if bias else None, eps)

    def vision_layer(c: VisionConfig) -> VisionLayer:
        width, layer_norm = c.hidden_size, c.norm == "layer_norm"
        return VisionLayer(
            norm1=norm(width, c.norm_eps, layer_norm),
            qkv=linear(3 * width, width, c.qkv_bias),
            q_norm=norm(width, c.norm_eps, bias=False) if c.qk_norm else None,
            k_norm=norm(width, c.norm_eps, bias=False) if c.qk_norm else None,
            proj=linear(width, width, bias=True),
            scale1_E=empty(width),
            norm2=norm(width, c.norm_eps, layer_norm),
            fc1=linear(c.intermediate_size, width, bias=True),
            fc2=linear(width, c.intermediate_size, bias=True),
            scale2_E=empty(width),
        )

    def decoder_layer(c: DecoderConfig) -> DecoderLayer:
        width, head = c.hidden_size, c.head_dim
        return DecoderLayer(
            norm1=norm(width, c.norm_eps, bias=False),
            qkv=linear((c.num_heads + 2 * c.num_kv_heads) * head, width, c.qkv_bias),
            q_norm=norm(head, c.norm_eps, bias=False) if c.qk_norm else None,
            k_norm=norm(head, c.norm_eps, bias=False) if c.qk_norm else None,
            o=linear(width, c.num_heads * head, bias=False),
            norm2=norm(width, c.norm_eps, bias=False),
            gate_up=linear(2 * c.intermediate_size, width, bias=False),
            down=linear(width, c.intermediate_size, bias=False),
        )

    v, d = config.vision, config.decoder
    merged = v.hidden_size * config.downsample**2
    embedding_VD = empty(d.vocab_size, d.hidden_size)
    return ModelWeights(
        vision=VisionWeights(
            class_E=empty(v.hidden_size),
            position_UE=empty(1 + v.num_patches, v.hidden_size),
            patch=linear(v.hidden_size, 3 * v.patch_size**2, bias=True),
            layers=tuple(vision_layer(v) for _ in range(v.num_layers)),
        ),
        projector=ProjectorWeights(
            norm=norm(merged, PROJECTOR_NORM_EPS, bias=True),
            fc1=linear(d.hidden_size, merged, bias=True),
            fc2=linear(d.hidden_size, d.hidden_size, bias=True),
        ),
        decoder=DecoderWeights(
            embedding_VD=embedding_VD,
            lm_head=Linear(embedding_VD if d.tie_embeddings else empty(d.vocab_size, d.hidden_size), None),
            layers=tuple(decoder_layer(d) for _ in range(d.num_layers)),
            norm=norm(d.hidden_size, d.norm_eps, bias=False),
        ),
    )


def fill_weights(weights: ModelWeights, fill: Callable[[str, Tensor], None], ops: Ops = TORCH) -> ModelWeights:
    """Fills every parameter, and returns the weights as a table of operations multiplies them fastest.

    fill: gets a dotted path, such as `decoder.layers.3.qkv.weight_NK`, and its parameter; a tied one only once

    A weight is prepared as soon as it is filled, and the memory of one that is replaced is freed at once. So no more
    than one is there twice, as memory of the host that nothing was written to is not taken yet. The patch embedding
    stays as it is, and so does an `lm_head` that is the embedding too. If it takes longer than a second, a terminal
    shows bytes and their rate.
    """
    num_bytes = sum(parameter.nbytes for parameter in named_parameters(weights).values())
    shown: dict[str, Any] = {"unit": "B", "unit_scale": True, "leave": False, "delay": 1, "disable": None}
    with tqdm(total=num_bytes, desc="weights", **shown) as bar:

        def fill_and_show(path: str, parameter: Tensor) -> None:
            fill(path, parameter)
            bar.update(parameter.nbytes)

        filled: ModelWeights = _fill(weights, "", fill_and_show, ops, weights.decoder.embedding_VD)
    return filled


def _fill(value: Any, path: str, fill: Callable[[str, Tensor], None], ops: Ops, embedding_VD: Tensor) -> Any:
    if isinstance(value, Tensor):
        if value is not embedding_VD or path == "decoder.embedding_VD":
            fill(path, value)
        return value
    if isinstance(value, tuple):
        return tuple(_fill(item, f"{path}.{index}", fill, ops, embedding_VD) for index, item in enumerate(value))
    if not is_dataclass(value) or isinstance(value, type):
        return value
    below = f"{path}." if path else ""
    parts = {field.name: getattr(value, field.name) for field in fields(value)}
    filled = type(value)(**{name: _fill(part, below + name, fill, ops, embedding_VD) for name, part in parts.items()})
    if isinstance(filled, Linear) and filled.weight_NK is not embedding_VD and path != "vision.patch":
        return _prepare(filled, ops)
    return filled


def _prepare(linear: Linear, ops: Ops) -> Linear:
    prepared = ops.prepare_linear(linear)
    if prepared.weight_NK is not linear.weight_NK:
        linear.weight_NK.data = torch.empty(0)  # frees the memory that it had
    return prepared


def named_parameters(weights: ModelWeights) -> dict[str, Tensor]:
    """Returns all parameters by path, as `fill_weights` names them."""
    found: dict[str, Tensor] = {}
    _fill(weights, "", found.__setitem__, TORCH, weights.decoder.embedding_VD)
    return found

"""The whole model as one value: configuration, weights and operations, with a pass over each tower."""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from internvl_rt.checkpoint.config import DecoderConfig, ExpertsConfig, ModelConfig, VisionConfig
from internvl_rt.model.decoder import DecoderLayer, DecoderWeights, build_rotary, run_layers
from internvl_rt.model.flash import FlashWeights, build_flash, flash_rows
from internvl_rt.model.linear import AnyLinear, Experts, GatedMlp, Linear, Norm, tensors_of
from internvl_rt.model.ops import TORCH, Ops
from internvl_rt.model.projector import ProjectorWeights, project_tiles
from internvl_rt.model.shard import WHOLE, Shard, shard_decoder
from internvl_rt.model.step_inputs import LayerCache, StepInputs
from internvl_rt.model.vision import VisionLayer, VisionWeights, encode_tiles
from internvl_rt.model.work import LayerBytes

PROJECTOR_NORM_EPS = 1e-5  # torch's default, which the official projector uses; not the ViT's 1e-6


@dataclass(frozen=True, slots=True)
class ModelWeights:
    vision: VisionWeights
    projector: ProjectorWeights
    decoder: DecoderWeights
    flash: FlashWeights | None = None


class InternVL:
    """A model, or a rank's part of one, ready to run: frozen weights and a table of operations.

    config: of the whole model
    part: the decoder's sizes in the part that is here. first_part: in that of rank 0, by which all ranks plan alike
    buffers: tensors on the device that are no weights
    vision_layer_bytes, decoder_layer_bytes: of the weights of each tower's layers
    """

    def __init__(self, config: ModelConfig, weights: ModelWeights, ops: Ops, shard: Shard = WHOLE) -> None:
        self.config, self.weights, self.ops, self.shard = config, weights, ops, shard
        self.part = shard_decoder(config.decoder, shard)
        self.first_part = shard_decoder(config.decoder, replace(shard, rank=0))
        self._rotary = build_rotary(config.decoder, self.device)
        self.buffers = (self._rotary.inv_freq_C,)
        self.vision_layer_bytes, self.decoder_layer_bytes = layer_bytes(weights)

    def cut(self, num_layers: int) -> "InternVL":
        """Returns this model with the first layers of each tower alone: it runs the same kernels, in less time."""
        vision = replace(self.weights.vision, layers=self.weights.vision.layers[:num_layers])
        decoder = replace(self.weights.decoder, layers=self.weights.decoder.layers[:num_layers])
        return InternVL(self.config, replace(self.weights, vision=vision, decoder=decoder), self.ops, self.shard)

    @property
    def device(self) -> torch.device:
        held = self.weights.decoder.embedding_VD if self.shard.decoder else self.weights.vision.class_E
        return held.device

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.decoder.embedding_VD.dtype

    def encode_tiles(self, tiles: Tensor) -> Tensor:
        """Computes visual tokens [I, M, D]. Tiles are uint8 [I, S, S, 3], or normalised floats [I, 3, S, S].

        Of a Flash model it returns the rows that `model/flash.py` explains.
        """
        ops, config, weights = self.ops, self.config, self.weights
        x_RE = encode_tiles(ops, config.vision, weights.vision, tiles)
        visual_IMD = project_tiles(ops, weights.projector, x_RE, len(tiles), config.downsample, config.unshuffle)
        return visual_IMD if weights.flash is None else flash_rows(ops, config, weights.flash, x_RE, visual_IMD)

    def embed(self, step: StepInputs, out: Tensor | None = None) -> Tensor:
        """Returns x_TD of a step's tokens, the visual ones among them, in `out` if that is given."""
        embedding_VD = self.weights.decoder.embedding_VD
        return self.ops.embed_tokens(step.token_id_T, step.drawn_R, embedding_VD, step.visual_XD, out=out)

    def run_layers(self, step: StepInputs, x_TD: Tensor, caches: tuple[LayerCache, ...]) -> Tensor:
        """Returns x_TD after the decoder's last layer, perhaps in the given one's memory. Fills the caches' slots."""
        return run_layers(self.ops, self.weights.decoder, self._rotary, caches, step, x_TD)

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

    def num_split_items(self, num_rows: int) -> int:
        """Length of the plan that splits attention of `num_rows` sequences with one new token; 0: no plan.

        All ranks have the plan for the key/value heads of rank 0.
        """
        return self.ops.num_split_items(num_rows, self.first_part.num_kv_heads)

    def logits_memory(self, num_rows: int) -> Tensor:
        """Allocates logits [num_rows, V], every row of which begins at a multiple of `Ops.row_multiple` elements."""
        num_columns, multiple = self.config.decoder.vocab_size, self.ops.row_multiple
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

    def decoder_layer(c: DecoderConfig, index: int) -> DecoderLayer:
        width, head = c.hidden_size, c.head_dim
        return DecoderLayer(
            norm1=norm(width, c.norm_eps, bias=False),
            qkv=linear((c.num_heads + 2 * c.num_kv_heads) * head, width, c.qkv_bias),
            q_norm=norm(head, c.norm_eps, bias=False) if c.qk_norm else None,
            k_norm=norm(head, c.norm_eps, bias=False) if c.qk_norm else None,
            o=linear(width, c.num_heads * head, c.o_bias),
            norm2=norm(width, c.norm_eps, bias=False),
            mlp=mlp(c) if c.experts is None else experts(c, c.experts),
            sinks_H=empty(c.num_heads) if c.sinks else None,
            window=c.window_of(index),
        )

    def mlp(c: DecoderConfig) -> GatedMlp:
        return GatedMlp(
            gate_up=linear(2 * c.intermediate_size, c.hidden_size, bias=False),
            down=linear(c.hidden_size, c.intermediate_size, bias=False),
        )

    def experts(c: DecoderConfig, e: ExpertsConfig) -> Experts:
        return Experts(
            router=linear(e.num_experts, c.hidden_size, e.biases),
            all_gate_up=linear(e.count_here * 2 * c.intermediate_size, c.hidden_size, e.biases),
            all_down=linear(e.count_here * c.hidden_size, c.intermediate_size, e.biases),
            gate=e.gate,
            num_chosen=e.num_chosen,
            renormalises=e.renormalises,
            first_here=e.first_here,
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
            layers=tuple(decoder_layer(d, index) for index in range(d.num_layers)),
            norm=norm(d.hidden_size, d.norm_eps, bias=False),
        ),
        flash=None if config.flash is None else build_flash(config, empty),
    )


Fill = Callable[[str, Tensor], None]
Make = Callable[[str, AnyLinear, Callable[[], Linear]], AnyLinear]


def fill_weights(
    weights: ModelWeights,
    fill: Fill,
    ops: Ops = TORCH,
    *,
    device: torch.device | str | None = None,
    make: Make | None = None,
    shard: Shard = WHOLE,
) -> ModelWeights:
    """Fills every parameter, and returns the weights as a table of operations multiplies them fastest.

    weights: parameters to fill. Those on the device "meta" are allocated on `device` when it is their turn.
    fill: gets a dotted path, such as `decoder.layers.3.qkv.weight_NK`, and its parameter; a tied one only once
    make: makes a quantised linear without its bias, for its path and shapes; it may use the dense one that the function
        it gets fills
    shard: says what is filled; the rest stays as it is

    A linear is prepared as soon as it is filled, and the memory of one that is replaced is freed at once. So no more
    than one is there twice, as memory of the host that nothing was written to is not taken yet. The patch embedding
    stays as it is, and so do the router of Flash, weights of experts, and an `lm_head` that is the embedding too. If it
    takes longer than a second, a terminal shows bytes and their rate, on rank 0.
    """
    embedding_VD = weights.decoder.embedding_VD
    num_bytes = sum(parameter.nbytes for path, parameter in named_parameters(weights).items() if shard.holds(path))
    is_hidden = shard.rank > 0 or not shard.decoder
    shown: dict[str, Any] = {"unit": "B", "unit_scale": True, "leave": False, "delay": 1, "disable": is_hidden or None}
    with tqdm(total=num_bytes, desc="weights", **shown) as bar:
        filled_embedding_VD = embedding_VD

        def fill_tensor(path: str, tensor: Tensor) -> Tensor:
            nonlocal filled_embedding_VD
            if not shard.holds(path):
                return tensor
            if tensor.is_meta and device is not None:
                tensor = torch.empty_like(tensor, device=device)
            fill(path, tensor)
            if path == "decoder.embedding_VD":
                filled_embedding_VD = tensor
            return tensor

        def fill_linear(path: str, linear: AnyLinear) -> AnyLinear:
            if not shard.holds(path):
                return linear
            if isinstance(linear, Linear) and linear.weight_NK is embedding_VD:
                return replace(linear, weight_NK=filled_embedding_VD)
            if isinstance(linear, Linear):
                filled: AnyLinear = fill_dense(path, linear.weight_NK, linear.bias_N)
            else:
                assert make is not None, "quantised linears are made"
                shape = linear.num_outputs, linear.num_inputs
                weight_NK = torch.empty(shape, dtype=embedding_VD.dtype, device="meta")
                filled = make(path, linear, lambda: fill_dense(path, weight_NK, None))
                if linear.bias_N is not None:
                    filled = replace(filled, bias_N=fill_tensor(f"{path}.bias_N", linear.bias_N))
            bar.update(sum(tensor.nbytes for tensor in tensors_of(filled).values()))
            return filled if _stays(path) or is_of_experts(path) else _prepare(filled, ops)

        def fill_dense(path: str, weight_NK: Tensor, bias_N: Tensor | None) -> Linear:
            weight_NK = fill_tensor(f"{path}.weight_NK", weight_NK)
            return Linear(weight_NK, None if bias_N is None else fill_tensor(f"{path}.bias_N", bias_N))

        def fill_and_show(path: str, tensor: Tensor) -> Tensor:
            filled = fill_tensor(path, tensor)
            bar.update(filled.nbytes)
            return filled

        return map_weights(weights, fill_and_show, fill_linear)


def _prepare(linear: AnyLinear, ops: Ops) -> AnyLinear:
    prepared = ops.prepare_linear(linear)
    kept = {id(tensor) for tensor in tensors_of(prepared).values()}
    for tensor in tensors_of(linear).values():
        if id(tensor) not in kept:
            tensor.data = torch.empty(0, dtype=tensor.dtype)  # frees the memory that it had
    return prepared


def map_weights(
    weights: ModelWeights,
    on_tensor: Callable[[str, Tensor], Tensor],
    on_linear: Callable[[str, AnyLinear], AnyLinear],
) -> ModelWeights:
    """Returns weights with each linear, and each tensor that is not of a linear, replaced; in order, given by path."""
    mapped: ModelWeights = _map(weights, "", on_tensor, on_linear)
    return mapped


def _map(
    value: Any,
    path: str,
    on_tensor: Callable[[str, Tensor], Tensor],
    on_linear: Callable[[str, AnyLinear], AnyLinear],
) -> Any:
    if isinstance(value, Tensor):
        return on_tensor(path, value)
    if isinstance(value, AnyLinear):
        return on_linear(path, value)
    if isinstance(value, tuple):
        return tuple(_map(item, f"{path}.{index}", on_tensor, on_linear) for index, item in enumerate(value))
    if not is_dataclass(value) or isinstance(value, type):
        return value
    below = f"{path}." if path else ""
    parts = {one.name: getattr(value, one.name) for one in fields(value)}
    return type(value)(**{name: _map(part, below + name, on_tensor, on_linear) for name, part in parts.items()})


def map_linears(weights: ModelWeights, on_linear: Callable[[str, AnyLinear], AnyLinear]) -> ModelWeights:
    """Returns weights with each of `named_linears` replaced."""
    linears = named_linears(weights)
    return map_weights(
        weights, lambda _, tensor: tensor, lambda path, linear: on_linear(path, linear) if path in linears else linear
    )


def named_linears(weights: ModelWeights) -> dict[str, AnyLinear]:
    """Returns the linears by path, but those that stay as they are, and but an lm_head that is the embedding too."""
    found: dict[str, AnyLinear] = {}

    def note(path: str, linear: AnyLinear) -> AnyLinear:
        tied = isinstance(linear, Linear) and linear.weight_NK is weights.decoder.embedding_VD
        if not tied and not _stays(path):
            found[path] = linear
        return linear

    map_weights(weights, lambda _, tensor: tensor, note)
    return found


def named_parameters(weights: ModelWeights) -> dict[str, Tensor]:
    """Returns all parameters by path, as `fill_weights` names them; a tied one only once."""
    found: dict[str, Tensor] = {}

    def note(path: str, tensor: Tensor) -> Tensor:
        if tensor is not weights.decoder.embedding_VD or path == "decoder.embedding_VD":
            found[path] = tensor
        return tensor

    def note_linear(path: str, linear: AnyLinear) -> AnyLinear:
        for name, tensor in tensors_of(linear).items():
            note(f"{path}.{name}", tensor)
        return linear

    map_weights(weights, note, note_linear)
    return found


def _stays(path: str) -> bool:
    """Says whether a linear, given by its path, stays as it is stored: the patch embedding, and the router of Flash."""
    return path == "vision.patch" or path.startswith("flash.router.")


def is_of_experts(path: str) -> bool:
    """Says whether a linear, given by its path, is that of all experts of a layer, one after the other."""
    return path.endswith((".all_gate_up", ".all_down"))


def layer_bytes(weights: ModelWeights) -> tuple[int, LayerBytes]:
    """Counts the bytes of the weights of all layers of the vision tower, and of the decoder."""
    vision = shared = experts = 0
    for path, tensor in named_parameters(weights).items():
        if path.startswith("vision.layers."):
            vision += tensor.nbytes
        elif path.startswith("decoder.layers."):
            if is_of_experts(path.rpartition(".")[0]):
                experts += tensor.nbytes
            else:
                shared += tensor.nbytes
    return vision, LayerBytes(shared, experts)

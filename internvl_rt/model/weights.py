"""Checkpoint tensors to parameters: one table of names for each dialect, read in both directions.

`plan_tensors` spells a dialect out for a configuration: every tensor that a checkpoint holds, and where its values
belong. The plan cuts every parameter into rows without overlap or gap, so weights are complete exactly if every planned
tensor is there. Loading copies along the plan, saving goes the other way.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from internvl_rt.checkpoint.config import DecoderConfig, ModelConfig
from internvl_rt.checkpoint.find import MERGE_LORA
from internvl_rt.checkpoint.folder import Checkpoint, some_of, write_tensors
from internvl_rt.errors import CheckpointError, not_finite
from internvl_rt.model.internvl import ModelWeights, build_weights, fill_weights, named_parameters
from internvl_rt.model.ops import TORCH, Ops

# Each `#` is the next index on the parameter's path, such as the layer's number. `{a,b}` are several tensors that fill
# the parameter's rows in this order. A path that ends at a linear or a norm stands for its weight and its bias.
# fmt: off
_VISION = (  # parameters      original name                   -hf name
    ("class_E",                "embeddings.class_embedding",   "embeddings.cls_token"),
    ("position_UE",            "embeddings.position_embedding", "embeddings.position_embeddings"),
    ("patch",                  "embeddings.patch_embedding",   "embeddings.patch_embeddings.projection"),
    ("layers.#.norm1",         "encoder.layers.#.norm1",       "encoder.layer.#.layernorm_before"),
    ("layers.#.qkv",           "encoder.layers.#.attn.qkv",    "encoder.layer.#.attention.{q,k,v}_proj"),
    ("layers.#.q_norm",        "encoder.layers.#.attn.q_norm", "encoder.layer.#.attention.q_norm"),
    ("layers.#.k_norm",        "encoder.layers.#.attn.k_norm", "encoder.layer.#.attention.k_norm"),
    ("layers.#.proj",          "encoder.layers.#.attn.proj",   "encoder.layer.#.attention.projection_layer"),
    ("layers.#.scale1_E",      "encoder.layers.#.ls1",         "encoder.layer.#.lambda_1"),
    ("layers.#.norm2",         "encoder.layers.#.norm2",       "encoder.layer.#.layernorm_after"),
    ("layers.#.fc1",           "encoder.layers.#.mlp.fc1",     "encoder.layer.#.mlp.fc1"),
    ("layers.#.fc2",           "encoder.layers.#.mlp.fc2",     "encoder.layer.#.mlp.fc2"),
    ("layers.#.scale2_E",      "encoder.layers.#.ls2",         "encoder.layer.#.lambda_2"),
)
_PROJECTOR = (
    ("norm", "mlp1.0", "layer_norm"),
    ("fc1",  "mlp1.1", "linear_1"),
    ("fc2",  "mlp1.3", "linear_2"),
)
_DECODER = (  # parameters     Qwen2, Qwen3, Llama                 InternLM2
    ("embedding_VD",           "embed_tokens.weight",              "tok_embeddings.weight"),
    ("layers.#.norm1",         "layers.#.input_layernorm",         "layers.#.attention_norm"),
    ("layers.#.qkv",           "layers.#.self_attn.{q,k,v}_proj",  "layers.#.attention.wqkv"),
    ("layers.#.q_norm",        "layers.#.self_attn.q_norm",        ""),
    ("layers.#.k_norm",        "layers.#.self_attn.k_norm",        ""),
    ("layers.#.o",             "layers.#.self_attn.o_proj",        "layers.#.attention.wo"),
    ("layers.#.norm2",         "layers.#.post_attention_layernorm", "layers.#.ffn_norm"),
    ("layers.#.gate_up",       "layers.#.mlp.{gate,up}_proj",      "layers.#.feed_forward.{w1,w3}"),
    ("layers.#.down",          "layers.#.mlp.down_proj",           "layers.#.feed_forward.w2"),
    ("norm",                   "norm",                             "norm"),
)
# fmt: on


# This tensor holds one group of rows for each key/value head: its query heads, its key, its value.
_GROUPED = "layers.#.attention.wqkv"


@dataclass(frozen=True, slots=True)
class Dialect:
    """One way to name the tensors: which columns of the tables it uses, and what stands before their names."""

    vision_prefix: str
    vision_column: int
    projector_prefix: str
    decoder_prefix: str
    decoder_column: int
    lm_head: str

    def table(self) -> dict[str, str]:
        """Returns the tensors' names by the parameter's path, both with `#` for indices."""
        rows = [(f"vision.{row[0]}", self.vision_prefix + row[self.vision_column]) for row in _VISION]
        rows += [(f"projector.{row[0]}", self.projector_prefix + row[self.vision_column]) for row in _PROJECTOR]
        rows += [(f"decoder.{row[0]}", self.decoder_prefix + row[self.decoder_column]) for row in _DECODER]
        return {**dict(rows), "decoder.lm_head": self.lm_head}

    def telltales(self) -> set[str]:
        """Returns a few tensors of every checkpoint in this dialect, which together none has in another one."""
        table = self.table()
        norms = {f"{table[path].replace('#', '0')}.weight" for path in ("decoder.layers.#.norm1", "projector.norm")}
        return norms | {table["vision.class_E"], table["decoder.embedding_VD"]}


DIALECTS: Mapping[str, Dialect] = {
    "original": Dialect("vision_model.", 1, "", "language_model.model.", 1, "language_model.lm_head"),
    "internlm2": Dialect("vision_model.", 1, "", "language_model.model.", 2, "language_model.output"),
    # transformers names the same tensors in two ways: in the files on the hub, and in memory and some newer files.
    "hf": Dialect("vision_tower.", 2, "multi_modal_projector.", "language_model.model.", 1, "language_model.lm_head"),
    "hf-nested": Dialect(
        "model.vision_tower.", 2, "model.multi_modal_projector.", "model.language_model.", 1, "lm_head"
    ),
}
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_LORA = re.compile(r"\blora_|\.base_layer\.")  # as PEFT names an adapter's tensors, and what they adapt
# Buffers that some versions of transformers wrote, and a training-time token that the class declares but does not use.
_IGNORED = re.compile(r".*\.(rotary_emb\.inv_freq|embeddings\.mask_token)")


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
        if pattern.endswith(_GROUPED):
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


def find_names(table: Mapping[str, str], path: str) -> tuple[str, list[str]]:
    """Returns the pattern of the tensors that fill a parameter, and their names in the order of its rows."""
    parts = path.split(".")
    indices = [part for part in parts if part.isdigit()]
    fields = ["#" if part.isdigit() else part for part in parts]
    pattern, suffix = table.get(".".join(fields)), ""
    if pattern is None:  # the weight or the bias of a linear or a norm
        pattern, suffix = table[".".join(fields[:-1])], f".{fields[-1].partition('_')[0]}"
    before, *between = pattern.split("#")
    name = before + "".join(f"{index}{part}" for index, part in zip(indices, between, strict=True))
    before, _, rest = name.partition("{")
    inside, _, after = rest.partition("}")
    return pattern, [before + part + after + suffix for part in inside.split(",")]


def _place_heads(parameter: str, c: DecoderConfig) -> tuple[Placement, ...]:
    """Says where rows of a tensor that is grouped by key/value head belong in a parameter of all q, all k, all v."""
    placements, stored = [], 0
    for group in range(c.num_kv_heads):
        for first, heads in ((0, c.num_heads // c.num_kv_heads), (c.num_heads, 1), (c.num_heads + c.num_kv_heads, 1)):
            start, size = (first + group * heads) * c.head_dim, heads * c.head_dim
            placements.append(Placement(parameter, start, start + size, slice(stored, stored + size)))
            stored += size
    return tuple(placements)


def load_weights(
    checkpoint: Checkpoint,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    ops: Ops = TORCH,
) -> ModelWeights:
    """Loads the checkpoint's weights in `dtype` on `device`, as `ops` multiplies them fastest.

    Host memory never exceeds the weights that stay on the host plus the largest stored tensor. Raises CheckpointError,
    before memory is taken, if tensors are missing, left over, misshapen, or not stored as floating-point numbers; and
    after all are read, if a number in one is not finite in `dtype`.
    """
    dialect = max(DIALECTS.values(), key=lambda one: len(one.telltales() & checkpoint.entries.keys()))
    config = _settle_tying(checkpoint, config, dialect)
    plan = plan_tensors(config, dialect)
    _check(checkpoint, config, dialect, plan)
    parts: dict[str, list[tuple[str, Placement]]] = {}  # of each parameter
    for name, planned in plan.items():
        for place in planned.placements:
            parts.setdefault(place.parameter, []).append((name, place))
    extremes: list[tuple[str, Tensor]] = []  # of each part's numbers; on the device, which the host does not wait for

    def fill(path: str, parameter: Tensor) -> None:
        for name, place in parts[path]:
            rows = parameter[place.start : place.stop]
            checkpoint.read_into(name, rows, place.rows, place.columns)
            extremes.append((name, torch.stack(rows.aminmax())))  # NaN if one is NaN

    weights = fill_weights(build_weights(config, dtype=dtype, device=device), fill, ops)
    is_finite = torch.stack([pair for _, pair in extremes]).isfinite().all(1).tolist()
    broken = [name for (name, _), ok in zip(extremes, is_finite, strict=True) if not ok]
    if broken:
        names = some_of(list(dict.fromkeys(broken)))
        raise CheckpointError(
            f"{checkpoint.folder}: {names}: numbers are {not_finite(dtype, 'download the weights again')}"
        )
    return weights


def save_weights(
    weights: ModelWeights, config: ModelConfig, folder: Path, *, dialect: Dialect, max_shard_bytes: int = 5 << 30
) -> None:
    """Writes what `load_weights` reads, in the parameters' dtype; config.json and the tokenizer are not written."""
    plan, parameters = plan_tensors(config, dialect), named_parameters(weights)
    dtype = weights.decoder.embedding_VD.dtype

    def make(name: str) -> Tensor:
        planned = plan[name]
        tensor = torch.empty(planned.shape, dtype=dtype)
        matrix = tensor.view(-1, tensor.shape[-1])
        for place in planned.placements:
            part = matrix[place.rows, place.columns]
            part.copy_(parameters[place.parameter][place.start : place.stop].reshape(part.shape))
        return tensor

    shapes = {name: planned.shape for name, planned in plan.items()}
    write_tensors(folder, shapes, make, dtype=dtype, max_shard_bytes=max_shard_bytes)


def _settle_tying(checkpoint: Checkpoint, config: ModelConfig, dialect: Dialect) -> ModelConfig:
    """Returns the configuration, with `tie_embeddings` as this checkpoint means it.

    A checkpoint may hold an lm_head although its config ties it to the embedding. One that is equal changes nothing;
    one that differs is used in the -hf format, as transformers does, and refused in the original format.
    """
    head, embedding = f"{dialect.lm_head}.weight", dialect.table()["decoder.embedding_VD"]
    if not config.decoder.tie_embeddings or not {head, embedding} <= checkpoint.entries.keys():
        return config
    if checkpoint.same_bytes(head, embedding):
        return config
    if config.format == "original":
        raise CheckpointError(
            f"{checkpoint.folder}: {head} differs from {embedding}, but tie_word_embeddings in config.json says that "
            "they are one; set it to false if both are meant"
        )
    return replace(config, decoder=replace(config.decoder, tie_embeddings=False))


def _check(checkpoint: Checkpoint, config: ModelConfig, dialect: Dialect, plan: Mapping[str, PlannedTensor]) -> None:
    entries, head = checkpoint.entries, f"{dialect.lm_head}.weight"
    missing = [name for name in plan if name not in entries]
    extra = [name for name in entries if name not in plan and not _IGNORED.fullmatch(name)]
    merge_lora = f"a LoRA adapter is not merged; {MERGE_LORA}" if any(map(_LORA.search, extra)) else ""
    if len(missing) == len(plan):
        raise CheckpointError(
            f"{checkpoint.folder}: none of its {len(entries)} tensors is one of an InternVL model "
            f"({some_of(list(entries))}); {merge_lora or 'give an InternVL checkpoint'}"
        )
    if config.decoder.tie_embeddings and head in extra:
        extra.remove(head)
    both = [(name, planned.shape, entries[name]) for name, planned in plan.items() if name in entries]
    shapes = [
        f"{name} is {list(entry.shape)}, expected {list(shape)}" for name, shape, entry in both if entry.shape != shape
    ]
    dtypes = [f"{name} is {entry.dtype}" for name, _, entry in both if entry.dtype not in FLOATS]
    problems = [
        f"{len(found)} {what}: {some_of(found)}"
        for found, what in (
            (missing, "missing"),
            (extra, "left over"),
            (shapes, "of the wrong shape"),
            (dtypes, "not stored as 16-bit or 32-bit floating point"),
        )
        if found
    ]
    if not problems:
        return
    remedy = merge_lora or "download config.json and the weights of one model"
    if missing == [head]:
        remedy = _remedy_without_head(config, head, dialect.table()["decoder.embedding_VD"])
    elif dtypes and not (missing or extra or shapes):
        remedy = "use the checkpoint with unquantised weights"
    raise CheckpointError(f"{checkpoint.folder} does not fit its config.json: {'; '.join(problems)}; {remedy}")


def _remedy_without_head(config: ModelConfig, head: str, embedding: str) -> str:
    """Says what to do where only the lm_head is missing, which the config does not tie to the embedding."""
    if config.format == "original" and not config.decoder.qk_norm:  # of its language models, Qwen3 alone may be tied
        return (
            f'the official class of this model overrules "tie_word_embeddings": true, so save the model again with '
            f"{head}, as a copy of {embedding} if they were one in training"
        )
    section = "llm_config" if config.format == "original" else "text_config"
    return f'if the lm_head is {embedding}, write "tie_word_embeddings": true into {section} of config.json'

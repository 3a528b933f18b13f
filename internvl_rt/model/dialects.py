"""How checkpoints name their tensors: one table for each dialect, from a parameter's path to names in a file."""

from collections.abc import Mapping
from dataclasses import dataclass

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
GROUPED = "layers.#.attention.wqkv"


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


def name_modules(dialect: Dialect, path: str) -> list[tuple[str, frozenset[str]]]:
    """Returns the modules that hold the rows of a linear in this dialect, each with its names in all dialects.

    Where another dialect has another number of modules there, each of these has all of their names.
    """
    ours, *others = (_modules(each, path) for each in (dialect, *DIALECTS.values()))
    named = [{name} for name in ours]
    for theirs in others:
        for index, names in enumerate(named):
            names.update(theirs[index : index + 1] if len(theirs) == len(ours) else theirs)
    return [(name, frozenset(names)) for name, names in zip(ours, named, strict=True)]


def _modules(dialect: Dialect, path: str) -> list[str]:
    return [name.removesuffix(".weight") for name in find_names(dialect.table(), f"{path}.weight_NK")[1]]


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

"""How checkpoints name their tensors: one table for each dialect, from a parameter's path to names in a file."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal

# Each `#` is the next index on the parameter's path, such as the layer's number; one more is each expert in turn.
# `{a,b}` are several tensors that fill the parameter's rows in this order. A path that ends at a linear or a norm
# stands for its weight and its bias.
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
    ("layers.#.mlp.gate_up",   "layers.#.mlp.{gate,up}_proj",      "layers.#.feed_forward.{w1,w3}"),
    ("layers.#.mlp.down",      "layers.#.mlp.down_proj",           "layers.#.feed_forward.w2"),
    ("layers.#.mlp.router",    "layers.#.mlp.gate",                ""),
    ("layers.#.mlp.all_gate_up", "layers.#.mlp.experts.#.{gate,up}_proj", ""),
    ("layers.#.mlp.all_down",  "layers.#.mlp.experts.#.down_proj", ""),
    ("norm",                   "norm",                             "norm"),
)
_STACKED = (  # as transformers 5 has experts in memory, and in files if it is told to: one tensor for all of a layer
    ("layers.#.mlp.all_gate_up.weight_NK", "layers.#.mlp.experts.gate_up_proj"),
    ("layers.#.mlp.all_down.weight_NK",    "layers.#.mlp.experts.down_proj"),
)
_GPT_OSS = (
    *_STACKED,
    ("layers.#.mlp.all_gate_up.bias_N",    "layers.#.mlp.experts.gate_up_proj_bias"),
    ("layers.#.mlp.all_down.bias_N",       "layers.#.mlp.experts.down_proj_bias"),
    ("layers.#.mlp.router",                "layers.#.mlp.router"),
    ("layers.#.sinks_H",                   "layers.#.self_attn.sinks"),
)
_FLASH = (  # one way in all dialects
    ("router.query_1E",        "pooling_before_gating.query_token"),
    *((f"router.attention{n}.in_proj.{field}", f"pooling_before_gating.attn{n}.in_proj_{last}")
      for n in (1, 2) for field, last in (("weight_NK", "weight"), ("bias_N", "bias"))),
    *((f"router.attention{n}.out_proj", f"pooling_before_gating.attn{n}.out_proj") for n in (1, 2)),
    *((f"router.norm{n}",      f"pooling_before_gating.norm{n}") for n in (1, 2)),
    *((f"router.block{n}.{part}", f"gating.block{n}.{last}")
      for n in (1, 2, 3, 4) for part, last in (("fc1", 0), ("fc2", 3), ("norm", 5))),
    ("router.gate_norm",       "gating.gate.0"),
    ("router.gate",            "gating.gate.1"),
    ("projector.norm",         "mlp2.0"),
    ("projector.fc1",          "mlp2.1"),
    ("projector.fc2",          "mlp2.4"),
    ("projector.fc3",          "mlp2.7"),
)
# fmt: on
_EXPERTS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "apart": (),
    "stacked": _STACKED,
    "gpt_oss": _GPT_OSS,
    "mxfp4": (  # beside each of these is one that ends with _scales
        *_GPT_OSS,
        *((path, f"{name}_blocks") for path, name in _STACKED),
    ),
}

# This tensor holds one group of rows for each key/value head: its query heads, its key, its value.
GROUPED = "layers.#.attention.wqkv"


@dataclass(frozen=True, slots=True)
class Dialect:
    """One way to name the tensors: which columns of the tables it uses, and what stands before their names.

    experts: how those of a layer are stored: each by itself, all in one tensor, or as GPT-OSS has them, which has all
        in one tensor with inputs first and gate and up by turns, or in rows of gate and up by turns in MXFP4
    layers_prefix: what stands before the names of the decoder's layers besides
    """

    vision_prefix: str
    vision_column: int
    projector_prefix: str
    decoder_prefix: str
    decoder_column: int
    lm_head: str
    experts: Literal["apart", "stacked", "gpt_oss", "mxfp4"] = "apart"
    layers_prefix: str = ""

    def table(self) -> dict[str, str]:
        """Returns the tensors' names by the parameter's path, both with `#` for indices."""
        rows = [(f"vision.{row[0]}", self.vision_prefix + row[self.vision_column]) for row in _VISION]
        rows += [(f"projector.{row[0]}", self.projector_prefix + row[self.vision_column]) for row in _PROJECTOR]
        decoder = [(row[0], row[self.decoder_column]) for row in _DECODER]
        decoder += _EXPERTS[self.experts]
        rows += [(f"decoder.{path}", self._decoder_name(name)) for path, name in decoder if name]
        rows += [(f"flash.{path}", name) for path, name in _FLASH]
        return {**dict(rows), "decoder.lm_head": self.lm_head}

    def _decoder_name(self, name: str) -> str:
        return self.decoder_prefix + (self.layers_prefix if name.startswith("layers.") else "") + name

    def telltales(self) -> set[str]:
        """Returns a few tensors of every checkpoint in this dialect, which together none has in another one."""
        table = self.table()
        norms = {f"{table[path].replace('#', '0')}.weight" for path in ("decoder.layers.#.norm1", "projector.norm")}
        return norms | {table["vision.class_E"], table["decoder.embedding_VD"]}


DIALECTS: Mapping[str, Dialect] = {
    "original": Dialect("vision_model.", 1, "", "language_model.model.", 1, "language_model.lm_head"),
    # So transformers saves a Qianfan-OCR, whose files on the hub have the original names.
    "original-saved": Dialect(
        "vision_model.", 1, "", "language_model.model.", 1, "language_model.lm_head", layers_prefix="encoder."
    ),
    "internlm2": Dialect("vision_model.", 1, "", "language_model.model.", 2, "language_model.output"),
    # transformers names the same tensors in two ways: in the files on the hub, and in memory and some newer files.
    "hf": Dialect("vision_tower.", 2, "multi_modal_projector.", "language_model.model.", 1, "language_model.lm_head"),
    "hf-nested": Dialect(
        "model.vision_tower.", 2, "model.multi_modal_projector.", "model.language_model.", 1, "lm_head"
    ),
}


def find_dialect(names: Collection[str]) -> Dialect:
    """Returns the dialect of a checkpoint, given its tensors' names: the one that has most of its telltales."""
    held = set(names)
    found = max(DIALECTS.values(), key=lambda one: len(one.telltales() & held))
    is_gpt_oss = held.issuperset(find_names(replace(found, experts="gpt_oss").table(), "decoder.layers.0.sinks_H")[1])
    for dialect in (replace(found, experts="mxfp4"), replace(found, experts="gpt_oss" if is_gpt_oss else "stacked")):
        if held.issuperset(find_names(dialect.table(), "decoder.layers.0.mlp.all_down.weight_NK")[1]):
            return dialect
    return replace(found, experts="gpt_oss") if is_gpt_oss else found


def name_modules(dialect: Dialect, path: str, num_experts: int = 0) -> list[tuple[str, frozenset[str]]]:
    """Returns the modules that hold the rows of a linear in this dialect, each with its names in all dialects.

    Where another dialect has another number of modules there, each of these has all of their names.
    """
    ours, *others = (_modules(each, path, num_experts) for each in (dialect, *DIALECTS.values()))
    named = [{name} for name in ours]
    for theirs in others:
        for index, names in enumerate(named):
            names.update(theirs[index : index + 1] if len(theirs) == len(ours) else theirs)
    return [(name, frozenset(names)) for name, names in zip(ours, named, strict=True)]


def _modules(dialect: Dialect, path: str, num_experts: int) -> list[str]:
    names = find_names(dialect.table(), f"{path}.weight_NK", num_experts)[1]
    return [name.removesuffix(".weight") for name in names]


def find_names(table: Mapping[str, str], path: str, num_experts: int = 0) -> tuple[str, list[str]]:
    """Returns the pattern of the tensors that fill a parameter, and their names in the order of its rows.

    A dialect without such a parameter has no names.
    """
    parts = path.split(".")
    indices = [part for part in parts if part.isdigit()]
    fields = ["#" if part.isdigit() else part for part in parts]
    pattern, suffix = table.get(".".join(fields)), ""
    if pattern is None:  # the weight or the bias of a linear or a norm
        pattern, suffix = table.get(".".join(fields[:-1])), f".{fields[-1].partition('_')[0]}"
    if pattern is None:
        return "", []
    before, *between = pattern.split("#")
    ways = [indices]
    if len(between) > len(indices):
        ways = [[*indices, str(expert)] for expert in range(num_experts)]
    names = []
    for way in ways:
        name = before + "".join(f"{index}{part}" for index, part in zip(way, between, strict=True))
        start, _, rest = name.partition("{")
        inside, _, end = rest.partition("}")
        names += [start + part + end + suffix for part in inside.split(",")]
    return pattern, names

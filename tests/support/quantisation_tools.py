"""Quantises a small random InternVL with the real tools, and dumps what they read from checkpoints.

    quantisation_tools.py make FOLDER         for each scheme a folder, and beside it what its tool makes of the weights
    quantisation_tools.py read FOLDER FILE    what compressed-tensors' own reader makes of a folder

It runs in an environment of its own (`tests/model/test_quantised_by_tools.py`), and uses nothing of internvl_rt.
"""

import importlib.util
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

hf: Any = transformers  # transformers' annotations reject its own keyword arguments

IGNORED = ["re:.*lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"]
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "symmetric": True}
GROUPS: dict[str, dict[str, Any]] = {  # what no preset of llm-compressor has
    "W4A16_32": {"weights": {**INT4, "group_size": 32}},
    "W4A16_ASYM_32": {"weights": {**INT4, "group_size": 32, "symmetric": False}},
    "W8A16_128": {"weights": {**INT4, "num_bits": 8, "group_size": 128}},
}
PRESETS = ("FP8", "FP8_KV", "FP8_DYNAMIC", "FP8_DYNAMIC_ALL", "FP8_BLOCK", "W8A8", "W8A16", "W4A16", "W4A16_ASYM")
KV_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
VOCABULARY = 419  # of the tokenizer in tests/data


def build() -> Any:
    """Builds a bfloat16 `InternVLForConditionalGeneration`, whose widths are multiples of 128."""
    text = hf.Qwen2Config(
        hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    vision = hf.InternVLVisionConfig(
        hidden_size=128, num_attention_heads=2, intermediate_size=256, num_hidden_layers=2, image_size=[56, 56],
        patch_size=[14, 14], norm_type="layer_norm", attention_bias=True,
    )  # fmt: skip
    config = hf.InternVLConfig(
        vision_config=vision, text_config=text, image_token_id=VOCABULARY - 1, image_seq_length=4,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(5)
    model = hf.InternVLForConditionalGeneration(config).to(torch.bfloat16).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
        elif parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model


def make(folder: Path) -> None:
    dense = folder / "dense"
    build().save_pretrained(dense)
    for scheme in (*PRESETS, *GROUPS):
        compress(dense, scheme, folder / scheme)
        read(folder / scheme, folder / f"{scheme}.safetensors")
    quantise_layers(
        dense, folder / "AWQ", {"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm"}, awq
    )
    quantise_layers(dense, folder / "GPTQ", {"quant_method": "gptq", "bits": 4, "desc_act": False}, load_gptq())


def compress(dense: Path, scheme: str, folder: Path) -> None:
    """Runs llm-compressor, by rounding to the nearest."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    model = hf.InternVLForConditionalGeneration.from_pretrained(dense, dtype="auto")
    how: dict[str, Any] = {"scheme": scheme.removesuffix("_ALL").removesuffix("_KV"), "targets": ["Linear"]}
    if scheme in GROUPS:
        how = {"config_groups": {"group_0": {"targets": ["Linear"], **GROUPS[scheme]}}}
    if scheme.endswith("_KV"):
        how["kv_cache_scheme"] = KV_CACHE
    how["ignore"] = IGNORED[:1] if scheme.endswith("_ALL") else IGNORED
    oneshot(model=model, recipe=QuantizationModifier(**how), **(calibration() if scheme in ("FP8", "FP8_KV") else {}))
    model.save_pretrained(folder, save_compressed=True)


def calibration() -> dict[str, Any]:
    """Returns a data set of random ids, from which the tool takes static scales."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    ids = torch.randint(0, VOCABULARY - 1, (8, 32), generator=torch.Generator().manual_seed(1)).tolist()
    words = Tokenizer(WordLevel({str(number): number for number in range(VOCABULARY)}, "0"))
    return {
        "dataset": Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 32] * 8}),
        "processor": hf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0"),
        "num_calibration_samples": 8,
        "max_seq_length": 32,
    }


def read(folder: Path, file: Path) -> None:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors", config
    how = hf.CompressedTensorsConfig(dequantize=True)
    model = hf.InternVLForConditionalGeneration.from_pretrained(folder, quantization_config=how, dtype="auto")
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, file)


Pack = Callable[[torch.nn.Linear, Tensor, Tensor], tuple[torch.nn.Module, Tensor]]
GROUP = 32


def quantise_layers(dense: Path, folder: Path, config: dict[str, Any], pack: Pack) -> None:
    """Replaces the linears of the language model's layers by a tool's modules. The rest is that of the dense folder."""
    stored, made = {}, {}
    for name, tensor in load_file(dense / "model.safetensors").items():
        if not (name.startswith("language_model.") and name.endswith("_proj.weight")):
            stored[name] = made[name] = tensor.half()
            continue
        linear = torch.nn.Linear(tensor.shape[1], tensor.shape[0], bias=False).half()
        groups = tensor.float().view(len(tensor), -1, GROUP)
        least, most = groups.amin(-1), groups.amax(-1)
        scale = ((most - least) / 15).half().float()
        zero = (-least / scale).round().clamp(1, 15)
        number = ((groups / scale[..., None]).round() + zero[..., None]).clamp(0, 15)
        linear.weight.data = ((number - zero[..., None]) * scale[..., None]).view_as(tensor).half()
        module, made[name] = pack(linear, scale, zero)
        stored |= {name.removesuffix("weight") + last: part for last, part in module.state_dict().items()}
    folder.mkdir()
    values = json.loads((dense / "config.json").read_text())
    values["text_config"]["quantization_config"] = config | {"group_size": GROUP}
    (folder / "config.json").write_text(json.dumps(values))
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in made.items()}, f"{folder}.safetensors")


def awq(linear: torch.nn.Linear, scale_NG: Tensor, zero_NG: Tensor) -> tuple[torch.nn.Module, Tensor]:
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    scales = {"scales": scale_NG.half().t().contiguous(), "zeros": zero_NG.t().contiguous()}
    module = WQLinear_GEMM.from_linear(linear, 4, GROUP, **scales)
    return module, dequantize_gemm(module.qweight, module.qzeros, module.scales, 4, GROUP).t()


def load_gptq() -> Pack:
    """Loads AutoGPTQ's module for CPUs; the package's own __init__ imports what later versions of transformers lack."""
    found = importlib.util.find_spec("auto_gptq")
    assert found is not None
    assert found.origin is not None
    for name in ("auto_gptq", "auto_gptq.nn_modules", "auto_gptq.nn_modules.qlinear"):
        package = types.ModuleType(name)
        package.__path__ = [str(Path(found.origin).parent.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    from auto_gptq.nn_modules.qlinear.qlinear_cuda_old import QuantLinear

    def gptq(linear: torch.nn.Linear, scale_NG: Tensor, zero_NG: Tensor) -> tuple[torch.nn.Module, Tensor]:
        n, k = linear.weight.shape
        module = QuantLinear(4, GROUP, k, n, bias=False)
        module.pack(linear, scale_NG, zero_NG, torch.arange(k, dtype=torch.int32) // GROUP)
        return module, module(torch.eye(k).half()).t()  # it multiplies in torch where there is no GPU

    return gptq


if __name__ == "__main__":
    command, *paths = sys.argv[1:]
    with torch.no_grad():
        make(Path(paths[0])) if command == "make" else read(Path(paths[0]), Path(paths[1]))

"""Quantises small random InternVLs with the real tools, and dumps what they read from checkpoints.

    quantisation_tools.py make FOLDER          of each dense folder in it, a folder for each scheme, and beside that a
                                               file with what its tool makes of the weights
    quantisation_tools.py read FOLDER FILE ... what compressed-tensors' own reader makes of folders

It runs in an environment of its own (`tests/model/test_quantised_by_tools.py`), and uses nothing of internvl_rt.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

hf: Any = transformers  # transformers' annotations reject its own keyword arguments

VISION = ["re:.*vision_(tower|model).*", "re:.*multi_modal_projector.*", "re:.*mlp1.*"]
HEAD = ["re:.*lm_head", "re:.*language_model.output"]
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "symmetric": True}
NOT_PRESET: dict[str, dict[str, Any]] = {
    "W4A16_32": {**INT4, "group_size": 32},
    "W4A16_ASYM_32": {**INT4, "group_size": 32, "symmetric": False},
    "W4A16_CHANNEL": {**INT4, "strategy": "channel"},
    "W8A16_CHANNEL": {**INT4, "num_bits": 8, "strategy": "channel"},
}
# "_KV": static scales of the cache too. "_ALL": vision tower and projector too. "_GPTQ", "_AWQ": by these algorithms.
SCHEMES: dict[str, tuple[str, ...]] = {  # of each dense folder
    "hf": (
        *("FP8", "FP8_KV", "FP8_DYNAMIC", "FP8_DYNAMIC_ALL", "FP8_BLOCK", "W8A8", "W8A16", "W4A16", "W4A16_ASYM"),
        *("W4A16_GPTQ", "W4A16_ASYM_AWQ", *NOT_PRESET),
    ),
    "original": ("FP8_DYNAMIC_ALL", "FP8_BLOCK", "W8A8", "W4A16_ASYM_32"),
    "internlm2": ("FP8_DYNAMIC", "FP8_BLOCK", "W4A16_32"),
}
KV_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
OF_QUANTISED = ("_scale", "_zero_point", "_packed", "_shape")  # ends of names
VOCABULARY = 419  # of the tokenizer in tests/data


def build(decoder: type) -> Any:
    """Builds a bfloat16 `InternVLForConditionalGeneration`, whose widths are multiples of 128.

    decoder: the class of its decoder's config.
    """
    text = decoder(
        hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    vision = hf.InternVLVisionConfig(
        hidden_size=128, num_attention_heads=2, intermediate_size=256, num_hidden_layers=2, image_size=[112, 112],
        patch_size=[14, 14], norm_type="layer_norm", attention_bias=True,
    )  # fmt: skip
    config = hf.InternVLConfig(
        vision_config=vision, text_config=text, image_token_id=VOCABULARY - 1, image_seq_length=16,
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
    for source, schemes in SCHEMES.items():
        for scheme in schemes:
            out = folder / f"{source}-{scheme}"
            compress(folder / source, scheme, out)
            read(out, Path(f"{out}.safetensors"))
    how: dict[str, Any] = {"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm"}
    pack_layers(folder / "hf", folder / "hf-AWQ", {**how, "group_size": 32}, awq)
    pack_layers(folder / "original", folder / "original-AWQ", {**how, "group_size": 128}, awq)
    how = {"quant_method": "gptq", "bits": 4, "desc_act": False, "sym": False, "checkpoint_format": "gptq"}
    pack_layers(folder / "hf", folder / "hf-GPTQ", {**how, "group_size": 32}, gptq)
    how["checkpoint_format"] = "gptq_v2"
    pack_layers(folder / "original", folder / "original-GPTQ_V2", {**how, "group_size": 128}, gptq)


def compress(dense: Path, scheme: str, folder: Path) -> None:
    """Runs llm-compressor."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    preset = re.sub("_(ALL|KV|GPTQ|AWQ)$", "", scheme)
    how: dict[str, Any] = {"ignore": HEAD if scheme.endswith("_ALL") else HEAD + VISION}
    if weights := NOT_PRESET.get(scheme):
        how["config_groups"] = {"group_0": {"targets": ["Linear"], "weights": weights}}
    else:
        how |= {"scheme": preset, "targets": ["Linear"]}
    if scheme.endswith("_KV"):
        how["kv_cache_scheme"] = KV_CACHE
    recipe = GPTQModifier(**how) if scheme.endswith("_GPTQ") else QuantizationModifier(**how)
    seen = calibration() if preset == "FP8" or scheme.endswith(("_GPTQ", "_AWQ")) else {}
    model = load(dense)
    oneshot(model=model, recipe=[*([smoothing()] if scheme.endswith("_AWQ") else []), recipe], **seen)
    model.save_pretrained(folder, save_compressed=True)
    if isinstance(model, Named):
        section = json.loads((folder / "config.json").read_text())["quantization_config"]
        values = json.loads((dense / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, "quantization_config": section}))


def smoothing() -> Any:
    """Returns llm-compressor's AWQ, for the language model's layers. It asks for memory that only a GPU has."""
    from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier

    torch.Tensor.pin_memory = lambda tensor: tensor
    pairs = {"input_layernorm": "[qkv]_proj", "v_proj": "o_proj", "post_attention_layernorm": "(gate|up)_proj"}
    pairs["up_proj"] = "down_proj"
    before = "re:.*language_model.*"
    mappings = [AWQMapping(f"{before}{one}$", [f"{before}{other}$"]) for one, other in pairs.items()]
    return AWQModifier(mappings=mappings, n_grid=3)


def calibration() -> dict[str, Any]:
    """Returns a data set of random ids, which the tool's static scales and searches see."""
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
        "pipeline": "basic",
    }


class Shapes(hf.PretrainedConfig):
    """shapes: of a checkpoint's tensors by name, of the dense ones that it stands for if it is quantised."""

    model_type = "internvl_chat"


hf.AutoConfig.register("internvl_chat", Shapes)  # llm-compressor looks the model's config.json up


class Named(hf.PreTrainedModel):
    """Modules that are named as the tensors of a checkpoint: the classes of the original format are remote code."""

    config_class = Shapes

    def __init__(self, config: Shapes) -> None:
        super().__init__(config)
        for name in sorted(config.shapes, reverse=True):  # a weight before its bias
            shape = config.shapes[name]
            module: torch.nn.Module = self
            *parts, last = name.split(".")
            for part in parts:
                if part not in module._modules:
                    is_linear = name.endswith(f".{part}.weight") and len(shape) == 2 and "embed" not in part
                    new = torch.nn.Linear(shape[1], shape[0], bias=False) if is_linear else torch.nn.Module()
                    module.add_module(part, new)
                module = module.get_submodule(part)
            if module._parameters.get(last) is None:
                module.register_parameter(last, torch.nn.Parameter(torch.empty(shape)))
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        raise AssertionError(f"{module} has weights that are not in the checkpoint")


def load(folder: Path, **how: Any) -> Any:
    values = json.loads((folder / "config.json").read_text())
    if values["architectures"] == ["InternVLForConditionalGeneration"]:
        return hf.InternVLForConditionalGeneration.from_pretrained(folder, dtype="auto", **how)
    shapes: dict[str, list[int]] = {}
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            module, _, last = name.rpartition(".")
            if last == "weight_shape":
                shapes[f"{module}.weight"] = tensor.tolist()
            elif not last.endswith(OF_QUANTISED):
                shapes[name] = list(tensor.shape)
    config = Shapes(shapes=shapes, dtype="bfloat16")
    if "quantization_config" in values:
        config.quantization_config = values["quantization_config"]
    return Named.from_pretrained(folder, config=config, dtype="auto", **how)


def read(folder: Path, file: Path) -> None:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors", config
    model = load(folder, quantization_config=hf.CompressedTensorsConfig(dequantize=True))
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, file)


Pack = Callable[[torch.nn.Linear, Tensor, Tensor, dict[str, Any]], tuple[torch.nn.Module, Tensor]]


def pack_layers(dense: Path, folder: Path, config: dict[str, Any], pack: Pack) -> None:
    """Replaces the linears of the language model's layers by a tool's modules. The rest is that of the dense folder."""
    stored, made = {}, {}
    for name, tensor in load_file(dense / "model.safetensors").items():
        if not (name.startswith("language_model.") and name.endswith("_proj.weight")):
            stored[name] = made[name] = tensor.half()
            continue
        linear = torch.nn.Linear(tensor.shape[1], tensor.shape[0], bias=False).half()
        groups = tensor.float().view(len(tensor), -1, config["group_size"])
        scale = (groups.abs().amax(-1) / 8).half().float()
        zero = torch.randint(0, 16, scale.shape).float()  # all occur, 0 too, which is the odd one of GPTQ
        number = ((groups / scale[..., None]).round() + zero[..., None]).clamp(0, 15)
        linear.weight.data = ((number - zero[..., None]) * scale[..., None]).view_as(tensor).half()
        module, made[name] = pack(linear, scale, zero, config)
        stored |= {name.removesuffix("weight") + last: part for last, part in module.state_dict().items()}
    folder.mkdir()
    values = json.loads((dense / "config.json").read_text())
    values["llm_config" if "llm_config" in values else "text_config"]["quantization_config"] = config
    (folder / "config.json").write_text(json.dumps(values))
    stored = {name: tensor.contiguous() for name, tensor in stored.items()}
    if "llm_config" in values:  # as the official repositories have them
        torch.save(stored, folder / "pytorch_model.bin")
    else:
        save_file(stored, folder / "model.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in made.items()}, f"{folder}.safetensors")


def awq(
    linear: torch.nn.Linear, scale_NG: Tensor, zero_NG: Tensor, config: dict[str, Any]
) -> tuple[torch.nn.Module, Tensor]:
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    size = config["group_size"]
    scales = {"scales": scale_NG.half().t().contiguous(), "zeros": zero_NG.t().contiguous()}
    module = WQLinear_GEMM.from_linear(linear, 4, size, **scales)
    return module, dequantize_gemm(module.qweight, module.qzeros, module.scales, 4, size).t()


def gptq(
    linear: torch.nn.Linear, scale_NG: Tensor, zero_NG: Tensor, config: dict[str, Any]
) -> tuple[torch.nn.Module, Tensor]:
    """Packs with GPTQModel's module in torch. Its library of regular expressions would be built from source."""
    flags = SimpleNamespace(CASELESS=re.I, MULTILINE=re.M, DOTALL=re.S)
    sys.modules["pcre"] = SimpleNamespace(**vars(re), Flag=flags)  # type: ignore[assignment]
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    n, k = linear.weight.shape
    size = config["group_size"]
    module = TorchLinear(
        bits=4, group_size=size, sym=False, desc_act=False, in_features=k, out_features=n, bias=False
    ).eval()
    module.pack_original(linear, scale_NG, zero_NG, torch.arange(k, dtype=torch.int32) // size)
    dense_KN = module.dequantize_weight()
    if config["checkpoint_format"] == "gptq":
        convert_gptq_v2_to_v1_format_module(module, SimpleNamespace(bits=4, pack_dtype=torch.int32))
    return module, dense_KN.t()


if __name__ == "__main__":
    command, *paths = sys.argv[1:]
    with torch.no_grad():
        if command == "make":
            make(Path(paths[0]))
        for folder, file in zip(paths[::2], paths[1::2], strict=command == "read"):
            read(Path(folder), Path(file))

"""Builds small random models of InternVL's classes under other names, as transformers and the hub have them."""

import json
import shutil
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file, save_file

from internvl_rt.inputs.tokenizer import load_tokenizer
from support.hf_models import TOKENIZER, randomise, save_checkpoint

# Of a Qianfan-OCR: the config on the hub has keys of both formats, and its tensors have the original names; the
# installed transformers saves a -hf config, and puts "encoder." before the names of the language model's layers.
QianfanLayout = Literal["hub", "saved", "hub_config", "hub_names"]
_MIXED = {
    "dynamic_image_size": True,
    "force_image_size": 112,
    "max_dynamic_patch": 12,
    "min_dynamic_patch": 1,
    "pad2square": False,
    "ps_version": "v2",
    "select_layer": -1,
    "template": "internvl2_5",
    "use_thumbnail": True,
}


def build_qianfan_ocr() -> Any:
    """Builds a float32 `QianfanOCRForConditionalGeneration` with two layers per tower and eager attention."""
    import transformers  # imported here because it takes seconds

    hf: Any = transformers  # transformers' annotations reject its own keyword arguments
    tokenizer = load_tokenizer(TOKENIZER)
    text = hf.Qwen3Config(
        hidden_size=80,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 5e6},
    )
    vision = hf.QianfanOCRVisionConfig(
        hidden_size=64,
        num_attention_heads=2,
        intermediate_size=96,
        num_hidden_layers=2,
        image_size=[112, 112],
        patch_size=[14, 14],
    )
    config = hf.QianfanOCRConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.token_id("<IMG_CONTEXT>"),
        image_seq_length=16,
    )
    model = hf.QianfanOCRForConditionalGeneration._from_config(config, attn_implementation="eager").float().eval()
    model.generation_config.eos_token_id = None
    randomise(model)
    return model


def save_qianfan_ocr(model: Any, folder: Path, layout: QianfanLayout) -> None:
    """Writes config, weights and tokenizer of a Qianfan-OCR as a checkpoint folder."""
    folder.mkdir()
    for file in TOKENIZER.iterdir():
        shutil.copy(file, folder)
    model.save_pretrained(folder)
    if layout in ("hub", "hub_names"):
        saved = load_file(folder / "model.safetensors")
        assert any(".model.encoder.layers." in name for name in saved)
        tensors = {name.replace(".model.encoder.layers.", ".model.layers."): value for name, value in saved.items()}
        save_file(tensors, folder / "model.safetensors")
    if layout in ("hub", "hub_config"):
        config = json.loads((folder / "config.json").read_text())
        vision = config["vision_config"]
        vision |= {"qkv_bias": vision.pop("attention_bias"), "qk_normalization": vision.pop("use_qk_norm")}
        vision |= {"image_size": vision["image_size"][0], "patch_size": vision["patch_size"][0]}
        (folder / "config.json").write_text(json.dumps(config | _MIXED))


def save_intern_s1(model: Any, folder: Path) -> None:
    """Writes an InternVL of transformers as an Intern-S1, whose class transformers has not: the names differ alone."""
    save_checkpoint(model, folder, "hf_memory")
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["InternS1ForConditionalGeneration"], "model_type": "interns1"}
    config["vision_config"]["model_type"] = "interns1_vision"
    (folder / "config.json").write_text(json.dumps(config))

"""Writes the random checkpoint of bench/compare_cpu.py in a peer's own format, with the peer's own converter.

    python bench/cpu_convert.py llama.cpp FOLDER DTYPE SOURCE
    python bench/cpu_convert.py openvino FOLDER

compare_cpu.py starts it, with the Python that has the peer. FOLDER holds the checkpoint: `ours`, in the original
format, and `theirs`, as transformers has it. SOURCE is llama.cpp's own, with convert_hf_to_gguf.py.
"""

import json
import sys
from pathlib import Path
from typing import Any

# What the converters read in the official folders and the random one does not have.
PREPROCESSOR = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
DECODER = {"max_position_embeddings": 32768}
VISION = {"architectures": ["InternVisionModel"], "hidden_act": "gelu", "layer_norm_eps": 1e-6}


def to_llama_cpp(folder: Path, dtype: str, source: Path) -> None:
    """Writes `llama.cpp-DTYPE/text.gguf` and `vision.gguf`."""
    sys.path.insert(0, str(source))
    import convert_hf_to_gguf as converter
    from conversion.base import TextModel

    def describe(model: Any, _: object) -> str:
        """Says which tokenizer it is, which llama.cpp knows by a hash that random ones cannot have, and adds a merge.

        llama.cpp loads no tokenizer without merges; this one is of two zero bytes, which no prompt has.
        """
        model.gguf_writer.add_token_merges(["\u0100 \u0100"])
        return "qwen2"

    TextModel.get_vocab_base_pre = describe
    original, out = folder / "llama.cpp-original", folder / f"llama.cpp-{dtype}"
    if not original.exists():  # a folder of links
        original.mkdir()
        for file in (folder / "ours").iterdir():
            if file.name != "config.json":
                (original / file.name).symlink_to(file.resolve())
        config = json.loads((folder / "ours" / "config.json").read_text())
        config["llm_config"] = DECODER | config["llm_config"]
        config["vision_config"] = VISION | config["vision_config"]
        (original / "config.json").write_text(json.dumps(config))
        (original / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    out.mkdir()
    kind = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    for name, options in (("text", []), ("vision", ["--mmproj"])):
        sys.argv = [converter.__file__, str(original), f"--outtype={kind}", f"--outfile={out / name}.gguf", *options]
        converter.main()


def to_openvino(folder: Path) -> None:
    """Writes `openvino`, the files that OpenVINO GenAI wants of an `internvl_chat` model, all float32.

    optimum-intel exports `internvl_chat` only from the code on the hub, with an old transformers, and `internvl` not at
    all. So the parts are exported here: decoder and embedding with its configuration for them, the vision tower with
    the projector by OpenVINO itself.
    """
    import openvino
    import torch
    import transformers
    from openvino_tokenizers import convert_tokenizer
    from optimum.exporters.openvino import model_configs
    from optimum.exporters.openvino.convert import export_models
    from optimum.intel import OVConfig

    whole = transformers.InternVLForConditionalGeneration.from_pretrained(folder / "theirs", dtype=torch.float32).eval()
    config = whole.config.text_config
    decoder = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    decoder.model, decoder.lm_head = whole.model.language_model, whole.lm_head
    embedding = decoder.get_input_embeddings()
    embedding.config = config
    kind = (config.model_type, config, "int64", "fp32")
    patcher = model_configs.InternVL2ChatLangModelPatcher
    parts = {
        "openvino_language_model.xml": (decoder, model_configs.get_vlm_text_generation_config(*kind, patcher)),
        "openvino_text_embeddings_model.xml": (embedding, model_configs.get_vlm_text_embeddings_config(*kind)),
    }
    out, precision = folder / "openvino", OVConfig(dtype="fp32")
    out.mkdir()
    export_models(parts, out, [*parts], ov_config=precision, stateful=[True, False], library_name="transformers")

    class Tower(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = whole.model

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.model.get_image_features(pixel_values=pixel_values).pooler_output
            return found

    size = whole.config.vision_config.image_size[0]
    shape = openvino.PartialShape([-1, 3, size, size])
    with torch.no_grad():
        tower = openvino.convert_model(Tower(), example_input=torch.zeros(1, 3, size, size), input=[shape])
    tower.input(0).get_tensor().set_names({"pixel_values"})
    tower.output(0).get_tensor().set_names({"last_hidden_state"})
    tokenizers = convert_tokenizer(transformers.AutoTokenizer.from_pretrained(folder / "ours"), with_detokenizer=True)
    names = ("vision_embeddings_model", "tokenizer", "detokenizer")
    for name, model in zip(names, (tower, *tokenizers), strict=True):
        openvino.save_model(model, out / f"openvino_{name}.xml", compress_to_fp16=False)
    original = json.loads((folder / "ours" / "config.json").read_text())
    settings = {
        "config.json": original | {"hidden_size": config.hidden_size},
        "preprocessor_config.json": PREPROCESSOR | {"size": {"shortest_edge": size}},
        "generation_config.json": {"eos_token_id": 0},  # answers end at none
    }
    for name, values in settings.items():
        (out / name).write_text(json.dumps(values))


if __name__ == "__main__":
    if sys.argv[1] == "openvino":
        to_openvino(Path(sys.argv[2]))
    else:
        to_llama_cpp(Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))

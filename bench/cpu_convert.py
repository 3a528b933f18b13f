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

# What llama.cpp's converter reads in the official folders and the random one does not have.
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
    """Writes the language model alone to `openvino`, as float32: optimum-intel does not know `internvl` as a whole."""
    import torch
    import transformers
    from optimum.exporters.openvino import main_export
    from optimum.intel import OVConfig

    theirs = transformers.InternVLForConditionalGeneration.from_pretrained(folder / "theirs", dtype=torch.float32)
    text = transformers.AutoModelForCausalLM.from_config(theirs.config.text_config, dtype=torch.float32)
    text.model, text.lm_head = theirs.model.language_model, theirs.lm_head
    text.generation_config.eos_token_id = None
    decoder = folder / "openvino-decoder"
    text.save_pretrained(decoder)
    main_export(str(decoder), folder / "openvino", task="text-generation-with-past", ov_config=OVConfig(dtype="fp32"))


if __name__ == "__main__":
    if sys.argv[1] == "openvino":
        to_openvino(Path(sys.argv[2]))
    else:
        to_llama_cpp(Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))

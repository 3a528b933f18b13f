"""Checkpoints of the real tools multiply out to the tools' own numbers, and their readers accept what is written here.

llm-compressor quantises a model of transformers; AutoAWQ's and AutoGPTQ's modules pack its layers. They run in an
environment of their own.
"""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from internvl_rt import Engine, SamplingParams
from internvl_rt.checkpoint.config import load_config
from internvl_rt.checkpoint.folder import open_checkpoint
from internvl_rt.model.dialects import DIALECTS
from internvl_rt.model.internvl import named_linears, named_parameters
from internvl_rt.model.linear import Linear
from internvl_rt.model.weights import load_weights, plan_tensors
from support.environments import make_environment

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).parents[1] / "support" / "quantisation_tools.py"
TOKENIZER = Path(__file__).parents[1] / "data" / "tokenizer"
PACKAGES = ("datasets", "loguru", "psutil", "accelerate")
ALONE = ("llmcompressor", "compressed-tensors", "autoawq", "auto-gptq")  # what they require would replace torch
# scheme: how many tensors of weights of which kind
SCHEMES = {
    **dict.fromkeys(("FP8", "FP8_KV", "FP8_DYNAMIC", "FP8_BLOCK", "W8A8", "W8A16", "W8A16_128"), ("Linear8", 14)),
    "FP8_DYNAMIC_ALL": ("Linear8", 28),
    **dict.fromkeys(("W4A16", "W4A16_32", "W4A16_ASYM", "W4A16_ASYM_32", "AWQ", "GPTQ"), ("Linear4", 14)),
}


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_environment(tmp_path_factory.mktemp("tools") / "environment", PACKAGES, alone=ALONE)


@pytest.fixture(scope="module")
def made(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    subprocess.run([python, PROGRAM, "make", folder], check=True)
    return folder


def dense_tensors(folder: Path, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Returns the tensors of a dense checkpoint that a folder's weights make, by their names in either naming of
    transformers, and the kinds of the linears that some of them come from."""
    config = load_config(folder)
    how = {"dtype": dtype, "device": "cpu", "quantization": config.quantization}
    weights = load_weights(open_checkpoint(folder), config, **how)
    parameters, linears = named_parameters(weights), named_linears(weights)
    tensors, kinds = {}, []
    for name in ("hf", "hf-nested"):
        for tensor, planned in plan_tensors(config, DIALECTS[name]).items():
            (place,) = planned.placements
            path, _, field = place.parameter.rpartition(".")
            rows = slice(place.start, place.stop)
            if field != "weight_NK" or isinstance(linears.get(path), Linear | None):
                tensors[tensor] = parameters[place.parameter][rows].reshape(planned.shape)
                continue
            tensors[tensor] = linears[path].dense(dtype)[rows]
            kinds.append(type(linears[path]).__name__)
    return tensors, kinds


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_multiply_out_to_the_tools_own_numbers(made: Path, scheme: str) -> None:
    theirs = load_file(made / f"{scheme}.safetensors")
    dtype = torch.float16 if scheme in ("AWQ", "GPTQ") else torch.bfloat16
    ours, kinds = dense_tensors(made / scheme, dtype)
    kind, number = SCHEMES[scheme]
    assert kinds == [kind] * 2 * number  # in both namings
    assert {name for name, tensor in theirs.items() if not torch.equal(ours[name], tensor)} == set()
    assert len(theirs) > 60


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_engine_answers_with_them(made: Path, tmp_path: Path, scheme: str) -> None:
    model = shutil.copytree(made / scheme, tmp_path / "model")
    for file in TOKENIZER.iterdir():
        shutil.copy(file, model)
    with Engine.from_pretrained(model, device="cpu", kv_cache_bytes=1 << 20, max_num_seqs=1) as engine:
        reply = engine.chat([{"role": "user", "content": "abc"}], SamplingParams(max_tokens=4, ignore_eos=True))
        assert reply.usage.completion_tokens == 4
        if scheme == "FP8_KV":
            (layer, *_) = engine.cache.layers
            config = json.loads((model / "config.json").read_text())["quantization_config"]
            assert config["kv_cache_scheme"]["num_bits"] == 8
            assert layer.k_cache_BGPC.dtype == torch.float8_e4m3fn

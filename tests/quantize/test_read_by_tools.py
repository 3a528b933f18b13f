"""The reader of compressed-tensors in transformers multiplies out what is written to the same bits as the loader."""

import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from internvl_rt.checkpoint.config import load_config
from internvl_rt.checkpoint.folder import open_checkpoint
from internvl_rt.model.dialects import DIALECTS
from internvl_rt.model.internvl import map_linears
from internvl_rt.model.linear import Linear
from internvl_rt.model.weights import load_weights, save_weights
from internvl_rt.quantize import quantise
from support.environments import make_environment
from support.hf_models import build_reference, save_checkpoint

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).parents[1] / "support" / "quantisation_tools.py"
SCHEMES = {
    "fp8": {"scheme": "fp8"},
    "fp8, vision": {"scheme": "fp8", "vision": True},
    "w4a16": {"scheme": "w4a16", "group_size": 32},
    "w4a16, asymmetric": {"scheme": "w4a16", "group_size": 32, "asymmetric": True},
}


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tools") / "environment"
    return make_environment(folder, ("loguru", "psutil", "accelerate"), alone=("compressed-tensors",))


@pytest.mark.parametrize("layout", ["hf_hub", "hf_saved"])
@pytest.mark.parametrize("how", SCHEMES.values(), ids=SCHEMES)
def test_the_reader_of_transformers_has_the_same_numbers(python, tmp_path, how, layout):
    save_checkpoint(build_reference("llama").to(torch.bfloat16), tmp_path / "dense", layout)
    out = quantise(tmp_path / "dense", tmp_path / "out", device="cpu", compare=False, **how).folder
    subprocess.run([python, PROGRAM, "read", out, tmp_path / "theirs.safetensors"], check=True)
    theirs = load_file(tmp_path / "theirs.safetensors")

    config, dtype = load_config(out), torch.bfloat16
    weights = load_weights(open_checkpoint(out), config, dtype=dtype, device="cpu", quantization=config.quantization)
    multiplied = map_linears(weights, lambda _, linear: Linear(linear.dense(dtype), linear.bias_N))
    save_weights(multiplied, config, tmp_path, dialect=DIALECTS["hf-nested"])
    ours = load_file(tmp_path / "model.safetensors")
    assert {name for name in ours if not torch.equal(ours[name], theirs[name])} == set()

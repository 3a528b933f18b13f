"""Checkpoints of the real tools multiply out to the tools' own numbers, and their reader accepts what is written here.

llm-compressor quantises models of transformers, and modules that are named as the original format's tensors; AutoAWQ's
and GPTQModel's modules pack layers. They run in an environment of their own.
"""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from internvl_rt import Engine, SamplingParams
from internvl_rt.checkpoint.config import load_config
from internvl_rt.checkpoint.folder import open_checkpoint
from internvl_rt.model.dialects import DIALECTS, Dialect
from internvl_rt.model.internvl import ModelWeights, named_linears, named_parameters
from internvl_rt.model.linear import Linear, Linear4, Linear8
from internvl_rt.model.placement import plan_tensors
from internvl_rt.model.weights import load_weights
from internvl_rt.quantize import quantise
from support.environments import make_environment
from support.hf_models import save_checkpoint
from support.quantisation_tools import SCHEMES, build

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).parents[1] / "support" / "quantisation_tools.py"
TOKENIZER = Path(__file__).parents[1] / "data" / "tokenizer"
PACKAGES = ("datasets", "loguru", "psutil", "accelerate")
ALONE = (  # what they require would replace torch
    *("llmcompressor", "compressed-tensors", "autoawq"),
    *("gptqmodel", "defuser", "device-smi", "logbar", "tokenicer"),
)
FOLDERS = [f"{source}-{scheme}" for source, schemes in SCHEMES.items() for scheme in schemes]
FOLDERS += ["hf-AWQ", "original-AWQ", "hf-GPTQ", "original-GPTQ_V2"]
folders = pytest.mark.parametrize("name", FOLDERS)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_environment(tmp_path_factory.mktemp("tools") / "environment", PACKAGES, alone=ALONE)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with models in both formats, and one with InternLM2's layout."""
    folder = tmp_path_factory.mktemp("made")
    save_checkpoint(model := build(transformers.Qwen2Config), folder / "hf", "hf_saved")
    save_checkpoint(model, folder / "original", "original")
    save_checkpoint(build(transformers.LlamaConfig), folder / "internlm2", "original")
    return folder


@pytest.fixture(scope="module")
def made(python: Path, dense: Path) -> Path:
    subprocess.run([python, PROGRAM, "make", dense], check=True)
    return dense


def dense_tensors(folder: Path, weights: ModelWeights, dialect: Dialect) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors of a dense checkpoint that weights make."""
    parameters, dtype = named_parameters(weights), weights.decoder.embedding_VD.dtype
    for path, linear in named_linears(weights).items():
        parameters[f"{path}.weight_NK"] = linear.dense(dtype)
    for name, planned in plan_tensors(load_config(folder), dialect).items():
        tensor = torch.empty(planned.shape, dtype=dtype)
        matrix = tensor.view(-1, tensor.shape[-1])
        for place in planned.placements:
            part = matrix[place.rows, place.columns]
            part.copy_(parameters[place.parameter][place.start : place.stop].reshape(part.shape))
        yield name, tensor


def check(folder: Path, kinds: dict[str, type]) -> ModelWeights:
    """Compares a folder's weights with the tools' own numbers, which lie beside it. Returns them.

    kinds: of the linears whose paths begin so; all others are dense.
    """
    config, theirs = load_config(folder), load_file(f"{folder}.safetensors")
    dtype = theirs[next(iter(theirs))].dtype
    how = {"dtype": dtype, "device": "cpu", "quantization": config.quantization}
    weights = load_weights(open_checkpoint(folder), config, **how)
    for path, linear in named_linears(weights).items():
        assert type(linear) is next((kind for begin, kind in kinds.items() if path.startswith(begin)), Linear), path
    dialect = max(DIALECTS.values(), key=lambda one: len(one.telltales() & theirs.keys()))
    ours = dict(dense_tensors(folder, weights, dialect))
    assert ours.keys() == theirs.keys()
    assert [name for name, tensor in theirs.items() if not torch.equal(ours[name], tensor)] == []
    return weights


@folders
def test_weights_multiply_out_to_the_tools_own_numbers(made: Path, name: str) -> None:
    scheme = name.partition("-")[2]
    paths = ("decoder.layers.", *(("vision.layers.", "projector.") if scheme.endswith("_ALL") else ()))
    weights = check(made / name, dict.fromkeys(paths, Linear8 if "8" in scheme else Linear4))
    if scheme == "FP8_KV":
        stored = load_file(made / name / "model.safetensors")
        prefix = "language_model.model.layers.{}.self_attn."
        for index, (layer, scales) in enumerate(
            zip(weights.decoder.layers, weights.decoder.kv_scale_L2.tolist(), strict=True)
        ):
            of_layer = [stored[f"{prefix.format(index)}{one}_scale"].item() for one in ("k", "v", "o_proj.input")]
            assert [*scales, layer.o.input_scale_1.item()] == of_layer


@folders
def test_an_engine_answers_with_them(made: Path, tmp_path: Path, name: str) -> None:
    model = shutil.copytree(made / name, tmp_path / "model")
    for file in TOKENIZER.iterdir():
        shutil.copy(file, model)
    with Engine.from_pretrained(model, device="cpu", kv_cache_bytes=1 << 20, max_num_seqs=1) as engine:
        reply = engine.chat([{"role": "user", "content": "abc"}], SamplingParams(max_tokens=4, ignore_eos=True))
        assert reply.usage.completion_tokens == 4
        is_8_bits = engine.cache.pool.layers[0].k_cache_BGPC.dtype == torch.float8_e4m3fn
        assert is_8_bits == name.endswith("_KV")


def test_compressed_tensors_reads_what_is_written_here(python: Path, dense: Path, tmp_path: Path) -> None:
    quantise(dense / "original", fp8 := tmp_path / "fp8", "fp8", vision=True, compare=False)
    quantise(dense / "hf", int4 := tmp_path / "int4", "w4a16", group_size=32, asymmetric=True, compare=False)
    pairs = [path for folder in (fp8, int4) for path in (folder, f"{folder}.safetensors")]
    subprocess.run([python, PROGRAM, "read", *pairs], check=True)
    check(fp8, dict.fromkeys(("decoder.layers.", "vision.layers."), Linear8))
    check(int4, {"decoder.layers.": Linear4})

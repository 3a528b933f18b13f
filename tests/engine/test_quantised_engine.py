"""Engines of quantised weights: cast at load or read so, they answer as the dense model does, or nearly."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import internvl_rt
from internvl_rt import Engine, SamplingParams
from internvl_rt.errors import CheckpointError, RequestError
from internvl_rt.model.internvl import named_linears, named_parameters
from internvl_rt.model.linear import Linear8
from internvl_rt.quantize import quantise
from support.digits import MAX_DIGITS, draw_reading, load_glyphs, measure_accuracy
from support.quantised_files import LAYOUTS, STATIC

TINY = Path(internvl_rt.__file__).parent / "tiny"
PICTURE = TINY / "samples" / "4719.png"
QUESTION = [
    {"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "Read the digits."}]}
]
TEXT = [{"role": "user", "content": "How are you?"}]
casts = pytest.mark.parametrize("quantization", ["fp8", "int8"])


def load(**options):
    return Engine.from_pretrained("tiny", device="cpu", kv_cache_bytes=1 << 22, **options)


@casts
@pytest.mark.parametrize("backend", ["torch", "onednn"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_readmes_example_is_answered(quantization, backend, dtype):
    with load(quantization=quantization, backend=backend, dtype=dtype) as engine:
        assert engine.chat(QUESTION, SamplingParams(max_tokens=8)).text == "4719"


@casts
def test_the_layers_of_the_language_model_are_cast_and_on_request_those_of_the_tower(quantization):
    for vision in (False, True):
        with load(quantization=quantization, quantize_vision=vision, backend="torch") as engine:
            kinds = {path: isinstance(linear, Linear8) for path, linear in named_linears(engine.model.weights).items()}
            expected = {
                path: path.startswith(("decoder.layers.", "vision.layers.") if vision else "decoder.layers.")
                for path in kinds
            }
            assert kinds == expected
            assert engine.memory.weight_bytes == sum(p.nbytes for p in named_parameters(engine.model.weights).values())


@casts
def test_an_answer_does_not_depend_on_what_runs_beside_it_or_on_chunks(quantization):
    params = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=1)
    with load(quantization=quantization) as engine:
        alone = [engine.chat(messages, params) for messages in (QUESTION, TEXT)]
        together = engine.generate([QUESTION, TEXT, QUESTION], params)
    with load(quantization=quantization, max_tokens_per_step=16, prefix_cache=False) as engine:
        in_chunks = engine.generate([QUESTION, TEXT], params)
    for reply, expected in zip([*together, *in_chunks], [*alone, alone[0], *alone], strict=True):
        assert reply.token_ids == expected.token_ids
        ours, theirs = ([place.logprob for place in each.logprobs] for each in (reply, expected))
        # In another order of sums an input may be rounded to the next FP8 number, which is up to 6 % away.
        assert np.allclose(ours, theirs, atol=0.05 if quantization == "fp8" else 1e-4)


def test_a_quantised_checkpoint_is_not_cast_again(tmp_path):
    shutil.copytree(TINY, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["llm_config"]["quantization_config"] = LAYOUTS["awq"][1]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        RequestError, match=r"is for dense checkpoints, but this one is quantised \(awq\); leave it out"
    ):
        Engine.from_pretrained(tmp_path / "model", device="cpu", quantization="fp8")
    with pytest.raises(RequestError, match="quantize_vision needs quantization="):
        load(quantize_vision=True)


def test_static_scales_of_a_file_are_used_unless_the_options_say_otherwise(tmp_path):
    folder = quantise("tiny", tmp_path / "model", "fp8", compare=False).folder
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = STATIC
    (folder / "config.json").write_text(json.dumps(config))
    names = [f"language_model.model.layers.{index}.self_attn.{part}_scale" for index in range(4) for part in "kv"]
    scales = {name: torch.tensor([0.02 + number / 1000]) for number, name in enumerate(names)}
    save_file(scales, folder / "scales.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(names, "scales.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for kv_cache_dtype in ("auto", "fp8", "model"):
        with Engine.from_pretrained(folder, device="cpu", kv_cache_dtype=kv_cache_dtype, max_num_seqs=1) as engine:
            assert engine.chat(QUESTION, SamplingParams(max_tokens=8)).text == "4719"
            layer = engine.cache.pool.layers[3]
            assert layer.k_cache_BGPC.dtype == (torch.float32 if kv_cache_dtype == "model" else torch.float8_e4m3fn)
            if kv_cache_dtype == "auto":
                assert torch.allclose(layer.static_scale_2, torch.tensor([0.026, 0.027]))
            else:
                assert layer.static_scale_2 is None
    scales[names[0]] = torch.tensor([torch.nan])
    save_file(scales, folder / "scales.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.k_scale is nan, expected a positive number"):
        Engine.from_pretrained(folder, device="cpu")


def test_fp8_on_a_cpu_says_that_it_is_slow(caplog):
    with caplog.at_level(logging.WARNING, "internvl_rt"), load(quantization="fp8"):
        pass
    assert "quantization='int8' is faster" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "internvl_rt"), load(quantization="int8"):
        pass
    assert caplog.text == ""


@pytest.mark.slow
def test_fp8_reads_held_out_digits_as_well_as_float32_within_half_a_point():
    """Inputs of products are rounded as well, as FP8 products of a GPU round them."""
    rng, glyphs = np.random.default_rng(47), load_glyphs(held_out=True)
    exercises = [draw_reading(rng, glyphs, n, "read") for n in range(1, MAX_DIGITS + 1) for _ in range(200)]
    shares = {}
    for quantization in (None, "fp8", "int8"):
        with load(quantization=quantization, dtype="float32", backend="torch") as engine:
            shares[quantization] = measure_accuracy(engine, exercises)
    assert shares["fp8"] >= shares[None] - 0.005, shares
    assert shares["int8"] >= shares[None] - 0.005, shares

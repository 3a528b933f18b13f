"""Engines of quantised weights: cast at load or read so, they answer as the dense model does, or nearly."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

import internvl_rt
from internvl_rt import Engine, SamplingParams
from internvl_rt.errors import RequestError
from internvl_rt.model.internvl import named_linears, named_parameters
from internvl_rt.model.linear import Linear8
from support.digits import MAX_DIGITS, draw_reading, load_glyphs, measure_accuracy
from support.quantised_files import LAYOUTS

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

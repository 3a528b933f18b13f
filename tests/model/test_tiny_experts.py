"""A model with experts reads digits as well as the one without from which it was trained."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from internvl_rt import Engine
from internvl_rt.model.linear import Experts
from support.digits import MAX_DIGITS, draw_reading, load_glyphs, measure_accuracy

SCRIPT = Path(__file__).parents[1] / "train_tiny_experts.py"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_tiny_model_with_experts_reads_as_well_as_the_one_without(tmp_path: Path) -> None:
    subprocess.run([sys.executable, SCRIPT, "--out", tmp_path / "experts"], check=True, capture_output=True)
    rng, glyphs = np.random.default_rng(61), load_glyphs(held_out=True)
    readings = [draw_reading(rng, glyphs, 1 + n % MAX_DIGITS, "read", "count") for n in range(600)]
    with Engine.from_pretrained("tiny", device="cpu", dtype="float32") as engine:
        without = measure_accuracy(engine, readings)
    with Engine.from_pretrained(
        tmp_path / "experts", device="cpu", dtype="float32", backend="torch", prefix_cache=False
    ) as engine:
        assert measure_accuracy(engine, readings) >= without - 0.02
        for layer in engine.model.weights.decoder.layers:  # each pair (token, expert) must meet its own expert twice
            assert isinstance(layer.mlp, Experts)
            down, num_experts = layer.mlp.all_down, layer.mlp.num_here
            down_XDF = down.dense(torch.float32).view(num_experts, -1, down.num_inputs)
            down_XDF.copy_(down_XDF.roll(2, 0))  # dense() of a float32 weight is the weight itself
        assert measure_accuracy(engine, readings[:100]) < 0.5

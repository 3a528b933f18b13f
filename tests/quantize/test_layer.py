"""A layer whose channels are scaled for rounding computes the same, and is rounded with less error."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from internvl_rt.model.internvl import build_weights
from internvl_rt.quantize.calibration import CalibrationPrompt, LayerRunner, chosen_rows
from internvl_rt.quantize.layer import (
    linears_of,
    relative_error,
    round_layer,
    rounded_layer,
    run_and_record,
    search_layer,
)
from internvl_rt.quantize.options import QuantiseOptions
from internvl_rt.quantize.rounding import round_int4
from internvl_rt.quantize.search import search_factors, search_ranges, weigh_rows
from support.small_models import QWEN2, QWEN3, build_model

DECODERS = {"biases": QWEN2, "heads one to one": replace(QWEN2, num_kv_heads=4), "norms on q and k": QWEN3}
LENGTHS = (90, 40)


def prompts():
    found = []
    for length in LENGTHS:
        is_visual_T = np.zeros(length, bool)
        is_visual_T[10:30] = True
        found.append(CalibrationPrompt((0,) * length, np.arange(length, dtype=np.float32), is_visual_T, ()))
    return found


@pytest.fixture(params=DECODERS.values(), ids=DECODERS)
def case(request):
    model = build_model(decoder=request.param)
    source = SimpleNamespace(
        config=model.config, shapes=lambda: build_weights(model.config, dtype=torch.float32, device="meta")
    )
    runner = LayerRunner(source, prompts(), torch.device("cpu"))
    generator = torch.Generator().manual_seed(2)
    channels = torch.randn(model.config.decoder.hidden_size, generator=generator).exp()  # some are far larger
    states = [channels * torch.randn(n, len(channels), generator=generator) for n in LENGTHS]
    return model, runner, states


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scaled_layer_computes_what_the_layer_does(case, dtype):
    model, runner, states = case
    options = QuantiseOptions(scheme="w4a16", group_size=32)
    (layer,) = model.weights.decoder.layers
    rows, is_visual_R = chosen_rows(prompts())
    right, inputs = run_and_record(runner, layer, states, rows)
    assert {n: x.shape[1] for n, x in inputs.items()} == {n: one.num_inputs for n, one in linears_of(layer).items()}
    scaled, _ = search_layer(layer, inputs, torch.from_numpy(is_visual_R), model.config.decoder, options, dtype)
    assert not torch.equal(scaled.norm1.weight_D, layer.norm1.weight_D)
    # The norms' own rounding is made up for in the weights; that of a bias of values, in 16 bits, is not.
    error = relative_error(prompts(), states, right, runner.run(scaled, states))
    assert error < (1e-5 if dtype == torch.float32 or layer.qkv.bias_N is None else 4e-3)


@torch.inference_mode()
@pytest.mark.parametrize("asymmetric", [False, True])
def test_the_search_rounds_better_than_rounding_to_nearest(case, asymmetric):
    model, runner, states = case
    options = QuantiseOptions(scheme="w4a16", group_size=32, asymmetric=asymmetric)
    (layer,) = model.weights.decoder.layers
    rows, is_visual_R = chosen_rows(prompts())
    right, inputs = run_and_record(runner, layer, states, rows)
    searched, rounded = search_layer(
        layer, inputs, torch.from_numpy(is_visual_R), model.config.decoder, options, torch.bfloat16
    )
    nearest = round_layer(layer, options, torch.bfloat16)
    errors = [
        relative_error(prompts(), states, right, runner.run(rounded_layer(*each, options), states))
        for each in ((searched, rounded), (layer, nearest))
    ]
    assert errors[0] < 0.9 * errors[1]


@torch.inference_mode()
def test_fp8_is_measured_with_rounded_inputs(case):
    _, runner, states = case
    (layer,) = case[0].weights.decoder.layers
    options = QuantiseOptions(scheme="fp8")
    rounded = rounded_layer(layer, round_layer(layer, options, torch.float32), options)
    assert rounded.qkv.inputs == "token"
    error = relative_error(prompts(), states, runner.run(layer, states), runner.run(rounded, states))
    assert 0.005 < error < 0.08


def test_an_error_is_relative_to_what_the_layer_adds_and_both_kinds_of_tokens_count_equally():
    (prompt,) = prompts()[:1]
    x = torch.zeros(len(prompt), 4)
    right = x + 2
    found = right.clone()
    found[torch.from_numpy(prompt.is_visual_T)] += 0.2  # a tenth off
    assert relative_error([prompt], [x], [right], [found]) == pytest.approx(0.05)
    assert relative_error([prompt], [x], [right], [right]) == 0


def test_rows_are_chosen_evenly_of_both_kinds():
    many = CalibrationPrompt((0,) * 3000, np.zeros(3000, np.float32), np.arange(3000) < 2900, ())
    rows, is_visual_R = chosen_rows([many, *prompts()])
    assert [int(is_visual_R.sum()), int((~is_visual_R).sum())] == [512, 190]
    assert sum(map(len, rows)) == len(is_visual_R)
    assert np.diff(rows[0][rows[0] < 2900]).max() <= 7
    assert 72 <= len(rows[1]) <= 75  # all of text, and few of the visual ones


def test_text_and_visual_tokens_weigh_the_same_whatever_their_number_and_size():
    x_RK = torch.randn(12, 32, generator=torch.Generator().manual_seed(0))
    x_RK[3] *= 1000
    x_RK[4] = 0
    weight_NK = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    is_visual_R = torch.arange(12) < 9
    size_R = (weigh_rows(x_RK, weight_NK, is_visual_R) @ weight_NK.t()).square().sum(1)
    assert size_R[9:].tolist() == pytest.approx([1 / 3] * 3)
    assert size_R[:9].tolist() == pytest.approx([1 / 9] * 4 + [0] + [1 / 9] * 4)


def test_factors_are_those_of_the_channels_that_matter():
    generator = torch.Generator().manual_seed(0)
    x_RK, weight_NK = torch.randn(64, 64, generator=generator), torch.randn(32, 64, generator=generator)
    x_RK[:, 5] *= 30
    factors = search_factors(x_RK, weight_NK, lambda w: round_int4(w, 32, asymmetric=False, dtype=torch.float32))
    assert factors.argmax() == 5
    shared = search_factors(x_RK, weight_NK, lambda w: round_int4(w, 32, asymmetric=False, dtype=torch.float32), 2, 16)
    assert torch.equal(shared.view(2, 2, 16)[:, 0], shared.view(2, 2, 16)[:, 1])


def test_a_range_that_loses_a_column_is_cut_only_where_that_column_is_hardly_used():
    generator = torch.Generator().manual_seed(0)
    x_RK, weight_NK = torch.randn(64, 32, generator=generator), 0.1 * torch.randn(8, 32, generator=generator)
    weight_NK[:, 0] = 1
    how = {"asymmetric": False, "dtype": torch.float32}
    used = search_ranges(x_RK, weight_NK, 32, **how)
    x_RK[:, 0] *= 1e-3
    unused = search_ranges(x_RK, weight_NK, 32, **how)
    assert used.min() > 0.85 > unused.max()

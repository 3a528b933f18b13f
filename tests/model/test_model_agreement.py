"""Whole models in 16 bits on a GPU agree with float32 references, graphs with eager steps; mistakes are noticed."""

import numpy as np
import pytest
import torch

from internvl_rt import Engine, SamplingParams
from internvl_rt.checkpoint.find import random_config
from internvl_rt.model.internvl import InternVL
from internvl_rt.model.ops import TORCH
from internvl_rt.model.ops_triton import triton_ops
from internvl_rt.model.random_checkpoint import random_weights
from support.agreement import in_float32, layer_errors, logits_of, rms_error, top1_agreement, tower_cosine
from support.small_models import VIT_6B, build_model

# The likeliest token must lead by this many times the noise of a logit. The difference of two logits has 1.4 times
# that noise, and is off by more than four times as much for one token in 16,000.
SURE = 6.0


def random_model(name: str, dtype: torch.dtype) -> InternVL:
    config = random_config(name)
    return InternVL(config, random_weights(config, dtype=dtype, device="cuda"), triton_ops(torch.device("cuda")))


def draw_tiles(num_tiles: int, side: int, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    tiles = torch.randint(0, 256, (num_tiles, side, side, 3), dtype=torch.uint8, generator=generator)
    return tiles.to(device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_vision_tower_of_the_300m_agrees_with_float32(dtype: torch.dtype) -> None:
    model = random_model("InternVL3-1B", dtype)
    reference = in_float32(model)
    tiles = draw_tiles(2, 448, "cuda")
    assert max(layer_errors(model, reference, tiles)) < 1e-2
    assert tower_cosine(model, reference, tiles) >= 0.999


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["InternVL3-1B", "InternVL3-8B"])
def test_likeliest_tokens_agree_with_float32(name: str) -> None:
    """Random weights make flat logits, so plain torch in bfloat16 measures how much rounding may change them."""
    model = random_model(name, torch.bfloat16)
    token_ids = np.random.default_rng(0).integers(0, 150_000, 1000).tolist()
    ours = logits_of(model, token_ids)
    theirs = logits_of(InternVL(model.config, model.weights, TORCH), token_ids)
    reference = logits_of(in_float32(model), token_ids)
    noise = rms_error(theirs, reference)
    assert rms_error(ours, reference) <= 1.1 * noise
    share, num_sure = top1_agreement(ours, reference, SURE * noise)
    assert num_sure >= 20, "the logits are too flat to tell"
    assert share >= 0.999


@pytest.mark.gpu
def test_decode_graphs_give_the_bits_of_eager_steps() -> None:
    """Graphs exist for the batch sizes one and four: padding would change how attention is split."""
    params = SamplingParams(max_tokens=24, ignore_eos=True, logprobs=1)
    conversations = [[{"role": "user", "content": "digits " * n}] for n in (3, 40, 7, 20)]
    found = []
    with Engine.from_pretrained("random:InternVL3-1B", device="cuda", max_num_seqs=4, max_model_len=512) as engine:
        engine.runner._prefill_graphs = None  # their products have other sizes than eager ones
        for _ in range(2):
            for batch in (conversations[:1], conversations):
                replies = engine.generate(batch, params)
                found.append([[(t.token_id, t.logprob) for t in reply.logprobs or ()] for reply in replies])
            engine.cache.blocks.reset()
            engine.runner._decode_graphs = None
    assert found[0] == found[2]
    assert found[1] == found[3]


def test_a_model_agrees_with_itself() -> None:
    model = build_model()
    tiles = draw_tiles(2, 56, "cpu")
    assert max(layer_errors(model, in_float32(model), tiles)) == 0
    assert tower_cosine(model, in_float32(model), tiles) == pytest.approx(1)
    logits, reference = (logits_of(each, list(range(40))) for each in (model, in_float32(model)))
    assert rms_error(logits, reference) == 0
    assert top1_agreement(logits, reference, 0.1)[0] == 1


def test_layers_run_one_by_one_are_the_tower() -> None:
    """On the kernels, the layers that are compared one by one compute what the tower of the engine computes."""
    model = build_model(VIT_6B)
    tiles = draw_tiles(1, 56, "cpu")
    assert max(layer_errors(InternVL(model.config, model.weights, triton_ops(model.device)), model, tiles)) < 1e-5


@pytest.mark.parametrize("part", ["vision.layers.1.fc1", "vision.layers.2.proj"])
def test_a_layer_of_the_wrong_scale_is_noticed(part: str) -> None:
    model, wrong = build_model(), build_model()
    _, _, index, name = part.split(".")
    getattr(wrong.weights.vision.layers[int(index)], name).weight_NK.mul_(1.5)
    errors = layer_errors(wrong, model, draw_tiles(1, 56, "cpu"))
    assert errors[int(index)] > 1e-2
    assert max(error for place, error in enumerate(errors) if place != int(index)) == 0


def test_a_decoder_of_the_wrong_scale_is_noticed() -> None:
    model, wrong = build_model(), build_model()
    wrong.weights.decoder.layers[0].mlp.down.weight_NK.mul_(-1)
    assert wrong.ops is TORCH
    logits, reference = (logits_of(each, list(range(40))) for each in (wrong, model))
    assert rms_error(logits, reference) > 0.01
    assert top1_agreement(logits, reference, 0.1)[0] < 0.99

"""Experts are read from each of the ways in which checkpoints store them, and written so."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from internvl_rt.checkpoint.folder import open_checkpoint
from internvl_rt.errors import CheckpointError
from internvl_rt.model.dialects import DIALECTS
from internvl_rt.model.internvl import named_parameters
from internvl_rt.model.placement import Placement, plan_tensors
from internvl_rt.model.shard import WHOLE, Shard
from internvl_rt.model.weights import load_weights, save_weights
from support.small_models import EXPERTS, GPT_OSS, VIT_300M, build_model

D, F, X = EXPERTS.hidden_size, EXPERTS.intermediate_size, 5
LAST = 10  # layer numbers have one digit or two


def save(decoder, folder, dialect):
    model = build_model(VIT_300M, replace(decoder, num_layers=LAST + 1))
    save_weights(model.weights, model.config, folder, dialect=dialect)
    loaded = load_weights(open_checkpoint(folder), model.config, dtype=torch.float32, device="cpu")
    ours, theirs = named_parameters(loaded), named_parameters(model.weights)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[path].cpu()) for path, tensor in ours.items())
    return load_file(folder / "model.safetensors"), model.weights.decoder.layers[LAST]


def test_one_tensor_for_all_experts_of_a_layer(tmp_path):
    stored, layer = save(EXPERTS, tmp_path, replace(DIALECTS["hf-nested"], experts="stacked"))
    block = f"model.language_model.layers.{LAST}.mlp"
    assert torch.equal(stored[f"{block}.experts.gate_up_proj"].flatten(0, 1), layer.mlp.all_gate_up.weight_NK.cpu())
    assert torch.equal(stored[f"{block}.experts.down_proj"].flatten(0, 1), layer.mlp.all_down.weight_NK.cpu())
    assert stored[f"{block}.experts.gate_up_proj"].shape == (X, 2 * F, D)
    assert not any(".experts.0." in name for name in stored)


def test_a_tensor_for_each_expert(tmp_path):
    stored, layer = save(EXPERTS, tmp_path, DIALECTS["original"])
    block = f"language_model.model.layers.{LAST}.mlp"
    mlp = layer.mlp.expert(3)
    gate_up = [stored[f"{block}.experts.3.{part}_proj.weight"] for part in ("gate", "up")]
    assert torch.equal(torch.cat(gate_up), mlp.gate_up.weight_NK.cpu())
    assert torch.equal(stored[f"{block}.experts.3.down_proj.weight"], mlp.down.weight_NK.cpu())
    assert torch.equal(stored[f"{block}.gate.weight"], layer.mlp.router.weight_NK.cpu())


def test_each_expert_has_its_rows_of_what_a_layer_has_of_all():
    plan = plan_tensors(build_model(VIT_300M, EXPERTS).config, DIALECTS["original"])
    for name, last, start, size in (
        ("2.gate_proj", "all_gate_up", 2 * 2 * F, F),
        ("2.up_proj", "all_gate_up", 2 * 2 * F + F, F),
        ("4.down_proj", "all_down", 4 * D, D),
    ):
        (place,) = plan[f"language_model.model.layers.0.mlp.experts.{name}.weight"].placements
        assert place == Placement(f"decoder.layers.0.mlp.{last}.weight_NK", start, start + size)


NUMBERS = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def write_mxfp4(folder, model, seed=5):
    """Writes experts in MXFP4, and returns what they mean: gate and up, and down, of each layer."""
    generator = torch.Generator().manual_seed(seed)
    save_weights(model.weights, model.config, folder, dialect=replace(DIALECTS["original"], experts="gpt_oss"))
    tensors, dense = load_file(folder / "model.safetensors"), []
    for index in range(model.config.decoder.num_layers):
        of_layer = []
        for name, rows, columns in (("gate_up_proj", 2 * F, D), ("down_proj", D, F)):
            code = torch.randint(0, 16, (X, rows, columns), generator=generator)
            exponent = torch.randint(115, 128, (X, rows, columns // 32), generator=generator)
            path = f"language_model.model.layers.{index}.mlp.experts.{name}"
            del tensors[path]
            pairs = code.view(X, rows, columns // 32, 16, 2)
            tensors[f"{path}_blocks"] = (pairs[..., 0] + 16 * pairs[..., 1]).to(torch.uint8)
            tensors[f"{path}_scales"] = exponent.to(torch.uint8)
            scale = (2.0 ** (exponent - 127)).repeat_interleave(32, -1)
            of_layer.append(torch.tensor(NUMBERS)[code] * scale)
        dense.append(of_layer)
    save_file(tensors, folder / "model.safetensors")
    return dense


@pytest.mark.parametrize(
    "shard", [WHOLE, Shard(1, 2), Shard(1, 2, by_expert=True)], ids=["whole", "columns", "experts"]
)
def test_experts_in_mxfp4_are_what_they_multiply_out_to(tmp_path, shard):
    model = build_model(VIT_300M, replace(GPT_OSS, num_layers=2, windows=(6, None)))
    dense = write_mxfp4(tmp_path, model)
    loaded = load_weights(open_checkpoint(tmp_path), model.config, dtype=torch.float32, device="cpu", shard=shard)
    experts, columns = slice(0, X), slice(0, F)
    if shard.size == 2:
        experts, columns = (slice(3, X), columns) if shard.by_expert else (experts, slice(F // 2, F))
    for layer, (gate_up_XND, down_XDF) in zip(loaded.decoder.layers, dense, strict=True):
        by_turns = gate_up_XND[experts].view(-1, F, 2, D)[:, columns].transpose(1, 2)  # gate and up are by turns there
        assert torch.equal(layer.mlp.all_gate_up.weight_NK, by_turns.reshape(-1, D))
        assert torch.equal(layer.mlp.all_down.weight_NK, down_XDF[experts][..., columns].flatten(0, 1))


def test_what_is_amiss_in_mxfp4_is_named(tmp_path):
    model = build_model(VIT_300M, GPT_OSS)
    write_mxfp4(tmp_path, model)
    good, name = load_file(tmp_path / "model.safetensors"), "language_model.model.layers.0.mlp.experts.down_proj_scales"
    broken = good[name].clone()
    broken[2, 7, 1] = 255
    for tensors, problem in (
        (good | {name: broken}, "down_proj_blocks: numbers are not finite"),
        (good | {name: good[name].int()}, f"1 of the wrong dtype: {name} is torch.int32, expected torch.uint8"),
        (good | {name: good[name][:, :, :1].contiguous()}, f"1 of the wrong shape: {name} is"),
        ({key: one for key, one in good.items() if key != name}, f"1 missing: {name}"),
    ):
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=problem):
            load_weights(open_checkpoint(tmp_path), model.config, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("base", ["original", "hf", "hf-nested"])
def test_experts_of_gpt_oss_have_their_inputs_first_and_gate_and_up_by_turns(tmp_path, base):
    windows = (6, None) * (LAST // 2) + (6,)
    stored, layer = save(replace(GPT_OSS, windows=windows), tmp_path, replace(DIALECTS[base], experts="gpt_oss"))
    mlp, heads = layer.mlp, layer.sinks_H.cpu()
    block = f"{'model.language_model' if base == 'hf-nested' else 'language_model.model'}.layers.{LAST}"
    gate_up_XDF = mlp.all_gate_up.weight_NK.cpu().view(X, 2, F, D).permute(0, 3, 2, 1).reshape(X, D, 2 * F)
    assert torch.equal(stored[f"{block}.mlp.experts.gate_up_proj"], gate_up_XDF)
    assert torch.equal(stored[f"{block}.mlp.experts.down_proj"], mlp.all_down.weight_NK.cpu().view(X, D, F).mT)
    bias_XF = mlp.all_gate_up.bias_N.cpu().view(X, 2, F).mT.reshape(X, 2 * F)
    assert torch.equal(stored[f"{block}.mlp.experts.gate_up_proj_bias"], bias_XF)
    assert torch.equal(stored[f"{block}.mlp.experts.down_proj_bias"], mlp.all_down.bias_N.cpu().view(X, D))
    assert torch.equal(stored[f"{block}.mlp.router.bias"], mlp.router.bias_N.cpu())
    assert torch.equal(stored[f"{block}.self_attn.sinks"], heads)

"""Quantised checkpoints load as what they multiply out to, in every layout, and anything amiss is refused by name."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from internvl_rt.checkpoint.folder import open_checkpoint
from internvl_rt.checkpoint.quantization import cast
from internvl_rt.errors import CheckpointError, ConfigError
from internvl_rt.model import stored_linear
from internvl_rt.model.internvl import InternVL, named_linears, named_parameters
from internvl_rt.model.linear import Linear, Linear4, Linear8
from internvl_rt.model.ops import TORCH
from internvl_rt.model.weights import find_schemes, load_weights, shape_weights
from support.quantised_files import LAYOUTS, quantization_of, write_quantised
from support.small_models import EXPERTS, INTERNLM2, QWEN2, QWEN3, build_model

# Rows of modules are no multiples of 128, so blocks of scales do not line up; K of `down` is none either.
DECODERS = {"original": replace(QWEN2, num_layers=2), "internlm2": INTERNLM2, "hf": QWEN3, "hf-nested": EXPERTS}
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def config_of(dialect="original"):
    config = build_model(decoder=DECODERS[dialect]).config
    return replace(config, format="original" if dialect in ("original", "internlm2") else "hf")


def load(folder: Path, layout: str, dialect: str = "original", dtype: torch.dtype = torch.float32):
    quantization = quantization_of(LAYOUTS[layout][1])
    return load_weights(
        open_checkpoint(folder), config_of(dialect), dtype=dtype, device="cpu", quantization=quantization
    )


@layouts
@pytest.mark.parametrize("dialect", DECODERS)
def test_a_quantised_checkpoint_is_the_dense_one_that_it_multiplies_out_to(tmp_path, layout, dialect):
    _, dense = write_quantised(tmp_path, config_of(dialect), layout, dialect)
    weights = load(tmp_path, layout, dialect)
    (tmp_path / "dense").mkdir()
    save_file({name: tensor.contiguous() for name, tensor in dense.items()}, tmp_path / "dense" / "model.safetensors")
    wanted = load_weights(open_checkpoint(tmp_path / "dense"), config_of(dialect), dtype=torch.float32, device="cpu")
    ours, theirs = named_linears(weights), named_linears(wanted)
    for path, linear in ours.items():
        is_dense = not path.startswith("decoder.layers.") or path.endswith(".router")
        assert isinstance(linear, Linear) == is_dense, path
        assert torch.equal(linear.dense(torch.float32), theirs[path].dense(torch.float32)), path
        for dtype in (torch.bfloat16, torch.float16):  # one rounding
            assert torch.equal(linear.dense(dtype), theirs[path].dense(torch.float32).to(dtype)), path
        if linear.bias_N is not None:
            assert torch.equal(linear.bias_N, theirs[path].bias_N)
    assert torch.equal(weights.decoder.norm.weight_D, wanted.decoder.norm.weight_D)


@layouts
def test_the_planned_bytes_are_those_that_are_loaded(tmp_path, layout):
    write_quantised(tmp_path, config_of(), layout)
    loaded = named_parameters(load(tmp_path, layout, dtype=torch.bfloat16))
    schemes = find_schemes(config_of(), quantization_of(LAYOUTS[layout][1]))
    planned = named_parameters(shape_weights(config_of(), torch.bfloat16, schemes))
    assert {path: (p.shape, p.nbytes) for path, p in planned.items()} == {
        path: (p.shape, p.nbytes) for path, p in loaded.items()
    }


LAST = {
    "fp8 static": ("weight", "weight_scale", "input_scale"),
    "fp8 block": ("weight", "weight_scale"),
    "fp8 of transformers": ("weight", "weight_scale_inv"),
    "int8 channel": ("weight", "weight_scale"),
    "int4 asymmetric": ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point"),
    "awq": ("qweight", "qzeros", "scales"),
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
}
MODULE = "language_model.model.layers.1.self_attn.k_proj"


def broken(tensor: torch.Tensor, fault: str) -> torch.Tensor:
    if fault == "reshaped":
        return torch.cat((tensor.view(-1), tensor.view(-1)))
    if fault == "another dtype":
        return tensor.view(torch.uint8).view(-1)[: tensor.numel()].view(tensor.shape)
    assert fault == "not finite"
    tensor = tensor.clone()
    if tensor.dtype == torch.float8_e4m3fn:
        tensor.view(torch.uint8).view(-1)[-1] = 0x7F
    else:
        tensor.view(-1)[-1] = torch.nan
    return tensor


@pytest.mark.parametrize(
    ("layout", "last", "fault"),
    [
        (layout, last, fault)
        for layout, names in LAST.items()
        for last, fault in product(names, ("removed", "renamed", "reshaped", "another dtype", "not finite"))
        if (layout, last, fault) != ("gptq", "g_idx", "removed")  # an exporter may leave it out
        if fault != "not finite" or "scale" in last or (last == "weight" and "fp8" in layout)
    ],
)
def test_a_fault_in_any_tensor_is_refused_by_name_before_memory_is_taken(tmp_path, monkeypatch, layout, last, fault):
    stored, _ = write_quantised(tmp_path, config_of(), layout)
    name = f"{MODULE}.{last}"
    tensor = stored.pop(name)
    if fault == "renamed":
        stored[f"{MODULE}.{last}s"] = tensor
    elif fault != "removed":
        stored[name] = broken(tensor, fault)
    save_file(stored, tmp_path / "model.safetensors")
    if last == "weight" and fault == "not finite":  # the one fault that is in the numbers themselves
        with pytest.raises(CheckpointError, match=f"{MODULE}: numbers are not finite"):
            load(tmp_path, layout)
        return
    monkeypatch.setattr("internvl_rt.model.weights.fill_weights", None)
    with pytest.raises(CheckpointError, match=name) as caught:
        load(tmp_path, layout)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("layout", "last", "content", "problem"),
    [
        (
            "int4 group 32",
            "weight_shape",
            torch.tensor([32, 32]),
            r"weight_shape holds \[32, 32\], expected \[32, 64\]",
        ),
        ("gptq", "g_idx", torch.arange(64, dtype=torch.int32) % 2, "g_idx orders columns by activation"),
        ("fp8 static", "input_scale", torch.zeros(1), r"input_scale is 0.0, expected a positive number"),
        ("fp8 static", "input_scale", torch.tensor([-1.0]), "input_scale is -1.0, expected a positive number"),
        ("fp8 tensor", "weight_scale", torch.zeros(1), r"weight_scale is 0.0, expected a positive number"),
        ("fp8 channel", "weight_scale", torch.full((32, 1), 3e38), r"weight_scale holds a number .* beyond 1e\+30"),
    ],
)
def test_a_tensor_that_says_something_else_than_the_config_is_refused(tmp_path, layout, last, content, problem):
    stored, _ = write_quantised(tmp_path, config_of(), layout)
    stored[f"{MODULE}.{last}"] = content
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=problem):
        load(tmp_path, layout)


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_symmetric_gptq_has_no_zeros_and_must_hold_those_that_are_meant(tmp_path, layout):
    stored, _ = write_quantised(tmp_path, config_of(), layout)
    eights = {"gptq": 0x77777777, "gptq_v2": 0x88888888 - (1 << 32)}
    for name in [name for name in stored if name.endswith("qzeros")]:
        stored[name] = torch.full_like(stored[name], eights[layout])
    save_file(stored, tmp_path / "model.safetensors")
    loaded = []
    for sym in (False, True):
        how = {
            "dtype": torch.float32,
            "device": "cpu",
            "quantization": quantization_of({**LAYOUTS[layout][1], "sym": sym}),
        }
        loaded.append(named_linears(load_weights(open_checkpoint(tmp_path), config_of(), **how)))
    for path in (path for path in loaded[0] if path.startswith("decoder.layers.")):
        assert loaded[1][path].zero_NG is None
        assert torch.equal(loaded[0][path].dense(torch.float32), loaded[1][path].dense(torch.float32))
    other = {"gptq": "gptq_v2", "gptq_v2": "gptq"}[layout]
    how["quantization"] = quantization_of({**LAYOUTS[other][1], "sym": True})
    with pytest.raises(CheckpointError, match="qzeros holds other zero points than 8"):
        load_weights(open_checkpoint(tmp_path), config_of(), **how)


def test_reordered_columns_need_to_say_of_which_group_they_are(tmp_path):
    stored, _ = write_quantised(tmp_path, config_of(), "gptq")
    how = {"dtype": torch.float32, "device": "cpu"}
    how["quantization"] = quantization_of(LAYOUTS["gptq"][1] | {"desc_act": True})
    load_weights(open_checkpoint(tmp_path), config_of(), **how)
    del stored[f"{MODULE}.g_idx"]
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"1 missing: {MODULE}.g_idx"):
        load_weights(open_checkpoint(tmp_path), config_of(), **how)


@pytest.mark.parametrize("layout", ["fp8 channel", "int4 group 32"])
def test_a_file_that_shrinks_before_its_scales_are_read_is_told(tmp_path, layout):
    write_quantised(tmp_path, config_of(), layout)
    checkpoint = open_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size // 4)
    with pytest.raises(CheckpointError, match="became shorter while it was read; download it again"):
        load_weights(
            checkpoint, config_of(), dtype=torch.float32, device="cpu", quantization=quantization_of(LAYOUTS[layout][1])
        )


def test_weights_that_float16_cannot_hold_are_told_at_load(tmp_path):
    stored, _ = write_quantised(tmp_path, config_of(), "fp8 channel")
    stored[f"{MODULE}.weight_scale"][0] = 1000.0
    save_file(stored, tmp_path / "model.safetensors")
    load(tmp_path, "fp8 channel", dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match=f"{MODULE}: numbers are not finite in float16"):
        load(tmp_path, "fp8 channel", dtype=torch.float16)


@pytest.mark.parametrize("dialect", ["hf", "hf-nested", "original"])
def test_a_quantised_head_of_any_number_of_rows_beside_a_tied_config(tmp_path, dialect):
    config = config_of(dialect)
    config = replace(config, decoder=replace(config.decoder, vocab_size=301, tie_embeddings=False))
    stored, _ = write_quantised(tmp_path, config, "int4 group 32", dialect)
    head = next(name for name in stored if name.endswith("lm_head.weight"))
    written = LAYOUTS["int4 group 32"][0](*stored.pop(head).shape)
    stored |= {f"{head.removesuffix('weight')}{last}": tensor for last, tensor in written.tensors.items()}
    save_file(stored, tmp_path / "model.safetensors")
    how = {"dtype": torch.float32, "device": "cpu"}
    how["quantization"] = quantization_of(
        LAYOUTS["int4 group 32"][1] | {"ignore": ["re:.*vision.*", "re:.*mlp1.*", "re:.*projector.*"]}
    )
    tied = replace(config, decoder=replace(config.decoder, tie_embeddings=True))
    for given in (config, tied):
        if given is tied and dialect == "original":
            with pytest.raises(
                CheckpointError, match=r"lm_head.* differs from .*, but tie_word_embeddings in config.json"
            ):
                load_weights(open_checkpoint(tmp_path), given, **how)
            continue
        weights = load_weights(open_checkpoint(tmp_path), given, **how)
        assert torch.equal(weights.decoder.lm_head.dense(torch.float32), written.dense_NK)


def test_quantised_numbers_that_the_config_calls_dense_are_refused(tmp_path):
    """Read without its scale, such a weight would be numbers of another size, and answers would be garbage."""
    stored, _ = write_quantised(tmp_path, config_of(), "fp8 channel")
    quantization = LAYOUTS["fp8 channel"][1] | {"ignore": ["re:.*k_proj", "re:.*q_proj", "re:.*v_proj"]}
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_weights(
            open_checkpoint(tmp_path), config_of(), dtype=torch.float32, device="cpu",
            quantization=quantization_of(quantization),
        )  # fmt: skip
    for part in ("self_attn.q_proj.weight is torch.float8", "q_proj.weight_scale", "must say which linears"):
        assert part in str(caught.value)
    with pytest.raises(CheckpointError, match="quantization_config that goes with quantised weights is missing"):
        load_weights(open_checkpoint(tmp_path), config_of(), dtype=torch.float32, device="cpu")


def test_a_vision_tower_and_a_projector_may_be_quantised_too(tmp_path):
    config = config_of()
    stored, _ = write_quantised(tmp_path, config, "int8 channel")
    for name in [*stored]:
        if name.startswith(("vision_model.encoder", "mlp1")) and stored[name].ndim == 2:
            stored[name] = torch.ones_like(stored[name], dtype=torch.int8)
            stored[f"{name}_scale"] = torch.full((len(stored[name]), 1), 0.5)
    save_file(stored, tmp_path / "model.safetensors")
    quantization = quantization_of(LAYOUTS["int8 channel"][1] | {"ignore": ["language_model.lm_head"]})
    weights = load_weights(
        open_checkpoint(tmp_path), config, dtype=torch.float32, device="cpu", quantization=quantization
    )
    assert isinstance(weights.projector.fc1, Linear8)
    assert all(isinstance(layer.fc1, Linear8) for layer in weights.vision.layers)
    assert torch.equal(weights.projector.fc1.dense(torch.float32), torch.full((64, 256), 0.5))
    tiles = torch.zeros(1, 56, 56, 3, dtype=torch.uint8)
    assert InternVL(config, weights, TORCH).encode_tiles(tiles).isfinite().all()


def test_modules_of_one_product_must_be_quantised_alike():
    quantization = quantization_of(
        LAYOUTS["fp8 channel"][1] | {"ignore": ["language_model.model.layers.0.self_attn.v_proj"]}
    )
    with pytest.raises(ConfigError, match=r"q_proj \(FP8\), .*k_proj \(FP8\), .*v_proj \(dense\) are one product here"):
        find_schemes(config_of(), quantization)


def test_names_of_either_format_mean_the_same_modules():
    for ignored in (
        ["language_model.model.layers.1.mlp.down_proj"],
        ["model.language_model.layers.1.mlp.down_proj"],
        ["re:.*layers.1.mlp.down_proj$"],
    ):
        quantization = quantization_of(LAYOUTS["fp8 channel"][1] | {"ignore": [*ignored, "re:.*lm_head"]})
        paths = {path for path in find_schemes(config_of(), quantization) if path.startswith("decoder.")}
        assert paths == {
            f"decoder.layers.{index}.{name}" for index in (0, 1) for name in ("qkv", "o", "mlp.gate_up", "mlp.down")
        } - {"decoder.layers.1.mlp.down"}


@pytest.mark.parametrize("to", ["fp8", "int8"])
@pytest.mark.parametrize("vision", [False, True])
def test_a_cast_rounds_each_row_to_its_own_scale(to, vision):
    model = build_model()
    schemes = find_schemes(model.config, cast(to, vision=vision))
    assert {path.partition(".")[0] for path in schemes} == ({"decoder", "vision"} if vision else {"decoder"})
    for path, linear in named_linears(model.weights).items():
        if path not in schemes:
            continue
        made = stored_linear.cast_linear(linear, schemes[path])
        weight_NK, dense_NK = linear.weight_NK, made.dense(torch.float32)
        absmax_N1 = weight_NK.abs().amax(1, keepdim=True)
        error = (dense_NK - weight_NK).abs()
        if to == "fp8":
            assert (error <= torch.maximum(weight_NK.abs() / 16, absmax_N1 / 448 / 1024) * 1.0001).all()
        else:
            assert (error <= absmax_N1 / 254 * 1.0001).all()
        assert torch.allclose(dense_NK.abs().amax(1, keepdim=True), absmax_N1, rtol=1e-6)


def test_rows_of_zeros_and_huge_rows_are_cast():
    weight_NK = torch.zeros(3, 8)
    weight_NK[1] = 3e38
    for to in ("fp8", "int8"):
        made = stored_linear.cast_linear(Linear(weight_NK, None), next(iter(cast(to, vision=False).groups))[1])
        assert torch.allclose(made.dense(torch.float32), weight_NK, rtol=1e-6)


def test_a_shard_of_a_kind_is_a_part_of_what_it_multiplies_out_to(tmp_path):
    torch.manual_seed(0)
    q = torch.randint(0, 16, (8, 320), dtype=torch.uint8)
    scale, zero = torch.rand(8, 10), torch.randint(0, 16, (8, 10), dtype=torch.uint8)
    four = Linear4(stored_linear.pack_int4(q), scale, zero, torch.ones(8), 320, 32)
    numbers = torch.randn(8, 320).to(torch.float8_e4m3fn)
    linears = [
        Linear(torch.randn(8, 320), torch.ones(8)),
        Linear8(numbers, torch.rand(8, 1), torch.ones(8)),
        Linear8(numbers, torch.rand(8, 3), None),
        four,
    ]
    for linear in linears:
        whole = linear.dense(torch.float32)
        assert torch.equal(linear.take_rows(slice(2, 6)).dense(torch.float32), whole[2:6])
        for columns in (slice(0, 128), slice(128, 320), slice(None)):
            part = linear.take_columns(columns)
            assert torch.equal(part.dense(torch.float32), whole[:, columns])
            assert part.bias_N is None
            assert part.num_inputs == whole[:, columns].shape[1]
    for columns in (slice(0, 96), slice(96, 160), slice(288, 320)):
        assert torch.equal(four.take_columns(columns).dense(torch.float32), four.dense(torch.float32)[:, columns])
    for linear, unit in ((linears[2], 128), (four, 32)):
        with pytest.raises(ValueError, match=f"expected borders at multiples of {unit}, got 0 and 80"):
            linear.take_columns(slice(0, 80))

"""Each rank's part of a quantised model, in every layout: the same numbers as the whole model's, and no others read."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from safetensors.torch import save_file

from internvl_rt.checkpoint import tensor_file
from internvl_rt.checkpoint.folder import open_checkpoint
from internvl_rt.errors import CheckpointError, ConfigError
from internvl_rt.model.dialects import DIALECTS
from internvl_rt.model.internvl import named_parameters
from internvl_rt.model.linear import Linear4, Linear8
from internvl_rt.model.shard import WHOLE, Shard, cut_of
from internvl_rt.model.stored_linear import column_unit, read_part
from internvl_rt.model.weights import find_schemes, load_weights, plan_file, shape_weights
from support.quantised_files import (
    FLOAT8,
    INT4,
    LAYOUTS,
    awq,
    compressed,
    fp8,
    gptq,
    packed,
    quantization_of,
    write_quantised,
)
from support.shards import assert_part, part_of
from support.small_models import QWEN2, build_model

GROUPED = {"strategy": "group", "group_size": 128}
WIDE = {  # layouts with groups of 128
    "awq 128": (awq(128), LAYOUTS["awq"][1] | {"group_size": 128}),
    "gptq 128": (gptq(128, first=1), LAYOUTS["gptq"][1] | {"group_size": 128}),
    "int4 128": (packed(4, 128), compressed("pack-quantized", INT4 | GROUPED)),
    "int4 128 asymmetric": (
        packed(4, 128, symmetric=False),
        compressed("pack-quantized", INT4 | GROUPED | {"symmetric": False}),
    ),
    "fp8 128": (fp8(1, 128), compressed("float-quantized", FLOAT8 | GROUPED)),
}
BLOCKS = [layout for layout in LAYOUTS if "block" in layout or "of transformers" in layout]
# Heads of 64 rows: where each rank has one key head, its rows begin in the middle of a block of 128 of them.
HEADS_OF_64 = replace(QWEN2, hidden_size=128, num_heads=8, head_dim=64, intermediate_size=512)
DECODERS = {
    "original": HEADS_OF_64,
    "internlm2": replace(HEADS_OF_64, qkv_bias=False),
    "hf": replace(HEADS_OF_64, qkv_bias=False, qk_norm=True),
    "hf-nested": replace(HEADS_OF_64, tie_embeddings=True),
}
sizes = pytest.mark.parametrize("size", [2, 3, 4])


@pytest.fixture(autouse=True)
def wide_layouts(monkeypatch):
    for name, layout in WIDE.items():
        monkeypatch.setitem(LAYOUTS, name, layout)


def config_of(decoder, dialect="original"):
    config = build_model(decoder=decoder).config
    return replace(config, format="original" if dialect in ("original", "internlm2") else "hf")


def load(folder, config, layout, shard=WHOLE, dtype=torch.bfloat16):
    how = {"dtype": dtype, "device": "cpu", "quantization": quantization_of(LAYOUTS[layout][1])}
    return load_weights(open_checkpoint(folder), config, shard=shard, **how)


def assert_ranks(folder, config, layout, size):
    """Asserts that ranks load their parts of the whole, of the shapes that are planned. Returns them."""
    whole, parts = load(folder, config, layout), []
    schemes = find_schemes(config, quantization_of(LAYOUTS[layout][1]))
    for rank in range(size):
        shard = Shard(rank, size)
        parts.append(load(folder, config, layout, shard))
        assert_part(parts[-1], whole, config, shard)
        planned = named_parameters(shape_weights(config, torch.bfloat16, schemes, shard))
        assert {path: (one.shape, one.nbytes) for path, one in planned.items()} == {
            path: (one.shape, one.nbytes) for path, one in named_parameters(parts[-1]).items()
        }
    return parts


@pytest.mark.fast(*(f"original-{layout}" for layout in (*LAYOUTS, *WIDE)), "internlm2-awq", "hf-fp8 static")
@pytest.mark.parametrize(
    ("dialect", "layout"),
    [*product(("original", "internlm2"), (*LAYOUTS, *WIDE)), *product(("hf", "hf-nested"), ("awq", "fp8 static"))],
)
def test_a_rank_loads_its_part_of_what_a_quantised_model_multiplies_out_to(tmp_path, dialect, layout):
    config = config_of(DECODERS[dialect], dialect)
    write_quantised(tmp_path, config, layout, dialect)
    for size in (2, 3, 4):
        for part in assert_ranks(tmp_path, config, layout, size):
            assert isinstance(part.decoder.layers[0].o, Linear4 if column_unit_of(layout) == 32 else Linear8)


def column_unit_of(layout):
    ((_, scheme), *_) = quantization_of(LAYOUTS[layout][1]).groups
    return column_unit(scheme)


@pytest.mark.parametrize("layout", [*LAYOUTS, *WIDE])
def test_any_rows_and_columns_of_a_module_are_read(tmp_path, layout):
    write, config = LAYOUTS[layout] if layout in LAYOUTS else WIDE[layout]
    torch.manual_seed(0)
    n, k, unit = 304, 384, column_unit_of(layout)
    written = write(n, k)
    save_file({f"m.{last}": tensor for last, tensor in written.tensors.items()}, tmp_path / "model.safetensors")
    ((_, scheme), *_) = quantization_of(config).groups
    checkpoint = open_checkpoint(tmp_path)
    for rows in (slice(None), slice(3, 21), slice(128, 256), slice(299, 304)):
        for first, stop in ((0, 384), (unit, 384), (0, unit), (256, 384), (5 * unit, 9 * unit)):
            if first >= (stop := min(stop, k)):
                continue
            part = read_part(checkpoint, "m", scheme, n, k, torch.device("cpu"), rows, slice(first, stop))
            if scheme.bits == 4:
                group = 128 if scheme.group is None else min(scheme.group, first & -first or 128)
                linear = Linear4(part.numbers, part.scale_NG, part.zero_NG, None, stop - first, group)
            else:
                linear = Linear8(part.numbers, part.scale_NG, None)
            assert torch.equal(linear.dense(torch.float32), written.dense_NK[rows, first:stop]), (rows, first, stop)


@pytest.mark.parametrize("layout", ["awq 128", "gptq 128", "int4 128", "int4 128 asymmetric", "int4 channel"])
@pytest.mark.parametrize("num_heads", [6, 14])
def test_a_group_that_two_ranks_share_becomes_two_groups(tmp_path, layout, num_heads):
    """The 1B has 14 heads of 64, so that each of two ranks has three groups of 128 and a half."""
    config = config_of(replace(QWEN2, hidden_size=128, num_heads=num_heads, head_dim=64, intermediate_size=5 * 128))
    write_quantised(tmp_path, config, layout)
    first, second = assert_ranks(tmp_path, config, layout, 2)
    groups = [part.decoder.layers[0].o.group for part in (first, second)]
    assert groups == ([128, 128] if layout == "int4 channel" else [128, 64])
    assert [part.decoder.layers[0].mlp.down.group for part in (first, second)] == [128, 128]
    assert [part.decoder.layers[0].mlp.down.num_inputs for part in (first, second)] == [3 * 128, 2 * 128]


@pytest.mark.parametrize("layout", ["awq", "gptq", "int4 asymmetric", "int4 channel", "fp8 static", "int8 packed"])
@sizes
def test_seven_query_heads_of_one_key_head_are_split(tmp_path, layout, size):
    decoder = replace(QWEN2, num_heads=7, num_kv_heads=1, head_dim=32, intermediate_size=160)
    config = config_of(decoder)
    write_quantised(tmp_path, config, layout)
    parts = assert_ranks(tmp_path, config, layout, size)
    assert sum(part.decoder.layers[0].o.num_inputs for part in parts) == 7 * 32
    assert {len(part.decoder.layers[0].qkv.bias_N) % 32 for part in parts} == {0}


@pytest.mark.parametrize("layout", ["awq", "gptq", "int4 asymmetric"])
def test_rows_that_begin_inside_of_a_word_are_read(tmp_path, layout):
    """Here a rank has the last four of eight rows of keys, whose zeros lie in one word."""
    config = config_of(replace(QWEN2, num_heads=16, head_dim=4))
    write_quantised(tmp_path, config, layout)
    assert_ranks(tmp_path, config, layout, 2)


@pytest.mark.parametrize("layout", ["int4 group 32", "fp8 tensor", "fp8 block", "int8 packed"])
@sizes
def test_a_quantised_output_layer_is_cut_by_tokens(tmp_path, layout, size):
    config = config_of(replace(HEADS_OF_64, vocab_size=301))
    stored, _ = write_quantised(tmp_path, config, layout)
    written = LAYOUTS[layout][0](*stored.pop("language_model.lm_head.weight").shape)
    stored |= {f"language_model.lm_head.{last}": tensor for last, tensor in written.tensors.items()}
    save_file(stored, tmp_path / "model.safetensors")
    section = LAYOUTS[layout][1]
    quantization = quantization_of(section | {"ignore": [name for name in section["ignore"] if "lm_head" not in name]})
    tokens = []
    for rank in range(size):
        shard = Shard(rank, size)
        how = {"dtype": torch.float32, "device": "cpu", "quantization": quantization, "shard": shard}
        head = load_weights(open_checkpoint(tmp_path), config, **how).decoder.lm_head
        expected = part_of("decoder.lm_head.weight_NK", written.dense_NK, config, shard)
        assert torch.equal(head.dense(torch.float32), expected)
        tokens.append(len(expected))
    assert sum(tokens) == 301


@pytest.mark.parametrize("layout", ["awq", "int4 asymmetric", "fp8 block"])
@pytest.mark.parametrize("dialect", ["original", "internlm2"])
def test_a_rank_reads_its_part_of_large_tensors(tmp_path, monkeypatch, layout, dialect):
    decoder = replace(DECODERS[dialect], num_heads=16, num_kv_heads=8, intermediate_size=1024, vocab_size=192)
    config = config_of(decoder)
    stored, _ = write_quantised(tmp_path, config, layout, dialect)
    plan = plan_file(config, DIALECTS[dialect], quantization_of(LAYOUTS[layout][1]))
    counts, read_at = dict[str, int](), tensor_file._read_at
    checkpoint = open_checkpoint(tmp_path)

    def read_and_count(entry, file, offset, memory):
        name = next(name for name, one in checkpoint.entries.items() if one == entry)
        counts[name] = counts.get(name, 0) + len(memory)
        read_at(entry, file, offset, memory)

    monkeypatch.setattr(tensor_file, "_read_at", read_and_count)
    for size in (2, 4):
        for rank in range(size):
            counts.clear()
            load(tmp_path, config, layout, Shard(rank, size))
            checked = ("scales", "weight_scale", "weight_shape")  # all of these is read once more, to be checked
            for name, tensor in stored.items():
                last = name.rpartition(".")[2]
                num_bytes = counts[name] - tensor.nbytes * (last in checked)
                is_whole = last == "weight_shape" or (
                    name in plan.dense and not cut_of(plan.dense[name].placements[0].parameter, decoder, Shard(0, size))
                )
                if is_whole:
                    assert num_bytes == (0 if last == "weight_shape" else tensor.nbytes), name
                elif layout == "fp8 block" and last == "weight_scale":
                    assert num_bytes <= tensor.nbytes, name
                else:
                    assert num_bytes == tensor.nbytes / size, name


@pytest.mark.parametrize("layout", [*BLOCKS, "fp8 128"])
def test_blocks_of_8_bit_numbers_that_a_border_would_cut_are_refused_before_memory_is_taken(
    tmp_path, monkeypatch, layout
):
    config = config_of(replace(HEADS_OF_64, num_heads=14))
    write_quantised(tmp_path, config, layout)
    monkeypatch.setattr("internvl_rt.model.weights.fill_weights", None)
    words = set()
    for rank in range(2):
        schemes = find_schemes(config, quantization_of(LAYOUTS[layout][1]))
        with pytest.raises(ConfigError) as planned:
            shape_weights(config, torch.bfloat16, schemes, Shard(rank, 2))
        with pytest.raises(ConfigError) as loaded:
            load(tmp_path, config, layout, Shard(rank, 2))
        words |= {str(planned.value), str(loaded.value)}
    assert words == {
        "tensor_parallel_size 2 cuts language_model.model.layers.0.self_attn.o_proj (FP8, groups of 128) at column "
        "448, expected multiples of 128: what is between them is stored together; choose another tensor_parallel_size, "
        "or 8-bit weights with one scale a row"
    }


def test_4_bit_numbers_are_cut_at_multiples_of_32_columns_alone():
    config = config_of(replace(QWEN2, num_heads=14, head_dim=16, intermediate_size=160))
    schemes = find_schemes(config, quantization_of(LAYOUTS["awq"][1]))
    with pytest.raises(ConfigError, match=r"o_proj \(int4, groups of 32\) at column 112, expected multiples of 32"):
        shape_weights(config, torch.bfloat16, schemes, Shard(0, 2))


def test_4_numbers_of_8_bits_in_a_word_stay_together():
    config = config_of(replace(QWEN2, num_heads=2, head_dim=2))
    schemes = find_schemes(config, quantization_of(LAYOUTS["int8 packed"][1]))
    with pytest.raises(ConfigError, match=r"o_proj \(int8\) at column 2, expected multiples of 4"):
        shape_weights(config, torch.bfloat16, schemes, Shard(0, 2))


def test_scales_that_another_rank_reads_are_checked_on_every_rank(tmp_path):
    config = config_of(HEADS_OF_64)
    stored, _ = write_quantised(tmp_path, config, "awq")
    stored["language_model.model.layers.0.mlp.down_proj.scales"][-1, 0] = torch.inf
    save_file(stored, tmp_path / "model.safetensors")
    for rank in range(2):
        with pytest.raises(CheckpointError, match=r"down_proj\.scales holds a number that is not finite"):
            load(tmp_path, config, "awq", Shard(rank, 2))

"""What a quantization_config says is read whole, and refused by key and value where it is not supported."""

import time
from pathlib import Path

import pytest

from internvl_rt.checkpoint.config import KNOWN_MODELS, load_config
from internvl_rt.checkpoint.json_section import Section
from internvl_rt.checkpoint.quantization import Scheme, cast, read_quantization
from internvl_rt.errors import ConfigError
from internvl_rt.model.weights import find_schemes
from support.quantised_files import FLOAT8, INT4, INT8_CHANNEL, LAYOUTS, STATIC, TOKEN, compressed, quantization_of

PATH, NAMES = "decoder.layers.3.down", {"language_model.model.layers.3.mlp.down_proj"}


def scheme(config, path=PATH, names=frozenset(NAMES)):
    return quantization_of(config).scheme_of(path, names)


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("fp8 channel", Scheme("compressed", 8, is_float=True, inputs="token")),
        ("fp8 tensor", Scheme("compressed", 8, is_float=True, block_rows=None)),
        ("fp8 static", Scheme("compressed", 8, is_float=True, block_rows=None, inputs="static")),
        ("fp8 block", Scheme("compressed", 8, is_float=True, group=128, block_rows=128, inputs="token")),
        (
            "fp8 of transformers",
            Scheme("compressed", 8, True, 128, 128, inputs="token", scale_name="weight_scale_inv"),
        ),
        ("int8 channel", Scheme("compressed", 8)),
        ("int8 packed", Scheme("packed", 8)),
        ("int4 group 32", Scheme("packed", 4, group=32)),
        ("int4 asymmetric", Scheme("packed", 4, group=32, symmetric=False)),
        ("int4 channel", Scheme("packed", 4)),
        ("awq", Scheme("awq", 4, group=32, symmetric=False)),
        ("gptq", Scheme("gptq", 4, group=32, symmetric=False)),
        ("gptq_v2", Scheme("gptq_v2", 4, group=32, symmetric=False)),
    ],
)
def test_each_layout_is_recognised(layout, expected):
    assert scheme(LAYOUTS[layout][1]) == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_embeddings_norms_and_the_output_layer_are_dense_in_every_layout(layout):
    for path, name in (
        ("decoder.lm_head", "language_model.lm_head"),
        ("vision.layers.0.fc1", "vision_model.encoder.layers.0.mlp.fc1"),
        ("projector.fc1", "mlp1.1"),
        ("vision.patch", "vision_model.embeddings.patch_embedding"),
    ):
        assert scheme(LAYOUTS[layout][1], path, {name}) is None, path


def test_an_output_layer_that_is_not_left_out_is_quantised():
    config = compressed("float-quantized", FLOAT8 | {"strategy": "channel"}, TOKEN, ignore=[])
    assert scheme(config, "decoder.lm_head", {"language_model.lm_head"}) is not None


@pytest.mark.parametrize("swapped", [False, True])
def test_the_group_that_names_a_module_most_closely_says_how_it_is_stored(swapped):
    config = compressed("mixed-precision", FLOAT8)
    first, second = dict(config["config_groups"]["group_0"]), dict(config["config_groups"]["group_0"])
    first |= {"targets": ["re:.*down_proj$"], "format": "pack-quantized", "weights": INT4 | {"group_size": 128}}
    second |= {"format": "int-quantized", "weights": INT8_CHANNEL}
    third = second | {"targets": ["language_model.model.layers.7.mlp.down_proj"]}
    order = (third, second, first) if swapped else (first, second, third)
    config |= {"config_groups": {f"group_{index}": group for index, group in enumerate(order)}}
    assert scheme(config) == Scheme("packed", 4, group=128)
    assert scheme(config, "decoder.layers.3.o", {"language_model.model.layers.3.self_attn.o_proj"}).bits == 8
    assert scheme(config, "decoder.layers.7.down", {"language_model.model.layers.7.mlp.down_proj"}).bits == 8


def test_a_group_of_all_linears_may_be_the_only_one_and_the_first_of_two():
    config = compressed("float-quantized", CHANNEL)
    other = config["config_groups"]["group_0"] | {"input_activations": TOKEN}
    config["config_groups"]["group_1"] = other
    assert scheme(config).inputs == "full"


@pytest.mark.parametrize("key", ["format", "checkpoint_format"])
def test_either_name_of_the_format_of_gptq_counts(key):
    config = LAYOUTS["gptq"][1]
    assert scheme(config).layout == scheme({**config, key: "gptq"}).layout == "gptq"
    assert scheme({**config, key: "gptq_v2"}).layout == "gptq_v2"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, None),
        ({"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}, "fp8"),
        ({"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False, "symmetric": True}, "int8"),
    ],
)
def test_a_scheme_of_the_cache_is_read(given, expected):
    config = compressed("float-quantized", FLOAT8 | {"strategy": "channel"}, TOKEN, kv_cache_scheme=given)
    assert quantization_of(config).kv_cache == expected


def test_no_config_means_dense_and_one_may_be_in_either_section():
    file = Path("config.json")
    top, text = Section(file, "", {}), Section(file, "llm_config.", {"quantization_config": LAYOUTS["awq"][1]})
    assert read_quantization(top) is None
    assert read_quantization(top, text).method == "awq"
    both = Section(file, "", {"quantization_config": LAYOUTS["awq"][1]})
    assert read_quantization(both, text).method == "awq"
    other = Section(file, "", {"quantization_config": LAYOUTS["gptq"][1]})
    with pytest.raises(
        ConfigError, match=r"llm_config\.quantization_config is .*, expected none beside that of the top"
    ):
        read_quantization(other, text)


CHANNEL = FLOAT8 | {"strategy": "channel"}
REFUSED = [
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method is 'bitsandbytes'"),
    ({"quant_method": "mxfp4"}, "quant_method is 'mxfp4'"),
    (compressed("float-quantized", CHANNEL, config_groups={"FP8": ["Linear"]}), "config_groups.FP8 is ['Linear']"),
    (compressed("float-quantized", CHANNEL, TOKEN | {"dynamic": 0}), "input_activations.dynamic is 0"),
    (compressed("float-quantized", CHANNEL, STATIC | {"symmetric": False}), "input_activations.symmetric is False"),
    (compressed("pack-quantized", INT4 | {"group_size": -1.0}), "group_size is -1.0"),
    (compressed("float-quantized", CHANNEL, ignore=["re:[[a]b"]), "ignore is"),
    ({"quant_method": "modelopt"}, "quant_method is 'modelopt'"),
    ({}, "quant_method is missing"),
    (compressed("nvfp4-pack-quantized", FLOAT8), "format is 'nvfp4-pack-quantized'"),
    (compressed("float-quantized", CHANNEL, sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config is"),
    (compressed("float-quantized", CHANNEL, transform_config={"a": 1}), "transform_config is"),
    (compressed("float-quantized", CHANNEL, config_groups={}), "config_groups is {}, expected 1 to 16 groups"),
    (compressed("float-quantized", CHANNEL | {"dynamic": True}), "weights.dynamic is True"),
    (compressed("float-quantized", FLOAT8 | {"strategy": "tensor_group", "group_size": 16}), "strategy is"),
    (compressed("float-quantized", FLOAT8 | {"strategy": "block", "block_structure": [64, 64]}), "block_structure is"),
    (compressed("float-quantized", {"num_bits": 4, "type": "float", "strategy": "channel"}), "num_bits is 4"),
    (compressed("int-quantized", INT8_CHANNEL | {"symmetric": False}), "symmetric is False"),
    (compressed("int-quantized", INT4 | {"strategy": "channel"}), "num_bits is 4, expected 8 with int-quantized"),
    (compressed("pack-quantized", CHANNEL), "type is 'float'"),
    (compressed("pack-quantized", {"num_bits": 3, "type": "int", "group_size": 128}), "num_bits is 3"),
    (compressed("pack-quantized", INT4 | {"group_size": 16}), "group_size is 16, expected 32 or 64 or 128"),
    (compressed("pack-quantized", INT4 | {"group_size": 128, "actorder": "group"}), "actorder is 'group'"),
    (compressed("pack-quantized", INT4 | {"strategy": "tensor"}), "strategy is 'tensor'"),
    (compressed("float-quantized", CHANNEL, TOKEN | {"num_bits": 4}), "input_activations.num_bits is 4"),
    (compressed("float-quantized", CHANNEL, STATIC | {"strategy": "token"}), "input_activations.strategy is 'token'"),
    (compressed("float-quantized", CHANNEL, kv_cache_scheme={"num_bits": 4}), "kv_cache_scheme.num_bits is 4"),
    (
        compressed("float-quantized", CHANNEL, kv_cache_scheme={"num_bits": 8, "strategy": "attn_head"}),
        "kv_cache_scheme.strategy is 'attn_head'",
    ),
    (compressed("float-quantized", CHANNEL, ignore="lm_head"), "ignore is 'lm_head', expected a list of names"),
    (compressed("float-quantized", CHANNEL, ignore=["re:("]), "ignore is"),
    (LAYOUTS["awq"][1] | {"bits": 3}, "bits is 3"),
    (LAYOUTS["awq"][1] | {"version": "marlin"}, "version is 'marlin'"),
    (LAYOUTS["awq"][1] | {"zero_point": False}, "zero_point is False"),
    (LAYOUTS["awq"][1] | {"group_size": 48}, "group_size is 48, expected 32 or 64 or 128, or -1"),
    (LAYOUTS["awq"][1] | {"q_group_size": 128}, "q_group_size is 128, expected what group_size says"),
    (LAYOUTS["awq"][1] | {"group_size": -1.0}, "group_size is -1.0"),
    (LAYOUTS["gptq"][1] | {"bits": 8}, "bits is 8"),
    (LAYOUTS["gptq"][1] | {"format": "marlin"}, "format is 'marlin'"),
    (LAYOUTS["gptq"][1] | {"is_marlin_format": True}, "is_marlin_format is True"),
    (LAYOUTS["gptq_v2"][1] | {"format": "gptq"}, "format is 'gptq', expected what checkpoint_format says"),
    (LAYOUTS["gptq"][1] | {"desc_act": "yes"}, "desc_act is 'yes'"),
    (LAYOUTS["gptq"][1] | {"sym": 1}, "sym is 1"),
    ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "weight_block_size is missing, expected [128, 128]"),
    (LAYOUTS["gptq"][1] | {"lm_head": True}, "lm_head is True"),
    (LAYOUTS["gptq"][1] | {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
    (LAYOUTS["fp8 of transformers"][1] | {"weight_block_size": None}, "weight_block_size is None"),
    (LAYOUTS["fp8 of transformers"][1] | {"activation_scheme": "static"}, "activation_scheme is 'static'"),
]


@pytest.mark.parametrize(("config", "problem"), REFUSED, ids=[problem for _, problem in REFUSED])
def test_what_is_not_supported_is_refused_in_one_line_with_its_key(config, problem):
    with pytest.raises(ConfigError) as caught:
        quantization_of(config)
    message = str(caught.value)
    assert problem in message
    assert message.startswith("config.json: quantization_config.")
    assert "\n" not in message


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(a|a)*b",
        "(a|b){90}",
        ".*.*.*.*x",
        "a?" * 30,
        "(.|.)" * 30,
        "x" * 501,
        "(a?)+b",
        "((.|.|.)" * 12 + ")" * 12,
        "(?x)([a-z_.0-9]+) +X",
        "(?ix:([a-z_.0-9]+) +X)",
        "([a-z_.0-9]+)(?#)+X",
    ],
)
def test_a_pattern_that_could_take_long_is_refused(pattern):
    with pytest.raises(ConfigError, match="which may take long to match; expected few repetitions"):
        quantization_of(compressed("float-quantized", CHANNEL, ignore=[f"re:{pattern}"]))


@pytest.mark.parametrize("count", [65, 10**6])
def test_lists_that_could_take_long_are_refused(count):
    with pytest.raises(ConfigError, match="expected at most 64 patterns"):
        quantization_of(compressed("float-quantized", CHANNEL, ignore=["re:a"] * count))
    with pytest.raises(ConfigError, match="expected 1 to 16 groups"):
        quantization_of(compressed("float-quantized", CHANNEL, config_groups={f"{i}": {} for i in range(count)}))
    with pytest.raises(ConfigError, match="so many patterns and names that they may take long"):
        quantization_of(compressed("float-quantized", CHANNEL, ignore=["re:.*.*.*x"] * 16))
    with pytest.raises(ConfigError, match="so many patterns and names that they may take long"):
        quantization_of(LAYOUTS["awq"][1] | {"modules_to_not_convert": [f"{i}" for i in range(5000 + count)]})


@pytest.mark.parametrize(
    "pattern",
    [
        ".*lm_head",
        r"^language_model\.model\.layers\.[0-9]+\.mlp\.(gate|up|down)_proj$",
        r".*layers\.\d+\..*(q|k|v|o|gate|up|down)_proj",
        "^(?!vision_model).*down_proj",
        "(?:.*)down_proj",
    ],
)
def test_usual_patterns_are_taken(pattern):
    config = compressed("float-quantized", CHANNEL, ignore=[f"re:{pattern}"])
    assert (scheme(config) is None) == ("down" in pattern)


SLOW = "re:[a-z_.0-9]*[a-z_.0-9]*[a-z_.0-9]*(aX|bX|cX|dX|eX|fX|tX)"  # tried in every way before it fails


@pytest.mark.parametrize(
    "more",
    [
        {"ignore": [SLOW]},
        {"config_groups": {f"{i}": {"targets": ["re:[a-z.]*[0-9.]*X"] * 9, "weights": CHANNEL} for i in range(16)}},
    ],
    ids=["one pattern", "many"],
)
def test_the_slowest_patterns_that_are_allowed_take_seconds(more):
    found = quantization_of(compressed("float-quantized", CHANNEL, **more))
    config = load_config(KNOWN_MODELS["InternVL3-78B"])
    start = time.perf_counter()
    find_schemes(config, found)
    assert time.perf_counter() - start < 30


def test_a_cast_is_of_the_layers_alone():
    for vision in (False, True):
        found = cast("fp8", vision=vision)
        assert found.scheme_of(PATH, NAMES) == Scheme("cast", 8, is_float=True, inputs="token")
        assert (found.scheme_of("vision.layers.0.fc1", {"x"}) is not None) == vision
        assert found.scheme_of("decoder.lm_head", {"x"}) is found.scheme_of("projector.fc1", {"x"}) is None

"""The static card says what config.json alone tells of a model."""

import json
import time
from dataclasses import fields, replace

import pytest

from internvl_rt.checkpoint.config import KNOWN_MODELS, load_config
from internvl_rt.checkpoint.find import resolve_model
from internvl_rt.checkpoint.quantization import FOUR_BITS
from internvl_rt.engine.loading import plan_parts
from internvl_rt.engine.options import EngineOptions
from internvl_rt.errors import ConfigError, RequestError
from internvl_rt.model.card import model_card, render_card
from internvl_rt.model.processor import instructions


def card_of(name):
    return model_card(load_config(KNOWN_MODELS[name]), name)


def test_the_card_of_the_1b_is_right_number_by_number():
    card = card_of("InternVL3-1B")
    vit = 1025 * 1024 + 1024 + (3 * 14 * 14 + 1) * 1024  # positions, class token, patch embedding
    vit += 24 * (12 * 1024**2 + (3 + 1 + 4 + 1) * 1024 + 6 * 1024)  # matrices, their biases, two norms and two scales
    projector = 2 * 4096 + (4096 + 1) * 896 + (896 + 1) * 896
    decoder = 2 * 151674 * 896 + 896
    decoder += 24 * (2 * 896 + (896 + 1) * (896 + 2 * 128) + 896 * 896 + 3 * 896 * 4864)
    assert card["parameters"] == {
        "vision": vit,
        "projector": projector,
        "decoder": decoder,
        "total": vit + projector + decoder,
    }
    total = vit + projector + decoder
    assert card["weight_bytes"] == {"bfloat16": 2 * total, "float16": 2 * total, "float32": 4 * total}
    assert card["kv_bytes_per_token"] == 24 * 2 * 2 * 64 * 2
    assert (card["context_window"], card["tokens_per_tile"]) == (32768, 256)
    assert (card["max_tiles_per_picture"], card["max_tokens_per_picture"]) == (13, 3328)


def test_a_gpu_holds_the_weights_and_as_many_tokens_as_the_rest_is_worth():
    card = card_of("InternVL3-38B")
    dense, in_8_bits, in_4_bits = card["held"]
    assert dense["weight_bytes"] == card["weight_bytes"]["bfloat16"]
    for held, sizes in ((dense, [80, 141]), (in_8_bits, [48, 80, 141]), (in_4_bits, [48, 80, 141])):
        assert [fit["gib"] for fit in held["fits"] if fit["weights_fit"]] == sizes
        for fit in held["fits"]:
            left = (fit["gib"] << 30) - held["weight_bytes"]
            assert fit["kv_tokens"] == (left // card["kv_bytes_per_token"] if left > 0 else 0)


def test_the_78b_needs_two_cards_in_16_bits_and_one_in_4():
    dense, in_8_bits, in_4_bits = card_of("InternVL3-78B")["held"]
    width, mlp, qkv = 8192, 29568, 8192 + 2 * 1024
    numbers, rows = 80 * (width * (qkv + width) + 3 * width * mlp), 80 * (qkv + 2 * width + 2 * mlp)
    assert dense["weight_bytes"] - in_8_bits["weight_bytes"] == numbers - 4 * rows  # a scale of 4 bytes a row
    assert dense["weight_bytes"] - in_4_bits["weight_bytes"] == 2 * numbers - numbers // 2 - numbers // 128 * 2
    assert [fit["weights_fit"] for fit in dense["fits"]] == [False, False, False, False]
    assert [fit["weights_fit"] for fit in in_4_bits["fits"]] == [False, False, True, True]
    assert 25 < dense["decode_ms_at_least"] < 31 > 2 * in_8_bits["decode_ms_at_least"] - 1


def test_of_several_gpus_the_one_that_holds_the_most_is_on_the_card():
    """Of 14 query heads on 2 key/value heads, three GPUs have 4, 3 and 7; MLP and vocabulary are split evenly."""
    config = load_config(KNOWN_MODELS["InternVL3-1B"])
    card = model_card(config, "", 3)
    whole = card["parameters"]["vision"] + card["parameters"]["projector"] + 151674 * 896
    columns, rows = [13 * 128, 13 * 128, 12 * 128], [16 * 3160, 16 * 3160, 151674 - 32 * 3160]
    assert sum(columns) == 4864
    parts = []
    for rank, heads in enumerate((4, 3, 7)):
        qkv = 64 * (heads + 2)
        layer = 2 * 896 + (896 + 1) * qkv + 896 * 64 * heads + 3 * 896 * columns[rank]
        parts.append(2 * (whole + 24 * layer + rows[rank] * 896 + 896))
    dense = card["held"][0]
    assert dense["weight_bytes"] == max(parts) == parts[0]
    assert card["each_gpu"]["kv_bytes_per_token"] == card["kv_bytes_per_token"] // 2, "one of two heads"
    for fit in dense["fits"]:
        assert fit["kv_tokens"] == ((fit["gib"] << 30) - max(parts)) // card["each_gpu"]["kv_bytes_per_token"]
    one = model_card(config, "")["held"][0]
    assert 2 * dense["decode_ms_at_least"] < one["decode_ms_at_least"] < 3 * dense["decode_ms_at_least"]


def test_the_78b_in_16_bits_needs_two_of_the_largest_cards_or_four_of_80_gib():
    config = load_config(KNOWN_MODELS["InternVL3-78B"])
    fits = {num: model_card(config, "", num)["held"][0]["fits"] for num in (2, 4)}
    assert [fit["weights_fit"] for fit in fits[2]] == [False, False, True, True]
    assert [fit["kv_tokens"] for fit in fits[4]][:2] == [0, 21_741]
    text = render_card(model_card(config, "", 4))
    assert "320 KiB per token in bfloat16, 162.5 in FP8 or int8; 80 and 40.6 on each of 4 GPUs" in text
    assert "decode on 4 H200" in text
    assert text.endswith("the time is without sums between GPUs")


@pytest.mark.parametrize("num_gpus", [2, 3, 4])
def test_each_gpu_is_said_to_hold_what_an_engine_plans_for(num_gpus):
    config = load_config(resolve_model("tiny"))
    card = model_card(config, "tiny", num_gpus)
    memory = plan_parts("tiny", EngineOptions(device="cpu", dtype="bfloat16", tensor_parallel_size=num_gpus))
    assert card["held"][0]["weight_bytes"] == memory.weight_bytes
    assert card["each_gpu"]["kv_bytes_per_token"] * memory.block_size == memory.block_bytes


def test_one_gpu_has_the_card_of_a_model_that_is_not_split():
    config = load_config(KNOWN_MODELS["InternVL3-8B"])
    card = model_card(config, "", 1)
    assert card == model_card(config, "")
    assert "each_gpu" not in card
    assert "GPUs" not in render_card(card)


def test_more_gpus_than_a_model_can_be_split_among_are_refused():
    with pytest.raises(RequestError, match=r"tensor_parallel_size is 15, .* 14 query heads, .* at most 14 ranks"):
        model_card(load_config(KNOWN_MODELS["InternVL3-1B"]), "", 15)


def test_a_kind_of_weight_that_cannot_be_split_so_is_told():
    """Seven heads of 16 channels end at column 112, and 4-bit weights are cut at multiples of 32."""
    config = load_config(KNOWN_MODELS["InternVL3-1B"])
    config = replace(config, decoder=replace(config.decoder, hidden_size=1024, num_heads=14, head_dim=16))
    card = model_card(config, "", 2)
    assert ["cannot_be_split" in held for held in card["held"]] == [False, False, True]
    assert "at column 112, expected multiples of 32" in card["held"][2]["cannot_be_split"]
    assert "4 bits          cannot be split so\n" in render_card(card)
    with pytest.raises(ConfigError, match="column 112"):
        model_card(replace(config, quantization=FOUR_BITS), "", 2)


def test_a_model_without_tiling_has_one_tile_and_no_thumbnail():
    config = replace(load_config(KNOWN_MODELS["InternVL3-1B"]), max_tiles=1)
    assert model_card(config, "")["max_tokens_per_picture"] == 256
    config = replace(config, max_tiles=6, thumbnail=False)
    assert model_card(config, "")["max_tokens_per_picture"] == 6 * 256


@pytest.mark.fast("InternVL3-1B", "InternVL3_5-38B", "InternVL3_5-GPT-OSS-20B-A4B-Preview")
@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_every_card_can_be_printed_and_sent_as_json(name):
    config = load_config(KNOWN_MODELS[name])
    card = card_of(name)
    assert json.loads(json.dumps(card)) == card
    text, split = render_card(card), render_card(model_card(config, name, 12))
    assert all(len(line) <= 120 for line in f"{text}\n{split}".splitlines())
    assert name in text
    assert f"{card['parameters']['total'] / 1e6:,.1f} M" in text


def test_the_card_says_how_this_cpu_computes_and_which_options_change_results():
    card = card_of("InternVL3-1B")
    options = {option.name for option in fields(EngineOptions)}
    assert options >= {*card["changes_results"]} >= {"dtype", "backend", "num_threads", "exif", "v2pe_delta"}
    assert card["cpu"]["dtype"] == ("bfloat16" if {"AMX", "AVX512-BF16"} & {*instructions().split(", ")} else "float32")
    assert f"{card['cpu']['dtype']} by default, as the processor has {instructions()}" in render_card(card)


def test_the_card_of_the_largest_model_takes_neither_memory_nor_time():
    start = time.perf_counter()
    assert card_of("InternVL3-78B")["parameters"]["total"] == 78_408_318_336
    assert time.perf_counter() - start < 2


def test_a_window_takes_room_for_each_sequence_and_its_layers_none_for_further_tokens():
    config = load_config(KNOWN_MODELS["InternVL3_5-GPT-OSS-20B-A4B-Preview"])
    card = model_card(config, "")
    assert card["kv_bytes_per_token"] == 12 * 2 * 8 * 64 * 2, "of the 12 layers that see all tokens"
    assert card["kv_bytes_per_sequence"] == 128 * card["kv_bytes_per_token"]
    assert "24 KiB per token in bfloat16" in render_card(card)
    assert "and 3.0 MiB for the windows of each sequence" in render_card(card)
    assert "kv_bytes_per_sequence" not in model_card(load_config(KNOWN_MODELS["InternVL3-1B"]), "")

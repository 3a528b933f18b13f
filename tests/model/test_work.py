"""Work and floors agree with numbers computed by hand, the kernels' costs, tables of the 1B to 78B, and replies."""

import json
import logging
from dataclasses import replace

import pytest
import torch

from internvl_rt import Engine, SamplingParams
from internvl_rt.checkpoint.config import KNOWN_MODELS, load_config
from internvl_rt.engine.reply import Timings
from internvl_rt.kernels._contract import Case
from internvl_rt.kernels.catalogue import discover_specs
from internvl_rt.model.internvl import build_weights, named_parameters
from internvl_rt.model.shard import Shard, shard_decoder
from internvl_rt.model.work import (
    NO_WORK,
    Roof,
    Work,
    data_sheet_roof,
    decoder_work,
    kv_block_bytes,
    kv_bytes_per_token,
    roof_of,
    vision_work,
)

BF16 = torch.bfloat16
H200 = Roof(790e12, 4.3e12, "as the tables assume")


def config_of(name):
    return load_config(KNOWN_MODELS[f"InternVL3-{name}"])


def step(name, *chunks, rows=1, dtype=BF16):
    """Returns the work of a step. chunks: for each, the number of tokens before it and of tokens it computes."""
    return decoder_work(config_of(name).decoder, dtype, [n for _, n in chunks], [s + n for s, n in chunks], rows)


def projector_flops(config):
    width, merged = config.decoder.hidden_size, 4 * config.vision.hidden_size
    return 2 * 256 * (merged * width + width * width)


def test_a_tile_of_the_1b_number_by_number():
    work = vision_work(config_of("1B"), BF16, 1)
    layer = 2 * 1025 * 12 * 1024**2 + 4 * 1025**2 * 1024
    assert work.flops == 2 * 1024 * 588 * 1024 + 24 * layer + 2 * 256 * (4096 * 896 + 896 * 896)
    assert work.bytes == 2 * (304_012_288 + 2 * 4096 + 4097 * 896 + 897 * 896)  # the parameters of tower and projector


def test_a_decode_step_of_the_8b_number_by_number():
    work = step("8B", (2047, 1))
    layer = 3584 * (28 + 2 * 4) * 128 + 28 * 128 * 3584 + 3 * 3584 * 18944
    head = 151674 * 3584
    assert work.flops == 28 * (2 * layer + 4 * 2048 * 28 * 128) + 2 * head
    weights = 28 * (layer + 2 * 3584 + 36 * 128) + 3584 + head  # with norms, and biases of q, k, v only
    assert work.bytes == 2 * (weights + 3584) + 57_344 * (2048 + 1)


def test_a_step_reads_the_experts_that_its_tokens_choose():
    decoder = load_config(KNOWN_MODELS["InternVL3_5-30B-A3B"]).decoder
    dense = replace(decoder, experts=None, intermediate_size=8 * 768)
    router, expert = 48 * 2048 * 128, 48 * 3 * 2048 * 768
    one, same = (decode_of(each, 1) for each in (decoder, dense))
    assert one.flops == same.flops + 2 * router
    assert one.bytes == same.bytes + 2 * router, "one token reads its 8 experts"
    eight, without = decode_of(decoder, 8), decode_of(dense, 8)
    chosen = 128 * (1 - (1 - 8 / 128) ** 8)
    assert chosen == pytest.approx(51.6, abs=0.1)
    assert eight.flops == without.flops + 8 * 2 * router
    assert eight.bytes == pytest.approx(without.bytes + 2 * router + 2 * (chosen - 8) * expert, rel=1e-9)
    many = decoder_work(decoder, BF16, [4096], [4096], 0)
    assert many.bytes - decoder_work(dense, BF16, [4096], [4096], 0).bytes == 2 * router + 2 * 120 * expert


def decode_of(decoder, batch):
    return decoder_work(decoder, BF16, [1] * batch, [100] * batch, batch)


@pytest.mark.parametrize(("by_expert", "size"), [(False, 1), (False, 4), (True, 4)])
def test_ranks_share_the_work_of_experts(by_expert, size):
    decoder = load_config(KNOWN_MODELS["InternVL3_5-241B-A28B"]).decoder
    parts = [shard_decoder(decoder, Shard(rank, size, by_expert=by_expert)) for rank in range(size)]
    without = [replace(part, experts=None, intermediate_size=0) for part in parts]
    flops = [decode_of(p, 3).flops - decode_of(w, 3).flops for p, w in zip(parts, without, strict=True)]
    assert sum(flops) == 3 * 94 * 2 * (8 * 3 * 4096 * 1536 + size * 4096 * 128)


@pytest.mark.parametrize("name", ["1B", "2B", "8B", "9B", "14B", "38B", "78B"])
def test_bytes_are_those_of_the_models_parameters(name):
    config = config_of(name)
    for decoder in (config.decoder, replace(config.decoder, qkv_bias=False, qk_norm=True)):
        sizes = {"vision": 0, "projector": 0, "decoder": 0}
        weights = build_weights(replace(config, decoder=decoder), dtype=BF16, device="meta")
        for path, tensor in named_parameters(weights).items():
            sizes[path.partition(".")[0]] += tensor.nbytes
        assert vision_work(config, BF16, 13).bytes == sizes["vision"] + sizes["projector"]
        seen = 11 * kv_bytes_per_token(decoder, BF16) + 7 * decoder.hidden_size * 2  # 4 cached tokens, 7 new ones
        head = decoder.vocab_size * decoder.hidden_size * 2
        written = 7 * kv_bytes_per_token(decoder, BF16)
        assert decoder_work(decoder, BF16, [7], [11], 1).bytes == sizes["decoder"] - head + seen + written


def test_tied_embeddings_are_read_as_the_head_all_the_same():
    decoder = config_of("1B").decoder
    tied = replace(decoder, tie_embeddings=True)
    assert decoder_work(tied, BF16, [1], [9], 1) == decoder_work(decoder, BF16, [1], [9], 1)


@pytest.mark.parametrize(
    ("name", "num_tiles", "gflop"), [("1B", 1, 724), ("8B", 13, 9_410), ("78B", 1, 11_948), ("78B", 13, 155_323)]
)
def test_vision_tower_does_what_the_tables_say(name, num_tiles, gflop):
    config = config_of(name)
    flops = vision_work(config, BF16, num_tiles).flops - num_tiles * projector_flops(config)
    assert flops / 1e9 == pytest.approx(gflop, rel=2e-3)  # the tables count norms too


@pytest.mark.parametrize(
    ("name", "num_tokens", "gflop"),
    [("1B", 320, 234), ("1B", 3392, 2_926), ("8B", 320, 4_199), ("8B", 3392, 46_593), ("78B", 3392, 491_488)],
)
def test_prefill_does_what_the_tables_say(name, num_tokens, gflop):
    assert step(name, (0, num_tokens)).flops / 1e9 == pytest.approx(gflop, rel=3e-3)


@pytest.mark.parametrize(
    ("name", "batch", "context", "floor_us"),
    [("1B", 1, 2048, 236.3), ("1B", 1, 32768, 324.1), ("8B", 1, 2048, 3318), ("8B", 1, 32768, 3728),
     ("8B", 64, 32768, 31426), ("78B", 8, 2048, 34585)],
)  # fmt: skip
def test_floor_of_a_decode_step_is_that_of_the_tables(name, batch, context, floor_us):
    work = step(name, *[(context - 1, 1)] * batch, rows=batch)
    assert H200.floor_s(work) * 1e6 == pytest.approx(floor_us, rel=1.5e-2)  # the tables count activations too


def test_vision_flops_are_the_sum_of_the_kernels():
    vision, num_tiles = config_of("8B").vision, 3
    rows, width = num_tiles * 1025, vision.hidden_size
    shapes = [(rows, 3 * width, width), (rows, width, width), (rows, 4096, width), (rows, width, 4096)]
    tiles = {"I": num_tiles, "grid": 32, "patch": 14, "E": width, "L": 1024, "H": 16, "C": 64}
    total = flops_of("patch_embed", tiles) + vision.num_layers * flops_of("vit_attention", tiles)
    total += vision.num_layers * sum(map(product_flops, shapes))
    total += product_flops((num_tiles * 256, 3584, 4096)) + product_flops((num_tiles * 256, 3584, 3584))
    assert vision_work(config_of("8B"), BF16, num_tiles).flops == total


def test_decoder_flops_and_cache_bytes_are_the_sum_of_the_kernels():
    chunks, decodes = [(0, 70), (300, 33)], [5, 1000, 64]
    heads = {"H": 28, "G": 4, "C": 128}
    rows = 70 + 33 + 3
    shapes = [(rows, 36 * 128, 3584), (rows, 3584, 3584), (rows, 2 * 18944, 3584), (rows, 3584, 18944)]
    costs = [cost_of("prefill_attention", {"chunks": chunks, **heads})]
    costs.append(cost_of("decode_attention", {"seq_lens": decodes, **heads}))
    total = 28 * (sum(map(product_flops, shapes)) + sum(cost.flops for cost in costs))
    work = step("8B", *[(length - 1, 1) for length in decodes], *chunks, rows=5)
    assert work.flops == total + product_flops((5, 151674, 3584))
    read = 28 * (sum(cost.bytes for cost in costs) - 2 * rows * 28 * 128 * 2)  # q and y are not counted
    nothing_before = decoder_work(config_of("8B").decoder, BF16, [rows], [0], 5)
    assert work.bytes == nothing_before.bytes + read


def cost_of(name, sizes):
    return discover_specs()[name].cost(Case("", sizes), BF16)


def flops_of(name, sizes):
    return cost_of(name, sizes).flops


def product_flops(shape):
    rows, n, k = shape
    return flops_of("gemm_epilogue", {"R": rows, "N": n, "K": k, "epilogue": "none"})


def test_chunks_of_a_prompt_do_the_flops_of_the_whole_and_read_the_weights_again():
    whole, parts = step("1B", (0, 100)), [step("1B", (0, 60), rows=0), step("1B", (60, 40))]
    assert sum(part.flops for part in parts) == whole.flops
    again = parts[0].bytes + parts[1].bytes - whole.bytes
    layers = 24 * (2 * 896 * 896 + 2 * 896 * 128 + 3 * 896 * 4864 + 2 * 896 + 1152)
    assert again == 2 * layers + 60 * kv_bytes_per_token(config_of("1B").decoder, BF16)


def test_a_block_of_the_cache_has_room_for_the_kind_of_layers_that_are_more():
    decoder = replace(config_of("1B").decoder, num_layers=5)
    whole = 64 * kv_bytes_per_token(decoder, BF16)
    kinds = {(): 5, (None,) * 5: 5, (8, None, 8, None, 8): 3, (8, None, None, None, None): 4}
    for windows, num_layers in kinds.items():
        some = replace(decoder, windows=windows)
        assert kv_block_bytes(some, BF16, 64) == whole * num_layers // 5
        assert (some.window, some.num_tables) == ((None, 1) if num_layers == 5 else (8, 2))


def test_no_tiles_are_no_work():
    assert vision_work(config_of("1B"), BF16, 0) == NO_WORK


def test_a_floor_is_the_slower_of_computing_and_moving():
    roof = Roof(10.0, 4.0, "slow")
    assert (roof.floor_s(Work(100, 4)), roof.floor_s(Work(1, 8))) == (10.0, 2.0)
    assert Work(1, 2) + Work(3, 4) == Work(4, 6)


def test_only_devices_with_a_known_data_sheet_have_a_roof():
    assert roof_of(torch.device("cpu"), BF16) is None
    assert data_sheet_roof("NVIDIA H200 NVL", BF16) is None  # another card, with other clocks
    roof = data_sheet_roof("NVIDIA H200", BF16)
    assert (roof.flops_per_s, roof.bytes_per_s) == (989.4e12, 4.8e12)
    assert data_sheet_roof("NVIDIA H200", torch.float32).flops_per_s == 67e12
    assert "data sheet" in roof.name


@pytest.fixture(scope="module")
def engine():
    with Engine.from_pretrained("tiny", device="cpu", prefix_cache=False) as engine:
        yield engine


def ask(text):
    return [{"role": "user", "content": text}]


def test_a_request_that_is_alone_is_charged_its_own_steps(engine):
    reply = engine.chat(ask("Hello"), SamplingParams(max_tokens=5, ignore_eos=True))
    num_prompt, config, dtype = reply.usage.prompt_tokens, engine.config.decoder, engine.model.dtype
    assert reply.timings.vision_work == NO_WORK
    assert reply.timings.prefill_work == decoder_work(config, dtype, [num_prompt], [num_prompt], 1)
    steps = [decoder_work(config, dtype, [1], [num_prompt + index], 1) for index in range(1, 5)]
    assert reply.timings.decode_work == sum(steps, NO_WORK)


def test_pictures_are_charged_to_the_vision_stage(engine):
    picture = torch.randint(0, 256, (40, 90, 3), dtype=torch.uint8)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "Read."}]
    reply = engine.chat([{"role": "user", "content": content}], SamplingParams(max_tokens=1))
    num_tiles = reply.usage.image_tokens // engine.config.tokens_per_tile
    assert reply.timings.vision_work == vision_work(engine.config, engine.model.dtype, num_tiles)


def test_steps_that_are_shared_are_charged_in_full_to_each(engine):
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    first, second = engine.generate([ask("Hello"), ask("Hello")], params)
    assert first.timings.prefill_work == second.timings.prefill_work
    assert first.timings.decode_work == second.timings.decode_work
    alone = engine.chat(ask("Hello"), params).timings
    assert first.timings.decode_work.flops == 2 * alone.decode_work.flops
    assert alone.decode_work.bytes < first.timings.decode_work.bytes < 2 * alone.decode_work.bytes


def test_a_request_logs_one_line_of_figures_and_nothing_of_what_was_said(engine, caplog):
    with caplog.at_level(logging.DEBUG, logger="internvl_rt"):
        reply = engine.chat(ask("Hello"), SamplingParams(max_tokens=3, ignore_eos=True))
    (record,) = caplog.records
    figures = json.loads(record.getMessage())
    assert figures["decode_work"] == {
        "flops": reply.timings.decode_work.flops,
        "bytes": reply.timings.decode_work.bytes,
    }
    assert (figures["outcome"], figures["completion_tokens"]) == ("length", 3)
    assert all(isinstance(value, int | float | dict) for name, value in figures.items() if name != "outcome")


TIMINGS = Timings(
    media_s=0.01,
    tile_s=0.02,
    vision_s=0.004,
    prefill_s=0.0,
    decode_s=2.0,
    queued_s=0.001,
    first_token_s=0.1,
    total_s=2.1,
    num_decoded=100,
    vision_work=Work(1_000_000_000_000, 600_000_000),
    prefill_work=NO_WORK,
    decode_work=Work(200_000_000_000_000, 4_000_000_000_000),
)


def test_timings_print_an_aligned_table_with_the_share_of_the_roof():
    *lines, last = TIMINGS.render(Roof(1e15, 4e12, "a device")).splitlines()
    assert last == "floor by a device"
    assert len({len(line) for line in lines if line.startswith(("stage", "vision", "decode"))}) == 1
    table = {line[:11].strip(): line[11:].split() for line in lines}
    assert table["stage"] == ["seconds", "TFLOP", "GB", "floor", "s", "share"]
    assert table["vision"] == ["0.0040", "1", "0.6", "0.001", "25%"]
    assert table["decode"] == ["2.0000", "200", "4,000", "1", "50%"]
    assert table["prefill"] == ["0.0000", "0", "0"]
    assert table["per token"] == ["0.0200"]


def test_timings_without_a_roof_claim_no_share():
    text = TIMINGS.render()
    assert "share" not in text
    assert "floor" not in text
    assert "first token" in text

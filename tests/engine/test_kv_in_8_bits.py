"""Engines whose keys and values are numbers in 8 bits: the same answers, in half the memory, whatever else runs."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

import internvl_rt
from internvl_rt import Engine, NotFiniteError, RequestError, SamplingParams
from internvl_rt.checkpoint.config import KNOWN_MODELS, load_config
from internvl_rt.engine import loading
from internvl_rt.engine.loading import plan_parts
from internvl_rt.engine.options import EngineOptions
from internvl_rt.kernels._launch import Target
from internvl_rt.model import ops_triton
from internvl_rt.model.ops_triton import triton_ops
from internvl_rt.model.work import decoder_work, kv_bytes_per_token
from support.calls import ask
from support.digits import MAX_DIGITS, draw_reading, load_glyphs, measure_accuracy
from support.load import (
    build_broken_kind,
    build_kinds,
    check_nothing_is_left,
    expected_answers,
    run_load,
    tiny_pool_bytes,
)
from support.recorder import Recorder

SAMPLES = sorted((Path(internvl_rt.__file__).parent / "tiny" / "samples").glob("*.png"))
BITS = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
formats = pytest.mark.parametrize("cache", BITS)


def load(cache, **options):
    options = {"kv_cache_bytes": 1 << 22, "dtype": "float32", **options}
    return Engine.from_pretrained("tiny", device="cpu", kv_cache_dtype=cache, **options)


@formats
@pytest.mark.parametrize("backend", ["torch", "onednn"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_pictures_are_read(cache, backend, dtype):
    with load(cache, backend=backend, dtype=dtype) as engine:
        assert engine.cache.dtype == BITS[cache]
        replies = engine.generate(
            [ask("Read the digits.", sample) for sample in SAMPLES], SamplingParams(max_tokens=12)
        )
        assert [reply.text for reply in replies] == [sample.stem for sample in SAMPLES]


@pytest.mark.slow
def test_digits_are_read_as_well_as_with_a_cache_in_float32():
    rng, glyphs = np.random.default_rng(41), load_glyphs(held_out=True)
    exercises = [draw_reading(rng, glyphs, 1 + n % MAX_DIGITS, "read", "count") for n in range(120 * MAX_DIGITS)]
    shares = {}
    for cache in ("auto", *BITS):
        with load(cache, kv_cache_bytes=1 << 26) as engine:
            shares[cache] = [measure_accuracy(engine, exercises, turn=turn) for turn in (0, 1)]
    assert np.allclose(shares["fp8"], shares["auto"], atol=0.005), shares
    assert np.allclose(shares["int8"], shares["auto"], atol=0.005), shares


@pytest.fixture(scope="module")
def kinds():
    """Greedy requests. In another order of sums a number may be the next one, which scores tell, but no draw."""
    greedy = [kind for kind in build_kinds(28, seed=0, sampled=False) if not kind.responses]
    return [*greedy, build_broken_kind()]


@pytest.fixture(scope="module", params=BITS)
def expected(request, kinds):
    """The format, and what each request gets when it runs alone in its engine and nothing is used again."""
    return request.param, expected_answers(kinds, kv_cache_dtype=request.param)


@pytest.mark.fast("fp8-caches")
@pytest.mark.parametrize(
    "options",
    [
        {"num_draft_tokens": 3},
        {"prefix_cache": False, "visual_cache_bytes": 0},
        {"max_tokens_per_step": 50, "num_draft_tokens": 2, "visual_cache_bytes": 0, "max_num_seqs": 7},
    ],
    ids=["caches", "no-caches", "small-steps"],
)
def test_greedy_output_does_not_depend_on_batches_chunks_preemption_prefixes_or_forks(kinds, expected, options):
    cache, answers = expected
    pool = {"block_size": 16, "max_model_len": 640}
    pool["kv_cache_bytes"] = tiny_pool_bytes(42, kv_cache_dtype=cache)
    with load(cache, **pool, **options) as engine:
        engine.loop.run_ahead = True  # as on a GPU, launch a step before reading the step before it
        outcome = run_load(engine, kinds, answers, num_requests=60, seed=1)
        assert not outcome.wrong, outcome.wrong[0]
        assert engine.stats()["preemptions"] > 0
        assert (engine.stats()["prefix_hit_tokens"] > 0) == options.get("prefix_cache", True)
        check_nothing_is_left(engine)


@pytest.mark.fast("fp8")
def test_requests_get_the_same_from_graphs(kinds, expected):
    """The recorder stands in for CUDA graphs: it has their shapes, padding and buffers, and computes at each replay."""
    cache, answers = expected
    with load(cache, backend="torch", max_model_len=640, block_size=16, max_num_seqs=8) as engine:
        recorder = Recorder()
        engine.runner.capture(max_num_seqs=8, max_model_len=640, max_tokens_per_step=300, capture=recorder)
        outcome = run_load(engine, kinds, answers, num_requests=40, seed=4)
        assert not outcome.wrong, outcome.wrong[0]
        assert len(recorder.replayed) > 0


@formats
def test_a_cache_holds_more_tokens_in_as_much_memory(cache):
    config = load_config(KNOWN_MODELS["InternVL3-8B"]).decoder
    assert kv_bytes_per_token(config, torch.bfloat16) == 57_344
    assert kv_bytes_per_token(config, BITS[cache]) == 28 * 2 * 4 * (128 + 2)
    with load("auto") as dense, load(cache) as engine:
        config = engine.config.decoder
        assert engine.memory.block_bytes == 64 * kv_bytes_per_token(config, BITS[cache])
        buffers = engine.cache.pool.buffers
        assert sum(buffer.nbytes for buffer in buffers) == engine.memory.cache_bytes <= 1 << 22
        assert engine.memory.num_blocks > 3 * dense.memory.num_blocks  # in float32 4 bytes were 1, and a scale is 2


@formats
def test_the_work_of_an_answer_counts_the_bytes_that_are_read(cache):
    with load(cache) as engine:
        reply = engine.chat(ask("Hello"), SamplingParams(max_tokens=2, ignore_eos=True))
        layers, num_prompt = engine.model.decoder_layer_bytes, reply.usage.prompt_tokens
        of_cache = layers, BITS[cache]
        step = decoder_work(engine.config.decoder, torch.float32, [1], [num_prompt + 1], 1, *of_cache)
        assert reply.timings.decode_work == step


@formats
def test_a_prompt_made_for_another_format_is_refused(cache):
    with load("auto") as dense, load(cache) as engine:
        prepared = dense.prepare(ask("Hello"))
        assert prepared.identity != engine.prepare(ask("Hello")).identity
        with pytest.raises(RequestError, match="the prompt is for another model, dtype, kv_cache_dtype"):
            engine.new_request(prepared)


@formats
@pytest.mark.parametrize("backend", ["torch", "onednn"])
def test_keys_that_are_not_finite_end_their_request_and_no_other(cache, backend):
    black = np.zeros((56, 56, 3), np.uint8)
    with load(cache, backend=backend) as engine:
        original = engine.model.encode_tiles
        engine.model.encode_tiles = lambda tiles: original(tiles) if tiles.any() else original(tiles) * torch.nan
        for _ in range(2):
            with pytest.raises(NotFiniteError):
                engine.chat(ask("Read the digits.", black), SamplingParams(max_tokens=4))
            assert (
                engine.chat(ask("Read the digits.", SAMPLES[0]), SamplingParams(max_tokens=12)).text == SAMPLES[0].stem
            )


def test_a_cache_in_fp8_is_refused_by_kernels_without_its_conversions_before_memory_is_taken(monkeypatch):
    monkeypatch.setattr(ops_triton, "target_of", lambda device: Target(80, 108))
    monkeypatch.setattr(loading, "_choose_ops", lambda *_: triton_ops(torch.device("cpu")))
    with pytest.raises(
        RequestError, match=r"needs compute capability 8\.9, but cpu has 8\.0; choose kv_cache_dtype 'int8'"
    ):
        plan_parts("tiny", EngineOptions(device="cpu", kv_cache_dtype="fp8"))
    plan_parts("tiny", EngineOptions(device="cpu", kv_cache_dtype="int8"))


@formats
def test_the_log_names_the_format(cache, caplog):
    with caplog.at_level(logging.INFO, logger="internvl_rt"):
        load(cache).close()
    assert json.loads(caplog.messages[0])["kv_cache_dtype"] == str(BITS[cache]).removeprefix("torch.")

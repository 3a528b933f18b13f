"""The memory plan counts what it should, and a pass really stays within its workspace."""

import gc
import re
from contextlib import suppress
from errno import ENOMEM

import numpy as np
import pytest
import torch

from internvl_rt import Engine, EngineOptions, RequestError, SamplingParams
from internvl_rt.checkpoint.config import KNOWN_MODELS, load_config
from internvl_rt.engine import memory as memory_module
from internvl_rt.engine.memory import (
    CUBLAS_BYTES,
    graphs_bytes,
    plan_memory,
    step_workspace_bytes,
    torch_attention_bytes,
    vision_workspace_bytes,
)
from internvl_rt.kernels._paged_attention import paged_attention_reference

GIB = 1 << 30


def plan(name="InternVL3-1B", **changes):
    config, options = load_config(KNOWN_MODELS[name]), EngineOptions(**({"kv_cache_bytes": GIB} | changes))
    return plan_memory(config, torch.bfloat16, torch.device("cpu"), options, weight_bytes=2 * GIB, graphs=True)


def test_the_cache_takes_what_it_is_given_in_whole_blocks():
    memory = plan()
    assert memory.block_bytes == 64 * 12_288
    assert memory.num_blocks == GIB // memory.block_bytes
    assert memory.cache_bytes <= GIB < memory.cache_bytes + memory.block_bytes


def test_a_cache_without_room_for_one_sequence_is_refused():
    with pytest.raises(RequestError, match="raise kv_cache_bytes or lower max_model_len"):
        plan(kv_cache_bytes=1000)


@pytest.mark.parametrize(
    ("name", "num_tiles", "least", "most"),
    [("InternVL3-1B", 13, 100e6, 250e6), ("InternVL3-38B", 13, 300e6, 700e6)],
)
def test_vision_workspace_is_that_of_the_widest_layer(name, num_tiles, least, most):
    config = load_config(KNOWN_MODELS[name])
    assert least < vision_workspace_bytes(config, torch.bfloat16, num_tiles) < most
    assert vision_workspace_bytes(config, torch.bfloat16, 1) * 12.9 < vision_workspace_bytes(config, torch.bfloat16, 13)


def test_step_workspace_grows_with_tokens_and_with_draws():
    decoder = load_config(KNOWN_MODELS["InternVL3-8B"]).decoder
    one = step_workspace_bytes(decoder, torch.bfloat16, 1, 1)
    assert step_workspace_bytes(decoder, torch.bfloat16, 8192, 1) > 8000 * (one - decoder.vocab_size * 14)
    assert step_workspace_bytes(decoder, torch.bfloat16, 1, 64) > 60 * one - 1e7


@pytest.mark.parametrize("num_tokens", [512, 2048])
def test_what_attention_in_torch_takes_is_counted(num_tokens):
    config = load_config(KNOWN_MODELS["InternVL3-1B"]).decoder
    heads, kv_heads, width, seq_len = config.num_heads, config.num_kv_heads, config.head_dim, 4096
    cache = torch.zeros(seq_len // 64, kv_heads, 64, width)
    table = torch.arange(len(cache), dtype=torch.int32)[None]
    sizes = torch.tensor([0, num_tokens], dtype=torch.int32), torch.tensor([seq_len], dtype=torch.int32)
    q_THC = torch.randn(num_tokens, heads, width)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        paged_attention_reference(q_THC, cache, cache, table, *sizes)
    taken = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    planned = torch_attention_bytes(config, torch.float32, torch.device("cpu"), num_tokens, seq_len)
    assert 0.4 * taken < planned < 1.2 * taken  # not all that is taken is held at the same time


def test_the_plan_counts_attention_where_torch_computes_it():
    kernels = plan(backend="triton", max_tokens_per_step=512).step_bytes
    attention = plan(backend="torch", max_tokens_per_step=512).step_bytes - kernels
    assert attention == plan(max_tokens_per_step=512).step_bytes - kernels
    assert attention > 512 * 32768 * 3
    assert plan(backend="torch").step_bytes == kernels + attention


def test_the_card_names_every_part():
    with Engine.from_pretrained("tiny", device="cpu") as engine:
        card = engine.memory.render()
        assert engine.memory.num_blocks == engine.cache.blocks.num_blocks
    for part in ("device", "weights", "vision workspace", "step workspace", "KV cache", "tokens in"):
        assert part in card


def test_on_a_gpu_the_cache_takes_what_everything_else_leaves(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * GIB, 24 * GIB))
    config = load_config(KNOWN_MODELS["InternVL3-1B"])
    options = EngineOptions(visual_cache_bytes=GIB, max_num_seqs=1024)
    plans = {}
    for graphs in (True, False):
        memory = plan_memory(config, torch.bfloat16, torch.device("cuda"), options, weight_bytes=2 * GIB, graphs=graphs)
        others = memory.vision_bytes + memory.step_bytes + memory.graph_bytes + memory.visual_cache_bytes
        left = int(20 * GIB * 0.95) - others - memory.cublas_bytes
        assert memory.cache_bytes <= left < memory.cache_bytes + memory.block_bytes
        assert memory.cublas_bytes == CUBLAS_BYTES > 100e6
        assert ("CUDA graphs" in memory.render()) == graphs
        plans[graphs] = memory
    assert plans[True].graph_bytes > plans[False].graph_bytes == 0


def test_memory_that_torch_keeps_but_nobody_uses_is_free(monkeypatch):
    stats = {"reserved_bytes": 9, "allocated_bytes": 2, "inactive_split_bytes": 3}  # GiB
    named = {f"{name}.all.current": size * GIB for name, size in stats.items()}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: named)
    assert memory_module._free_bytes(torch.device("cuda")) == (8 * GIB, 24 * GIB)


def test_graphs_keep_the_results_of_every_number_of_tiles():
    """The 38B's graphs keep the visual tokens of 107 tiles and the logits of 64 sequences and 8 prompts.

    They compute up to 2,048 tokens of prompts beside 64 sequences that decode.
    """
    config = load_config(KNOWN_MODELS["InternVL3-38B"])
    sizes = {"max_tokens_per_step": 2048, "max_num_seqs": 64}
    workspace = max(
        vision_workspace_bytes(config, torch.bfloat16, 16),
        step_workspace_bytes(config.decoder, torch.bfloat16, 2048 + 64, 64),
    )
    results = 2 * (107 * 256 * 5120 + 72 * config.decoder.vocab_size)
    inputs = 16 * 3 * 448**2 + 2 * 2 * (2048 + 64) * 5120
    assert graphs_bytes(config, torch.bfloat16, **sizes) == workspace + results + inputs
    assert 280e6 < results < 310e6


@pytest.fixture
def free_gib(monkeypatch):
    """A function that sets what the host has free, as the engine sees it."""
    return lambda gib: monkeypatch.setattr(memory_module, "free_host_bytes", lambda: int(gib * GIB))


def nothing_is_taken(*_args, **_kwargs):
    raise AssertionError("memory was taken")


@pytest.mark.parametrize(
    ("model", "options", "gib", "message"),
    [
        ("38B", {}, 100, r"14\d\.\d+ GiB for its weights in float32 and \d\.\d+ GiB of workspace, but cpu has 95\.00"),
        ("8B", {}, 22, r"29\.\d+ GiB for its weights in float32 .* choose dtype bfloat16 \(14\.80 GiB\), a smaller m"),
        ("8B", {"dtype": "bfloat16"}, 10, r"14\.\d+ GiB for its weights in bfloat16 .* choose a smaller model or ano"),
        ("8B", {"dtype": "bfloat16", "kv_cache_bytes": 1 << 40, "max_num_seqs": 4096}, 40,
         r"a KV cache of 1,024\.00 GiB was asked for, but beside the model cpu has \d+\.\d+ GiB free; lower kv_cache"),
    ],
)  # fmt: skip
def test_a_model_or_cache_larger_than_memory_is_refused_before_any_is_taken(
    monkeypatch, free_gib, model, options, gib, message
):
    free_gib(gib)
    monkeypatch.setattr("internvl_rt.engine.loading.random_weights", nothing_is_taken)
    with pytest.raises(RequestError, match=message):
        Engine.from_pretrained(f"random:InternVL3-{model}", device="cpu", **options)


def test_on_a_gpu_too_large_a_model_is_refused_before_any_memory_is_taken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * GIB, 24 * GIB))
    config, options = load_config(KNOWN_MODELS["InternVL3-14B"]), EngineOptions()
    for loaded in (False, True):
        with suppress(RequestError) if loaded else pytest.raises(RequestError, match=r"but cuda has 19\.00 GiB free"):
            plan_memory(
                config, torch.bfloat16, torch.device("cuda"), options,
                weight_bytes=28 * GIB, graphs=False, weights_are_loaded=loaded,
            )  # fmt: skip


def test_on_the_cpu_the_cache_takes_what_is_left_and_at_most_4_gib(free_gib):
    config, options = load_config(KNOWN_MODELS["InternVL3-1B"]), EngineOptions(max_num_seqs=16)
    caches = []
    for gib in (64, 4):
        free_gib(gib)
        memory = plan_memory(config, torch.bfloat16, torch.device("cpu"), options, weight_bytes=2 * GIB, graphs=False)
        caches.append(memory.cache_bytes)
    assert caches[0] == pytest.approx(4 * GIB, rel=0.01)
    assert caches[1] == pytest.approx(3.8 * GIB - memory.vision_bytes - memory.step_bytes, rel=0.01)


@pytest.mark.parametrize(("kv_cache_bytes", "max_model_len"), [(None, 1024), (1000, 4096), (GIB, 4096)])
def test_memory_that_holds_the_model_but_no_sequence_is_said_to_be_short(free_gib, kv_cache_bytes, max_model_len):
    """Neither a higher nor a lower kv_cache_bytes helps, and each option that the message names does."""
    config, sizes = load_config(KNOWN_MODELS["InternVL3-1B"]), {"max_tokens_per_step": 512, "max_num_seqs": 64}

    def plan_with(**options):
        options = EngineOptions(**sizes | {"max_model_len": max_model_len} | options)
        return plan_memory(config, torch.bfloat16, torch.device("cpu"), options, weight_bytes=2 * GIB, graphs=False)

    free_gib(64)
    memory = plan_with()
    free_gib((memory.vision_bytes + memory.step_bytes + 10_645) / 0.95 / GIB)
    message = (
        r"the KV cache of one sequence needs (12|48)\.0 MiB, but beside the model cpu has \d+\.\d MiB free; choose"
    )
    with pytest.raises(RequestError, match=message) as caught:
        plan_with(kv_cache_bytes=kv_cache_bytes)
    named = set(re.findall("[a-z]+_[a-z_]+", str(caught.value)))
    assert named == {"max_model_len", "max_num_seqs", "max_tokens_per_step"}
    if kv_cache_bytes is None:
        for name, value in {"max_model_len": 64, "max_tokens_per_step": 64, "max_num_seqs": 1}.items():
            assert plan_with(**{name: value}).num_blocks > 0


def test_on_a_gpu_visual_tokens_may_leave_no_room_for_a_cache(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * GIB, 24 * GIB))
    config, options = load_config(KNOWN_MODELS["InternVL3-1B"]), EngineOptions(visual_cache_bytes=4 * GIB)
    with pytest.raises(RequestError, match=r"needs 0\.8 MiB, but beside the model cuda has 0\.0 .* visual_cache_bytes"):
        plan_memory(config, torch.bfloat16, torch.device("cuda"), options, weight_bytes=2 * GIB, graphs=False)


def test_what_the_system_does_not_tell_is_not_guessed(monkeypatch):
    monkeypatch.setattr(memory_module, "free_host_bytes", lambda: None)
    assert plan("InternVL3-78B").num_blocks > 0


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(ENOMEM, "Cannot allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_memory_that_runs_out_while_a_model_is_loaded_is_one_line(monkeypatch, error):
    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr("internvl_rt.engine.loading.load_weights", fail)
    with pytest.raises(RequestError, match="the memory of cpu ran out while the model was loaded; choose"):
        Engine.from_pretrained("tiny", device="cpu")


@pytest.mark.gpu
@torch.inference_mode()
def test_a_vision_pass_stays_within_its_workspace():
    with Engine.from_pretrained("tiny", device="cuda") as engine:
        size = engine.config.vision.image_size
        tiles = torch.zeros(16, size, size, 3, dtype=torch.uint8, device="cuda")
        engine.model.encode_tiles(tiles)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        engine.model.encode_tiles(tiles)
        assert torch.cuda.max_memory_allocated() - before <= engine.memory.vision_bytes


@pytest.mark.gpu
def test_an_engine_with_graphs_stays_within_its_plan():
    """The plan's reserve covers what the driver, torch and fragmentation take besides."""
    gc.collect()
    torch.cuda.empty_cache()
    before, _ = torch.cuda.mem_get_info()
    options = {"max_num_seqs": 8, "max_model_len": 8192, "max_tokens_per_step": 1024, "kv_cache_bytes": GIB}
    with Engine.from_pretrained("random:InternVL3-1B", device="cuda", **options) as engine:
        picture = np.random.default_rng(0).integers(0, 256, (1500, 2000, 3), dtype=np.uint8)
        content = [{"type": "image", "image": picture}, {"type": "text", "text": "a " * 500}]
        messages = [{"role": "user", "content": content}]
        engine.generate([messages] * 8, SamplingParams(max_tokens=4, temperature=1.0, logprobs=5, ignore_eos=True))
        after, _ = torch.cuda.mem_get_info()
        memory = engine.memory
    planned = memory.weight_bytes + memory.vision_bytes + memory.step_bytes + memory.graph_bytes + memory.cublas_bytes
    planned += memory.visual_cache_bytes + memory.cache_bytes
    assert before - after <= planned + memory_module.RESERVE * before

"""Tests the memory of the KV cache and the plan of its size."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from internvl_rt import EngineOptions
from internvl_rt.checkpoint.config import DecoderConfig
from internvl_rt.errors import RequestError
from internvl_rt.model.ops import KV_FORMATS, TORCH
from internvl_rt.model.work import kv_bytes_per_token
from internvl_rt.steps.kv_cache import BLOCK_SIZES, KVCache, plan_num_blocks
from support.small_models import QWEN2


def decoder(num_layers: int = 2, num_kv_heads: int = 2, head_dim: int = 8, max_position: int = 100) -> DecoderConfig:
    sizes = {"num_layers": num_layers, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "max_position": max_position}
    return replace(QWEN2, **sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_layer_has_its_own_zeroed_keys_and_values(dtype: torch.dtype) -> None:
    cache = KVCache(decoder(), num_blocks=3, block_size=16, dtype=dtype, device=torch.device("cpu"), ops=TORCH)
    tensors = [tensor for layer in cache.pool.layers for tensor in (layer.k_cache_BGPC, layer.v_cache_BGPC)]
    assert len(tensors) == 4
    for number, tensor in enumerate(tensors, 1):
        assert tensor.shape == (3, 2, 16, 8)
        assert tensor.dtype == dtype
        assert (tensor == 0).all()
        tensor.fill_(number)
    assert [tensor.unique().tolist() for tensor in tensors] == [[1], [2], [3], [4]]
    assert sum(tensor.nbytes for tensor in tensors) == 3 * 16 * kv_bytes_per_token(decoder(), dtype)
    assert (cache.blocks.num_blocks, cache.blocks.block_size) == (3, 16)


@pytest.mark.parametrize("dtype", KV_FORMATS.values())
def test_keys_and_values_in_8_bits_have_zeroed_scales_of_their_own_in_every_layer(dtype: torch.dtype) -> None:
    static_scale_L2 = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    sizes = {"num_blocks": 3, "block_size": 16}
    how = {"dtype": dtype, "device": torch.device("cpu"), "ops": TORCH}
    cache = KVCache(decoder(), **sizes, **how, static_scale_L2=static_scale_L2)
    for number, layer in enumerate(cache.pool.layers):
        assert layer.k_cache_BGPC.dtype == layer.v_cache_BGPC.dtype == dtype
        assert (layer.scale_BGP2.shape, layer.scale_BGP2.dtype) == ((3, 2, 16, 2), torch.bfloat16)
        assert not layer.scale_BGP2.any()
        assert not layer.k_cache_BGPC.float().any()
        assert torch.equal(layer.static_scale_2, static_scale_L2[number])
        layer.scale_BGP2.fill_(number + 1)
    assert [layer.scale_BGP2.unique().tolist() for layer in cache.pool.layers] == [[1], [2]]
    pools = cache.pool.buffers[:2]
    assert sum(pool.nbytes for pool in pools) == 3 * 16 * kv_bytes_per_token(decoder(), dtype)
    assert cache.pool.buffers[2] is static_scale_L2
    plain = KVCache(decoder(), **sizes, **how)
    assert all(layer.static_scale_2 is None for layer in plain.pool.layers)


@pytest.mark.parametrize("dtype", KV_FORMATS.values())
def test_a_block_that_is_copied_takes_its_scales_along(dtype: torch.dtype) -> None:
    how = {"dtype": dtype, "device": torch.device("cpu"), "ops": TORCH}
    cache = KVCache(decoder(), num_blocks=4, block_size=16, **how)
    generator = torch.Generator().manual_seed(0)
    for pool in cache.pool.buffers:
        pool.view(torch.uint8).random_(generator=generator)
    before = [pool.view(torch.uint8).clone() for pool in cache.pool.buffers]
    cache.copy_blocks(np.array([[2, 0], [3, 1]], np.int32))
    for pool, old in zip(cache.pool.buffers, before, strict=True):
        assert torch.equal(pool.view(torch.uint8), old[:, :, [2, 3, 2, 3]])


def test_memory_on_the_cpu_is_committed_only_when_it_is_used() -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident_bytes()
    config = decoder(num_layers=32, num_kv_heads=8, head_dim=128)
    cache = KVCache(config, num_blocks=128, block_size=128, dtype=torch.float32, device=torch.device("cpu"), ops=TORCH)
    assert sum(layer.k_cache_BGPC.nbytes for layer in cache.pool.layers) == 2 << 30
    for layer in cache.pool.layers:  # which would commit 128 MiB in pages of 2 MiB
        for cache_BGPC in (layer.k_cache_BGPC, layer.v_cache_BGPC):
            cache_BGPC[0, :, 0] = 1
    assert resident_bytes() - before < 32 << 20


def test_a_block_size_the_kernels_do_not_know_is_refused() -> None:
    assert BLOCK_SIZES == (16, 32, 64, 128)
    with pytest.raises(RequestError, match=r"block_size must be one of \(16, 32, 64, 128\), got 48"):
        EngineOptions(block_size=48)


@pytest.mark.parametrize(
    ("num_layers", "num_kv_heads", "head_dim", "expected"),
    [(24, 2, 64, 12_288), (28, 4, 128, 57_344), (80, 8, 128, 327_680)],  # InternVL3-1B, -8B, -78B
)
def test_bytes_per_token_match_the_published_shapes(
    num_layers: int, num_kv_heads: int, head_dim: int, expected: int
) -> None:
    config = decoder(num_layers, num_kv_heads, head_dim)
    assert kv_bytes_per_token(config, torch.bfloat16) == expected
    scales = num_layers * num_kv_heads * 2 * 2  # of a key and a value, in 16 bits
    assert kv_bytes_per_token(config, torch.int8) == kv_bytes_per_token(config, torch.float8_e4m3fn)
    assert kv_bytes_per_token(config, torch.int8) == expected // 2 + scales


@pytest.mark.parametrize(
    ("cache_bytes", "max_num_seqs", "max_model_len", "expected"),
    [
        (1 << 40, 3, 17, 6),  # three sequences can use two blocks each
        (1 << 40, 3, None, 21),  # the trained window of 100 tokens is seven blocks
        (5 * 16 * 256, 3, 17, 5),  # the budget holds five blocks, each of 16 tokens of 256 bytes
        (6 * 16 * 256 - 1, 3, 17, 5),
        (2 * 16 * 256, 3, 32, 2),
        (16 * 256, 3, None, 1),
        (1 << 40, 50, 17, 102),  # fifty sequences use a hundred blocks, and the admission watermark is two
    ],
)
def test_the_plan_takes_what_is_useful_and_affordable(
    cache_bytes: int, max_num_seqs: int, max_model_len: int | None, expected: int
) -> None:
    assert kv_bytes_per_token(decoder(), torch.float32) == 256
    plan = plan_num_blocks(
        decoder(),
        torch.float32,
        block_size=16,
        cache_bytes=cache_bytes,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
    )
    assert plan == expected


@pytest.mark.parametrize(("cache_bytes", "max_model_len"), [(2 * 16 * 256 - 1, 17), (16 * 256 - 1, None), (0, 1)])
def test_a_cache_too_small_for_one_sequence_is_refused(cache_bytes: int, max_model_len: int | None) -> None:
    with pytest.raises(RequestError, match="raise kv_cache_bytes or lower max_model_len"):
        plan_num_blocks(
            decoder(),
            torch.float32,
            block_size=16,
            cache_bytes=cache_bytes,
            max_num_seqs=1,
            max_model_len=max_model_len,
        )

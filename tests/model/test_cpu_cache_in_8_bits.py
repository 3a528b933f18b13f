"""The table for CPUs reads and writes keys and values in 8 bits as the references do."""

import pytest
import torch
from torch import Tensor

from internvl_rt.checkpoint.config import DecoderConfig
from internvl_rt.kernels._kv_numbers import quantise_heads
from internvl_rt.kernels._paged_attention import paged_attention_reference
from internvl_rt.model import processor
from internvl_rt.model.attention_cpu import attend_blocks, plan_reads
from internvl_rt.model.ops import KV_FORMATS, TORCH
from internvl_rt.model.step_inputs import LayerCache, Rotary
from support.cpu_tables import case_of, prepared, table
from support.forward import all_logits
from support.small_models import QWEN2, QWEN3, build_model

pytestmark = pytest.mark.skipif(not processor.runs_onednn(), reason="oneDNN has no products for this processor")


def assert_near(actual: Tensor, expected: Tensor, most: float = 1e-5) -> None:
    error = (actual - expected).norm() / expected.norm()
    assert error < most, f"relative error {error:.3g}"


def in_8_bits(cache: LayerCache, numbers: torch.dtype) -> LayerCache:
    (k, k_scale), (v, v_scale) = (quantise_heads(x, numbers) for x in (cache.k_cache_BGPC, cache.v_cache_BGPC))
    return LayerCache(k, v, torch.stack((k_scale, v_scale), dim=-1))


@torch.inference_mode()
@pytest.mark.parametrize("numbers", KV_FORMATS.values(), ids=KV_FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["row", "holes", "scattered", "shared"])
def test_attention_of_decodes_to_numbers_in_8_bits_equals_the_reference(
    layout: str, dtype: torch.dtype, numbers: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("internvl_rt.model.attention_cpu.AT_ONCE", 5 * 2 * 16 * 32)  # five blocks are copied at once
    lens = [17, 1, 300, 64]
    q_SHC, cache, batch = case_of(layout, lens, dtype)
    cache = in_8_bits(cache, numbers)
    where = batch.block_table_SN, torch.arange(len(lens) + 1, dtype=torch.int32), batch.seq_len_S
    caches = cache.k_cache_BGPC, cache.v_cache_BGPC
    expected = paged_attention_reference(q_SHC.float(), *caches, *where, cache.scale_BGP2)
    if layout != "shared":  # behind a sequence and in blocks of nobody may be anything
        cache.scale_BGP2[[*{*range(len(caches[0]))} - {*batch.block_table_SN.flatten().tolist()}]] = torch.nan
        for row, seq_len in enumerate(lens):
            cache.scale_BGP2[batch.block_table_SN[row, (seq_len - 1) // 16], :, (seq_len - 1) % 16 + 1 :] = torch.nan
    actual = attend_blocks(q_SHC, cache, plan_reads(batch, 16, dtype))
    assert actual.dtype == dtype
    # bfloat16: keys, values, probabilities and each block's part are rounded, 2^-9 each
    assert_near(actual.float(), expected, 1e-6 if dtype == torch.float32 else 2**-6)


@torch.inference_mode()
@pytest.mark.parametrize("avx512", [False, True], ids=["avx2", "avx512"])
@pytest.mark.parametrize("chunk_lens", [[24], [20, 1, 1, 2]], ids=["whole", "chunks"])
@pytest.mark.parametrize("numbers", KV_FORMATS.values(), ids=KV_FORMATS)
@pytest.mark.parametrize("decoder", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
def test_decoder_with_a_cache_in_8_bits_equals_the_references(
    decoder: DecoderConfig, numbers: torch.dtype, chunk_lens: list[int], avx512: bool
) -> None:
    model = build_model(decoder=decoder)
    token_ids = [*range(5, 20), *[47] * 4, *range(30, 35)]
    tiles = torch.randint(0, 256, (1, 56, 56, 3), dtype=torch.uint8)
    how = {"context_id": 47, "kv_dtype": numbers}
    expected = all_logits(model, token_ids, tiles, **how)
    # In another order of sums a number may be the next one, which is up to 12 % away.
    assert_near(all_logits(prepared(model, avx512), token_ids, tiles, **how, chunk_lens=chunk_lens), expected, 2e-3)


@torch.inference_mode()
@pytest.mark.parametrize("numbers", KV_FORMATS.values(), ids=KV_FORMATS)
@pytest.mark.parametrize("decoder", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
def test_a_checkpoints_scales_are_written_as_the_references_write_them(
    decoder: DecoderConfig, numbers: torch.dtype
) -> None:
    model, x_TD = build_model(decoder=decoder), torch.randn(5, decoder.hidden_size)
    layer, written = model.weights.decoder.layers[0], []
    projection = layer.norm1, layer.qkv, layer.q_norm, layer.k_norm
    where = torch.arange(5.0), Rotary(1e6 ** -(torch.arange(decoder.head_dim // 2) / decoder.head_dim))
    for ops in (TORCH, table(avx512=False)):
        shape = 2, decoder.num_kv_heads, 16
        caches = [torch.zeros(*shape, decoder.head_dim, dtype=numbers) for _ in "kv"]
        cache = LayerCache(*caches, torch.zeros(*shape, 2, dtype=torch.bfloat16), torch.tensor([0.011, 0.003]))
        ops.norm_qkv_rope_kv(x_TD, *projection, *where, cache, torch.arange(14, 19, dtype=torch.int32))
        written.append([*(each.float() for each in caches), cache.scale_BGP2])
    assert written[0][2][0, :, 14:].flatten(0, 1).unique(dim=0).shape == (1, 2)
    for one, other in zip(*written, strict=True):
        assert (one != other).float().mean() < 0.01  # in another order of sums a number may be the next one

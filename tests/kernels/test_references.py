"""Compares the torch references with their formulas, written out as loops in float64."""

import math

import numpy as np
import pytest
import torch

from internvl_rt.kernels._paged_attention import paged_attention_reference
from internvl_rt.kernels.embed_tokens import embed_tokens_reference
from internvl_rt.kernels.gemm_epilogue import linear_gelu_reference, linear_residual_reference
from internvl_rt.kernels.layer_norm import layer_norm_reference
from internvl_rt.kernels.patch_embed import patch_embed_reference
from internvl_rt.kernels.qkv_rope_kv import qkv_rope_kv_reference
from internvl_rt.kernels.rms_norm import rms_norm_reference
from internvl_rt.kernels.swiglu import swiglu_reference
from internvl_rt.kernels.unshuffle_norm import unshuffle_norm_reference
from internvl_rt.kernels.vit_attention import vit_attention_reference

POISON = math.nan


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(actual, expected, atol=1e-5):
    np.testing.assert_allclose(actual.double().numpy(), expected, rtol=1e-5, atol=atol)


def softmax_rows(query, keys, values):
    """Computes the attention of one query over keys and values [L, C], in float64."""
    scores = keys @ query / math.sqrt(len(query))
    weights = np.exp(scores - scores.max())
    return (weights / weights.sum()) @ values


def test_patch_embed_puts_patches_first_and_class_tokens_last():
    side, width = 4, 5  # patches of 2 x 2
    tiles = torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8)
    weight, bias, cls, position = torch.randn(width, 12), torch.randn(width), torch.randn(width), torch.randn(5, width)
    actual = patch_embed_reference(tiles, weight, bias, cls, position)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = (tiles.numpy() / 255 - mean) / std
    for tile in range(2):
        close(actual[8 + tile], (cls + position[0]).double().numpy())
        for index in range(4):
            row, column = divmod(index, 2)
            cut = pixels[tile, row * 2 : row * 2 + 2, column * 2 : column * 2 + 2].transpose(2, 0, 1).ravel()
            expected = weight.double().numpy() @ cut + (bias + position[1 + index]).double().numpy()
            close(actual[4 * tile + index], expected)


def test_patch_embed_takes_normalised_floating_point_tiles_too():
    tiles = torch.randint(0, 256, (1, 4, 4, 3), dtype=torch.uint8)
    weights = torch.randn(5, 12), torch.randn(5), torch.randn(5), torch.randn(5, 5)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = ((tiles / 255 - mean) / std).permute(0, 3, 1, 2)
    close(patch_embed_reference(pixels, *weights), patch_embed_reference(tiles, *weights).double().numpy())


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_norms_divide_by_their_statistics(scale):
    x, weight, bias = torch.randn(3, 8) * scale + scale, torch.randn(8), torch.randn(8)
    x64, w64, b64 = (t.double().numpy() for t in (x, weight, bias))
    centred = x64 - x64.mean(-1, keepdims=True)
    close(layer_norm_reference(x, weight, bias, 1e-6), centred / np.sqrt(x64.var(-1, keepdims=True) + 1e-6) * w64 + b64)
    close(rms_norm_reference(x, weight, 1e-6), x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-6) * w64)


def test_rms_norm_rounds_before_the_weight_is_applied():
    x, weight = torch.randn(4, 64).bfloat16(), torch.randn(64).bfloat16()
    normalised = (x.float() / (x.float().square().mean(-1, keepdim=True) + 1e-6).sqrt()).bfloat16()
    assert torch.equal(rms_norm_reference(x, weight, 1e-6), normalised * weight)


@pytest.mark.parametrize("normalised", [False, True])
def test_vit_attention_reads_packed_rows_and_normalises_over_all_heads(normalised):
    heads, channels, tokens = 3, 4, 5
    width = heads * channels
    qkv, q_norm, k_norm = torch.randn(2, tokens, 3 * width), torch.rand(width) + 0.5, torch.rand(width) + 0.5
    norms = (q_norm, k_norm) if normalised else (None, None)
    patches_first = torch.cat((qkv[:, 1:].flatten(0, 1), qkv[:, 0]))
    actual = vit_attention_reference(patches_first, 2, channels, *norms, 1e-6)
    q, k, v = (part.double().numpy() for part in qkv.split(width, -1))
    if normalised:
        q, k = (
            t / np.sqrt((t**2).mean(-1, keepdims=True) + 1e-6) * norm.double().numpy()
            for t, norm in ((q, q_norm), (k, k_norm))
        )
    for tile in range(2):
        for head in range(heads):
            cut = slice(head * channels, (head + 1) * channels)
            for token in range(tokens):
                expected = softmax_rows(q[tile, token, cut], k[tile, :, cut], v[tile, :, cut])
                row = tile * (tokens - 1) + token - 1 if token else 2 * (tokens - 1) + tile
                close(actual[row, cut], expected)


def test_linear_epilogues_follow_their_formulas():
    x, weight, bias, residual, scale = (torch.randn(*s) for s in ((3, 4), (5, 4), (5,), (3, 5), (5,)))
    product = (x.double() @ weight.double().T + bias.double()).numpy()
    erf = np.vectorize(math.erf)
    close(linear_gelu_reference(x, weight, bias), product * 0.5 * (1 + erf(product / math.sqrt(2))))
    r64, s64 = residual.double().numpy(), scale.double().numpy()
    close(linear_residual_reference(x, weight, bias, residual, scale), r64 + s64 * product)
    close(linear_residual_reference(x, weight, bias, residual, None), r64 + product)


def test_swiglu_gates_with_the_first_half():
    packed = torch.randn(3, 10)
    gate, up = packed[:, :5].double().numpy(), packed[:, 5:].double().numpy()
    close(swiglu_reference(packed), gate / (1 + np.exp(-gate)) * up)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_unshuffle_concatenates_neighbouring_patches_row_parity_slow(version):
    grid, width = 4, 3
    x, weight, bias = torch.randn(2, grid * grid, width), torch.randn(4 * width), torch.randn(4 * width)
    rows = torch.cat((x.flatten(0, 1), torch.full((2, width), POISON)))
    actual = unshuffle_norm_reference(rows, 2, weight, bias, 1e-5, 2, version)
    for row in range(2):
        for column in range(2):
            patches = [(2 * row + a) * grid + 2 * column + b for a in (0, 1) for b in (0, 1)]
            merged = x[:, patches].reshape(2, -1)
            place = row * 2 + column if version == "v2" else column * 2 + row
            close(actual[:, place], layer_norm_reference(merged, weight, bias, 1e-5).double().numpy())


def test_ids_from_2_to_the_30_on_are_visual_tokens():
    embedding, visual = torch.randn(4, 3), torch.randn(2, 3)
    token_id_T = torch.tensor([3, 2**30 + 1, -1, 2**30, 0], dtype=torch.int32)
    x = embed_tokens_reference(token_id_T, torch.tensor([2]), embedding, visual)
    assert torch.equal(x, torch.stack([embedding[3], visual[1], embedding[2], visual[0], embedding[0]]))


@pytest.mark.parametrize("normalised", [False, True])
def test_rotary_turns_halves_at_fractional_positions_and_fills_slots(normalised):
    heads, kv_heads, channels, block_size = 4, 2, 6, 3
    position = torch.tensor([0.0, 1.00390625, 40000.5])
    inv_freq = 1 / 1e4 ** (torch.arange(0, channels, 2) / channels)
    qkv = torch.randn(3, (heads + 2 * kv_heads) * channels)
    norms = (torch.rand(channels), torch.rand(channels)) if normalised else (None, None)
    caches = [torch.full((4, kv_heads, block_size, channels), POISON) for _ in "kv"]
    slot = torch.tensor([7, 0, 11], dtype=torch.int32)
    q = qkv_rope_kv_reference(qkv, *norms, 1e-6, position, inv_freq, *caches, slot)

    rows = qkv.view(3, -1, channels).double().numpy()
    angle = (position[:, None] * inv_freq).double().numpy()  # float32 product, as the operation defines it
    for token in range(3):
        cos, sin = np.cos(angle[token]), np.sin(angle[token])
        for head in range(heads + kv_heads):
            x = rows[token, head]
            if normalised:
                weight = norms[0 if head < heads else 1].double().numpy()
                x = x / np.sqrt((x**2).mean() + 1e-6) * weight
            first, second = x[:3], x[3:]
            expected = np.concatenate((first * cos - second * sin, second * cos + first * sin))
            place = int(slot[token])
            actual = q[token, head] if head < heads else caches[0][place // 3, head - heads, place % 3]
            close(actual, expected)
        place = int(slot[token])
        close(caches[1][place // 3, :, place % 3], rows[token, heads + kv_heads :])
    for cache in caches:
        assert int(cache.isnan().sum()) == (4 * block_size - 3) * kv_heads * channels  # nothing else was written


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_positions_that_are_not_float32_are_refused(dtype):
    cache = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="position_T must be float32"):
        qkv_rope_kv_reference(
            torch.randn(1, 12),
            None,
            None,
            1e-6,
            torch.zeros(1, dtype=dtype),
            torch.ones(2),
            cache,
            cache,
            torch.zeros(1),
        )


def test_paged_attention_reads_exactly_its_blocks_and_lengths():
    heads, kv_heads, channels, block_size = 6, 2, 4, 3
    k_cache, v_cache = (torch.full((9, kv_heads, block_size, channels), POISON) for _ in "kv")
    tables = [[5, 0, 8], [2, -1, -1], [-1, -1, -1], [7, 3, -1]]
    seq_lens, query_lens = [7, 3, 0, 6], [2, 3, 0, 1]  # a chunk after a prefix, a whole prompt, no tokens, a decode
    keys = [torch.randn(n, kv_heads, channels) for n in seq_lens]
    values = [torch.randn(n, kv_heads, channels) for n in seq_lens]
    for table, k, v in zip(tables, keys, values, strict=True):
        for token in range(len(k)):
            k_cache[table[token // block_size], :, token % block_size] = k[token]
            v_cache[table[token // block_size], :, token % block_size] = v[token]
    q = torch.randn(sum(query_lens), heads, channels)
    starts = [0, *np.cumsum(query_lens)]
    ints = (torch.tensor(values, dtype=torch.int32) for values in (tables, starts, seq_lens))
    actual = paged_attention_reference(q, k_cache, v_cache, *ints)
    for index, (seq_len, query_len) in enumerate(zip(seq_lens, query_lens, strict=True)):
        for offset in range(query_len):
            row, visible = starts[index] + offset, seq_len - query_len + offset + 1
            for head in range(heads):
                k, v = (t[index][:visible, head // 3].double().numpy() for t in (keys, values))
                close(actual[row, head], softmax_rows(q[row, head].double().numpy(), k, v))

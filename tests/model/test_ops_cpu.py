"""The table for CPUs equals the references, with weights as they are and laid out anew, in float32 and below."""

import json
import logging
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from internvl_rt import Engine, RequestError, SamplingParams
from internvl_rt.checkpoint.config import KNOWN_MODELS, DecoderConfig, VisionConfig, load_config
from internvl_rt.engine.loading import choose_dtype
from internvl_rt.kernels._paged_attention import attend_by_torch, paged_attention_reference
from internvl_rt.kernels.qkv_rope_kv import _rotate
from internvl_rt.kernels.rms_norm import rms_norm_reference
from internvl_rt.model import processor
from internvl_rt.model.attention_cpu import attend_blocks, attend_by_products, plan_reads
from internvl_rt.model.internvl import fill_weights, named_parameters
from internvl_rt.model.linear import Linear
from internvl_rt.model.ops import TORCH
from internvl_rt.model.ops_cpu import CpuOps, attend_prompt, cpu_ops, cpu_rms_norm, rotate, rotation_of
from internvl_rt.model.products_cpu import float_product, half_product, onednn_product, pack
from internvl_rt.model.step_inputs import Rotary
from support.cpu_tables import CPU, case_of, prepare, prepared, table
from support.forward import all_logits
from support.small_models import INTERNLM2, QWEN2, QWEN3, VIT_6B, VIT_300M, build_model

pytestmark = pytest.mark.skipif(not processor.runs_onednn(), reason="oneDNN has no products for this processor")


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models below are computed as real ones are."""
    monkeypatch.setattr("internvl_rt.model.products_cpu.SMALL_WEIGHT", 0)
    monkeypatch.setattr("internvl_rt.model.ops_cpu.FEW_SCORES", 0)


def assert_near(actual: Tensor, expected: Tensor, most: float = 1e-5) -> None:
    error = (actual - expected).norm() / expected.norm()
    assert error < most, f"relative error {error:.3g}"


@torch.inference_mode()
@pytest.mark.parametrize("avx512", [False, True], ids=["avx2", "avx512"])
@pytest.mark.parametrize("unshuffle", ["v1", "v2"])
@pytest.mark.parametrize("vision", [VIT_300M, VIT_6B], ids=["300m", "6b"])
def test_vision_tower_equals_the_references(vision: VisionConfig, unshuffle: str, avx512: bool) -> None:
    model = build_model(vision, unshuffle=unshuffle)
    tiles = torch.randint(0, 256, (3, 56, 56, 3), dtype=torch.uint8)
    assert_near(prepared(model, avx512).encode_tiles(tiles), model.encode_tiles(tiles))


@torch.inference_mode()
@pytest.mark.parametrize("avx512", [False, True], ids=["avx2", "avx512"])
@pytest.mark.parametrize("chunk_lens", [[24], [20, 1, 1, 2]], ids=["whole", "chunks"])
@pytest.mark.parametrize("decoder", [QWEN2, QWEN3, INTERNLM2], ids=["qwen2", "qwen3", "internlm2"])
def test_decoder_equals_the_references(decoder: DecoderConfig, chunk_lens: list[int], avx512: bool) -> None:
    model = build_model(decoder=decoder)
    token_ids = [*range(5, 20), *[47] * 4, *range(30, 35)]
    tiles = torch.randint(0, 256, (1, 56, 56, 3), dtype=torch.uint8)
    expected = all_logits(model, token_ids, tiles, context_id=47)
    actual = all_logits(prepared(model, avx512), token_ids, tiles, context_id=47, chunk_lens=chunk_lens)
    assert_near(actual, expected)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("lens", [[1], [16], [17, 1, 300, 64], [5] * 9], ids=["one", "block", "many", "short"])
@pytest.mark.parametrize("layout", ["row", "holes", "scattered", "shared"])
def test_attention_of_decodes_equals_the_reference(
    layout: str, lens: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("internvl_rt.model.attention_cpu.AT_ONCE", 5 * 2 * 16 * 32)  # five blocks are copied at once
    q_SHC, cache, batch = case_of(layout, lens, dtype)
    starts = torch.arange(len(lens) + 1, dtype=torch.int32)
    where = batch.block_table_SN, starts, batch.seq_len_S
    caches = cache.k_cache_BGPC.float(), cache.v_cache_BGPC.float()
    expected = paged_attention_reference(q_SHC.float(), *caches, *where)
    reads = plan_reads(batch, 16, dtype)
    assert isinstance(reads.blocks, slice) == (layout in ("row", "holes") and max(lens) > 16)
    actual = attend_blocks(q_SHC, cache, reads)
    assert actual.dtype == dtype
    # bfloat16: probabilities and each block's part are rounded, 2^-9 each
    assert_near(actual.float(), expected, 1e-6 if dtype == torch.float32 else 2**-7)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize(("num_queries", "seq_len"), [(1, 1), (37, 37), (20, 61), (1, 40)])
def test_attention_by_products_agrees_with_float64(
    num_queries: int, seq_len: int, is_causal: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("internvl_rt.model.attention_cpu.AT_ONCE", 3 * 8 * seq_len)  # scores of eight tokens at once
    q_HTC, k_GSC, v_GSC = (
        torch.randn(length, heads, 16).to(dtype).transpose(0, 1)
        for heads, length in ((6, num_queries), (2, seq_len), (2, seq_len))
    )
    mask_TS = torch.ones(num_queries, seq_len, dtype=torch.bool).tril(seq_len - num_queries) if is_causal else None
    wide = (x[None].double() for x in (q_HTC, k_GSC, v_GSC))
    expected = F.scaled_dot_product_attention(*wide, attn_mask=mask_TS, enable_gqa=True)[0].transpose(0, 1)
    actual = attend_by_products(q_HTC, k_GSC, v_GSC, is_causal=is_causal)
    assert (actual.dtype, actual.shape) == (dtype, (num_queries, 6, 16))
    # bfloat16: probabilities and sums are rounded, 2^-9 each
    assert_near(actual.double(), expected, 1e-6 if dtype == torch.float32 else 2**-7)


@torch.inference_mode()
@pytest.mark.parametrize("layout", ["row", "holes", "scattered"])
def test_what_is_not_finite_behind_a_sequence_or_in_a_block_of_nobody_is_not_seen(layout: str) -> None:
    """Blocks are used again as they are, after requests whose numbers overflowed too."""
    lens = [40, 17, 90, 1, 32]
    q_SHC, cache, batch = case_of(layout, lens, torch.float32)
    expected = attend_blocks(q_SHC, cache, plan_reads(batch, 16, torch.float32))
    assert expected.isfinite().all()
    unused = sorted({*range(len(cache.k_cache_BGPC))} - {*batch.block_table_SN.flatten().tolist()})
    for cache_BGPC, number in ((cache.k_cache_BGPC, torch.nan), (cache.v_cache_BGPC, torch.inf)):
        cache_BGPC[unused] = number
        for row, seq_len in enumerate(lens):
            cache_BGPC[batch.block_table_SN[row, (seq_len - 1) // 16], :, (seq_len - 1) % 16 + 1 :] = number
    assert torch.equal(attend_blocks(q_SHC, cache, plan_reads(batch, 16, torch.float32)), expected)


@torch.inference_mode()
@pytest.mark.parametrize("num_rows", [1, 2, 7, 16, 300])
def test_threads_do_not_change_a_bit_of_a_product(num_rows: int) -> None:
    x, weight = torch.randn(num_rows, 896), torch.randn(1152, 896)
    packed = table(avx512=True).prepare_linear(Linear(weight, None)).weight_NK
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append((onednn_product(x, weight, None), onednn_product(x, packed, None)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@torch.inference_mode()
@pytest.mark.parametrize("num_rows", [0, 1, 256, 257])
def test_products_of_few_and_of_many_rows_agree_with_float64(num_rows: int) -> None:
    x, weight, bias = torch.randn(num_rows, 96), torch.randn(40, 96), torch.randn(40)
    expected = F.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(float_product(x, weight, bias).double(), expected, rtol=1e-5, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize(("num_queries", "by_products"), [(1, False), (5, False), (6, True)])
def test_few_scores_are_torchs(num_queries: int, by_products: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    q_HTC, k_GSC, v_GSC = torch.randn(4, num_queries, 16), torch.randn(2, 20, 16), torch.randn(2, 20, 16)
    expected, calls = attend_by_torch(q_HTC, k_GSC, v_GSC), []

    def count(*args: Tensor, is_causal: bool) -> Tensor:
        calls.append(args)
        return attend_by_products(*args, is_causal=is_causal)

    monkeypatch.setattr("internvl_rt.model.ops_cpu.FEW_SCORES", 100)
    monkeypatch.setattr("internvl_rt.model.ops_cpu.attend_by_products", count)
    torch.testing.assert_close(attend_prompt(q_HTC, k_GSC, v_GSC), expected, rtol=1e-5, atol=1e-5)
    assert len(calls) == by_products


@torch.inference_mode()
@pytest.mark.parametrize(("num_outputs", "is_small"), [(40, True), (41, False)])
def test_a_small_weight_stays_as_it_is_and_is_multiplied_by_mkl(
    num_outputs: int, is_small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr("internvl_rt.model.products_cpu.SMALL_WEIGHT", 40 * 96)
    monkeypatch.setattr("internvl_rt.model.products_cpu.onednn_product", lambda *args: calls.append(args))
    weight = torch.randn(num_outputs, 96)
    float_product(torch.randn(3, 96), weight, None)
    assert len(calls) == (0 if is_small else 1)
    assert (pack(weight) is weight) == is_small


@torch.inference_mode()
@pytest.mark.parametrize("num_rows", [0, 1, 16, 17, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_without_the_processors_help_rounds_the_sum_once(
    dtype: torch.dtype, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("internvl_rt.model.products_cpu.COPIED", 96 * 16)  # 40 rows of weights are three parts
    x, weight, bias = torch.randn(num_rows, 96).to(dtype), torch.randn(40, 96).to(dtype), torch.randn(40).to(dtype)
    y, expected = half_product(x, weight, bias), F.linear(x.double(), weight.double(), bias.double())
    assert (y.dtype, y.shape) == (dtype, (num_rows, 40))
    ulp = torch.finfo(dtype).eps * expected.abs().clamp_min(1)
    assert ((y.double() - expected).abs() <= 1.01 * ulp).all()
    assert torch.equal(half_product(x, weight, None), half_product(x, weight, torch.zeros(40, dtype=dtype)))


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_rotation_and_norm_equal_the_references_to_the_bit(dtype: torch.dtype) -> None:
    x_THC, position_T = torch.randn(5, 3, 32).to(dtype), torch.tensor([0.0, 1.0, 1.25, 900.0, 31000.5])
    inv_freq_C = 1e6 ** (-torch.arange(16) / 16)
    angle = (position_T[:, None] * inv_freq_C)[:, None]
    assert torch.equal(
        rotate(x_THC, rotation_of(position_T, Rotary(inv_freq_C))), _rotate(x_THC, angle.cos(), angle.sin())
    )
    weight_D = torch.randn(32).to(dtype)
    assert torch.equal(cpu_rms_norm(x_THC, weight_D, 1e-6), rms_norm_reference(x_THC, weight_D, 1e-6))


@pytest.mark.parametrize("tied", [False, True])
def test_packing_frees_each_weight_that_it_replaces_and_leaves_the_embedding(tied: bool) -> None:
    model = build_model(decoder=replace(QWEN2, tie_embeddings=tied))
    plain, shapes = model.weights, {path: tensor.shape for path, tensor in named_parameters(model.weights).items()}
    for parameter in named_parameters(plain).values():
        parameter.numpy()  # as reading a checkpoint does, after which torch does not resize the memory
    packed = prepare(table(avx512=True), plain)
    assert {path: tensor.shape for path, tensor in named_parameters(packed).items()} == shapes
    assert packed.decoder.embedding_VD is plain.decoder.embedding_VD
    assert (packed.decoder.lm_head.weight_NK is packed.decoder.embedding_VD) == tied
    assert packed.decoder.embedding_VD.untyped_storage().nbytes() > 0
    assert packed.vision.patch.weight_NK is plain.vision.patch.weight_NK
    for layer in (*plain.vision.layers, *plain.decoder.layers):
        assert layer.qkv.weight_NK.untyped_storage().nbytes() == 0
    assert all(layer.mlp.down.weight_NK.is_mkldnn for layer in packed.decoder.layers)
    assert prepare(TORCH, packed).vision.layers[0].fc1.weight_NK is packed.vision.layers[0].fc1.weight_NK


def test_a_weight_is_packed_once_it_is_filled_and_the_largest_one_before_the_layers_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So a weight that is there twice is the only one, and there is little else when the lm_head is."""
    weights, ops, events = build_model().weights, table(avx512=True), list[str]()

    def prepare_linear(self: CpuOps, linear: Linear) -> Linear:
        events.append("packed")
        return linear

    monkeypatch.setattr(CpuOps, "prepare_linear", prepare_linear)
    fill_weights(weights, lambda path, parameter: events.append(path), ops)
    filled = [path for path in events if path != "packed"]
    assert sorted(filled) == sorted(named_parameters(weights))
    for index, event in enumerate(events):
        if event.endswith("weight_NK") and event != "vision.patch.weight_NK":
            has_bias = event.replace("weight_NK", "bias_N") in events
            assert events[index + 1 + has_bias] == "packed", event
    assert filled.index("decoder.lm_head.weight_NK") < filled.index("decoder.layers.0.qkv.weight_NK")


def test_oneDNN_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="backend 'onednn' cannot run on cuda:0: it needs a CPU with AVX2"):
        cpu_ops(torch.device("cuda", 0), torch.float32)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "DEFAULT")
    with pytest.raises(RequestError, match="choose 'torch'"):
        Engine.from_pretrained("tiny", device="cpu", backend="onednn")
    with Engine.from_pretrained("tiny", device="cpu") as engine:
        assert engine.model.ops is TORCH


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "onednn", "expected"),
    [
        (False, False, True, torch.float32),
        (True, False, True, torch.bfloat16),
        (False, True, True, torch.bfloat16),
        (True, True, False, torch.float32),
    ],
)
def test_auto_is_bfloat16_on_processors_that_multiply_it(
    amx: bool, avx512_bf16: bool, onednn: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr("internvl_rt.model.processor.multiplies", lambda dtype: onednn)
    monkeypatch.setattr("internvl_rt.engine.loading.default_dtype", processor.default_dtype)
    config = load_config(KNOWN_MODELS["InternVL3-1B"])
    assert choose_dtype("auto", config, CPU) == expected
    assert choose_dtype("auto", config, torch.device("cuda")) == torch.bfloat16
    assert choose_dtype("float16", config, CPU) == torch.float16


@pytest.mark.parametrize(
    ("avx512", "amx", "dtype", "packs", "attends_by_products"),
    [
        (False, False, torch.float32, False, False),
        (True, False, torch.float32, True, True),
        (True, True, torch.float32, True, False),
        (True, False, torch.bfloat16, True, True),
        (True, True, torch.bfloat16, True, False),
    ],
)
def test_the_table_suits_the_processor(
    avx512: bool, amx: bool, dtype: torch.dtype, packs: bool, attends_by_products: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512" if avx512 else "AVX2")
    for module in ("products_cpu", "attention_cpu"):
        monkeypatch.setattr(f"internvl_rt.model.{module}.multiplies", lambda dtype: True)
    ops = cpu_ops(CPU, dtype)
    assert (ops.packs, ops.attends_by_products) == (packs, attends_by_products)


def test_the_log_says_in_what_an_engine_computes(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="internvl_rt"):
        Engine.from_pretrained("tiny", device="cpu", dtype="bfloat16").close()
    (line,) = caplog.messages
    how = {"device": "cpu", "dtype": "bfloat16", "backend": "onednn", "instructions": processor.instructions()}
    assert json.loads(line) == {"loaded": "tiny", **how}


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_both_tables_give_the_same_tokens_in_mixed_batches(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    contents = ["Read the digits.", "How many digits are there?", "Which picture shows the larger number?"]
    conversations = [[{"role": "user", "content": content}] for content in contents]
    params, answers = SamplingParams(max_tokens=20, ignore_eos=True), []
    for backend in ("torch", "onednn"):
        options = {"device": "cpu", "dtype": "float32", "block_size": 16, "max_tokens_per_step": 24}
        with Engine.from_pretrained("tiny", backend=backend, **options) as engine:
            assert engine.model.ops.name == backend
            assert engine.model.weights.vision.layers[0].qkv.weight_NK.is_mkldnn == (
                backend == "onednn" and capability == "AVX512"
            )
            answers.append([reply.token_ids for reply in engine.generate(conversations, params)])
    assert answers[0] == answers[1]

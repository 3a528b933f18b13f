"""The whole model on the Triton kernels equals the references, with both kinds of ViT and every decoder layout."""

from contextlib import nullcontext
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from internvl_rt import Engine, RequestError, SamplingParams
from internvl_rt.checkpoint.config import DecoderConfig, VisionConfig
from internvl_rt.kernels._launch import target_of
from internvl_rt.kernels.catalogue import discover_specs
from internvl_rt.model.internvl import InternVL
from internvl_rt.model.ops import KV_FORMATS, TORCH, Ops
from internvl_rt.model.ops_triton import triton_ops
from support.forward import all_logits
from support.hardware_arithmetic import hardware_arithmetic
from support.small_models import DEVICE, EXPERTS, GPT_OSS, INTERNLM2, QWEN2, QWEN3, VIT_6B, VIT_300M, build_model

DECODERS = {"qwen2": QWEN2, "qwen3": QWEN3, "internlm2": INTERNLM2, "experts": EXPERTS, "gpt_oss": GPT_OSS}


def on_triton(model: InternVL) -> InternVL:
    return InternVL(model.config, model.weights, triton_ops(DEVICE))


def assert_near(actual: Tensor, expected: Tensor) -> None:
    error = (actual - expected).norm() / expected.norm()
    assert error < 1e-5, f"relative error {error:.3g}"


@pytest.mark.fast("300m-v1", "6b-v2")
@torch.inference_mode()
@pytest.mark.parametrize("unshuffle", ["v1", "v2"])
@pytest.mark.parametrize("vision", [VIT_300M, VIT_6B], ids=["300m", "6b"])
def test_vision_tower_equals_the_references(vision: VisionConfig, unshuffle: str) -> None:
    model = build_model(vision, unshuffle=unshuffle)
    tiles = torch.randint(0, 256, (3, 56, 56, 3), dtype=torch.uint8, device=DEVICE)
    expected = model.encode_tiles(tiles)
    assert expected.shape == (3, 4, 64)
    assert_near(on_triton(model).encode_tiles(tiles), expected)


@torch.inference_mode()
def test_normalised_tiles_give_what_their_pixels_give() -> None:
    model = build_model()
    tiles = torch.randint(0, 256, (2, 56, 56, 3), dtype=torch.uint8, device=DEVICE)
    mean = torch.tensor([0.485, 0.456, 0.406], device=DEVICE)
    std = torch.tensor([0.229, 0.224, 0.225], device=DEVICE)
    pixels = ((tiles / 255 - mean) / std).permute(0, 3, 1, 2)
    assert_near(on_triton(model).encode_tiles(pixels), on_triton(model).encode_tiles(tiles))


@pytest.mark.fast("internlm2-whole", "gpt_oss-chunks")
@torch.inference_mode()
@pytest.mark.parametrize("chunk_lens", [[24], [20, 1, 1, 2]], ids=["whole", "chunks"])  # more than 16 rows, or fewer
@pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS)
def test_decoder_equals_the_references_whole_and_in_chunks(decoder: DecoderConfig, chunk_lens: list[int]) -> None:
    model = build_model(decoder=decoder)
    token_ids = [*range(5, 20), *[47] * 4, *range(30, 35)]
    tiles = torch.randint(0, 256, (1, 56, 56, 3), dtype=torch.uint8, device=DEVICE)
    expected = all_logits(model, token_ids, tiles, context_id=47)
    assert_near(all_logits(on_triton(model), token_ids, tiles, context_id=47, chunk_lens=chunk_lens), expected)


@pytest.mark.fast("gpt_oss-chunks")
@torch.inference_mode()
@pytest.mark.parametrize("chunk_lens", [[8], [5, 1, 2]], ids=["whole", "chunks"])
@pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS)
def test_decoder_behind_a_cached_prefix_equals_the_references(decoder: DecoderConfig, chunk_lens: list[int]) -> None:
    """The prefix ends in the middle of a picture; a chunk of one token is a decode."""
    model = build_model(decoder=decoder)
    token_ids = [*range(5, 20), *[47] * 4, *range(30, 35)]
    other = [*token_ids[:-2], 1, 2]
    tiles = torch.randint(0, 256, (1, 56, 56, 3), dtype=torch.uint8, device=DEVICE)
    expected = all_logits(model, token_ids, tiles, context_id=47)
    actual = all_logits(on_triton(model), token_ids, tiles, context_id=47, chunk_lens=chunk_lens, after=other)
    assert_near(actual, expected[16:])  # the first 16 tokens are a block of the cache


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize("decoder", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
@pytest.mark.parametrize("cache", KV_FORMATS)
def test_decoder_with_a_cache_in_8_bits_equals_the_references(cache: str, decoder: DecoderConfig) -> None:
    """Prompts of more than 16 rows and of fewer, decodes, and a prefix that another sequence has written."""
    model, kv_dtype = build_model(decoder=decoder), KV_FORMATS[cache]
    token_ids = [*range(5, 20), *[47] * 4, *range(30, 35)]
    tiles = torch.randint(0, 256, (1, 56, 56, 3), dtype=torch.uint8, device=DEVICE)
    how: dict[str, Any] = {"context_id": 47, "kv_dtype": kv_dtype}
    expected = all_logits(model, token_ids, tiles, **how)
    assert (expected - all_logits(model, token_ids, tiles, context_id=47)).norm() > 1e-3 * expected.norm()
    with nullcontext() if DEVICE.type == "cuda" else hardware_arithmetic():  # the interpreter rounds to FP8 otherwise
        assert_near(all_logits(on_triton(model), token_ids, tiles, **how, chunk_lens=[20, 1, 1, 2]), expected)
        how["after"] = [*token_ids[:-2], 1, 2]
        assert_near(all_logits(on_triton(model), token_ids, tiles, **how, chunk_lens=[5, 1, 2]), expected[16:])


@pytest.mark.slow
def test_engine_on_triton_gives_the_tokens_of_the_references() -> None:
    """One request runs alone, then all together: one batch has whole prompts, chunks, decodes and prefix hits."""
    picture = torch.randint(0, 256, (40, 90, 3), dtype=torch.uint8).numpy()
    task = "Look at the picture and answer with digits only, nothing else. "
    contents = [
        [{"type": "image", "image": picture}, {"type": "text", "text": task + end}] for end in ("Read!", "Count!")
    ]
    conversations = [[{"role": "user", "content": content}] for content in contents]
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    answers = []
    for backend in ("torch", "triton"):
        options = {"device": str(DEVICE), "dtype": "float32", "block_size": 16, "max_tokens_per_step": 40}
        with Engine.from_pretrained("tiny", backend=backend, **options) as engine:
            assert engine.model.ops.name == backend
            first = engine.chat(conversations[0], params)
            together = engine.generate(conversations, params)
            assert together[1].usage.cached_tokens > first.usage.image_tokens
            answers.append([reply.token_ids for reply in (first, *together)])
    assert answers[0] == answers[1]


def test_a_function_of_the_tables_is_the_kernel_of_its_name_or_the_reference_beside_it() -> None:
    specs, table = discover_specs(), triton_ops(DEVICE)
    functions = [one.name for one in fields(Ops) if one.name in specs]
    assert len(functions) == 12
    for name in functions:
        assert getattr(TORCH, name) is specs[name].reference
        assert getattr(table, name) is specs[name].launcher


def test_the_kernels_are_refused_on_a_device_that_cannot_run_them(monkeypatch: pytest.MonkeyPatch) -> None:
    target_of.cache_clear()
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    message = "backend 'triton' cannot run here: device: expected a CUDA device, got cpu; choose 'torch'"
    with pytest.raises(RequestError, match=message):
        triton_ops(torch.device("cpu"))
    target_of.cache_clear()


def test_a_backend_that_is_not_there_is_refused() -> None:
    with pytest.raises(RequestError, match="backend must be auto, triton, torch or onednn, got 'cuda'"):
        Engine.from_pretrained("tiny", device="cpu", backend="cuda")


def test_logits_lie_as_the_table_reads_them_fastest():
    model = build_model(VIT_300M, replace(QWEN2, vocab_size=307))
    x_RD = torch.randn(3, QWEN2.hidden_size, device=DEVICE)
    assert model.logits(x_RD).stride(0) == 307, "the references make no copy"
    assert on_triton(model).logits(x_RD).stride(0) % 16 == 0

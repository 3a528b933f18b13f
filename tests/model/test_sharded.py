"""Several ranks compute what one does: every kind of model, each rank with its own part of a checkpoint."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from internvl_rt.checkpoint.config import DecoderConfig, ModelConfig
from internvl_rt.checkpoint.quantization import cast
from internvl_rt.kernels import _launch
from internvl_rt.model.dialects import DIALECTS
from internvl_rt.model.internvl import InternVL
from internvl_rt.model.ops import TORCH, Ops
from internvl_rt.model.ops_cpu import cpu_ops
from internvl_rt.model.ops_triton import triton_ops
from internvl_rt.model.shard import WHOLE, Shard
from internvl_rt.model.sharded import ShardedOps, shard_ops
from internvl_rt.model.weights import save_weights
from internvl_rt.steps.executor import Executor
from internvl_rt.steps.kv_pool import KVPool
from support.forward import all_logits
from support.quantised_files import INT4, LAYOUTS, compressed, packed, quantization_of, write_quantised
from support.ranks import load_part, run_ranks
from support.small_models import EXPERTS, GPT_OSS, INTERNLM2, QWEN2, QWEN3, VIT_6B, VIT_300M, build_model

CPU = torch.device("cpu")
CONTEXT = 47
TOKENS = [3, 5, CONTEXT, CONTEXT, CONTEXT, CONTEXT, 8, 2, 30, 31, 7, 11, 1, 4, 9, 21, 22, 23]
# Two layers, so that the first one's sums matter to the second.
QWEN2_2 = replace(QWEN2, num_layers=2)
DECODERS = {
    "qwen2": QWEN2_2,
    "qwen3": replace(QWEN3, num_layers=2),
    "internlm2": replace(INTERNLM2, num_heads=4, num_layers=2),
    "7 query heads on 1 kv head": replace(QWEN2_2, num_heads=7, num_kv_heads=1),
    "14 on 2, an odd width": replace(QWEN2_2, num_heads=14, num_kv_heads=2, intermediate_size=72),
    "experts": replace(EXPERTS, num_heads=4, num_kv_heads=2, num_layers=2),
    "gpt_oss": replace(GPT_OSS, num_layers=2, windows=(6, None)),
    "5 kv heads, tied": replace(QWEN2_2, num_heads=10, num_kv_heads=5, tie_embeddings=True),
}
VIT_25_HEADS = replace(VIT_6B, hidden_size=200, num_heads=25)


@pytest.fixture(autouse=True)
def one_launch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter of Triton changes its language while a kernel runs, so two threads must not use it at once."""
    launch, lock = _launch._run, threading.Lock()

    def locked(*args: object) -> None:
        with lock:
            launch(*args)

    monkeypatch.setattr(_launch, "_run", locked)


def write(folder: Path, decoder: DecoderConfig, vision=VIT_300M) -> ModelConfig:
    model = build_model(vision, decoder)
    dialect = DIALECTS["internlm2" if decoder is DECODERS["internlm2"] else "original"]
    save_weights(
        model.weights, model.config, folder, dialect=replace(dialect, experts="gpt_oss" if decoder.sinks else "apart")
    )
    return model.config


def tiles_of(model: InternVL) -> Tensor:
    return torch.randint(0, 256, (1, 56, 56, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def logits_of(model: InternVL, **how) -> Tensor:
    return all_logits(model, TOKENS, tiles_of(model), context_id=CONTEXT, **how)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("kind", DECODERS)
def test_ranks_compute_the_logits_of_one(kind: str, size: int, tmp_path: Path) -> None:
    config = write(tmp_path, DECODERS[kind])
    expected = logits_of(load_part(tmp_path, config, WHOLE))
    results, meeting = run_ranks(
        size, lambda shard: logits_of(load_part(tmp_path, config, shard), chunk_lens=(9, 8, 1))
    )
    assert (results[0] - expected).abs().max() < 1e-5
    assert results[0].argmax(-1).equal(expected.argmax(-1))
    assert [name for name, _ in meeting.seen] == ["add", "add", "add", "add", "gather"] * 3, (
        "of two layers, three steps"
    )


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("by_expert", [False, True])
@pytest.mark.parametrize("kind", ["experts", "gpt_oss"])
def test_ranks_share_columns_of_experts_or_the_experts(kind: str, by_expert: bool, size: int, tmp_path: Path) -> None:
    """Of five experts, four ranks have 2, 1, 1 and 1."""
    config = write(tmp_path, DECODERS[kind])
    expected = logits_of(load_part(tmp_path, config, WHOLE))
    held = {}

    def compute(shard: Shard) -> Tensor:
        model = load_part(tmp_path, config, replace(shard, by_expert=by_expert))
        experts = model.weights.decoder.layers[1].mlp
        held[shard.rank] = experts.num_here, experts.all_down.num_inputs
        return logits_of(model, chunk_lens=(9, 8, 1))

    results, _ = run_ranks(size, compute)
    assert (results[0] - expected).abs().max() < 1e-5
    numbers, widths = zip(*held.values(), strict=True)
    assert sum(numbers) == (5 if by_expert else 5 * size)
    assert sum(widths) == (64 * size if by_expert else 64)


@pytest.mark.parametrize("layout", ["int4 asymmetric", "int8 channel", "fp8 channel", "awq"])
@pytest.mark.parametrize("by_expert", [False, True])
def test_quantised_experts_are_shared(by_expert: bool, layout: str, tmp_path: Path) -> None:
    config = build_model(VIT_300M, DECODERS["experts"]).config
    write_quantised(tmp_path, config, layout)
    how = {"quantization": quantization_of(LAYOUTS[layout][1])}

    def compute(shard: Shard) -> Tensor:
        ops = cpu_ops(CPU, torch.float32)
        return logits_of(load_part(tmp_path, config, replace(shard, by_expert=by_expert), ops, **how))

    expected = compute(WHOLE)
    results, _ = run_ranks(2, compute)
    assert (results[0] - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("table", [cpu_ops, pytest.param(triton_ops, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "7 query heads on 1 kv head"])
def test_every_table_can_be_shared(kind: str, table, tmp_path: Path) -> None:
    def ops() -> Ops:
        return table(CPU, torch.float32) if table is cpu_ops else table(CPU)

    config = write(tmp_path, replace(DECODERS[kind], num_layers=1))
    expected = logits_of(load_part(tmp_path, config, WHOLE, ops()), chunk_lens=(17, 1))
    results, _ = run_ranks(2, lambda shard: logits_of(load_part(tmp_path, config, shard, ops()), chunk_lens=(17, 1)))
    assert (results[0] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("to", ["fp8", "int8"])
def test_weights_that_are_quantised_while_they_are_loaded_are_those_of_one_rank(to: str, tmp_path: Path) -> None:
    """`cast` rounds inputs as well, which every rank does for its own columns: so no inputs are rounded here."""
    config = write(tmp_path, QWEN2_2)
    quantization = cast(to, vision=False)
    groups = tuple((names, replace(scheme, inputs="full")) for names, scheme in quantization.groups)
    how = {"quantization": replace(quantization, groups=groups)}
    expected = logits_of(load_part(tmp_path, config, WHOLE, **how))
    results, _ = run_ranks(3, lambda shard: logits_of(load_part(tmp_path, config, shard, **how)))
    assert (results[0] - expected).abs().max() < 1e-5
    dense = logits_of(load_part(tmp_path, config, WHOLE))
    assert (dense - expected).abs().max() > 1e-3, "the weights were rounded"


GROUPS_OF_128 = packed(4, 128), compressed("pack-quantized", INT4 | {"strategy": "group", "group_size": 128})


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    "layout", ["int4 asymmetric", "awq", "gptq", "int8 channel", "fp8 static", "fp8 channel", "128"]
)
def test_quantised_checkpoints_are_shared(layout: str, size: int, tmp_path: Path, monkeypatch) -> None:
    """Groups of 128 are an odd number in the MLP, and the output of a head, 64 columns, is half a group."""
    monkeypatch.setitem(LAYOUTS, "128", GROUPS_OF_128)
    decoder = replace(QWEN2_2, hidden_size=128, num_heads=6, num_kv_heads=2, head_dim=64, intermediate_size=384)
    if size == 4 and layout != "128":
        decoder = replace(decoder, num_heads=4, intermediate_size=512)
    config = build_model(VIT_300M, decoder).config
    write_quantised(tmp_path, config, layout)
    how = {"quantization": quantization_of(LAYOUTS[layout][1])}
    expected = logits_of(load_part(tmp_path, config, WHOLE, cpu_ops(CPU, torch.float32), **how))

    def compute(shard: Shard) -> Tensor:
        return logits_of(load_part(tmp_path, config, shard, cpu_ops(CPU, torch.float32), **how))

    results, _ = run_ranks(size, compute)
    assert (results[0] - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("num_tiles", [1, 2, 3, 5])
@pytest.mark.parametrize("vision", [VIT_300M, VIT_25_HEADS], ids=["16 heads", "25 heads"])
def test_ranks_share_the_tiles_of_a_picture(vision, num_tiles: int, tmp_path: Path) -> None:
    config = write(tmp_path, QWEN2, vision)
    generator = torch.Generator().manual_seed(num_tiles)
    tiles = torch.randint(0, 256, (num_tiles, 56, 56, 3), dtype=torch.uint8, generator=generator)
    expected = load_part(tmp_path, config, WHOLE).encode_tiles(tiles)
    counts = {}

    def encode(shard: Shard) -> Tensor:
        model = load_part(tmp_path, config, shard)
        sizes = {"num_blocks": 1, "block_size": 16, "dtype": torch.float32, "device": CPU, "ops": TORCH}
        executor = Executor(model, KVPool(model.part, **sizes), max_draws=1, num_threads=1)
        counts[shard.rank] = 0
        original = executor.encode

        def counted(mine: Tensor) -> Tensor:
            counts[shard.rank] += len(mine)
            return original(mine)

        executor.encode = counted
        return executor.encode_together(tiles if shard.rank == 0 else torch.zeros_like(tiles))

    results, _ = run_ranks(3, encode)
    assert (results[0] - expected).abs().max() < 1e-5
    assert sum(counts.values()) == num_tiles
    assert max(counts.values()) == -(-num_tiles // 3)


def test_a_table_for_one_rank_is_the_table_itself() -> None:
    assert shard_ops(TORCH, QWEN2, WHOLE) is TORCH


def test_a_shared_table_keeps_what_its_table_says() -> None:
    base = triton_ops(CPU)
    shared = shard_ops(base, QWEN2, Shard(1, 2, group=object()))
    assert isinstance(shared, ShardedOps)
    assert isinstance(shared, type(base))
    assert {name: getattr(shared, name) for name in vars(base)} == vars(base)
    assert shared.parts == (slice(0, 32), slice(32, 48))

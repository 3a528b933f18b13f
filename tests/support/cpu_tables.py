"""Makes tables for CPUs of either kind, models that they compute, and attention of sequences that decode."""

from dataclasses import replace

import torch
from torch import Tensor

from internvl_rt.model.internvl import InternVL, ModelWeights, fill_weights
from internvl_rt.model.ops import Ops
from internvl_rt.model.ops_cpu import CpuOps, cpu_ops
from internvl_rt.model.step_inputs import Batch, LayerCache
from support.small_models import build_model

CPU = torch.device("cpu")


def table(avx512: bool) -> CpuOps:
    """Makes the table of processors with AVX512 or without; either runs on this one."""
    return replace(cpu_ops(CPU, torch.float32), packs=avx512, attends_by_products=avx512, _of_step={})


def prepared(model: InternVL, avx512: bool) -> InternVL:
    """Returns a model of the same weights with a table for CPUs. It is built anew, because packing frees weights."""
    ops = table(avx512)
    copy = build_model(model.config.vision, model.config.decoder, model.config.unshuffle)
    return InternVL(copy.config, prepare(ops, copy.weights), ops)


def prepare(ops: Ops, weights: ModelWeights) -> ModelWeights:
    """Returns weights, which are filled already, as a table multiplies them."""
    return fill_weights(weights, lambda path, parameter: None, ops)


def case_of(layout: str, lens: list[int], dtype: torch.dtype) -> tuple[Tensor, LayerCache, Batch]:
    """Makes queries of sequences that decode; blocks lie in a row, among others, in any order, or have two readers."""
    block, counts = 16, [-(-seq_len // 16) for seq_len in lens]
    generator = torch.Generator().manual_seed(0)
    total = sum(counts)
    pool = 4 * total + 8
    cache = LayerCache(*(torch.randn(pool, 2, block, 32, generator=generator).to(dtype) for _ in range(2)))
    among = 3 + torch.randperm(total + total // 2, generator=generator)
    order = {
        "row": torch.arange(3, 3 + total),
        "holes": among[:total],
        "scattered": torch.randperm(pool, generator=generator)[:total],
        "shared": torch.arange(3, 3 + total),
    }[layout]
    table_SN = torch.full((len(lens), max(counts)), -1, dtype=torch.int32)
    for row, blocks in enumerate(order.split(counts)):
        table_SN[row, : counts[row]] = blocks.int()
    if layout == "shared":
        table_SN[:, 0] = table_SN[0, 0]
    q_SHC = torch.randn(len(lens), 14, 32, generator=generator).to(dtype)
    lens_S = torch.tensor(lens, dtype=torch.int32)
    return q_SHC, cache, Batch(lens_S, table_SN, torch.zeros(1, dtype=torch.int32), len(lens), 1)

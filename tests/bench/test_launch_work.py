"""What the model of costs is told about planned launches, with numbers that one can compute by hand."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from internvl_rt.kernels._contract import Case
from internvl_rt.kernels._expert_cases import draw_routing
from internvl_rt.kernels._launch import Launch
from internvl_rt.kernels.decode_attention import SPEC as DECODE_ATTENTION
from internvl_rt.kernels.expert_down import SPEC as EXPERT_DOWN
from internvl_rt.kernels.expert_gate_up import SPEC as EXPERT_GATE_UP
from internvl_rt.kernels.gemm_epilogue import SPEC as GEMM_EPILOGUE
from internvl_rt.kernels.gemv import SPEC as GEMV
from internvl_rt.kernels.prefill_attention import SPEC as PREFILL_ATTENTION
from internvl_rt.kernels.route_experts import SPEC as ROUTE_EXPERTS

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import launch_work
from launch_model import NUM_SMS, load_devices
from launch_work import blocks_in_use, work_of
from step_plans import planned

_, H200 = load_devices().values()
GPT_OSS_HEADS = {"H": 64, "G": 8, "C": 64, "P": 64, "sinks": "own"}


def test_fewer_bytes_in_flight_and_fewer_programs_are_slower() -> None:
    def share(n: int, **plan: str) -> float:
        operation = planned(GEMV, {"R": 8, "N": n, "K": 4096, **plan}, "")
        return operation.floor_us(H200) / sum(operation.terms_us(H200).values())

    assert share(512) < share(2048) < share(8192) < share(32768)
    assert share(4096, plan="matrix") < share(4096)  # the plan reads chunks of 2 KiB


def test_a_fused_product_is_described_too() -> None:
    """A table may name a fused kernel that is faster; without one, cuBLAS computes the product."""
    sizes = {"R": 64, "N": 9728, "K": 896, "epilogue": "none", "bias": False}
    assert planned(GEMM_EPILOGUE, sizes, "").works[0].unit == "cublas"
    (work,) = planned(GEMM_EPILOGUE, {**sizes, "implementation": "low"}, "").works
    assert (work.kernel, work.unit, work.rounds) == ("fused_kernel", "matrix", 1)


def test_splits_of_prefill_attention_are_counted_from_the_launch() -> None:
    """16 blocks of queries with twelve programs each: these share the keys."""
    sizes = {"H": 14, "G": 2, "C": 64, "P": 64, "chunks": ((8128, 64),)}
    operation = planned(PREFILL_ATTENTION, sizes, "")
    (launch,) = operation.launches
    queries = launch.constexprs["BLOCK_M"] // 7
    blocks = -(-64 // queries)

    def described(programs: int) -> Any:
        grid = (programs, 2, 1)
        split = Launch(launch.kernel, grid, launch.args, launch.constexprs, launch.num_warps, launch.num_stages)
        return work_of(split, operation.case, operation.cost)

    assert (described(blocks).key_blocks, described(blocks).exchanges) == (128, False)
    assert (described(12 * blocks).key_blocks, described(12 * blocks).parts) == (11, 12)
    assert described(99 * blocks).parts == 128 // launch_work.LEAST_KEY_BLOCKS


def test_a_kernel_behind_a_product_of_torch_adds_its_residual() -> None:
    """With a bias torch cannot add the residual too, so the product is written and read once more."""
    sizes = {"R": 64, "N": 2880, "K": 4096, "epilogue": "residual", "bias": True, "scale": False}
    operation = planned(GEMM_EPILOGUE, sizes, "")
    product, epilogue = operation.works
    assert operation.by_torch
    assert (product.kernel, product.unit, product.flops) == ("cuBLAS", "cublas", operation.cost.flops)
    assert product.bytes == 2 * (64 * 4096 + 2880 * 4096 + 64 * 2880)
    assert (epilogue.kernel, epilogue.bytes, epilogue.flops) == ("epilogue_kernel", 3 * 2 * 64 * 2880, 0)
    in_l2 = operation.terms_us(H200, in_l2=product.bytes)
    assert in_l2["bytes"] < operation.terms_us(H200)["bytes"]
    assert min(in_l2.values()) >= 0


def test_programs_of_decode_attention_before_the_window_do_nothing() -> None:
    """2,048 tokens are split into items of two blocks. A window of 128 tokens is one of them, or lies in two."""

    def described(length: int, **window: int) -> Any:
        (work,) = planned(DECODE_ATTENTION, {**GPT_OSS_HEADS, "seq_lens": [length], "room": 33, **window}, "").works
        return work

    everything, aligned, across = described(2048), described(2048, window=128), described(2047, window=128)
    assert (everything.programs, everything.parts, everything.exchanges) == (16 * 8, 16, True)
    assert (aligned.programs, aligned.parts, aligned.exchanges) == (8, 0, False)
    assert (across.programs, across.parts, across.exchanges) == (2 * 8, 2, True)
    assert described(100, window=128) == described(100)
    assert aligned.bytes < everything.bytes / 14


def test_a_block_of_queries_reads_the_keys_of_its_window() -> None:
    """16 queries with their window of 128 keys, from the beginning of a block of 64 on, are at most four blocks."""
    sizes = {**GPT_OSS_HEADS, "chunks": ((4096, 512),)}
    operation = planned(PREFILL_ATTENTION, {**sizes, "window": 128}, "")
    (everything,), (windowed,) = planned(PREFILL_ATTENTION, sizes, "").works, operation.works
    assert operation.launches[0].constexprs["BLOCK_M"] == 16 * 8
    assert (everything.key_blocks, windowed.key_blocks) == ((4096 + 512) // 64, 4)
    assert (windowed.exchanges, windowed.parts) == (False, 0)
    assert windowed.exponentials == 512 * 128 * 64, "of each query, key and head"


@pytest.mark.parametrize(("tokens", "block"), [(1, 16), (64, 16), (600, 32), (3392, 128)])
def test_blocks_in_use_are_those_of_random_choices(tokens: int, block: int) -> None:
    case = Case("", {"T": tokens, "X": 128, "J": 8, "block": block})
    torch.manual_seed(0)
    drawn = [int((draw_routing(case, torch.device("cpu")).block_expert_B >= 0).sum()) for _ in range(20)]
    assert blocks_in_use(case) == pytest.approx(sum(drawn) / len(drawn), rel=0.01)


def test_a_token_reads_the_experts_that_it_chooses() -> None:
    """A token has one pair in each of eight blocks of 16 places, all of which are multiplied."""
    sizes = {"T": 1, "X": 128, "J": 8, "D": 2048, "F": 768, "block": 16}
    gate_up, down = planned(EXPERT_GATE_UP, sizes, ""), planned(EXPERT_DOWN, sizes, "")
    (product,) = gate_up.works
    tiles = 2 * 768 // gate_up.launches[0].constexprs["BLOCK_N"]
    assert product.bytes == gate_up.cost.bytes == 2 * (8 * 2 * 768 * 2048 + 2048 + 8 * 768)
    assert product.flops == pytest.approx(16 * gate_up.cost.flops)
    assert (product.programs, product.rounds) == (8 * tiles, -(-8 * tiles // NUM_SMS))
    assert (product.unit, product.pdl, product.weights_first) == ("matrix", True, False)

    product, total = down.works
    parts = 4 * 8 * 2048  # bytes of float32, written by one launch and read by the other
    assert (product.kernel, total.kernel) == ("expert_product_kernel", "sum_pairs_kernel")
    assert product.bytes == 2 * (8 * 768 * 2048 + 8 * 768) + parts
    assert total.bytes == parts + 4 * 8 + 2 * 2 * 2048, "parts, numbers of experts, residual and result"
    assert total.flops == 0
    assert product.looks_up_late
    assert total.looks_up_late


def test_programs_of_empty_blocks_do_nothing() -> None:
    """64 tokens have room for 152 blocks; 126 experts have pairs, of which none has more than 16."""
    sizes = {"T": 64, "X": 128, "J": 8, "D": 2048, "F": 768, "block": 16}
    operation = planned(EXPERT_GATE_UP, sizes, "")
    (launch,), (work,) = operation.launches, operation.works
    tiles = launch.grid[0] // 152
    assert launch.grid == (152 * tiles, 1, 1)
    assert work.programs == pytest.approx(126 * tiles, rel=0.001)


@pytest.mark.parametrize(
    ("tokens", "kernels", "numbers"),
    [
        (64, ["route_few_kernel"], 0),
        (65, ["choose_kernel", "sort_kernel"], 65 * 8 + 152 * 17 + 2 * 65 * 8 + 3 * 5 * 128),
    ],
)
def test_routing_moves_its_own_tensors(tokens: int, kernels: list[str], numbers: int) -> None:
    """numbers: int32, that are moved beside inputs and results if five programs choose and as many sort.

    The choices are read again; places and blocks are cleared before; places within an expert's run are written and
    read; and so are each program's pairs of each expert, and where the programs that sort begin is written.
    """
    sizes = {"T": tokens, "X": 128, "J": 8, "block": 16}
    operation = planned(ROUTE_EXPERTS, sizes, "")
    assert [work.kernel for work in operation.works] == kernels
    assert sum(work.bytes for work in operation.works) == operation.cost.bytes + 4 * numbers
    assert [work.looks_up_late for work in operation.works] == [kernel == "sort_kernel" for kernel in kernels]

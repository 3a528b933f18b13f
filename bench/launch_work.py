"""Describes planned launches to the model of costs (launch_model.py): what each of them reads, computes and waits for.

Whatever a plan function decides is read from the launch, not assumed here. What a launch moves is its SPEC's cost, or
its own tensors where several launches share that cost. Of experts it reads as many as `internvl_rt/model/work.py`
counts: tokens choose them independently and evenly. Not described is what a token's choices take one after another.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from launch_model import NUM_SMS, Work

from internvl_rt.kernels._contract import Case, Cost
from internvl_rt.kernels._expert_cases import touched_bytes
from internvl_rt.kernels._launch import TARGETS, Launch
from internvl_rt.kernels._paged_attention import first_seen
from internvl_rt.kernels._prefill_plan import keys_to_split
from internvl_rt.kernels._split_plan import plan_splits

TARGET, DTYPE = TARGETS[90], torch.bfloat16
RESIDENT_WARPS = 16  # warps of a multiprocessor with 128 registers a thread
LIGHT_WARPS = 32  # the same with 64, of kernels that multiply nothing
LEAST_KEY_BLOCKS = 4  # blocks of 64 keys that a split of prefill attention has at least


def is_fused_product(launch: Launch) -> bool:
    """Says whether a launch of gemm_epilogue is the fused kernel; another one is what follows a product of torch."""
    return "GROUP_M" in launch.constexprs


def torch_product(launches: Sequence[Launch], cost: Cost) -> Work:
    """Describes a product of torch. If a kernel follows it, that one reads the residual."""
    later = sum(launch.args["residual"].nbytes for launch in launches if "residual" in launch.args)
    return Work(kernel="cuBLAS", bytes=cost.bytes - later, flops=cost.flops, unit="cublas")


def work_of(launch: Launch, case: Case, cost: Cost) -> Work:
    """Describes a launch of a kernel, for a case whose cost is `cost`."""
    constexprs, itemsize = launch.constexprs, DTYPE.itemsize
    name: str = launch.kernel.fn.__name__
    programs, moved = math.prod(launch.grid), cost.bytes
    found: dict[str, Any] = {"kernel": name, "bytes": moved, "flops": cost.flops, "pdl": launch.pdl}
    found |= {"resident": max(1, RESIDENT_WARPS // launch.num_warps), "programs": programs}
    if "split_items" in launch.args:
        found |= _decode_attention(launch, case)
    elif "block_table" in launch.args:
        found |= _prefill_attention(launch, case, cost)
    elif is_fused_product(launch):
        stage_bytes = (constexprs["BLOCK_M"] + constexprs["BLOCK_N"]) * constexprs["BLOCK_K"] * itemsize
        blocks = -(-case["R"] // constexprs["BLOCK_M"]) * -(-case["N"] // constexprs["BLOCK_N"])
        found |= {"unit": "matrix", "rounds": -(-blocks // NUM_SMS), "in_flight": (launch.num_stages - 1) * stage_bytes}
    elif "GROUP_B" in constexprs:
        found |= _expert_product(launch, case, cost)
    elif "BLOCK_K" in constexprs:  # gemv, gemv_qkv load chunks of the weight, the first before the previous kernel ends
        found["in_flight"] = constexprs["BLOCK_N"] * constexprs["BLOCK_K"] * itemsize * max(1, launch.num_stages - 1)
        if constexprs["STAGES"]:
            stage_bytes = (constexprs["BLOCK_N"] + constexprs["ROWS"]) * constexprs["BLOCK_K"] * itemsize
            found["resident"] = TARGET.shared_bytes // (launch.num_stages * stage_bytes)
        found |= {"unit": "matrix" if constexprs["MATRIX"] else "cores", "weights_first": True}
        found |= {"rounds": -(-programs // NUM_SMS), "exchanges": constexprs["SPLIT"]}
    elif "SLICES" in constexprs:  # sample has two loads on their way; its second kernel reads from L2
        draws = name == "draw_kernel"
        found |= {"draws": draws, "in_flight": 2 * constexprs["BLOCK"] * itemsize, "bytes": 0 if draws else moved}
    else:  # kernels that work by row or by block ask for all of it at once
        if not {"product", "expert_id"}.isdisjoint(launch.args):  # what follows a product of torch; routing; a sum
            moved = sum(value.nbytes for value in launch.args.values() if isinstance(value, torch.Tensor))
            found |= {"bytes": moved, "flops": 0}
        found |= {"resident": LIGHT_WARPS // launch.num_warps, "in_flight": moved / max(1, programs)}
        found |= {"looks_up": not {"slot", "token_id"}.isdisjoint(launch.args)}
        # The kernel that sorts and the one that adds up see by the choices what else they read.
        found |= {"looks_up_late": not {"start", "part"}.isdisjoint(launch.args)}
    return Work(**found)


def _decode_attention(launch: Launch, case: Case) -> dict[str, Any]:
    """Describes decode attention. Programs do nothing without an item, or with one that lies before the window."""
    constexprs, window, lengths = launch.constexprs, launch.constexprs["WINDOW"], case["seq_lens"]
    rows = plan_splits([-(-length // case["P"]) for length in lengths], launch.grid[0])
    starts = [first_seen(length, 1, window) for length in lengths]
    splits = [sum(end * case["P"] > start for _, _, end in row) for row, start in zip(rows, starts, strict=True)]
    parts = max(splits)
    piece_bytes = 2 * constexprs["BLOCK"] * constexprs["C"] * DTYPE.itemsize  # keys and values
    resident = min(RESIDENT_WARPS // launch.num_warps, TARGET.shared_bytes // (launch.num_stages * piece_bytes))
    found = {"programs": sum(splits) * launch.grid[1], "unit": "attention", "looks_up": True, "resident": resident}
    found |= {"in_flight": (launch.num_stages - 1) * piece_bytes}
    return found | {"exchanges": parts > 1, "parts": parts if parts > 1 else 0}


def _prefill_attention(launch: Launch, case: Case, cost: Cost) -> dict[str, Any]:
    """Describes prefill attention. More programs than blocks of queries share their keys."""
    constexprs, new_lens = launch.constexprs, [new for _, new in case["chunks"]]
    queries, block_n = constexprs["BLOCK_M"] // (case["H"] // case["G"]), constexprs["BLOCK_N"]
    blocks = -(-max(new_lens) // queries) * case["G"] * len(new_lens)
    num_keys = max(map(sum, case["chunks"]))  # that a block of queries reads
    num_keys = min(num_keys, keys_to_split(num_keys, constexprs["WINDOW"], block_n) + queries)
    key_blocks = -(-num_keys // block_n)
    splits = max(1, min(math.prod(launch.grid) // blocks, key_blocks // LEAST_KEY_BLOCKS))
    found = {"key_blocks": -(-key_blocks // splits), "looks_up": True, "exponentials": cost.flops / (4 * case["C"])}
    return found | {"exchanges": splits > 1, "parts": splits if splits > 1 else 0}


def _expert_product(launch: Launch, case: Case, cost: Cost) -> dict[str, Any]:
    """Describes a product of pairs with the weights of their experts, which wait for the routing.

    Programs of empty blocks do nothing; a place without a pair is multiplied as the others of its block are.
    """
    constexprs, args, itemsize = launch.constexprs, launch.args, DTYPE.itemsize
    block, weight, tiles = constexprs["BLOCK"], args["weight"], launch.grid[0] // args["num_blocks"]
    in_use = blocks_in_use(case)
    programs = round(in_use * tiles)
    moved = touched_bytes(case, len(weight) // case["X"], args["K"], DTYPE) + args["x"].nbytes + args["out"].nbytes
    stage_bytes = (constexprs["BLOCK_N"] + block) * constexprs["BLOCK_K"] * itemsize
    resident = min(RESIDENT_WARPS // launch.num_warps, TARGET.shared_bytes // (launch.num_stages * stage_bytes))
    in_flight = (launch.num_stages - 1) * constexprs["BLOCK_N"] * constexprs["BLOCK_K"] * itemsize
    return {
        "bytes": moved,
        "flops": cost.flops * in_use * block / (case["T"] * case["J"]),
        "programs": programs,
        "rounds": -(-programs // NUM_SMS),
        "resident": resident,
        "in_flight": in_flight,
        "unit": "matrix",
        "looks_up_late": True,
    }


def blocks_in_use(case: Case) -> float:
    """Returns how many blocks of pairs hold any, on average.

    An expert has as many pairs as of T tokens choose it, each with probability J / X.
    """
    tokens, share = case["T"], case["J"] / case["X"]

    def probability(pairs: int) -> float:
        ways = math.lgamma(tokens + 1) - math.lgamma(pairs + 1) - math.lgamma(tokens - pairs + 1)
        return math.exp(ways + pairs * math.log(share) + (tokens - pairs) * math.log1p(-share))

    mean = sum(probability(pairs) * -(-pairs // case["block"]) for pairs in range(1, tokens + 1))
    return case["X"] * mean

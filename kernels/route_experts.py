"""Routing of a mixture of experts: weight = softmax(logits) of the J largest logits of a token, in float32, divided by
their sum if `renormalise`; and the pairs of a token and one of its experts, sorted by expert.

A product over the experts then takes its rows in blocks that belong to one expert each. All sizes follow from the
shapes and nothing waits for the host, so a CUDA graph may hold the operation.

Few rows take one launch of one program; more take two, the second of which sorts. There are no atomics, and every sum
has one order: ids, weights and places are the same bits in every call, and those of a row do not depend on other rows.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from internvl_rt.kernels._contract import Case, Cost, KernelSpec, Tolerance, require, require_one_of, require_tensor
from internvl_rt.kernels._launch import Launch, Target, cdiv, next_power_of_2, run, target_of
from internvl_rt.kernels._route_experts_body import choose_kernel, route_few_kernel, sort_kernel

MAX_EXPERTS = 512
BLOCKS = (16, 32, 64, 128)  # places of a block
FEW_ROWS = (1, 16, 64)  # rows of the one program; each is a kernel of its own
MAX_TILE = 8192  # logits that one program holds: 16 for each of its 512 threads
TILE = 2048  # logits that a program of many holds: 8 for each of its 256 threads
MAX_COUNTS = 32768  # numbers of pairs that programs write for each other: each reads them all


class Routing(NamedTuple):
    """Which experts compute what.

    Pair t * J + j is token t's part of its j-th expert. In `pair_W` the pairs of an expert stand behind each other, in
    ascending order, and -1 fills up their last block of places, so that all places of a block belong to one expert.
    """

    expert_id_TJ: Tensor  # int32: the chosen experts, the most probable first; of equals the lower id first
    weight_TJ: Tensor  # float32
    pair_W: Tensor  # int32: the pairs of the experts held here, sorted by expert; -1: no pair
    block_expert_B: Tensor  # int32: the expert of each block of places, counted from the first one here; -1: empty


def num_blocks(num_pairs: int, num_experts: int, block: int) -> int:
    """Returns the least number of blocks that always suffices for so many pairs, however they choose their experts.

    The first pair of an expert begins a block, and so does the first one behind each full block.
    """
    begun = min(num_pairs, num_experts)
    return begun + (num_pairs - begun) // block


def route_experts_reference(
    logits_TX: Tensor,
    num_chosen: int,
    block: int,
    *,
    renormalise: bool = True,
    first: int = 0,
    count: int | None = None,
) -> Routing:
    """Chooses by the logits, as probabilities may round to equal ones; NaN counts as the largest.

    first, count: only the pairs of experts `first` to `first + count - 1` are sorted; without a count all the last.
    """
    count = logits_TX.shape[1] - first if count is None else count
    x_TX = logits_TX if logits_TX.dtype == torch.float64 else logits_TX.float()
    expert_id_TJ = x_TX.sort(dim=1, descending=True, stable=True).indices[:, :num_chosen]
    weight_TJ = x_TX.softmax(1).gather(1, expert_id_TJ)
    if renormalise:
        weight_TJ = weight_TJ / weight_TJ.sum(1, keepdim=True)
    return Routing(expert_id_TJ.int(), weight_TJ.float(), *sort_pairs_reference(expert_id_TJ, block, first, count))


def sort_pairs_reference(expert_id_TJ: Tensor, block: int, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Returns `pair_W` and `block_expert_B` of a routing."""
    expert_Q = expert_id_TJ.flatten() - first
    expert_Q = expert_Q.where((expert_Q >= 0) & (expert_Q < count), count)  # the pairs of others come last
    expert_Q, pair_Q = expert_Q.sort(stable=True)
    num_pairs_X = torch.zeros(count + 1, dtype=torch.int64, device=expert_Q.device)
    num_pairs_X.index_add_(0, expert_Q, torch.ones_like(expert_Q))
    blocks_X = (num_pairs_X + block - 1) // block
    shift_X = (blocks_X.cumsum(0) - blocks_X) * block - (num_pairs_X.cumsum(0) - num_pairs_X)
    capacity = num_blocks(len(pair_Q), count, block)
    place_Q = torch.arange(len(pair_Q), device=expert_Q.device) + shift_X[expert_Q]
    place_Q = place_Q.where(expert_Q < count, capacity * block)  # one place more, which is cut off
    pair_W = torch.full((capacity * block + 1,), -1, dtype=torch.int32, device=expert_Q.device)
    block_expert_B = torch.full((capacity + 1,), -1, dtype=torch.int32, device=expert_Q.device)
    pair_W.index_copy_(0, place_Q, pair_Q.int())
    return pair_W[:-1], block_expert_B.index_copy_(0, place_Q // block, expert_Q.int())[:-1]


def plan_route_experts(
    logits_TX: Tensor,
    num_chosen: int,
    block: int,
    *,
    renormalise: bool = True,
    first: int = 0,
    count: int | None = None,
    programmatic_launch: bool = True,
    out: Routing,
    target: Target,
) -> tuple[Launch, ...]:
    tokens, experts = logits_TX.shape
    padded = max(16, next_power_of_2(experts))
    pdl = programmatic_launch and target.has_programmatic_launch
    window = {"first": first, "count": experts - first if count is None else count}
    args: dict[str, Any] = {
        "logits": logits_TX,
        "expert_id": out.expert_id_TJ,
        "weight": out.weight_TJ,
        "pair": out.pair_W,
        "block_expert": out.block_expert_B,
        "num_tokens": tokens,
        "num_places": len(out.pair_W),
        "num_blocks": len(out.block_expert_B),
        "logits_stride": logits_TX.stride(0),
    }
    constexprs = {"X": experts, "J": num_chosen, "XP": padded, "FILL": 1024, "RENORMALISE": renormalise, "PDL": pdl}
    aligned = experts * logits_TX.itemsize % 16 == 0
    tile = next((rows for rows in FEW_ROWS if tokens <= rows), 0)
    if tile and tile * padded <= MAX_TILE:
        num_warps = 1 if tile == 1 else min(16, max(4, tile * padded // 256))  # a row in one warp needs no barriers
        wide = aligned and tile * padded * logits_TX.itemsize >= 16 * 32 * num_warps
        constexprs |= {"ROWS": tile, "BLOCK": block}
        how: dict[str, Any] = {"num_warps": num_warps, "pdl": pdl, "wide_loads": wide}
        return (Launch(route_few_kernel, (min(tokens, 1), 1, 1), {**args, **window}, constexprs, **how),)

    tile = max(1, TILE // padded)
    rows_each = cdiv(tokens, tile * min(256, MAX_COUNTS // padded)) * tile
    programs = cdiv(tokens, rows_each)
    count_PX, start_PX = torch.empty(2, programs, padded, dtype=torch.int32, device=logits_TX.device)
    shared = {
        "num_pairs": count_PX,
        "offset": torch.empty(tokens * num_chosen, dtype=torch.int32, device=logits_TX.device),
        "rows_each": rows_each,
    }
    sorting = {name: args[name] for name in ("expert_id", "pair", "block_expert", "num_tokens")}
    tiles = {"J": num_chosen, "XP": padded, "BLOCK": block, "PROGRAMS": tile, "CHUNK": 256, "PDL": pdl}
    grid = (programs, 1, 1)
    return (
        Launch(
            choose_kernel,
            grid,
            {**args, **shared},
            {**constexprs, "ROWS": tile},
            num_warps=8,
            pdl=pdl,
            wide_loads=aligned,
        ),
        Launch(sort_kernel, grid, {**sorting, **shared, **window, "start": start_PX}, tiles, pdl=pdl),
    )


def route_experts(
    logits_TX: Tensor,
    num_chosen: int,
    block: int,
    *,
    renormalise: bool = True,
    first: int = 0,
    count: int | None = None,
    programmatic_launch: bool = True,
    out: Routing | None = None,
) -> Routing:
    """Computes `route_experts_reference`, for rows at any stride; X is at most MAX_EXPERTS, `block` is one of BLOCKS.

    `pair_W` and `block_expert_B` have room for num_blocks(T * J, count, block) blocks, which always suffices. A row
    with NaN has distinct experts and weights of NaN. Without `programmatic_launch` a kernel waits for the previous
    kernel's end before it starts, as kernels usually do.
    Raises ValueError naming the argument that does not fit.
    """
    require_one_of("logits_TX", logits_TX.dtype, SPEC.tolerances)
    require(logits_TX.ndim == 2, "logits_TX", "rows [T, X]", tuple(logits_TX.shape))
    tokens, experts = logits_TX.shape
    device = logits_TX.device
    require(1 <= experts <= MAX_EXPERTS, "logits_TX", f"1 to {MAX_EXPERTS} experts", experts)
    require_tensor("logits_TX", logits_TX, (tokens, experts), logits_TX.dtype, device)
    require(1 <= num_chosen <= experts, "num_chosen", f"1 to {experts}", num_chosen)
    require_one_of("block", block, BLOCKS)
    require(0 <= first < experts, "first", f"0 to {experts - 1}", first)
    held = experts - first if count is None else count
    require(1 <= held <= experts - first, "count", f"1 to {experts - first}", held)
    blocks = num_blocks(tokens * num_chosen, held, block)
    chosen = (tokens, num_chosen)
    if out is None:
        out = Routing(
            torch.empty(chosen, dtype=torch.int32, device=device),
            torch.empty(chosen, dtype=torch.float32, device=device),
            torch.empty(blocks * block, dtype=torch.int32, device=device),
            torch.empty(blocks, dtype=torch.int32, device=device),
        )
    for name, tensor, shape, dtype in (
        ("out.expert_id_TJ", out.expert_id_TJ, chosen, torch.int32),
        ("out.weight_TJ", out.weight_TJ, chosen, torch.float32),
        ("out.pair_W", out.pair_W, (blocks * block,), torch.int32),
        ("out.block_expert_B", out.block_expert_B, (blocks,), torch.int32),
    ):
        require_tensor(name, tensor, shape, dtype, device)
        require(tensor.is_contiguous(), name, "a contiguous tensor", f"strides {tensor.stride()}")
    run(
        plan_route_experts(
            logits_TX,
            num_chosen,
            block,
            renormalise=renormalise,
            first=first,
            count=count,
            programmatic_launch=programmatic_launch,
            out=out,
            target=target_of(device),
        )
    )
    return out


def _make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Makes rows, which `fill` changes, and cuts them from a tensor with `padding` more columns of NaN."""
    tokens, experts, fill = case["T"], case["X"], case.sizes.get("fill", "normal")
    logits = 3 * torch.randn(tokens, experts + case.sizes.get("padding", 0), dtype=torch.float32, device=device)
    if fill == "ties":
        logits = logits.div(3).round()
    elif fill == "constant":
        logits = torch.zeros_like(logits)
    elif fill == "alike":  # all tokens choose the same experts
        logits += 40 * ((7 * torch.arange(logits.shape[1], device=device)) % experts)
    elif fill == "sparse":
        logits[:, ::3] = -torch.inf
    logits[:, experts:] = torch.nan
    return {
        "logits_TX": logits.to(dtype)[:, :experts],
        "num_chosen": case["J"],
        "block": case["block"],
        "renormalise": case.sizes.get("renormalise", True),
        "first": case.sizes.get("first", 0),
        "count": case.sizes.get("count"),
    }


def _case(name: str, tokens: int, experts: int, chosen: int, block: int = 16, **more: Any) -> Case:
    return Case(name, {"T": tokens, "X": experts, "J": chosen, "block": block, **more})


def _cost(case: Case, dtype: torch.dtype) -> Cost:
    tokens, experts, pairs = case["T"], case["X"], case["T"] * case["J"]
    count = case.sizes.get("count") or experts - case.sizes.get("first", 0)
    written = 4 * (2 * pairs + (case["block"] + 1) * num_blocks(pairs, count, case["block"]))
    return Cost(bytes=dtype.itemsize * tokens * experts + written, flops=5 * tokens * experts)


EXACT = Tolerance(0, 0, 0, "ids and places are integers")
IN_FLOAT32 = Tolerance(2e-5, 1e-30, 2e-6, "differences of logits, exponentials and their sum are rounded to 24 bits")

SPEC = KernelSpec(
    name="route_experts",
    used_by="every decoder with experts: each layer",
    reference=route_experts_reference,
    plan=plan_route_experts,
    launcher=route_experts,
    make_inputs=_make_inputs,
    cost=_cost,
    test_cases=(
        *(_case(f"{tokens}_tokens", tokens, 128, 8) for tokens in (1, 2, 16, 17, 64, 65)),
        *(_case(f"plain_{tokens}_tokens", tokens, 60, 4, renormalise=False) for tokens in (1, 5, 70)),
        *(_case(f"part_{tokens}_tokens", tokens, 32, 4, 32, first=8, count=8) for tokens in (1, 6, 140)),
        *(_case(f"{fill}_{tokens}", tokens, 40, 6, fill=fill) for fill in ("ties", "sparse") for tokens in (3, 150)),
        *(_case(f"alike_{tokens}", tokens, 24, 3, 32, fill="alike") for tokens in (16, 32, 33, 96, 97)),
        _case("no_tokens", 0, 128, 8),
        _case("one_expert", 20, 1, 1),
        _case("all_experts", 9, 17, 17),
        _case("most_experts", 18, 512, 10, 128, padding=16),
        _case("constant", 4, 100, 32, 64, fill="constant"),
        _case("strided", 5, 30, 4, padding=3),
    ),
    model_cases=tuple(
        _case(f"{model}_{tokens}_tokens", tokens, experts, chosen, 16 if tokens <= 64 else 64)
        for model, experts, chosen in (("30b_a3b", 128, 8), ("241b_a28b", 128, 8), ("20b_gpt_oss", 32, 4))
        for tokens in (1, 8, 64, 3392)  # decode steps; the prompt of a picture of 13 tiles
    ),
    tolerances=dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), IN_FLOAT32),
    stored={torch.float32: IN_FLOAT32, torch.int32: EXACT},
)

"""Draws the operands with which expert_gate_up and expert_down are tested, compiled and measured."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from internvl_rt.kernels._contract import Case, Tolerance
from internvl_rt.kernels._expert_plan import choose_block
from internvl_rt.kernels._int4 import CHUNK, PLANE
from internvl_rt.kernels._launch import cdiv
from internvl_rt.kernels._numbers_8bit import BLOCK
from internvl_rt.kernels.dequantise import GROUPS
from internvl_rt.kernels.gemv_8bit import draw_numbers
from internvl_rt.kernels.route_experts import Routing, route_experts_reference


def draw_matrix(
    height: int, width: int, padding: int, dtype: torch.dtype, device: torch.device, factor: float = 1.0
) -> Tensor:
    """Draws normal numbers, times `factor`, in rows with `padding` more columns of NaN."""
    values = torch.full((height, width + padding), torch.nan, dtype=dtype, device=device)
    values[:, :width] = factor * torch.randn(height, width, dtype=torch.float32, device=device)
    return values[:, :width]


def draw_routing(case: Case, device: torch.device) -> Routing:
    """Lets T tokens choose J of X experts. `chosen`: how.

    "first": the same experts for all tokens; "even": only experts of even numbers, so that others have no pairs.
    With `held`, which is a pair (first, count), only the pairs of these experts are sorted.
    """
    tokens, experts, chosen = case["T"], case["X"], case.sizes.get("chosen")
    logits = torch.randn(tokens, experts, dtype=torch.float32, device=device)
    expert = torch.arange(experts, device=device)
    if chosen == "first":
        logits = logits - 100.0 * expert
    elif chosen == "even":
        logits = logits - 100.0 * (expert % 2)
    first, count = case.sizes.get("held", (0, experts))
    return route_experts_reference(logits, case["J"], case["block"], first=first, count=count)


def draw_weight(case: Case, n: int, k: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Draws the weight of all experts that are held, [n, k] in the kind of the case, of elements of about K^-1/2.

    kind: "dense", "float8", "int8" or "int4", dense by default
    bias: whether there is one
    blocks: 8-bit numbers have a scale for every 128 columns
    group, zero: of 4-bit numbers; `scale` is the dtype of their scales
    """
    kind, padding = case.sizes.get("kind", "dense"), case.sizes.get("padding", 0)
    held = case.sizes.get("held", (0, case["X"]))[1]
    given: dict[str, Any] = {"scale_NG": None, "zero_NG": None, "num_experts": held, "group": BLOCK}
    if case.sizes.get("bias"):
        given["bias_N"] = torch.randn(n, dtype=torch.float32, device=device).to(dtype)
    if kind == "dense":
        return {**given, "weight": draw_matrix(n, k, padding, dtype, device, k**-0.5)}
    if kind == "int4":
        group = case.sizes.get("group", BLOCK)
        shape = n, cdiv(k, group)
        scale = (torch.rand(shape, device=device) + 0.5) * (k**-0.5 / 7)
        zero = torch.randint(0, 16, shape, device=device).to(torch.uint8) if case.sizes.get("zero") else None
        words = torch.randint(-(2**31), 2**31, (n, PLANE * cdiv(k, CHUNK)), device=device).to(torch.int32)
        scale_NG = scale.to(case.sizes.get("scale", dtype))
        return {**given, "weight": words, "scale_NG": scale_NG, "zero_NG": zero, "group": group}
    numbers, scale = draw_numbers(case, n, k, device, padding)
    return {**given, "weight": numbers, "scale_NG": scale}


def touched_bytes(case: Case, rows: int, k: int, dtype: torch.dtype) -> int:
    """Returns the bytes of the weights [rows, k] of the experts that have pairs, as many as of random choices."""
    tokens, experts, chosen = case["T"], case["X"], case["J"]
    touched: int = round(experts * (1 - (1 - chosen / experts) ** tokens))
    kind, group = case.sizes.get("kind", "dense"), case.sizes.get("group", BLOCK)
    row: int = k * dtype.itemsize
    if kind == "int4":
        row = 4 * PLANE * cdiv(k, CHUNK)
        row += cdiv(k, group) * (case.sizes.get("scale", dtype).itemsize + bool(case.sizes.get("zero")))
    elif kind != "dense":
        row = k + 4 * (cdiv(k, BLOCK) if case.sizes.get("blocks") else 1)
    return touched * rows * row


TOLERANCES = {
    torch.float32: Tolerance(1e-5, 1e-5, 2e-6, "sums over up to 560 products in another order"),
    torch.float16: Tolerance(1e-3, 2e-3, 4.5e-4, "the result is rounded to 11 bits, as are parts in blocks of 64"),
    torch.bfloat16: Tolerance(8e-3, 1.6e-2, 3.5e-3, "the result is rounded to 8 bits, as are parts in blocks of 64"),
}


def _test_cases() -> Iterator[Case]:
    def case(name: str, tokens: int, **more: Any) -> Case:
        sizes = {"T": tokens, "X": 5, "J": 2, "D": 72, "F": 40, "block": 16, **more}
        return Case(name, sizes)

    kinds: dict[str, dict[str, Any]] = {
        "dense": {},
        "float8": {"kind": "float8"},
        "float8_blocks": {"kind": "float8", "blocks": True, "D": 200, "F": 136},
        "int8": {"kind": "int8"},
    }
    for kind, how in kinds.items():
        yield case(f"{kind}_5_tokens", 5, **how)
        for block in (16, 32, 64, 128):
            yield case(f"{kind}_block_{block}", 3 * block // 8, block=block, **how)
        yield case(f"{kind}_wide", 4, **{**how, "D": 300, "F": 150}, residual=False)
        yield case(f"{kind}_held", 9, held=(1, 3), **how)
        yield case(f"{kind}_strided", 3, padding=8, **how)
        yield case(f"{kind}_one_by_one", 1, X=1, J=1, **{**how, "D": 1, "F": 1})
        yield case(f"{kind}_no_tokens", 0, **how)
    for group in GROUPS:
        for block in (16, 32, 64, 128):
            how = {"kind": "int4", "group": group, "zero": group != 64, "block": block}
            yield case(f"int4_{group}_block_{block}", 3 * block // 8, D=160, F=72, **how)
        for name, sizes in (("wide", {"D": 560, "F": 24}), ("deep", {"D": 24, "F": 560})):
            yield case(f"int4_{group}_{name}", 2, kind="int4", group=group, residual=False, **sizes)
    yield case("int4_scale", 5, kind="int4", scale=torch.float16, zero=True, padding=8, held=(1, 3))
    yield case("int4_32", 12, kind="int4", scale=torch.float32, zero=True, block=32, group=32, D=300, padding=3)
    yield case("int4_one_by_one", 1, kind="int4", X=1, J=1, D=1, F=1)
    yield case("int4_no_tokens", 0, kind="int4")
    for kind in ("dense", "float8", "int4"):
        for block in (16, 64):
            clamped = {"kind": kind, "bias": True, "gate": "clamped", "factor": 4.0}
            yield case(f"gpt_oss_{kind}_{block}", 3 * block // 8, block=block, D=160, **clamped)
    yield case("one_expert", 19, J=1, chosen="first")
    yield case("gaps", 9, chosen="even")
    yield case("all_experts", 3, J=5)
    yield case("held_elsewhere", 2, held=(3, 1), chosen="first")
    yield case("padded_by_3", 6, padding=3)


MODELS = {"30b": (2048, 768, 128, 8), "241b": (4096, 1536, 128, 8), "gpt_oss": (2880, 2880, 32, 4)}  # D, F, X, J


QUANTISED: dict[str, dict[str, Any]] = {
    "float8": {"kind": "float8"},
    "blocks": {"kind": "float8", "blocks": True},
    "int8": {"kind": "int8"},
    "int4": {"kind": "int4", "zero": True},
    "int4_32": {"kind": "int4", "group": 32},
}


def _model_cases() -> Iterator[Case]:
    for model, (width, mlp, experts, chosen) in MODELS.items():
        for tokens in (1, 8, 256, 1024, 3392):
            block = choose_block(tokens, chosen, experts)
            sizes: dict[str, Any] = {"T": tokens, "X": experts, "J": chosen, "D": width, "F": mlp, "block": block}
            if model == "gpt_oss":
                sizes |= {"bias": True, "gate": "clamped"}
            ends = tokens in (1, 3392)
            if ends or tokens == 8 or model == "30b":
                yield Case(f"{model}_{tokens}", sizes)
            for kind in QUANTISED if ends and model == "30b" else ("float8", "int4") if ends or model == "30b" else ():
                if tokens != 8 and model != "gpt_oss":
                    yield Case(f"{model}_{tokens}_{kind}", {**sizes, **QUANTISED[kind]})


TEST_CASES, MODEL_CASES = tuple(_test_cases()), tuple(_model_cases())

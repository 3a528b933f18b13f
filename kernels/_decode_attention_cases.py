"""Draws the inputs with which decode_attention is tested, compiled and measured, and counts what they cost."""

import math
from collections.abc import Iterator
from typing import Any

import torch

from internvl_rt.kernels._contract import Case, Cost
from internvl_rt.kernels._kv_numbers import KV_FORMATS, in_8_bits
from internvl_rt.kernels._paged_attention import (
    BLOCK_SIZES,
    FILLS,
    GPT_OSS_HEADS,
    GPT_OSS_WINDOW,
    HEAD_DIMS,
    MODEL_HEADS,
    SINKS,
    make_paged_cache,
    make_sinks,
)
from internvl_rt.kernels._split_plan import num_split_items, plan_splits, split_tensors


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Makes the inputs of a case. `room`: the plan is the engine's, with room for so many items. Otherwise an item has
    `split` blocks, and `spare` items more are left empty.
    """
    seq_lens, block_size = case["seq_lens"], case["P"]
    heads_wide = case["H"] + case.sizes.get("beside", 0)  # q is cut from wider rows, with NaN beside it
    q = torch.full((len(seq_lens), heads_wide, case["C"]), math.nan, dtype=dtype, device=device)
    q[:, : case["H"]] = torch.randn(len(seq_lens), case["H"], case["C"], dtype=torch.float32, device=device).to(dtype)
    num_blocks = [-(-length // block_size) for length in seq_lens]
    if "room" in case.sizes:
        rows = plan_splits(num_blocks, case["room"])
    else:
        split = case["split"]
        rows = [[[row, i, min(i + split, n)] for i in range(0, n, split)] for row, n in enumerate(num_blocks)]
    num_items = sum(map(len, rows))
    spare = max(0, len(seq_lens) - num_items) + case.sizes.get("spare", 0)
    split_start_S1, split_W3 = split_tensors(rows, case.sizes.get("room", num_items + spare), device)
    return {
        "q_SHC": q[:, : case["H"]],
        **make_paged_cache(case, seq_lens, [1] * len(seq_lens), dtype, device),
        "seq_len_S": torch.tensor(seq_lens, dtype=torch.int32).to(device),
        "split_start_S1": split_start_S1,
        "split_W3": split_W3,
        "sinks_H": make_sinks(case, dtype, device),
        "window": case.sizes.get("window"),
    }


def cost(case: Case, dtype: torch.dtype) -> Cost:
    rows, window = len(case["seq_lens"]), case.sizes.get("window", math.inf)
    tokens = sum(min(length, window) for length in case["seq_lens"])
    read = 2 * tokens * case["G"] * (case["C"] + 2 if "cache" in case.sizes else dtype.itemsize * case["C"])
    read += 4 * case["H"] if "sinks" in case.sizes else 0
    return Cost(
        bytes=read + dtype.itemsize * 2 * rows * case["H"] * case["C"], flops=4 * tokens * case["H"] * case["C"]
    )


def _case(
    name: str, seq_lens: list[int], heads: int = 2, kv_heads: int = 1, channels: int = 16, **more: int | str
) -> Case:
    sizes = {"seq_lens": seq_lens, "H": heads, "G": kv_heads, "C": channels, "P": 64, "split": 1}
    return Case(name, sizes | more)


def _model_case(name: str, batch: int, context: int, cache: str | None = None) -> Case:
    heads, kv_heads, channels = MODEL_HEADS[name]
    room = num_split_items(batch, kv_heads, num_sms=132)
    suffix, more = (f"_{cache}", in_8_bits(cache)) if cache else ("", {})
    return _case(f"{name}_{batch}_x_{context}{suffix}", [context] * batch, heads, kv_heads, channels, room=room, **more)


def _gpt_oss_case(batch: int, context: int, window: int | None, cache: str | None = None) -> Case:
    """Returns a case of the layers that see all keys or of those with a window, of 132 multiprocessors' plans."""
    more: dict[str, Any] = {"room": num_split_items(batch, GPT_OSS_HEADS[1], num_sms=132), "sinks": "normal"}
    suffix = f"_{cache}" if cache else ""
    more |= in_8_bits(cache) if cache else {}
    if window is not None:
        suffix, more["window"] = f"_window{suffix}", window
    return _case(f"gpt_oss_{batch}_x_{context}{suffix}", [context] * batch, *GPT_OSS_HEADS, **more)


def _sink_and_window_cases() -> Iterator[Case]:
    """Returns cases of windows that begin and end anywhere in a block, a split and a piece of keys, and of sinks."""
    ends = [1, 2, 63, 64, 65, 127, 128, 129, 130, 500]
    for window in (1, 7, 16, 128):
        for size in BLOCK_SIZES:
            yield _case(f"window_{window}_blocks_of_{size}", ends, P=size, split=2, window=window)
    yield _case("window_in_one_split", [500, 300, 20], 4, 2, split=99, window=128)
    yield _case("window_of_few_splits_of_many", [1170, 30], 7, 1, 64, window=130)
    yield _case("window_of_many_splits", [1130, 20], 7, 1, 64, P=16, split=1, window=1000)
    yield _case("window_of_all", [150, 3], 4, 2, 32, split=2, window=5000)
    yield _case("window_among_empty_rows", [0, 5, 0, 0, 300, 0], 4, 2, 32, spare=2, window=70, sinks="normal")
    yield _case("window_padded", [150, 3, 260], 4, 2, 32, beside=3, padding=8, window=100, sinks="normal")
    yield from (_case(f"window_{fill}", [250, 3], 4, 2, 32, fill=fill, split=2, window=90) for fill in FILLS)
    for kind in (*SINKS, "extreme"):
        yield _case(f"sinks_{kind}", [1, 64, 150, 257], 6, 2, 32, split=99, sinks=kind)
        yield _case(f"sinks_{kind}_split", [1, 64, 150, 257], 6, 2, 32, sinks=kind)
        yield _case(f"sinks_{kind}_window", [1, 64, 150, 257], 6, 2, 32, sinks=kind, window=100)
    yield _case("sinks_of_many_splits", [1170], 8, 1, 64, sinks="normal")
    yield from (_case(f"sinks_{fill}", [150, 3], 4, 2, 32, fill=fill, split=2, sinks="normal") for fill in FILLS)
    yield _case("gpt_oss_group", [1, 127, 129, 500], 16, 2, 64, split=2, sinks="normal", window=128)


def _cases_of(cache: str) -> Iterator[Case]:
    """Returns the test cases of caches in 8 bits."""
    how = in_8_bits(cache)
    yield _case(f"{cache}_lengths", [1, 2, 15, 16, 17, 63, 64, 65], split=2, spare=3, **how)
    for size in BLOCK_SIZES:
        yield _case(f"{cache}_blocks_of_{size}", [1, size, size + 1, 150], P=size, split=2, **how)
    yield from (_case(f"{cache}_channels_{channels}", [193], 2, 1, channels, split=2, **how) for channels in HEAD_DIMS)
    yield _case(f"{cache}_group_7", [70], 14, 2, 32, **how)
    yield _case(f"{cache}_many_splits", [1170], 7, 1, 64, split=1, **how)
    yield _case(f"{cache}_empty_rows", [0, 5, 0, 0, 129, 0], 4, 2, 32, spare=2, **how)
    yield _case(f"{cache}_strided", [150, 3], 4, 2, 32, beside=3, padding=16, **how)
    yield _case(f"{cache}_unaligned", [150, 3], 4, 2, 32, padding=4, **how)
    yield from (_case(f"{cache}_{fill}", [150, 3], 4, 2, 32, fill=fill, split=2, **how) for fill in FILLS)
    for size in (16, 64, 128):
        lens, more = [1, 2, 127, 129, 300], {"P": size, "sinks": "normal", **how}
        yield _case(f"{cache}_sinks_blocks_of_{size}", lens, 4, 2, 32, split=2, **more)
        yield _case(f"{cache}_window_blocks_of_{size}", lens, 4, 2, 32, split=2, window=100, **more)
    yield _case(f"{cache}_sinks_extreme", [64, 150, 257], 6, 2, 32, sinks="extreme", **how)


TEST_CASES = (
    _case("lengths", [1, 2, 15, 16, 17, 63, 64, 65], split=2, spare=3),
    _case("longer", [127, 128, 129, 191, 257], split=2),
    *(_case(f"blocks_of_{size}", [1, size, size + 1, 3 * size - 1, 150], P=size, split=2) for size in BLOCK_SIZES),
    *(_case(f"channels_{channels}", [193], 2, 1, channels, split=2) for channels in HEAD_DIMS),
    *(_case(f"group_{group}", [70], 2 * group, 2, 32) for group in (1, 5, 6, 7, 16)),
    _case("one_split_each", [130, 64, 7], 4, 2, split=99),
    _case("many_splits", [1170], 7, 1, 64, split=1),
    _case("very_many_splits", [1130, 20], 7, 1, 64, P=16, split=1),
    _case("empty_rows", [0, 5, 0, 0, 129, 0], 4, 2, 32, spare=2),
    _case("all_empty", [0, 0], 4, 2, 32),
    _case("no_rows", []),
    _case("shared_prefix", [150, 200, 128], 4, 2, 32, shared=2),
    _case("strided", [150, 3], 4, 2, 32, beside=3, padding=8),
    _case("unaligned", [150, 3], 4, 2, 32, padding=3),
    *(_case(fill, [150, 3], 4, 2, 32, fill=fill, split=2) for fill in FILLS),
    *_sink_and_window_cases(),
    *(case for cache in KV_FORMATS for case in _cases_of(cache)),
)

MODEL_CASES = (
    *(_model_case(name, batch, context) for name in MODEL_HEADS for context in (2048, 32768) for batch in (1, 8, 64)),
    *(
        _model_case(name, batch, context, cache)
        for cache in KV_FORMATS
        for name in ("1b", "8b")
        for context in (8192, 32768)
        for batch in (1, 64)
    ),
    *(_gpt_oss_case(batch, 4096, window) for window in (None, GPT_OSS_WINDOW) for batch in (1, 8, 64)),
    *(_gpt_oss_case(8, 4096, window, cache) for window in (None, GPT_OSS_WINDOW) for cache in KV_FORMATS),
)

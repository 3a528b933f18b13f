"""Draws the inputs with which prefill_attention is tested, compiled and measured, and counts what they cost."""

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
    first_seen,
    make_paged_cache,
    make_sinks,
)
from internvl_rt.kernels._prefill_plan import SplitRule


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Makes a batch and its cache. `chunks` holds (cached tokens, new tokens) for each row; `splits` names a rule."""
    new_lens = [new for _, new in case["chunks"]]
    seq_lens = [cached + new for cached, new in case["chunks"]]
    starts = [sum(new_lens[:row]) for row in range(len(new_lens) + 1)]
    heads_wide = case["H"] + case.sizes.get("beside", 0)  # q is cut from wider rows, with NaN beside it
    q = torch.full((starts[-1], heads_wide, case["C"]), math.nan, dtype=dtype, device=device)
    q[:, : case["H"]] = torch.randn(starts[-1], case["H"], case["C"], dtype=torch.float32, device=device).to(dtype)
    return {
        "q_THC": q[:, : case["H"]],
        **make_paged_cache(case, seq_lens, new_lens, dtype, device),
        "query_start_S1": torch.tensor(starts, dtype=torch.int32).to(device),
        "seq_len_S": torch.tensor(seq_lens, dtype=torch.int32).to(device),
        "max_query_len": max(new_lens, default=0),
        "splits": TEST_RULES.get(case.sizes.get("splits", "")),
        "sinks_H": make_sinks(case, dtype, device),
        "window": case.sizes.get("window"),
    }


TEST_RULES = {"none": SplitRule(1, num_splits=1), "three": SplitRule(1, num_splits=3), "short": SplitRule(64)}


def cost(case: Case, dtype: torch.dtype) -> Cost:
    window, new = case.sizes.get("window"), sum(new for _, new in case["chunks"])
    tokens = sum(cached + new - first_seen(cached + new, new, window) for cached, new in case["chunks"] if new)
    pairs = sum(_pairs(cached + new, window) - _pairs(cached, window) for cached, new in case["chunks"])
    read = 2 * tokens * case["G"] * (case["C"] + 2 if "cache" in case.sizes else dtype.itemsize * case["C"])
    read += 4 * case["H"] if "sinks" in case.sizes else 0
    return Cost(bytes=read + dtype.itemsize * 2 * new * case["H"] * case["C"], flops=4 * pairs * case["H"] * case["C"])


def _pairs(num_tokens: int, window: int | None) -> int:
    """Counts the pairs of a query and a key that it sees, of the first tokens of a sequence."""
    narrow = num_tokens if window is None else min(num_tokens, window)  # queries that see all before them
    return narrow * (narrow + 1) // 2 + (num_tokens - narrow) * (window or 0)


def _case(
    name: str, *chunks: tuple[int, int], heads: int = 2, kv_heads: int = 1, channels: int = 16, **more: int | str
) -> Case:
    return Case(name, {"chunks": chunks, "H": heads, "G": kv_heads, "C": channels, "P": 64} | more)


def _model_case(
    name: str, cached: int, new: int, empty_rows: int = 0, cache: str | None = None, block_size: int = 64
) -> Case:
    heads, kv_heads, channels = MODEL_HEADS[name]
    chunks = (cached, new), *[(0, 0)] * empty_rows
    among = f"_among_{empty_rows}_empty" if empty_rows else ""
    suffix, more = (f"_{cache}", in_8_bits(cache)) if cache else ("", {})
    blocks = f"_blocks_of_{block_size}" if block_size != 64 else ""
    sizes = {"heads": heads, "kv_heads": kv_heads, "channels": channels, "P": block_size, **more}
    return _case(f"{name}_{new}_behind_{cached}{among}{suffix}{blocks}", *chunks, **sizes)


def _several(name: str, *chunks: tuple[int, int]) -> Case:
    heads, kv_heads, channels = MODEL_HEADS[name]
    return _case(f"{name}_{len(chunks)}_rows", *chunks, heads=heads, kv_heads=kv_heads, channels=channels)


BEHIND_A_PREFIX = ((64, 1), (63, 1), (64, 64), (1, 63), (100, 30), (128, 65), (200, 3))
PREFIXES = (3392, 8192, 32704)  # cached tokens before a question: a picture of 13 tiles, and long ones


def _gpt_oss_case(cached: int, new: int, window: int | None, cache: str | None = None) -> Case:
    """Returns a case of the layers that see all keys or of those with a window."""
    heads, kv_heads, channels = GPT_OSS_HEADS
    more: dict[str, Any] = {"sinks": "normal"} | (in_8_bits(cache) if cache else {})
    suffix = f"_{cache}" if cache else ""
    if window is not None:
        suffix, more["window"] = f"_window{suffix}", window
    sizes = {"heads": heads, "kv_heads": kv_heads, "channels": channels, **more}
    return _case(f"gpt_oss_{new}_behind_{cached}{suffix}", (cached, new), **sizes)


def _sink_and_window_cases() -> Iterator[Case]:
    """Returns cases of windows that begin and end anywhere in a block, a split and a block of queries, and of sinks."""
    chunks = (0, 1), (0, 127), (0, 128), (126, 3), (128, 1), (60, 8), (440, 60)
    for window in (1, 7, 16, 128):
        for size in (16, 64):
            yield _case(f"window_{window}_blocks_of_{size}", *chunks, P=size, splits="none", window=window)
        yield _case(f"window_{window}_split", (260, 70), (0, 33), splits="three", window=window)
    for size in (32, 128):
        yield _case(f"window_70_blocks_of_{size}", *chunks, P=size, splits="none", window=70)
    yield _case("window_split_if_long", (500, 20), (3, 5), splits="short", window=300)
    yield _case("window_of_all", (70, 70), (0, 3), splits="none", window=5000)
    yield _case("window_of_all_split", (300, 20), heads=4, kv_heads=2, window=5000)
    yield _case("window_among_empty_rows", *((0, 0),) * 3, (420, 12), *((0, 0),) * 4, window=100, sinks="normal")
    yield _case("window_padded", (170, 20), (0, 3), heads=4, kv_heads=2, beside=3, padding=8, window=90, sinks="own")
    yield from (_case(f"window_{fill}", (170, 40), channels=32, fill=fill, splits="none", window=90) for fill in FILLS)
    for kind in (*SINKS, "extreme"):
        how: dict[str, Any] = {"heads": 6, "kv_heads": 2, "channels": 32, "sinks": kind}
        yield _case(f"sinks_{kind}", (70, 40), (0, 1), splits="none", **how)
        yield _case(f"sinks_{kind}_split", (170, 9), (0, 1), splits="three", **how)
        yield _case(f"sinks_{kind}_window", (170, 40), (0, 1), splits="none", window=100, **how)
        yield _case(f"sinks_{kind}_window_split", (250, 9), splits="short", window=150, **how)
    yield from (
        _case(f"sinks_{fill}", (70, 40), channels=32, fill=fill, splits="none", sinks="normal") for fill in FILLS
    )
    group = {"heads": 16, "kv_heads": 2, "channels": 64}
    yield _case("gpt_oss_group", (120, 20), (0, 3), splits="none", sinks="normal", window=128, **group)


def _cases_of(cache: str) -> Iterator[Case]:
    """Returns the test cases of caches in 8 bits."""
    how = in_8_bits(cache)
    yield _case(f"{cache}_lengths", *((0, new) for new in (1, 2, 15, 16, 17, 63, 64, 65)), splits="none", **how)
    yield _case(f"{cache}_behind_a_prefix", *BEHIND_A_PREFIX, splits="none", **how)
    for size in BLOCK_SIZES:
        chunks = (0, size + 1), (size, size), (150, 20)
        yield _case(f"{cache}_blocks_of_{size}", *chunks, P=size, splits="none", **how)
    for channels in HEAD_DIMS:
        yield _case(f"{cache}_channels_{channels}", (70, 70), channels=channels, splits="none", **how)
        yield _case(f"{cache}_split_channels_{channels}", (170, 9), channels=channels, splits="short", **how)
    yield _case(f"{cache}_group_7", (60, 40), heads=14, kv_heads=2, splits="none", **how)
    yield _case(f"{cache}_strided", (70, 20), (0, 3), heads=4, kv_heads=2, beside=3, padding=16, splits="none", **how)
    yield _case(f"{cache}_unaligned", (70, 20), (0, 3), heads=4, kv_heads=2, padding=4, splits="none", **how)
    for fill in FILLS:
        yield _case(f"{cache}_{fill}", (70, 40), channels=32, fill=fill, splits="none", **how)
    yield _case(f"{cache}_question", (300, 20), heads=4, kv_heads=2, **how)
    for size in (16, 64):
        more: dict[str, Any] = {"heads": 4, "kv_heads": 2, "channels": 32, "P": size, "sinks": "normal", **how}
        yield _case(f"{cache}_sinks_blocks_of_{size}", (70, 40), (0, 1), splits="none", **more)
        yield _case(f"{cache}_window_blocks_of_{size}", (170, 40), (0, 1), splits="none", window=100, **more)
        yield _case(f"{cache}_window_split_blocks_of_{size}", (270, 9), splits="three", window=150, **more)
    yield _case(f"{cache}_sinks_extreme", (70, 40), heads=6, kv_heads=2, channels=32, sinks="extreme", **how)
    yield _case(f"{cache}_empty_rows", (0, 0), (70, 0), (0, 5), (64, 3), (0, 0), **how)


TEST_CASES = (
    _case("lengths", *((0, new) for new in (1, 2, 15, 16, 17, 63, 64, 65)), splits="none"),
    _case("longer", (0, 127), (0, 129), (0, 0), (0, 130), splits="none"),
    _case("behind_a_prefix", *BEHIND_A_PREFIX, splits="none"),
    _case("empty_rows", (0, 0), (70, 0), (0, 5), (0, 0), (64, 3), (0, 0), splits="none"),
    _case("all_empty", (0, 0), (3, 0)),
    _case("no_rows"),
    *(
        _case(f"blocks_of_{size}", (0, size + 1), (size, size), (150, 20), P=size, splits="none")
        for size in BLOCK_SIZES
    ),
    *(_case(f"channels_{channels}", (70, 70), channels=channels, splits="none") for channels in HEAD_DIMS),
    *(_case(f"group_{group}", (60, 40), heads=2 * group, kv_heads=2, splits="none") for group in (1, 5, 6, 7, 16)),
    _case("shared_prefix", (128, 22), (128, 3), (192, 8), heads=4, kv_heads=2, shared=2, splits="none"),
    _case("strided", (70, 20), (0, 3), heads=4, kv_heads=2, beside=3, padding=8, splits="none"),
    _case("unaligned", (70, 20), (0, 3), heads=4, kv_heads=2, padding=3, splits="none"),
    *(_case(fill, (70, 40), channels=32, fill=fill, splits="none") for fill in FILLS),
    # Keys are split.
    _case("question", (300, 20), heads=4, kv_heads=2),
    _case("question_among_empty_rows", *((0, 0),) * 3, (420, 12), *((0, 0),) * 4),
    _case("questions", (300, 9), (0, 5), (130, 0), (64, 1), (133, 40)),
    _case("many_questions", *((30 * row, 1) for row in range(9))),
    _case("across_splits", (100, 120), splits="short"),
    _case("many_splits", (2111, 3), splits="short"),
    _case("three_splits", (300, 20), (5, 3), (0, 70), (0, 0), (63, 1), splits="three"),
    *(_case(f"split_blocks_of_{size}", (size, size), (150, 20), P=size) for size in BLOCK_SIZES),
    *(_case(f"split_channels_{channels}", (170, 9), channels=channels, splits="short") for channels in HEAD_DIMS),
    *(_case(f"split_group_{group}", (150, 9), heads=2 * group, kv_heads=2) for group in (1, 5, 6, 7, 16)),
    _case("split_strided", (140, 20), (0, 3), heads=4, kv_heads=2, beside=3, padding=8),
    _case("split_unaligned", (140, 20), (0, 3), heads=4, kv_heads=2, padding=3),
    *(_case(f"split_{fill}", (170, 20), channels=32, fill=fill, splits="short") for fill in FILLS),
    *_sink_and_window_cases(),
    *(case for cache in KV_FORMATS for case in _cases_of(cache)),
)

MODEL_CASES = (
    *(_model_case(name, cached, new) for name in MODEL_HEADS for cached, new in ((0, 3392), (8192, 512))),
    *(_model_case(name, cached, 64) for name in ("1b", "8b") for cached in PREFIXES),
    *(_model_case(name, 3392, 64, empty_rows=7) for name in ("1b", "8b")),
    *(
        _several(name, (0, 1024), (3392, 64), *((0, new) for new in (512, 256, 100, 50, 30, 12)))
        for name in ("1b", "8b")
    ),
    *(
        _model_case(name, cached, new, cache=cache)
        for cache in KV_FORMATS
        for name in ("1b", "8b")
        for cached, new in ((0, 3392), (3392, 64), (8192, 512))
    ),
    *(
        _model_case("8b", *chunk, cache="int8", block_size=size)
        for size in (16, 32, 128)
        for chunk in ((0, 3392), (3392, 64))
    ),
    *(
        _gpt_oss_case(*chunk, window)
        for window in (None, GPT_OSS_WINDOW)
        for chunk in ((0, 3392), (3392, 64), (8192, 512))
    ),
    *(_gpt_oss_case(0, 3392, window, cache) for window in (None, GPT_OSS_WINDOW) for cache in KV_FORMATS),
)

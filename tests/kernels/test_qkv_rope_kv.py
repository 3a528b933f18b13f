"""Tests `qkv_rope_kv` beyond its contract: refusals, slots, exact copies, the accuracy of angles, large offsets."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from internvl_rt.kernels._contract import Case
from internvl_rt.kernels._rope import rope_row, sin_cos
from internvl_rt.kernels.qkv_rope_kv import SPEC, qkv_rope_kv
from internvl_rt.kernels.rms_norm import rms_norm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOKENS, HEADS, GROUPS, CHANNELS, PLACES = 3, 4, 2, 16, 8
WIDTH = (HEADS + 2 * GROUPS) * CHANNELS
BLOCKS = TOKENS // PLACES + 2  # `make_inputs` builds this many


def arguments(dtype: torch.dtype = torch.float32, **sizes: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    small = {"T": TOKENS, "H": HEADS, "G": GROUPS, "C": CHANNELS, "P": PLACES}
    return SPEC.make_inputs(Case("small", small | sizes), dtype, DEVICE)


def slots(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def caches(value: float, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    shape = (BLOCKS, GROUPS, PLACES, CHANNELS)
    return {name: torch.full(shape, value, dtype=dtype, device=DEVICE) for name in ("k_cache_BGPC", "v_cache_BGPC")}


def at(cache_BGPC: Tensor, slot: int) -> Tensor:
    return cache_BGPC[slot // PLACES, :, slot % PLACES]


CACHE = (BLOCKS, GROUPS, PLACES, CHANNELS)
BOTH_CACHES = ("k_cache_BGPC", "v_cache_BGPC")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv_TK": torch.zeros(TOKENS, WIDTH, dtype=torch.float64)}, "qkv_TK: expected one of .*float64"),
        ({"qkv_TK": torch.zeros(TOKENS, 8, CHANNELS)}, r"qkv_TK: expected rows \[T, K\], got \(3, 8, 16\)"),
        ({"qkv_TK": torch.zeros(WIDTH, TOKENS).T}, "qkv_TK: expected a contiguous last dimension"),
        *(
            ({"qkv_TK": torch.zeros(TOKENS, columns)}, rf"qkv_TK: expected \(H \+ 2 \* 2\) \* 16 col.* got {columns}")
            for columns in (0, WIDTH - 1, 4 * CHANNELS, 5 * CHANNELS, 7 * CHANNELS)  # the last three give H = 0, 1, 3
        ),
        *(
            (dict.fromkeys(BOTH_CACHES, torch.zeros(2, 2, 8, channels)), "k_cache_BGPC: expected a head dim of .16, 32")
            for channels in (0, 8, 24, 80, 256)
        ),
        ({"k_cache_BGPC": torch.zeros(2, 8, 16)}, r"k_cache_BGPC: expected shape \[B, G, P, C\]"),
        (dict.fromkeys(BOTH_CACHES, torch.zeros(2, 0, 8, 16)), "k_cache_BGPC: expected heads and places"),
        (dict.fromkeys(BOTH_CACHES, torch.zeros(2, 2, 0, 16)), "k_cache_BGPC: expected heads and places"),
        (
            dict.fromkeys(BOTH_CACHES, torch.zeros(1, 1, 1, 16).expand(2**28, 2, 8, 16)),
            "k_cache_BGPC: expected slots that int32 holds, got 2147483648",
        ),
        ({"k_cache_BGPC": torch.zeros(CACHE, dtype=torch.float16)}, "k_cache_BGPC: expected torch.float32"),
        ({"v_cache_BGPC": torch.zeros(CACHE, dtype=torch.float16)}, "v_cache_BGPC: expected torch.float32"),
        ({"v_cache_BGPC": torch.zeros(BLOCKS + 1, *CACHE[1:])}, "v_cache_BGPC: expected shape"),
        ({"v_cache_BGPC": torch.zeros(BLOCKS, PLACES, GROUPS, CHANNELS).mT}, "v_cache_BGPC: expected shape"),
        (
            {"v_cache_BGPC": torch.zeros(BLOCKS, PLACES, GROUPS, CHANNELS).transpose(1, 2)},
            r"v_cache_BGPC: expected strides \(256, 128, 16, 1\), got \(256, 16, 32, 1\)",
        ),
        ({"q_norm_C": torch.ones(CHANNELS)}, "k_norm_C: expected both norms or neither, got None"),
        ({"k_norm_C": torch.ones(CHANNELS)}, "k_norm_C: expected both norms or neither"),
        (dict.fromkeys(("q_norm_C", "k_norm_C"), torch.ones(WIDTH)), r"q_norm_C: expected shape \(16,\)"),
        *(({"position_T": torch.zeros(TOKENS, dtype=dtype)}, f"position_T: expected torch.float32, got {dtype}")
          for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.int64)),
        ({"position_T": torch.zeros(TOKENS + 1)}, r"position_T: expected shape \(3,\), got \(4,\)"),
        ({"inv_freq_C": torch.zeros(CHANNELS)}, r"inv_freq_C: expected shape \(8,\), got \(16,\)"),
        ({"inv_freq_C": torch.zeros(CHANNELS // 2).half()}, "inv_freq_C: expected torch.float32, got torch.float16"),
        ({"slot_T": torch.zeros(TOKENS, dtype=torch.int64)}, "slot_T: expected torch.int32, got torch.int64"),
        ({"slot_T": torch.zeros(TOKENS - 1, dtype=torch.int32)}, r"slot_T: expected shape \(3,\), got \(2,\)"),
        ({"out": torch.zeros(TOKENS, HEADS * CHANNELS)}, r"out: expected shape \(3, 4, 16\), got \(3, 64\)"),
        ({"out": torch.zeros(TOKENS, CHANNELS, HEADS).mT}, "out: expected a contiguous last dimension"),
        ({"slot_T": torch.zeros(TOKENS, dtype=torch.int32, device="meta")}, "slot_T: expected a tensor on"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    moved = {name: v.to(DEVICE) if v.device.type == "cpu" else v for name, v in changes.items()}
    inputs = arguments()
    before = inputs["k_cache_BGPC"].clone()
    with pytest.raises(ValueError, match=f"^{message}"):
        qkv_rope_kv(**inputs | moved)
    assert torch.equal(inputs["k_cache_BGPC"], before)


def test_nothing_but_the_slots_is_written_and_tokens_without_a_slot_give_zeros() -> None:
    inputs = arguments(T=7) | caches(math.nan)
    slot = [5, -1, BLOCKS * PLACES, BLOCKS * PLACES - 1, -(2**31), 2**31 - 1, 0]
    slotted = [0, 3, 6]
    inputs["qkv_TK"][[1, 2, 4, 5]] = math.nan
    q = qkv_rope_kv(**inputs | {"slot_T": slots(*slot)})
    assert torch.equal(q[[1, 2, 4, 5]], torch.zeros_like(q[:4]))
    assert q[slotted].isfinite().all()
    for name in BOTH_CACHES:
        assert all(at(inputs[name], slot[token]).isfinite().all() for token in slotted)
        assert int(inputs[name].isfinite().sum()) == len(slotted) * GROUPS * CHANNELS


def test_a_cache_without_blocks_takes_tokens_without_slots() -> None:
    empty = torch.zeros(0, GROUPS, PLACES, CHANNELS, device=DEVICE)
    inputs = arguments() | {"slot_T": slots(-1, -1, -1), "k_cache_BGPC": empty, "v_cache_BGPC": empty.clone()}
    q = qkv_rope_kv(**inputs)
    assert torch.equal(q, torch.zeros_like(q))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_values_are_copied_whatever_they_are_and_position_0_turns_nothing(dtype: torch.dtype) -> None:
    inputs = arguments(dtype)
    v = inputs["qkv_TK"][:, -GROUPS * CHANNELS :]
    v[:, 0], v[:, 1], v[:, 2], v[:, 3] = math.inf, -math.inf, math.nan, -0.0
    inputs["position_T"].zero_()
    q = qkv_rope_kv(**inputs)
    heads = inputs["qkv_TK"].view(TOKENS, -1, CHANNELS)
    assert torch.equal(q, heads[:, :HEADS])
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    for token, slot in enumerate(inputs["slot_T"].tolist()):
        assert torch.equal(at(inputs["k_cache_BGPC"], slot), heads[token, HEADS : HEADS + GROUPS])
        assert torch.equal(at(inputs["v_cache_BGPC"], slot).view(bits), heads[token, HEADS + GROUPS :].view(bits))


@pytest.mark.parametrize("channels", [64, 128])
def test_fractions_of_positions_beyond_45000_are_told_apart(channels: int) -> None:
    inputs = arguments(C=channels, far=True)
    assert inputs["position_T"].tolist() == [45000 + (1 + token) / 256 for token in range(TOKENS)]
    heads = inputs["qkv_TK"].view(TOKENS, -1, channels)
    heads[:, :, : channels // 2], heads[:, :, channels // 2 :] = 1.0, 0.0
    angle = (inputs["position_T"][:, None] * inputs["inv_freq_C"]).double().cpu()  # this product is float32
    expected = torch.cat((angle.cos(), angle.sin()), dim=1)
    q = qkv_rope_kv(**inputs).double().cpu()
    torch.testing.assert_close(q[:, 0], expected, rtol=0, atol=1.5e-7)
    k = at(inputs["k_cache_BGPC"], int(inputs["slot_T"][1]))[1].double().cpu()
    torch.testing.assert_close(k, expected[1], rtol=0, atol=1.5e-7)
    assert (q[0, 0] - q[1, 0]).abs().max() > 3e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_token_does_not_depend_on_the_tokens_beside_it(dtype: torch.dtype) -> None:
    inputs = arguments(dtype, norms=True, far=True)
    q = qkv_rope_kv(**inputs)
    row = {name: inputs[name][1:2] for name in ("qkv_TK", "position_T", "slot_T")}
    alone = inputs | row | caches(0.0, dtype)
    assert torch.equal(qkv_rope_kv(**alone), q[1:2])
    slot = int(inputs["slot_T"][1])
    assert all(torch.equal(at(alone[name], slot), at(inputs[name], slot)) for name in BOTH_CACHES)


def test_norms_round_where_rms_norm_rounds() -> None:
    inputs = arguments(torch.float16, T=8, C=128, norms=True)
    q = qkv_rope_kv(**inputs)
    heads = inputs["qkv_TK"].view(8, -1, 128)
    for part, name in ((slice(HEADS), "q_norm_C"), (slice(HEADS, HEADS + GROUPS), "k_norm_C")):
        heads[:, part] = rms_norm(heads[:, part].contiguous(), inputs[name], inputs["eps"])
    normed = inputs | {"q_norm_C": None, "k_norm_C": None}
    assert (qkv_rope_kv(**normed) == q).double().mean() > 0.99  # the sum's last bit may change a rounding


def test_caches_may_have_their_heads_inside_their_places() -> None:
    inputs = arguments()
    expected = qkv_rope_kv(**inputs)
    other = inputs | {name: inputs[name].transpose(1, 2).clone().transpose(1, 2).fill_(0) for name in BOTH_CACHES}
    assert torch.equal(qkv_rope_kv(**other), expected)
    for slot in inputs["slot_T"].tolist():
        assert all(torch.equal(at(other[name], slot), at(inputs[name], slot)) for name in BOTH_CACHES)


def test_queries_may_be_written_into_wider_rows() -> None:
    inputs = arguments()
    expected = qkv_rope_kv(**inputs)
    wide = torch.full((TOKENS, HEADS + 1, CHANNELS + 3), math.nan, device=DEVICE)
    qkv_rope_kv(**inputs, out=wide[:, 1:, :CHANNELS])
    assert torch.equal(wide[:, 1:, :CHANNELS], expected)
    assert wide[:, 0].isnan().all()
    assert wide[:, :, CHANNELS:].isnan().all()


def far_apart(values: Tensor, path: Path) -> Tensor:
    """Copies `values[i]` 2^30 + 16 elements from `values[i + 1]`, so that in int32 the offset of the third is negative.

    The memory begins 2^31 elements before the first value, so an offset that overflows int32 reads a wrong value and
    does not crash. On the CPU it is a sparse file, of which only a few pages are written.
    """
    stride, first = 2**30 + 16, 2**31
    size = first + (len(values) - 1) * stride + values[0].numel()
    if DEVICE.type == "cpu":
        memory = torch.from_file(str(path), shared=True, size=size, dtype=values.dtype)
    else:
        memory = torch.empty(size, dtype=values.dtype, device=DEVICE)
    return memory.as_strided(values.shape, (stride, *values.stride()[1:]), first).copy_(values)


@pytest.mark.parametrize("far", [("qkv_TK",), ("out",), BOTH_CACHES])
def test_elements_may_lie_more_than_2_to_the_31_behind_the_first(far: tuple[str, ...], tmp_path: Path) -> None:
    inputs = arguments(torch.float16, P=1)
    inputs["slot_T"] = slots(4, 3, 0)
    expected_inputs = {name: inputs[name].clone() for name in BOTH_CACHES}
    expected = qkv_rope_kv(**inputs | expected_inputs)
    for name in far:
        inputs[name] = far_apart(torch.zeros_like(expected) if name == "out" else inputs[name], tmp_path / name)
    assert torch.equal(qkv_rope_kv(**inputs), expected)
    assert all(torch.equal(inputs[name], value) for name, value in expected_inputs.items())


@triton.jit
def _sin_cos_kernel(angle, sin, cos, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sine, cosine = sin_cos(tl.load(angle + index))
    tl.store(sin + index, sine)
    tl.store(cos + index, cosine)


@pytest.mark.parametrize("largest", [1e-6, 0.8, 10.0, 32768.0, 45000.0, 102943.0])
def test_sine_and_cosine_are_right_to_a_few_units_in_the_last_place_of_1(largest: float) -> None:
    rng = np.random.default_rng(0)
    borders = np.arange(1 << 15) * min(1.0, largest / 51471.0) * np.pi / 2  # multiples of pi/2, where sin or cos is 0
    near = np.nextafter(borders.astype(np.float32), np.float32(np.inf))
    angle = np.concatenate((rng.uniform(0, largest, 1 << 16), borders, near)).astype(np.float32)
    angle = torch.from_numpy(np.concatenate((angle, -angle))).to(DEVICE)
    sin, cos = torch.empty_like(angle), torch.empty_like(angle)
    block = 1 << 14
    _sin_cos_kernel[(len(angle) // block,)](angle, sin, cos, BLOCK=block)
    exact = angle.double()
    assert (sin.double() - exact.sin()).abs().max() < 1.2e-7
    assert (cos.double() - exact.cos()).abs().max() < 1.2e-7
    if largest <= 0.8:
        torch.testing.assert_close(sin.double(), exact.sin(), rtol=1.2e-7, atol=0)  # small angles keep every digit


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy warns of this in the interpreter
def test_angles_that_are_no_numbers_give_none() -> None:
    angle = torch.tensor([math.nan, math.inf, -math.inf, 0.0], device=DEVICE)
    sin, cos = torch.empty_like(angle), torch.empty_like(angle)
    _sin_cos_kernel[(1,)](angle, sin, cos, BLOCK=4)
    assert sin.isnan().tolist() == cos.isnan().tolist() == [True, True, True, False]


@triton.jit
def _rope_row_kernel(x, position, inv_freq, y, HALF: tl.constexpr):
    channel = tl.arange(0, HALF)
    at = x + tl.program_id(0) * 2 * HALF + channel
    first, second = rope_row(tl.load(at), tl.load(at + HALF), tl.load(position), inv_freq, channel)
    tl.store(y + tl.program_id(0) * 2 * HALF + channel, first)
    tl.store(y + tl.program_id(0) * 2 * HALF + HALF + channel, second)


def test_a_kernel_that_turns_single_heads_gives_the_same_bits() -> None:
    inputs = arguments(T=1, far=True)
    q = qkv_rope_kv(**inputs)
    actual = torch.empty_like(q)
    _rope_row_kernel[(HEADS,)](inputs["qkv_TK"], inputs["position_T"], inputs["inv_freq_C"], actual, HALF=CHANNELS // 2)
    assert torch.equal(actual, q)

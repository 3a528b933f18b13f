"""Tests keys and values in 8 bits: how far numbers times scales are off, what overflows, what is not finite."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from internvl_rt.kernels import _kv_numbers
from internvl_rt.kernels._contract import Case
from internvl_rt.kernels._kv_numbers import KV_FORMATS, LARGEST, LEAST_SCALE, dequantise_heads, quantise_heads
from internvl_rt.kernels._launch import Target
from internvl_rt.kernels.decode_attention import SPEC as DECODE
from internvl_rt.kernels.decode_attention import decode_attention
from internvl_rt.kernels.prefill_attention import SPEC as PREFILL
from internvl_rt.kernels.prefill_attention import prefill_attention
from internvl_rt.kernels.qkv_rope_kv import SPEC as WRITE
from internvl_rt.kernels.qkv_rope_kv import qkv_rope_kv, qkv_rope_kv_reference
from support.contract import clone

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
formats = pytest.mark.parametrize("cache", KV_FORMATS)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def written(cache: str, **changes: Any) -> dict[str, Any]:
    """Returns the arguments of a write of three tokens, and runs it."""
    torch.manual_seed(0)
    sizes = {"T": 3, "H": 4, "G": 2, "C": 16, "P": 8, "cache": cache}
    inputs = WRITE.make_inputs(Case("small", sizes), torch.float32, DEVICE) | changes
    qkv_rope_kv(**inputs)
    return inputs


@formats
@pytest.mark.parametrize("size", [1e-12, 1e-3, 1.0, 1e6])
def test_a_value_is_off_by_half_a_step_of_its_number_at_most(cache: str, size: float) -> None:
    x = size * draw(200, 3, 64)
    numbers, scale = quantise_heads(x, KV_FORMATS[cache])
    largest = x.abs().amax(-1, keepdim=True)
    assert (scale[..., None].float() * LARGEST[numbers.dtype] >= largest).all()
    error = (dequantise_heads(numbers, scale, torch.float32) - x).abs()
    half_step = largest / 127 / 2 if cache == "int8" else torch.maximum(x.abs() / 16, largest / 448 / 2**10)
    assert (error <= 1.01 * half_step).all()  # a scale is rounded up by 2^-7 at most


@formats
def test_a_scale_is_the_least_bfloat16_with_which_no_number_is_too_large(cache: str) -> None:
    largest = torch.tensor([0.875, 1.0, 3.3e38, 5e-9], device=DEVICE)
    _, scale = quantise_heads(largest[:, None] * torch.tensor([1.0, -0.3], device=DEVICE), KV_FORMATS[cache])
    exact = largest.double() / LARGEST[KV_FORMATS[cache]]
    assert (scale.double() >= exact * (1 - 1e-7)).all()
    below = (scale.view(torch.int16) - 1).view(torch.bfloat16).double()
    assert (below < exact).all()


@formats
def test_zeros_and_what_is_nearly_zero_stay_zeros(cache: str) -> None:
    numbers, scale = quantise_heads(torch.tensor([[0.0, 0.0], [1e-40, -1e-38]], device=DEVICE), KV_FORMATS[cache])
    assert scale.tolist() == [LEAST_SCALE.value] * 2
    assert not dequantise_heads(numbers, scale, torch.float32).any()


@formats
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("static", [False, True], ids=["", "static"])
def test_a_head_with_a_value_that_is_not_finite_is_read_as_nan_and_no_other_is(
    cache: str, junk: float, static: bool
) -> None:
    qkv = draw(3, 8 * 16)
    qkv[1, 4 * 16 + 3] = qkv[2, 7 * 16 + 5] = junk  # of a key and of a value
    static_scale = torch.full((2,), 0.01, device=DEVICE) if static else None
    inputs = written(cache, qkv_TK=qkv, slot_T=torch.arange(3, dtype=torch.int32, device=DEVICE),
                     static_scale_2=static_scale)  # fmt: skip
    is_nan = inputs["scale_BGP2"][0, :, :3].isnan()
    expected = torch.zeros_like(is_nan)
    expected[0, 1, 0] = expected[1, 2, 1] = True
    assert torch.equal(is_nan, expected)


@formats
def test_a_checkpoints_scale_is_written_for_every_token_and_large_numbers_saturate(cache: str) -> None:
    static = torch.tensor([0.003, 0.002], device=DEVICE)  # no bfloat16 numbers
    qkv = draw(3, 8 * 16)
    qkv[:, -1] = 5.0
    inputs = written(cache, qkv_TK=qkv, static_scale_2=static)
    slot = inputs["slot_T"].long()
    scale = inputs["scale_BGP2"][slot // 8, :, slot % 8].float()
    assert ((scale >= static) & (scale < static * (1 + 2**-7))).all()
    numbers = inputs["v_cache_BGPC"][slot // 8, :, slot % 8].float()
    assert (numbers[:, -1, -1] == LARGEST[KV_FORMATS[cache]]).all()


@formats
def test_what_is_stored_of_a_token_does_not_depend_on_the_tokens_beside_it(cache: str) -> None:
    together = written(cache)
    row = {name: together[name][1:2] for name in ("qkv_TK", "position_T", "slot_T")}
    alone = written(cache, **row)
    slot = int(together["slot_T"][1])
    for name in ("k_cache_BGPC", "v_cache_BGPC", "scale_BGP2"):
        one, other = (inputs[name][slot // 8, :, slot % 8].contiguous() for inputs in (alone, together))
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@formats
def test_only_the_slots_of_tokens_are_written(cache: str) -> None:
    torch.manual_seed(0)
    sizes = {"T": 5, "H": 4, "G": 2, "C": 16, "P": 8, "cache": cache, "unslotted": 2}
    inputs = WRITE.make_inputs(Case("small", sizes), torch.float32, DEVICE)
    before = clone(inputs)
    qkv_rope_kv(**inputs)
    slots = [slot for slot in inputs["slot_T"].tolist() if slot >= 0]
    assert len(slots) == 3
    for name in ("k_cache_BGPC", "v_cache_BGPC", "scale_BGP2"):
        new, old = (
            each[name].contiguous().view(torch.uint8).transpose(1, 2).flatten(0, 1) for each in (inputs, before)
        )
        changed = (new != old).flatten(1).any(1)
        assert sorted(changed.nonzero().flatten().tolist()) == sorted(slots)


ATTENTION = {
    "decode": (DECODE, decode_attention, {"seq_lens": [70, 3], "split": 2}),
    "prefill": (PREFILL, prefill_attention, {"chunks": ((60, 10), (0, 3))}),
}


def attention_inputs(name: str, cache: str) -> dict[str, Any]:
    torch.manual_seed(0)
    spec, _, sizes = ATTENTION[name]
    return spec.make_inputs(
        Case("small", sizes | {"H": 4, "G": 2, "C": 16, "P": 16, "cache": cache}), torch.float16, DEVICE
    )


@pytest.mark.usefixtures("one_order_of_sums")
@formats
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_that_of_numbers_times_scales(name: str, cache: str) -> None:
    spec, launch, _ = ATTENTION[name]
    inputs = attention_inputs(name, cache)
    inputs["scale_BGP2"] *= torch.logspace(-12, 2, 16, 2, device=DEVICE).bfloat16()[:, None]  # of places in a block
    q = "q_THC" if name == "prefill" else "q_SHC"
    expected = spec.reference(**inputs | {q: inputs[q].double()})
    torch.testing.assert_close(launch(**inputs).double(), expected, rtol=2e-3, atol=2e-3)


@formats
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_to_a_token_whose_scale_is_nan_is_nan(name: str, cache: str) -> None:
    inputs = attention_inputs(name, cache)
    block = int(inputs["block_table_SN"][0, 1])
    inputs["scale_BGP2"][block, 0, 3] = math.nan  # of the first row's 20th token, for one kv head
    y = ATTENTION[name][1](**inputs)
    first = y[0].isnan().flatten(1).any(1).tolist()
    assert first == [True, True, False, False]
    assert y[-1].isfinite().all()


REFUSALS = [
    ({"scale_BGP2": None}, "k_cache_BGPC: expected torch.float"),
    ({"scale_BGP2": lambda t: t.float()}, "scale_BGP2: expected torch.bfloat16, got torch.float32"),
    ({"scale_BGP2": lambda t: t[..., :1]}, r"scale_BGP2: expected shape \(.*2\), got"),
    (
        {"scale_BGP2": lambda t: t.repeat(1, 1, 2, 1)[:, :, ::2]},
        "scale_BGP2: expected tokens side by side, got strides",
    ),
    ({"k_cache_BGPC": lambda t: t.float().half()}, r"k_cache_BGPC: expected one of \[.*float8_e4m3fn.*int8\], got"),
    ({"v_cache_BGPC": lambda t: t.float().half()}, "v_cache_BGPC: expected torch.int8, got torch.float16"),
]


@pytest.mark.parametrize("name", [*ATTENTION, "write"])
@pytest.mark.parametrize(("changes", "message"), REFUSALS)
def test_caches_and_scales_that_do_not_fit_are_refused_by_name(
    changes: dict[str, Any], message: str, name: str
) -> None:
    if name == "write":
        inputs, launch = written("int8"), qkv_rope_kv
    else:
        inputs, launch = attention_inputs(name, "int8"), ATTENTION[name][1]
    changed = {key: change(inputs[key]) if callable(change) else change for key, change in changes.items()}
    with pytest.raises(ValueError, match=f"^{message}"):
        launch(**inputs | changed)


@pytest.mark.parametrize("name", [*ATTENTION, "write"])
def test_fp8_is_refused_where_nothing_converts_it_and_int8_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = written("fp8") if name == "write" else attention_inputs(name, "fp8")
    launch = qkv_rope_kv if name == "write" else ATTENTION[name][1]
    monkeypatch.setattr(_kv_numbers, "target_of", lambda device: Target(80, 108))
    with pytest.raises(
        ValueError, match=r"^k_cache_BGPC: expected int8 below compute capability 8\.9, got FP8 on 8\.0"
    ):
        launch(**inputs)


def test_a_scale_for_all_tokens_is_refused_without_scales() -> None:
    torch.manual_seed(0)
    sizes = {"T": 3, "H": 4, "G": 2, "C": 16, "P": 8}
    inputs = WRITE.make_inputs(Case("small", sizes), torch.float32, DEVICE)
    with pytest.raises(ValueError, match=r"^static_scale_2: expected None without scale_BGP2"):
        qkv_rope_kv(**inputs | {"static_scale_2": torch.ones(2, device=DEVICE)})


@formats
def test_rotated_keys_are_rounded_once(cache: str) -> None:
    """A key in 16 bits would be rounded when it is rotated, and once more to its number."""
    torch.manual_seed(0)
    sizes = {"T": 64, "H": 2, "G": 2, "C": 64, "P": 16, "cache": cache}
    inputs = WRITE.make_inputs(Case("small", sizes), torch.float16, DEVICE)
    wide = clone(inputs) | {"qkv_TK": inputs["qkv_TK"].float()}
    qkv_rope_kv_reference(**inputs)
    qkv_rope_kv_reference(**wide)
    assert torch.equal(inputs["k_cache_BGPC"].view(torch.uint8), wide["k_cache_BGPC"].view(torch.uint8))

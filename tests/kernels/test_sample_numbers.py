"""Tests the numbers that `sample` computes with on the device: random words, weights, keys and places."""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from internvl_rt.kernels._sample_numbers import (
    key_at,
    key_value,
    order_key,
    philox_word,
    place_of,
    token_at,
    token_weight,
)
from internvl_rt.kernels.sample import weight_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ODD_FLOATS = [0.0, -0.0, 1e-45, -1e-45, 1.17e-38, 1.0, -1.0, 3.4e38, -3.4e38, math.inf, -math.inf]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@triton.jit
def _words_kernel(seed, counter, y, N: tl.constexpr):
    index = tl.arange(0, N)
    tl.store(y + index, philox_word(tl.load(seed + index), tl.load(counter + index)).to(tl.int64, bitcast=True))


def test_random_words_are_those_of_numpy() -> None:
    seeds = [0, 1, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 0x0123456789ABCDEF]
    counters = [0, 1, 2, 1000, 2**31, 2**32, 7, 2**62]
    seed = torch.from_numpy(np.array(seeds, np.uint64).view(np.int64)).to(DEVICE)
    words = torch.empty(8, dtype=torch.int64, device=DEVICE)
    _words_kernel[(1,)](seed, torch.tensor(counters, device=DEVICE), words, 8)
    expected = [np.random.Philox(key=s, counter=c).random_raw() for s, c in zip(seeds, counters, strict=True)]
    assert [word % 2**64 for word in words.tolist()] == expected


@triton.jit
def _weights_kernel(x, y, peak, rate, N: tl.constexpr):
    index = tl.arange(0, N)
    tl.store(y + index, token_weight(tl.load(x + index), tl.load(peak), tl.load(rate)))


@pytest.mark.parametrize("temperature", [1e-30, 0.3, 1.0, 7.0, 100.0])
def test_weights_are_the_references_bit_for_bit(temperature: float) -> None:
    x = torch.cat([torch.tensor(ODD_FLOATS[:7]), -torch.rand(2041) * 31 * temperature, -torch.rand(2048) * 1e-3])
    peak = x.max()
    rate = (torch.tensor(1.4426950408889634) / torch.tensor(temperature)).clamp_max(3e38)
    weights = torch.empty(4096, dtype=torch.int64, device=DEVICE)
    _weights_kernel[(1,)](x.to(DEVICE), weights, peak[None].to(DEVICE), rate[None].to(DEVICE), 4096)
    assert torch.equal(weights.cpu(), weight_reference(x, temperature))


def test_weights_are_the_softmax_and_never_rise_with_the_distance() -> None:
    """At this temperature a distance of 1 halves the weight, so the test tries every fraction of such an octave."""
    last = torch.tensor([2**42])
    for start in range(0, 2**24, 2**20):
        octaves = torch.arange(start, start + 2**20, dtype=torch.float64) / 2**24
        x = -torch.cat([torch.zeros(1), octaves.float()])
        weights = weight_reference(x, float(torch.tensor(1.4426950408889634)))[1:]
        exact = torch.exp2(42 - octaves)
        assert ((weights - exact).abs() <= 2**-27 * exact).all()
        assert (weights.diff() <= 0).all()
        assert weights[0] <= last
        last = weights[-1]
    assert last >= 2**41  # the next octave begins with this weight


def test_weights_are_the_softmax_within_float32() -> None:
    x = torch.randn(10000) * 4
    weights = weight_reference(x, 0.8).double() / 2**42
    exact = torch.exp((x.double() - x.max().double()) / 0.8)
    octaves = -torch.log2(exact)  # the kernel rounds this about three times, then cuts it to 24 bits
    assert ((weights - exact).abs() <= (3 * octaves + 1) * 2**-24 * exact + 2**-42).all()
    assert weight_reference(torch.tensor([0.0, -29.9, -math.inf]), 1.0).tolist() == [2**42, 0, 0]


@triton.jit
def _keys_kernel(x, key, back, N: tl.constexpr):
    index = tl.arange(0, N)
    keys = order_key(tl.load(x + index))
    tl.store(key + index, keys)
    tl.store(back + index, key_value(keys))


def test_keys_are_in_the_order_of_the_values_and_lead_back_to_them() -> None:
    x = torch.cat([torch.tensor([*ODD_FLOATS, math.nan]), torch.randn(116)])
    keys = torch.empty(128, dtype=torch.int32, device=DEVICE)
    back = torch.empty(128, device=DEVICE)
    _keys_kernel[(1,)](x.to(DEVICE), keys, back, 128)
    order = keys.cpu().argsort(stable=True)
    assert torch.equal(x[order][:-1], x.sort(stable=True).values[:-1])
    assert order[-1] == 11  # this is the index of NaN
    assert keys[0] == keys[1] == 0
    torch.testing.assert_close(back.cpu()[:11], x[:11], rtol=0, atol=0)


@triton.jit
def _places_kernel(key, token, place, key_back, token_back, N: tl.constexpr):
    index = tl.arange(0, N)
    places = place_of(tl.load(key + index), tl.load(token + index))
    tl.store(place + index, places)
    tl.store(key_back + index, key_at(places))
    tl.store(token_back + index, token_at(places))


def test_places_are_in_the_order_of_keys_then_of_lower_ids() -> None:
    keys = [2**31 - 1, 0x7F800000, 5, 1, 0, -1, -5, -0x7F800001]
    ids = [0, 1, 2**17, 2**18 - 1]
    key = torch.tensor(keys, dtype=torch.int32, device=DEVICE).repeat_interleave(4)
    token = torch.tensor(ids, dtype=torch.int32, device=DEVICE).repeat(8)
    place = torch.empty(32, dtype=torch.int64, device=DEVICE)
    key_back, token_back = torch.empty_like(key), torch.empty_like(token)
    _places_kernel[(1,)](key, token, place, key_back, token_back, 32)
    assert (place.diff() < 0).all()
    assert torch.equal(key_back, key)
    assert torch.equal(token_back, token)

"""Tests that support/cuda_draws.py draws the numbers that torch draws on a GPU."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from support.cuda_draws import CudaDraws, philox


def draws(device: str) -> list[Tensor]:
    """Makes draws of every kind that test cases use, of sizes that one round of all threads covers or does not."""
    return [
        torch.randn(3, 4, dtype=torch.float32, device=device),
        torch.randn((5, 300), device=device),
        torch.rand(1000, dtype=torch.float32, device=device),
        torch.randint(0, 256, (7, 9), device=device),
        torch.randint(-(2**63), 2**63 - 1, (600,), device=device),
        torch.randint(0, 50, (9,), dtype=torch.int32, device=device),
        *(torch.randperm(count, device=device) for count in (0, 1, 2, 17, 64, 160, 1000)),
        torch.rand(0, device=device),
        torch.randn(132 * 2048 * 5 + 3, device=device),
        torch.randn(1, device=device),  # comes after a call whose draws took two rounds of the generator
    ]


def test_philox_gives_the_published_words() -> None:
    """The words come from kat_vectors, the known answers in the authors' library Random123."""
    zeros = [np.zeros(1, np.uint64)] * 4
    assert [int(word[0]) for word in philox(zeros, 0)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = [np.full(1, 0xFFFFFFFF, np.uint64)] * 4
    words = philox(ones, 0xFFFFFFFFFFFFFFFF)
    assert [int(word[0]) for word in words] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_seed_0_gives_the_first_numbers_that_everybody_knows_from_a_gpu() -> None:
    with CudaDraws(0):
        normal = torch.randn(3, 4, device="cpu")
    expected = [
        [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
        [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
        [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
    ]
    torch.testing.assert_close(normal, torch.tensor(expected), rtol=1e-6, atol=0)
    with CudaDraws(0):
        uniform = torch.rand(6, device="cpu")
    torch.testing.assert_close(
        uniform, torch.tensor([0.3990, 0.5167, 0.0249, 0.9401, 0.9459, 0.7967]), rtol=0, atol=5e-5
    )


def test_numbers_have_the_distribution_that_was_asked_for() -> None:
    with CudaDraws(3):
        normal = torch.randn(200_000, device="cpu").double()
        uniform = torch.rand(200_000, device="cpu").double()
        orders = torch.stack([torch.randperm(4, device="cpu") for _ in range(3000)])
    for moment, expected in ((1, 0), (2, 1), (3, 0), (4, 3)):
        assert abs(normal.pow(moment).mean() - expected) < 0.1
    assert abs(uniform.mean() - 0.5) < 0.01
    assert abs(uniform.std() - 1 / math.sqrt(12)) < 0.01
    assert orders.sort(dim=1).values.equal(torch.arange(4).expand(3000, 4))
    shares = torch.stack([(orders == number).double().mean(0) for number in range(4)])
    assert (shares - 0.25).abs().max() < 0.04


def test_calls_without_a_device_draw_from_the_cpus_generator() -> None:
    torch.manual_seed(5)
    expected = torch.randn(4)
    torch.manual_seed(5)
    with CudaDraws(0):
        torch.randn(9, device="cpu")
        assert torch.randn(4).equal(expected)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", [0, 1, 2**40 + 7])
def test_draws_are_those_of_the_gpu(seed: int) -> None:
    torch.manual_seed(seed)
    expected = draws("cuda")
    with CudaDraws(seed):
        actual = draws("cpu")
    for ours, theirs in zip(actual, expected, strict=True):
        exact = not ours.dtype.is_floating_point
        # Near pi the error of the sine is that of the angle, 2.4e-7; it is multiplied by a radius of up to 6.7.
        torch.testing.assert_close(ours, theirs.cpu(), rtol=0 if exact else 1e-5, atol=0 if exact else 4e-6)

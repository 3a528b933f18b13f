"""Tests bfloat16, tf32 and fused arithmetic in the interpreter under `hardware_arithmetic`, or on a GPU if present."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import ReduceScanOpInterface, TensorHandle

from support.hardware_arithmetic import PATCHES, hardware_arithmetic, to_bfloat16

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# These values round a tie down or up, are the largest finite or round to infinity, are subnormal, or stay unchanged.
EDGES = [
    1.00390625, 1.01171875, 1.0039063, -1.00390625, 3.3895314e38, 3.4e38, 1e-40, 9.2e-41, 0.0, -0.0, float("inf"),
    float("-inf"), float("nan"), 1.0, 255.0, 257.0, 0.1,
]  # fmt: skip


@pytest.fixture
def arithmetic() -> Iterator[None]:
    if DEVICE.type == "cuda":
        yield
    else:
        with hardware_arithmetic():
            yield


as_on_hardware = pytest.mark.usefixtures("arithmetic")


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(shape).to(DEVICE, dtype)


@triton.jit
def _bfloat16_kernel(x, y, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(out + at, a + b)
    tl.store(out + SIZE + at, a * b)
    tl.store(out + 2 * SIZE + at, tl.where(a < b, a, b))
    tl.store(out + 3 * SIZE + at, -a)
    tl.store(out + 4 * SIZE + at, tl.abs(a))


@as_on_hardware
def test_bfloat16_operations_round_as_torch_does() -> None:
    x, y = draw(2, 256, dtype=torch.bfloat16).unbind()
    out = torch.empty(5, 256, dtype=torch.bfloat16, device=DEVICE)
    _bfloat16_kernel[(1,)](x, y, out, 256)
    assert out.equal(torch.stack((x + y, x * y, torch.minimum(x, y), -x, x.abs())))


@triton.jit
def _cast_kernel(x, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at).to(out.dtype.element_ty))


@as_on_hardware
@pytest.mark.parametrize(
    ("source", "target"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.float16, torch.bfloat16),
        (torch.int32, torch.bfloat16),
    ],
)
def test_conversions_of_bfloat16_round_as_torch_does(source: torch.dtype, target: torch.dtype) -> None:
    edges = torch.arange(200, 1000) if source == torch.int32 else torch.tensor(EDGES)
    values = torch.cat((edges, 100 * torch.randn(1024)))[:512].to(DEVICE, source)
    out = torch.empty(512, dtype=target, device=DEVICE)
    _cast_kernel[(1,)](values, out, 512)
    torch.testing.assert_close(out, values.to(target), rtol=0, atol=0, equal_nan=True)
    assert out[:3].ne(values[:3].to(torch.float32) * 0).all()  # this shows that the kernel wrote something


@triton.jit
def _dot_kernel(x, y, out, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a, b = tl.load(x + m[:, None] * K + k[None, :]), tl.load(y + k[:, None] * N + n[None, :])
    tl.store(out + m[:, None] * N + n[None, :], tl.dot(a, b, input_precision=PRECISION))


def dot(x: Tensor, y: Tensor, precision: str | None) -> Tensor:
    out = torch.empty(x.shape[0], y.shape[1], device=DEVICE)
    _dot_kernel[(1,)](x, y, out, precision, x.shape[0], y.shape[1], x.shape[1])
    return out


@as_on_hardware
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_16_bits_are_added_up_in_float32(dtype: torch.dtype) -> None:
    x, y = draw(16, 64, dtype=dtype), draw(64, 32, dtype=dtype)
    expected = (x.double() @ y.double()).float()
    torch.testing.assert_close(dot(x, y, None), expected, rtol=1e-6, atol=1e-5)


@as_on_hardware
def test_operands_in_tf32_lose_their_lower_13_bits_and_are_not_rounded() -> None:
    cut = -0x2000
    x, y = draw(16, 32), draw(32, 16)
    kept = ((x.view(torch.int32) & cut).view(torch.float32), (y.view(torch.int32) & cut).view(torch.float32))
    actual = dot(x, y, "tf32")
    torch.testing.assert_close(actual, (kept[0].double() @ kept[1].double()).float(), rtol=1e-6, atol=1e-5)
    assert (actual - x @ y).abs().max() > 1e-3  # with rounding the error would be half as large
    just_below_2 = torch.full((16, 16), 2.0 - 2.0**-23, device=DEVICE)
    assert dot(just_below_2, torch.eye(16, device=DEVICE), "tf32").unique().tolist() == [2.0 - 2.0**-10]


@as_on_hardware
def test_products_of_float32_are_one_chain_over_k() -> None:
    x = torch.zeros(16, 16, device=DEVICE)
    x[:, :4] = torch.tensor([2.0**24, 1.0, 1.0, -(2.0**24)])
    ones = torch.ones(16, 16, device=DEVICE)
    assert dot(x, ones, "ieee").unique().tolist() == [0.0]  # sums of pairs would give 1 or 2
    assert dot(x.flip(1), ones, "ieee").unique().tolist() == [2.0]


@triton.jit
def _fma_kernel(x, y, z, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.fma(tl.load(x + at), tl.load(y + at), tl.load(z + at)))


@as_on_hardware
def test_a_fused_multiply_add_rounds_once() -> None:
    x, y = draw(2, 256).unbind()
    out = torch.empty(256, device=DEVICE)
    _fma_kernel[(1,)](x, y, -(x * y), out, 256)
    assert out.equal((x.double() * y.double() - (x * y).double()).float())
    assert out.count_nonzero() > 200


def test_a_reduction_of_bfloat16_is_refused() -> None:
    handle = TensorHandle(to_bfloat16(torch.ones(4).numpy()), tl.bfloat16)
    block: Any = tl.tensor(handle, tl.block_type(tl.bfloat16, [4]))
    with hardware_arithmetic(), pytest.raises(AssertionError, match="expected float32, got bfloat16"):
        ReduceScanOpInterface(0, None).check_tensor((block,))


def test_the_interpreter_is_afterwards_what_it_was() -> None:
    def methods() -> list[Any]:
        return [vars(owner)[name] for owner, name in PATCHES]

    before = methods()
    with hardware_arithmetic():
        assert not set(before) & set(methods())
    assert methods() == before

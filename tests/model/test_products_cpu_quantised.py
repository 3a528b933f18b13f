"""Products of quantised weights on a CPU equal those of the weights that they stand for."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from internvl_rt.kernels._int4 import pack_int4
from internvl_rt.model import products_cpu_quantised as products
from internvl_rt.model.linear import Linear, Linear4, Linear8, quantise_to_8_bits
from internvl_rt.model.ops import TORCH
from internvl_rt.model.ops_cpu import cpu_ops
from internvl_rt.model.processor import has_avx512, runs_onednn
from internvl_rt.model.products_cpu_quantised import (
    PackedLinear4,
    pack_quantised,
    quantised_product,
    rows_of_block,
    widen,
)

pytestmark = pytest.mark.skipif(not runs_onednn(), reason="oneDNN has no products for this processor")
SHAPES = [(128, 896), (64, 4864), (192, 96), (50, 96)]
ROWS = [1, 2, 3, 4, 5, 16, 17, 64, 65, 300]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
KINDS = ["int8", "float8", "blocks", *(f"{group}{zeros}" for group in (32, 64, 128) for zeros in ("", " zeros"))]


def linear_of(kind: str, n: int, k: int, *, bias: bool = False) -> Linear8 | Linear4:
    """Makes a random weight: 8 bits with a scale a row or ("blocks") for 128 columns, or 4 with groups and zeros."""
    generator = torch.Generator().manual_seed(n + k)
    dense = Linear(torch.randn(n, k, generator=generator), torch.randn(n, generator=generator) if bias else None)
    if kind in ("int8", "float8", "blocks"):
        linear = quantise_to_8_bits(dense, torch.int8 if kind == "int8" else torch.float8_e4m3fn)
        scale_NG = torch.rand(n, -(-k // 128), generator=generator) + 0.5
        return replace(linear, scale_NG=linear.scale_NG * scale_NG) if kind == "blocks" else linear
    group, _, zeros = kind.partition(" ")
    num_groups = -(-k // int(group))
    number_NK = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
    scale_NG = (torch.rand(n, num_groups, generator=generator) + 0.1).to(torch.float16)
    zero_NG = torch.randint(0, 16, (n, num_groups), dtype=torch.uint8, generator=generator) if zeros else None
    return Linear4(pack_int4(number_NK), scale_NG, zero_NG, dense.bias_N, k, int(group))


def exact(x: Tensor, linear: Linear8 | Linear4) -> Tensor:
    return x.double() @ linear.dense(torch.float32).double().T


def error_of(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def is_fast(linear: Linear8 | Linear4) -> bool:
    """Says whether few rows of bfloat16 are multiplied by one of torch's kernels."""
    return isinstance(linear, PackedLinear4) or linear.weight_NK.dtype == torch.int8


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_is_that_of_the_dense_weight(kind: str, n: int, k: int, dtype: str) -> None:
    """In bfloat16 it is about as near to the exact one as the product of the weight rounded to bfloat16 is."""
    linear = linear_of(kind, n, k)
    packed = pack_quantised(linear, DTYPES[dtype])
    for rows in ROWS:
        x = torch.randn(rows, k).to(DTYPES[dtype])
        expected = exact(x, linear)
        most = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 5e-3}[dtype]
        assert error_of(quantised_product(x, packed, None), expected) < most, rows


@torch.inference_mode()
@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind not in ("float8", "blocks")]
)  # oneDNN multiplies those
def test_a_row_of_a_few_depends_on_no_other(kind: str) -> None:
    packed = pack_quantised(linear_of(kind, 128, 896), torch.bfloat16)
    assert is_fast(packed)
    x = torch.randn(products.ROWS_4 if isinstance(packed, Linear4) else products.ROWS_8, 896).bfloat16()
    together = quantised_product(x, packed, None)
    for start in range(len(x)):
        for stop in range(start + 1, min(start + 6, len(x))):
            assert torch.equal(quantised_product(x[start:stop], packed, None), together[start:stop])


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["int8", "float8", "32", "128 zeros"])
def test_dimensions_in_front_stay_and_a_bias_is_added(kind: str) -> None:
    linear = linear_of(kind, 64, 256, bias=True)
    packed = pack_quantised(linear, torch.float32)
    x = torch.randn(2, 3, 256)
    y = quantised_product(x, packed, linear.bias_N)
    assert y.shape == (2, 3, 64)
    assert error_of(y, exact(x, linear) + linear.bias_N.double()) < 1e-5


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["int8", "float8", "64 zeros"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_in_several_parts_is_multiplied_whole(kind: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, linear = torch.randn(100, 256).to(DTYPES[dtype]), linear_of(kind, 320, 256)
    whole = quantised_product(x, pack_quantised(linear, x.dtype), None)
    monkeypatch.setattr(products, "COPIED", 64 * 256)
    assert error_of(quantised_product(x, pack_quantised(linear, x.dtype), None), whole.double()) < 1e-3


def test_every_float8_number_is_widened_exactly() -> None:
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(16, 16)
    finite = numbers.float().isfinite()
    for dtype in DTYPES.values():
        assert torch.equal(widen(numbers, dtype)[finite].float(), numbers.float()[finite])


def test_scales_are_rounded_in_bfloat16_alone_and_numbers_take_no_new_memory() -> None:
    linear = linear_of("int8", 64, 896)
    packed = pack_quantised(linear, torch.bfloat16)
    assert torch.equal(packed.scale_NG, linear.scale_NG.bfloat16())
    assert packed.weight_NK is linear.weight_NK
    assert pack_quantised(linear, torch.float32).scale_NG is linear.scale_NG
    assert pack_quantised(linear_of("blocks", 64, 896), torch.bfloat16).scale_NG.dtype == torch.float32


@torch.inference_mode()
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["int8", "float8", "blocks", "64", "128 zeros"])
def test_the_table_for_cpus_multiplies_as_the_references_do(kind: str, dtype: str) -> None:
    linear = linear_of(kind, 128, 256, bias=True)
    linear = replace(linear, bias_N=linear.bias_N.to(DTYPES[dtype]))
    ops = cpu_ops(torch.device("cpu"), DTYPES[dtype])
    prepared = ops.prepare_linear(linear)
    most = 1e-5 if dtype == "float32" else 2e-2
    for rows in (1, 70):
        x, residual = (torch.randn(rows, width).to(DTYPES[dtype]) for width in (256, 128))
        for how in ({}, {"bias": False}, {"activation": "gelu"}, {"activation": "swiglu"}):
            expected = TORCH.linear(x, linear, **how)
            assert error_of(ops.linear(x, prepared, **how), expected.double()) < most, (rows, how)
        expected = TORCH.linear(x, linear, residual=residual.clone())
        assert error_of(ops.linear(x, prepared, residual=residual), expected.double()) < most


@torch.inference_mode()
def test_memory_that_begins_anywhere_is_multiplied() -> None:
    """torch's kernel for 8 bits would end the process."""
    x = torch.empty(97).bfloat16()[1:].view(1, 96).copy_(torch.randn(96))
    for kind in ("int8", "32 zeros"):
        linear = linear_of(kind, 64, 96)
        if isinstance(linear, Linear8):
            weight_NK = torch.empty(64 * 96 + 1, dtype=torch.int8)[1:].view(64, 96).copy_(linear.weight_NK)
            linear = replace(linear, weight_NK=weight_NK)
        packed = pack_quantised(linear, torch.bfloat16)
        assert error_of(quantised_product(x, packed, None), exact(x, linear)) < 5e-3
        assert quantised_product(x[:0], packed, None).shape == (0, 64)


@torch.inference_mode()
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind[0].isdigit()])
def test_packed_numbers_take_half_a_byte_and_unpack_to_the_same_weight(kind: str) -> None:
    linear = linear_of(kind, 192, 896)
    packed = pack_quantised(linear, torch.float32)
    assert isinstance(packed, PackedLinear4)
    assert packed.words_NW.nbytes == 192 * 896 // 2
    assert pack_quantised(packed, torch.float32) is packed
    assert torch.allclose(packed.dense(torch.float32), linear.dense(torch.float32), rtol=1e-6, atol=1e-6)


def test_avx2_has_blocks_of_32_rows() -> None:
    """torch takes them for this processor in a process of its own."""
    program = (
        "import torch\n"
        "from internvl_rt.kernels._int4 import pack_int4\n"
        "from internvl_rt.model.linear import Linear4\n"
        "from internvl_rt.model.products_cpu_quantised import pack_quantised, quantised_product, rows_of_block\n"
        "numbers = torch.randint(0, 16, (128, 256), dtype=torch.uint8)\n"
        "linear = Linear4(pack_int4(numbers), torch.rand(128, 2), None, None, 256, 128)\n"
        "packed = pack_quantised(linear, torch.bfloat16)\n"
        "x = torch.randn(100, 256).bfloat16()\n"
        "expected = x.float() @ linear.dense(torch.float32).T\n"
        "for rows in (1, 100):\n"
        "    error = quantised_product(x[:rows], packed, None).float() - expected[:rows]\n"
        "    assert error.norm() < 5e-3 * expected[:rows].norm(), rows\n"
        "print(rows_of_block())\n"
    )
    env = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "32\n"), done.stderr
    assert rows_of_block() == (64 if has_avx512() else 32)

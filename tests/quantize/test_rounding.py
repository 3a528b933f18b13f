"""Rounded weights lie in the layout of compressed-tensors, which the loader reads back to the same numbers."""

import pytest
import torch
from safetensors.torch import save_file

from internvl_rt.checkpoint.folder import open_checkpoint
from internvl_rt.checkpoint.quantization import Scheme
from internvl_rt.kernels._int4 import unpack_int4
from internvl_rt.model.stored_linear import read_part, stored_tensors
from internvl_rt.quantize.rounding import Rounded, pack_columns, round_fp8, round_int4

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def weight(n=16, k=128):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(1)) / 9


def test_eight_numbers_are_a_word_with_the_first_one_in_its_low_bits():
    assert pack_columns(torch.arange(8, dtype=torch.uint8)[None]).tolist() == [[0x76543210]]


def test_zeros_of_rows_are_packed_along_the_rows():
    zero_NG = torch.arange(16, dtype=torch.uint8)[:, None]
    rounded = Rounded(torch.zeros(16, 32, dtype=torch.uint8), torch.ones(16, 1), zero_NG)
    stored = rounded.stored(torch.arange(16))["weight_zero_point"]
    assert [word & 0xFFFFFFFF for (word,) in stored.tolist()] == [0x76543210, 0xFEDCBA98]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_number_of_a_row_becomes_448(dtype):
    rounded = round_fp8(weight(), dtype)
    assert rounded.scale_NG.dtype == dtype
    assert rounded.numbers_NK.float().abs().amax(1).tolist() == [448.0] * 16
    assert ((rounded.dense() - weight()).abs() <= weight().abs() / 16 + 1e-4).all()  # a step of FP8 is an eighth


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("asymmetric", [False, True])
def test_numbers_of_a_group_are_half_a_step_off_at_most(asymmetric, dtype):
    weight_NK = weight() + 0.05 * asymmetric
    rounded = round_int4(weight_NK, 32, asymmetric=asymmetric, dtype=dtype)
    step = rounded.scale_NG.float().repeat_interleave(32, 1)
    # The largest number of a symmetric group is 7.5 steps, but 7 is the last; scales are rounded in 16 bits.
    assert ((rounded.dense() - weight_NK).abs() <= step * (0.51 if dtype == torch.float32 else 0.56)).all()
    assert (rounded.zero_NG is not None) == asymmetric


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_and_groups_of_zeros_stay_zeros(dtype):
    zeros = torch.zeros(8, 64)
    for rounded in (
        round_fp8(zeros, dtype),
        round_int4(zeros, 32, asymmetric=False, dtype=dtype),
        round_int4(zeros, 32, asymmetric=True, dtype=dtype),
    ):
        assert torch.equal(rounded.dense(), zeros)


@pytest.mark.parametrize("kind", ["fp8", "symmetric", "asymmetric"])
def test_the_loader_reads_back_the_rows_of_a_module(tmp_path, kind):
    rows = torch.tensor([*range(8, 16), *range(8)])  # as of a tensor whose rows are in another order
    if kind == "fp8":
        rounded, scheme = round_fp8(weight(), torch.bfloat16), Scheme("compressed", 8, is_float=True)
    else:
        rounded = round_int4(weight(), 32, asymmetric=kind == "asymmetric", dtype=torch.bfloat16)
        scheme = Scheme("packed", 4, group=32, symmetric=kind == "symmetric")
    stored = rounded.stored(rows)
    for last, expected in stored_tensors(scheme, 16, 128).items():
        assert tuple(stored[last].shape) in expected.shapes
        assert stored[last].dtype in expected.dtypes
    save_file({f"m.{last}": tensor for last, tensor in stored.items()}, tmp_path / "model.safetensors")
    part = read_part(open_checkpoint(tmp_path), "m", scheme, 16, 128, torch.device("cpu"))
    numbers = part.numbers if kind == "fp8" else unpack_int4(part.numbers, 128)
    found = Rounded(numbers, part.scale_NG, part.zero_NG)
    assert torch.equal(found.dense(), rounded.dense()[rows])

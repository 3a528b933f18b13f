"""Tests `_int4.py` and `dequantise` beyond its contract: the layout of words, literal values, refusals."""

from typing import Any

import pytest
import torch
from torch import Tensor

from internvl_rt.kernels._int4 import pack_int4, unpack_int4
from internvl_rt.kernels.dequantise import dequantise, dequantise_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
META = torch.device("meta")


def words(*numbers: int) -> Tensor:
    """Packs one row of numbers."""
    return pack_int4(torch.tensor([numbers], dtype=torch.uint8, device=DEVICE))


def test_nibble_i_of_word_j_is_column_16_i_plus_j() -> None:
    numbers = torch.zeros(2, 130, dtype=torch.uint8)
    numbers[0, [0, 16, 32, 112]] = torch.tensor([1, 2, 3, 15], dtype=torch.uint8)  # in word 0: nibbles 0, 1, 2 and 7
    numbers[1, 5 + 16 * 4] = 9
    numbers[1, 129] = 7  # word 1 of the second chunk
    expected = torch.zeros(2, 32, dtype=torch.int32)
    expected[0, 0] = 0xF0000321 - 2**32
    expected[1, 5], expected[1, 17] = 0x90000, 7
    assert torch.equal(pack_int4(numbers), expected)


@pytest.mark.parametrize("k", [1, 8, 96, 128, 160, 300])
def test_numbers_come_back_from_words(k: int) -> None:
    numbers = torch.randint(0, 16, (3, k), dtype=torch.uint8, device=DEVICE)
    packed = pack_int4(numbers)
    assert (packed.dtype, packed.shape) == (torch.int32, (3, 16 * -(-k // 128)))
    assert packed.is_contiguous()
    assert torch.equal(unpack_int4(packed, k), numbers)
    assert torch.equal(pack_int4(unpack_int4(packed, k)), packed)
    assert not unpack_int4(packed, 128)[:, k:].any()
    meta = pack_int4(numbers.to(META))
    assert (meta.shape, unpack_int4(meta, k).shape) == (packed.shape, numbers.shape)


def row(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor([values], dtype=dtype, device=DEVICE)


def test_four_bits_lose_their_zero_before_they_are_scaled() -> None:
    numbers, zero = words(*[8] * 32, 0, 15, 3), row(8, 3, dtype=torch.uint8)
    scale = row(0.5, 0.25, dtype=torch.bfloat16)
    for function in (dequantise_reference, dequantise):
        y = function(numbers, scale, zero, 35, group=32, dtype=torch.float16)
        assert (y.dtype, y.shape) == (torch.float16, (1, 35))
        assert y[0, 32:].tolist() == [-0.75, 3.0, 0.0]
        assert function(numbers, scale, None, 35, group=32, dtype=torch.float32)[0, 31:].tolist() == [
            0,
            -2,
            1.75,
            -1.25,
        ]


def test_every_fp8_number_and_every_int8_number_has_its_value() -> None:
    bits = torch.arange(256, device=DEVICE).to(torch.uint8)
    fp8 = bits[bits % 128 != 127].view(torch.float8_e4m3fn)[None]
    for numbers in (fp8, bits.view(torch.int8)[None]):
        scale = torch.ones(1, 1, device=DEVICE)
        y = dequantise(numbers, scale, None, numbers.shape[1], dtype=torch.float32)
        assert torch.equal(y, numbers.float())
    assert fp8.float()[0, 1] == 2.0**-9  # the smallest subnormal is among them


def test_a_scale_serves_128_columns_or_a_row() -> None:
    numbers = torch.ones(1, 200, dtype=torch.int8, device=DEVICE)
    for scale, expected in ((row(2, 3), [2.0] * 128 + [3.0] * 72), (row(2), [2.0] * 200)):
        for function in (dequantise_reference, dequantise):
            assert function(numbers, scale, None, 200, dtype=torch.bfloat16)[0].tolist() == expected


INT8: dict[str, Any] = {
    "numbers": torch.zeros(2, 200, dtype=torch.int8, device=DEVICE),
    "scale_NG": torch.ones(2, 2, device=DEVICE),
    "zero_NG": None,
    "num_columns": 200,
    "dtype": torch.float16,
}
INT4 = INT8 | {
    "numbers": torch.zeros(2, 32, dtype=torch.int32, device=DEVICE),
    "scale_NG": torch.ones(2, 7, dtype=torch.float16, device=DEVICE),
    "group": 32,
}
ZERO = torch.zeros(2, 2, dtype=torch.uint8, device=DEVICE)
REFUSALS: list[tuple[str, dict[str, Any]]] = [
    ("numbers: expected one of .* got torch.float16", INT8 | {"numbers": torch.zeros(2, 200).half()}),
    ("numbers: expected two dimensions", INT8 | {"numbers": INT8["numbers"][0]}),
    (r"numbers: expected shape \(2, 201\)", INT8 | {"num_columns": 201}),
    (r"numbers: expected shape \(2, 32\)", INT4 | {"numbers": INT4["numbers"][:, :16]}),
    ("numbers: expected a contiguous last dimension", INT8 | {"numbers": INT8["numbers"].t().contiguous().t()}),
    ("dtype: expected one of .* got torch.float64", INT8 | {"dtype": torch.float64}),
    ("num_columns: expected 1 or more, got 0", INT8 | {"num_columns": 0}),
    ("group: expected 128 with 8-bit numbers, got 64", INT8 | {"group": 64}),
    ("group: expected one of .* got 16", INT4 | {"group": 16}),
    ("zero_NG: expected None with 8-bit numbers", INT8 | {"zero_NG": ZERO}),
    (r"zero_NG: expected shape \(2, 7\)", INT4 | {"zero_NG": ZERO}),
    (r"scale_NG: expected shape \(2, 2\)", INT8 | {"scale_NG": torch.ones(2, 3, device=DEVICE)}),
    (r"scale_NG: expected shape \(2, 7\)", INT4 | {"scale_NG": INT4["scale_NG"][:, :6]}),
    ("scale_NG: expected torch.float32", INT8 | {"scale_NG": INT8["scale_NG"].half()}),
    ("scale_NG: expected one of .* got torch.float64", INT4 | {"scale_NG": INT4["scale_NG"].double()}),
    (r"out: expected shape \(2, 200\)", INT8 | {"out": torch.zeros(1, 200, dtype=torch.float16, device=DEVICE)}),
]


@pytest.mark.parametrize(("message", "arguments"), REFUSALS, ids=[message[:40] for message, _ in REFUSALS])
def test_an_argument_that_does_not_fit_is_named(message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        dequantise(**arguments)

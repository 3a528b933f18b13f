"""Tests `copy_blocks` beyond its contract: refusals, ids outside the pool, bytes of any dtype, large offsets."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from internvl_rt.kernels._launch import TARGETS
from internvl_rt.kernels.copy_blocks import SPEC, copy_blocks, plan_copy_blocks

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = (2, 2, 6, 2, 4, 8)  # layers, keys and values, B, G, P, C


def ids(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def random_pool(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """Returns a pool of random bytes that are valid values of `dtype`; some are NaN."""
    torch.manual_seed(0)
    shape = (*shape[:-1], shape[-1] * dtype.itemsize)
    return torch.randint(0, 2 if dtype == torch.bool else 256, shape, dtype=torch.uint8, device=DEVICE).view(dtype)


def bytes_of(pool: Tensor) -> Tensor:
    return pool.contiguous().view(torch.uint8)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pool_LKBGPC": zeros(*SHAPE[1:])}, r"pool_LKBGPC: expected shape \[layers, 2, B, G, P, C\], got \(2, 6, 2,"),
        ({"pool_LKBGPC": zeros(*SHAPE[:5], 0)}, "pool_LKBGPC: expected blocks of some elements"),
        ({"pool_LKBGPC": zeros(*SHAPE).mT}, "pool_LKBGPC: expected blocks that are contiguous, got strides"),
        ({"pool_LKBGPC": zeros(*SHAPE)[..., :7]}, "pool_LKBGPC: expected blocks that are contiguous, got strides"),
        ({"pool_LKBGPC": zeros(*SHAPE).transpose(2, 3)}, "pool_LKBGPC: expected blocks that are contiguous, got"),
        (
            {"pool_LKBGPC": zeros(2, 2, 1, 2, 4, 8).expand(SHAPE)},
            "pool_LKBGPC: expected blocks that do not overlap, got strides",
        ),
        (
            {"pool_LKBGPC": torch.empty(1, 1, 0, 2**14, 2**14, 1, device="meta")},
            "pool_LKBGPC: expected blocks of at most 536862720 bytes, got 1073741824",
        ),
        (
            {"pool_LKBGPC": zeros(1, 1, 1, 1, 1, 1).expand(2**15, 2, 1, 1, 1, 1)},
            r"pool_LKBGPC: expected layers \* 2 of at most 65535, got 65536",
        ),
        ({"source_N": ids(0, 1, 2)[None]}, r"source_N: expected indices \[N\], got \(1, 3\)"),
        ({"destination_N": ids(3, 4, 5)[None]}, r"destination_N: expected indices \[N\], got \(1, 3\)"),
        ({"source_N": ids(0, 1)}, r"destination_N: expected shape \(2,\), got \(3,\)"),
        ({"source_N": ids(0, 1, 2, dtype=torch.uint8)}, "source_N: expected one of .*int64.*, got torch.uint8"),
        ({"destination_N": zeros(3)}, "destination_N: expected one of .*int64.*, got torch.float32"),
        ({"source_N": ids(0, 0, 1, 1, 2, 2)[::2]}, "source_N: expected a contiguous last dimension"),
        ({"destination_N": ids(3, 4, 5).to("meta")}, "destination_N: expected a tensor on .*, got one on meta"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    pool = random_pool()
    before = pool.clone()
    with pytest.raises(ValueError, match=f"^{message}"):
        copy_blocks(**{"pool_LKBGPC": pool, "source_N": ids(0, 1, 2), "destination_N": ids(3, 4, 5), **changes})
    assert torch.equal(bytes_of(pool), bytes_of(before))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_pairs_with_an_id_that_is_not_there_are_left_out(dtype: torch.dtype) -> None:
    whole = random_pool()
    pool, before = whole[:, :, 1:5], whole.clone()  # the pool is four blocks between others
    far = 2**31 - 1 if dtype == torch.int32 else 2**32
    source = ids(0, -1, 1, 4, 1, far, 1, -far, 2, dtype=dtype)
    destination = ids(-1, 3, 4, 3, far, 3, -far, 3, 0, dtype=dtype)
    copy_blocks(pool, source, destination)
    before[:, :, 1] = before[:, :, 3]
    assert torch.equal(bytes_of(whole), bytes_of(before))


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bool,
        torch.int8,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int16,
        torch.bfloat16,
        torch.int64,
        torch.float64,
        torch.complex128,
    ],
)
def test_bytes_of_any_dtype_are_copied(dtype: torch.dtype) -> None:
    pool = random_pool(dtype)
    expected = bytes_of(pool).clone()
    expected[:, :, [0, 3]] = expected[:, :, [5, 1]]
    copy_blocks(pool, ids(5, 1, 2), ids(0, 3, 2))  # the last pair copies block 2 onto itself
    assert torch.equal(bytes_of(pool), expected)


def test_a_pool_may_be_a_slice_of_layers_or_of_keys() -> None:
    whole = random_pool(torch.float16, (4, *SHAPE[1:]))
    expected = whole.clone()
    expected[1::2, 1:, 4] = expected[1::2, 1:, 2]
    copy_blocks(whole[1::2, 1:], ids(2), ids(4))
    assert torch.equal(bytes_of(whole), bytes_of(expected))


def test_a_pool_without_blocks_takes_no_pairs() -> None:
    whole = random_pool(torch.float16, SHAPE)
    expected = whole.clone()
    copy_blocks(whole[:, :, :0], ids(), ids())
    copy_blocks(whole[:, :, :0], ids(0), ids(1))
    assert torch.equal(bytes_of(whole), bytes_of(expected))


@pytest.mark.parametrize("dimension", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])  # the kernel moves bytes, and words of 4 bytes
def test_blocks_may_lie_more_than_2_to_the_31_elements_behind_the_first(
    dtype: torch.dtype, dimension: int, tmp_path: Path
) -> None:
    """On the CPU the pool is in a sparse file, of which only a few pages are written. The memory begins 2^31 elements
    before the pool, so an offset that overflows int32 reads a wrong value and does not crash."""
    shape = [2, 2, 2, 1, 3, 5]
    shape[dimension] = 4
    small = random_pool(dtype, tuple(shape))
    stride, first = 2**30 + 16, 2**31
    strides = [*small.stride()]
    strides[dimension] = stride
    size = first + 3 * stride + math.prod(shape)
    if DEVICE.type == "cpu":
        memory = torch.from_file(str(tmp_path / "pool"), shared=True, size=size, dtype=dtype)
    else:
        memory = torch.empty(size, dtype=dtype, device=DEVICE)
    far = memory.as_strided(shape, strides, first).copy_(small)
    last = shape[2] - 1
    for pool in (small, far):
        copy_blocks(pool, ids(last), ids(0))
        pool[:, :, last] = 0
        copy_blocks(pool, ids(0), ids(last))
    assert torch.equal(bytes_of(far), bytes_of(small))
    assert torch.equal(small[:, :, 0], small[:, :, last])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
def test_pools_of_real_models_are_moved_in_words(dtype: torch.dtype) -> None:
    for case in SPEC.model_cases:
        inputs = SPEC.make_inputs(case, dtype, torch.device("meta"))
        (launch,) = plan_copy_blocks(**inputs, target=TARGETS[90])
        assert launch.args["pool"].dtype == torch.int32
        assert launch.args["SIZE"] * 4 == case["G"] * case["P"] * case["C"] * dtype.itemsize

"""Tests `embed_tokens` beyond its contract: invalid ids and indices, large offsets, and what the launcher refuses."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from internvl_rt.kernels._contract import Case
from internvl_rt.kernels.embed_tokens import FIRST_VISUAL_ID, SPEC, embed_tokens

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def inputs() -> dict[str, Any]:
    torch.manual_seed(0)
    return SPEC.make_inputs(Case("small", {"T": 5, "R": 3, "V": 8, "D": 24, "X": 3}), torch.float16, DEVICE)


def test_ids_and_indices_that_lead_nowhere_give_zeros() -> None:
    """A kernel that reads outside the embedding or outside `drawn_R` finds other values there, and the test fails."""
    rows = torch.full((10, 24), math.nan, device=DEVICE)
    rows[3:7] = torch.randn(4, 24)
    drawn = torch.tensor([1, 2, -1, 4, 2**32, 3, 1], device=DEVICE)
    ids = [0, 3, 4, 2**31 - 1, -1, -2, -3, -4, -5, -(2**31)]
    token_id_T = torch.tensor(ids, dtype=torch.int32, device=DEVICE)
    x_TD = embed_tokens(token_id_T, drawn[1:5], rows[3:7])
    assert torch.equal(x_TD[[0, 1, 4]], rows[3:7][[0, 3, 2]])
    assert torch.equal(x_TD[[2, 3, 5, 6, 7, 8, 9]], torch.zeros(7, 24, device=DEVICE))


def test_an_id_behind_the_visual_tokens_gives_zeros_and_a_drawn_one_is_never_visual() -> None:
    rows = torch.full((6, 24), math.nan, device=DEVICE)
    rows[:4], visual = torch.randn(4, 24), torch.randn(2, 24, device=DEVICE)
    drawn = torch.tensor([4, 1], device=DEVICE)
    first = FIRST_VISUAL_ID
    token_id_T = torch.tensor([first + 1, first, first + 2, 2**31 - 1, 4, 3, -1, -2], dtype=torch.int32, device=DEVICE)
    zeros = torch.zeros(24, device=DEVICE)
    expected = torch.stack([visual[1], visual[0], zeros, zeros, zeros, rows[3], zeros, rows[1]])
    assert torch.equal(embed_tokens(token_id_T, drawn, rows[:4], visual), expected)


def test_without_drawn_tokens_known_ids_are_embedded(inputs: dict[str, Any]) -> None:
    inputs |= {"token_id_T": inputs["token_id_T"].clamp(0, 7), "drawn_R": inputs["drawn_R"][:0]}
    assert torch.equal(embed_tokens(**inputs), inputs["embedding_VD"][inputs["token_id_T"]])


@pytest.mark.parametrize("argument", ["embedding_VD", "visual_XD", "out"])
def test_rows_may_lie_more_than_2_to_the_31_elements_behind_the_first(
    argument: str, inputs: dict[str, Any], tmp_path: Any
) -> None:
    expected = embed_tokens(**inputs)
    given = torch.zeros_like(expected) if argument == "out" else inputs[argument]
    count, stride = len(given), 2**30 + 16
    size = (count - 1) * stride + 24
    if DEVICE.type == "cpu":  # only a few pages of this sparse file are written
        memory = torch.from_file(str(tmp_path / "rows"), shared=True, size=size, dtype=given.dtype)
    else:
        memory = torch.empty(size, dtype=given.dtype, device=DEVICE)
    inputs[argument] = memory.as_strided((count, 24), (stride, 1)).copy_(given)
    assert torch.equal(embed_tokens(**inputs), expected)


REFUSALS: list[tuple[str, Callable[[Tensor], Tensor], str]] = [
    ("embedding_VD", torch.Tensor.double, "expected one of .*torch.float32.*, got torch.float64"),
    ("embedding_VD", lambda t: t[0], r"expected rows \[V, D\], got \(24,\)"),
    ("embedding_VD", lambda t: t.repeat(1, 2)[:, ::2], "expected a contiguous last dimension, got strides"),
    ("token_id_T", lambda t: t[None], r"expected ids \[T\], got \(1, 5\)"),
    ("token_id_T", torch.Tensor.long, "expected torch.int32, got torch.int64"),
    ("token_id_T", lambda t: t.repeat_interleave(2)[::2], "expected a contiguous last dimension, got strides"),
    ("token_id_T", lambda t: t.to("meta"), "expected a tensor on .*, got one on meta"),
    ("drawn_R", lambda t: t[None], r"expected ids \[R\], got \(1, 3\)"),
    ("drawn_R", torch.Tensor.int, "expected torch.int64, got torch.int32"),
    ("drawn_R", lambda t: t.repeat_interleave(2)[::2], "expected a contiguous last dimension, got strides"),
    ("drawn_R", lambda t: t.to("meta"), "expected a tensor on .*, got one on meta"),
    ("visual_XD", lambda t: t[0], r"expected rows \[X, D\], got \(24,\)"),
    ("visual_XD", lambda t: t[:, 1:], r"expected shape \(3, 24\), got \(3, 23\)"),
    ("visual_XD", torch.Tensor.float, "expected torch.float16, got torch.float32"),
    ("visual_XD", lambda t: t.to("meta"), "expected a tensor on .*, got one on meta"),
    ("out", lambda t: t[:-1], r"expected shape \(5, 24\), got \(4, 24\)"),
    ("out", torch.Tensor.float, "expected torch.float16, got torch.float32"),
    ("out", lambda t: t[:1].expand(5, 24), "expected rows that do not overlap, got strides"),
    ("out", lambda t: t.to("meta"), "expected a tensor on .*, got one on meta"),
]


@pytest.mark.parametrize(("argument", "change", "message"), REFUSALS)
def test_an_argument_that_does_not_fit_is_refused_by_name(
    argument: str, change: Callable[[Tensor], Tensor], message: str, inputs: dict[str, Any]
) -> None:
    inputs["out"] = torch.zeros(5, 24, dtype=torch.float16, device=DEVICE)
    inputs[argument] = change(inputs[argument])
    with pytest.raises(ValueError, match=f"^{argument}: {message}"):
        embed_tokens(**inputs)

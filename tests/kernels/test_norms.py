"""Tests norms and the other row-wise operations beyond their contracts, and what their launchers refuse."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from internvl_rt.kernels import add_norm, layer_norm, rms_norm, swiglu, unshuffle_norm
from internvl_rt.kernels._contract import Case, KernelSpec

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODULES = (layer_norm, rms_norm, add_norm, unshuffle_norm, swiglu)
SPECS = {module.SPEC.name: module.SPEC for module in MODULES}
VECTORS = ("bias_D", "scale_D", "norm_bias_D")
SMALL = {
    "layer_norm": {"R": 3, "D": 24},
    "rms_norm": {"R": 3, "D": 24},
    "add_norm": {"R": 3, "D": 24, "vectors": VECTORS},
    "unshuffle_norm": {"I": 3, "side": 1, "E": 6},
    "swiglu": {"T": 3, "F": 12},
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def inputs_of(operation: str, **sizes: Any) -> dict[str, Any]:
    return SPECS[operation].make_inputs(Case("small", SMALL[operation] | sizes), torch.float16, DEVICE)


def results_of(spec: KernelSpec, inputs: dict[str, Any]) -> list[Tensor]:
    """Runs the operation on copies of its in-place arguments; returns these arguments, then its result."""
    inputs = {name: value.clone() if name in spec.in_place else value for name, value in inputs.items()}
    returned = spec.launcher(**inputs)
    return [*(inputs[name] for name in spec.in_place), *([] if returned is None else [returned])]


def misfits(axis_length: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """Maps each error message to a change of a vector or matrix argument that must cause it."""
    return {
        f"expected shape .*, got .*{axis_length}": lambda t: t[..., :-1],
        "expected torch.float16, got torch.float32": torch.Tensor.float,
        "expected a contiguous last dimension, got strides": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
        "expected a tensor on .*, got one on meta": lambda t: t.to("meta"),
    }


REFUSALS: list[tuple[str, str, Callable[[Any], Any], str]] = [
    *(
        (operation, argument, change, message)
        for operation, arguments in (
            ("layer_norm", ("weight_D", "bias_D", "out")),
            ("rms_norm", ("weight_D", "out")),
            ("add_norm", ("y_RD", "weight_D", *VECTORS, "out")),
            ("unshuffle_norm", ("weight_D", "bias_D", "out")),
        )
        for argument in arguments
        for message, change in misfits("23").items()
    ),
    *(("swiglu", "out", change, message) for message, change in misfits("11").items()),
    *(
        (operation, argument, change, message)
        for operation, argument in (
            ("layer_norm", "x"),
            ("rms_norm", "x"),
            ("add_norm", "x_RD"),
            ("unshuffle_norm", "x_RE"),
            ("swiglu", "gate_up_T2F"),
        )
        for change, message in (
            (torch.Tensor.double, "expected one of .*torch.float32.*, got torch.float64"),
            (torch.Tensor.int, "expected one of .*, got torch.int32"),
            (lambda t: t.repeat_interleave(2, dim=1)[:, ::2], "expected a contiguous last dimension, got strides"),
        )
    ),
    *(
        (operation, argument, change, f"expected {expected}, got {given}")
        for operation, argument, expected in (
            ("layer_norm", "x", "a width from 1 to 16384"),
            ("rms_norm", "x", "a width from 1 to 16384"),
            ("add_norm", "x_RD", "a width from 1 to 16384"),
        )
        for change, given in ((lambda t: t[:, :0], 0), (lambda t: t.repeat(1, 1000)[:, :16385], 16385))
    ),
    (
        "layer_norm",
        "x",
        lambda t: t.repeat(2, 2).view(2, 3, 48)[..., :24].transpose(0, 1),
        "expected rows at one stride",
    ),
    ("rms_norm", "x", lambda t: t.repeat(2, 2).view(2, 3, 48)[..., :24].transpose(0, 1), "expected rows at one stride"),
    ("swiglu", "gate_up_T2F", lambda t: t.repeat(2, 1).view(2, 3, 24).transpose(0, 1), "expected rows at one stride"),
    ("swiglu", "gate_up_T2F", lambda t: t[:, :-1], "expected an even width of 2 or more, got 23"),
    ("swiglu", "gate_up_T2F", lambda t: t[:, :0], "expected an even width of 2 or more, got 0"),
    ("add_norm", "x_RD", lambda t: t[None], r"expected rows \[R, D\], got \(1, 3, 24\)"),
    ("add_norm", "x_RD", lambda t: t[:1].expand(3, 24), "expected rows that do not overlap, got strides"),
    ("add_norm", "y_RD", lambda t: t[:2], r"expected shape \(3, 24\), got \(2, 24\)"),
    ("unshuffle_norm", "x_RE", lambda t: t[0], r"expected rows \[R, E\], got"),
    ("unshuffle_norm", "x_RE", lambda t: t[1:], r"expected 3 tiles of 1 \+ \(a multiple of 2\)\^2 rows, got 14 rows"),
    ("unshuffle_norm", "x_RE", lambda t: t[:9], "expected 3 tiles .*, got 9 rows"),  # tiles of 2 patches
    ("unshuffle_norm", "x_RE", lambda t: t[:6], "expected 3 tiles .*, got 6 rows"),  # tiles of 1 patch
    ("unshuffle_norm", "x_RE", lambda t: t[:0], "expected 3 tiles .*, got 0 rows"),
    (
        "unshuffle_norm",
        "x_RE",
        lambda t: t.repeat(1, 2800)[:, :16385],
        r"expected factor\^2 \* E from 1 to 65536, got 65540",
    ),
    ("unshuffle_norm", "num_tiles", lambda _: 0, "x_RE: expected 0 tiles .*, got 15 rows"),
    ("unshuffle_norm", "num_tiles", lambda _: -1, "expected 0 or more, got -1"),
    ("unshuffle_norm", "factor", lambda _: 3, r"expected one of \[1, 2, 4\], got 3"),
    ("unshuffle_norm", "version", lambda _: "v3", "expected v1 or v2, got v3"),
]


@pytest.mark.parametrize(("operation", "argument", "change", "message"), REFUSALS)
def test_an_argument_that_does_not_fit_is_refused_by_name(
    operation: str, argument: str, change: Callable[[Any], Any], message: str
) -> None:
    spec, inputs = SPECS[operation], inputs_of(operation)
    given = inputs[argument] if argument != "out" else results_of(spec, inputs)[-1]
    before = {name: inputs[name].clone() for name in spec.in_place}
    with pytest.raises(ValueError, match=message if ": expected" in message else f"^{argument}: {message}"):
        spec.launcher(**inputs | {argument: change(given)})
    assert all(torch.equal(inputs[name], value) for name, value in before.items())


def far_rows(rows: Tensor, folder: Path) -> Tensor:
    """Copies the rows 2^30 + 16 elements from each other, so that in int32 the offset of the third is negative.

    The memory begins 2^31 elements before the first row, so an offset that overflows int32 reads a wrong value and
    does not crash. On the CPU it is a sparse file, of which only a few pages are written.
    """
    width = rows.shape[-1]
    count, stride, first = rows.numel() // width, 2**30 + 16, 2**31
    size = first + (count - 1) * stride + width
    if DEVICE.type == "cpu":
        memory = torch.from_file(str(folder / "rows"), shared=True, size=size, dtype=rows.dtype)
    else:
        memory = torch.empty(size, dtype=rows.dtype, device=DEVICE)
    return memory.as_strided((count, width), (stride, 1), first).copy_(rows.view(count, width)).view(rows.shape)


@pytest.mark.parametrize(
    ("operation", "argument", "sizes"),
    [
        ("layer_norm", "x", {}),
        ("layer_norm", "out", {}),
        ("rms_norm", "x", {}),
        ("rms_norm", "out", {}),
        ("add_norm", "x_RD", {}),
        ("add_norm", "y_RD", {}),
        ("add_norm", "out", {}),
        ("unshuffle_norm", "x_RE", {"I": 1}),
        ("unshuffle_norm", "out", {}),
        ("swiglu", "gate_up_T2F", {}),
        ("swiglu", "out", {}),
    ],
)
def test_rows_may_lie_more_than_2_to_the_31_elements_behind_the_first(
    operation: str, argument: str, sizes: dict[str, Any], tmp_path: Path
) -> None:
    spec, inputs = SPECS[operation], inputs_of(operation, **sizes)
    expected = results_of(spec, inputs)
    given = torch.zeros_like(expected[-1]) if argument == "out" else inputs[argument]
    inputs[argument] = far_rows(given, tmp_path)
    returned = spec.launcher(**inputs)
    actual = [*(inputs[name] for name in spec.in_place), *([] if returned is None else [returned])]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("vectors", [(), VECTORS])
def test_add_norm_equals_the_sum_and_the_norm_of_the_stored_sum_to_the_bit(
    vectors: tuple[str, ...], dtype: torch.dtype
) -> None:
    case = Case("shifted", {"R": 3, "D": 1000, "vectors": vectors, "mean": 300.0})
    inputs = add_norm.SPEC.make_inputs(case, dtype, DEVICE)
    normed = add_norm.add_norm(**inputs)
    if vectors:
        expected = layer_norm.layer_norm(inputs["x_RD"], inputs["weight_D"], inputs["norm_bias_D"], inputs["eps"])
    else:
        expected = rms_norm.rms_norm(inputs["x_RD"], inputs["weight_D"], inputs["eps"])
    assert torch.equal(normed, expected)


@pytest.mark.parametrize("vectors", [(), VECTORS])
def test_add_norm_may_write_over_its_update(vectors: tuple[str, ...]) -> None:
    inputs = inputs_of("add_norm", vectors=vectors)
    x, expected = results_of(add_norm.SPEC, inputs)
    assert add_norm.add_norm(**inputs, out=inputs["y_RD"]) is inputs["y_RD"]
    assert torch.equal(inputs["y_RD"], expected)
    assert torch.equal(inputs["x_RD"], x)


def test_rms_norm_rounds_the_quotient_before_it_applies_the_weight() -> None:
    x = torch.tensor([1.0, 1.0, 5.0]).repeat(2, 32).half().to(DEVICE)  # the mean square is 9: quotients 1/3 and 5/3
    weight = torch.randn(96).half().to(DEVICE)
    actual = rms_norm.rms_norm(x, weight, 0.0)
    assert torch.equal(actual, (x.float() / 3).half() * weight)
    assert not torch.equal(actual, (x.float() / 3 * weight.float()).half())


def test_rms_norm_of_rows_whose_squares_overflow_is_zero_as_in_the_reference() -> None:
    x, weight = torch.full((2, 24), 1e30, device=DEVICE), torch.ones(24, device=DEVICE)
    actual = rms_norm.rms_norm(x, weight, 1e-6)
    assert torch.equal(actual, rms_norm.rms_norm_reference(x, weight, 1e-6))
    assert torch.equal(actual, torch.zeros_like(x))


def test_swiglu_rounds_silu_before_it_gates() -> None:
    packed = torch.randn(4, 2048).half().to(DEVICE)
    gate, up = packed.chunk(2, dim=1)
    silu = torch.nn.functional.silu(gate.float())
    actual = swiglu.swiglu(packed)
    assert (actual == silu.half() * up).double().mean() > 0.99  # the exponential's last bit may change a rounding
    assert (actual == (silu * up.float()).half()).double().mean() < 0.9


@pytest.mark.parametrize("operation", ["layer_norm", "rms_norm", "add_norm"])
def test_a_row_does_not_depend_on_the_rows_beside_it(operation: str) -> None:
    inputs = inputs_of(operation, R=5, D=1000)
    alone = {
        name: value[3:4] if isinstance(value, Tensor) and value.ndim == 2 else value for name, value in inputs.items()
    }
    for whole, row in zip(results_of(SPECS[operation], inputs), results_of(SPECS[operation], alone), strict=True):
        assert torch.equal(whole[3:4], row)


def test_norms_take_rows_of_any_number_of_dimensions() -> None:
    inputs = inputs_of("rms_norm", R=6)
    expected = rms_norm.rms_norm(**inputs)
    inputs["x"] = inputs["x"].view(2, 3, 24)
    assert torch.equal(rms_norm.rms_norm(**inputs), expected.view(2, 3, 24))

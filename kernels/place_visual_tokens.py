"""Writes visual tokens to their places among the prompt's embeddings: x[row[j]] = visual[j]."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from internvl_rt.kernels._contract import Case, Cost, KernelSpec, Tolerance, require, require_one_of, require_tensor
from internvl_rt.kernels._launch import Launch, Target, cdiv, run, target_of

BLOCK = 1024  # columns of one program: 8 values for each of its 128 threads


def place_visual_tokens_reference(x_TD: Tensor, visual_XD: Tensor, row_X: Tensor) -> None:
    """Overwrites rows of `x_TD` in place; `row_X` holds distinct row indices (int64)."""
    x_TD[row_X] = visual_XD.to(x_TD.dtype)


# Not specialised, so that one kernel serves all steps: T and the address of the rows change with every step.
@triton.jit(do_not_specialize=["T", "row"])
def _place_visual_tokens_kernel(x, visual, row, x_stride, visual_stride, T, D, BLOCK: tl.constexpr):
    num_blocks = tl.cdiv(D, BLOCK)
    token = tl.program_id(0) // num_blocks
    column = tl.program_id(0) % num_blocks * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(row + token)
    inside = (column < D) & (place >= 0) & (place < T)
    values = tl.load(visual + token.to(tl.int64) * visual_stride + column, mask=inside)
    tl.store(x + place * x_stride + column, values.to(x.dtype.element_ty), mask=inside)


def plan_place_visual_tokens(x_TD: Tensor, visual_XD: Tensor, row_X: Tensor, *, target: Target) -> tuple[Launch, ...]:
    num_visual, width = visual_XD.shape
    return (
        Launch(
            _place_visual_tokens_kernel,
            (num_visual * cdiv(width, BLOCK), 1, 1),
            {
                "x": x_TD,
                "visual": visual_XD,
                "row": row_X,
                "x_stride": x_TD.stride(0),
                "visual_stride": visual_XD.stride(0),
                "T": x_TD.shape[0],
                "D": width,
            },
            {"BLOCK": BLOCK},
        ),
    )


def place_visual_tokens(x_TD: Tensor, visual_XD: Tensor, row_X: Tensor) -> None:
    """Computes `place_visual_tokens_reference`, but a token whose row is outside [0, T) is not written: the indices are
    on the GPU, so the host cannot check them and raise.

    Raises ValueError naming the argument that does not fit.
    """
    dtypes = list(SPEC.tolerances)
    require_one_of("x_TD", x_TD.dtype, dtypes)
    require_one_of("visual_XD", visual_XD.dtype, dtypes)
    require(x_TD.ndim == 2, "x_TD", "rows [T, D]", tuple(x_TD.shape))
    require(row_X.ndim == 1, "row_X", "indices [X]", tuple(row_X.shape))
    (rows, width), num_visual = x_TD.shape, len(row_X)
    require_tensor("x_TD", x_TD, (rows, width), x_TD.dtype, x_TD.device)
    require(rows <= 1 or x_TD.stride(0) >= width, "x_TD", "rows that do not overlap", f"strides {x_TD.stride()}")
    require_tensor("visual_XD", visual_XD, (num_visual, width), visual_XD.dtype, x_TD.device)
    require_tensor("row_X", row_X, (num_visual,), torch.int64, x_TD.device)
    run(plan_place_visual_tokens(x_TD, visual_XD, row_X, target=target_of(x_TD.device)))


def _make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Cuts both tensors from ones with `padding` more columns; `visual_dtype` is given if it is not x's."""
    rows, tokens, width = case["T"], case["X"], case["D"]
    full_width = width + case.sizes.get("padding", 0)
    x = torch.randn(rows, full_width, dtype=torch.float32, device=device).to(dtype)
    visual = torch.randn(tokens, full_width, dtype=torch.float32, device=device)
    row = torch.randperm(rows, device=device)[:tokens]
    return {
        "x_TD": x[:, :width],
        "visual_XD": visual.to(case.sizes.get("visual_dtype", dtype))[:, :width],
        "row_X": row,
    }


SPEC = KernelSpec(
    name="place_visual_tokens",
    reference=place_visual_tokens_reference,
    plan=plan_place_visual_tokens,
    launcher=place_visual_tokens,
    make_inputs=_make_inputs,
    cost=lambda case, dtype: Cost(bytes=case["X"] * (2 * dtype.itemsize * case["D"] + 8), flops=0),
    test_cases=(
        *(Case(f"width_{width}", {"T": 9, "X": 5, "D": width}) for width in (1, 15, 16, 1023, 1024, 1025, 3584)),
        Case("no_tokens", {"T": 4, "X": 0, "D": 16}),
        Case("no_rows", {"T": 0, "X": 0, "D": 16}),
        Case("one_of_one", {"T": 1, "X": 1, "D": 16}),
        Case("every_row", {"T": 17, "X": 17, "D": 64}),
        Case("strided", {"T": 9, "X": 5, "D": 100, "padding": 28}),
        Case("cast", {"T": 9, "X": 5, "D": 100, "visual_dtype": torch.float32}),
    ),
    model_cases=tuple(
        Case(f"width_{width}_{tiles}_tiles", {"T": 256 * tiles + 64, "X": 256 * tiles, "D": width})
        for width in (896, 3584, 8192)
        for tiles in (1, 13)
    ),
    tolerances={
        dtype: Tolerance(0.0, 0.0, 0.0, "a copy; another dtype is rounded once, as torch does")
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    },
    in_place=("x_TD",),
    exact=True,
)

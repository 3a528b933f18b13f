"""Visual tokens to their places among the prompt's embeddings: x[row[j]] = visual[j]."""

from torch import Tensor


def place_visual_tokens_reference(x_TD: Tensor, visual_XD: Tensor, row_X: Tensor) -> None:
    """Overwrites rows of `x_TD` in place; `row_X` holds distinct row indices (int64)."""
    x_TD[row_X] = visual_XD.to(x_TD.dtype)

"""Places in a prompt where the logits of candidate tokens are read, as scores need them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """P places in a prompt, with K candidate tokens each: how likely is each to follow there?"""

    index_P: NDArray[np.int64]  # ascending; of the prompt tokens that the candidates may follow
    candidate_PK: NDArray[np.int64]
    num_top: int = 0  # how many of the likeliest tokens are read besides


def places_of_tokens(first: int, following: list[int] | tuple[int, ...], num_top: int = 0) -> Places:
    """Returns the places of tokens that follow each other, the first of them after prompt token `first`."""
    candidate_P1 = np.array(following, np.int64)[:, None]
    return Places(first + np.arange(len(following)), candidate_P1, num_top)

"""Rotary positions of a prompt with variable visual position encoding (V2PE).

Source: `get_rope_pos_id` of OpenGVLab/V2PE and section 2.1 of the InternVL3 report (arXiv 2504.10479). A stride is a
delta in units of 1/256 position, so all sums are exact; stride 256 is delta 1, the plain positions 0, 1, 2, ...
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from internvl_rt.errors import RequestError
from internvl_rt.inputs.prompt import VisualSpan
from internvl_rt.values import OneOf, read

Delta = float | Literal["auto"]  # rotary positions per visual token; "auto": see `auto_stride`

UNIT = 256  # strides per position
STRIDES = (256, 128, 64, 32, 16, 8, 4, 2, 1)  # the deltas of training: 1, 1/2, ..., 1/256
_DELTAS = (1, *(stride / UNIT for stride in STRIDES))
_EXPECTED = "a power of two from 1 to 1/256"
DELTA = OneOf(("auto", *_DELTAS), f"'auto' or {_EXPECTED}, such as 0.25")


def parse_delta(delta: float) -> int:
    """Returns the stride of a delta. Raises RequestError unless it is a power of two from 1 to 1/256."""
    return int(read("v2pe_delta", delta, OneOf(_DELTAS, f"{_EXPECTED}, such as 0.25")) * UNIT)


def build_positions(
    num_tokens: int, spans: Sequence[VisualSpan], strides: Sequence[int]
) -> tuple[NDArray[np.float32], int]:
    """Returns float32 [num_tokens] positions of a prompt, and the position of the token after it.

    strides: one for each picture. A text token is one position after its predecessor, a visual token one stride; after
    a picture the count goes on from the next integer. Exact below 65536 positions.
    """
    steps = np.full(num_tokens + 1, UNIT, np.int64)
    steps[0] = 0
    for span, stride in zip(spans, strides, strict=True):
        stop = span.start + span.num_tokens
        steps[span.start : stop] = stride
        steps[stop] += -span.num_tokens * stride % UNIT
    positions = np.cumsum(steps)
    return (positions[:-1] / UNIT).astype(np.float32), int(positions[-1]) // UNIT


def auto_stride(num_tokens: int, spans: Sequence[VisualSpan], limit: int) -> int:
    """Returns the largest stride with which the prompt takes at most `limit` positions.

    Raises RequestError if it takes more even with the smallest.
    """
    num_text = num_tokens - sum(span.num_tokens for span in spans)
    for stride in STRIDES:
        num_positions = num_text + sum(-(-span.num_tokens * stride // UNIT) for span in spans)
        if num_positions <= limit:
            return stride
    raise RequestError(
        f"the prompt takes {num_positions:,} positions even with v2pe_delta 1/256, expected at most {limit:,}; send "
        f"less text{' or fewer pictures' if spans else ''}"
    )

"""A picture and its place in a prompt."""

from dataclasses import dataclass

from torch import Tensor

from internvl_rt.inputs.image import OpenImage
from internvl_rt.inputs.prompt import VisualSpan

_NO_SPAN = VisualSpan(0, 0)


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Picture:
    """Plain data: nothing in it belongs to an engine. One of `image`, `tiles` and `visual_XD` is given.

    digest: 32 bytes. Pictures of equal digest have equal visual tokens.
    span: the picture's visual tokens in the prompt; empty as long as there is no prompt.
    """

    digest: bytes
    num_tiles: int  # thumbnail included
    image: OpenImage | None = None
    tiles: Tensor | None = None  # uint8 [I, S, S, 3], or normalised floating point [I, 3, S, S]
    visual_XD: Tensor | None = None  # visual tokens that were computed elsewhere
    span: VisualSpan = _NO_SPAN

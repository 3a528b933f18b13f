"""What `quantise` is asked for, checked before anything is read."""

from dataclasses import dataclass
from typing import Literal

from internvl_rt.errors import RequestError, quoted
from internvl_rt.values import Flag, Kind, OneOf, OrNone, read, read_fields

GROUPS = (32, 64, 128)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantiseOptions:
    """How weights are rounded.

    scheme: "fp8" is FP8_DYNAMIC of compressed-tensors: float8 e4m3 with a scale a row, inputs rounded by token at run
        time. "w4a16" is 4-bit integers in groups, with activation-aware scales; inputs stay as they are.
    group_size: columns that share a scale of "w4a16": 32, 64 or 128 (None: 128).
    asymmetric: whether a group of "w4a16" has a zero point.
    vision: whether the linears of the vision tower's layers are rounded too, to FP8 in both schemes.
    """

    scheme: Literal["fp8", "w4a16"]
    group_size: int | None = None
    asymmetric: bool = False
    vision: bool = False

    def __post_init__(self) -> None:
        kinds: dict[str, Kind] = {
            "scheme": OneOf(("fp8", "w4a16"), "'fp8' or 'w4a16'"),
            "group_size": OrNone(OneOf(GROUPS, "32, 64 or 128")),
            "asymmetric": Flag(),
            "vision": Flag(),
        }
        read_fields(self, kinds)
        if self.scheme == "fp8" and (self.group_size is not None or self.asymmetric):
            name, value = ("asymmetric", True) if self.asymmetric else ("group_size", self.group_size)
            raise RequestError(f"{name} is of scheme 'w4a16' alone, got {quoted(value)} with 'fp8'; leave it out")

    @property
    def group(self) -> int:
        return self.group_size or GROUPS[-1]

    def runs_prompts(self, compare: object, calibration: object) -> bool:
        """Says whether prompts run through the model. Raises RequestError for a calibration that none would."""
        runs = read("compare", compare, Flag()) or self.scheme == "w4a16"
        if calibration is not None and not runs:
            raise RequestError("calibration: fp8 without compare runs no prompts; leave one of the two out")
        return runs

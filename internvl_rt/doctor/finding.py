"""What one check of `internvl-rt doctor` found."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["ok", "failed", "not checked"]


@dataclass(frozen=True, slots=True)
class Finding:
    """`text` is one line for people, and says what to do if the check failed; `facts` are values for programs."""

    status: Status
    text: str
    facts: Mapping[str, Any] = field(default_factory=dict)


def one_line(text: str, max_len: int = 300) -> str:
    """Makes every run of white space one blank, and cuts a text that is too long."""
    line = " ".join(text.split())
    return line if len(line) <= max_len else f"{line[:max_len]} ..."


def describe(error: BaseException) -> str:
    """Returns the line of an error that says what happened: Triton quotes source before it, torch advises after it."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    telling = lines[-1 if type(error).__module__.startswith("triton") else 0] if lines else ""
    return one_line(f"{type(error).__name__}: {telling}" if telling else type(error).__name__)

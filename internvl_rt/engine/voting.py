"""A vote among answers: which final answer do most of them come to?"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from internvl_rt.errors import RequestError, quoted
from internvl_rt.values import Flag, read

_FINAL = re.compile(r"(?:final answer|the answer is|答案)[ *]*(?:is\b)?[ *]*[:\uff1a]?(.+)", re.IGNORECASE)
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_BOX = r"\boxed{"
_NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?")


@dataclass(frozen=True, slots=True)
class MajorityVote:
    """Ranks answers by how many come to the same final answer; of equal ones, the earlier answer comes first.

    final_answer: returns what an answer comes to, written in one way, or None for an answer that does not count.
    stop_decided: whether no more is drawn as soon as no other final answer can win. The best answer's final answer is
        then the same; what is missing are the answers that had not ended.
    """

    final_answer: "Callable[[str], str | None] | None" = None  # None: `read_final_answer`
    stop_decided: bool = False

    def __post_init__(self) -> None:
        if self.final_answer is not None and not callable(self.final_answer):
            raise RequestError(f"final_answer: expected a function or None, got {quoted(self.final_answer)}; give one")
        read("stop_decided", self.stop_decided, Flag())

    def key(self, text: str) -> str | None:
        """Returns what an answer comes to. Raises RequestError unless that is a text or None."""
        found = (self.final_answer or read_final_answer)(text)
        if not isinstance(found, str | None):
            raise RequestError(
                f"final_answer: expected a function that returns a text or None, got {quoted(found)} of it"
            )
        return found or None

    def is_decided(self, keys: Iterable[str | None], num_left: int) -> bool:
        """Says whether none of the answers that have not ended can change which final answer wins."""
        if not self.stop_decided:
            return False
        second, first = sorted([0, 0, *Counter(key for key in keys if key is not None).values()])[-2:]
        return first > second + num_left


def count_votes(keys: Sequence[str | None]) -> list[float]:
    """Returns, for each answer, the share of all answers that come to the same; 0 for one that does not count."""
    votes = Counter(key for key in keys if key is not None)
    return [votes[key] / len(keys) if key is not None else 0.0 for key in keys]


def read_final_answer(text: str) -> str | None:
    r"""Returns what an answer comes to, so that answers that say the same compare as equal; None if it says nothing.

    That is what its last \boxed{} holds, or else what follows the last "Final answer:" or "the answer is", or else its
    last line; in lower case, without punctuation around it, and numbers without commas and zeros at the end.
    """
    result = unboxed(text)
    if result is None:
        found, lines = _FINAL.findall(text), text.split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")
        result = found[-1] if found else last
    plain = " ".join(result.lower().split()).strip(" .。,;:!*$`'\"")
    if plain.startswith("(") and plain.find(")") == len(plain) - 1:
        plain = plain[1:-1].strip()
    plain = _THOUSANDS.sub("", plain)
    if _NUMBER.fullmatch(plain):
        sign = "-" if plain.startswith("-") else ""
        digits = plain.lstrip("+-").lstrip("0") or "0"
        digits = digits.rstrip("0").rstrip(".") if "." in digits else digits
        plain = "0" if digits in ("", "0") else sign + (f"0{digits}" if digits.startswith(".") else digits)
    return plain or None


def unboxed(text: str) -> str | None:
    r"""Returns what the last \boxed{...} of a text holds; None if there is none whose braces are closed."""
    end = len(text)
    while (start := text.rfind(_BOX, 0, end)) >= 0:
        depth = 1
        for place in range(start + len(_BOX), end):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if not depth:
                return text[start + len(_BOX) : place]
        end = start
    return None

"""Cuts a long text into slices whose ids, joined, are the ids of the whole text.

A tokenizer needs memory and time for all the text that it is given at once, about 200 bytes and 4 microseconds for each
byte. In slices, a text costs no more than the part of it that fits the model.
"""

import re
from collections.abc import Iterable, Iterator

from internvl_rt.errors import RequestError

MAX_UNBROKEN_BYTES = 1 << 19
_SLICE = 1 << 15  # characters, or more up to the next place for a cut
_WINDOW = 1 << 14
_LETTERS = (
    "A-Za-z\u0391-\u03a1\u03b1-\u03c9\u0410-\u044f\u05d0-\u05ea\u0620-\u064a\u0905-\u0939\u0e01-\u0e30"
    "\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
)
_ENDS = (
    r"\t\n\r !\"#$%&()*+,.;<=?@\[\\\]^`{}~"
    r"\u201c\u201d\u2026\u3001\u3002\u300a-\u300d\uff01\uff08\uff09\uff0c\uff1a\uff1b\uff1f"
)
# A text may be cut behind what this matches. The Qwen2 word pattern ends a word in each of these places, whatever is
# around: after the last letter of a word, after a digit, and after the last of several line breaks. The pattern has no
# look-behind, and its look-ahead is for white space alone. NFC joins no letter to what may stand right of a cut.
QWEN2_CUT = re.compile(rf"[{_LETTERS}](?=[{_ENDS}])|[0-9](?=[ -~])|\n(?=[!-~])")
# The same for the word pattern of o200k, which takes up to three digits together, and a slash after line breaks.
O200K_CUT = re.compile(rf"[{_LETTERS}](?=[{_ENDS}])|[0-9](?=[ -/:-~])|\n(?=[!-.0-~])")


def cuts_are_safe(cut: re.Pattern[str], tokens: Iterable[str]) -> bool:
    """Whether no cut lies within one of these tokens, which are found in a text before its words are."""
    return not any(cut.search(token) for token in tokens)


def slices(text: str, cut: re.Pattern[str] | None) -> Iterator[str]:
    """Yields `text` in parts, cut behind matches of `cut`; in one part without a pattern.

    Raises RequestError where a part would have more than MAX_UNBROKEN_BYTES.
    """
    start = 0
    while True:
        end = _find_cut(text, cut, start) if cut else len(text)
        part = text[start:end]
        if len(part) > MAX_UNBROKEN_BYTES or len(part.encode()) > MAX_UNBROKEN_BYTES:
            reason = "without the end of a word; break it" if cut else "for a tokenizer that takes it whole; shorten it"
            raise RequestError(
                f"a text may have at most {MAX_UNBROKEN_BYTES:,} bytes, got more from character {start:,} on, {reason}"
            )
        yield part
        if end == len(text):
            return
        start = end


def _find_cut(text: str, cut: re.Pattern[str], start: int) -> int:
    """Returns the first place for a cut behind a slice, or the end of the text if none is near enough.

    A search holds the interpreter lock, so each goes over a window of the text only.
    """
    for place in range(start + _SLICE, min(len(text), start + MAX_UNBROKEN_BYTES), _WINDOW):
        if found := cut.search(text, place - 1, place + _WINDOW):
            return found.end()
    return len(text)

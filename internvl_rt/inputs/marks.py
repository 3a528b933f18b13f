"""Finds a mark, such as </think> or a stop string, in text that comes in pieces."""


def overlap(text: str, mark: str) -> int:
    """Returns the length of the longest end of `text` that is a beginning of `mark`, and not all of it."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0


def take(held: str, mark: str) -> tuple[str, bool, str]:
    """Splits text into what stands before a mark, whether the mark is there, and what is left to be read.

    That is the text after the mark; without one, the end of the text that may become the beginning of one.
    """
    text, found, rest = held.partition(mark)
    if found:
        return text, True, rest
    size = len(held) - overlap(held, mark)
    return held[:size], False, held[size:]

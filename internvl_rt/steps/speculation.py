"""Prompt-lookup speculation: what followed the last few tokens earlier in the text may follow them again.

A step computes the draft tokens together with the last token and draws a token after each; those drawn after a wrong
draft token are thrown away. A draw depends on its logits and its counter alone, so speculation changes no answer.
"""

NGRAM = 3


class PromptLookup:
    """Finds where the last `NGRAM` tokens of one sequence occurred before."""

    def __init__(self, num_drafts: int) -> None:
        """num_drafts: most draft tokens at a time."""
        self._num_drafts = num_drafts
        self._end_of: dict[tuple[int, ...], int] = {}  # n-gram -> index after its latest occurrence
        self._num_seen = 0

    def draft(self, token_ids: list[int], most: int) -> list[int]:
        """Guesses up to `most` tokens that may follow `token_ids`, which only grows from call to call."""
        last = len(token_ids)
        # The n-gram that ends the text is left out: it would only find itself.
        for end in range(max(self._num_seen + 1, NGRAM), last):
            self._end_of[tuple(token_ids[end - NGRAM : end])] = end
        self._num_seen = max(self._num_seen, last - 1)
        start = self._end_of.get(tuple(token_ids[-NGRAM:])) if last >= NGRAM else None
        if start is None:
            return []
        drafts: list[int] = []
        for index in range(start, start + min(most, self._num_drafts)):  # past the end of the text, the drafts repeat
            drafts.append(token_ids[index] if index < last else drafts[index - last])
        return drafts

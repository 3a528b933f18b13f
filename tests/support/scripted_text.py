"""Makes answers have given texts, whatever tokens the model draws: what a model of a million parameters never says."""

from collections.abc import Iterator

import pytest

from internvl_rt.inputs import thinking
from internvl_rt.inputs.tokenizer import Tokenizer


class Script:
    """Stands in for a tokenizer's `TextStream`: each token gives the next piece, and no text when all have come."""

    def __init__(self, pieces: Iterator[str]) -> None:
        self._pieces = pieces

    def push(self, token_id: int) -> str:
        return next(self._pieces, "")

    def flush(self) -> str:
        return ""


def script(monkeypatch: pytest.MonkeyPatch, *texts: list[str]) -> None:
    """Gives each answer the pieces of the next text, in turn. Every model counts as one that can think."""
    started = 0

    def stream(tokenizer: Tokenizer, **_: bool) -> Script:
        nonlocal started
        started += 1
        return Script(iter(texts[(started - 1) % len(texts)]))

    monkeypatch.setattr(Tokenizer, "stream", stream)
    monkeypatch.setattr(thinking, "can_think", lambda config: True)

"""Makes answers of given tokens, whatever the model draws, so that a random one writes what a trained one would."""

from itertools import count
from typing import Any

import pytest

from internvl_rt.engine.in_flight import InFlight
from internvl_rt.inputs.tokenizer import Tokenizer
from internvl_rt.steps.runner import LaunchedStep, StepResult
from internvl_rt.steps.sequence import Sequence

_COLLECT = InFlight.collect


def script_tokens(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer, *texts: str) -> None:
    """Gives each answer the tokens of the next text, in turn; special tokens are read in it."""
    answers = [tokenizer.encode(text, specials=True) for text in texts]
    numbers, given = count(), dict[int, list[int]]()

    def token_of(sequence: Sequence, counter: int) -> int:
        answer = given.get(sequence.seq_id)
        if answer is None:
            answer = given[sequence.seq_id] = answers[next(numbers) % len(answers)]
        return answer[counter] if counter < len(answer) else 0

    def collect_scripted(self: InFlight, launched: LaunchedStep, result: StepResult) -> Any:
        ids = [token_of(draw.sequence, draw.counter) for draw in launched.step.draws]
        for one, token_id in zip(result.logprobs, ids, strict=False):
            if one is not None:
                object.__setattr__(one, "token_id", token_id)
        return _COLLECT(self, launched, result._replace(token_ids=ids))

    monkeypatch.setattr(InFlight, "collect", collect_scripted)

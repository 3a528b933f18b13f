"""How much two checkpoints agree on greedy answers, each loaded by the engine after the other."""

import gc
from collections.abc import Sequence as Items
from dataclasses import dataclass
from pathlib import Path

from internvl_rt.engine.engine import Engine
from internvl_rt.engine.loading import plan_parts
from internvl_rt.engine.options import EngineOptions
from internvl_rt.errors import InternVLError
from internvl_rt.inputs.sampling_params import SamplingParams
from internvl_rt.quantize.questions import Question

MAX_TOKENS = 32  # of an answer
MAX_QUESTIONS = 32


@dataclass(frozen=True, slots=True)
class Agreement:
    """equal: answers that are the same to the last token. leading: tokens before the first one that differs."""

    questions: int
    equal: int
    tokens: int
    leading: int


def compare_answers(model: Path, quantised: Path, questions: Items[Question], device: str) -> Agreement | str:
    """Compares greedy answers of two folders to the first questions, or returns why they cannot be compared."""
    try:
        for folder in (model, quantised):
            plan_parts(folder, EngineOptions(device=device))
        return _compare(model, quantised, questions, device)
    except InternVLError as error:
        return str(error)
    except MemoryError:
        return "the memory is not enough for one of the models"


def _compare(model: Path, quantised: Path, questions: Items[Question], device: str) -> Agreement:
    asked = [question.messages() for question in questions[:MAX_QUESTIONS]]
    params = SamplingParams(max_tokens=MAX_TOKENS)
    answers = []
    for folder in (model, quantised):
        with Engine.from_pretrained(folder, device=device) as engine:
            answers.append([reply.token_ids for reply in engine.generate(asked, params)])
        del engine
        gc.collect()
    pairs = list(zip(*answers, strict=True))
    leading = [
        next((place for place, (one, two) in enumerate(zip(ours, theirs)) if one != two), min(len(ours), len(theirs)))  # noqa: B905
        for ours, theirs in pairs
    ]
    return Agreement(
        questions=len(pairs),
        equal=sum(ours == theirs for ours, theirs in pairs),
        tokens=sum(len(ours) for ours, _ in pairs),
        leading=sum(leading),
    )

"""VisualPRM, the critic of the InternVL family: scores each step of an answer to a question about pictures.

The model is an InternVL (2.5-8B, and 3-8B for v1.1) without another head. It sees the answer as a dialogue, in which
each step is a user's turn and each reply is a placeholder; the score of a step is the probability of "+" against "-" in
the placeholder's place. All steps are scored in one pass. Source: `generate_steps_with_soft_score` and
`select_best_response` in the remote code of OpenGVLab/VisualPRM-8B-v1_1.
"""

import math
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np

from internvl_rt.checkpoint.config import DEFAULT_SYSTEM_MESSAGE
from internvl_rt.critic.engine_critic import EngineCritic
from internvl_rt.engine.engine import Engine
from internvl_rt.engine.failures import named_by_index
from internvl_rt.engine.loading import load_parts
from internvl_rt.engine.options import EngineOptions, takes_options
from internvl_rt.engine.reply import Usage
from internvl_rt.engine.scoring import read_responses
from internvl_rt.errors import CheckpointError, ContextLengthError, RequestError, quoted
from internvl_rt.inputs.places import Places
from internvl_rt.inputs.position import Delta
from internvl_rt.inputs.prepare import Conversation, Prepared, PromptSource
from internvl_rt.inputs.prompt import Turn
from internvl_rt.values import Integer, OrNone, Text, read

GOOD, BAD = "+", "-"
BREAK = "\n\n"  # between two steps of an answer
MAX_STEPS = 12
LEAST_STEP = 9  # tokens that a step takes at least, with the tokens of its two turns

_MAX_STEPS = OrNone(Integer(1, 1 << 20))
_SYSTEM = OrNone(Text(1, 1 << 16))


@dataclass(frozen=True, slots=True)
class StepScores:
    """The scores of an answer's steps, each from 0 to 1."""

    response: str
    index: int  # of the response in the call that scored it
    steps: tuple[str, ...]
    scores: tuple[float, ...]
    usage: Usage

    @property
    def score(self) -> float:
        """The answer's score: the mean of its steps'."""
        return sum(self.scores) / len(self.scores)


def split_steps(response: str, max_steps: int | None = MAX_STEPS) -> tuple[str, ...]:
    """Splits an answer at blank lines. If it has more steps than `max_steps`, neighbours are joined, equally many.

    Raises RequestError for an answer without any text.
    """
    if not isinstance(response, str) or not response.strip():
        raise RequestError(f"response: expected an answer with at least one step, got {quoted(response)}; leave it out")
    steps = response.split(BREAK)
    size = 1 if max_steps is None else math.ceil(len(steps) / max_steps)
    return tuple(BREAK.join(steps[first : first + size]) for first in range(0, len(steps), size))


class VisualPRM(EngineCritic[StepScores]):
    """A critic that scores the steps of answers. Build one with `from_pretrained`, or from an engine of such a model.

    It takes one user message, with pictures or without. A system message before it is not read: a critic has its own.
    """

    def __init__(self, engine: Engine, *, system: str | None = None, max_steps: int | None = MAX_STEPS) -> None:
        """Makes a critic of an engine.

        system: the system message of the dialogues; None is the model's default, as in the official code.
        max_steps: neighbouring steps of an answer with more are joined; None: they are not.

        Raises CheckpointError if the tokenizer does not make one token of "+" and one of "-" in a reply, RequestError
        for wrong arguments.
        """
        super().__init__(engine)
        self._max_steps: int | None = read("max_steps", max_steps, _MAX_STEPS)
        self._system = read("system", system, _SYSTEM) or engine.config.system_message or DEFAULT_SYSTEM_MESSAGE
        encode = engine.tokenizer.encode
        role = encode("assistant\n")
        good, bad = encode(f"assistant\n{GOOD}"), encode(f"assistant\n{BAD}")
        if good == bad or not good[:-1] == bad[:-1] == role:
            raise CheckpointError(
                f"the tokenizer of this model does not make one token of {GOOD!r} and one of {BAD!r} in a reply, so "
                "the model is no VisualPRM; give a checkpoint of one"
            )
        self._role_start = np.array([engine.tokenizer.token_id("<|im_start|>"), *role])
        self._candidates = np.array([good[-1], bad[-1]])

    @classmethod
    @takes_options(EngineOptions)
    def from_pretrained(cls, model: str | Path, options: EngineOptions) -> Self:
        """Loads a critic as `Engine.from_pretrained` loads a model, with its keyword arguments and errors."""
        return cls(Engine(*load_parts(model, options), options))

    def score_steps(
        self,
        messages: PromptSource,
        response: str,
        *,
        v2pe_delta: Delta | None = None,
        cache_salt: str | None = None,
    ) -> StepScores:
        """Scores the steps of one answer, as `score_responses` does of several."""
        return self(messages, response, v2pe_delta=v2pe_delta, cache_salt=cache_salt)

    def score_conversation(self, conversation: Conversation, responses: Items[str]) -> list[StepScores]:
        """Scores answers to a question of rendered turns, which the engine's `preparer` has read."""
        return self._score(lambda: conversation, read_responses(responses), None, None)

    def select_best(
        self,
        messages: PromptSource,
        responses: Items[str],
        *,
        v2pe_delta: Delta | None = None,
        cache_salt: str | None = None,
    ) -> list[StepScores]:
        """Scores answers as `score_responses` does, and returns them the best first; of equal ones the earlier."""
        scored = self.score_responses(messages, responses, v2pe_delta=v2pe_delta, cache_salt=cache_salt)
        return sorted(scored, key=lambda each: -each.score)

    def close(self) -> None:
        """Closes the critic's engine."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_roles(self, roles: Items[str]) -> None:
        if list(roles) not in (["user"], ["system", "user"]):
            raise RequestError(
                "messages: a critic judges answers to one question, and expects one user message, got "
                f"{', '.join(roles)}; send the question alone"
            )

    def _score(
        self, conversation: Callable[[], Conversation], texts: Items[str], delta: Delta | None, salt: str | None
    ) -> list[StepScores]:
        self.engine.preparer.check_texts("an answer", [max(texts, key=len, default="")])
        answers = [split_steps(text, self._max_steps) for text in texts]
        asked = conversation()
        self._check_roles([turn.role for turn in asked.turns])
        question = replace(asked, turns=asked.turns[-1:])

        def prompts() -> Iterator[Prepared]:
            for index, steps in enumerate(answers):
                with named_by_index("responses", index, len(answers)):
                    yield self._prompt(question, steps, delta, salt)

        scored = self.engine.run_scoring(prompts())
        return [
            StepScores(text, index, steps, tuple(place.probabilities[0] for place in each.places), each.usage)
            for index, (text, steps, each) in enumerate(zip(texts, answers, scored, strict=True))
        ]

    def _prompt(
        self, question: Conversation, steps: tuple[str, ...], delta: Delta | None, salt: str | None
    ) -> Prepared:
        """Renders the dialogue up to the place of the last placeholder."""
        room = self.engine.max_model_len
        if len(steps) * LEAST_STEP > room:
            raise ContextLengthError(
                f"the answer has {len(steps):,} steps, which cannot fit {room:,} tokens; lower max_steps, shorten it, "
                "or raise max_model_len"
            )
        (asked,) = question.turns
        first = ("### Question:\n", *asked.parts, f"\n\n### Solution Process:\n{steps[0]}")
        turns = [Turn("system", (self._system,)), Turn("user", first)]
        for step in steps[1:]:
            turns += [Turn("assistant", (GOOD,)), Turn("user", (step,))]
        rendered = self.engine.preparer.render(replace(question, turns=tuple(turns)), delta, salt)
        ids = np.array(rendered.prompt.token_ids)
        starts = np.flatnonzero(ids[: len(ids) - len(self._role_start) + 1] == self._role_start[0])
        is_reply = (ids[starts[:, None] + np.arange(len(self._role_start))] == self._role_start).all(axis=1)
        index_P = starts[is_reply] + len(self._role_start) - 1
        assert len(index_P) == len(steps), "each step is followed by a reply"
        return replace(rendered, places=Places(index_P, np.tile(self._candidates, (len(index_P), 1))))

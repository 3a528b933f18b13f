"""A model as the critic of answers, its own perhaps: it is asked whether an answer is right."""

from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

import numpy as np

from internvl_rt.engine.engine import Engine
from internvl_rt.engine.reply import Usage
from internvl_rt.engine.scoring import read_responses
from internvl_rt.errors import RequestError
from internvl_rt.inputs.places import Places
from internvl_rt.inputs.position import Delta
from internvl_rt.inputs.prepare import Prepared, PromptSource, check_sharing
from internvl_rt.inputs.prompt import Turn
from internvl_rt.inputs.raw_prompt import RawPrompt
from internvl_rt.values import Text, read

QUESTION = "Is this answer correct? Answer with Yes or No alone."
_TEXT = Text(1, 1 << 16)


@dataclass(frozen=True, slots=True)
class Verdict:
    """How likely an answer is right, from 0 to 1."""

    response: str
    score: float
    usage: Usage


class Judge:
    """Asks a model after each answer whether that is right; the score is the probability of yes against no.

    Where these are more than one token each, as they are for no model of the family, their first tokens count. Any
    thread may call any method. A judge is also a function of a conversation and an answer, as `Engine.best_of` takes
    one.
    """

    def __init__(self, engine: Engine, question: str = QUESTION, *, yes: str = "Yes", no: str = "No") -> None:
        """engine: of the model that judges, which may be the one that answers. question: comes after the answer.

        Raises RequestError if yes and no begin with the same token.
        """
        self.engine, self._question = engine, read("question", question, _TEXT)
        encode, words = engine.tokenizer.encode, (read("yes", yes, _TEXT), read("no", no, _TEXT))
        self._candidates = [encode(f"assistant\n{word}")[len(encode("assistant\n"))] for word in words]
        if self._candidates[0] == self._candidates[1]:
            raise RequestError(f"yes and no: {words[0]!r:.40} and {words[1]!r:.40} begin alike; choose other words")

    def __call__(self, messages: PromptSource, response: str) -> Verdict:
        """Judges one answer, as `score_responses` does several."""
        return self.score_responses(messages, [response])[0]

    def score_responses(
        self,
        messages: PromptSource,
        responses: Items[str],
        *,
        v2pe_delta: Delta | None = None,
        cache_salt: str | None = None,
    ) -> list[Verdict]:
        """Judges several answers to a conversation, which is computed once. Raises RequestError or MediaError."""
        texts, sharing = read_responses(responses), check_sharing(v2pe_delta, cache_salt)
        self.engine.loop.check()
        if isinstance(messages, RawPrompt):
            raise RequestError("messages: a judge needs the conversation itself, got a RawPrompt; send messages")
        preparer = self.engine.preparer
        conversation = preparer.read(messages, self.engine.loop.check)
        if conversation.turns[-1].role != "user":
            raise RequestError("messages: expected a question as the last message, got the beginning of an answer")

        def prompts() -> Iterator[Prepared]:
            for text in texts:
                turns = (*conversation.turns, Turn("assistant", (text,)), Turn("user", (self._question,)))
                prompt = preparer.render(replace(conversation, turns=turns), *sharing)
                last = np.array([len(prompt.prompt.token_ids) - 1])
                yield replace(prompt, places=Places(last, np.array([self._candidates])))

        scored = self.engine.run_scoring(prompts())
        return [
            Verdict(text, each.places[0].probabilities[0], each.usage) for text, each in zip(texts, scored, strict=True)
        ]

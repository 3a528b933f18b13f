"""A model as the critic of answers, its own perhaps: it is asked whether an answer is right."""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

import numpy as np

from internvl_rt.checkpoint.template import TEMPLATES, spelt
from internvl_rt.critic.engine_critic import EngineCritic
from internvl_rt.engine.engine import Engine
from internvl_rt.engine.failures import named_by_index
from internvl_rt.engine.reply import Usage
from internvl_rt.errors import RequestError, quoted
from internvl_rt.inputs.places import Places
from internvl_rt.inputs.position import Delta
from internvl_rt.inputs.prepare import Conversation, Prepared
from internvl_rt.inputs.prompt import Turn
from internvl_rt.values import Text, read

QUESTION = "Is this answer correct? Answer with Yes or No alone."
_TEXT = Text(1, 1 << 16)


@dataclass(frozen=True, slots=True)
class Verdict:
    """How likely an answer is right, from 0 to 1."""

    response: str
    score: float
    usage: Usage


class Judge(EngineCritic[Verdict]):
    """Asks a model after each answer whether that is right; the score is the probability of yes against no.

    Where these are more than one token each, as they are for no model of the family, their first tokens count. The
    conversation that it judges ends with a question.
    """

    def __init__(self, engine: Engine, question: str = QUESTION, *, yes: str = "Yes", no: str = "No") -> None:
        """engine: of the model that judges, which may be the one that answers. question: comes after the answer.

        Raises RequestError for wrong arguments, and if yes and no begin with the same token.
        """
        super().__init__(engine)
        self._question: str = read("question", question, _TEXT)
        template = TEMPLATES[engine.config.template]
        self._header = spelt(template.header)
        before = "" if self._header else spelt(template.begins["assistant"][1:])  # since the last special token
        words, role = (read("yes", yes, _TEXT), read("no", no, _TEXT)), engine.tokenizer.encode(before)
        ids = [engine.tokenizer.encode(f"{before}{word}") for word in words]
        firsts = [each[len(role)] for each in ids if each[: len(role)] == role and len(each) > len(role)]
        if len(firsts) < 2 or firsts[0] == firsts[1]:
            raise RequestError(
                f"yes and no: expected words that begin with tokens of their own, got {quoted(yes)} and {quoted(no)}; "
                "choose other words"
            )
        self._candidates = firsts

    def _check_roles(self, roles: Items[str]) -> None:
        if roles[-1] != "user":
            raise RequestError("messages: expected a question as the last message, got the beginning of an answer")

    def _score(
        self, conversation: Callable[[], Conversation], texts: Items[str], delta: Delta | None, salt: str | None
    ) -> list[Verdict]:
        asked = conversation()

        def prompts() -> Iterator[Prepared]:
            for index, text in enumerate(texts):
                turns = (*asked.turns, Turn("assistant", (self._header + text,)), Turn("user", (self._question,)))
                with named_by_index("responses", index, len(texts)):
                    rendered = self.engine.preparer.render(replace(asked, turns=turns), delta, salt)
                    prompt = self.engine.preparer.begin_answer(rendered)
                    last = np.array([len(prompt.prompt.token_ids) - 1])
                    yield replace(prompt, places=Places(last, np.array([self._candidates])))

        scored = self.engine.run_scoring(prompts())
        return [
            Verdict(text, each.places[0].probabilities[0], each.usage) for text, each in zip(texts, scored, strict=True)
        ]

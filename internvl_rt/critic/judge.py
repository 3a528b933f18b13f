"""A model as the critic of answers, its own perhaps: it is asked whether an answer is right."""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from internvl_rt.critic.visual_prm import ENGINE
from internvl_rt.engine.engine import Engine
from internvl_rt.engine.failures import named_by_index
from internvl_rt.engine.reply import Usage
from internvl_rt.engine.scoring import read_responses
from internvl_rt.errors import RequestError, quoted
from internvl_rt.inputs.messages import parse_messages
from internvl_rt.inputs.places import Places
from internvl_rt.inputs.position import Delta
from internvl_rt.inputs.prepare import Conversation, Messages, Prepared, PromptSource, check_sharing
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

        Raises RequestError for wrong arguments, and if yes and no begin with the same token.
        """
        self.engine: Engine = read("engine", engine, ENGINE)
        self._question: str = read("question", question, _TEXT)
        words, role = (read("yes", yes, _TEXT), read("no", no, _TEXT)), engine.tokenizer.encode("assistant\n")
        ids = [engine.tokenizer.encode(f"assistant\n{word}") for word in words]
        firsts = [each[len(role)] for each in ids if each[: len(role)] == role and len(each) > len(role)]
        if len(firsts) < 2 or firsts[0] == firsts[1]:
            raise RequestError(
                f"yes and no: expected words that begin with tokens of their own, got {quoted(yes)} and {quoted(no)}; "
                "choose other words"
            )
        self._candidates = firsts

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
        question = self._check_question(messages)
        return self._judge(self.engine.preparer.read(question, self.engine.loop.check), texts, *sharing)

    def about(
        self, messages: PromptSource, *, v2pe_delta: Delta | None = None, cache_salt: str | None = None
    ) -> Callable[[str], Verdict]:
        """Returns a function that judges answers to one conversation, which it reads once, when it is called first.

        Raises RequestError for what ends with no question.
        """
        sharing = check_sharing(v2pe_delta, cache_salt)
        question = self._check_question(messages)
        read_once = cache(lambda: self.engine.preparer.read(question, self.engine.loop.check))
        return lambda response: self._judge(read_once(), read_responses([response]), *sharing)[0]

    def _check_question(self, messages: PromptSource) -> Messages:
        """Returns a conversation that ends with a question, refuses another before any media are read."""
        self.engine.loop.check()
        if isinstance(messages, RawPrompt):
            raise RequestError("messages: a judge needs the conversation itself, got a RawPrompt; send messages")
        if parse_messages(messages, self.engine.max_model_len)[-1].role != "user":
            raise RequestError("messages: expected a question as the last message, got the beginning of an answer")
        return messages

    def _judge(
        self, conversation: Conversation, texts: Items[str], delta: Delta | None, salt: str | None
    ) -> list[Verdict]:
        def prompts() -> Iterator[Prepared]:
            for index, text in enumerate(texts):
                turns = (*conversation.turns, Turn("assistant", (text,)), Turn("user", (self._question,)))
                with named_by_index("responses", index, len(texts)):
                    prompt = self.engine.preparer.render(replace(conversation, turns=turns), delta, salt)
                    last = np.array([len(prompt.prompt.token_ids) - 1])
                    yield replace(prompt, places=Places(last, np.array([self._candidates])))

        scored = self.engine.run_scoring(prompts())
        return [
            Verdict(text, each.places[0].probabilities[0], each.usage) for text, each in zip(texts, scored, strict=True)
        ]

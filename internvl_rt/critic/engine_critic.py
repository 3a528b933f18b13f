"""What critics that ask a model have in common: a conversation is checked at once, and read once for many answers."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from collections.abc import Sequence as Items
from functools import cache
from typing import Generic, TypeVar

from internvl_rt.engine.engine import Engine
from internvl_rt.engine.scoring import read_responses
from internvl_rt.errors import RequestError
from internvl_rt.inputs.messages import parse_messages
from internvl_rt.inputs.position import Delta
from internvl_rt.inputs.prepare import Conversation, PromptSource, check_sharing
from internvl_rt.inputs.raw_prompt import RawPrompt
from internvl_rt.values import UnfitError, read

Score = TypeVar("Score")  # what a critic says of an answer


class _Engines:
    expected = "an Engine, from Engine.from_pretrained"

    def read(self, value: object) -> Engine:
        if not isinstance(value, Engine):
            raise UnfitError
        return value


_ENGINE = _Engines()


class EngineCritic(ABC, Generic[Score]):
    """Scores answers to a conversation by the model of an engine. Any thread may call any method.

    It is also a function of a conversation and an answer, as `Engine.best_of` takes one.
    """

    def __init__(self, engine: Engine) -> None:
        """Raises RequestError for what is no engine."""
        self.engine: Engine = read("engine", engine, _ENGINE)

    def __call__(
        self,
        messages: PromptSource,
        response: str,
        *,
        v2pe_delta: Delta | None = None,
        cache_salt: str | None = None,
    ) -> Score:
        """Scores one answer, as `score_responses` does several."""
        return self.score_responses(messages, [response], v2pe_delta=v2pe_delta, cache_salt=cache_salt)[0]

    def score_responses(
        self,
        messages: PromptSource,
        responses: Items[str],
        *,
        v2pe_delta: Delta | None = None,
        cache_salt: str | None = None,
    ) -> list[Score]:
        """Scores several answers to one conversation, whose pictures are encoded once.

        messages: as `Engine.chat` takes them, and as the critic's class restricts them.
        v2pe_delta, cache_salt: as for `Engine.chat`.

        Raises RequestError, ContextLengthError for an answer that does not fit, MediaError, NotFiniteError.
        """
        texts, sharing = read_responses(responses), check_sharing(v2pe_delta, cache_salt)
        return self._score(self._reader(messages), texts, *sharing)

    def about(
        self, messages: PromptSource, *, v2pe_delta: Delta | None = None, cache_salt: str | None = None
    ) -> Callable[[str], Score]:
        """Returns a function that scores answers to one conversation, which it reads once, when it is called first.

        Raises RequestError for a conversation that the critic does not take.
        """
        sharing = check_sharing(v2pe_delta, cache_salt)
        conversation = cache(self._reader(messages))
        return lambda response: self._score(conversation, read_responses([response]), *sharing)[0]

    def _reader(self, messages: PromptSource) -> Callable[[], Conversation]:
        """Returns a function that reads a conversation with its media. What the critic does not take is refused now."""
        self.engine.loop.check()
        if isinstance(messages, RawPrompt):
            raise RequestError("messages: a critic needs the conversation itself, got a RawPrompt; send messages")
        self._check_roles([message.role for message in parse_messages(messages, self.engine.max_model_len)])
        return lambda: self.engine.preparer.read(messages, self.engine.loop.check)

    @abstractmethod
    def _check_roles(self, roles: Items[str]) -> None:
        """Raises RequestError for a conversation of such roles, if the critic does not take it."""

    @abstractmethod
    def _score(
        self, conversation: Callable[[], Conversation], texts: Items[str], delta: Delta | None, salt: str | None
    ) -> list[Score]:
        """Scores answers. The conversation is read when it is called, so that answers can be refused before."""

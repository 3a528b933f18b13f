"""Reasoning before an answer, which InternVL3.5 was trained for: how a prompt asks for it, and how it is split off."""

from typing import Literal

from internvl_rt.checkpoint.config import ModelConfig
from internvl_rt.errors import RequestError
from internvl_rt.inputs.marks import take
from internvl_rt.inputs.messages import Message

BEGIN, END = "<think>\n", "</think>"

# Source: R1_SYSTEM_PROMPT of the official evaluation, and the model cards of InternVL3.5.
SYSTEM_MESSAGE = """\
You are an AI assistant that rigorously follows this response protocol:

1. First, conduct a detailed analysis of the question. Consider different angles, potential solutions, and reason \
through the problem step-by-step. Enclose this entire thinking process within <think> and </think> tags.

2. After the thinking section, provide a clear, concise, and direct answer to the user's question. Separate the answer \
from the think section with a newline.

Ensure that the thinking process is thorough but remains focused on the query. The final answer should be standalone \
and not reference the thinking section."""


def can_think(config: ModelConfig) -> bool:
    """Says whether a model was trained to reason in <think>: InternVL3.5, if its language model is Qwen3."""
    return config.can_think


def shall_think(think: bool | None, config: ModelConfig) -> bool:
    """Returns `think`, or for None whether the model reasons if nobody says whether it shall, as Intern-S1 does."""
    return think if think is not None else config.thinking is not None and config.thinking.by_default


def with_thinking(messages: tuple[Message, ...], config: ModelConfig) -> tuple[Message, ...]:
    """Asks for reasoning as `thinking_prompt` does.

    Raises RequestError for a model that cannot think, and for an answer that is begun already.
    """
    if not can_think(config):
        raise RequestError(
            "think: this model was not trained to reason before it answers; leave it out, or load an InternVL3.5"
        )
    if is_begun(messages):
        raise RequestError(
            f"messages[{len(messages) - 1}]: an answer that is begun cannot be thought about; leave out think, or the "
            "beginning of the answer"
        )
    own = messages[:1] if messages[0].role == "system" else ()
    system, opening = thinking_prompt(config, "".join(map(str, own[0].parts)) if own else None)
    first = () if system is None else (Message("system", (system,)),)
    return (*first, *messages[len(own) :], Message("assistant", (opening,)))


def without_thinking(messages: tuple[Message, ...], config: ModelConfig) -> tuple[Message, ...]:
    """Begins the answer of a model whose chat template says there that it shall not reason."""
    opening = "" if config.thinking is None or is_begun(messages) else config.thinking.plain_opening
    return (*messages, Message("assistant", (opening,))) if opening else messages


def is_begun(messages: tuple[Message, ...]) -> bool:
    """Says whether a conversation ends with the beginning of the answer."""
    return messages[-1].role == "assistant"


def thinking_prompt(config: ModelConfig, own: str | None) -> tuple[str | None, str]:
    """Returns the system message with which a model reasons before its answer, and the beginning of that answer.

    own: the conversation's system message. InternVL3.5 has the official one in front of it, and its own default one is
    left out; of other models the chat template says what becomes of it.
    """
    if config.thinking is None:
        return "\n\n".join([SYSTEM_MESSAGE, *([] if own is None else [own])]), BEGIN
    before, behind = config.thinking.around_system
    return config.thinking.system_message if own is None else before + own + behind, config.thinking.opening


class ThoughtReader:
    """Splits the text of an answer that begins inside <think> as it grows, wherever its tokens are cut.

    Line breaks and another <think> before the reasoning are left out. What may still become a mark is held back, and
    nothing else. Without a </think> all of it is reasoning.
    """

    def __init__(self, *, strips: bool = True) -> None:
        """strips: whether whitespace between the reasoning and what follows is left out."""
        self.strips = strips
        self._place: Literal["start", "reasoning", "gap", "answer"] = "start"
        self._held = ""

    def push(self, text: str, *, final: bool = False) -> tuple[str, str]:
        """Returns what new text adds to the reasoning, and to what follows it. final: no more text comes."""
        reasoning = ""
        self._held += text
        if self._place == "start":
            while self._held.startswith(("\n", BEGIN)):
                self._held = self._held.lstrip("\n").removeprefix(BEGIN)
            if BEGIN.startswith(self._held) and not final:
                return "", ""
            self._place = "reasoning"
        if self._place == "reasoning":
            reasoning, found, self._held = take(self._held, END)
            if not found:
                if final:
                    reasoning, self._held = reasoning + self._held, ""
                return reasoning, ""
            self._place = "gap" if self.strips else "answer"
        if self._place == "gap":
            self._held = self._held.lstrip()
            if self._held:
                self._place = "answer"
        answer, self._held = self._held, ""
        return reasoning, answer

"""Reasoning before an answer, which InternVL3.5 was trained for, switched by the request."""

from typing import Any

from internvl_rt.checkpoint.config import ModelConfig
from internvl_rt.server.fault import refusal

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

_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


def can_think(config: ModelConfig) -> bool:
    """Says whether a model was trained to reason in <think>: InternVL3.5, whose language model is Qwen3."""
    return config.decoder.qk_norm


def wants_thinking(effort: str | None, template: dict[str, Any] | None, config: ModelConfig, where: str) -> bool:
    """Reads the switch: `chat_template_kwargs.enable_thinking`, or else a reasoning effort other than "none".

    where: the effort's place in the request. A model that cannot think ignores both, as clients send them to all.
    """
    if effort is not None and effort not in _EFFORTS:
        raise refusal(f"{where}: expected one of {', '.join(_EFFORTS)}, got {effort!r:.60}", where, "invalid_value")
    given = (template or {}).get("enable_thinking")
    if given is not None and not isinstance(given, bool):
        place = "chat_template_kwargs.enable_thinking"
        raise refusal(f"{place}: expected true or false", place, "invalid_type")
    asked = given if given is not None else effort not in (None, "none")
    return asked and can_think(config)

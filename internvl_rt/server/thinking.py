"""The switch by which a request asks for reasoning before the answer."""

from typing import Any

from internvl_rt.checkpoint.config import ModelConfig
from internvl_rt.inputs.thinking import can_think, shall_think
from internvl_rt.server.fault import refusal

_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


def wants_thinking(
    effort: str | None, template: dict[str, Any] | None, config: ModelConfig, where: str, *, begun: bool
) -> bool:
    """Reads the switch: `chat_template_kwargs.enable_thinking`, or else a reasoning effort other than "none".

    where: the effort's place in the request. A model that cannot think ignores both, as clients send them to all.
    begun: the request goes on with an answer, so that a model which reasons by default does not.
    """
    if effort is not None and effort not in _EFFORTS:
        raise refusal(f"{where}: expected one of {', '.join(_EFFORTS)}, got {effort!r:.60}", where, "invalid_value")
    given = (template or {}).get("enable_thinking")
    if given is not None and not isinstance(given, bool):
        place = "chat_template_kwargs.enable_thinking"
        raise refusal(f"{place}: expected true or false", place, "invalid_type")
    if given is None and effort is None:
        return shall_think(None, config) and not begun
    return (given if given is not None else effort != "none") and can_think(config)

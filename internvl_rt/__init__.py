"""internvl_rt runs the InternVL3 vision-language family from the official weights.

    from internvl_rt import Engine, SamplingParams

    engine = Engine.from_pretrained("OpenGVLab/InternVL3-1B")
    reply = engine.chat([{"role": "user", "content": [{"type": "image", "image": "page.png"},
                                                      {"type": "text", "text": "What is the total?"}]}])

The names below load on first use, so that `import internvl_rt` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from internvl_rt.engine.async_engine import AsyncEngine
    from internvl_rt.engine.engine import Engine
    from internvl_rt.engine.options import EngineOptions
    from internvl_rt.engine.reply import Choice, Piece, Reply, Score, Timings, Usage
    from internvl_rt.errors import (
        CheckpointError,
        ConfigError,
        EngineDeadError,
        InternVLError,
        MediaError,
        QueueFullError,
        RequestError,
    )
    from internvl_rt.inputs.sampling_params import SamplingParams
    from internvl_rt.steps.logprobs import TokenLogprob

_HOMES = {
    "AsyncEngine": "engine.async_engine",
    "Engine": "engine.engine",
    "SamplingParams": "inputs.sampling_params",
    **dict.fromkeys(("Choice", "Piece", "Reply", "Score", "Timings", "Usage"), "engine.reply"),
    **dict.fromkeys(
        (
            "CheckpointError",
            "ConfigError",
            "EngineDeadError",
            "InternVLError",
            "MediaError",
            "QueueFullError",
            "RequestError",
        ),
        "errors",
    ),
    "EngineOptions": "engine.options",
    "TokenLogprob": "steps.logprobs",
}

__all__ = [
    "AsyncEngine",
    "CheckpointError",
    "Choice",
    "ConfigError",
    "Engine",
    "EngineDeadError",
    "EngineOptions",
    "InternVLError",
    "MediaError",
    "Piece",
    "QueueFullError",
    "Reply",
    "RequestError",
    "SamplingParams",
    "Score",
    "Timings",
    "TokenLogprob",
    "Usage",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'internvl_rt' has no attribute {name!r}")
    return getattr(import_module(f"internvl_rt.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]

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
    from internvl_rt.engine.async_engine import AsyncEngine as AsyncEngine
    from internvl_rt.engine.best_of import RankedAnswer as RankedAnswer
    from internvl_rt.engine.best_of import Ranking as Ranking
    from internvl_rt.engine.engine import Engine as Engine
    from internvl_rt.engine.options import EngineOptions as EngineOptions
    from internvl_rt.engine.reply import Choice as Choice
    from internvl_rt.engine.reply import Piece as Piece
    from internvl_rt.engine.reply import Reply as Reply
    from internvl_rt.engine.reply import Score as Score
    from internvl_rt.engine.reply import Timings as Timings
    from internvl_rt.engine.reply import Usage as Usage
    from internvl_rt.engine.voting import MajorityVote as MajorityVote
    from internvl_rt.errors import CheckpointError as CheckpointError
    from internvl_rt.errors import ConfigError as ConfigError
    from internvl_rt.errors import ContextLengthError as ContextLengthError
    from internvl_rt.errors import EngineDeadError as EngineDeadError
    from internvl_rt.errors import InternVLError as InternVLError
    from internvl_rt.errors import MediaError as MediaError
    from internvl_rt.errors import NotFiniteError as NotFiniteError
    from internvl_rt.errors import QueueFullError as QueueFullError
    from internvl_rt.errors import RequestError as RequestError
    from internvl_rt.errors import StepError as StepError
    from internvl_rt.inputs.grammar_source import Tagged as Tagged
    from internvl_rt.inputs.grammar_source import TaggedValue as TaggedValue
    from internvl_rt.inputs.prepare import PromptDescription as PromptDescription
    from internvl_rt.inputs.raw_prompt import RawPrompt as RawPrompt
    from internvl_rt.inputs.sampling_params import SamplingParams as SamplingParams
    from internvl_rt.inputs.tiles import TileLayout as TileLayout
    from internvl_rt.steps.logprobs import TokenLogprob as TokenLogprob
    from internvl_rt.steps.logprobs import TokenScores as TokenScores

_NAMES = {
    "engine.async_engine": "AsyncEngine",
    "engine.best_of": "RankedAnswer Ranking",
    "engine.engine": "Engine",
    "engine.options": "EngineOptions",
    "engine.reply": "Choice Piece Reply Score Timings Usage",
    "engine.voting": "MajorityVote",
    "errors": (
        "CheckpointError ConfigError ContextLengthError EngineDeadError InternVLError MediaError NotFiniteError "
        "QueueFullError RequestError StepError"
    ),
    "inputs.grammar_source": "Tagged TaggedValue",
    "inputs.prepare": "PromptDescription",
    "inputs.raw_prompt": "RawPrompt",
    "inputs.sampling_params": "SamplingParams",
    "inputs.tiles": "TileLayout",
    "steps.logprobs": "TokenLogprob TokenScores",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_HOMES)  # the names above, which are for type checkers, are the same


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'internvl_rt' has no attribute {name!r}")
    return getattr(import_module(f"internvl_rt.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]

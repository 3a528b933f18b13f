"""One request's tokens on their way through the engine: prompt, pictures, positions, progress."""

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from torch import Tensor

from internvl_rt.errors import RequestError
from internvl_rt.prompt import VisualSpan

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How an answer is drawn and when it ends.

    Temperature 0, the default, is greedy. The filters act in the order penalties, temperature, top_k, top_p, min_p.
    Penalties look at generated tokens only: the official code generates from embeddings, where no prompt ids exist.
    `seed` makes a draw reproducible whatever else runs; without it the engine's own seed decides.
    """

    max_tokens: int = 1024
    min_tokens: int = 0  # no stop token before this many
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | Items[str] = ()  # the answer ends before the first of these strings
    stop_token_ids: Items[int] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        def check(name: str, ok: bool, expected: str) -> None:
            if not ok:
                raise RequestError(f"{name} must be {expected}, got {getattr(self, name)!r}")

        def number(value: object) -> bool:
            return isinstance(value, int | float) and not isinstance(value, bool)

        def integer(value: object) -> bool:
            return isinstance(value, int) and not isinstance(value, bool)

        check("max_tokens", integer(self.max_tokens) and self.max_tokens >= 1, "an integer of at least 1")
        within = integer(self.min_tokens) and 0 <= self.min_tokens <= self.max_tokens
        check("min_tokens", within, f"an integer from 0 to max_tokens ({self.max_tokens})")
        check("temperature", number(self.temperature) and 0 <= self.temperature <= 100, "a number from 0 to 100")
        check("top_p", number(self.top_p) and 0 < self.top_p <= 1, "a number above 0 and at most 1")
        check("top_k", integer(self.top_k) and self.top_k >= 0, "an integer of at least 0 (0 keeps all)")
        check("min_p", number(self.min_p) and 0 <= self.min_p <= 1, "a number from 0 to 1")
        positive = number(self.repetition_penalty) and 0 < self.repetition_penalty <= 100
        check("repetition_penalty", positive, "a number above 0 and at most 100")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            check(name, number(value) and -100 <= value <= 100, "a number from -100 to 100")
        check("seed", self.seed is None or (integer(self.seed) and 0 <= self.seed < 2**64), "None or a 64-bit integer")
        strings = all(isinstance(text, str) and text for text in self.stop_strings)
        check("stop", strings and len(self.stop_strings) <= 64, "at most 64 non-empty strings")
        check("stop_token_ids", all(integer(token) for token in self.stop_token_ids), "a sequence of token ids")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture's place in the prompt and its tiles, thumbnail last."""

    span: VisualSpan
    digest: bytes  # 32 bytes: pictures of equal digest have equal tiles
    tiles: Callable[[], Tensor]  # uint8 [I, S, S, 3], or normalised floating point [I, 3, S, S]; may decode


@dataclass(slots=True, eq=False)
class Sequence:
    """A running request. `num_computed <= len(token_ids)`: the rest is what the next steps compute."""

    seq_id: int
    token_ids: list[int]  # the prompt, then what was generated
    position_T: np.ndarray  # float32 positions of the prompt
    next_position: int  # of the first generated token; each later one adds 1
    pictures: tuple[Picture, ...]
    params: SamplingParams
    max_tokens: int  # params.max_tokens, cut to the room in the context window
    stop_ids: frozenset[int]
    seed: int
    identity: bytes | None = None  # what else its keys and values depend on; None: shares no prefix with others
    num_prompt: int = field(init=False)
    num_computed: int = 0
    num_cached: int = 0  # tokens whose keys and values were in the cache when it was admitted
    finish_reason: FinishReason | None = None
    visual: dict[int, Tensor] = field(default_factory=dict)  # picture index -> its visual tokens, while needed

    def __post_init__(self) -> None:
        self.num_prompt = len(self.token_ids)

    @property
    def generated_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt :]

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def max_len(self) -> int:
        """Tokens that the cache may have to hold."""
        return self.num_prompt + self.max_tokens

    def positions(self, start: int, stop: int) -> np.ndarray:
        """float32 rotary positions of tokens [start, stop)."""
        prompt = self.position_T[start:stop]
        first, last = max(start, self.num_prompt) - self.num_prompt, stop - self.num_prompt
        generated = self.next_position + np.arange(first, last, dtype=np.float32)
        return np.concatenate((prompt, generated), dtype=np.float32) if last > first else prompt

    def pictures_within(self, start: int, stop: int) -> list[int]:
        """Indices of the pictures with a visual token in [start, stop)."""
        spans = (picture.span for picture in self.pictures)
        return [i for i, span in enumerate(spans) if span.start < stop and span.start + span.num_tokens > start]

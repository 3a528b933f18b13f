"""Sampling parameters: what a caller may request of an answer, checked once."""

import json
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any, Literal, get_args

from internvl_rt.errors import RequestError

JsonWhitespace = Literal["bounded", "compact", "free"]

MAX_ANSWERS = 128
MAX_LOGPROBS = 20
MAX_STOPS = 64
MAX_STOP_CHARACTERS = 1024
MAX_NEW_TOKENS = 1 << 20


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How an answer is drawn and when it ends.

    Temperature 0, the default, is greedy. The filters act in the order penalties, temperature, top_k, top_p, min_p.
    Penalties count generated tokens only: the official code generates from embeddings, where no prompt ids exist.
    `seed` makes a draw reproducible whatever else runs; without it the engine's own seed decides.
    """

    max_tokens: int = 1024
    min_tokens: int = 0  # no stop token is drawn before this many tokens
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    n: int = 1  # answers to the same prompt, which is computed once; each draws with a seed of its own
    seed: int | None = None
    stop: str | Items[str] = ()  # the answer ends before whichever of these strings is complete first
    stop_token_ids: Items[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # requests each generated token's log-probability, and this many of the likeliest
    prompt_logprobs: int | None = None  # requests the same of the prompt's tokens
    json_schema: str | dict[str, Any] | bool | None = None  # the answer is a JSON value of this schema; True: of any
    regex: str | None = None  # the whole answer matches this
    # White space between the parts of a JSON answer. "bounded": in each place at most a space, or a line break with up
    # to 32 spaces or 8 tabs. "compact": none. "free": any, so that an answer may be white space to its end.
    json_whitespace: JsonWhitespace = "bounded"
    # As the official chat does. False: tokens such as <ref> and <box> are part of the text, and of grammars.
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        def check(name: str, ok: bool, expected: str) -> None:
            if not ok:
                raise RequestError(f"{name} must be {expected}, got {getattr(self, name)!r}")

        def number(value: object) -> bool:
            return isinstance(value, int | float) and not isinstance(value, bool)

        def integer(value: object, least: int, most: int) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

        check("max_tokens", integer(self.max_tokens, 1, MAX_NEW_TOKENS), f"an integer from 1 to {MAX_NEW_TOKENS}")
        within = integer(self.min_tokens, 0, self.max_tokens)
        check("min_tokens", within, f"an integer from 0 to max_tokens ({self.max_tokens})")
        check("temperature", number(self.temperature) and 0 <= self.temperature <= 100, "a number from 0 to 100")
        check("top_p", number(self.top_p) and 0 < self.top_p <= 1, "a number above 0 and at most 1")
        check("top_k", integer(self.top_k, 0, 2**31 - 1), "an integer of at least 0 (0 keeps all)")
        check("min_p", number(self.min_p) and 0 <= self.min_p <= 1, "a number from 0 to 1")
        positive = number(self.repetition_penalty) and 0 < self.repetition_penalty <= 100
        check("repetition_penalty", positive, "a number above 0 and at most 100")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            check(name, number(value) and -100 <= value <= 100, "a number from -100 to 100")
        check("n", integer(self.n, 1, MAX_ANSWERS), f"an integer from 1 to {MAX_ANSWERS}")
        check("seed", self.seed is None or integer(self.seed, 0, 2**64 - 1), "None or a 64-bit integer")
        texts = (self.stop,) if isinstance(self.stop, str) else self.stop
        strings = all(isinstance(text, str) and 0 < len(text) <= MAX_STOP_CHARACTERS for text in texts)
        expected = f"at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARACTERS} characters"
        check("stop", strings and len(texts) <= MAX_STOPS, expected)
        ids = len(self.stop_token_ids) <= MAX_STOPS and all(integer(i, 0, 2**31 - 1) for i in self.stop_token_ids)
        check("stop_token_ids", ids, f"at most {MAX_STOPS} token ids")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            ok = value is None or integer(value, 0, MAX_LOGPROBS)
            check(name, ok, f"None or an integer from 0 to {MAX_LOGPROBS}")
        schema = self.json_schema is None or self.json_schema is True or isinstance(self.json_schema, str | dict)
        check("json_schema", schema, "a JSON schema as text or dict, or True for any JSON value")
        check("regex", self.regex is None or isinstance(self.regex, str), "a regular expression")
        known = isinstance(self.json_whitespace, str) and self.json_whitespace in get_args(JsonWhitespace)
        check("json_whitespace", known, f"one of {', '.join(get_args(JsonWhitespace))}")
        check("skip_special_tokens", isinstance(self.skip_special_tokens, bool), "True or False")
        if self.json_schema is not None and self.regex is not None:
            raise RequestError("json_schema and regex: expected at most one of them, got both")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def grammar(self) -> tuple[Literal["json_schema", "regex"], str] | None:
        """The kind and text of the grammar of the answer. Raises RequestError for a dict that is no JSON."""
        if self.regex is not None:
            return "regex", self.regex
        if self.json_schema is None:
            return None
        if isinstance(self.json_schema, str):
            return "json_schema", self.json_schema
        try:
            return "json_schema", json.dumps(self.json_schema)
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(
                f"json_schema: expected a JSON value, got one that json cannot write: {error}"
            ) from error

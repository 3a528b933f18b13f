"""Sampling parameters: what a caller may request of an answer, checked once."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from internvl_rt.errors import RequestError
from internvl_rt.inputs.grammar_source import MARK, PATTERN, SCHEMA, TAGGED, GrammarKind, JsonWhitespace, Tagged
from internvl_rt.values import Flag, Integer, Kind, Number, OneOf, OrNone, Several, Text, UnfitError, read, read_fields

MAX_ANSWERS = 128
MAX_LOGPROBS = 20
MAX_BIASES = 1024
MAX_STOPS = 64
MAX_STOP_CHARACTERS = 1024
MAX_NEW_TOKENS = 1 << 20


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How an answer is drawn and when it ends.

    Temperature 0, the default, is greedy. The filters act in the order penalties, temperature, top_k, top_p, min_p.
    Penalties count generated tokens only: the official code generates from embeddings, where no prompt ids exist.
    Raises RequestError that names a value of the wrong type or out of its range (`_KINDS`).

    max_tokens: most tokens of the answer.
    min_tokens: no stop token is drawn before this many tokens.
    temperature: divides the logits; 0 takes the likeliest token.
    top_p: only the likeliest tokens are drawn, as few as together have this probability.
    top_k: only this many of the likeliest tokens are drawn; 0: all.
    min_p: only tokens are drawn that have at least this fraction of the likeliest one's probability.
    repetition_penalty: divides the logits above 0 of generated tokens, and multiplies those below.
    presence_penalty: is subtracted from the logits of generated tokens.
    frequency_penalty: is subtracted once for each time that a token was generated.
    logit_bias: is added to the logits of these token ids before all else, also before a grammar forbids tokens; ids
        may be strings of digits, as in JSON. A log-probability that is returned is the one without it.
    n: answers to the same prompt, which is computed once; each draws with a seed of its own. Answers to one prompt
        leave a quarter of the engine's `max_num_seqs` places, at least one, to other requests: the rest begin later.
    seed: makes a draw reproducible whatever else runs; None: the engine's own seed decides.
    stop: the answer ends before whichever of these strings is complete first.
    include_stop: whether the stop string that ended the answer is part of its text.
    stop_token_ids: the answer ends at any of these ids, which gives no text.
    ignore_eos: whether the answer goes on after the model's end tokens.
    logprobs: requests each generated token's log-probability, and this many of the likeliest.
    prompt_logprobs: requests the same of the prompt's tokens.
    json_schema: the answer is a JSON value of this schema; True: of any.
    regex: the whole answer matches this.
    tagged: the answer is JSON values between fixed texts, as calls of tools are written, perhaps after free text. At
        most one of json_schema, regex and tagged may be given.
    grammar_after: the grammar holds after the first occurrence of this text alone, such as "</think>"; before it, and
        it must come, any text is allowed.
    json_whitespace: white space between the parts of a JSON answer. "bounded": in each place at most a space, or a line
        break with up to 32 spaces or 8 tabs. "compact": none. "free": any, so that an answer may be white space to its
        end.
    skip_special_tokens: whether tokens such as <ref> and <box> give no text, as in the official chat; False: they are
        part of the text, and of grammars. Of an answer in channels, as GPT-OSS writes them, the text is then all.
    """

    max_tokens: int = 1024
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    n: int = 1
    seed: int | None = None
    stop: str | Iterable[str] | None = ()
    include_stop: bool = False
    stop_token_ids: int | Iterable[int] | None = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    json_schema: str | dict[str, Any] | bool | None = None
    regex: str | None = None
    tagged: Tagged | None = None
    grammar_after: str | None = None
    json_whitespace: JsonWhitespace = "bounded"
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        read_fields(self, _KINDS)
        read("min_tokens", self.min_tokens, Integer(0, self.max_tokens, " (max_tokens)"))
        given = [name for name in _GRAMMARS if getattr(self, name) is not None]
        if len(given) > 1:
            raise RequestError(f"{' and '.join(given)}: expected at most one of them, got {len(given)}; leave one")
        if self.grammar_after is not None and not given:
            raise RequestError(f"grammar_after: expected a grammar beside it ({', '.join(_GRAMMARS)}), got none")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as texts, however it was given."""
        assert isinstance(self.stop, tuple), "read as one"
        return self.stop

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """`stop_token_ids`, however they were given."""
        assert isinstance(self.stop_token_ids, tuple), "read as one"
        return self.stop_token_ids

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """Token ids, in order, and what is added to their logits."""
        assert isinstance(self.logit_bias, tuple), "read as one"
        return self.logit_bias

    @property
    def has_penalties(self) -> bool:
        """Whether a penalty changes the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def grammar(self) -> tuple[GrammarKind, str | Tagged] | None:
        """The kind of the grammar of the answer, and the grammar itself; a schema and a regex are text."""
        return next(((kind, getattr(self, kind)) for kind in _GRAMMARS if getattr(self, kind) is not None), None)


class _Biases:
    """Numbers for token ids, as a tuple of pairs, which is hashable and cannot be changed; None is no pair."""

    expected = f"a mapping of at most {MAX_BIASES:,} token ids to numbers from -100 to 100, or None"

    def read(self, value: object) -> tuple[tuple[int, float], ...]:
        if value is None:
            return ()
        if not isinstance(value, Mapping | tuple) or len(value) > MAX_BIASES:
            raise UnfitError
        pairs = tuple(value.items() if isinstance(value, Mapping) else value)  # a tuple is what was read before
        if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
            raise UnfitError
        biases = {self._read_id(token_id): _PENALTY.read(number) for token_id, number in pairs}
        if len(biases) < len(pairs):  # an id is there as a number and as a string
            raise UnfitError
        return tuple(sorted(biases.items()))

    def _read_id(self, value: object) -> int:
        if isinstance(value, str) and len(value) <= 10 and value.isascii() and value.isdigit():
            value = int(value)
        return _TOKEN_ID.read(value)


_GRAMMARS = get_args(GrammarKind)
_PENALTY = Number(-100, 100)
_TOKEN_ID = Integer(0, 2**31 - 1)
_LOGPROBS = OrNone(Integer(0, MAX_LOGPROBS))
_KINDS: dict[str, Kind] = {
    "max_tokens": Integer(1, MAX_NEW_TOKENS),
    "min_tokens": Integer(0, MAX_NEW_TOKENS),
    "temperature": Number(0, 100),
    "top_p": Number(0, 1, above=True),
    "top_k": Integer(0, 2**31 - 1, " (0 keeps all)"),
    "min_p": Number(0, 1),
    "repetition_penalty": Number(0, 100, above=True),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "logit_bias": _Biases(),
    "n": Integer(1, MAX_ANSWERS),
    "seed": OrNone(Integer(0, 2**64 - 1)),
    "stop": Several(Text(1, MAX_STOP_CHARACTERS), MAX_STOPS),
    "include_stop": Flag(),
    "stop_token_ids": Several(_TOKEN_ID, MAX_STOPS),
    "ignore_eos": Flag(),
    "logprobs": _LOGPROBS,
    "prompt_logprobs": _LOGPROBS,
    "json_schema": OrNone(SCHEMA),
    "regex": OrNone(PATTERN),
    "tagged": OrNone(TAGGED),
    "grammar_after": OrNone(MARK),
    "json_whitespace": OneOf(get_args(JsonWhitespace)),
    "skip_special_tokens": Flag(),
}

"""Keeps answers to a JSON schema or a regular expression, by masks over the next token.

Only this module imports llguidance, when the first grammar is compiled. A grammar holds for the text that
`Tokenizer.decode` gives: every split of it into tokens is allowed, and skipped tokens are never part of it. Grammars
come from requests, so their costs are bounded: a grammar that would explode is counted and refused before it is
compiled, and one that grows too large later ends its own answer with an error.
"""

import json
import re
from collections.abc import Callable, Collection
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from internvl_rt.errors import RequestError, quoted, utf8
from internvl_rt.inputs.sampling_params import MAX_GRAMMAR_BYTES, JsonWhitespace
from internvl_rt.inputs.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

T = TypeVar("T")
GrammarKind = Literal["json_schema", "regex"]

# The library does not bound its own work for these: its time grows with the square of the properties, with a higher
# power of the operators, and doubles with each combined pattern. Within these limits no call takes a second.
MAX_PROPERTIES = 1000
MAX_REGEX_OPERATORS = 512
MAX_COMBINED_PATTERNS = 10

# White space in one place of a JSON answer. The library takes at most one match of the pattern in each place.
_WHITESPACE: dict[JsonWhitespace, dict[str, Any]] = {
    "bounded": {"whitespace_pattern": r" |\r?\n( {0,32}|\t{0,8})"},
    "compact": {"whitespace_flexible": False},
    "free": {},
}
_CACHED = 64
_MAX_LEXER_STATES = 50_000  # states of one grammar, about half a kB each
_OPERATOR = re.compile(r"[*+{(]|(?<!\()\?")  # repetitions and groups; escaped ones count too
_VERBOSE = re.compile(r"\(\?[a-zA-Z-]*x")
_TOO_COMPLEX = re.compile(r"fuel|too (many|big|large|complex)|max is")  # errors by the library's own limits
# A schema with a `_REFERENCES` keyword and another one of either set is an intersection of two schemas.
_REFERENCES = {"$ref", "anyOf", "oneOf"}
_ASSERTIONS = {"additionalProperties", "format", "items", "pattern", "prefixItems", "properties"}
_EXPECTED = {
    "json_schema": "a JSON schema without if, not, uniqueItems, dependencies and references to other documents",
    "regex": "a regular expression in Rust's syntax without look-around, back references and inner anchors",
}


def check_grammar_size(kind: GrammarKind, text: str) -> None:
    """Raises RequestError for a grammar beyond the limits above, and for a JSON schema that is not JSON."""
    if kind not in _EXPECTED:
        raise RequestError(f"the kind of a grammar must be one of {', '.join(_EXPECTED)}, got {kind!r}")
    _check_count(kind, "bytes", len(utf8(f"the {kind}", text)), MAX_GRAMMAR_BYTES)
    if kind == "json_schema":
        _check_schema(text)
    else:
        _check_regex(text)


class GrammarCompiler:
    """Compiles grammars for one tokenizer and keeps the latest; any number of threads may use it at once."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """vocab_size: width of the model's logits; ids that the tokenizer does not have are never allowed."""
        self._compile = lru_cache(maxsize=_CACHED)(_Library(tokenizer, vocab_size).compile)

    def compile(
        self,
        kind: GrammarKind,
        text: str,
        *,
        whitespace: JsonWhitespace = "bounded",
        skips_specials: bool = True,
        begun: bool = False,
    ) -> "Grammar":
        """Compiles a JSON schema, given as JSON, or a regular expression that the whole answer must match.

        whitespace: between the parts of a JSON answer. With "free" there may be any, even without end.
        skips_specials: whether special tokens such as <ref> are left out of the text, and so never allowed.
        begun: whether the prompt holds the beginning of the answer, so that a space may be the first of the text.

        Raises RequestError if the grammar is invalid, unknown to the library, beyond the limits or matches nothing, and
        if llguidance is not installed.
        """
        check_grammar_size(kind, text)
        return self._compile(kind, text, whitespace, skips_specials, begun)


class _Library:
    """llguidance with one tokenizer; nothing is compiled until the first grammar is needed."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._stop_id = tokenizer.token_id("<|im_end|>")
        self._lock = Lock()
        self._vocabularies: dict[bool, LLTokenizer] = {}  # by whether special tokens are left out of the text

    def compile(
        self, kind: GrammarKind, text: str, whitespace: JsonWhitespace, skips_specials: bool, begun: bool
    ) -> "Grammar":
        vocabulary = self._build_vocabulary(skips_specials)
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(
            max_items_in_row=10_000,  # MAX_PROPERTIES optional properties need 4000
            step_max_items=100_000,  # MAX_PROPERTIES optional properties need 60 000
            max_lexer_states=_MAX_LEXER_STATES,
            verbose_errors=False,  # verbose errors would show the schema and the answer
        )
        drops_space = self._tokenizer.pieces and not begun
        source = _describe(kind, text, _WHITESPACE[whitespace], drops_space=drops_space)
        grammar = Grammar(
            lambda: LLMatcher(vocabulary, source, log_level=0, limits=limits), self._stop_id, self._vocab_size
        )
        state = grammar.state
        if not state.is_error():
            mask = state.compute_bitmask()  # prepares the first mask of every answer, and fails if none exists
        if state.is_error() or int.from_bytes(mask, "little") == 1 << self._stop_id:
            reason = _reason(state) if state.is_error() else "it matches only the empty text"
            raise RequestError(
                f"the {kind} cannot be compiled: {reason}; expected {_EXPECTED[kind]}, got {quoted(text)}; rewrite it"
            )
        return grammar

    def _build_vocabulary(self, skips_specials: bool) -> "LLTokenizer":
        """Builds the library's trie of all tokens, once."""
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ImportError as error:
            raise RequestError("structured output needs llguidance: pip install 'internvl-rt[grammar]'") from error
        with self._lock:
            if skips_specials not in self._vocabularies:
                hidden = self._tokenizer.hidden_ids | (self._tokenizer.special_ids if skips_specials else set())
                wrapper = TokenizerWrapper(_Vocabulary(self._tokenizer, self._stop_id, self._vocab_size, hidden))
                self._vocabularies[skips_specials] = LLTokenizer(wrapper, eos_token=self._stop_id)
            return self._vocabularies[skips_specials]


class Grammar:
    """A compiled grammar, shared by any number of answers in any threads.

    The library keeps what it learns about a grammar for all answers. That saves most of the work, but its limits then
    hold for all of them together; `is_used_up` says that a new state is due.
    """

    def __init__(self, build: Callable[[], "LLMatcher"], stop_id: int, vocab_size: int) -> None:
        self.build, self.stop_id, self.vocab_size = build, stop_id, vocab_size
        self.state = build()
        self.is_used_up = False

    def start(self) -> "Matcher":
        """Begins a new answer."""
        if self.is_used_up:
            self.state, self.is_used_up = self.build(), False
        return Matcher(self, self.state.deep_copy())


class Matcher:
    """One answer's place in its grammar; one thread at a time may use it."""

    def __init__(self, grammar: Grammar, state: "LLMatcher") -> None:
        self._grammar, self._state = grammar, state
        self._token_ids: list[int] = []  # the tokens that `state` has accepted
        self._is_shared = True  # whether `state` shares what the library knows with other answers

    def fill_mask(self, mask_W: NDArray[np.int32]) -> None:
        """Sets bit t % 32 of word t // 32 if token t may come next, and clears all others.

        The stop token may come when the text is complete; after it, only itself. `mask_W` is contiguous and has
        ceil(vocab_size / 32) words. Raises RequestError if no token may come, or the grammar has become too complex.
        """
        assert mask_W.dtype == np.int32
        assert mask_W.shape == (-(-self._grammar.vocab_size // 32),)
        assert mask_W.flags.carray, "the library writes to the address"
        self._try(lambda state: state.unsafe_compute_mask_ptr(mask_W.ctypes.data, mask_W.nbytes))

    def accept(self, token_id: int) -> bool:
        """Advances by one token, or returns False if it does not fit. Raises RequestError as `fill_mask` does."""
        if not 0 <= token_id < self._grammar.vocab_size:
            return False
        if self.is_complete:
            return token_id == self._grammar.stop_id

        def consume(state: "LLMatcher") -> bool:
            if state.try_consume_tokens([token_id]):
                return True
            state.compute_bitmask()  # fails if the library's limits, not the token, are the reason
            return False

        if not self._try(consume):
            return False
        self._token_ids.append(token_id)
        return True

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the stop token may follow."""
        return self._state.is_stopped() and not self._state.is_error()

    def _try(self, act: Callable[["LLMatcher"], T]) -> T:
        """Returns the result of `act`; if other answers have used up the shared state, this answer gets its own."""
        result = act(self._state)
        if self._state.is_error() and self._is_shared and _TOO_COMPLEX.search(self._state.get_error()):
            self._grammar.is_used_up = True
            self._state, self._is_shared = self._grammar.build(), False
            self._state.consume_tokens(self._token_ids)
            result = act(self._state)
        if self._state.is_error():
            raise RequestError(f"the grammar admits no further token: {_reason(self._state)}; simplify the grammar")
        return result


class _Vocabulary:
    """Gives a tokenizer's tokens to the library in the form that it expects."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, stop_id: int, vocab_size: int, special_ids: Collection[int]) -> None:
        self.eos_token_id = stop_id
        self.tokens = [tokenizer.token_bytes.get(token_id, b"") for token_id in range(vocab_size)]
        self.special_token_ids = sorted(special_ids)
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


def _describe(kind: GrammarKind, text: str, options: dict[str, Any], *, drops_space: bool) -> str:
    """Writes a grammar in the library's format.

    options: the library's own for JSON. drops_space: a space that begins an answer is not part of its text.
    """
    from llguidance import regex_to_lark

    if kind == "json_schema":
        rules = 'start: " "? @value' if drops_space else "start: @value"  # no JSON text begins with a space
    else:
        rules = f"start: TEXT\nBODY: /{regex_to_lark(text)}/\nSPACED: / (.|\\n)*/\n"
        rules += 'TEXT: " " BODY | BODY & ~SPACED' if drops_space else "TEXT: BODY"
    # Without no_forcing, text that can go on in one way only would have to be split as the tokenizer does.
    grammars = [json.dumps({"lark_grammar": f'%llguidance {{"no_forcing": true}}\n{rules}'})]
    if kind == "json_schema":
        # The schema stays text, so that its numbers keep all digits; the options are its first key.
        schema, own = text.strip(), f'{{"x-guidance": {json.dumps(options)}'
        if schema == "true":
            schema = f"{own}}}"
        elif schema.startswith("{"):
            schema = own + ("" if json.loads(schema) == {} else ",") + schema[1:]
        grammars.append(f'{{"name": "value", "json_schema": {schema}}}')
    return f'{{"grammars": [{", ".join(grammars)}]}}'


def _reason(state: "LLMatcher") -> str:
    """Returns the library's error in one line, without the source that it quotes."""
    message = state.get_error()
    if "NoExtension" in message:
        return "no text matches from here on"
    if _TOO_COMPLEX.search(message):
        return "it is too complex"
    if "coerce_one_of" in message:
        return "the alternatives of its oneOf may overlap, where anyOf would do"
    message = message.partition("\n   1 | ")[0].replace("<non-verbose/>", "")
    message = message.rpartition(" (in regex): ")[2].rpartition("\nerror: ")[2]
    message = " ".join(message.split())
    return message if len(message) <= 200 else f"{message[:200]}..."


def _check_count(kind: GrammarKind, what: str, count: int, limit: int) -> None:
    if count > limit:
        raise RequestError(f"the {kind} has {count:,} {what}, at most {limit:,} are compiled; simplify it")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _check_regex(text: str) -> None:
    """Refuses text that the library would silently read in another sense, and too many operators."""
    if (len(text) - len(text.rstrip("\\"))) % 2:
        raise RequestError(f"the regex ends in a backslash that escapes nothing: {quoted(text)}; remove or double it")
    if "\n" in text and _VERBOSE.search(text):
        raise RequestError(f"the regex has line breaks under the flag x: {quoted(text)}; write it in one line")
    _check_count("regex", "repetitions and groups", len(_OPERATOR.findall(text)), MAX_REGEX_OPERATORS)


def _check_schema(text: str) -> None:
    try:
        schema: Any = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise RequestError(f"the json_schema is not JSON: {reason}; got {quoted(text)}; correct it") from error
    if isinstance(schema, dict) and "x-guidance" in schema:  # sets options of the library: lenient, separators, ...
        raise RequestError("the json_schema has x-guidance, which is no keyword of JSON Schema; remove it")
    num_properties, patterns, combined = 0, set[str](), False
    pending = [schema]
    while pending:
        node = pending.pop()
        if isinstance(node, list):
            pending += node
        elif isinstance(node, dict):
            pending += node.values()
            properties, by_pattern = node.get("properties"), node.get("patternProperties")
            num_properties += len(properties) if isinstance(properties, dict) else 0
            patterns |= {node[word] for word in ("pattern", "format") if isinstance(node.get(word), str)}
            patterns |= by_pattern.keys() if isinstance(by_pattern, dict) else set()
            references = node.keys() & _REFERENCES
            combined |= bool(references) and len(references) + len(node.keys() & _ASSERTIONS) > 1
            combined |= not node.keys().isdisjoint(("allOf", "patternProperties"))
    _check_count("json_schema", "properties", num_properties, MAX_PROPERTIES)
    num_operators = sum(len(_OPERATOR.findall(pattern)) for pattern in patterns)
    _check_count("json_schema", "repetitions and groups in its patterns", num_operators, MAX_REGEX_OPERATORS)
    if combined:
        what = "different patterns and formats, and combines them (allOf, patternProperties, $ref or anyOf with more)"
        _check_count("json_schema", what, len(patterns), MAX_COMBINED_PATTERNS)

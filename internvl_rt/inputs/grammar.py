"""Keeps answers to a JSON schema or a regular expression, by masks over the next token.

Only this module imports llguidance, when the first grammar is compiled. A grammar holds for the text that
`Tokenizer.decode` gives: every split of it into tokens is allowed, and skipped tokens are never part of it. Grammars
come from requests, so their costs are bounded: a grammar beyond the limits is refused before it is compiled, and one
that grows too large later ends its own answer with an error.
"""

import json
import re
from collections.abc import Callable, Collection
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from internvl_rt.checkpoint.template import CHATML
from internvl_rt.errors import RequestError, quoted
from internvl_rt.inputs.grammar_limits import check_grammar_size
from internvl_rt.inputs.grammar_source import GrammarKind, JsonWhitespace, Tagged
from internvl_rt.inputs.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

T = TypeVar("T")
# White space in one place of a JSON answer. The library takes at most one match of the pattern in each place.
_WHITESPACE: dict[JsonWhitespace, dict[str, Any]] = {
    "bounded": {"whitespace_pattern": r" |\r?\n( {0,32}|\t{0,8})"},
    "compact": {"whitespace_flexible": False},
    "free": {},
}
_CACHED = 64
_MAX_LEXER_STATES = 50_000  # states of one grammar, about half a kB each
_EXCERPT = re.compile(r"\n +\d+ \| ")  # begins the lines of the source in an error
_TOO_COMPLEX = re.compile(r"fuel|too (many|big|large|complex)|max is")  # errors by the library's own limits
_UNKNOWN = "without if, not, uniqueItems, dependencies and references to other documents"
_EXPECTED = {
    "json_schema": f"a JSON schema {_UNKNOWN}",
    "regex": "a regular expression in Rust's syntax without look-around, back references and inner anchors",
    "tagged": f"JSON schemas {_UNKNOWN}",
}


class GrammarCompiler:
    """Compiles grammars for one tokenizer and keeps the latest; any number of threads may use it at once."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop: str = CHATML.stop.token) -> None:
        """vocab_size: width of the model's logits; ids that the tokenizer does not have are never allowed.

        stop: the token that ends an answer.
        """
        self._compile = lru_cache(maxsize=_CACHED)(_Library(tokenizer, vocab_size, stop).compile)

    def compile(
        self,
        kind: GrammarKind,
        source: str | Tagged,
        *,
        after: str | None = None,
        whitespace: JsonWhitespace = "bounded",
        skips_specials: bool = True,
        begun: bool = False,
    ) -> "Grammar":
        """Compiles a JSON schema, given as JSON, a regex that the whole answer must match, or tagged values.

        after: the grammar holds after the first occurrence of this text, which must come; before it there may be any.
        whitespace: between the parts of a JSON answer. With "free" there may be any, even without end.
        skips_specials: whether special tokens such as <ref> are left out of the text, and so never allowed.
        begun: whether the prompt holds the beginning of the answer, so that a space may be the first of the text.

        Raises RequestError if the grammar is invalid, unknown to the library, beyond the limits or matches nothing, and
        if llguidance is not installed.
        """
        if kind not in _EXPECTED:
            raise RequestError(f"the kind of a grammar must be one of {', '.join(_EXPECTED)}, got {kind!r}")
        check_grammar_size(kind, source, after or "")
        return self._compile(kind, source, after, whitespace, skips_specials, begun)


class _Library:
    """llguidance with one tokenizer; nothing is compiled until the first grammar is needed."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop: str) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._stop_id = tokenizer.token_id(stop)
        self._lock = Lock()
        self._vocabularies: dict[bool, LLTokenizer] = {}  # by whether special tokens are left out of the text

    def compile(
        self,
        kind: GrammarKind,
        source: str | Tagged,
        after: str | None,
        whitespace: JsonWhitespace,
        skips_specials: bool,
        begun: bool,
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
        written = _Description(_WHITESPACE[whitespace]).write(kind, source, after, drops_space=drops_space)
        grammar = Grammar(
            lambda: LLMatcher(vocabulary, written, log_level=0, limits=limits), self._stop_id, self._vocab_size
        )
        state = grammar.state
        if not state.is_error():
            mask = state.compute_bitmask()  # prepares the first mask of every answer, and fails if none exists
        if state.is_error() or int.from_bytes(mask, "little") == 1 << self._stop_id:
            reason = _reason(state) if state.is_error() else "it matches only the empty text"
            raise RequestError(
                f"the {kind} cannot be compiled: {reason}; expected {_EXPECTED[kind]}, got {quoted(source)}; rewrite it"
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


class _Description:
    """Writes a grammar in the library's format: rules in its dialect of lark, and the JSON schemas that these name."""

    def __init__(self, options: dict[str, Any]) -> None:
        """options: the library's own for JSON."""
        self._options = options
        # Without no_forcing, text that can go on in one way only would have to be split as the tokenizer does.
        self._rules = ['%llguidance {"no_forcing": true}', "ANY: /(.|\\n)*/", "SOME: /(.|\\n)+/"]
        self._schemas: list[str] = []

    def write(self, kind: GrammarKind, source: str | Tagged, after: str | None, *, drops_space: bool) -> str:
        """Returns the description. drops_space: a space that begins an answer is not part of its text."""
        start = ""
        if after is not None:
            self._rules.append(f"after[lazy]: {_before(after, drops_space)} {_literal(after)}")
            start, drops_space = "after ", False
        if isinstance(source, Tagged):
            start += self._tagged(source, drops_space=drops_space)
        elif kind == "json_schema":
            start += f"{_spaced('', drops_space)} {self._json(source)}"
        else:
            start += self._regex(source, drops_space=drops_space)
        lark = "\n".join([*self._rules, f"start: {start}"])
        return f'{{"grammars": [{", ".join([json.dumps({"lark_grammar": lark}), *self._schemas])}]}}'

    def _regex(self, text: str, *, drops_space: bool) -> str:
        from llguidance import regex_to_lark

        self._rules += [f"BODY: /{regex_to_lark(text)}/", r"SPACED: / (.|\n)*/"]
        self._rules.append('TEXT: " " BODY | BODY & ~SPACED' if drops_space else "TEXT: BODY")
        return "TEXT"

    def _json(self, schema: str) -> str:
        """Adds a schema, as text, so that its numbers keep all digits; the options are its first key."""
        text, own = schema.strip(), f'{{"x-guidance": {json.dumps(self._options)}'
        if text == "true":
            text = f"{own}}}"
        elif text.startswith("{"):
            text = own + ("" if json.loads(text) == {} else ",") + text[1:]
        name = f"value_{len(self._schemas)}"
        self._schemas.append(f'{{"name": "{name}", "json_schema": {text}}}')
        return f"@{name}"

    def _tagged(self, tagged: Tagged, *, drops_space: bool) -> str:
        """Adds rules for values one after another; the first one's beginning may have to be written in another way."""
        first, later = [], []
        for index, value in enumerate(tagged.values):
            self._rules.append(f"rest_{index}: {self._json(value.schema)} {_literal(value.end)}")
            begin = _spaced(value.begin, drops_space)
            if tagged.trigger is not None:
                begin = _literal(value.begin.removeprefix(tagged.trigger))
            first.append(f"{begin} rest_{index}")
            later.append(f"{_literal(value.begin)} rest_{index}")
        self._rules += [f"first: {' | '.join(first)}", f"later: {_literal(tagged.separator)} ({' | '.join(later)})"]
        values = "first later*" if tagged.most is None else "first"
        if tagged.most is not None and tagged.most > 1:  # the library takes no range up to 0
            values += f" later{{0,{tagged.most - 1}}}"
        if tagged.trigger is None:
            return values
        called = f"{_before(tagged.trigger, drops_space)} {_literal(tagged.trigger)}"
        # A lazy rule ends where it first can, which is behind the first trigger.
        self._rules += [f"called[lazy]: {called}", f"CALLED: {called} ANY", "FREE: ANY & ~CALLED"]
        return f"(FREE? | called {values})"


def _literal(text: str) -> str:
    """Writes a text for a rule; nothing for an empty one, which the library does not take."""
    return json.dumps(text, ensure_ascii=False) if text else ""


def _spaced(text: str, drops_space: bool) -> str:
    """Writes a text with which the answer begins. A space before it is dropped if the text itself has none."""
    if not drops_space:
        return _literal(text)
    return _literal(f" {text}") if text.startswith(" ") else f'" "? {_literal(text)}'


def _before(mark: str, drops_space: bool) -> str:
    """Names what may precede a mark. If the first space is dropped, a mark with a space cannot be all there is."""
    return "SOME" if drops_space and mark.startswith(" ") else "ANY"


def _reason(state: "LLMatcher") -> str:
    """Returns the library's error in one line, without the source that it quotes."""
    message = state.get_error()
    if "NoExtension" in message:
        return "no text matches from here on"
    if _TOO_COMPLEX.search(message):
        return "it is too complex"
    if "coerce_one_of" in message:
        return "the alternatives of its oneOf may overlap, where anyOf would do"
    message = _EXCERPT.split(message)[0].replace("<non-verbose/>", "")
    message = message.rpartition(" (in regex): ")[2].rpartition("\nerror: ")[2]
    message = " ".join(message.split())
    return message if len(message) <= 200 else f"{message[:200]}..."

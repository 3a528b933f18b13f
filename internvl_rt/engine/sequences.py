"""Makes the sequences that steps compute, one for each answer, from a prompt and sampling parameters."""

import itertools
import secrets
from collections.abc import Sequence as Items
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_rt.checkpoint.config import ModelConfig
from internvl_rt.checkpoint.template import TEMPLATES
from internvl_rt.engine.options import EngineOptions
from internvl_rt.errors import RequestError
from internvl_rt.inputs.channels import end_ids
from internvl_rt.inputs.grammar import GrammarCompiler, Matcher
from internvl_rt.inputs.places import Places, places_of_tokens
from internvl_rt.inputs.prepare import Prepared
from internvl_rt.inputs.sampling_params import SamplingParams
from internvl_rt.inputs.thinking import END
from internvl_rt.inputs.tokenizer import Tokenizer
from internvl_rt.steps.sampler import derive_seed
from internvl_rt.steps.sequence import Sequence
from internvl_rt.steps.speculation import PromptLookup

_UNDRAWN = SamplingParams(max_tokens=1)


class SequenceFactory:
    """Numbers sequences, derives their seeds, and compiles their grammars. Any thread may use it."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer, options: EngineOptions, max_model_len: int) -> None:
        self._options, self._max_model_len = options, max_model_len
        self._vocab_size, self._max_position = config.decoder.vocab_size, config.decoder.max_position
        stop = TEMPLATES[config.template].stop.token
        self._turn_end, self._end_ids = tokenizer.token_id(stop), end_ids(config, tokenizer)
        self._grammars = GrammarCompiler(tokenizer, self._vocab_size, stop)
        self._engine_seed = secrets.randbits(64) if options.seed is None else options.seed
        self._prompt_numbers, self._seq_ids = itertools.count(), itertools.count()

    def check(self, params: SamplingParams) -> None:
        """Raises RequestError for parameters that this engine cannot serve."""
        most = self._options.max_num_seqs
        if params.n > most:
            raise RequestError(
                f"n is {params.n}, but at most max_num_seqs = {most} answers to one prompt may be asked for; lower n "
                "or raise max_num_seqs"
            )
        named = {"stop_token_ids": params.stop_ids, "logit_bias": [token_id for token_id, _ in params.biases]}
        for name, token_ids in named.items():
            if token_ids and (largest := max(token_ids)) >= self._vocab_size:
                raise RequestError(f"{name}: {largest} is not in the vocabulary of {self._vocab_size:,} tokens")

    def make(self, prepared: Prepared, params: SamplingParams, *, greedy_first: bool = False) -> list[Sequence]:
        """Makes a sequence for each answer: the first computes the prompt, its siblings wait for that.

        `max_tokens` is cut to the room left in the context window. greedy_first: whether the first answer is drawn
        greedily, whatever the temperature. Raises RequestError.
        """
        self.check(params)
        number = next(self._prompt_numbers)
        seed = params.seed if params.seed is not None else derive_seed(self._engine_seed, number)
        left = self._max_model_len - len(prepared.prompt.token_ids)
        room = min(left, self._max_position - prepared.next_position)
        grammar = None
        if params.grammar:
            grammar = self._grammars.compile(
                *params.grammar,
                after=params.grammar_after or (END if prepared.thinks else None),
                whitespace=params.json_whitespace,
                skips_specials=params.skip_special_tokens,
                begun=prepared.begun,
            )
        speculates = self._options.num_draft_tokens > 0 and grammar is None and not params.has_penalties
        places, ids = None, prepared.prompt.token_ids
        if params.prompt_logprobs is not None and len(ids) > 1:
            places = places_of_tokens(0, ids[1:], params.prompt_logprobs)
        eos = (self._turn_end,) if grammar else () if params.ignore_eos else self._end_ids  # a grammar ends by its own
        made = [
            Sequence(
                seq_id=next(self._seq_ids),
                token_ids=list(prepared.prompt.token_ids),
                position_T=prepared.position_T,
                next_position=prepared.next_position,
                pictures=prepared.pictures,
                params=replace(params, temperature=0.0) if greedy_first and index == 0 else params,
                max_tokens=min(params.max_tokens, room),
                stop_ids=frozenset((*eos, *params.stop_ids)),
                seed=derive_seed(seed, index) if index else seed,
                identity=prepared.identity,
                salt=prepared.salt,
                matcher=(matcher := grammar.start()) if grammar else None,
                mask_W=self._first_mask(matcher) if grammar else None,
                places=places if index == 0 else None,
                drafter=PromptLookup(self._options.num_draft_tokens) if speculates else None,
            )
            for index in range(params.n)
        ]
        made[0].siblings = made[1:]
        return made

    def make_scored(self, prompts: Items[Prepared]) -> tuple[Sequence | None, list[Sequence]]:
        """Makes a sequence for each prompt that scores its places and draws nothing.

        What several prompts begin with alike, pictures included, is a sequence of its own, which they fork off from
        when it is computed; it is the first result, or None.
        """
        made = [self._undrawing(prompt, prompt.prompt.token_ids, prompt.places) for prompt in prompts]
        if len(made) == 1 or not (length := _common_length(made)):
            return None, made
        beginning = self._undrawing(prompts[0], prompts[0].prompt.token_ids[:length], None)
        beginning.siblings = list(made)
        return beginning, made

    def _undrawing(self, prepared: Prepared, token_ids: Items[int], places: Places | None) -> Sequence:
        return Sequence(
            seq_id=next(self._seq_ids),
            token_ids=list(token_ids),
            position_T=prepared.position_T,
            next_position=prepared.next_position,
            pictures=prepared.pictures,
            params=_UNDRAWN,
            max_tokens=0,
            stop_ids=frozenset(),
            seed=0,
            identity=prepared.identity,
            salt=prepared.salt,
            places=places,
        )

    def _first_mask(self, matcher: Matcher) -> NDArray[np.int32]:
        mask_W = np.empty(-(-self._vocab_size // 32), np.int32)
        matcher.fill_mask(mask_W)
        return mask_W


def _common_length(sequences: Items[Sequence]) -> int:
    """Counts the tokens before any scored place that prompts begin with alike; 0 unless all pictures are among them."""
    first, *others = sequences
    ids, length = np.array(first.token_ids), min(each.max_cached or 0 for each in sequences)
    for other in others:
        length = min(length, _num_equal(ids, np.array(other.token_ids)), _num_equal(first.position_T, other.position_T))
        digests = [[picture.span_digest for picture in each.pictures] for each in (first, other)]
        if other.identity != first.identity or digests[0] != digests[1]:
            return 0
    ends = [picture.span.start + picture.span.num_tokens for picture in first.pictures]
    return length if length >= max(ends, default=0) else 0


def _num_equal(a_N: NDArray[Any], b_N: NDArray[Any]) -> int:
    """Counts the leading numbers that two arrays have in common."""
    most = min(len(a_N), len(b_N))
    differs = a_N[:most] != b_N[:most]
    return int(differs.argmax()) if differs.any() else most

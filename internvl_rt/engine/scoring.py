"""Scores of given responses and tokens: prompts that draw nothing, of which some places are read."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TypedDict

import numpy as np

from internvl_rt.engine.batch import run_batch
from internvl_rt.engine.core import EngineCore
from internvl_rt.engine.failures import numbered
from internvl_rt.engine.reply import Score, Scored
from internvl_rt.engine.request import Request
from internvl_rt.errors import InternVLError, RequestError, check_list, quoted
from internvl_rt.inputs.places import Places
from internvl_rt.inputs.prepare import Prepared, PromptSource
from internvl_rt.inputs.sampling_params import MAX_LOGPROBS
from internvl_rt.inputs.tokenizer import Tokenizer
from internvl_rt.steps.logprobs import TokenScores
from internvl_rt.values import Flag, Integer, read

MAX_RESPONSES = 10_000  # of one call
MAX_CHARACTERS = 1 << 26  # of all responses of one call
MAX_CANDIDATES = 1024
MAX_SCORES = 1 << 20  # candidates in all places of one call


class ScoreOptions(TypedDict):
    """What `Preparer.prepare_score` takes besides prompt and response."""

    include_end: bool
    num_top: int


def read_responses(responses: Sequence[str]) -> tuple[str, ...]:
    """Returns the responses of a call of `score`. Raises RequestError before anything is made of them."""
    check_list("responses", responses, "texts")
    if len(responses) > MAX_RESPONSES:
        raise RequestError(
            f"responses: expected at most {MAX_RESPONSES:,}, got {len(responses):,}; score them in several calls"
        )
    texts = tuple(responses)
    for text in texts:
        if not isinstance(text, str) or not text:
            raise RequestError(f"responses: expected texts that are not empty, got {quoted(text)}; leave it out")
    if (num_characters := sum(map(len, texts))) > MAX_CHARACTERS:
        raise RequestError(
            f"responses: expected at most {MAX_CHARACTERS:,} characters together, got {num_characters:,}; score them "
            "in several calls"
        )
    return texts


def read_batch(batch: Sequence[tuple[PromptSource, Sequence[str]]]) -> list[tuple[PromptSource, tuple[str, ...]]]:
    """Returns the conversations and responses of a call of `score_batch`. Raises RequestError, as `read_responses`."""
    check_list("batch", batch, "pairs of a conversation and its responses")
    for index, pair in enumerate(batch):
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise RequestError(f"batch[{index}]: expected (messages, responses), got {quoted(pair)}; give both")
    return [(messages, read_responses(responses)) for messages, responses in batch]


def read_score_options(include_end: bool, num_top: int) -> ScoreOptions:
    """Returns what a call of `score` says besides. Raises RequestError."""
    include_end = read("include_end", include_end, Flag())
    return {"include_end": include_end, "num_top": read("num_top", num_top, Integer(0, MAX_LOGPROBS))}


def read_candidates(candidates: Sequence[str | int], tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """Returns the token ids of candidates, of which each is an id, or a text that is one token. Raises RequestError."""
    check_list("candidates", candidates, "tokens, each an id or a text")
    if not 1 <= len(candidates) <= MAX_CANDIDATES:
        raise RequestError(
            f"candidates: expected from 1 to {MAX_CANDIDATES:,} tokens, got {len(candidates):,}; give so many"
        )
    kind = Integer(0, vocab_size - 1, " (the vocabulary)")
    longest = max(map(len, tokenizer.token_bytes.values()))
    found = []
    for index, candidate in enumerate(candidates):
        if not isinstance(candidate, str):
            found.append(read(f"candidates[{index}]", candidate, kind))
            continue
        ids = tokenizer.encode(candidate, specials=True) if len(candidate) <= longest else []
        if len(ids) != 1:
            raise RequestError(
                f"candidates[{index}]: expected a text that is one token, got {quoted(candidate)}, which is not; give "
                "an id, or score whole texts with `score`"
            )
        found += ids
    return found


def read_positions(positions: Sequence[int], num_tokens: int) -> list[int]:
    """Returns indices of a prompt's tokens, of which negative ones count from its end. Raises RequestError."""
    if not positions:
        raise RequestError("positions: expected at least one index, got none; -1 is where the answer begins")
    kind = Integer(-num_tokens, num_tokens - 1, f" (the prompt has {num_tokens:,} tokens)")
    return [read(f"positions[{index}]", each, kind) % num_tokens for index, each in enumerate(positions)]


def places_of(positions: Sequence[int], candidates: Sequence[int]) -> Places:
    """Returns the places of the same candidate tokens after some of a prompt's tokens; each is read once."""
    index_P = np.unique(np.array(positions, np.int64))
    return Places(index_P, np.tile(np.array(candidates, np.int64), (len(index_P), 1)))


def build_score(scored: Scored) -> Score:
    """Reads the score of a response whose tokens are the candidates of the places."""
    return Score(tuple(place.of_first() for place in scored.places), scored.usage)


def score_conversations(
    engine: EngineCore,
    batch: Sequence[tuple[PromptSource, Sequence[str]]],
    prepare: Callable[[PromptSource], Prepared],
    *,
    include_end: bool,
    num_top: int,
    progress: bool,
) -> list[list[Score]]:
    """Scores the responses to each conversation of a batch; the responses to one are computed together."""
    asked, options = read_batch(batch), read_score_options(include_end, num_top)
    read("progress", progress, Flag())
    size = min(engine.max_answers, max([1, *(len(texts) for _, texts in asked)]))

    def requests() -> Iterator[Request]:
        for index, (messages, texts) in enumerate(asked):
            try:
                prompt = prepare(messages)
                for first in range(0, len(texts), size):
                    make = partial(engine.preparer.prepare_score, prompt, **options)
                    yield engine.new_scoring([make(text) for text in texts[first : first + size]])
            except InternVLError as error:
                if len(asked) == 1:
                    raise
                raise numbered(index, error) from error

    num_requests = sum(-(-len(texts) // size) for _, texts in asked)
    most = max(1, engine.options.max_num_seqs // (size + 1))  # requests at a time, each with what it begins with
    replies = run_batch(engine.loop, requests(), num_requests, max_running=most, progress=progress)
    scores = iter([build_score(scored) for reply in replies for scored in reply.scored])
    return [list(islice(scores, len(texts))) for _, texts in asked]


def score_places(
    engine: EngineCore,
    candidates: Sequence[str | int],
    positions: Sequence[int],
    prepare: Callable[[], Prepared],
) -> list[TokenScores]:
    """Scores the same candidates in several places of one prompt."""
    token_ids = read_candidates(candidates, engine.tokenizer, engine.config.decoder.vocab_size)
    check_list("positions", positions, "indices of the prompt's tokens")
    if len(positions) * len(token_ids) > MAX_SCORES:
        raise RequestError(
            f"positions: expected at most {MAX_SCORES // len(token_ids):,} indices with {len(token_ids):,} candidates, "
            f"got {len(positions):,}; score them in several calls"
        )
    prompt = prepare()
    wanted = read_positions(positions, len(prompt.prompt.token_ids))
    places = places_of(wanted, token_ids)
    (scored,) = engine.run_scoring(iter([replace(prompt, places=places)]))
    found = dict(zip(places.index_P.tolist(), scored.places, strict=True))
    return [found[position] for position in wanted]

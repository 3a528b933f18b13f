"""Scores of given responses: each response is a request, whose prompt ends with it and which draws no token."""

from collections.abc import Sequence

from internvl_rt.engine.reply import Reply, Score
from internvl_rt.errors import RequestError, check_list, quoted
from internvl_rt.inputs.sampling_params import SamplingParams

SCORING = SamplingParams(max_tokens=1, prompt_logprobs=0)
MAX_RESPONSES = 10_000  # of one call
MAX_CHARACTERS = 1 << 26  # of all responses of one call


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


def build_score(reply: Reply) -> Score:
    """Reads the score from the reply to a request that was run with SCORING."""
    assert reply.prompt_logprobs is not None, "run with SCORING"
    return Score(reply.prompt_logprobs, reply.usage)

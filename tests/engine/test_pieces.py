"""Pieces of a streamed answer: text when it is certain, log-probabilities as soon as their tokens are known."""

import asyncio
from dataclasses import replace

import pytest

from internvl_rt import AsyncEngine, SamplingParams
from support.calls import ask, collect, load, run

GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
DRAWN = replace(GREEDY, temperature=2.0, seed=5, logprobs=2)
CASES = {
    "greedy": replace(GREEDY, logprobs=0),
    "several": replace(DRAWN, n=3),
    "stop strings": replace(DRAWN, temperature=5.0, stop=["zzzz", "e"], max_tokens=60),
    "grammar": replace(DRAWN, regex="(?s).{8}", max_tokens=60),
}


@pytest.fixture(scope="module")
def engine():
    with load() as engine:
        yield engine


def check(pieces, num_answers):
    """Checks that the pieces add up to their reply, and that none of them is empty."""
    reply = pieces[-1].reply
    assert [piece.reply for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert len(reply.choices) == num_answers
    for index, choice in enumerate(reply.choices):
        own = [piece for piece in pieces if piece.choice == index]
        assert "".join(piece.text for piece in own) == choice.text
        assert tuple(token for piece in own for token in piece.tokens) == (choice.logprobs or ())
    assert all(piece.text or piece.tokens for piece in pieces[:-1])
    return reply


@pytest.mark.parametrize("name", CASES)
def test_the_tokens_of_all_pieces_are_those_of_the_answer(engine, name):
    params = CASES[name]
    pieces = list(engine.stream(ask("Hello"), params))
    reply = check(pieces, params.n)
    assert [len(choice.logprobs) for choice in reply.choices] == [len(choice.token_ids) for choice in reply.choices]
    assert reply.choices == engine.chat(ask("Hello"), params).choices
    assert len(pieces) > 4


def test_a_token_is_told_when_it_is_known_and_its_text_when_it_is_certain(engine):
    """Every text may be the beginning of a stop string here, so none is certain before the end."""
    whole = engine.chat(ask("Hello"), GREEDY).text
    params = replace(GREEDY, logprobs=0, stop=f"{whole}!")
    *pieces, last = engine.stream(ask("Hello"), params)
    assert [len(piece.tokens) for piece in pieces] == [1] * 11
    assert not "".join(piece.text for piece in pieces)
    assert (last.text, len(last.tokens)) == (whole, 1)


def test_without_log_probabilities_no_piece_has_tokens_or_is_empty(engine):
    held = replace(GREEDY, stop=f"{engine.chat(ask('Hello'), GREEDY).text}!")
    for params in (GREEDY, held, replace(DRAWN, logprobs=None, n=3)):
        pieces = list(engine.stream(ask("Hello"), params))
        check(pieces, params.n)
        assert not any(piece.tokens for piece in pieces)


@pytest.mark.parametrize("num_draft_tokens", [0, 4])
def test_asynchronous_streams_give_the_tokens_of_their_answers(num_draft_tokens):
    async def main():
        async with AsyncEngine(load(num_draft_tokens=num_draft_tokens)) as engine:
            streams = [engine.stream(ask("Hello, hello, hello, hello"), params) for params in CASES.values()]
            return await asyncio.gather(*map(collect, streams))

    for pieces, params in zip(run(main()), CASES.values(), strict=True):
        check(pieces, params.n)


def test_a_stream_whose_time_is_over_has_told_all_its_tokens(engine):
    params = replace(GREEDY, logprobs=1, max_tokens=100_000)
    reply = check(list(engine.stream(ask("Hello"), params, timeout_s=0.3)), 1)
    assert reply.finish_reason == "timeout"
    assert len(reply.logprobs) == len(reply.token_ids) > 0

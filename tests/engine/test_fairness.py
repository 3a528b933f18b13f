"""No request holds up the others: neither by many answers nor by a long prompt."""

import asyncio
from dataclasses import replace

import pytest
import torch

from internvl_rt import AsyncEngine, EngineOptions, SamplingParams
from support.calls import PATIENCE_S, SHORT, ask, load, run

DRAWN = SamplingParams(max_tokens=8, ignore_eos=True, temperature=2.0, seed=1, logprobs=0)


@pytest.mark.parametrize("max_num_seqs", [2, 4])
def test_a_request_with_all_answers_that_may_run_leaves_a_place_to_others(max_num_seqs):
    async def main():
        async with AsyncEngine(load(max_num_seqs=max_num_seqs, kv_cache_bytes=1 << 26)) as e:
            many = SamplingParams(n=max_num_seqs, max_tokens=100_000, ignore_eos=True)
            stream = e.stream(ask("Hello"), many)
            await anext(stream)
            for _ in range(3):
                reply = await asyncio.wait_for(e.chat(ask("Hello"), SHORT), PATIENCE_S / 4)
                assert reply.finish_reason == "length"
            await stream.aclose()

    run(main())


def submit(engine, text, **params):
    params = SamplingParams(**{"ignore_eos": True, "temperature": 1.0, "seed": 1} | params)
    request = engine.new_request(engine.prepare(ask(text)), params)
    engine.loop.submit(request)
    return request


def steps_to_end(engine, *requests):
    """Runs steps until the requests have ended; returns how many there were."""
    steps = engine.stats()["steps"]
    while not all(request.done for request in requests):
        assert engine.loop.step()
    return engine.stats()["steps"] - steps


@pytest.mark.parametrize("num_long", [1, 2, 3, 5])
def test_a_short_request_is_answered_in_a_step_beside_any_number_of_long_prompts(num_long):
    with load(max_tokens_per_step=64, kv_cache_bytes=1 << 24) as engine:
        longs = [submit(engine, f"{number} " * 300, max_tokens=1) for number in range(num_long)]
        engine.loop.step()
        assert steps_to_end(engine, submit(engine, "Hello", max_tokens=1)) == 1
        assert not any(request.done for request in longs)
        assert steps_to_end(engine, *longs) >= 300 * num_long // 64


def test_answers_begin_when_other_requests_have_left_their_places():
    with load(max_num_seqs=8, kv_cache_bytes=1 << 24) as engine:
        several = submit(engine, "Hello", n=6, max_tokens=60)
        for _ in range(7):
            submit(engine, "Hello", max_tokens=3)
        assert steps_to_end(engine, several) <= 60 + 5


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_answers_that_begin_later_are_those_that_begin_at_once(prefix_cache):
    with load(kv_cache_bytes=1 << 24) as roomy, load(max_num_seqs=4, prefix_cache=prefix_cache) as narrow:
        for n in (3, 4):
            expected = roomy.chat(ask("Read the digits. Then more."), replace(DRAWN, n=n))
            reply = narrow.chat(ask("Read the digits. Then more."), replace(DRAWN, n=n))
            for choice, wanted in zip(reply.choices, expected.choices, strict=True):
                assert choice.token_ids == wanted.token_ids
                assert [token.logprob for token in choice.logprobs] == pytest.approx(
                    [token.logprob for token in wanted.logprobs],
                    abs=1e-4,  # batches of other sizes are summed up in other orders
                )


def test_the_tokens_of_a_step_follow_the_device():
    assert EngineOptions().tokens_per_step(torch.device("cpu")) == 512
    assert EngineOptions().tokens_per_step(torch.device("cuda")) == 8192
    assert EngineOptions(backend="torch").tokens_per_step(torch.device("cuda")) == 512
    assert EngineOptions(max_tokens_per_step=77).tokens_per_step(torch.device("cuda")) == 77
    with load(max_num_seqs=1, kv_cache_bytes=1 << 24) as engine:
        steps = engine.stats()["steps"]
        engine.chat(ask("word " * 600), SamplingParams(max_tokens=1))
        assert engine.stats()["steps"] - steps >= 2

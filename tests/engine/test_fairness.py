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

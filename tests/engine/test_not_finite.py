"""Numbers that are not finite end the request that has them, by name, and leave all others as they are."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from internvl_rt import AsyncEngine, Engine, NotFiniteError, SamplingParams
from internvl_rt.model.internvl import named_parameters
from support.calls import ask, check_idle, load

SAMPLE = Path(__file__).parents[2] / "internvl_rt" / "tiny" / "samples" / "4719.png"
BLACK = np.zeros((56, 56, 3), np.uint8)
GREEDY = SamplingParams(max_tokens=8, ignore_eos=True)
DRAWN = replace(GREEDY, temperature=0.8, top_k=5, seed=11)
NEIGHBOURS = (
    GREEDY,
    DRAWN,
    replace(GREEDY, logprobs=2, prompt_logprobs=1),
    replace(DRAWN, n=3),
    SamplingParams(max_tokens=8, regex="[0-9]{9}"),
)


def open_engine(**options):
    """Opens an engine whose vision tower gives NaN for a black picture, as one does that overflows."""
    engine = load(block_size=16, **options)
    original = engine.model.encode_tiles
    engine.model.encode_tiles = lambda tiles: original(tiles) if tiles.any() else original(tiles) * torch.nan
    return engine


@pytest.fixture(scope="module")
def engine():
    with open_engine() as engine:
        yield engine


@pytest.fixture(autouse=True)
def nothing_is_left(engine):
    yield
    check_idle(engine)


BROKEN = {
    "greedy": GREEDY,
    "drawn": DRAWN,
    "almost greedy": replace(DRAWN, temperature=1e-30),
    "penalised": replace(GREEDY, repetition_penalty=1.5, min_tokens=3),
    "several answers": replace(DRAWN, n=3),
    "log-probabilities": replace(GREEDY, logprobs=2),
    "log-probabilities of the prompt": replace(GREEDY, prompt_logprobs=2),
    "a grammar": SamplingParams(max_tokens=8, regex="[0-9]{9}"),
}


@pytest.mark.parametrize("params", BROKEN.values(), ids=BROKEN)
def test_an_answer_without_finite_logits_is_an_error_that_names_stage_and_dtype(engine, params):
    message = r"^the logits of token \d+ of the (answer|prompt) are not finite in float32 .*; check the checkpoint$"
    with pytest.raises(NotFiniteError, match=message):
        engine.chat(ask("Read the digits.", BLACK), params)
    assert engine.chat(ask("Read the digits.", SAMPLE), replace(GREEDY, ignore_eos=False)).text == "4719"


@pytest.mark.parametrize("run_ahead", [False, True])
def test_logits_that_break_after_several_steps_end_their_answer_alone(monkeypatch, run_ahead):
    """From the third step on the same sequences decode again and again, and no token needs a second look."""
    with Engine.from_pretrained("tiny", device="cpu") as engine:
        params = replace(GREEDY, max_tokens=20)
        conversations = [ask(text) for text in ("Hello", "Read the digits.", "And now?")]
        expected = engine.generate(conversations, params)
        engine.loop.run_ahead = run_ahead
        original, calls = engine.model.logits, []

        def break_second_row(x_RD):
            calls.append(len(x_RD))
            logits_RV = original(x_RD)
            return logits_RV if len(calls) != 9 else logits_RV.index_fill(0, torch.tensor([1]), torch.nan)

        monkeypatch.setattr(engine.model, "logits", break_second_row)
        requests = [engine.new_request(engine.prepare(each), params) for each in conversations]
        for request in requests:
            engine.loop.submit(request)
        while engine.loop.step():
            pass
        assert set(calls[:9]) == {3}
        with pytest.raises(NotFiniteError, match=r"the logits of token 9 of the answer are not finite"):
            engine.loop.poll(requests[1])
        for index in (0, 2):
            assert requests[index].reply.token_ids == expected[index].token_ids
        check_idle(engine)


def test_a_score_without_finite_logits_is_an_error(engine):
    with pytest.raises(NotFiniteError, match=r"the logits of token \d+ of the prompt are not finite in float32"):
        engine.score(ask("Read the digits.", BLACK), ["4719"])


def test_a_score_of_a_token_whose_logit_alone_is_infinite_is_an_error(monkeypatch):
    with Engine.from_pretrained("tiny", device="cpu") as engine:
        original, scored = engine.model.logits, engine.tokenizer.encode("4719")[1]
        monkeypatch.setattr(
            engine.model, "logits", lambda *given: original(*given).index_fill(1, torch.tensor([scored]), -torch.inf)
        )
        with pytest.raises(NotFiniteError, match=r"the logits of token \d+ of the prompt are not finite in float32"):
            engine.score(ask("Hello"), ["4719"])
        assert len(engine.score(ask("Hello"), ["12"])[0].logprobs) == 2


@pytest.mark.parametrize(("num_draft_tokens", "run_ahead"), [(0, False), (0, True), (3, False)])
def test_neighbours_in_threads_keep_their_answers(num_draft_tokens, run_ahead):
    with open_engine(num_draft_tokens=num_draft_tokens) as engine, ThreadPoolExecutor(8) as pool:
        engine.loop.run_ahead = run_ahead  # then the step after a draw of no token is launched before that is known
        messages = ask("Read the digits.", SAMPLE)
        alone = [engine.chat(messages, params) for params in NEIGHBOURS]
        calls = [pool.submit(engine.chat, messages, params) for params in NEIGHBOURS]
        broken = [pool.submit(engine.chat, ask("Read the digits.", BLACK), params) for params in (GREEDY, DRAWN)]
        for call in broken:
            with pytest.raises(NotFiniteError, match="not finite"):
                call.result(60)
        for call, expected in zip(calls, alone, strict=True):
            assert [each.token_ids for each in call.result(60).choices] == [each.token_ids for each in expected.choices]
        assert engine.stats()["requests_error"] == 2


def test_neighbours_in_an_event_loop_keep_their_answers():
    with open_engine() as engine:
        messages = ask("Read the digits.", SAMPLE)
        alone = [engine.chat(messages, params) for params in NEIGHBOURS]

        async def together():
            async with AsyncEngine(engine) as shared:
                calls = [shared.chat(messages, params) for params in NEIGHBOURS]
                calls.append(shared.chat(ask("Read the digits.", BLACK), DRAWN))
                return await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 60)

        *replies, error = asyncio.run(together())
    assert [reply.token_ids for reply in replies] == [reply.token_ids for reply in alone]
    assert isinstance(error, NotFiniteError)


def test_what_was_computed_with_broken_logits_is_not_reused(engine):
    hits = engine.stats()["prefix_hit_tokens"]
    for _ in range(2):
        with pytest.raises(NotFiniteError, match="not finite"):
            engine.chat(ask("A prompt of some blocks. " * 5, BLACK), GREEDY, cache_salt="nobody else's")
    assert engine.stats()["prefix_hit_tokens"] == hits


def test_weights_of_a_model_made_in_memory_are_noticed_at_the_logits():
    with Engine.from_pretrained("tiny", device="cpu", dtype="float16") as engine:
        named_parameters(engine.model.weights)["decoder.norm.weight_D"][3] = torch.inf
        with pytest.raises(
            NotFiniteError, match=r"in float16 .*; check the checkpoint, or load the model with dtype='bf"
        ):
            engine.chat(ask("Hello"), GREEDY)


def test_visual_tokens_that_are_not_finite_are_not_handed_out(engine):
    assert len(engine.encode_images([SAMPLE])) == 1
    with pytest.raises(NotFiniteError, match=r"^picture 1: its visual tokens are not finite in float32"):
        engine.encode_images([SAMPLE, BLACK])

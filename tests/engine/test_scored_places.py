"""Scores of places in prompts: equal to a plain forward pass however they are computed, and what is common but once."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from internvl_rt import AsyncEngine, NotFiniteError, RawPrompt, RequestError
from internvl_rt.inputs.places import Places
from internvl_rt.kernels.patch_embed import normalise_tiles_reference
from support.calls import ENDLESS, SHORT, advance, ask, check_idle, finish, load, run, submit
from support.forward import all_logits

SAMPLES = Path(__file__).parents[2] / "internvl_rt" / "tiny" / "samples"
QUESTION = ask("Read the digits.", SAMPLES / "862053.png")
ANSWERS = ["862053", "The digits are 862053.", "86", "7", "4719", "It has six digits.", "862035", "862053 or 862035"]


def forward(engine, messages, response=""):
    """Returns the ids of a prompt, and its logits by a plain pass."""
    prepared = engine.prepare(messages)
    ids = [*prepared.prompt.token_ids, *engine.tokenizer.encode(response)]
    tiles = prepared.pictures[0].image.tiles() if prepared.pictures else None
    pixels = None if tiles is None else normalise_tiles_reference(torch.from_numpy(tiles))
    context_id = engine.tokenizer.token_id("<IMG_CONTEXT>")
    return ids, all_logits(engine.model, ids, pixels, context_id=context_id).numpy()


def test_candidates_are_scored_in_every_place_as_by_a_plain_pass():
    with load(block_size=16) as engine:
        ids, logits = forward(engine, QUESTION)
        candidates, positions = [5, "7", 0, "<|im_end|>"], [-1, 0, 40, 40, len(ids) - 2]
        numbers = [engine.tokenizer.encode(c, specials=True)[0] if isinstance(c, str) else c for c in candidates]
        found = engine.score_tokens(QUESTION, candidates, positions)
        for position, scores in zip(positions, found, strict=True):
            row = logits[position].astype(np.float64)
            total = np.log(np.exp(row).sum())
            assert scores.token_ids == tuple(numbers)
            assert scores.logits == pytest.approx(row[numbers], abs=1e-4)
            assert scores.logprobs == pytest.approx(row[numbers] - total, abs=1e-4)
            assert scores.probabilities == pytest.approx(np.exp(row[numbers]) / np.exp(row[numbers]).sum(), abs=1e-5)
            assert sum(scores.probabilities) == pytest.approx(1)
        assert found[2] == found[3]
        check_idle(engine)


WAYS = {
    "alone": {},
    "in chunks": {"max_tokens_per_step": 16},
    "few places": {"max_num_seqs": 2},
    "some places": {"max_num_seqs": 5},
    "a small cache": {"block_size": 16, "kv_cache_bytes": 900_000, "max_model_len": 320},
    "without reuse": {"prefix_cache": False},
    "without reuse, few places": {"prefix_cache": False, "max_num_seqs": 5},
}


@pytest.mark.parametrize("way", WAYS)
def test_responses_are_scored_as_by_a_plain_pass(way):
    """The second call finds prompt and responses in the cache, where there is one."""
    with load(**WAYS[way]) as engine:
        first = engine.score(QUESTION, ANSWERS)
        again = engine.score(QUESTION, ANSWERS[::-1])[::-1]
        for response, scores, others in zip(ANSWERS, first, again, strict=True):
            ids, logits = forward(engine, QUESTION, response)
            added = engine.tokenizer.encode(response)
            rows = logits[len(ids) - len(added) - 1 : -1].astype(np.float64)
            expected = rows[np.arange(len(added)), added] - np.log(np.exp(rows).sum(1))
            assert scores.logprobs == pytest.approx(expected, abs=1e-4)
            assert others.logprobs == pytest.approx(scores.logprobs, abs=1e-5)
        check_idle(engine)


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_what_responses_have_in_common_is_computed_once(prefix_cache):
    """Their blocks are shared until they differ: the block in which they part is copied, not computed."""
    with load(prefix_cache=prefix_cache) as engine:
        num_prompt = len(engine.describe(QUESTION).prompt.token_ids)
        lengths = [len(engine.tokenizer.encode(each)) for each in ANSWERS]
        scores = engine.score(QUESTION, ANSWERS)
        assert [score.usage.prompt_tokens for score in scores] == [num_prompt + length for length in lengths]
        computed = [score.usage.prompt_tokens - score.usage.cached_tokens for score in scores]
        # Each response computes the prompt's last token too, whose output is its first token's score.
        assert computed == [num_prompt + lengths[0], *(length + 1 for length in lengths[1:])]
        assert engine.stats()["encoded_tiles"] == engine.describe(QUESTION).layouts[0].num_tiles
        blocks = engine.cache.blocks.stats()
        assert blocks["num_copies"] == len(ANSWERS) - 1, "the last one may write the block itself"


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("max_num_seqs", [4, 5, 8])
def test_as_many_responses_as_run_together_compute_the_prompt_once(max_num_seqs, prefix_cache):
    with load(max_num_seqs=max_num_seqs, prefix_cache=prefix_cache) as engine:
        scores = engine.score(QUESTION, ["7", "8", "9", "6", "5", "4"][: engine.max_answers])
        computed = [score.usage.prompt_tokens - score.usage.cached_tokens for score in scores]
        assert computed[1:] == [2] * (engine.max_answers - 1)


def test_prompts_that_differ_before_a_picture_or_in_their_positions_share_nothing():
    with load() as engine:
        prompts = [
            engine.prepare(ask(text, SAMPLES / "7.png"), delta) for text, delta in (("a", 1), ("b", 1), ("a", 1 / 16))
        ]
        places = Places(np.array([len(prompts[0].prompt.token_ids) - 1]), np.array([[5, 6]]))
        scored = [replace(prompt, places=places) for prompt in prompts]
        together = engine.run_scoring(iter([scored[0], scored[2]]))
        assert engine.new_scoring([scored[0], scored[2]]).beginning is None
        beginning = engine.new_scoring([scored[0], scored[1]]).beginning
        assert beginning is not None
        assert beginning.sequence.num_prompt > max(p.span.start + p.span.num_tokens for p in prompts[0].pictures)
        alone = [engine.run_scoring(iter([each]))[0] for each in (scored[0], scored[2])]
        assert [each.places[0].logits for each in together] == [pytest.approx(each.places[0].logits) for each in alone]
        before = [RawPrompt([index, *range(40, 60)]) for index in (1, 2)]
        early = [replace(engine.prepare(each), places=Places(np.array([20]), np.array([[5]]))) for each in before]
        assert engine.new_scoring(early).beginning is None
        check_idle(engine)


def test_scores_and_answers_run_together_in_a_cache_that_is_too_small_for_all():
    options = {"block_size": 16, "kv_cache_bytes": 700_000, "max_model_len": 256, "max_tokens_per_step": 64}
    with load(**options) as engine, load() as roomy:
        expected = [score.total for score in roomy.score(QUESTION, ANSWERS)]
        answer = roomy.chat(ask("Hello"), SHORT).token_ids
        prompt = engine.prepare(QUESTION)
        prompts = [engine.preparer.prepare_score(prompt, text, include_end=False) for text in ANSWERS]
        scoring = [engine.new_scoring(prompts) for _ in range(2)]
        for request in scoring:
            engine.loop.submit(request)
        chats = [submit(engine, ask("Hello"), SHORT) for _ in range(6)]
        for found in finish(engine, chats):
            assert found == [answer]
        finish(engine, list(scoring))
        for request in scoring:
            totals = [sum(place.logprobs[0] for place in scored.places) for scored in request.reply.scored]
            assert totals == pytest.approx(expected, abs=1e-3)
        assert engine.stats()["kv_blocks"] * 16 < 8 * 100, "the responses' prompts do not fit at once"
        check_idle(engine)


@pytest.mark.parametrize("num_steps", range(5))
def test_scores_that_are_cancelled_leave_nothing(num_steps):
    with load(max_tokens_per_step=64, block_size=16) as engine:
        prompt = engine.prepare(QUESTION)
        request = engine.new_scoring(
            [engine.preparer.prepare_score(prompt, text, include_end=True) for text in ANSWERS]
        )
        engine.loop.submit(request)
        other = submit(engine, ask("Hello"), SHORT)
        for _ in range(num_steps):
            engine.loop.step()
        engine.loop.cancel(request)
        while advance(engine, other) is None:
            pass
        check_idle(engine)
        assert len(engine.score(QUESTION, ANSWERS)) == len(ANSWERS)


def test_one_response_without_finite_scores_fails_the_call_and_nothing_else(monkeypatch):
    with load() as engine:
        original, broken = engine.model.logits, engine.tokenizer.encode("4719")[1]

        def planted(x_RD):
            logits_RV = original(x_RD)
            return logits_RV.index_fill(1, torch.tensor([broken]), float("-inf"))

        other = submit(engine, ask("Hello"), SHORT)
        monkeypatch.setattr(engine.model, "logits", planted)
        with pytest.raises(NotFiniteError, match="the logits of token"):
            engine.score(QUESTION, ["86", "4719", "7"])
        with pytest.raises(NotFiniteError, match="the logits of the token after the prompt are"):
            engine.score_tokens(QUESTION, [broken])
        monkeypatch.undo()
        while advance(engine, other) is None:
            pass
        assert len(engine.score(QUESTION, ["86", "4719", "7"])) == 3
        check_idle(engine)


def test_batches_of_conversations_are_scored_as_each_alone():
    conversations = [(ask("Read the digits.", SAMPLES / f"{n}.png"), [n, "1"]) for n in ("7", "42", "905", "4719")]
    conversations.insert(2, (ask("Hello"), []))
    with load(max_num_seqs=8) as engine:
        together = engine.score_batch(conversations, include_end=True)
        for (messages, responses), scores in zip(conversations, together, strict=True):
            alone = engine.score(messages, responses, include_end=True)
            assert [s.logprobs for s in scores] == [pytest.approx(s.logprobs, abs=1e-5) for s in alone]
        assert all(s[0].total > s[1].total for s in together if s), "tiny reads its samples"
        check_idle(engine)


REFUSED = {
    "no candidates": (lambda e: e.score_tokens(QUESTION, []), "candidates: expected from 1 to 1,024 tokens, got 0"),
    "a text of several tokens": (lambda e: e.score_tokens(QUESTION, ["4719"]), "expected a text that is one token"),
    "a text of no token": (lambda e: e.score_tokens(QUESTION, [""]), "expected a text that is one token"),
    "an id outside": (lambda e: e.score_tokens(QUESTION, [10**6]), "candidates\\[0\\] must be an integer from 0 to"),
    "a text as list": (lambda e: e.score_tokens(QUESTION, "7"), "candidates: expected a list of tokens"),
    "no place": (lambda e: e.score_tokens(QUESTION, [5], []), "positions: expected at least one index"),
    "too many places": (
        lambda e: e.score_tokens(QUESTION, [5, 6], [0] * (1 << 20)),
        "at most 524,288 indices with 2",
    ),
    "a place behind": (
        lambda e: e.score_tokens(QUESTION, [5], [10**6]),
        "positions.0. must be an integer from -51 to 50",
    ),
    "a place before": (
        lambda e: e.score_tokens(QUESTION, [5], [-(10**6)]),
        "positions.0. must be an integer from -51 to 50",
    ),
    "one conversation": (lambda e: e.score_batch(QUESTION), "batch\\[0\\]: expected \\(messages, responses\\)"),
    "no text": (lambda e: e.score_batch([(QUESTION, ["7"]), (QUESTION, [""])]), "expected texts that are not empty"),
    "a wrong one": (lambda e: e.score_batch([(QUESTION, ["7"]), ([], ["7"])]), "request 1: messages: expected"),
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_what_cannot_be_scored_is_refused(wrong):
    call, message = REFUSED[wrong]
    with load(kv_cache_bytes=1 << 24) as engine:
        running = submit(engine, ask("Hello"), ENDLESS)
        with pytest.raises(RequestError, match=message):
            call(engine)
        engine.loop.cancel(running)
        check_idle(engine)


def test_scores_come_with_the_likeliest_tokens_if_asked():
    with load() as engine:
        right, wrong = engine.score(QUESTION, ["862053", "4719"], include_end=True, num_top=2)
        for token in right.tokens:
            assert token.top[0][0] == token.token_id, "tiny reads its samples"
            assert token.top[0][1] == pytest.approx(token.logprob, abs=1e-5)
            assert len(token.top) == 2
        assert [token_id for token_id, _ in wrong.tokens[0].top] == [token_id for token_id, _ in right.tokens[0].top]
        assert wrong.tokens[0].top[0][0] != wrong.tokens[0].token_id
        assert engine.score(QUESTION, ["7"])[0].tokens[0].top == ()

        async def main():
            async with AsyncEngine(engine) as e:
                (score,) = await e.score(QUESTION, ["862053"], include_end=True, num_top=2)
                assert [t.logprob for t in score.tokens] == pytest.approx([t.logprob for t in right.tokens], abs=1e-5)
                with pytest.raises(RequestError, match="num_top must be an integer from 0 to 20"):
                    await e.score(QUESTION, ["7"], num_top=21)

        with pytest.raises(RequestError, match="num_top must be an integer from 0 to 20"):
            engine.score(QUESTION, ["7"], num_top=-1)
        run(main())

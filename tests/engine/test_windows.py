"""Layers with a window free the blocks that left it; answers are those of a cache that frees nothing.

The model is a small GPT-OSS of three layers, of which the first and the last see 8 tokens, in blocks of 16.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from internvl_rt import Engine, RawPrompt, Reply, SamplingParams, StepError
from internvl_rt.model.internvl import InternVL
from internvl_rt.model.random_checkpoint import write_random_checkpoint
from internvl_rt.steps.executor import Executor
from support.calls import check_idle
from support.configs import changed
from support.forward import all_logits
from support.harmony import SMALL
from support.rank_threads import RankThreads
from support.recorder import Recorder

WINDOW, BLOCK = 8, 16
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
PROMPT = np.random.default_rng(3).integers(0, 256, 200).tolist()
GREEDY = SamplingParams(max_tokens=40, ignore_eos=True, logprobs=0)
BLOCK_BYTES = BLOCK * 2 * 2 * 2 * 16 * 4  # of keys and values of two layers, two heads of 16 channels, in float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("windows") / "model"
    config = changed(SMALL, {"llm_config.num_hidden_layers": len(LAYERS), "llm_config.layer_types": LAYERS})
    write_random_checkpoint(config, folder)
    return folder


def load(folder: Path, **options: Any) -> Engine:
    chosen = {"device": "cpu", "backend": "torch", "block_size": BLOCK, "max_tokens_per_step": 48, **options}
    return Engine.from_pretrained(str(folder), **chosen)


class Answer(NamedTuple):
    token_ids: list[int]
    logprobs: list[float]


@pytest.fixture(scope="module")
def expected(folder: Path) -> Answer:
    with load(folder) as engine:
        return answer_without_freeing(engine.model, PROMPT, GREEDY.max_tokens)


def answer_without_freeing(
    model: InternVL, prompt: list[int], num_tokens: int, kv_dtype: torch.dtype | None = None
) -> Answer:
    """Returns the greedy answer, each token from one pass over all before it, in which nothing can be freed yet."""
    token_ids, logprobs = list(prompt), []
    for _ in range(num_tokens):
        logits_TV = all_logits(model, token_ids, None, context_id=-1, block_size=BLOCK, kv_dtype=kv_dtype)
        logprob, token_id = logits_TV[-1].log_softmax(-1).max(-1)
        token_ids.append(int(token_id))
        logprobs.append(float(logprob))
    return Answer(token_ids[len(prompt) :], logprobs)


def check(reply: Reply, expected: Answer, first: int = 0) -> None:
    """Compares an answer with the expected one from its token `first` on, as far as it goes."""
    until = first + len(reply.token_ids)
    assert reply.token_ids == expected.token_ids[first:until]
    assert [token.logprob for token in reply.logprobs] == pytest.approx(expected.logprobs[first:until], abs=1e-4)


def test_a_block_holds_one_kind_of_layers(folder: Path) -> None:
    with load(folder) as engine:
        first, second, third = (layer.k_cache_BGPC.data_ptr() for layer in engine.cache.pool.layers)
        assert first == second != third
        assert engine.memory.block_bytes == BLOCK_BYTES


@pytest.mark.parametrize(
    "options",
    [
        *({"max_tokens_per_step": budget} for budget in (1, 7, 48, 4096)),
        {"backend": "auto"},
        {"kv_cache_dtype": "int8"},
        {"backend": "auto", "kv_cache_dtype": "fp8"},
    ],
    ids=str,
)
def test_answers_do_not_depend_on_what_was_freed(
    folder: Path, expected: Answer, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """All blocks that a step does not name are overwritten before it."""
    run_pass, freed = Executor.run_pass, []

    def overwrite_others(self: Executor, step: Any, flat: torch.Tensor, visual: Any) -> torch.Tensor:
        arrays = step.shape.views(flat.numpy(), np.float32)
        named = {*arrays["block_table_SN"].flatten().tolist(), *arrays["window_table_SN"].flatten().tolist()}
        others = sorted({*range(engine.cache.blocks.num_blocks)} - named)
        for buffer in engine.cache.pool.buffers:
            numbers = buffer.view(torch.uint8) if buffer.itemsize == 1 else buffer
            numbers[:, :, others] = 127 if buffer.itemsize == 1 else torch.nan
        freed.append((arrays["window_table_SN"] == -1).sum() > (arrays["block_table_SN"] == -1).sum())
        return run_pass(self, step, flat, visual)

    monkeypatch.setattr(Executor, "run_pass", overwrite_others)
    with load(folder, prefix_cache=False, kv_cache_bytes=1 << 20, **options) as engine:
        if "kv_cache_dtype" in options:
            with load(folder, **options) as other:
                expected = answer_without_freeing(other.model, PROMPT, GREEDY.max_tokens, other.cache.dtype)
        check(engine.chat(RawPrompt(PROMPT), GREEDY), expected)
        check_idle(engine)
    assert any(freed)


def test_an_answer_holds_at_most_two_blocks_for_the_window_and_all_for_the_other_layers(folder: Path) -> None:
    with load(folder) as engine:
        request = engine.new_request(engine.prepare(RawPrompt(PROMPT)), GREEDY)
        engine.loop.submit(request)
        sizes = []
        while engine.loop.step():
            sizes.append(engine.cache.blocks.stats()["num_used"])
        answering = sizes[-GREEDY.max_tokens + 1 : -1]
        lengths = range(len(PROMPT) + 1, len(PROMPT) + 1 + len(answering))
        in_window = [used - -(-length // BLOCK) for used, length in zip(answering, lengths, strict=True)]
        assert in_window[0] in (1, 2)
        assert set(in_window) == {1, 2}
        check_idle(engine)


@pytest.fixture
def steady(folder: Path) -> Iterator[Engine]:
    with load(folder) as engine:
        yield engine
        check_idle(engine)


def test_a_prompt_that_goes_on_finds_what_the_window_still_has(steady: Engine, expected: Answer) -> None:
    whole = PROMPT + expected.token_ids
    for stop, num_cached in ((200, 0), (200, 192), (230, 224), (239, 224)):
        reply = steady.chat(RawPrompt(whole[:stop]), replace(GREEDY, max_tokens=240 - stop))
        assert reply.usage.cached_tokens == num_cached
        check(reply, expected, stop - 200)
    branch = [*whole[:100], 1, 2, 3]
    other = steady.chat(RawPrompt(branch), replace(GREEDY, max_tokens=4))
    assert other.usage.cached_tokens == 96
    check(other, answer_without_freeing(steady.model, branch, 4))


def test_a_prefix_whose_window_was_evicted_is_found_as_far_as_it_has_one(folder: Path, expected: Answer) -> None:
    """Blocks that left the window are the first to be evicted, and those of the end of an answer the last."""
    branch = [*PROMPT[:100], 1, 2]
    with load(folder, kv_cache_bytes=40 * BLOCK_BYTES, max_model_len=256) as engine:
        check(engine.chat(RawPrompt(PROMPT), GREEDY), expected)
        for seed in range(3):
            filler = np.random.default_rng(seed).integers(0, 256, 60).tolist()
            engine.chat(RawPrompt(filler), SamplingParams(max_tokens=1))
        again = engine.chat(RawPrompt(branch), replace(GREEDY, max_tokens=3))
        assert again.usage.cached_tokens < 96
        check(again, answer_without_freeing(engine.model, branch, 3))
        engine.cache.blocks.check_invariants()


def test_forks_and_draft_tokens_change_nothing(folder: Path, expected: Answer) -> None:
    drawn = SamplingParams(max_tokens=20, temperature=1, seed=1, ignore_eos=True)
    with load(folder, num_draft_tokens=4) as engine:
        reply = engine.chat(RawPrompt(PROMPT), GREEDY)
        check(reply, expected)
        assert reply.usage.accepted_draft_tokens
        forked = engine.chat(RawPrompt(PROMPT), replace(drawn, n=3)).choices
        assert forked[0].token_ids == engine.chat(RawPrompt(PROMPT), drawn).token_ids
        assert len({tuple(choice.token_ids) for choice in forked}) == 3
        check_idle(engine)


def test_preempted_answers_are_the_same(folder: Path) -> None:
    params = SamplingParams(max_tokens=100, temperature=1, seed=1, ignore_eos=True)
    prompts = [RawPrompt(PROMPT[first : first + 20]) for first in (0, 20, 40)]
    with load(folder) as engine:
        answers = [engine.chat(prompt, params).token_ids for prompt in prompts]
    with load(folder, kv_cache_bytes=24 * BLOCK_BYTES, max_model_len=128) as engine:
        assert [reply.token_ids for reply in engine.generate(prompts, params)] == answers
        assert engine.stats()["preemptions"]
        check_idle(engine)


@torch.inference_mode()
def test_steps_from_graphs_are_the_same(folder: Path, expected: Answer) -> None:
    with load(folder, max_model_len=256) as engine:
        recorder = Recorder()
        engine.runner.capture(max_num_seqs=4, max_model_len=256, max_tokens_per_step=48, capture=recorder)
        check(engine.chat(RawPrompt(PROMPT), GREEDY), expected)
        assert recorder.replayed
        check_idle(engine)


@pytest.mark.parametrize("captures", [False, True])
@torch.inference_mode()
def test_ranks_free_the_same_blocks(folder: Path, expected: Answer, captures: bool) -> None:
    limits = {"max_num_seqs": 4, "max_model_len": 256, "max_tokens_per_step": 48}
    made = RankThreads(2, str(folder), block_size=BLOCK, **limits)
    with made.engine as engine:
        if captures:
            made.capture(**limits)
        check(engine.chat(RawPrompt(PROMPT), GREEDY), expected)
        check_idle(engine)


def test_the_longest_prompt_of_a_small_cache_is_computed(folder: Path) -> None:
    with load(folder, kv_cache_bytes=20 * BLOCK_BYTES) as engine:
        assert engine.max_model_len == 10 * BLOCK
        prompt = PROMPT[: engine.max_model_len - 1]
        check(
            engine.chat(RawPrompt(prompt), replace(GREEDY, max_tokens=1)),
            answer_without_freeing(engine.model, prompt, 1),
        )
        check_idle(engine)


def test_a_failed_step_leaves_nothing_behind(folder: Path, expected: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    run_pass, num_passes = Executor.run_pass, 0

    def fail_once(*arguments: Any) -> torch.Tensor:
        nonlocal num_passes
        num_passes += 1
        if num_passes == 8:  # after the prompt, when blocks were freed
            raise RuntimeError("planted")
        return run_pass(*arguments)

    monkeypatch.setattr(Executor, "run_pass", fail_once)
    with load(folder) as engine:
        with pytest.raises(StepError, match="planted"):
            engine.chat(RawPrompt(PROMPT), GREEDY)
        check_idle(engine)
        again = engine.chat(RawPrompt(PROMPT), GREEDY)
        check(again, expected)
        assert again.usage.cached_tokens == 192
        check_idle(engine)


def test_sequences_that_come_one_after_another_fit_the_blocks_that_are_counted_for_them(folder: Path) -> None:
    prompts = [RawPrompt(PROMPT[first : first + 95]) for first in (0, 40, 80)]
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    with load(folder, kv_cache_bytes=1 << 20) as engine:
        num_blocks = engine.cache.num_blocks_for(len(prompts), 99)
        assert num_blocks == 3 * 7 + 2 * 2 + 7, "all of each, the windows of two, and the prompt of one in both tables"
    with load(folder, kv_cache_bytes=num_blocks * BLOCK_BYTES, max_model_len=99, prefix_cache=False) as engine:
        engine.generate(prompts, params)
        assert engine.stats()["preemptions"] == 0
        check_idle(engine)

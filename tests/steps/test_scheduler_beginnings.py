"""Prompts that begin alike: the beginning is computed once, and what follows it forks off, as far as there is room."""

from itertools import pairwise

import pytest

from support.scheduling import BLOCK, Bench, make


def begun(num_common, *lengths, identity=None):
    """Returns a sequence of what prompts have in common, and the prompts, which fork off from it; none draws."""
    beginning, *prompts = (make(length, identity=identity) for length in (num_common, *lengths))
    for number, prompt in enumerate(prompts, 1):
        prompt.token_ids[num_common:] = [number] * (prompt.num_prompt - num_common)
    for each in (beginning, *prompts):
        each.max_tokens = 0
    beginning.siblings = list(prompts)
    return beginning, prompts


def run(bench, sequences):
    """Runs steps until the prompts are computed, and ends each then; returns the chunks of all steps."""
    left, chunks = list(sequences), []
    for _ in range(200):
        chunks += bench.step()
        for each in [each for each in left if each.num_computed == each.num_prompt]:
            bench.scheduler.remove(each)
            left.remove(each)
        bench.cache.blocks.check_invariants()
        if not left:
            return chunks
    raise AssertionError("they do not end")


def computed(chunks, name):
    return sorted((start, stop) for each, start, stop in chunks if each == name)


@pytest.mark.parametrize("identity", [None, b"model"])
def test_what_prompts_have_in_common_is_computed_once(identity):
    beginning, prompts = begun(25, 30, 41, 26, identity=identity)
    bench = Bench(beginning, budget=100)
    chunks = run(bench, [beginning, *prompts])
    assert chunks == [(0, 0, 25), (1, 25, 30), (3, 25, 26), (2, 25, 41)]
    assert bench.cache.blocks.stats()["num_copies"] == 2, "the last of three may write the common block itself"
    assert bench.cache.blocks.num_sequences == 0


def test_chunks_of_a_beginning_and_of_what_follows_keep_to_the_budget():
    beginning, prompts = begun(25, 45, 45)
    bench = Bench(beginning, budget=10)
    chunks = run(bench, [beginning, *prompts])
    assert computed(chunks, 0) == [(0, 10), (10, 20), (20, 25)]
    for name in (1, 2):
        parts = computed(chunks, name)
        assert (parts[0][0], parts[-1][1]) == (25, 45)
        assert all(stop == start for (_, stop), (start, _) in pairwise(parts))


@pytest.mark.parametrize("identity", [None, b"model"])
@pytest.mark.parametrize("num_blocks", [5, 6, 7, 9])
def test_prompts_that_find_no_room_wait_and_run_later(num_blocks, identity):
    """The beginning has two blocks, and each prompt two more of its own, with the copy of the second one."""
    beginning, prompts = begun(2 * BLOCK - 4, *[4 * BLOCK - 4] * 4, identity=identity)
    bench = Bench(beginning, num_blocks=num_blocks, budget=64)
    chunks = run(bench, [beginning, *prompts])
    assert bench.scheduler.num_preemptions == 0
    for name in (1, 2, 3, 4):
        parts = computed(chunks, name)
        assert parts[0][0] in (2 * BLOCK - 4, 0 if identity is None else BLOCK)
        assert parts[-1][1] == 4 * BLOCK - 4
    assert bench.cache.blocks.num_sequences == 0
    assert bench.cache.blocks.num_available_blocks == num_blocks


def test_prompts_without_a_place_wait_for_one():
    beginning, prompts = begun(25, *[30] * 8)
    bench = Bench(beginning, max_num_seqs=4, budget=100)
    assert len(bench.step()) == 1
    assert bench.scheduler.num_running == 1 + 3, "the beginning, and as many as leave a quarter of the places behind it"
    assert bench.scheduler.num_waiting == 5
    chunks = run(bench, [beginning, *prompts])
    assert {name for name, *_ in chunks} == set(range(1, 9))


def test_others_decode_meanwhile_and_keep_their_blocks():
    other = make(20, max_tokens=30)
    beginning, prompts = begun(25, 40, 41, 42)
    bench = Bench(other, budget=30, num_blocks=12)
    bench.step()
    bench.add(beginning)
    chunks = run(bench, [beginning, *prompts])
    assert computed(chunks, 0)[-1][1] > 21
    assert bench.scheduler.num_preemptions == 0
    bench.scheduler.remove(other)
    assert bench.cache.blocks.num_sequences == 0

"""Compares the C++ bookkeeping of blocks with a naive model under random operations, and tests its rules one by one."""

import random
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from internvl_rt._C import PagedKVCache
from internvl_rt.kernels._split_plan import plan_splits
from paged_kv_cache.buffers import POISON, check_split_plan, length_of, step_buffers
from paged_kv_cache.collisions import Collisions
from paged_kv_cache.contents import Contents
from paged_kv_cache.machine import PagedKVCacheMachine
from paged_kv_cache.soak import STEPS_PER_EPISODE, RandomDraw, run_episode

CAT, DOG = bytes([1]) * 32, bytes([2]) * 32


def test_random_operations_agree_with_the_model() -> None:
    """Runs as many operations as a short soak; tests/paged_kv_cache/soak.py runs millions."""
    num_hits = sum(run_episode(f"test/{episode}")["hit_tokens"] for episode in range(25_000 // STEPS_PER_EPISODE))
    assert num_hits > 0


TestPagedKVCache = PagedKVCacheMachine.TestCase
TestPagedKVCache.pytestmark = pytest.mark.slow
TestPagedKVCache.settings = settings(
    max_examples=400,
    stateful_step_count=50,
    phases=[Phase.generate],  # shrinking takes minutes: see paged_kv_cache/machine.py
    deadline=None,
    derandomize=True,
)


def int32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def admitted(cache: PagedKVCache, seq_id: int, num_tokens: int) -> None:
    """Admits a sequence and gives it slots for `num_tokens` tokens of unknown ids."""
    assert cache.admit(seq_id, int32(), num_reserved=num_tokens) == 0
    assert cache.append(int32(seq_id), int32(num_tokens))


def run_step(cache: PagedKVCache, seq_id: int, num_new_tokens: int) -> list[int]:
    """Runs a step of one sequence and completes it; returns the sequence's blocks."""
    cache.take_copies()
    out = step_buffers(1, cache.num_blocks, num_new_tokens)
    step = cache.fill_step(int32(seq_id), int32(num_new_tokens), **out)
    cache.complete(step)
    return [block for block in out["block_table_SN"][0].tolist() if block >= 0]


def serve(cache: PagedKVCache, seq_id: int, token_ids: np.ndarray, *prompt: Any, **options: Any) -> int | None:
    """Computes, publishes and releases a prompt; returns how many of its tokens were in the cache already."""
    num_hits = cache.admit(seq_id, token_ids, *prompt, **options)
    if num_hits is None or not cache.append(int32(seq_id), int32(len(token_ids) - num_hits)):
        return None
    run_step(cache, seq_id, len(token_ids) - num_hits)
    cache.publish(int32(seq_id), int32(len(token_ids)))
    cache.release(seq_id)
    return num_hits


# --- prefixes and pictures


def test_a_prompt_that_was_served_is_found_but_for_its_last_token() -> None:
    cache = PagedKVCache(16, 4)
    token_ids = np.arange(8, dtype=np.int32)
    assert serve(cache, 0, token_ids) == 0
    assert [cache.match(token_ids[:length]) for length in (0, 3, 4, 5, 7, 8)] == [0, 0, 0, 4, 4, 4]
    assert cache.match(np.arange(9, dtype=np.int32)) == 8


@pytest.mark.parametrize("max_cached", [None, 2**63 - 1, 9, 8, 7, 4, 3, 0])
def test_the_cache_serves_whole_blocks_of_at_most_max_cached_tokens(max_cached: int | None) -> None:
    cache = PagedKVCache(16, 4)
    token_ids = np.arange(9, dtype=np.int32)
    serve(cache, 0, token_ids)
    expected = 8 if max_cached is None else min(8, max_cached // 4 * 4)
    assert cache.match(token_ids, max_cached=max_cached) == expected
    assert serve(cache, 1, token_ids, max_cached=max_cached) == expected
    assert (cache.match(token_ids), cache.stats()["num_cached"]) == (8, 2)  # no block is kept twice


@pytest.mark.parametrize(
    ("pictures", "num_matched"),
    [
        ([(6, 5, CAT)], 16),  # the same picture
        ([(6, 5, DOG)], 4),  # another picture, or other options
        ([(7, 5, CAT)], 4),  # one token later
        ([(5, 5, CAT)], 4),  # one token earlier
        ([(6, 6, CAT)], 4),  # one token longer
        ([(6, 4, CAT)], 4),
        ([], 4),
        ([(6, 5, CAT), (13, 1, DOG)], 12),
        ([(0, 1, DOG), (6, 5, CAT)], 0),
        ([(3, 8, CAT)], 0),  # the picture begins in the block before
        ([(6, 2, CAT), (8, 3, CAT)], 4),  # the same tokens, as two pictures
    ],
)
def test_the_same_text_matches_up_to_the_first_block_of_another_picture(
    pictures: list[tuple[int, int, bytes]], num_matched: int
) -> None:
    cache = PagedKVCache(16, 4)
    token_ids = np.full(17, 7, np.int32)
    serve(cache, 0, token_ids, [(6, 5, CAT)])
    assert cache.match(token_ids, pictures) == num_matched
    assert serve(cache, 1, token_ids, pictures) == num_matched
    assert cache.match(token_ids, pictures) == 16
    assert cache.match(token_ids, [(6, 5, CAT)]) == 16


def test_prompts_of_different_identities_never_meet() -> None:
    cache = PagedKVCache(16, 4)
    token_ids = np.arange(9, dtype=np.int32)
    identities: list[bytes | None] = [b"", b"a", b"a\0", b"a" * 8, b"a" * 9, b"\0", None]
    for identity in identities:
        assert serve(cache, 0, token_ids, (), identity) == 0
    cache = PagedKVCache(16, 4)
    serve(cache, 0, token_ids, (), b"a")
    assert [cache.match(token_ids, (), i) for i in identities] == [8 if i == b"a" else 0 for i in identities]


@pytest.mark.parametrize("hash_bits", [1, 3])
def test_hash_collisions_hide_prefixes_but_never_give_a_wrong_one(hash_bits: int) -> None:
    draw = random.Random(hash_bits)
    cache = PagedKVCache(12, 2, hash_bits=hash_bits)
    contents = Contents()
    memory = [-1] * 24
    num_hits = num_hidden = 0
    for _ in range(1000):
        token_ids = np.array([draw.randint(0, 1) for _ in range(draw.randint(1, 12))], np.int32)
        numbers = [contents.root(b"")]
        for token_id in token_ids.tolist():
            numbers.append(contents.after(numbers[-1], token_id, None))
        num_matched = cache.admit(0, token_ids)
        assert num_matched is not None
        assert cache.append(int32(0), int32(len(token_ids) - num_matched))
        blocks = run_step(cache, 0, len(token_ids) - num_matched)
        slots = [blocks[t // 2] * 2 + t % 2 for t in range(len(token_ids))]
        assert [memory[slot] for slot in slots[:num_matched]] == numbers[1 : num_matched + 1]
        for slot, number in zip(slots[num_matched:], numbers[num_matched + 1 :], strict=True):
            memory[slot] = number
        cache.publish(int32(0), int32(len(token_ids)))
        num_hits += num_matched > 0
        num_hidden += cache.match(token_ids) < (len(token_ids) - 1) // 2 * 2
        cache.release(0)
        cache.check_invariants()
    assert num_hits > 50
    assert num_hidden > 50, "no collision was provoked"


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("hash_bits", [1, 2, 4])
def test_collisions_give_nothing_wrong_among_forks_rollbacks_and_failed_steps(
    hash_bits: int, window: int | None
) -> None:
    counts = Collisions(RandomDraw(f"collisions/{hash_bits}"), hash_bits, window).run(3000)
    assert counts["hits"] > 10


def test_events_that_nobody_drains_are_replaced_by_the_whole_index() -> None:
    cache = PagedKVCache(4, 2, events=True)
    for text in range(40):
        serve(cache, 0, np.full(5, text, np.int32))
    events = cache.drain_events()
    assert [event[0] for event in events] == ["cleared"] + ["stored"] * cache.stats()["num_cached"]
    first, second = [event for event in events if event[3].tolist() == [39, 39]]
    assert second[2] == first[1] or first[2] == second[1], "neither names the other as its parent"
    assert cache.drain_events() == []


def test_the_digests_of_a_prompt_are_those_that_its_events_name_in_every_cache_of_one_key() -> None:
    key, token_ids, pictures = bytes(range(16)), int32(*range(13)), [(3, 4, CAT)]
    cache, other = PagedKVCache(8, 4, events=True, hash_key=key), PagedKVCache(1, 4, hash_key=key)
    expected = other.digests(token_ids, pictures, b"one")
    assert len(expected) == 3
    assert cache.digests(token_ids, pictures, b"one") == expected
    serve(cache, 0, token_ids, pictures, b"one")
    assert [digest for kind, digest, _, _ in cache.drain_events()] == expected
    assert other.digests(token_ids[:12], pictures, b"one") == expected[:2], "a token is left to compute"
    assert other.digests(token_ids, pictures, b"one", max_cached=7) == expected[:1]
    assert other.digests(token_ids, pictures, None) == []
    for changed in (
        other.digests(token_ids, [(3, 4, DOG)], b"one"),
        other.digests(token_ids, pictures, b"another"),
        PagedKVCache(1, 4, hash_key=key[::-1]).digests(token_ids, pictures, b"one"),
        PagedKVCache(1, 4).digests(token_ids, pictures, b"one"),
    ):
        assert not set(changed) & set(expected)


# --- blocks


def test_a_freed_block_is_the_next_one_used() -> None:
    cache = PagedKVCache(num_blocks=4, block_size=2)
    tables = []
    for seq_id in (1, 2):
        admitted(cache, seq_id, 8)
        tables.append(run_step(cache, seq_id, 8))
        cache.release(seq_id)
    assert tables == [[0, 1, 2, 3], [0, 1, 2, 3]]


def test_a_whole_pool_can_be_reserved_and_one_token_more_cannot() -> None:
    cache = PagedKVCache(num_blocks=3, block_size=16)
    assert cache.admit(0, int32(), num_reserved=49) is None
    assert cache.admit(0, int32(), num_reserved=2**63 - 1) is None
    assert cache.admit(0, int32(), num_reserved=48) == 0
    assert cache.append(int32(0), int32(48))
    assert not cache.append(int32(0), int32(1))
    assert not cache.append(int32(0), int32(2**31 - 1))
    assert length_of(cache, 0) == 48
    assert cache.num_available_blocks == 0


def test_the_watermark_is_kept_free_for_those_that_run() -> None:
    cache = PagedKVCache(4, 1, watermark_blocks=2)
    assert cache.admit(0, int32(), num_reserved=2) == 0
    assert cache.admit(1, int32(), num_reserved=1) is None
    assert cache.append(int32(0), int32(4))
    cache.release(0)
    assert cache.admit(1, int32(), num_reserved=4) == 0


def test_a_block_that_a_step_may_still_read_is_not_handed_out() -> None:
    cache = PagedKVCache(2, 4)
    admitted(cache, 0, 8)
    first = cache.fill_step(int32(0), int32(8), **step_buffers(1, 2, 8))
    second = cache.fill_step(int32(0), int32(0), **step_buffers(1, 2, 0))
    cache.release(0)
    assert (cache.num_available_blocks, cache.stats()["num_deferred"]) == (0, 2)
    cache.complete(first)
    assert cache.admit(1, int32(), num_reserved=1) is None
    cache.complete(second)
    assert cache.admit(1, int32(), num_reserved=8) == 0


def test_a_published_block_that_waits_for_a_step_can_be_matched_again() -> None:
    cache = PagedKVCache(4, 4)
    token_ids = np.arange(5, dtype=np.int32)
    serve(cache, 0, token_ids)
    assert cache.admit(1, token_ids) == 4
    cache.fill_step(int32(1), int32(0), **step_buffers(1, 1, 0))
    cache.release(1)
    assert cache.stats()["num_deferred"] == 1
    assert cache.admit(2, token_ids) == 4
    cache.complete(2)
    cache.check_invariants()
    assert (cache.stats()["num_used"], cache.stats()["num_deferred"]) == (1, 0)


def test_what_a_failed_step_wrote_is_never_matched() -> None:
    cache = PagedKVCache(4, 4)
    token_ids = np.arange(9, dtype=np.int32)
    cache.admit(0, token_ids)
    cache.append(int32(0), int32(9))
    step = cache.fill_step(int32(0), int32(9), **step_buffers(1, 3, 9))
    cache.publish(int32(0), int32(9))
    assert cache.match(token_ids) == 0
    cache.release(0)
    cache.complete(step, failed=True)
    assert cache.match(token_ids) == 0


# --- the split plan


@pytest.mark.parametrize("num_items", [3, 4, 5, 7, 12, 64, 500])
@pytest.mark.parametrize("lengths", [[1, 2, 3], [100, 1, 90], [400, 400, 400], [1500, 3, 9]])
def test_a_split_plan_covers_every_block_once_with_the_items_it_has(lengths: list[int], num_items: int) -> None:
    cache = PagedKVCache(1600, 2)
    for seq_id, length in enumerate([*lengths, 30]):
        admitted(cache, seq_id, length)
    out = step_buffers(6, 750, 5, num_items)
    cache.fill_step(int32(0, 3, 1, 2), int32(1, 2, 1, 1), **out)
    first, second, third = (-(-length // 2) for length in lengths)
    starts = out["split_start_S1"].tolist()
    check_split_plan(starts, out["split_W3"].tolist(), [first, 0, second, third, 0, 0])


@given(st.lists(st.integers(1, 600), min_size=1, max_size=12), st.integers(0, 3), st.integers(0, 140))
def test_a_split_plan_is_that_of_the_rule_in_python(num_blocks: list[int], padding: int, more_items: int) -> None:
    cache = PagedKVCache(sum(num_blocks), 1)
    for seq_id, length in enumerate(num_blocks):
        admitted(cache, seq_id, length)
    num_rows, num_items = len(num_blocks) + padding, len(num_blocks) + more_items
    out = step_buffers(num_rows, max(num_blocks), len(num_blocks), num_items)
    cache.fill_step(np.arange(len(num_blocks), dtype=np.int32), np.ones(len(num_blocks), np.int32), **out)
    starts, items = out["split_start_S1"].tolist(), out["split_W3"].tolist()
    padded = num_blocks + [0] * padding
    assert [items[start:stop] for start, stop in pairwise(starts)] == plan_splits(padded, num_items)
    check_split_plan(starts, items, padded)


def test_a_split_plan_with_too_few_items_is_refused_and_nothing_is_written() -> None:
    cache = PagedKVCache(8, 2)
    for seq_id in (0, 1):
        admitted(cache, seq_id, 4)
    out = step_buffers(2, 2, 2, 1)
    with pytest.raises(ValueError, match="split_W3: expected at least 2 rows"):
        cache.fill_step(int32(0, 1), int32(1, 1), **out)
    assert all((buffer == POISON).all() for buffer in out.values())
    for name in ("split_start_S1", "split_W3"):
        with pytest.raises(ValueError, match="split_start_S1 and split_W3: expected both or neither"):
            cache.fill_step(int32(0, 1), int32(1, 1), **{k: v for k, v in out.items() if k != name})

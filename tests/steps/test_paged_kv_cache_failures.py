"""Tests when a block that steps in flight compute can be matched: after all of them, and never if one has failed."""

import pytest

from internvl_rt._C import PagedKVCache
from paged_kv_cache.buffers import int32, step_buffers


def fill_step(cache: PagedKVCache, seq_id: int, num_new_tokens: int) -> int:
    cache.take_copies()
    out = step_buffers(1, cache.num_blocks, num_new_tokens)
    return cache.fill_step(int32([seq_id]), int32([num_new_tokens]), **out)


def append_step(cache: PagedKVCache, seq_id: int, num_tokens: int) -> int:
    """Appends tokens and fills a step that computes them; returns its number."""
    assert cache.append(int32([seq_id]), int32([num_tokens]))
    return fill_step(cache, seq_id, num_tokens)


def publish(cache: PagedKVCache, seq_id: int, num_tokens: int) -> None:
    cache.publish(int32([seq_id]), int32([num_tokens]))


def prompt(num_tokens: int) -> list[int]:
    return list(range(num_tokens))


@pytest.mark.parametrize("num_later", [1, 3])
def test_a_block_can_be_matched_after_the_step_that_wrote_it_and_not_after_a_later_one(num_later: int) -> None:
    cache = PagedKVCache(16, 4)
    cache.admit(0, int32(prompt(5)))
    first = append_step(cache, 0, 5)
    cache.admit(1, int32([9]))
    for _ in range(num_later):
        append_step(cache, 1, 1)
    publish(cache, 0, 5)
    assert cache.match(int32(prompt(5))) == 0
    cache.complete(first)
    assert cache.match(int32(prompt(5))) == 4
    cache.check_invariants()


@pytest.mark.parametrize("published_first", [True, False])
@pytest.mark.parametrize("released_first", [True, False])
def test_the_block_of_a_failed_step_is_never_matched_though_a_later_step_ends_well(
    published_first: bool, released_first: bool
) -> None:
    cache = PagedKVCache(8, 4)
    cache.admit(0, int32(prompt(5)))
    first = append_step(cache, 0, 5)
    if published_first:
        publish(cache, 0, 5)
    cache.admit(1, int32([9]))
    second = append_step(cache, 1, 1)
    if not published_first:
        publish(cache, 0, 5)
    if released_first:
        cache.release(0)
    cache.complete(first, failed=True)
    if not released_first:
        cache.release(0)
    cache.complete(second)
    assert cache.match(int32(prompt(5))) == 0
    assert cache.stats()["num_cached"] == 0
    cache.check_invariants()


def test_a_block_of_two_steps_is_published_only_if_both_end_well() -> None:
    for failed in (None, 1, 2):
        cache = PagedKVCache(8, 4)
        cache.admit(0, int32(prompt(5)))
        steps = [append_step(cache, 0, 2), append_step(cache, 0, 3)]
        publish(cache, 0, 5)
        cache.release(0)
        for step in steps:
            cache.complete(step, failed=step == failed)
        assert cache.match(int32(prompt(5))) == (4 if failed is None else 0)
        cache.check_invariants()


@pytest.mark.parametrize("released_first", [True, False])
def test_what_was_computed_from_a_failed_steps_tokens_is_not_found_behind_another_copy_of_them(
    released_first: bool,
) -> None:
    """The second block is written by a step that ends well; its values depend on the first, which failed."""
    cache = PagedKVCache(8, 4)
    cache.admit(0, int32(prompt(9)))
    first, second = append_step(cache, 0, 4), append_step(cache, 0, 5)
    publish(cache, 0, 9)
    if released_first:
        cache.release(0)
    cache.complete(first, failed=True)
    if not released_first:
        cache.release(0)
    cache.complete(second)
    cache.admit(1, int32(prompt(5)))
    third = append_step(cache, 1, 5)
    publish(cache, 1, 4)
    cache.complete(third)
    assert cache.match(int32(prompt(9))) == 4
    cache.check_invariants()


@pytest.mark.parametrize("publisher", [0, 1])
@pytest.mark.parametrize("num_more", [0, 3])
def test_a_fork_publishes_nothing_of_its_parents_failed_step(publisher: int, num_more: int) -> None:
    cache = PagedKVCache(8, 4)
    cache.admit(0, int32(prompt(5)))
    first = append_step(cache, 0, 5)
    cache.fork(0, 1)
    if num_more:  # the second block is copied, and filled by a step that ends well
        append_step(cache, publisher, num_more)
        cache.extend(publisher, int32([5, 6, 7]))
    publish(cache, publisher, 5 + num_more)
    cache.complete(first, failed=True)
    cache.complete(cache.num_steps)
    with pytest.raises(ValueError, match=r"num_tokens: expected 0 to 0 \(sequence 1 has 0 tokens in steps"):
        publish(cache, 1, 1)
    for seq_id in (0, 1):
        cache.release(seq_id)
    assert cache.stats()["num_free"] == 8
    cache.check_invariants()


def test_the_tokens_of_a_failed_step_may_be_computed_again_and_are_found_then() -> None:
    cache = PagedKVCache(8, 4)
    cache.admit(0, int32(prompt(9)))
    steps = [append_step(cache, 0, 4), append_step(cache, 0, 4), append_step(cache, 0, 1)]
    publish(cache, 0, 9)
    cache.complete(steps[0])
    cache.complete(steps[1], failed=True)
    assert cache.match(int32(prompt(9))) == 4
    with pytest.raises(ValueError, match="sequence 0 has 4 tokens in steps"):
        publish(cache, 0, 5)
    again = fill_step(cache, 0, 5)
    publish(cache, 0, 9)
    cache.complete(steps[2])
    assert cache.match(int32(prompt(9))) == 4
    cache.complete(again)
    assert cache.match(int32(prompt(9))) == 8
    cache.check_invariants()


def test_tokens_that_a_later_step_computes_again_do_not_depend_on_the_failed_one() -> None:
    cache = PagedKVCache(8, 4)
    cache.admit(0, int32(prompt(5)))
    first = append_step(cache, 0, 5)
    second = fill_step(cache, 0, 5)
    publish(cache, 0, 5)
    cache.complete(first, failed=True)
    cache.complete(second)
    assert cache.match(int32(prompt(5))) == 4


def test_a_token_of_the_failed_step_that_is_left_by_a_rollback_spoils_those_that_replace_the_others() -> None:
    cache = PagedKVCache(8, 4)
    cache.admit(0, int32(prompt(5)))
    first = append_step(cache, 0, 5)
    cache.rollback(0, 4)
    cache.extend(0, int32([1, 2, 3, 4]))
    second = append_step(cache, 0, 4)
    publish(cache, 0, 5)
    cache.release(0)
    cache.complete(first, failed=True)
    cache.complete(second)
    assert cache.match(int32(prompt(5))) == 0


def test_a_reset_forgets_what_waits_for_a_step() -> None:
    cache = PagedKVCache(8, 4, events=True)
    cache.admit(0, int32(prompt(5)))
    step = append_step(cache, 0, 5)
    publish(cache, 0, 5)
    cache.reset()
    cache.complete(step)
    assert cache.match(int32(prompt(5))) == 0
    assert [event[0] for event in cache.drain_events()] == ["cleared"]
    publish(cache, 0, 5)
    assert cache.match(int32(prompt(5))) == 4
    cache.check_invariants()

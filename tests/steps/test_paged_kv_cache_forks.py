"""Tests sequences that share a prefix (several answers to one prompt), and tokens that are rolled back."""

import pytest

from internvl_rt._C import PagedKVCache
from paged_kv_cache.buffers import int32, step_buffers

CAT = bytes([1]) * 32


def fill_step(
    cache: PagedKVCache, seq_ids: list[int], num_new_tokens: list[int]
) -> tuple[int, list[list[int]], list[int]]:
    """Fills a step after its copies were taken; returns the step's number, its block table and its slots."""
    out = step_buffers(len(seq_ids), cache.num_blocks, sum(num_new_tokens))
    step = cache.fill_step(int32(seq_ids), int32(num_new_tokens), **out)
    tables = [[block for block in row if block >= 0] for row in out["block_table_SN"].tolist()]
    return step, tables, out["slot_T"].tolist()


def start(cache: PagedKVCache, token_ids: list[int]) -> tuple[int, list[int]]:
    """Starts sequence 0 and a step of all its tokens, which stays in flight; returns the step and the blocks."""
    assert cache.admit(0, int32(token_ids)) == 0
    assert cache.append(int32([0]), int32([len(token_ids)]))
    step, (blocks,), _ = fill_step(cache, [0], [len(token_ids)])
    return step, blocks


def test_forks_of_a_step_in_flight_each_get_a_last_block_of_their_own() -> None:
    cache = PagedKVCache(8, 4)
    _, (head, tail) = start(cache, [1, 2, 3, 4, 5, 6])
    for child in (1, 2):
        cache.fork(0, child)
    assert cache.append(int32([0, 1, 2]), int32([1, 1, 1]))
    copies = cache.take_copies().tolist()
    assert [copy[0] for copy in copies] == [tail] * 2  # the last sequence to append has the block alone
    step, tables, slots = fill_step(cache, [0, 1, 2], [1, 1, 1])
    lasts = [*(copy[1] for copy in copies), tail]
    assert tables == [[head, last] for last in lasts]
    assert slots == [4 * last + 2 for last in lasts]
    cache.complete(step)
    cache.check_invariants()


@pytest.mark.parametrize("released", [0, 1])
def test_the_one_that_is_left_of_two_forks_goes_on_in_their_blocks(released: int) -> None:
    cache = PagedKVCache(8, 4)
    step, blocks = start(cache, [1, 2, 3, 4, 5, 6])
    cache.fork(0, 1)
    cache.release(released)
    assert (cache.stats()["num_used"], cache.stats()["num_deferred"]) == (2, 0)
    assert cache.append(int32([1 - released]), int32([1]))
    assert cache.take_copies().tolist() == []
    assert fill_step(cache, [1 - released], [1])[1] == [blocks]
    cache.complete(step + 1)
    cache.check_invariants()


@pytest.mark.parametrize("publish_first", [True, False])
def test_forks_publish_what_they_share_once_and_their_own_blocks_each(publish_first: bool) -> None:
    cache = PagedKVCache(8, 2, events=True)
    start(cache, [1, 2, 3])
    if publish_first:
        cache.publish(int32([0]), int32([3]))
    cache.fork(0, 1)
    assert cache.append(int32([0, 1]), int32([1, 1]))
    cache.take_copies()
    step, _, _ = fill_step(cache, [0, 1], [1, 1])
    cache.extend(0, int32([7]))
    cache.extend(1, int32([8]))
    cache.publish(int32([0, 1]), int32([4, 4]))
    cache.complete(step)
    assert [event[3].tolist() for event in cache.drain_events()] == [[1, 2], [3, 7], [3, 8]]
    assert [cache.match(int32([1, 2, 3, last, 0])) for last in (7, 8, 9)] == [4, 4, 2]
    cache.check_invariants()


def test_tokens_that_are_rolled_back_are_written_anew_and_never_published() -> None:
    cache = PagedKVCache(8, 2)
    start(cache, [1, 2, 3])
    cache.publish(int32([0]), int32([3]))
    assert cache.append(int32([0]), int32([5]))
    step, (longer,), _ = fill_step(cache, [0], [5])
    cache.rollback(0, 3)  # two of the five draft tokens were right
    cache.extend(0, int32([4, 5]))
    cache.publish(int32([0]), int32([5]))
    assert cache.append(int32([0]), int32([1]))
    assert cache.take_copies().tolist() == []
    step, (table,), slots = fill_step(cache, [0], [1])
    assert (table, slots) == (longer[:3], [2 * longer[2] + 1])
    cache.extend(0, int32([6]))
    cache.publish(int32([0]), int32([6]))
    cache.complete(step)
    assert cache.match(int32([1, 2, 3, 4, 5, 6, 7])) == 6
    cache.check_invariants()


def test_a_rollback_into_a_published_block_leaves_it_to_those_who_match_it() -> None:
    cache = PagedKVCache(8, 4)
    _, (head, tail) = start(cache, [1, 2, 3, 4, 5, 6, 7, 8])
    cache.publish(int32([0]), int32([8]))  # nobody knows yet that three of these tokens are wrong
    cache.rollback(0, 3)
    assert cache.append(int32([0]), int32([3]))
    ((source, replacement),) = cache.take_copies().tolist()
    assert source == tail
    step, (table,), slots = fill_step(cache, [0], [3])
    assert (table, slots) == ([head, replacement], [4 * replacement + i for i in (1, 2, 3)])
    cache.extend(0, int32([9, 9, 9]))
    cache.publish(int32([0]), int32([8]))
    cache.complete(step)
    assert cache.match(int32([1, 2, 3, 4, 5, 6, 7, 8, 0])) == 8
    assert cache.match(int32([1, 2, 3, 4, 5, 9, 9, 9, 0])) == 8
    cache.check_invariants()


def serve_after_a_rollback(cache: PagedKVCache, left: int, pictures: list[tuple[int, int, bytes]]) -> None:
    """Computes a prompt of thirteen equal ids, rolls back to `left` tokens, computes text instead, and publishes it."""
    assert cache.admit(0, int32([7] * 13), pictures) == 0
    assert cache.append(int32([0]), int32([13]))
    fill_step(cache, [0], [13])
    cache.rollback(0, 13 - left)
    cache.extend(0, int32([7] * (13 - left)))
    assert cache.append(int32([0]), int32([13 - left]))
    cache.take_copies()
    step, _, _ = fill_step(cache, [0], [13 - left])
    cache.publish(int32([0]), int32([13]))
    cache.complete(step)
    cache.check_invariants()


@pytest.mark.parametrize(
    ("left", "with_picture", "as_text"),
    [
        (0, 4, 12),  # the picture is taken back whole, and its place is computed as text
        (5, 4, 12),
        (6, 4, 4),  # the picture is cut: only what is left of it may be found, by a prompt with the whole picture
        (7, 4, 4),
        (8, 8, 4),
        (10, 8, 4),
        (11, 12, 4),  # the picture stays whole
        (12, 12, 4),
    ],
)
def test_a_rollback_takes_pictures_back_with_their_tokens(left: int, with_picture: int, as_text: int) -> None:
    cache = PagedKVCache(8, 4)
    picture = (5, 6, CAT)
    serve_after_a_rollback(cache, left, [picture])
    assert cache.match(int32([7] * 13), [picture]) == with_picture
    assert cache.match(int32([7] * 13)) == as_text
    if 5 < left < 11:
        assert cache.match(int32([7] * 13), [(5, left - 5, CAT)]) == 4, "a shorter picture is another one"


def test_a_rollback_takes_back_only_the_pictures_behind_it() -> None:
    cache = PagedKVCache(8, 4)
    pictures = [(0, 3, CAT), (4, 1, CAT), (6, 2, CAT), (9, 2, CAT)]
    serve_after_a_rollback(cache, 8, pictures)
    assert [cache.match(int32([7] * 13), pictures[:end]) for end in (1, 2, 3, 4)] == [4, 4, 12, 8]


def test_a_cut_picture_stays_cut_until_a_rollback_to_its_start_and_in_forks() -> None:
    cache = PagedKVCache(16, 4)
    picture = (2, 6, CAT)
    assert cache.admit(0, int32([7] * 8), [picture]) == 0
    assert cache.append(int32([0]), int32([8]))
    fill_step(cache, [0], [8])
    cache.rollback(0, 3)
    cache.fork(0, 1)
    for seq_id, left in ((0, 5), (1, 2)):
        cache.rollback(seq_id, 5 - left)
        assert cache.append(int32([seq_id]), int32([12 - left]))
        cache.take_copies()
        fill_step(cache, [seq_id], [12 - left])
        cache.rollback(seq_id, 2)  # these are behind the cut
        assert cache.append(int32([seq_id]), int32([2]))
        step, _, _ = fill_step(cache, [seq_id], [2])
        cache.extend(seq_id, int32([7] * (12 - left)))
        cache.publish(int32([seq_id]), int32([12]))
        cache.complete(step)
        cache.check_invariants()
        assert cache.match(int32([7] * 13)) == (0 if left == 5 else 12)
        assert cache.match(int32([7] * 13), [picture]) == 4

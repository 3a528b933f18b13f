"""Tests which arguments PagedKVCache refuses: it names the argument and changes nothing."""

import re
from typing import Any

import numpy as np
import pytest

from internvl_rt._C import PagedKVCache
from paged_kv_cache.buffers import POISON, length_of, step_buffers

CAT = bytes([1]) * 32


def int32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def admitted(cache: PagedKVCache, seq_id: int, num_tokens: int) -> None:
    """Admits a sequence and gives it slots for `num_tokens` tokens of unknown ids."""
    assert cache.admit(seq_id, int32(), num_reserved=num_tokens) == 0
    assert cache.append(int32(seq_id), int32(num_tokens))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 16), {}, "num_blocks: expected at least 1, got 0"),
        ((-1, 16), {}, "num_blocks: expected at least 1, got -1"),
        ((4, 0), {}, "block_size: expected at least 1, got 0"),
        ((2**24, 128), {}, "expected at most 2147483647 token slots (they are int32), got 2147483648"),
        ((4, 16), {"watermark_blocks": -1}, "watermark_blocks: expected 0 to 3, got -1"),
        ((4, 16), {"watermark_blocks": 4}, "watermark_blocks: expected 0 to 3, got 4"),
        ((4, 16), {"hash_bits": 129}, "hash_bits: expected 1 to 128, got 129"),
        ((4, 16), {"hash_key": bytes(15)}, "hash_key: expected 16 bytes, got 15"),
    ],
)
def test_a_pool_that_cannot_be_indexed_is_refused(
    arguments: tuple[int, int], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        PagedKVCache(*arguments, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_id": -1}, "seq_id: expected 0 to 2147483647, got -1"),
        ({"seq_id": 2**31}, "seq_id: expected 0 to 2147483647, got 2147483648"),
        ({"seq_id": 5}, "sequence 5 is already admitted"),
        ({"num_reserved": -1}, "num_reserved: expected at least 0, got -1"),
        ({"max_cached": -1}, "max_cached: expected at least 0, got -1"),
        ({"max_cached": -(2**63), "identity": None}, "max_cached: expected at least 0, got -9223372036854775808"),
        ({"token_ids": np.zeros(9, np.int64)}, "token_ids: expected dtype int32, got int64"),
        ({"token_ids": np.zeros((3, 3), np.int32)}, "token_ids: expected 1 dimension(s), got 2"),
        ({"token_ids": np.zeros(18, np.int32)[::2]}, "token_ids: expected a C-contiguous array, got a strided one"),
        ({"pictures": [(0, 1, bytes(31))]}, "pictures: expected digests of 32 bytes, got 31"),
        ({"pictures": [(-1, 2, CAT)]}, "pictures: expected them in order and apart, got one at token -1"),
        ({"pictures": [(0, 0, CAT)]}, "pictures: expected at least 1 token each, got 0"),
        ({"pictures": [(0, 3, CAT), (2, 1, CAT)]}, "in order and apart, got one at token 2 where the one before ends"),
        ({"pictures": [(4, 1, CAT), (0, 1, CAT)]}, "in order and apart, got one at token 0 where the one before ends"),
        ({"pictures": [(8, 2, CAT)]}, "pictures: expected them inside the 9 tokens, got one up to 10"),
        ({"pictures": [(2**31 - 1, 2**31 - 1, CAT)]}, "inside the 9 tokens, got one up to 4294967294"),
    ],
)
def test_admit_names_the_wrong_argument_and_changes_nothing(change: dict[str, Any], message: str) -> None:
    cache = PagedKVCache(4, 16)
    admitted(cache, 5, 1)
    before = cache.stats()
    arguments: dict[str, Any] = {"seq_id": 0, "token_ids": np.zeros(9, np.int32), "num_reserved": 9} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        cache.admit(**arguments)
    assert cache.stats() == before


def test_match_refuses_a_negative_max_cached() -> None:
    with pytest.raises(ValueError, match="max_cached: expected at least 0, got -1"):
        PagedKVCache(4, 16).match(int32(1), max_cached=-1)


@pytest.mark.parametrize(
    ("name", "seq_ids", "values", "message"),
    [
        ("append", [5, 6], [1], "num_tokens: expected size 2, got 1"),
        ("append", [5, 5], [1, 1], "seq_ids: sequence 5 is listed twice"),
        ("append", [5, 7], [1, 1], "sequence 7 is not admitted"),
        ("append", [5, 6], [1, -3], "num_tokens: expected at least 0, got -3"),
        ("publish", [5, 6], [1], "num_tokens: expected size 2, got 1"),
        ("publish", [5, 5], [0, 0], "seq_ids: sequence 5 is listed twice"),
        ("publish", [5, 7], [0, 0], "sequence 7 is not admitted"),
        ("publish", [5, 6], [0, -1], "num_tokens: expected 0 to 0 (sequence 6 has 0 tokens in steps and 2 known"),
        ("publish", [6, 5], [0, 2], "num_tokens: expected 0 to 1 (sequence 5 has 3 tokens in steps and 1 known"),
    ],
)
def test_a_wrong_batch_is_refused_as_a_whole(name: str, seq_ids: list[int], values: list[int], message: str) -> None:
    cache = PagedKVCache(8, 1)
    for seq_id, num_known in ((5, 1), (6, 2)):
        cache.admit(seq_id, np.arange(num_known, dtype=np.int32))
        cache.append(int32(seq_id), int32(3))
    cache.fill_step(int32(5), int32(3), **step_buffers(1, 3, 3))
    before = cache.stats()
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(cache, name)(int32(*seq_ids), int32(*values))
    assert cache.stats() == before
    assert [length_of(cache, seq_id) for seq_id in (5, 6)] == [3, 3]


@pytest.mark.parametrize("num_tokens", [-1, 3])
def test_rollback_refuses_more_tokens_than_there_are(num_tokens: int) -> None:
    cache = PagedKVCache(4, 16)
    admitted(cache, 0, 2)
    with pytest.raises(ValueError, match=f"num_tokens: expected 0 to 2 .the length of sequence 0., got {num_tokens}"):
        cache.rollback(0, num_tokens)
    assert length_of(cache, 0) == 2


def test_steps_end_in_order_and_not_before_they_begin() -> None:
    cache = PagedKVCache(4, 16)
    steps = [cache.fill_step(int32(), int32(), **step_buffers(0, 0, 0)) for _ in range(3)]
    assert steps == [1, 2, 3]
    for step in (0, 2, 2):
        cache.complete(step)
    for step, message in ((1, "expected 2 to 3, got 1"), (4, "expected 2 to 3, got 4")):
        with pytest.raises(ValueError, match=f"step: {message}"):
            cache.complete(step)


def test_an_unknown_sequence_is_refused_by_everything() -> None:
    cache = PagedKVCache(4, 16)
    admitted(cache, 3, 1)
    cache.release(3)
    uses = [
        lambda: cache.append(int32(3), int32(1)),
        lambda: cache.extend(3, int32(1)),
        lambda: cache.fork(3, 4),
        lambda: cache.rollback(3, 0),
        lambda: cache.release(3),
        lambda: cache.publish(int32(3), int32(0)),
        lambda: cache.fill_step(int32(3), int32(0), **step_buffers(1, 1, 0)),
    ]
    for use in uses:
        with pytest.raises(ValueError, match="sequence 3 is not admitted"):
            use()


def strided(array: np.ndarray) -> np.ndarray:
    return np.repeat(array, 2, axis=-1)[..., ::2]


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("seq_ids", lambda a: a.astype(np.int64), "seq_ids: expected dtype int32, got int64"),
        ("seq_ids", lambda a: a.astype(np.float32), "seq_ids: expected dtype int32, got float32"),
        ("seq_ids", lambda a: a.astype(">i4"), "seq_ids: expected dtype int32, got >i4"),
        ("seq_ids", lambda a: a + 90, "sequence 95 is not admitted"),
        ("seq_ids", lambda a: a * 0 + 5, "seq_ids: sequence 5 is listed twice"),
        ("num_new_tokens", lambda a: a[:1], "num_new_tokens: expected size 2, got 1"),
        ("num_new_tokens", lambda a: a[None], r"num_new_tokens: expected 1 dimension\(s\), got 2"),
        ("num_new_tokens", lambda a: -a, "num_new_tokens: expected 0 to 20 .the length of sequence 5., got -20"),
        ("num_new_tokens", lambda a: a + 1, "num_new_tokens: expected 0 to 20 .the length of sequence 5., got 21"),
        ("query_start_S1", lambda a: a[:-1], "query_start_S1: expected size 3, got 2"),
        ("query_start_S1", lambda a: np.append(a, a), "query_start_S1: expected size 3, got 6"),
        ("query_start_S1", read_only, "query_start_S1: expected a writable array, got a read-only one"),
        ("query_start_S1", strided, "query_start_S1: expected a C-contiguous array, got a strided one"),
        ("seq_len_S", lambda a: a[:1], r"seq_len_S: expected at least 2 rows \(one per sequence\), got 1"),
        ("seq_len_S", lambda a: a.astype(np.uint32), "seq_len_S: expected dtype int32, got uint32"),
        ("seq_len_S", read_only, "seq_len_S: expected a writable array, got a read-only one"),
        ("block_table_SN", lambda a: a.ravel(), r"block_table_SN: expected 2 dimension\(s\), got 1"),
        ("block_table_SN", lambda a: a[:1], "block_table_SN: expected size 4, got 2"),
        ("block_table_SN", lambda a: a[:, :1].copy(), "block_table_SN: expected at least 2 columns for the 20 tokens"),
        ("block_table_SN", np.asfortranarray, "block_table_SN: expected a C-contiguous array, got a strided one"),
        ("block_table_SN", read_only, "block_table_SN: expected a writable array, got a read-only one"),
        ("slot_T", lambda a: a[:-1], r"slot_T: expected at least 52 entries \(the new tokens of this step\), got 51"),
        ("slot_T", strided, "slot_T: expected a C-contiguous array, got a strided one"),
        ("slot_T", read_only, "slot_T: expected a writable array, got a read-only one"),
        ("split_start_S1", lambda a: a[:-1], "split_start_S1: expected size 3, got 2"),
        ("split_start_S1", lambda a: a[:0], "split_start_S1: expected size 3, got 0"),
        ("split_start_S1", strided, "split_start_S1: expected a C-contiguous array, got a strided one"),
        ("split_start_S1", read_only, "split_start_S1: expected a writable array, got a read-only one"),
        ("split_W3", lambda a: a.ravel(), r"split_W3: expected 2 dimension\(s\), got 1"),
        ("split_W3", lambda a: a[:, :2].copy(), "split_W3: expected 3 columns, got 2"),
        ("split_W3", lambda a: a.astype(np.int64), "split_W3: expected dtype int32, got int64"),
        ("split_W3", read_only, "split_W3: expected a writable array, got a read-only one"),
    ],
)
def test_fill_step_names_the_wrong_buffer_and_writes_nothing(name: str, change: Any, message: str) -> None:
    cache = PagedKVCache(8, 16)
    for seq_id, length in ((5, 20), (6, 32)):
        admitted(cache, seq_id, length)
    out = step_buffers(2, 2, 52, 4)
    arguments = {"seq_ids": int32(5, 6), "num_new_tokens": int32(20, 32), **out}
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=message):
        cache.fill_step(**arguments)
    assert all((buffer == POISON).all() for buffer in out.values())


def refused_step(cache: PagedKVCache, seq_id: int, num_new_tokens: int, message: str) -> None:
    """Checks that a step is refused with this message, and that it has changed nothing."""
    out = step_buffers(1, cache.num_blocks, num_new_tokens)
    before = cache.stats(), cache.num_steps, length_of(cache, seq_id)
    with pytest.raises(ValueError, match=re.escape(message)):
        cache.fill_step(int32(seq_id), int32(num_new_tokens), **out)
    assert all((buffer == POISON).all() for buffer in out.values())
    assert (cache.stats(), cache.num_steps, length_of(cache, seq_id)) == before
    cache.check_invariants()


def run_step(cache: PagedKVCache, seq_id: int, num_new_tokens: int) -> None:
    cache.take_copies()
    out = step_buffers(1, cache.num_blocks, num_new_tokens)
    cache.complete(cache.fill_step(int32(seq_id), int32(num_new_tokens), **out))


@pytest.mark.parametrize("is_reset", [False, True])
def test_fill_step_refuses_to_compute_tokens_that_came_from_the_cache(is_reset: bool) -> None:
    cache = PagedKVCache(8, 4)
    token_ids = np.arange(9, dtype=np.int32)
    cache.admit(0, token_ids)
    cache.append(int32(0), int32(9))
    run_step(cache, 0, 9)
    cache.publish(int32(0), int32(9))
    cache.release(0)
    assert cache.admit(1, token_ids) == 8
    if is_reset:
        cache.reset()  # the blocks are no longer published, but the tokens still came from the cache
    for num_appended in (0, 1):
        cache.append(int32(1), int32(num_appended))
        for num_new_tokens in (num_appended + 1, num_appended + 8):
            message = f"expected at most {num_appended} (of the {8 + num_appended} tokens of sequence 1, 8 came from"
            refused_step(cache, 1, num_new_tokens, message)
    run_step(cache, 1, 1)
    cache.fork(1, 2)
    cache.release(1)
    refused_step(cache, 2, 2, "expected at most 1 (of the 9 tokens of sequence 2, 8 came from the cache), got 2")


def test_fill_step_refuses_to_write_blocks_that_a_fork_shares() -> None:
    cache = PagedKVCache(16, 4)
    cache.admit(0, np.arange(6, dtype=np.int32))
    cache.append(int32(0), int32(6))
    cache.fork(0, 1)
    for seq_id in (0, 1):
        refused_step(cache, seq_id, 6, f"blocks that sequence {seq_id} alone holds and that are not published, got 6")
    cache.append(int32(1), int32(1))  # it gets a last block of its own, but still shares the first
    cache.take_copies()
    refused_step(cache, 1, 7, "got 7, and the block of token 0 is shared or published")
    run_step(cache, 1, 3)
    cache.rollback(1, 7)
    cache.append(int32(1), int32(6))  # as the message advises
    run_step(cache, 1, 6)
    cache.fork(0, 2)
    refused_step(cache, 2, 1, "the block of token 5 is shared")
    cache.release(0)
    run_step(cache, 2, 6)  # it is alone now


@pytest.mark.parametrize("ends", [False, True])
def test_fill_step_refuses_to_write_blocks_that_are_published_or_will_be(ends: bool) -> None:
    cache = PagedKVCache(8, 4)
    cache.admit(0, np.arange(6, dtype=np.int32))
    cache.append(int32(0), int32(6))
    step = cache.fill_step(int32(0), int32(6), **step_buffers(1, 2, 6))
    cache.publish(int32(0), int32(6))
    if ends:
        cache.complete(step)
    refused_step(cache, 0, 3, "got 3, and the block of token 3 is shared or published; roll back from there on")
    run_step(cache, 0, 2)


def test_fill_step_refuses_a_batch_for_one_sequence_of_it() -> None:
    cache = PagedKVCache(8, 4)
    for seq_id in (0, 1):
        admitted(cache, seq_id, 4)
    cache.fork(1, 2)
    out = step_buffers(2, 8, 8)
    with pytest.raises(ValueError, match="sequence 1 alone holds"):
        cache.fill_step(int32(0, 1), int32(4, 4), **out)
    with pytest.raises(ValueError, match="sequence 0 has 0 tokens in steps"):
        cache.publish(int32(0), int32(1))


def test_fill_step_takes_arrays_only_since_a_list_would_be_a_copy() -> None:
    with pytest.raises(TypeError):
        PagedKVCache(8, 16).fill_step([], [], **step_buffers(0, 0, 0))

"""The C++ block bookkeeping against a naive model, and its argument checks."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from internvl_rt._C import PagedKVCache

FRESH = -7  # in every buffer before a step, so that an entry which is not written shows


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def int32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def step_buffers(num_rows: int, table_width: int, num_tokens: int) -> dict[str, np.ndarray]:
    shapes = {
        "query_start_S1": num_rows + 1,
        "seq_len_S": num_rows,
        "block_table_SN": (num_rows, table_width),
        "slot_T": num_tokens,
    }
    return {name: np.full(shape, FRESH, np.int32) for name, shape in shapes.items()}


class NaiveSequence:
    def __init__(self, reserved: int) -> None:
        self.reserved = reserved  # tokens
        self.length = 0
        self.computed = 0  # tokens that have been written to `Bookkeeping.pool`
        self.table: list[int] = []  # as last seen in a step


class Bookkeeping(RuleBasedStateMachine):
    """Random requests. A pool of tags stands in for the keys and values: a token writes (sequence, position) to its
    slot, and every token of a sequence must still be there whenever the sequence's blocks are read."""

    @initialize(num_blocks=st.integers(1, 12), block_size=st.sampled_from([1, 2, 3, 16]))
    def start(self, num_blocks: int, block_size: int) -> None:
        self.cache = PagedKVCache(num_blocks, block_size)
        self.num_blocks, self.block_size = num_blocks, block_size
        self.sequences: dict[int, NaiveSequence] = {}
        self.pool: list[tuple[int, int] | None] = [None] * (num_blocks * block_size)

    def draw_num_tokens(self, data: st.DataObject) -> int:
        """Mostly at or beside a block boundary, up to one block more than the pool has."""
        boundary = st.integers(0, self.num_blocks + 1).map(lambda blocks: blocks * self.block_size)
        beside = st.tuples(boundary, st.integers(-1, 1)).map(lambda pair: max(0, sum(pair)))
        return data.draw(beside | st.integers(0, 3))

    def blocks_of(self, sequence: NaiveSequence, length: int) -> int:
        return ceil_div(max(sequence.reserved, length), self.block_size)

    def num_free(self) -> int:
        return self.num_blocks - sum(self.blocks_of(s, s.length) for s in self.sequences.values())

    @rule(data=st.data(), seq_id=st.integers(0, 5))
    def admit(self, data: st.DataObject, seq_id: int) -> None:
        num_tokens = self.draw_num_tokens(data)
        if seq_id in self.sequences:
            with pytest.raises(ValueError, match=f"sequence {seq_id} is already admitted"):
                self.cache.admit(seq_id, num_tokens)
            return
        fits = ceil_div(num_tokens, self.block_size) <= self.num_free()
        assert self.cache.admit(seq_id, num_tokens) == fits
        if fits:
            self.sequences[seq_id] = NaiveSequence(num_tokens)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def append(self, data: st.DataObject) -> None:
        seq_id = data.draw(st.sampled_from(sorted(self.sequences)))
        num_tokens = self.draw_num_tokens(data)
        sequence = self.sequences[seq_id]
        length = sequence.length + num_tokens
        extra = self.blocks_of(sequence, length) - self.blocks_of(sequence, sequence.length)
        fits = extra <= self.num_free()
        assert self.cache.append(seq_id, num_tokens) == fits
        if fits:
            sequence.length = length

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        seq_id = data.draw(st.sampled_from(sorted(self.sequences)))
        self.cache.release(seq_id)
        del self.sequences[seq_id]

    @rule(seq_id=st.integers(0, 5))
    def use_unknown(self, seq_id: int) -> None:
        if seq_id not in self.sequences:
            for use in (self.cache.release, self.cache.length, lambda s: self.cache.append(s, 1)):
                with pytest.raises(ValueError, match=f"sequence {seq_id} is not admitted"):
                    use(seq_id)

    @rule(data=st.data(), spare_rows=st.integers(0, 2), spare_columns=st.integers(0, 2), spare_slots=st.integers(0, 2))
    def step(self, data: st.DataObject, spare_rows: int, spare_columns: int, spare_slots: int) -> None:
        """Computes, in a random order, all tokens that are not computed yet of some sequences."""
        chosen = data.draw(st.permutations(sorted(self.sequences)))[: data.draw(st.integers(0, len(self.sequences)))]
        sequences = [self.sequences[seq_id] for seq_id in chosen]
        counts = [s.length - s.computed for s in sequences]
        width = max((ceil_div(s.length, self.block_size) for s in sequences), default=0) + spare_columns
        out = step_buffers(len(chosen) + spare_rows, width, sum(counts) + spare_slots)
        self.cache.fill_step(int32(*chosen), int32(*counts), **out)

        starts = [sum(counts[:row]) for row in range(len(counts))] + [sum(counts)] * (spare_rows + 1)
        assert out["query_start_S1"].tolist() == starts
        assert out["seq_len_S"].tolist() == [s.length for s in sequences] + [0] * spare_rows
        assert (out["block_table_SN"][len(chosen) :] == -1).all()
        assert (out["slot_T"][sum(counts) :] == -1).all()
        for row, (seq_id, sequence) in enumerate(zip(chosen, sequences, strict=True)):
            num_used = ceil_div(sequence.length, self.block_size)
            table = out["block_table_SN"][row, :num_used].tolist()
            assert (out["block_table_SN"][row, num_used:] == -1).all()
            assert table[: len(sequence.table)] == sequence.table, "a running sequence's blocks moved"
            sequence.table = table
            places = [
                table[p // self.block_size] * self.block_size + p % self.block_size for p in range(sequence.length)
            ]
            assert out["slot_T"][starts[row] : starts[row + 1]].tolist() == places[sequence.computed :]
            for position in range(sequence.computed, sequence.length):
                self.pool[places[position]] = (seq_id, position)
            sequence.computed = sequence.length
            assert [self.pool[place] for place in places] == [(seq_id, p) for p in range(sequence.length)]

    @invariant()
    def books_agree(self) -> None:
        if not hasattr(self, "cache"):  # hypothesis asks before `start` too
            return
        self.cache.check_invariants()
        assert self.cache.num_free_blocks == self.num_free()
        assert self.cache.num_sequences == len(self.sequences)
        assert all(self.cache.length(seq_id) == s.length for seq_id, s in self.sequences.items())


TestBookkeeping = Bookkeeping.TestCase
TestBookkeeping.settings = settings(max_examples=150, stateful_step_count=40, deadline=None, derandomize=True)


def test_block_ids_stay_in_the_pool_and_a_freed_block_is_the_next_one_used() -> None:
    cache = PagedKVCache(num_blocks=4, block_size=2)
    tables = []
    for seq_id in (1, 2):
        assert cache.admit(seq_id, 8)
        assert cache.append(seq_id, 8)
        out = step_buffers(1, 4, 8)
        cache.fill_step(int32(seq_id), int32(8), **out)
        tables.append(out["block_table_SN"][0].tolist())
        cache.release(seq_id)
    assert tables == [[0, 1, 2, 3], [0, 1, 2, 3]]


def test_a_whole_pool_can_be_reserved_and_one_token_more_cannot() -> None:
    cache = PagedKVCache(num_blocks=3, block_size=16)
    assert not cache.admit(0, 49)
    assert cache.admit(0, 48)
    assert cache.append(0, 48)
    assert not cache.append(0, 1)
    assert cache.length(0) == 48
    assert not cache.append(0, 2**63 - 1)


@pytest.mark.parametrize(
    ("num_blocks", "block_size", "message"),
    [
        (0, 16, "num_blocks: expected at least 1, got 0"),
        (-1, 16, "num_blocks: expected at least 1, got -1"),
        (4, 0, "block_size: expected at least 1, got 0"),
        (2**24, 128, r"expected at most 2147483647 token slots \(they are int32\), got 2147483648"),
    ],
)
def test_a_pool_that_cannot_be_indexed_is_refused(num_blocks: int, block_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PagedKVCache(num_blocks, block_size)


@pytest.mark.parametrize(
    ("seq_id", "num_tokens", "message"),
    [
        (-1, 1, "seq_id: expected 0 to 2147483647, got -1"),
        (2**31, 1, "seq_id: expected 0 to 2147483647, got 2147483648"),
        (0, -1, "num_tokens: expected at least 0, got -1"),
    ],
)
def test_admit_refuses_negative_and_too_large_numbers(seq_id: int, num_tokens: int, message: str) -> None:
    cache = PagedKVCache(4, 16)
    with pytest.raises(ValueError, match=message):
        cache.admit(seq_id, num_tokens)
    assert cache.num_sequences == 0


def test_append_refuses_a_negative_number_of_tokens() -> None:
    cache = PagedKVCache(4, 16)
    cache.admit(0, 1)
    with pytest.raises(ValueError, match="num_tokens: expected at least 0, got -3"):
        cache.append(0, -3)


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
    ],
)
def test_fill_step_names_the_wrong_buffer_and_writes_nothing(name: str, change, message: str) -> None:
    cache = PagedKVCache(8, 16)
    for seq_id, length in ((5, 20), (6, 32)):
        cache.admit(seq_id, length)
        cache.append(seq_id, length)
    out = step_buffers(2, 2, 52)
    arguments = {"seq_ids": int32(5, 6), "num_new_tokens": int32(20, 32), **out}
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=message):
        cache.fill_step(**arguments)
    assert all((buffer == FRESH).all() for buffer in out.values())


def test_fill_step_takes_arrays_only_since_a_list_would_be_a_copy() -> None:
    with pytest.raises(TypeError):
        PagedKVCache(8, 16).fill_step([], [], **step_buffers(0, 0, 0))

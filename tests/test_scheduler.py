"""Which tokens run in a step: budget, order, picture borders, admission."""

import numpy as np
import torch

from internvl_rt.prompt import VisualSpan
from internvl_rt.scheduler import Scheduler
from internvl_rt.sequence import Picture, SamplingParams, Sequence


class Blocks:
    """Counts admissions against a capacity."""

    def __init__(self, capacity):
        self.capacity, self.admitted = capacity, {}

    def release(self, seq_id):
        del self.admitted[seq_id]


class Cache:
    def __init__(self, capacity, cached=0):
        self.blocks, self.cached = Blocks(capacity), cached

    def admit(self, sequence):
        blocks = self.blocks
        if sum(blocks.admitted.values()) + sequence.max_len > blocks.capacity:
            return None
        blocks.admitted[sequence.seq_id] = sequence.max_len
        return self.cached


def make(seq_id, num_prompt, *, spans=(), max_tokens=4):
    pictures = tuple(
        Picture(VisualSpan(start, size), bytes(32), lambda: torch.zeros(1, 3, 2, 2)) for start, size in spans
    )
    params = SamplingParams(max_tokens=max_tokens)
    positions = np.arange(num_prompt, dtype=np.float32)
    return Sequence(seq_id, [0] * num_prompt, positions, num_prompt, pictures, params, max_tokens, frozenset(), 0)


def run(scheduler):
    """Plays the runner: computes what is scheduled, draws a token where a sequence is complete."""
    chunks = scheduler.schedule()
    for chunk in chunks:
        samples = chunk.samples
        chunk.sequence.num_computed = chunk.stop
        if samples:
            chunk.sequence.token_ids.append(0)
    return [(chunk.sequence.seq_id, chunk.start, chunk.stop) for chunk in chunks]


def scheduler_for(*sequences, capacity=1000, max_num_seqs=8, budget=10):
    scheduler = Scheduler(Cache(capacity), max_num_seqs=max_num_seqs, max_tokens_per_step=budget)
    for sequence in sequences:
        scheduler.add(sequence)
    return scheduler


def test_long_prompt_runs_in_chunks_of_the_budget():
    scheduler = scheduler_for(make(0, 25))
    assert [run(scheduler) for _ in range(4)] == [[(0, 0, 10)], [(0, 10, 20)], [(0, 20, 25)], [(0, 25, 26)]]


def test_decodes_come_first_and_prefill_takes_the_rest():
    scheduler = scheduler_for(make(0, 25), make(1, 3), budget=30)
    assert run(scheduler) == [(0, 0, 25), (1, 0, 3)]
    scheduler.add(make(2, 40))
    assert run(scheduler) == [(0, 25, 26), (1, 3, 4), (2, 0, 28)]
    assert run(scheduler) == [(0, 26, 27), (1, 4, 5), (2, 28, 40)]


def test_chunk_ends_before_a_picture_that_it_would_cut():
    scheduler = scheduler_for(make(0, 20, spans=[(6, 8)]))
    assert [run(scheduler) for _ in range(2)] == [[(0, 0, 6)], [(0, 6, 16)]]


def test_picture_larger_than_the_budget_is_cut():
    scheduler = scheduler_for(make(0, 30, spans=[(4, 20)]))
    assert [run(scheduler) for _ in range(3)] == [[(0, 0, 10)], [(0, 10, 20)], [(0, 20, 30)]]


def test_sequence_is_admitted_only_with_room_for_prompt_and_answer():
    first, second = make(0, 6), make(1, 6)
    scheduler = scheduler_for(first, second, capacity=15, budget=100)
    assert run(scheduler) == [(0, 0, 6)]
    scheduler.remove(first)
    assert run(scheduler) == [(1, 0, 6)]


def test_no_more_than_max_num_seqs_run():
    sequences = [make(i, 1) for i in range(3)]
    scheduler = scheduler_for(*sequences, max_num_seqs=2)
    assert [seq_id for seq_id, *_ in run(scheduler)] == [0, 1]
    scheduler.remove(sequences[0])
    assert [seq_id for seq_id, *_ in run(scheduler)] == [1, 2]


def test_removing_a_waiting_or_unknown_sequence_releases_nothing():
    waiting = make(0, 5)
    scheduler = scheduler_for(waiting)
    scheduler.remove(waiting)
    scheduler.remove(waiting)
    assert scheduler.num_unfinished == 0
    assert run(scheduler) == []

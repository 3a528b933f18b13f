"""Tests which tokens run in a step: budget, order, picture borders, admission."""

import itertools
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch

from internvl_rt.inputs.picture import Picture
from internvl_rt.inputs.prompt import VisualSpan
from internvl_rt.inputs.sampling_params import SamplingParams
from internvl_rt.model.ops import TORCH
from internvl_rt.steps.kv_cache import KVCache
from internvl_rt.steps.scheduler import MAX_OVERTAKEN, Scheduler
from internvl_rt.steps.sequence import Sequence
from internvl_rt.steps.speculation import PromptLookup
from internvl_rt.steps.step import fill_step, plan_step, shape_of
from support.small_models import QWEN2

CONFIG = replace(QWEN2, max_position=1000)
BLOCK = 16
ids = itertools.count()


def make(num_prompt, *, spans=(), max_tokens=4, n=1, num_tiles=1, drafter=None):
    pictures = tuple(
        Picture(bytes(32), num_tiles, tiles=torch.zeros(1, 3, 2, 2), span=VisualSpan(start, size))
        for start, size in spans
    )
    made = [
        Sequence(
            seq_id=next(ids),
            token_ids=[0] * num_prompt,
            position_T=np.arange(num_prompt, dtype=np.float32),
            next_position=num_prompt,
            pictures=pictures,
            params=SamplingParams(max_tokens=max_tokens),
            max_tokens=max_tokens,
            stop_ids=frozenset(),
            seed=0,
            drafter=drafter,
        )
        for _ in range(n)
    ]
    made[0].siblings = made[1:]
    return made[0]


class Bench:
    """A scheduler with a cache and without a runner: it counts the tokens that a runner would compute."""

    def __init__(self, *sequences, num_blocks=64, max_num_seqs=8, budget=10, tiles=1 << 30):
        device = torch.device("cpu")
        self.cache = KVCache(
            CONFIG, num_blocks=num_blocks, block_size=BLOCK, dtype=torch.float32, device=device, ops=TORCH
        )
        self.scheduler = Scheduler(
            self.cache, max_num_seqs=max_num_seqs, max_tokens_per_step=budget, max_tiles_per_step=tiles
        )
        self.names = {}
        for sequence in sequences:
            self.add(sequence)

    def add(self, sequence):
        for each in (sequence, *sequence.siblings):
            self.names[each.seq_id] = len(self.names)
        self.scheduler.add(sequence)

    def launch(self, *, in_flight=False):
        """Launches a step; returns its chunks as (name, start, stop), and the function that collects it."""
        chunks = self.scheduler.schedule(in_flight=in_flight)
        if not chunks:
            return chunks, lambda: None
        step = plan_step(chunks)
        shape = shape_of(step, self.cache)
        fill_step(step, self.cache, shape.views(np.empty(shape.size, np.int32), np.float32))
        number = self.cache.blocks.num_steps
        for draw in step.draws:
            draw.sequence.num_tokens += 1
        self.scheduler.launched(chunks)

        def collect():
            self.cache.end_step(number)
            for draw in step.draws:
                draw.sequence.token_ids.append(draw.counter)
            self.cache.blocks.check_invariants()

        return [(self.names[chunk.sequence.seq_id], chunk.start, chunk.stop) for chunk in chunks], collect

    def step(self):
        chunks, collect = self.launch()
        collect()
        return chunks

    def steps(self, number):
        return [self.step() for _ in range(number)]


def test_long_prompt_runs_in_chunks_of_the_budget():
    assert Bench(make(25)).steps(4) == [[(0, 0, 10)], [(0, 10, 20)], [(0, 20, 25)], [(0, 25, 26)]]


def test_decodes_come_first_and_prefill_takes_the_rest():
    bench = Bench(make(25), make(3), budget=30)
    assert bench.step() == [(0, 0, 25), (1, 0, 3)]
    bench.add(make(40))
    assert bench.step() == [(0, 25, 26), (1, 3, 4), (2, 0, 28)]
    assert bench.step() == [(0, 26, 27), (1, 4, 5), (2, 28, 40)]


def test_short_prompts_do_not_wait_for_a_long_one_nor_it_for_them():
    bench = Bench(make(100), max_num_seqs=32)
    bench.step()
    for _ in range(6):
        bench.add(make(3, max_tokens=1))
    steps = bench.steps(3)
    assert steps[0] == [(0, 10, 15), (1, 0, 3), (2, 0, 2)]
    computed = [{name: stop - start for name, start, stop in step} for step in steps]
    assert all(sum(step.values()) == 10 for step in computed), "the budget is used"
    assert all(step[0] >= 5 for step in computed), "the oldest gets half"
    assert sum(name != 0 for step in computed for name in step) >= 4, "others get the rest"


def test_chunk_ends_before_a_picture_that_it_would_cut():
    assert Bench(make(20, spans=[(6, 8)])).steps(2) == [[(0, 0, 6)], [(0, 6, 16)]]


def test_picture_larger_than_the_budget_is_cut():
    assert Bench(make(30, spans=[(4, 20)])).steps(3) == [[(0, 0, 10)], [(0, 10, 20)], [(0, 20, 30)]]


def test_a_step_encodes_no_more_tiles_than_its_budget_but_always_one_picture():
    sequence = make(40, spans=[(2, 8), (12, 8), (22, 8)], num_tiles=3)
    assert Bench(sequence, budget=100, tiles=6).steps(2) == [[(0, 0, 22)], [(0, 22, 40)]]
    sequence = make(40, spans=[(2, 8), (12, 8), (22, 8)], num_tiles=7)
    assert Bench(sequence, budget=100, tiles=6).steps(3) == [[(0, 0, 12)], [(0, 12, 22)], [(0, 22, 40)]]


def test_no_more_than_max_num_seqs_run():
    sequences = [make(1) for _ in range(3)]
    bench = Bench(*sequences, max_num_seqs=2)
    assert [name for name, *_ in bench.step()] == [0, 1]
    bench.scheduler.remove(sequences[0])
    assert [name for name, *_ in bench.step()] == [1, 2]


def test_siblings_fork_off_the_computed_prompt_and_count_as_places():
    bench = Bench(make(25, n=3), make(5, n=2), max_num_seqs=4, budget=20)
    assert bench.steps(2) == [[(0, 0, 15), (3, 0, 5)], [(3, 5, 6), (4, 5, 6), (0, 15, 25)]]
    assert bench.scheduler.num_running == 4, "one of three finds no place"
    assert bench.step() == [(0, 25, 26), (3, 6, 7), (4, 6, 7), (1, 25, 26)]
    assert bench.scheduler.num_waiting == 1


@pytest.mark.parametrize(("max_num_seqs", "most"), [(1, 1), (2, 1), (3, 2), (4, 3), (8, 6), (64, 48)])
def test_the_answers_of_one_request_leave_places_to_others(max_num_seqs, most):
    several = make(5, n=max_num_seqs, max_tokens=1000)
    answers = [several, *several.siblings]
    bench = Bench(several, max_num_seqs=max_num_seqs, num_blocks=256, budget=200)
    bench.steps(3)
    assert bench.scheduler.num_running == most
    assert bench.scheduler.num_waiting == max_num_seqs - most
    if most < max_num_seqs:
        bench.add(make(5))
        assert bench.scheduler.num_waiting == max_num_seqs - most + 1
        assert max_num_seqs in [name for name, *_ in bench.step()]
        assert bench.scheduler.num_running == most + 1
    for left in range(max_num_seqs, 0, -1):
        running = [answer for answer in answers if answer.num_computed]
        assert len(running) == min(most, left)
        bench.scheduler.remove(running[-1])
        answers.remove(running[-1])
        bench.step()


def test_answers_end_in_any_order_and_requests_are_cancelled_at_any_moment():
    random, num_ended = Random(0), 0
    for _ in range(60):
        max_num_seqs = random.randint(1, 8)
        bench = Bench(max_num_seqs=max_num_seqs, num_blocks=256, budget=random.choice([3, 200]))
        requests = []

        def end(answers, request):
            for answer in answers:
                bench.scheduler.remove(answer)  # noqa: B023
                request.remove(answer)
            return len(answers)

        for turn in range(200):
            if turn < 20 and random.random() < 0.4:
                first = make(random.randint(1, 9), n=random.randint(1, max_num_seqs), max_tokens=50)
                requests.append([first, *first.siblings])
                bench.add(first)
            elif requests and random.random() < 0.2:
                request = random.choice(requests)
                end(list(request), request)
            bench.step()
            assert bench.scheduler.num_running <= max_num_seqs
            for request in requests:
                drawn = [answer for answer in request if answer.num_tokens > answer.num_prompt]
                num_ended += end(random.sample(drawn, random.randint(0, len(drawn))), request)
            requests = [request for request in requests if request]
        assert not requests, "everybody gets a place in the end"
        assert bench.scheduler.num_running == bench.scheduler.num_waiting == 0
        assert not bench.scheduler._further
        assert not bench.scheduler._leaders
    assert num_ended > 300


def test_removing_a_waiting_or_unknown_sequence_releases_nothing():
    waiting = make(5)
    bench = Bench(waiting)
    bench.scheduler.remove(waiting)
    bench.scheduler.remove(waiting)
    assert bench.scheduler.num_waiting == bench.scheduler.num_running == 0
    assert bench.step() == []


def test_the_one_admitted_last_gives_way_and_starts_anew():
    """Two sequences need two blocks each, and the cache has three."""
    first, second = make(15, max_tokens=8), make(15, max_tokens=8)
    bench = Bench(first, second, num_blocks=3, budget=100)
    assert bench.step() == [(0, 0, 15), (1, 0, 15)]
    assert bench.steps(2) == [[(0, 15, 16), (1, 15, 16)], [(0, 16, 17)]]
    assert (bench.scheduler.num_preemptions, bench.scheduler.num_waiting) == (1, 1)
    assert [bench.step()[0][0] for _ in range(5)] == [0] * 5
    bench.scheduler.remove(first)
    assert bench.step() == [(1, 0, 17)], "its own tokens are computed again with the prompt"
    assert bench.step() == [(1, 17, 18)]


def test_nothing_is_preempted_while_blocks_may_come_back():
    bench = Bench(make(15, max_tokens=8), make(15, max_tokens=8), num_blocks=3, budget=100)
    bench.steps(2)
    chunks, _ = bench.launch(in_flight=True)
    assert chunks is None
    assert bench.scheduler.num_preemptions == 0
    assert bench.step() == [(0, 16, 17)]
    assert bench.scheduler.num_preemptions == 1


def test_a_step_may_be_launched_before_the_tokens_of_the_last_are_read():
    bench = Bench(make(5), budget=100)
    launches = [bench.launch(in_flight=bool(i)) for i in range(2)]
    assert [chunks for chunks, _ in launches] == [[(0, 0, 5)], [(0, 5, 6)]]
    launches[0][1]()
    chunks, collect = bench.launch(in_flight=True)
    assert chunks == [(0, 6, 7)]
    launches[1][1]()
    collect()


def test_a_sequence_that_needs_its_tokens_waits_for_them():
    sequence = make(5, drafter=PromptLookup(2))
    bench = Bench(sequence, budget=100)
    _, collect = bench.launch()
    assert bench.launch(in_flight=True)[0] == []
    collect()
    assert bench.step() == [(0, 5, 8)]  # the step has two draft tokens


def test_no_more_tokens_are_drawn_than_asked_for():
    bench = Bench(make(5, max_tokens=2), budget=100)
    launches = [bench.launch(in_flight=bool(i)) for i in range(3)]
    assert [chunks for chunks, _ in launches] == [[(0, 0, 5)], [(0, 5, 6)], []]


def test_one_that_does_not_fit_is_overtaken_a_few_times_and_no_more():
    """One block is free for short prompts; they overtake the long prompt until the limit is reached."""
    bench = Bench(make(15, max_tokens=1000), make(63), num_blocks=4, budget=200, max_num_seqs=3)
    bench.step()
    served = 0
    for _ in range(MAX_OVERTAKEN + 5):
        short = make(3, max_tokens=1)
        bench.add(short)
        served += bool([name for name, *_ in bench.step() if name == bench.names[short.seq_id]])
        bench.scheduler.remove(short)
    assert served == MAX_OVERTAKEN

"""Tests which tokens run in a step: budget, order, picture borders, admission."""

import pytest

from internvl_rt.inputs.places import places_of_tokens
from internvl_rt.steps.scheduler import MAX_OVERTAKEN
from internvl_rt.steps.speculation import PromptLookup
from support.scheduling import Bench, make


def test_long_prompt_runs_in_chunks_of_the_budget():
    assert Bench(make(25)).steps(4) == [[(0, 0, 10)], [(0, 10, 20)], [(0, 20, 25)], [(0, 25, 26)]]


def test_chunks_shrink_as_the_context_grows_so_that_all_steps_take_about_as_long():
    """A token behind 20 others takes twice the time of the first, one behind 180 ten times."""
    prompt = make(220, max_tokens=1)
    bench = Bench(prompt, double=20)
    chunks = []
    while bench.end([prompt]):
        ((_, start, stop),) = bench.step()
        chunks.append((start, stop))
    assert chunks[:4] == [(0, 10), (10, 16), (16, 21), (21, 25)]
    assert [start for start, _ in chunks] == [0, *[stop for _, stop in chunks[:-1]]]
    assert all(stop - start == max(1, int(10 / (1 + start / 20))) for start, stop in chunks[:-1])


def test_beside_a_prompt_with_a_long_context_others_have_half_of_a_step():
    bench = Bench(make(400), double=20, num_blocks=200)
    bench.steps(80)
    for _ in range(5):
        short = make(4, max_tokens=1)
        bench.add(short)
        (long, start, stop), other = bench.step()
        assert (long, stop - start, other[1:]) == (0, 1, (0, 4))
        bench.end([short])


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


@pytest.mark.parametrize("num_long", [1, 2, 3, 7, 50])
def test_a_short_prompt_waits_for_no_number_of_long_ones(num_long):
    longs = [make(1000) for _ in range(num_long)]
    bench = Bench(*longs, num_blocks=4000)
    bench.steps(3)
    for _ in range(MAX_OVERTAKEN + 5):
        short = make(3, max_tokens=1)
        bench.add(short)
        assert bench.steps_to_end([short]) == 1
    assert sum(long.num_computed > 0 for long in longs) == min(num_long, 2), "the others hold neither place nor blocks"


@pytest.mark.parametrize("length", [100, 300, 490])
def test_a_prompt_waits_for_none_that_is_twice_as_long(length):
    """It has the half of each step that is not for the oldest, so it takes twice the steps that it takes alone."""
    bench = Bench(*[make(1000) for _ in range(4)], num_blocks=4000)
    bench.step()
    other = make(length, max_tokens=1)
    bench.add(other)
    assert bench.steps_to_end([other]) == -(-length // 5)


@pytest.mark.parametrize("lengths", [[900] * 20, range(900, 880, -1), range(880, 900)])
def test_a_short_prompt_waits_for_no_number_of_long_ones_that_do_not_fit(lengths):
    bench = Bench(make(900), *map(make, lengths), num_blocks=60)
    bench.steps(3)
    short = make(3, max_tokens=1)
    bench.add(short)
    assert bench.steps_to_end([short]) == 1


def test_long_prompts_are_computed_in_turn_however_many_short_ones_come():
    longs = [make(500, max_tokens=1) for _ in range(4)]
    bench = Bench(*longs, num_blocks=4000)
    left, shorts, order = list(longs), [], []
    for _ in range(4 * 100):  # the oldest has five of ten tokens
        new = [make(6, max_tokens=1), make(6, max_tokens=1)]
        shorts += new
        for each in new:
            bench.add(each)
        bench.step()
        assert bench.scheduler.num_running <= 8
        shorts, before = bench.end(shorts), left
        left = bench.end(left)
        order += [each for each in before if each not in left]
    assert order == longs


def test_a_long_prompt_that_waits_reuses_what_those_before_it_compute():
    longs = [make(500, max_tokens=1, identity=b"model") for _ in range(6)]
    bench = Bench(*longs, num_blocks=4000)
    assert bench.steps_to_end(longs) <= 102
    assert [each.num_cached for each in longs] == [0, 0, 496, 496, 496, 496]


@pytest.mark.parametrize("places", [None, places_of_tokens(0, [0])])
def test_a_long_prompt_that_is_cached_is_a_short_one(places):
    known = make(500, max_tokens=1, identity=b"model")
    bench = Bench(known, num_blocks=4000)
    bench.steps_to_end([known])
    for _ in range(5):
        bench.add(make(1000))
    bench.step()
    assert bench.scheduler.num_running == 2
    bench.add(make(500, max_tokens=1, identity=b"model", places=places))
    bench.step()
    assert bench.scheduler.num_running == (3 if places is None else 2), "scores need what is not cached"


def test_a_step_without_tokens_for_a_second_prompt_admits_none():
    bench = Bench(make(5), make(5), budget=1)
    bench.step()
    assert bench.scheduler.num_running == 1


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

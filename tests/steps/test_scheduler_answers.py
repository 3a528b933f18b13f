"""Several answers to one prompt fork off, find places soon, and leave places to others."""

from random import Random

import pytest

from support.scheduling import Bench, make


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


@pytest.mark.parametrize("identity", [None, b"model"])
def test_answers_that_found_no_place_begin_when_any_request_ends(identity):
    """Seven short requests are gone after three steps; five further answers may run beside the first."""
    counts = []
    for num_others in (0, 7):
        bench = Bench(num_blocks=256, budget=200)
        several = make(20, n=6, max_tokens=60, identity=identity)
        others = [make(5, max_tokens=3) for _ in range(num_others)]
        for each in (several, *others):
            bench.add(each)
        counts.append(bench.steps_to_end([several, *several.siblings, *others]))
    assert counts[0] == 60
    assert counts[1] <= 60 + 5


def test_answers_that_found_no_place_come_before_later_requests():
    several = make(5, n=3, max_tokens=8)
    later = [make(5, max_tokens=1) for _ in range(80)]
    bench = Bench(several, *later, max_num_seqs=4, num_blocks=256, budget=200)
    answers = [several, *several.siblings]
    for _ in range(20):
        bench.step()
        answers, later = bench.end(answers), bench.end(later)
    assert not answers
    assert later


def test_an_answer_waits_until_its_prompt_is_cached():
    """The step that computes the prompt is under way when a place becomes free."""
    several, other = make(20, n=2, identity=b"model"), make(5)
    bench = Bench(several, other, max_num_seqs=3, num_blocks=256, budget=200)
    further = several.siblings[0]
    bench.add(make(5))
    _, collect = bench.launch()
    bench.scheduler.remove(other)
    assert bench.launch(in_flight=True)[0] == [(0, 20, 21), (3, 5, 6)]
    collect()
    assert bench.launch(in_flight=True)[0] == [(0, 21, 22), (3, 6, 7), (1, 16, 20)]
    assert further.num_cached == 16


def test_answers_that_found_no_place_wait_for_no_long_prompt():
    """Two of eight answers begin when the first ones end; two longer prompts are then in prefill."""
    several = make(300, n=8, max_tokens=4, identity=b"model")
    answers = [several, *several.siblings]
    bench = Bench(several, make(400), make(400), num_blocks=256)
    assert bench.steps_to_end(answers) <= 75


@pytest.mark.parametrize("was_cached", [False, True])
def test_answers_that_do_not_fit_keep_nobody_from_being_tried(was_cached):
    """Nine answers to a prompt of six blocks wait for blocks; three blocks are free, and a short prompt needs one."""
    several, others = make(90, n=12, max_tokens=1000), [make(5, max_tokens=1) for _ in range(15)]
    answers = [several, *several.siblings]
    bench = Bench(several, *others, max_num_seqs=16, num_blocks=21, budget=200)
    bench.steps_to_end(others)
    bench.step()
    assert (bench.scheduler.num_running, bench.scheduler.num_waiting) == (3, 9)
    for answer in answers:
        answer.num_expected = 1 if was_cached else 90  # as if the prompt had been cached, and was evicted since
    short = make(5, max_tokens=1)
    bench.add(short)
    assert bench.steps_to_end([short]) == 1


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
    assert num_ended > 300

"""Many mixed requests run at once, with random arrivals, cancellations and faults: each gets what it gets alone."""

import random
import threading

import pytest

from internvl_rt import Engine
from support.load import (
    build_broken_kind,
    build_kinds,
    check_nothing_is_left,
    expected_answers,
    faults,
    run_load,
    tiny_pool_bytes,
)
from support.recorder import Recorder

NUM_KINDS = 40
# The pool holds about four of the prompts, so that some sequence is preempted all the time.
SMALL = {"max_model_len": 640, "block_size": 16}


@pytest.fixture(scope="module")
def kinds():
    return [*build_kinds(NUM_KINDS, seed=0), build_broken_kind()]


@pytest.fixture(scope="module")
def expected(kinds):
    return expected_answers(kinds)


@pytest.fixture(scope="module")
def small_pool():
    return SMALL | {"kv_cache_bytes": tiny_pool_bytes(42)}


@pytest.mark.fast("caches-ahead")
@pytest.mark.parametrize("run_ahead", [False, True], ids=["", "ahead"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_draft_tokens": 3},
        {"prefix_cache": False, "visual_cache_bytes": 0},
        {"max_tokens_per_step": 50, "num_draft_tokens": 2, "visual_cache_bytes": 0, "max_num_seqs": 7},
    ],
    ids=["caches", "speculation", "no-caches", "small-steps"],
)
def test_200_mixed_requests_get_what_each_gets_alone(kinds, expected, small_pool, options, run_ahead):
    num_threads = threading.active_count()
    with Engine.from_pretrained("tiny", device="cpu", **small_pool, **options) as engine:
        engine.loop.run_ahead = run_ahead  # as on a GPU, launch a step before reading the step before it
        outcome = run_load(engine, kinds, expected, num_requests=200, seed=len(options))
        assert not outcome.wrong, outcome.wrong[0]
        assert outcome.finished + outcome.cancelled + outcome.refused == 200
        assert min(outcome.finished - 100, outcome.cancelled, outcome.refused) > 0
        assert engine.stats()["preemptions"] > 0
        check_nothing_is_left(engine)
    assert threading.active_count() == num_threads


@pytest.mark.fast("ahead")
@pytest.mark.parametrize("run_ahead", [False, True], ids=["", "ahead"])
def test_faults_end_the_requests_of_their_step_and_no_others(kinds, expected, small_pool, run_ahead):
    with Engine.from_pretrained("tiny", device="cpu", **small_pool, num_draft_tokens=2) as engine:
        engine.loop.run_ahead = run_ahead
        with faults(engine) as arm_fault:
            outcome = run_load(engine, kinds, expected, num_requests=200, seed=9, arm_fault=arm_fault)
        assert not outcome.wrong, outcome.wrong[0]
        assert min(outcome.finished - 100, outcome.faulted) > 0
        check_nothing_is_left(engine)


def test_requests_get_the_same_from_graphs(kinds, expected, small_pool):
    """The recorder stands in for CUDA graphs: it has their shapes, padding and buffers, and computes at each replay."""
    with Engine.from_pretrained("tiny", device="cpu", backend="torch", **small_pool, max_num_seqs=8) as engine:
        recorder = Recorder()
        engine.runner.capture(max_num_seqs=8, max_model_len=640, max_tokens_per_step=300, capture=recorder)
        engine.loop.run_ahead = True
        outcome = run_load(engine, kinds, expected, num_requests=60, seed=4)
        assert not outcome.wrong, outcome.wrong[0]
        assert len(set(recorder.replayed)) > 8
        check_nothing_is_left(engine)


def test_a_wrong_answer_would_be_noticed(kinds, expected, small_pool):
    wrong = [[([1], "stop")] for _ in expected]
    with Engine.from_pretrained("tiny", device="cpu", **small_pool) as engine:
        assert run_load(engine, kinds, wrong, num_requests=5, seed=0, cancel=0).wrong


def test_an_armed_fault_is_thrown(kinds, expected, small_pool):
    with Engine.from_pretrained("tiny", device="cpu", **small_pool) as engine, faults(engine) as arm_fault:
        arm_fault(random.Random(0))
        outcome = run_load(engine, kinds, expected, num_requests=5, seed=0, cancel=0)
        assert outcome.faulted > 0

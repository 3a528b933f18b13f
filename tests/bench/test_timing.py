"""The benches' timer treats all variants alike and says what it timed, on a stand-in for CUDA and on CUDA."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from internvl_rt.bench import timing
from internvl_rt.bench.timing import sm_clock_mhz, time_variants

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SLOW_S = 3e-4  # it is more than SAMPLE_US, so that a sample is one call


def calls_of(log: list[str], name: str, seconds: float = SLOW_S) -> Callable[[], None]:
    def call() -> None:
        log.append(name)
        time.sleep(seconds)

    return call


def test_what_takes_longer_is_slower_and_percentiles_enclose_the_median() -> None:
    timings = time_variants({"long": partial(time.sleep, 2e-3), "short": partial(time.sleep, 2e-4)}, CPU, budget_s=0.05)
    assert list(timings) == ["long", "short"]
    assert timings["long"].median_us >= 2000
    assert timings["short"].median_us >= 200
    assert timings["long"].low_us > timings["short"].median_us
    for each in timings.values():
        assert each.low_us <= each.median_us <= each.high_us
        assert each.num_samples >= timing.MIN_SAMPLES
        assert (each.sm_clock_mhz, each.graphed) == (None, False)


def test_variants_take_turns_and_each_goes_first_in_every_second_round() -> None:
    log: list[str] = []
    found = time_variants({name: calls_of(log, name) for name in "abc"}, CPU, budget_s=0.02)
    measured = "".join(log)[-3 * found["a"].num_samples :]
    rounds = [measured[start : start + 3] for start in range(0, len(measured), 3)]
    assert {each.num_samples for each in found.values()} == {len(rounds)}
    assert rounds[0] == "abc"
    assert all({first, second} == {"abc", "cba"} for first, second in pairwise(rounds))


def test_a_sequence_rotates_its_inputs_and_counts_as_their_mean() -> None:
    log: list[str] = []
    calls = [calls_of(log, "a", 1e-4), calls_of(log, "b", 5e-4)]
    found = time_variants({"both": calls}, CPU, budget_s=0.02)["both"]
    assert "".join(log) == "ab" * (len(log) // 2)
    assert found.median_us >= 300
    assert found.median_us < 600 + found.high_us - found.low_us


def test_a_short_call_is_repeated_until_a_sample_can_be_measured() -> None:
    log: list[str] = []
    found = time_variants({"short": partial(log.append, "")}, CPU, budget_s=0.02)["short"]
    assert len(log) > 10 * found.num_samples
    assert 0 < found.median_us < 10


def test_the_budget_is_kept_but_for_the_least_number_of_samples() -> None:
    start = time.perf_counter()
    found = time_variants({"call": partial(time.sleep, 1e-3)}, CPU, budget_s=0.1)
    assert 0.1 < time.perf_counter() - start < 0.6
    assert found["call"].num_samples > timing.MIN_SAMPLES
    found = time_variants({"call": partial(time.sleep, 1e-2)}, CPU, budget_s=1e-3)
    assert found["call"].num_samples == timing.MIN_SAMPLES


@pytest.mark.parametrize(
    ("variants", "device", "budget_s", "message"),
    [
        ({}, CPU, 0.1, "variants: expected at least one callable by its name, got none"),
        ({"a": []}, CPU, 0.1, r"variants\['a'\]: expected a callable or a sequence of at least one, got \[\]"),
        ({"a": [print, 3]}, CPU, 0.1, r"variants\['a'\]: expected a callable"),
        ({"a": print}, CPU, 0.0, "budget_s: expected seconds above 0, got 0.0"),
        ({"a": print}, torch.device("meta"), 0.1, "device: expected cpu or cuda, got meta"),
    ],
)
def test_a_mistake_is_refused_with_what_was_expected(variants: Any, device: Any, budget_s: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        time_variants(variants, device, budget_s=budget_s)


def test_what_a_variant_raises_comes_through() -> None:
    with pytest.raises(ZeroDivisionError):
        time_variants({"wrong": lambda: 1 / 0}, CPU)


def test_what_was_timed_runs_once_more_after_its_preparation() -> None:
    log: list[str] = []
    variants = {"a": calls_of(log, "a"), "b": calls_of(log, "b")}
    time_variants(variants, CPU, budget_s=0.01, before_last={"a": partial(log.append, "prepare")})
    assert log[-2:] == ["prepare", "a"]
    assert log.count("prepare") == 1


@pytest.fixture(scope="module")
def cuda() -> dict[str, Any]:
    """Runs support/fake_timing.py in its own process, since the stand-in for CUDA stays until a process ends."""
    script = Path(__file__).parents[1] / "support" / "fake_timing.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"errors": done.stderr}


@pytest.mark.slow
def test_a_cold_call_finds_nothing_in_l2_and_emptying_it_is_not_timed(cuda: dict[str, Any]) -> None:
    """One call reads one block and another two; the timer gives their mean, as exactly as two events can measure."""
    *times, graphed, clock = cuda["cold"]
    assert times == pytest.approx(3 * [cuda["launch_us"] + 1.5 * cuda["block_us"]], abs=cuda["event_us"] / 2)
    assert (graphed, clock) == (True, 1980)


def test_a_warm_call_finds_all_in_l2_and_is_repeated_until_events_can_tell_its_time(cuda: dict[str, Any]) -> None:
    *times, graphed = cuda["warm"]
    assert times == pytest.approx(3 * [cuda["launch_us"]], rel=0.01)
    assert graphed


def test_the_last_run_is_a_replay_of_the_graph_that_was_timed(cuda: dict[str, Any]) -> None:
    assert cuda["last"] == {"replays": 1, "eager_calls": 0}


def test_what_cannot_be_captured_is_timed_eagerly_and_said_so(cuda: dict[str, Any]) -> None:
    assert cuda["graphed"] == {"reads": False, "waits": False, "runs": True}
    said = [line.partition(": cannot be captured in a graph, timed eagerly: ") for line in cuda["errors"].splitlines()]
    assert [(name, bool(reason)) for name, _, reason in said] == [("reads", True), ("waits", True)]


def test_a_capture_that_breaks_off_leaves_nothing_half_open(cuda: dict[str, Any]) -> None:
    """The memory pool is closed, the current stream is the old one, and torch's check for waiting calls is off."""
    assert (cuda["left_open"], cuda["as_before"]) == ([], True)


@pytest.mark.gpu
def test_on_a_gpu_cold_calls_are_slower_and_a_call_that_waits_is_eager() -> None:
    x, y = (torch.rand(2**21, device="cuda") for _ in range(2))  # L2 holds both, 8 MB each
    negate = partial(torch.neg, x, out=y)
    cold = time_variants({"negate": negate}, CUDA)["negate"]
    warm = time_variants({"negate": negate, "waits": lambda: x[0].item()}, CUDA, cold=False)
    assert (cold.graphed, warm["negate"].graphed, warm["waits"].graphed) == (True, True, False)
    assert warm["negate"].median_us < cold.median_us
    assert time_variants({"negate": negate}, CUDA)["negate"].graphed  # the failed capture did no harm


def test_the_clock_of_a_cpu_is_not_known() -> None:
    assert sm_clock_mhz(CPU) is None

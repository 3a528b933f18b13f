"""The benches' timer: fair to every variant, honest about what it timed; on a stand-in for CUDA, and on CUDA."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"
sys.path.insert(0, str(BENCH))

import timing  # noqa: E402
from timing import sm_clock_mhz, time_variants  # noqa: E402

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SLOW_S = 3e-4  # more than SAMPLE_US, so that a sample is one call


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


class StandIn:
    """torch.cuda as far as the timer uses it; `log` lists what the device was told to do, `clock_us` is its clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.clock_us = 0.0
        self.mode = 0
        self.capturing = False
        self.stream = "outside"
        self.ended_pools: list[tuple[int, object]] = []
        stand_in = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                stand_in.log.append("event")
                self.at = stand_in.clock_us

            def synchronize(self) -> None: ...

            def elapsed_time(self, end: "Event") -> float:
                return (end.at - self.at) / 1e3

        class Graph:
            def __init__(self) -> None:
                self.nodes: list[tuple[str, float]] = []

            def replay(self) -> None:
                for node in self.nodes:
                    stand_in.launch(*node)

        class Flushed:
            def sum(self) -> None:
                stand_in.launch("flush", 50.0)

        properties = SimpleNamespace(L2_cache_size=2**20)
        stream = SimpleNamespace(wait_stream=lambda other: None)
        for name, value in {
            "device": self.during,
            "current_device": lambda: 0,
            "get_device_properties": lambda index: properties,
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": self.capture,
            "graph_pool_handle": lambda: (0, 7),
            "stream": self.during,
            "Stream": lambda index: stream,
            "current_stream": lambda: self.stream,
            "set_stream": partial(setattr, self, "stream"),
            "synchronize": lambda: None,
            "get_sync_debug_mode": lambda: self.mode,
            "set_sync_debug_mode": partial(setattr, self, "mode"),
            "clock_rate": lambda device: 1980,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch, "rand", lambda size, device: Flushed())
        monkeypatch.setattr(
            torch._C, "_cuda_endAllocateToPool", lambda *pool: self.ended_pools.append(pool), raising=False
        )
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *pool: None, raising=False)
        timing._capture_stream.cache_clear()

    @contextmanager
    def during(self, what: object) -> Iterator[None]:
        yield

    @contextmanager
    def capture(self, graph: Any, *, pool: object, stream: object, capture_error_mode: str) -> Iterator[None]:
        before, self.stream = self.stream, "capture"
        self.capturing, self.graph = True, graph
        yield  # as torch does: an error leaves the capture's stream current
        self.capturing, self.stream = False, before

    def launch(self, name: str, duration_us: float) -> None:
        if self.capturing:
            self.graph.nodes.append((name, duration_us))
        else:
            self.log.append(name)
            self.clock_us += duration_us

    def synchronise(self, name: str, *, seen: bool) -> None:
        """What breaks a capture off; torch's check sees most of it before."""
        if self.mode == "error" and seen:
            raise RuntimeError("called a synchronizing CUDA operation")
        if self.capturing:
            self.capturing = False
            raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors ...")
        self.launch(name, 5.0)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    yield StandIn(monkeypatch)
    timing._capture_stream.cache_clear()


def test_a_cold_sample_is_one_replay_after_a_flush_that_is_not_timed(cuda: StandIn) -> None:
    calls = [partial(cuda.launch, "a", 3.0), partial(cuda.launch, "b", 5.0)]
    found = time_variants({"both": calls}, CUDA, budget_s=1e-3)["both"]
    assert cuda.log[-5:] == ["flush", "event", "a", "b", "event"]
    assert found.median_us == found.low_us == found.high_us == pytest.approx(4.0)
    assert (found.graphed, found.sm_clock_mhz) == (True, 1980)


def test_the_last_run_is_a_replay_of_the_graph_that_was_timed(cuda: StandIn) -> None:
    eager: list[str] = []

    def call() -> None:
        eager.append("call")
        cuda.launch("a", 3.0)

    time_variants({"a": call}, CUDA, budget_s=1e-3, before_last={"a": lambda: (eager.clear(), cuda.log.clear())})
    assert eager == []
    assert cuda.log == ["a"]


def test_a_warm_sample_repeats_a_short_call_and_follows_the_same_work(cuda: StandIn) -> None:
    found = time_variants({"short": partial(cuda.launch, "a", 3.0)}, CUDA, budget_s=1e-3, cold=False)["short"]
    repeats = 34  # 34 * 3 us are the first above SAMPLE_US
    assert "flush" not in cuda.log
    assert cuda.log[-2 - 2 * repeats :] == ["a"] * repeats + ["event"] + ["a"] * repeats + ["event"]
    assert found.median_us == pytest.approx(3.0)


@pytest.mark.parametrize("seen", [True, False])
def test_what_cannot_be_captured_is_timed_eagerly_and_said_so(
    seen: bool, cuda: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    waits, runs = partial(cuda.synchronise, "waits", seen=seen), partial(cuda.launch, "runs", 5.0)
    found = time_variants({"waits": waits, "runs": runs}, CUDA, budget_s=1e-3)
    assert {name: each.graphed for name, each in found.items()} == {"waits": False, "runs": True}
    assert [each.median_us for each in found.values()] == pytest.approx([5.0, 5.0])
    reason = "called a synchronizing CUDA operation" if seen else "operation not permitted when stream is capturing"
    assert capsys.readouterr().err == f"waits: cannot be captured in a graph, timed eagerly: {reason}\n"
    assert (cuda.stream, cuda.mode) == ("outside", 0)
    assert cuda.ended_pools == ([] if seen else [(0, (0, 7))])


@pytest.mark.gpu
def test_on_a_gpu_cold_calls_are_slower_and_a_call_that_waits_is_eager() -> None:
    x, y = (torch.rand(2**21, device="cuda") for _ in range(2))  # 8 MB each: L2 holds them
    negate = partial(torch.neg, x, out=y)
    cold = time_variants({"negate": negate}, CUDA)["negate"]
    warm = time_variants({"negate": negate, "waits": lambda: x[0].item()}, CUDA, cold=False)
    assert (cold.graphed, warm["negate"].graphed, warm["waits"].graphed) == (True, True, False)
    assert warm["negate"].median_us < cold.median_us
    assert time_variants({"negate": negate}, CUDA)["negate"].graphed  # nothing was left half open


def test_the_clock_of_a_cpu_is_not_known() -> None:
    assert sm_clock_mhz(CPU) is None

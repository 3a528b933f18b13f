"""The timer of all kernel benches.

Variants take turns, one sample each, and every second round goes backwards, so that drift meets all of them. On CUDA a
sample is a replay of a graph between two events. Just before it, L2 is emptied of the variant's memory or, with
`cold=False`, the same work runs once more; meanwhile the host enqueues the sample, so the device does not wait for it.

The events also see the start of the graph, some microseconds (`single_node_us` of roofline.py), which no subtraction
removes. A variant of a few microseconds is therefore given as a sequence of calls, each on its own inputs: all find
their inputs in device memory and share that start. Calls of one sequence run back to back, as in a model's graph.
"""

import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Protocol

import torch

Calls = Callable[[], object] | Sequence[Callable[[], object]]

MIN_SAMPLES, MAX_SAMPLES = 5, 2000  # samples of a variant
SAMPLE_US = 100.0  # the least length of a sample that need not be cold: events resolve about half a microsecond
WARM_UP_CALLS = 3  # these compile, tune, load and allocate
WARM_UP_SHARE = 0.2  # of the budget, spent in addition until the clocks have risen
MAX_NODES = 1000  # the most calls in a graph of repetitions
FLUSHED = 4  # to empty L2, this many times its size is read

_BROKEN_GRAPHS: list[torch.cuda.CUDAGraph] = []


@dataclass(frozen=True, slots=True)
class Timing:
    """The time of one call: median, 10th and 90th percentile of the samples."""

    median_us: float
    low_us: float
    high_us: float
    num_samples: int
    sm_clock_mhz: int | None = None  # just after the samples, as the driver reports it; None if unknown
    graphed: bool = False  # whether a CUDA graph was timed; an eager time may be that of the host's launches


class _Work(NamedTuple):
    """The work between two readings of the clock."""

    run: Callable[[], object]
    num_calls: int
    graphed: bool = False


class _Clock(Protocol):
    def prepare(self, name: str, calls: list[Callable[[], object]]) -> _Work: ...
    def measure(self, work: _Work) -> float: ...  # microseconds of one call


def time_variants(
    variants: Mapping[str, Calls],
    device: torch.device,
    *,
    budget_s: float = 0.5,
    cold: bool = True,
    before_last: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, Timing]:
    """Returns the times by the variants' names.

    A variant is a call, or a sequence of calls that do the same on different inputs; then the mean of the calls counts.
    budget_s: for all samples together; warm-up and capture take more, and a slow variant still gets MIN_SAMPLES.
    cold: a call finds its inputs outside L2. The CPU's caches are never emptied.
    before_last: by the name of a variant, a function that is called after all samples; then the timed work (the same
    graph, if there is one) runs once more, so that the caller can look at its results.

    A variant that cannot be captured in a graph is timed eagerly: `Timing.graphed` tells, and a line on stderr says
    why. Raises ValueError for a wrong variant, device or budget, and whatever a variant raises.
    """
    lists = {name: _calls(name, calls) for name, calls in variants.items()}
    if not lists:
        raise ValueError("variants: expected at least one callable by its name, got none")
    if not budget_s > 0:
        raise ValueError(f"budget_s: expected seconds above 0, got {budget_s}")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {device}")
    here: AbstractContextManager[object] = nullcontext() if device.type == "cpu" else torch.cuda.device(device)
    with here:
        clock: _Clock = _HostClock() if device.type == "cpu" else _DeviceClock(device, cold)
        works = {name: clock.prepare(name, calls) for name, calls in lists.items()}
        _take_turns(clock, works, WARM_UP_SHARE * budget_s, 1)
        samples = _take_turns(clock, works, budget_s, MIN_SAMPLES)
        for name, prepare in (before_last or {}).items():
            prepare()
            works[name].run()
    sm_clock = sm_clock_mhz(device)
    timings = {}
    for name, times in samples.items():
        tenths = statistics.quantiles(times, n=10, method="inclusive")
        median = statistics.median(times)
        timings[name] = Timing(median, tenths[0], tenths[-1], len(times), sm_clock, works[name].graphed)
    return timings


def _calls(name: str, calls: Calls) -> list[Callable[[], object]]:
    found = [calls] if callable(calls) else list(calls)
    if not found or not all(map(callable, found)):
        raise ValueError(f"variants[{name!r}]: expected a callable or a sequence of at least one, got {calls!r}")
    return found


def _take_turns(clock: _Clock, works: dict[str, _Work], budget_s: float, min_samples: int) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in works}
    end, taken = time.perf_counter() + budget_s, 0
    while taken < min_samples or (taken < MAX_SAMPLES and time.perf_counter() < end):
        for name in list(works)[:: -1 if taken % 2 else 1]:
            samples[name].append(clock.measure(works[name]))
        taken += 1
    return samples


def _in_order(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            call()

    return run


def _repeats(call_us: float, num_calls: int) -> int:
    """How often a sequence is repeated in a sample that need not be cold."""
    wanted = math.ceil(SAMPLE_US / max(call_us * num_calls, 0.01))
    return max(1, min(wanted, MAX_NODES // num_calls))


class _HostClock:
    def prepare(self, name: str, calls: list[Callable[[], object]]) -> _Work:
        work = _Work(_in_order(calls), len(calls))
        work.run()
        repeated = calls * _repeats(self.measure(work), len(calls))
        return _Work(_in_order(repeated), len(repeated))

    def measure(self, work: _Work) -> float:
        start = time.perf_counter()
        work.run()
        return (time.perf_counter() - start) * 1e6 / work.num_calls


class _DeviceClock:
    """The clock of the current CUDA device."""

    def __init__(self, device: torch.device, cold: bool) -> None:
        self._index = torch.cuda.current_device()
        self._stream = _capture_stream(self._index)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self._flushed: torch.Tensor | None = None
        if cold:
            l2_bytes = torch.cuda.get_device_properties(self._index).L2_cache_size
            self._flushed = torch.rand(max(FLUSHED * l2_bytes, 2**26) // 4, device=device)

    def prepare(self, name: str, calls: list[Callable[[], object]]) -> _Work:
        run = _in_order(calls)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UP_CALLS):
                run()
        torch.cuda.synchronize()
        work = self._work(name, run, len(calls))
        if self._flushed is not None:
            return work
        repeats = _repeats(min(self.measure(work) for _ in range(3)), len(calls))
        return work if repeats == 1 else self._work(name, _in_order(calls * repeats), repeats * len(calls))

    def measure(self, work: _Work) -> float:
        # The work before the first event keeps the device busy until the host has enqueued the rest. The flush only
        # reads, so that nothing has to be written back while the sample runs.
        if self._flushed is None:
            work.run()
        else:
            self._flushed.sum()
        self._start.record()
        work.run()
        self._end.record()
        self._end.synchronize()
        milliseconds: float = self._start.elapsed_time(self._end)
        return milliseconds * 1e3 / work.num_calls

    def _work(self, name: str, run: Callable[[], object], num_calls: int) -> _Work:
        graph = torch.cuda.CUDAGraph()
        try:
            self._refuse_synchronising(run)
            self._capture(run, graph)
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            print(f"{name}: cannot be captured in a graph, timed eagerly: {reason}", file=sys.stderr)
            return _Work(run, num_calls)
        return _Work(graph.replay, num_calls, graphed=True)

    def _refuse_synchronising(self, run: Callable[[], object]) -> None:
        """Raises RuntimeError for work that synchronises, which would break a capture off; here it does no harm."""
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.stream(self._stream):
                run()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        torch.cuda.synchronize()

    def _capture(self, run: Callable[[], object], graph: torch.cuda.CUDAGraph) -> None:
        outside, pool = torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
        try:
            # The mode is for this thread alone, so that a compiler's threads may do what they want meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                run()
        except RuntimeError:
            # torch leaves a broken capture half open: its stream is current, its pool in use (the next empty_cache
            # would fail), and its graph known to the allocator.
            torch.cuda.set_stream(outside)
            _BROKEN_GRAPHS.append(graph)
            with suppress(RuntimeError):  # fails if the capture had ended after all
                torch._C._cuda_endAllocateToPool(self._index, pool)
                torch._C._cuda_releasePool(self._index, pool)
            torch.cuda.synchronize()
            raise


@cache
def _capture_stream(index: int) -> torch.cuda.Stream:
    """The one stream of all captures: memory that the allocator keeps for a stream serves no other stream."""
    return torch.cuda.Stream(index)  # type: ignore[no-untyped-call]


def sm_clock_mhz(device: torch.device) -> int | None:
    """The multiprocessors' clock at this moment, which says nothing if the device is idle; None if unknown."""
    if device.type != "cuda":
        return None
    try:
        return torch.cuda.clock_rate(device)
    except Exception:  # also NVML's own kinds of error: its Python package is missing, or the machine denies access
        return None

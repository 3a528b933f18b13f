"""Measures what a decode step costs on the host without the model's own time, in all and by part.

    python bench/host_cost.py [--sequences 64] [--steps 500]

Each sequence is a request of its own, which decodes the same text. Steps run as on a GPU: each from a graph, launched
before the step before it has ended. The replay of a graph does nothing, and every step finds the same tokens drawn, so
that scheduling, the cache's bookkeeping, the step's inputs and handing out tokens remain. What the driver takes on a
GPU, for a copy each way, a replay and events, comes on top. Text is not made here: the threads that wait for replies
make it.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from options import count
from torch import Tensor

from internvl_rt import Engine, SamplingParams
from internvl_rt.engine import in_flight, loop
from internvl_rt.steps import sampler, step
from internvl_rt.steps.cuda_graph import Replay
from internvl_rt.steps.graph_steps import GraphSteps
from internvl_rt.steps.runner import Runner
from internvl_rt.steps.scheduler import Scheduler

GOALS_US = {1: 60.0, 64: 150.0, 256: 400.0}  # by number of sequences, on a 2-core virtual machine
WARM_UP = 50


@contextmanager
def decoding(num_sequences: int, num_steps: int, **options: Any) -> Iterator[Engine]:
    """Builds an engine of `tiny` on the CPU in which so many sequences decode, for at least `num_steps` steps.

    Raises RuntimeError at the end if a request failed.
    """
    params = SamplingParams(max_tokens=num_steps + 10, ignore_eos=True)
    sizes = {"max_num_seqs": num_sequences, "max_model_len": num_steps + 74}
    with Engine.from_pretrained("tiny", device="cpu", **sizes, **options) as engine:
        prepared = engine.prepare([{"role": "user", "content": "Hello"}])
        for _ in range(num_sequences):
            engine.loop.submit(engine.new_request(prepared, params))
        while engine.stats()["generated_tokens"] < num_sequences:
            engine.loop.step()
        yield engine
        if failed := engine.stats().get("requests_error", 0):
            raise RuntimeError(f"{failed} requests failed, so their steps were not measured")


def empty_graphs(engine: Engine, num_sequences: int) -> None:
    """Makes the engine run its steps from graphs, each launched before the last has ended, that compute nothing."""
    token_ids = engine.tokenizer.encode("the digits and the rest of it" * num_sequences)[:num_sequences]

    def capture(compute: Callable[[], Tensor]) -> Replay:
        return Replay(lambda: None, compute())

    limits = {"max_num_seqs": num_sequences, "max_model_len": engine.max_model_len, "max_tokens_per_step": 1}
    engine.runner.capture(**limits, everything=False, capture=capture)
    engine.runner.executor.drawn_R[:num_sequences] = torch.tensor(token_ids)
    engine.loop.run_ahead = True


def measure_total(engine: Engine, num_steps: int) -> list[float]:
    """Returns the microseconds of each step."""
    times = []
    for _ in range(num_steps):
        start = time.perf_counter()
        engine.loop.step()
        times.append((time.perf_counter() - start) * 1e6)
    return times


def measure_parts(engine: Engine, num_steps: int) -> dict[str, float]:
    """Median microseconds by part, in the order of a step; taking the time adds about 1 us to each part."""
    samples: dict[str, list[float]] = defaultdict(list)
    undo: list[Callable[[], None]] = []

    def wrap(owner: Any, name: str, part: str) -> None:
        original = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = original(*args, **kwargs)
            samples[part].append((time.perf_counter() - start) * 1e6)
            return result

        setattr(owner, name, timed)
        undo.append(lambda: setattr(owner, name, original))

    wrap(Scheduler, "schedule", "schedule, and slots for the tokens")
    wrap(loop, "plan_step", "plan the step and its draws")
    wrap(step.StepArrays, "fill", "fill the step's arrays")
    wrap(sampler.UnlistedArguments, "fill", "fill the draws' arguments")
    wrap(GraphSteps, "_tokens_of", "copy the tokens to the host")
    wrap(Scheduler, "launched", "move the sequences on")
    wrap(Runner, "collect", "read what was drawn, close the step")
    wrap(in_flight.InFlight, "collect", "publish full blocks, hand out tokens")
    try:
        total = median(measure_total(engine, num_steps))
    finally:
        for each in undo:
            each()
    parts = {part: median(times) for part, times in samples.items()}
    return parts | {"all else": total - sum(parts.values()), "together, timed by part": total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=count, default=64)
    parser.add_argument("--steps", type=count, default=500)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with decoding(arguments.sequences, WARM_UP + 2 * arguments.steps, backend="torch") as engine:
        empty_graphs(engine, arguments.sequences)
        measure_total(engine, WARM_UP)
        times = sorted(measure_total(engine, arguments.steps))
        parts = measure_parts(engine, arguments.steps)
    print(f"{arguments.sequences} sequences, {arguments.steps} steps, microseconds a step on the host")
    for part, value in parts.items():
        print(f"  {part:<38} {value:8.1f}")
    print(
        f"a step: median {median(times):.1f}, least {times[0]:.1f}, 99th percentile {times[int(len(times) * 0.99)]:.1f}"
    )
    if goal_us := GOALS_US.get(arguments.sequences):
        print(f"goal: {goal_us:g}, {'held' if median(times) <= goal_us else 'missed'}")


if __name__ == "__main__":
    main()

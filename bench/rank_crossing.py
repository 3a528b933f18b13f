"""Measures what a decode step costs because it crosses from rank to rank: on a CPU, by gloo; NCCL is not measured.

    python bench/rank_crossing.py [--ranks 2] [--sequences 16] [--steps 200] [--model tiny]

The order that rank 0 sends is that of a real step of `tiny`, and the time to write and send it is taken in that step.
Another process reads it as a rank does: one thread receives, another one reads. So is an order as engines on GPUs send
it, whose graphs have room for the whole context window of --model. The operations that ranks do together in a step run
alone, in processes that do nothing else, with the shapes of --model: a name or a config's folder is enough, as no
weights are read. Steps of `tiny` with one rank and with several compute with one thread a rank.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from statistics import median
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
import torch
from host_cost import decoding, measure_total
from options import count

from internvl_rt import Engine, EngineOptions
from internvl_rt.checkpoint.config import DecoderConfig
from internvl_rt.checkpoint.find import find_config
from internvl_rt.engine.rank_group import RankGroup
from internvl_rt.errors import InternVLError
from internvl_rt.model.processor import default_dtype
from internvl_rt.model.shard import Shard, check_size, vocabulary_of
from internvl_rt.steps import orders
from internvl_rt.steps.sampler import unlisted_words
from internvl_rt.steps.step import StepShape
from internvl_rt.steps.step_graph import ARGUMENTS_AT

WARM_UP = 20
CPU = torch.device("cpu")
Samples = dict[str, list[float]]  # microseconds by part


class Shapes(NamedTuple):
    """What ranks do together in a decode step."""

    num_sums: int
    num_rows: int
    width: int
    num_logits: int  # of the rank that computes the most

    def names(self) -> list[str]:
        return [
            f"{self.num_sums} sums of {self.num_rows} x {self.width}",
            f"gather of {self.num_rows} x {self.num_logits} logits a rank",
            f"share of {self.num_rows} tokens",
        ]


def shapes_of(config: DecoderConfig, num_ranks: int, num_sequences: int) -> Shapes:
    parts = [vocabulary_of(config, Shard(rank, num_ranks)) for rank in range(num_ranks)]
    widest = max(part.stop - part.start for part in parts)
    return Shapes(2 * config.num_layers, num_sequences, config.hidden_size, widest)


def time_operations(group: RankGroup, shapes: Shapes, num_steps: int) -> Samples:
    """Does what ranks do together in `num_steps` steps; every rank calls this."""
    x_SD = torch.zeros(shapes.num_rows, shapes.width, dtype=default_dtype())
    logits_SV = torch.zeros(shapes.num_rows, shapes.num_logits, dtype=default_dtype())
    token_id_S = torch.zeros(shapes.num_rows, dtype=torch.int64)

    def add() -> None:
        for _ in range(shapes.num_sums):
            group.add(x_SD)

    works: list[Callable[[], object]] = [add, lambda: group.gather(logits_SV), lambda: group.share(token_id_S)]
    samples: Samples = {name: [] for name in [*shapes.names(), "together"]}
    for step in range(WARM_UP + num_steps):
        moments = [time.perf_counter()]
        for work in works:
            work()
            moments.append(time.perf_counter())
        if step >= WARM_UP:
            for name, before, after in zip(shapes.names(), moments, moments[1:], strict=False):
                samples[name].append((after - before) * 1e6)
            samples["together"].append((moments[-1] - moments[0]) * 1e6)
    return samples


def follow(connection: Connection, folder: str, rank: int, num_ranks: int, shapes: Shapes, num_steps: int) -> None:
    """Runs another rank: it reads as many orders as are sent, and says when; an empty one begins the operations."""
    messages: SimpleQueue[bytes] = SimpleQueue()
    Thread(target=_receive, args=(connection, messages), daemon=True).start()
    torch.set_num_threads(1)
    group = RankGroup(Path(folder), rank, num_ranks, CPU)
    while message := messages.get():
        received_s = time.perf_counter()
        orders.read_order(message)
        connection.send((received_s, time.perf_counter()))
    time_operations(group, shapes, num_steps)
    connection.send(None)
    messages.get()


def _receive(connection: Connection, messages: "SimpleQueue[bytes]") -> None:
    try:
        while True:
            messages.put(connection.recv_bytes())
    except (EOFError, OSError):  # rank 0 has ended, or is gone
        os._exit(0)


@contextmanager
def other_ranks(num_ranks: int, shapes: Shapes, num_steps: int) -> Iterator[tuple[RankGroup, list[Connection]]]:
    """Starts the processes of ranks 1, 2, ..., and ends them when the `with` block is left."""
    context, started, connections = get_context("spawn"), [], []

    def check() -> None:
        if any(process.exitcode is not None for process in started):
            raise RuntimeError("a rank has ended")

    with TemporaryDirectory() as folder:
        try:
            for rank in range(1, num_ranks):
                ours, theirs = context.Pipe()
                arguments = theirs, folder, rank, num_ranks, shapes, num_steps
                process = context.Process(target=follow, args=arguments, daemon=True)
                process.start()
                theirs.close()
                started.append(process)
                connections.append(ours)
            yield RankGroup(Path(folder), 0, num_ranks, CPU, check=check), connections
        finally:
            for connection in connections:
                connection.close()
            for process in started:
                process.join(5)
                process.kill()
                process.join()


def order_from_graphs(config: DecoderConfig, num_sequences: int) -> orders.Replays:
    """Returns the order of a decode step from a graph, for the context window of a model."""
    shape = StepShape(num_sequences, 0, 0, -(-config.max_position // EngineOptions().block_size), 0)
    num_words = ARGUMENTS_AT + unlisted_words(num_sequences) + shape.size
    drawing = orders.Drawing(np.empty(0, np.int32), 0, 0)
    return orders.Replays(((num_sequences,),), 0, np.zeros(num_words, np.int32), drawing)


def measure_order(connections: list[Connection], order: orders.Order, num_steps: int) -> Samples:
    """Writes and sends the same order again and again; each time waits until the last rank has read it."""
    samples: Samples = {part: [] for part in ("write it", "send it", "from then until the last rank has it", "read it")}
    for step in range(WARM_UP + num_steps):
        moments = [time.perf_counter()]
        message = orders.write_order(order)
        moments.append(time.perf_counter())
        for connection in connections:
            connection.send_bytes(message)
        moments.append(time.perf_counter())
        moments += [connection.recv() for connection in connections][-1]  # all processes have one clock
        if step >= WARM_UP:
            for times, before, after in zip(samples.values(), moments, moments[1:], strict=False):
                times.append((after - before) * 1e6)
    return samples


def measure_operations(group: RankGroup, connections: list[Connection], shapes: Shapes, num_steps: int) -> Samples:
    for connection in connections:
        connection.send_bytes(b"")
    samples = time_operations(group, shapes, num_steps)
    for connection in connections:
        connection.recv()
    return samples


def measure_orders(engine: Engine, num_steps: int) -> tuple[list[float], Samples, bytes]:
    """Returns the microseconds of each step, and of each part of its order, and the last order."""
    lead: Any = engine.model.shard.lead
    samples: Samples = {"write it": [], "send it": []}
    messages: list[bytes] = []

    def timed(part: str, original: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def call(argument: Any) -> Any:
            start_s = time.perf_counter()
            result = original(argument)
            samples[part].append((time.perf_counter() - start_s) * 1e6)
            messages[:] = [argument if result is None else result]
            return result

        return call

    write_order, order = orders.write_order, lead.order
    orders.write_order, lead.order = timed("write it", write_order), timed("send it", order)
    try:
        return measure_total(engine, num_steps), samples, messages[0]
    finally:
        orders.write_order, lead.order = write_order, order


def show(title: str, medians: dict[str, float]) -> None:
    print(title)
    for part, value in medians.items():
        print(f"  {part:<44} {value:9.1f}")


def medians_of(samples: Samples) -> dict[str, float]:
    return {part: median(times) for part, times in samples.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=count, default=2)
    parser.add_argument("--sequences", type=count, default=16)
    parser.add_argument("--steps", type=count, default=200)
    parser.add_argument("--model", default="tiny", help="whose shapes the operations have")
    arguments = parser.parse_args()
    num_ranks, num_sequences, num_steps = arguments.ranks, arguments.sequences, arguments.steps
    if num_ranks == 1:
        parser.error("argument --ranks: one rank crosses to no other; give 2 or more")
    try:
        config = find_config(arguments.model)[0].decoder
        for each in (config, find_config("tiny")[0].decoder):
            check_size(each, num_ranks)
    except InternVLError as error:
        parser.error(str(error))
    torch.set_num_threads(1)
    decodes = num_sequences, WARM_UP + num_steps
    with decoding(*decodes, num_threads=1) as engine:
        measure_total(engine, WARM_UP)
        steps = {"1 rank": median(measure_total(engine, num_steps))}
    with decoding(*decodes, num_threads=1, tensor_parallel_size=num_ranks) as engine:
        measure_total(engine, WARM_UP)
        times, order, message = measure_orders(engine, num_steps)
    steps[f"{num_ranks} ranks"] = median(times)
    shapes = shapes_of(config, num_ranks, num_sequences)
    with other_ranks(num_ranks, shapes, num_steps) as (group, connections):
        read = measure_order(connections, orders.read_order(message), num_steps)
        large = order_from_graphs(config, num_sequences)
        from_graphs = measure_order(connections, large, num_steps)
        operations = measure_operations(group, connections, shapes, num_steps)
    print(
        f"{num_ranks} ranks, {num_sequences} sequences, {num_steps} steps, median microseconds; "
        "on a CPU, by gloo; NCCL is not measured"
    )
    show(f"the order of a step of tiny, {len(message)} bytes, in that step", medians_of(order))
    show("the same, alone", medians_of(read))
    size = len(orders.write_order(large))
    show(f"an order from graphs for a window of {config.max_position}, {size} bytes, alone", medians_of(from_graphs))
    kind = str(default_dtype()).removeprefix("torch.")
    show(f"what ranks do together in a step of {arguments.model}, {kind}, alone", medians_of(operations))
    show("a step of tiny, one thread a rank", steps)


if __name__ == "__main__":
    main()

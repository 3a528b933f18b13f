"""Runs the other ranks of an engine as threads of this process, which follow the orders of rank 0."""

import threading
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from queue import Queue
from typing import Any

import torch

from internvl_rt import Engine, EngineOptions
from internvl_rt.checkpoint.config import load_config
from internvl_rt.checkpoint.find import resolve_model
from internvl_rt.engine.loading import plan_parts
from internvl_rt.inputs.tokenizer import load_tokenizer
from internvl_rt.model.ops import TORCH
from internvl_rt.model.shard import Shard
from internvl_rt.steps.executor import Executor
from internvl_rt.steps.follower import Follower
from internvl_rt.steps.kv_cache import KVCache
from internvl_rt.steps.kv_pool import KVPool
from internvl_rt.steps.orders import Order, Orders, read_order
from support.ranks import Meeting, ThreadGroup, load_part
from support.recorder import Recorder


class ThreadLead:
    """A `Lead` of threads: it gives every order to each of them. `orders`: all that were given."""

    def __init__(self, size: int, meeting: Meeting) -> None:
        self._meeting = meeting
        self.queues: list[Queue[bytes | None]] = [Queue() for _ in range(size - 1)]
        self.threads: list[threading.Thread] = []
        self.orders: list[Order] = []
        self.error: BaseException | None = None

    def start(self, number: int, follower: Follower) -> None:
        """Starts the thread of a follower: it obeys the orders of a queue until there is an error."""
        queue = self.queues[number]

        def obey(message: bytes) -> None:
            try:
                follower.obey(message)
            except BaseException as error:
                self.error = self.error or error
                self._meeting.barrier.abort()

        @torch.inference_mode()  # outside of it, a Recorder cannot write to what it has captured
        def run() -> None:
            while (message := queue.get()) is not None:
                if self.error is None:
                    obey(message)
                queue.task_done()

        self.threads.append(threading.Thread(target=run, name=f"rank {number + 1}", daemon=True))
        self.threads[-1].start()

    def order(self, message: bytes) -> None:
        self.orders.append(read_order(message))
        for queue in self.queues:
            queue.put(message)

    def together(self) -> AbstractContextManager[None]:
        return nullcontext()

    def wait(self) -> None:
        """Waits until all orders were obeyed."""
        for queue in self.queues:
            queue.join()

    def check(self) -> None:
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        for queue in self.queues:
            queue.put(None)
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive(), f"{thread.name} waits for the others"


class RankThreads:
    """An engine in float32 whose ranks are threads. Close `engine` to end them.

    executors, recorders: of each rank. The recorders stand in for CUDA graphs once `capture` was called.
    """

    def __init__(self, size: int, model: str = "tiny", **options: Any) -> None:
        how = {"device": "cpu", "dtype": "float32", "backend": "torch"}
        chosen = EngineOptions(**how, tensor_parallel_size=size, **options)
        folder, memory = resolve_model(model), plan_parts(model, chosen)
        config, meeting = load_config(folder), Meeting(size)
        self.lead = ThreadLead(size, meeting)
        self.recorders = [Recorder() for _ in range(size)]
        sizes: dict[str, Any] = {"num_blocks": memory.num_blocks, "block_size": memory.block_size}
        sizes |= {"dtype": torch.float32, "device": torch.device("cpu"), "ops": TORCH}
        self.executors: list[Executor] = []
        for rank in range(1, size):
            part = load_part(folder, config, Shard(rank, size, ThreadGroup(meeting, rank)))
            pool = KVPool(part.part, **sizes)
            executor = Executor(part, pool, max_draws=chosen.max_draws, num_threads=1)
            executor.capture = partial(executor.capture, capture=self.recorders[rank])
            self.lead.start(rank - 1, Follower(executor, pool))
            self.executors.append(executor)
        first = load_part(folder, config, Shard(0, size, ThreadGroup(meeting, 0), self.lead))
        cache = KVCache(first.part, **sizes, on_copy=Orders(self.lead).copy_blocks)
        self.engine = Engine(first, load_tokenizer(folder), cache, memory, chosen)
        self.executors.insert(0, self.engine.runner.executor)

    def capture(self, **limits: Any) -> None:
        self.engine.runner.capture(**limits, capture=self.recorders[0])

    def replayed(self) -> list[list[int]]:
        """Returns the rows of what each rank has replayed since the last call, and forgets them."""
        self.lead.wait()
        found = [list(recorder.replayed) for recorder in self.recorders]
        for recorder in self.recorders:
            recorder.replayed.clear()
        return found

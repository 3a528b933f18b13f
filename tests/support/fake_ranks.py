"""Replaces the other ranks of an engine on the stand-in for CUDA: what ranks do together is work on this device alone.

Numbers are wrong, as those of all launches are there. What is left is the order of work, and what the host waits for.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from internvl_rt.engine import loading
from internvl_rt.engine.loading import load_part
from internvl_rt.engine.options import EngineOptions
from internvl_rt.model.shard import Shard
from internvl_rt.steps.executor import Executor
from internvl_rt.steps.follower import Follower
from internvl_rt.steps.orders import Capturing, read_order
from support.fake_device import MACHINE


class FakeGroup:
    """A `Group` whose other ranks are not there."""

    def __init__(self, size: int) -> None:
        self.size = size

    def add(self, x: Tensor) -> Tensor:
        return x.add_(0)

    def largest(self, x: Tensor) -> Tensor:
        return x.add_(0)

    def gather(self, x: Tensor) -> Tensor:
        return x.expand(self.size, *x.shape).clone()

    def share(self, x: Tensor) -> Tensor:
        return x.add_(0)


class FakeFirstRank(FakeGroup):
    """Replaces `FirstRank`. given: the orders of all engines so far."""

    given: list[bytes] = []  # noqa: RUF012

    def __init__(self, facts: dict[str, Any], size: int, device: torch.device, **how: object) -> None:
        super().__init__(size)

    def begin(self) -> None:
        self.given.clear()

    def order(self, message: bytes) -> None:
        self.given.append(message)

    def together(self) -> AbstractContextManager[None]:
        return nullcontext()

    def check(self) -> None:
        pass

    def end_after(self, error: BaseException) -> None:
        pass

    def close(self) -> None:
        pass


def use_fake_ranks(size: int) -> None:
    torch.cuda.device_count = lambda: size
    loading.FirstRank = FakeFirstRank  # type: ignore[assignment,misc]


def follow(options: dict[str, Any]) -> int:
    """Obeys, as rank 1, the orders that an engine of `tiny` has given; returns how many there were.

    What the host waits for in those that follow the captures is of the phase "follow".
    """
    chosen, device = EngineOptions(**options), torch.device("cuda", 0)
    group = FakeGroup(chosen.tensor_parallel_size)
    part, pool = load_part("tiny", chosen, device, Shard(1, group.size, group))
    follower = Follower(Executor(part, pool, max_draws=chosen.max_draws), pool)
    for message in FakeFirstRank.given:
        with MACHINE.during("capture" if isinstance(read_order(message), Capturing) else "follow"):
            follower.obey(message)
    return len(FakeFirstRank.given)

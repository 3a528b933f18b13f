"""Ranks as threads of one process: what they do together is done by whoever comes last."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from internvl_rt.checkpoint.config import ModelConfig
from internvl_rt.checkpoint.folder import open_checkpoint
from internvl_rt.model.internvl import InternVL
from internvl_rt.model.ops import TORCH, Ops
from internvl_rt.model.shard import Shard
from internvl_rt.model.sharded import join_shards, shard_ops
from internvl_rt.model.weights import load_weights

T = TypeVar("T")


@dataclass
class Meeting:
    """Where `size` threads meet. `seen`: the names and shapes of what they did together, in order."""

    size: int
    given: list[Tensor | None] = field(default_factory=list)
    seen: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.given, self.barrier = [None] * self.size, threading.Barrier(self.size)

    def meet(self, name: str, rank: int, x: Tensor) -> list[Tensor]:
        """Returns the tensors of all ranks. Fails if they do not do the same thing."""
        self.given[rank] = x
        if rank == 0:
            self.seen.append((name, tuple(x.shape)))
        self.barrier.wait(60)
        given = [each.clone() for each in self.given]
        assert (name, tuple(x.shape)) == self.seen[-1], f"rank {rank} does {name} {tuple(x.shape)}, not {self.seen[-1]}"
        self.barrier.wait(60)
        return given


class ThreadGroup:
    """A `Group` of threads."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting, self.rank = meeting, rank

    def add(self, x: Tensor) -> Tensor:
        return x.copy_(sum(self.meeting.meet("add", self.rank, x)))

    def largest(self, x: Tensor) -> Tensor:
        return x.copy_(torch.stack(self.meeting.meet("largest", self.rank, x)).amax(0))

    def gather(self, x: Tensor) -> Tensor:
        return torch.stack(self.meeting.meet("gather", self.rank, x))

    def share(self, x: Tensor) -> Tensor:
        return x.copy_(self.meeting.meet("share", self.rank, x)[0])


def run_ranks(size: int, work: Callable[[Shard], T]) -> tuple[list[T], Meeting]:
    """Runs `work` in a thread for each rank; returns the results in order. Raises the first error of a rank."""
    meeting = Meeting(size)
    results: list[T | None] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(Shard(rank, size, ThreadGroup(meeting, rank)))
        except threading.BrokenBarrierError:
            pass
        except BaseException as error:
            errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results, meeting


def load_part(folder: Path, config: ModelConfig, shard: Shard, ops: Ops = TORCH, **how: object) -> InternVL:
    """Loads a rank's part of a checkpoint in float32."""
    checkpoint = open_checkpoint(folder)
    how = {"dtype": torch.float32, "device": "cpu", "ops": ops, **how}
    weights = join_shards(load_weights(checkpoint, config, shard=shard, **how), config.decoder, shard)
    return InternVL(config, weights, shard_ops(ops, config.decoder, shard), shard)

"""Several ranks of a model as threads of one process, and what each of them must hold."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Barrier
from typing import Any

import torch
from torch import Tensor

from internvl_rt.checkpoint.config import ModelConfig
from internvl_rt.model.internvl import ModelWeights, named_linears, named_parameters
from internvl_rt.model.linear import Linear
from internvl_rt.model.shard import Shard, cut_of


@dataclass
class MeetingGroup:
    """What one rank can do with the others: they meet at a barrier, where each sees what the others gave."""

    rank: int
    barrier: Barrier
    given: list[Any]
    num_calls: int = 0

    def largest(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        self.given[self.rank] = x.clone()
        self.barrier.wait()
        x.copy_(torch.stack(self.given).amax(0))
        self.barrier.wait()
        return x


def load_together(size: int, load: Callable[[Shard], ModelWeights]) -> list[tuple[Shard, ModelWeights]]:
    """Loads the parts of all ranks at the same time."""
    barrier, given = Barrier(size, timeout=60), [None] * size
    groups: list[Any] = [MeetingGroup(rank, barrier, given) for rank in range(size)]
    shards = [Shard(rank, size, group) for rank, group in enumerate(groups)]
    with ThreadPoolExecutor(size) as pool:
        return list(zip(shards, pool.map(load, shards), strict=True))


def part_of(path: str, whole: Tensor, config: ModelConfig, shard: Shard) -> Tensor:
    """Takes a rank's part out of a parameter of the whole model."""
    cut = cut_of(path, config.decoder, shard)
    return whole if cut is None else torch.cat([whole[rows][..., cut.columns] for rows in cut.rows])


def multiplied_out(weights: ModelWeights) -> dict[str, Tensor]:
    """Returns all parameters by path, those of quantised linears as the weight that they multiply out to."""
    linears = named_linears(weights)
    quantised = {path: linear for path, linear in linears.items() if not isinstance(linear, Linear)}
    found = {f"{path}.weight_NK": linear.dense(torch.float32) for path, linear in quantised.items()}
    for path, parameter in named_parameters(weights).items():
        linear, _, field = path.rpartition(".")
        if linear not in quantised or field == "bias_N":
            found[path] = parameter
        elif field == "input_scale_1":
            found[f"static scale of {linear}"] = parameter  # a path that no rank has a part of
    return found


def assert_part(part: ModelWeights, whole: ModelWeights, config: ModelConfig, shard: Shard) -> None:
    """Asserts that weights are, to the bit, a rank's part of the whole model's."""
    ours, theirs = multiplied_out(part), multiplied_out(whole)
    assert ours.keys() == theirs.keys()
    expected = {path: part_of(path, tensor, config, shard) for path, tensor in theirs.items()}
    assert [path for path, tensor in ours.items() if not torch.equal(tensor, expected[path])] == []

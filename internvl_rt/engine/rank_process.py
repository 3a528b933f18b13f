"""The program of a rank other than 0: it loads its part of a model, and follows orders until rank 0 is gone."""

import shutil
from functools import partial
from pathlib import Path

import torch

from internvl_rt.engine.child_process import Parent, run_child
from internvl_rt.engine.loading import load_part
from internvl_rt.engine.options import ONE_SHOT, read_facts
from internvl_rt.engine.rank_group import RankGroup
from internvl_rt.engine.ranks import device_of
from internvl_rt.steps.executor import Executor
from internvl_rt.steps.follower import Follower


def main(socket: int, rank: int, folder: str) -> None:
    """folder: where ranks find each other; it is removed when rank 0 is gone."""
    run_child(socket, partial(_follow, rank, Path(folder)), partial(shutil.rmtree, folder, ignore_errors=True))


def _follow(rank: int, folder: Path, parent: Parent) -> None:
    model, options = read_facts(parent.hear_facts())
    size, device = options.tensor_parallel_size, device_of(torch.device(options.device), rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # else some memory of GPU 0 is taken as well
    group = RankGroup(folder, rank, size, device, one_shot=ONE_SHOT in options.experiments)
    part, pool = load_part(model, options, device, options.shard(rank, group=group))
    executor = Executor(part, pool, max_draws=options.max_draws, num_threads=options.threads_of_rank)
    follower = Follower(executor, pool)
    while True:
        follower.obey(parent.hear())

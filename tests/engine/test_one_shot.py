"""The one-shot sum of small tensors, with torch's symmetric memory replaced by threads that meet: no GPU has run it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed._symmetric_memory as symmetric
from torch import Tensor

from internvl_rt import EngineOptions
from internvl_rt.engine.one_shot import MAX_BYTES, OneShotSum
from support.ranks import run_ranks


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Records what is asked of torch: the buffers that ranks share, by the address of each."""
    seen: list[Any] = []
    groups: dict[str, Any] = {}

    def empty(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=dtype)

    def set_group_info(name: str, rank: int, size: int, store: Any) -> None:
        seen.append((name, rank, size))
        groups[f"{name} {rank}"] = store  # the thread's group

    monkeypatch.setattr(symmetric, "_SymmetricMemory", SimpleNamespace(set_group_info=set_group_info))
    monkeypatch.setattr(symmetric, "empty", empty)
    monkeypatch.setattr(symmetric, "rendezvous", lambda buffer, name: seen.append((name, buffer.nbytes)))

    def add(shared: Tensor, local: Tensor, kind: str, name: str, out: Tensor) -> Tensor:
        """As torch describes it: the summand is copied to the shared memory, then all are read from there."""
        assert kind == "sum"
        assert shared.dtype == local.dtype == out.dtype
        assert shared.shape == local.shape == out.shape
        assert shared.data_ptr() % 16 == 0
        shared.copy_(local)
        name, _, rank = name.rpartition("/")
        parts = groups[f"{name}/{rank} {rank}"].meeting.meet("one shot", int(rank), shared)
        return out.copy_(sum(parts))

    monkeypatch.setattr(torch.ops, "symm_mem", SimpleNamespace(one_shot_all_reduce_copy_out=add))
    return seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_ranks_have_the_sum_in_place_of_their_tensors(seen: list[Any], dtype: torch.dtype) -> None:
    def work(shard: Any) -> Tensor:
        # The name has the rank at its end, so that the fake finds the thread.
        sums = OneShotSum(shard.group, shard.rank, shard.size, torch.device("cpu"), f"ranks/{shard.rank}")
        x_TD = torch.full((3, 8), float(shard.rank + 1), dtype=dtype)
        assert sums.takes(x_TD)
        assert sums.add(x_TD) is x_TD
        return x_TD

    results, _ = run_ranks(3, work)
    assert [result.unique().tolist() for result in results] == [[6.0]] * 3
    assert sorted(one for one in seen if len(one) == 3) == [(f"ranks/{rank}", rank, 3) for rank in range(3)]
    assert {one[1] for one in seen if len(one) == 2} == {MAX_BYTES}


def test_large_tensors_and_such_that_have_gaps_are_left_to_nccl(seen: list[Any]) -> None:
    sums = OneShotSum(None, 0, 2, torch.device("cpu"), "ranks/0")
    assert sums.takes(torch.empty(MAX_BYTES // 2, dtype=torch.bfloat16))
    for other in (
        torch.empty(MAX_BYTES // 2 + 8, dtype=torch.bfloat16),
        torch.empty(7, dtype=torch.bfloat16),
        torch.empty(8, 16, dtype=torch.bfloat16)[:, :8],
        torch.empty(16, dtype=torch.int64),
    ):
        assert not sums.takes(other)


def test_torch_has_what_is_called_here() -> None:
    """The names are not public, so a new torch may miss one: then the experiment has to be written anew."""
    assert callable(symmetric._SymmetricMemory.set_group_info)
    assert "one_shot_all_reduce_copy_out" in {
        schema.name.removeprefix("symm_mem::") for schema in torch._C._jit_get_all_schemas()
    }


def test_it_is_an_experiment() -> None:
    assert EngineOptions(experiments=("one_shot_sums",)).experiments == ("one_shot_sums",)

"""What ranks on one machine do together, by torch's process groups: NCCL on GPUs, gloo on CPUs.

No group is global, so a process may have several engines. Ranks find each other by a file in a folder that only this
user may open; gloo's sockets listen on the loopback interface alone.
"""

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.distributed.distributed_c10d
from torch import Tensor

from internvl_rt.engine.one_shot import OneShotSum

# Most of what is used here has no types.
distributed: Any = torch.distributed
_c10d: Any = torch.distributed.distributed_c10d
TIMEOUT = timedelta(minutes=10)  # of an operation; a rank that has died is noticed at once
_CONNECT_TIMEOUT = timedelta(minutes=1)
_POLL_S = 0.005


class _Meeting(distributed.Store):  # type: ignore[misc]
    """Where ranks find each other: a store that waits for a key for as long as no rank is lost."""

    def __init__(self, store: Any, check: Callable[[], None]) -> None:
        super().__init__()
        self._store, self._check = store, check

    def set(self, key: str, value: str) -> None:
        self._store.set(key, value)

    def get(self, key: str) -> Any:
        self.wait([key])
        return self._store.get(key)

    def wait(self, keys: list[str], timeout: timedelta = TIMEOUT) -> None:
        """timeout: is for how long this may block, which `check` decides here."""
        while not self._store.check(keys):
            self._check()
            time.sleep(_POLL_S)


class RankGroup:
    """The operations that all ranks take part in."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        size: int,
        device: torch.device,
        *,
        one_shot: bool = False,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Waits for all ranks. one_shot: whether GPUs add up small tensors by `OneShotSum`.

        check: raises if a rank is lost meanwhile.
        """
        self._one_shot: OneShotSum | None = None
        store = distributed.FileStore(str(folder / "store"), size)
        self.size = size
        self._group: Any
        if device.type == "cuda":
            store.set_timeout(TIMEOUT)
            nccl = distributed.ProcessGroupNCCL.Options()
            nccl._timeout = TIMEOUT
            self._group = distributed.ProcessGroupNCCL(store, rank, size, nccl)
            self._group.eager_connect_single_device(device)
            if one_shot:
                self._one_shot = OneShotSum(store, rank, size, device, folder.name)
        else:
            gloo = distributed.ProcessGroupGloo._Options()
            gloo._devices = [distributed.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
            gloo._timeout, gloo._threads = _CONNECT_TIMEOUT, 1
            self._group = distributed.ProcessGroupGloo(_Meeting(store, check), rank, size, gloo)
            self._group._set_default_timeout(TIMEOUT)

    def add(self, x: Tensor) -> Tensor:
        if self._one_shot is not None and self._one_shot.takes(x):
            self._operations()
            return self._one_shot.add(x)
        return self._reduce(x, distributed.ReduceOp.SUM)

    def largest(self, x: Tensor) -> Tensor:
        return self._reduce(x, distributed.ReduceOp.MAX)

    def gather(self, x: Tensor) -> Tensor:
        parts = x.new_empty(self.size * len(x), *x.shape[1:])
        options = _c10d.AllgatherOptions()
        options.asyncOp = False  # on a GPU it then runs on the current stream, as part of a CUDA graph perhaps
        _wait(self._operations()._allgather_base(parts, x.contiguous(), options))
        return parts.view(self.size, *x.shape)

    def share(self, x: Tensor) -> Tensor:
        options = distributed.BroadcastOptions()
        options.rootRank, options.asyncOp = 0, False
        _wait(self._operations().broadcast([x], options))
        return x

    def _reduce(self, x: Tensor, operation: Any) -> Tensor:
        options = distributed.AllreduceOptions()
        options.reduceOp, options.asyncOp = operation, False
        _wait(self._operations().allreduce([x], options))
        return x

    def _operations(self) -> Any:
        """Returns torch's process group."""
        return self._group

    def abort(self) -> None:
        """Ends operations that wait for a rank that is lost. Any thread may call it."""
        self._group.abort()

    def leave(self) -> None:
        """Closes the connections to the other ranks."""
        self._group = self._one_shot = None


def _wait(work: Any) -> None:
    """Waits for an operation on a CPU; on a GPU the current stream does. None: that is arranged already."""
    if work is not None:
        work.wait()

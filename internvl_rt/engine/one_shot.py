"""Adds up small tensors of several GPUs in one kernel that reads them all, by torch's symmetric memory.

An all-reduce of NCCL sends parts around, which takes some ten microseconds for the few kilobytes of a decode step. Here
each GPU puts its summand where the others can read it, and reads theirs. It is an experiment: no GPU has measured it.
"""

from typing import Any

import torch
from torch import Tensor

MAX_BYTES = 256 << 10  # beyond, every GPU would read more from the others than an all-reduce moves
_ALIGNED_BYTES = 16
_DTYPES = (torch.bfloat16, torch.float32)


class OneShotSum:
    """Sums over the ranks of a group, up to MAX_BYTES each."""

    def __init__(self, store: Any, rank: int, size: int, device: torch.device, name: str) -> None:
        """Waits for all ranks. store: where they find each other. name: that no other group of this process has."""
        import torch.distributed._symmetric_memory

        symmetric: Any = torch.distributed._symmetric_memory
        self._name = name
        symmetric._SymmetricMemory.set_group_info(name, rank, size, store)
        self._buffer = symmetric.empty(MAX_BYTES, dtype=torch.uint8, device=device)
        symmetric.rendezvous(self._buffer, name)

    def takes(self, x: Tensor) -> bool:
        """Says whether a tensor is added up here."""
        fits = x.nbytes <= MAX_BYTES and x.nbytes % _ALIGNED_BYTES == 0
        return fits and x.dtype in _DTYPES and x.is_contiguous()

    def add(self, x: Tensor) -> Tensor:
        """Adds the ranks' tensors up, in place of each, and returns it. The host does not wait."""
        flat = x.view(-1)
        shared = self._buffer[: x.nbytes].view(x.dtype)
        torch.ops.symm_mem.one_shot_all_reduce_copy_out(shared, flat, "sum", self._name, flat)
        return x

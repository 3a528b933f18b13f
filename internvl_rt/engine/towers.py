"""Decoupled vision: processes of their own encode pictures, ahead of the steps that need them.

Tiles and visual tokens cross in memory that both processes have mapped, and that has no name: a file of the kernel's
own, which is gone when the last process is. A process has two places there, so that it finds the next tiles when it has
encoded some. Meanwhile the language side decodes; a picture's identity is that of its bytes, so caches hold.
"""

import json
import mmap
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from internvl_rt.checkpoint.config import ModelConfig
from internvl_rt.engine.children import Child, Children
from internvl_rt.errors import EngineDeadError
from internvl_rt.steps.device_stream import to_device
from internvl_rt.steps.tile_encoder import MAX_TILES_PER_PASS

NUM_PLACES = 2


class Arena:
    """Memory that a vision process and the engine share: places of up to MAX_TILES_PER_PASS tiles each."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, file: int | None = None) -> None:
        """file: the number of the open file, in the process that it was given to; None makes one."""
        self._config, self._dtype = config, dtype
        side = config.vision.image_size
        self._tile_bytes = 3 * side**2 * 4  # of float32, the largest
        self._visual_bytes = config.rows_per_tile * config.decoder.hidden_size * dtype.itemsize
        self._place_bytes = MAX_TILES_PER_PASS * (self._tile_bytes + self._visual_bytes)
        self.file = os.memfd_create("internvl_rt tiles") if file is None else file
        if file is None:
            os.ftruncate(self.file, NUM_PLACES * self._place_bytes)  # the system commits a page when it is written
        self._memory = torch.frombuffer(mmap.mmap(self.file, NUM_PLACES * self._place_bytes), dtype=torch.uint8)

    def tiles(self, place: int, num_tiles: int, *, is_uint8: bool) -> Tensor:
        """Returns the tiles in a place: uint8 [I, S, S, 3], or [I, 3, S, S] in the model's dtype."""
        side, dtype = self._config.vision.image_size, torch.uint8 if is_uint8 else self._dtype
        shape = (num_tiles, side, side, 3) if is_uint8 else (num_tiles, 3, side, side)
        start = place * self._place_bytes
        return self._memory[start : start + 3 * side**2 * num_tiles * dtype.itemsize].view(dtype).view(shape)

    def visual(self, place: int, num_tiles: int) -> Tensor:
        """Returns the visual tokens [I, M, D] in a place."""
        start = place * self._place_bytes + MAX_TILES_PER_PASS * self._tile_bytes
        found = self._memory[start : start + num_tiles * self._visual_bytes].view(self._dtype)
        return found.view(num_tiles, self._config.rows_per_tile, self._config.decoder.hidden_size)

    def close(self) -> None:
        """Closes the file; the memory is freed with the last tensor that is part of it."""
        if self.file >= 0:
            os.close(self.file)
            self.file = -1


class _Pending:
    """Visual tokens [X, D] of a picture, whose parts a vision process computes."""

    def __init__(self, num_parts: int, children: Children, device: torch.device) -> None:
        self._parts: list[Tensor | None] = [None] * num_parts
        self._children, self._device = children, device
        self._done = threading.Event()

    def put(self, part: int, visual_IMD: Tensor) -> None:
        self._parts[part] = visual_IMD
        if all(each is not None for each in self._parts):
            self._done.set()

    def wait(self, timeout_s: float) -> bool:
        """Raises EngineDeadError if a process is lost meanwhile."""
        if self._done.wait(timeout_s):
            return True
        self._children.check()
        return False

    def get(self) -> Tensor:
        while not self.wait(_POLL_S):
            pass
        parts = [part for part in self._parts if part is not None]
        return to_device(torch.cat(parts).flatten(0, 1), self._device)


class _Job(NamedTuple):
    """Tiles to be encoded. Nobody waits for them any more if `pending` is gone, with the picture."""

    pending: "weakref.ref[_Pending]"
    part: int
    tiles: Tensor


_POLL_S = 0.1


class VisionProcesses:
    """Encodes pictures in other processes. Any thread may use it."""

    def __init__(
        self, facts: dict[str, Any], config: ModelConfig, dtype: torch.dtype, device: torch.device, number: int
    ) -> None:
        """Starts the processes, which load the tower.

        facts: of `write_facts`. device: where visual tokens are wanted. number: how many processes.
        """
        self._device, self._dtype = device, dtype
        arenas = [Arena(config, dtype) for _ in range(number)]
        self._work = _Work(arenas)
        try:
            names = [f"vision process {index}" if number > 1 else "the vision process" for index in range(number)]
            children = (
                Child(name, "vision_process", (index, arena.file), (arena.file,))
                for index, (name, arena) in enumerate(zip(names, arenas, strict=True))
            )
            self._children = Children(list(children), self._work.on_answer)
        finally:
            for arena in arenas:
                arena.close()
        self._work.children = weakref.ref(self._children)
        try:
            self._children.tell(facts)
        except BaseException:
            self._children.close()
            raise

    def wait_until_ready(self) -> None:
        """Waits until every process has loaded the tower. Raises the error of one, or EngineDeadError."""
        while not self._work.all_ready.wait(_POLL_S):
            self.check()

    def encode(self, tiles: Tensor) -> _Pending:
        parts = torch.split(tiles if tiles.dtype == torch.uint8 else tiles.to(self._dtype), MAX_TILES_PER_PASS)
        pending = _Pending(len(parts), self._children, self._device)
        self._work.add([_Job(weakref.ref(pending), number, part) for number, part in enumerate(parts)])
        return pending

    def check(self) -> None:
        self._children.check()

    def close(self) -> None:
        self._children.close()


class _Work:
    """The tiles that wait for a place, and those that are in one. A thread of the processes' owner refers to it."""

    def __init__(self, arenas: list[Arena]) -> None:
        self.children: Callable[[], Children | None] = lambda: None
        self.all_ready = threading.Event()
        self._arenas = arenas
        self._ready: set[int] = set()
        self._waiting: deque[_Job] = deque()
        self._free: list[list[int]] = [[] for _ in arenas]  # places of each process
        self._running: dict[tuple[int, int], _Job] = {}
        self._lock = threading.Lock()

    def add(self, jobs: list[_Job]) -> None:
        with self._lock:
            self._waiting += jobs
        self._begin()

    def _begin(self) -> None:
        """Gives waiting tiles to the processes that have a free place."""
        while True:
            with self._lock:
                while self._waiting and self._waiting[0].pending() is None:
                    self._waiting.popleft()
                if not self._waiting or not any(self._free):
                    return
                process = max(range(len(self._free)), key=lambda number: len(self._free[number]))
                place, job = self._free[process].pop(), self._waiting.popleft()
                self._running[process, place] = job
            is_uint8 = job.tiles.dtype == torch.uint8
            self._arenas[process].tiles(place, len(job.tiles), is_uint8=is_uint8).copy_(job.tiles)
            facts = {"place": place, "num_tiles": len(job.tiles), "is_uint8": is_uint8}
            children = self.children()
            if children is None:  # the engine is gone
                return
            children.send(json.dumps(facts).encode(), process)

    def on_answer(self, process: int, place: int | None) -> None:
        """place: where the process has encoded tiles; None: it has loaded the tower."""
        if place is None:
            with self._lock:
                self._ready.add(process)
                self._free[process] += range(NUM_PLACES)
            if len(self._ready) == len(self._arenas):
                self.all_ready.set()
        else:
            with self._lock:
                job = self._running.pop((process, place))
            if (pending := job.pending()) is not None:
                pending.put(job.part, self._arenas[process].visual(place, len(job.tiles)).clone())
            with self._lock:
                self._free[process].append(place)
        with suppress(EngineDeadError):  # whoever waits is told
            self._begin()

"""What rank 0 does with the other ranks: operations together, and orders that come before them."""

import os
import shutil
import signal
import tempfile
import threading
from contextlib import AbstractContextManager
from pathlib import Path
from queue import SimpleQueue
from types import FrameType, TracebackType
from typing import Any

import torch

from internvl_rt.engine.children import Child, Children
from internvl_rt.engine.failures import without_frames
from internvl_rt.engine.rank_group import RankGroup
from internvl_rt.errors import InternVLError, RequestError

_POLL_S = 0.05


class FirstRank(RankGroup):
    """The group of an engine with several ranks, in the process of rank 0, which it leads."""

    def __init__(self, facts: dict[str, Any], size: int, device: torch.device, *, one_shot: bool = False) -> None:
        """Starts the other ranks, which load their parts, and waits until all are there.

        facts: as `write_facts` returns them. one_shot: as for `RankGroup`.

        Raises what ended a rank, or EngineDeadError.
        """
        self._folder, self._may_meet = Path(tempfile.mkdtemp(prefix=f"internvl_rt-{os.getpid()}-")), True
        ranks = [Child(f"rank {rank}", "rank_process", (rank, str(self._folder))) for rank in range(1, size)]
        self._ranks: Children | None = None
        try:
            self._ranks = Children(ranks)
            self._ranks.tell(facts)
            self._meet(size, device, one_shot)
        except BaseException:
            self.close()
            raise
        if device.type == "cuda":
            self._ranks.on_loss(self.abort)

    def _meet(self, size: int, device: torch.device, one_shot: bool) -> None:
        """Waits for all ranks, but no longer than until one is lost."""
        done: SimpleQueue[BaseException | None] = SimpleQueue()

        def meet() -> None:
            try:
                RankGroup.__init__(self, self._folder, 0, size, device, one_shot=one_shot, check=self.check)
            except BaseException as error:
                done.put(without_frames(error))  # which would hold sockets until the garbage collector runs
            else:
                done.put(None)

        thread = threading.Thread(target=meet, name="internvl_rt meets its ranks", daemon=True)
        thread.start()
        while done.empty():
            thread.join(_POLL_S)
            self.check()
        if error := done.get():
            raise error

    def begin(self) -> None:
        """Follows the loading: from now on the other ranks do nothing without an order."""
        self._may_meet = False
        shutil.rmtree(self._folder, ignore_errors=True)

    def order(self, message: bytes) -> None:
        self._may_meet = True
        assert self._ranks is not None, "they were started"
        self._ranks.send(message)

    def _operations(self) -> Any:
        if not self._may_meet:
            raise RequestError(
                "this model is one of several parts, and the other ranks compute only what the engine tells them; call "
                "the engine's methods, or load the model with tensor_parallel_size=1"
            )
        return super()._operations()

    def together(self) -> AbstractContextManager[None]:
        return _Together(self)

    def check(self) -> None:
        if self._ranks is not None:
            self._ranks.check()

    def fail(self, error: BaseException) -> None:
        """Ends all ranks, because rank 0 has failed in the middle of what they do together."""
        assert self._ranks is not None, "they were started"
        self._ranks.fail(error)

    def end_after(self, error: BaseException) -> InternVLError | None:
        """Ends the other ranks after an error, and returns what ended one of them first, if that was the cause."""
        is_own = isinstance(error, InternVLError) or not isinstance(error, Exception)
        cause = None if is_own or self._ranks is None else self._ranks.wait_for_failure()
        if cause is not None:
            without_frames(error)  # which would hold connections to the other ranks
        self.close()
        return cause

    def close(self) -> None:
        if self._ranks is not None:
            self._ranks.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        self.leave()


class _Together(AbstractContextManager[None]):
    """What `Group.together` returns. A class, because a generator would keep an error's frames alive."""

    def __init__(self, first: FirstRank) -> None:
        self._first = first

    def __enter__(self) -> None:
        self._first.check()
        self._first._may_meet = False
        self._interrupt: tuple[int, FrameType | None] | None = None
        self._handler: Any = None
        if threading.current_thread() is threading.main_thread() and callable(signal.getsignal(signal.SIGINT)):
            self._handler = signal.signal(signal.SIGINT, self._keep)

    def _keep(self, number: int, frame: FrameType | None) -> None:
        self._interrupt = number, frame

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
        has_ordered, self._first._may_meet = self._first._may_meet, False
        if error is not None and has_ordered:
            self._first.fail(error)
            self._first.check()
        if self._interrupt is not None and self._handler is not None:
            self._handler(*self._interrupt)


def device_of(device: torch.device, rank: int) -> torch.device:
    """Returns the device of a rank: on GPUs, those that follow that of rank 0."""
    return device if device.type != "cuda" else torch.device("cuda", (device.index or 0) + rank)

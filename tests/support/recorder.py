"""Replaces CUDA graphs on a machine without a GPU."""

from collections.abc import Callable

from torch import Tensor

from internvl_rt.steps.cuda_graph import Replay


class Recorder:
    """Replaces the capture of a graph; a replay computes again into the first result, as a CUDA graph does."""

    def __init__(self) -> None:
        self.captured: list[int] = []
        self.replayed: list[int] = []

    def __call__(self, compute: Callable[[], Tensor]) -> Replay:
        result = compute()
        self.captured.append(len(result))

        def run() -> None:
            self.replayed.append(len(result))
            result.copy_(compute())

        return Replay(run, result)

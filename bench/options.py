"""Types of the scripts' arguments, and how a script ends: what is wrong is told in one line."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import torch


def exit_with(main: Callable[[], int]) -> NoReturn:
    """Runs a script; a reader of its output that is gone, or a full disk, ends it without a traceback."""
    try:
        code = main()
        sys.stdout.flush()
    except OSError as error:
        code = 1
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python writes the rest of the output when it ends
        if not isinstance(error, BrokenPipeError):
            print(f"error: {error}", file=sys.stderr)
    sys.exit(code)


def seconds(text: str) -> float:
    value = float(text)  # argparse tells what is no number
    if not 0 < value <= 1e6:
        raise argparse.ArgumentTypeError(f"expected seconds above 0 and at most a million, got {text[:40]!r}")
    return value


def count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 1_000_000:
        raise argparse.ArgumentTypeError(f"expected a number from 1 to a million, got {text[:40]!r}")
    return value


def device(text: str) -> "torch.device":
    """Takes cpu, cuda or cuda:N, if it is there."""
    import torch  # here, because bench/gpu.py runs where torch may be missing

    try:
        found = torch.device(text)
    except RuntimeError:
        found = torch.device("meta")  # is refused below
    if found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {text[:40]!r}")
    if found.type == "cuda" and not 0 <= (found.index or 0) < torch.cuda.device_count():  # "cuda:999" is "cuda:-25"
        raise argparse.ArgumentTypeError(f"expected one of {torch.cuda.device_count()} CUDA devices, got {text[:40]!r}")
    return found

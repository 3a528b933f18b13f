"""Chooses the tests that run: a plain `pytest` runs the quick ones, `-m slow` runs the others."""

import gc
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads this when it is imported; kernels then run on the CPU, slowly

# A shell makes its jobs in the background ignore Ctrl-C, and the programs that tests start and interrupt would, too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# pytest-benchmark measures nothing in a worker of xdist, and takes every program that a worker starts for one.
os.environ.pop("PYTEST_XDIST_WORKER", None)

BROWSERS = ("chromium", "chromium-browser", "google-chrome")

NUM_DESELECTED = pytest.StashKey[int]()

# tests/golden runs only if INTERNVL_RT_GOLDEN is set, tests/real only if the command line names it.
collect_ignore = ["real"] if "INTERNVL_RT_GOLDEN" in os.environ else ["real", "golden"]


@pytest.fixture(autouse=True, scope="session")
def float32_by_default() -> Iterator[None]:
    """Makes `dtype="auto"` float32 on every processor: most tests compare answers that rounding must not change."""
    from internvl_rt.engine import loading  # it imports triton, which reads the environment

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "default_dtype", lambda: torch.float32)
        yield


@pytest.fixture
def one_order_of_sums() -> Iterator[None]:
    """Adds up every element of a product in one order, wherever it stands.

    In the interpreter a block's product is numpy's, and on some processors its sums depend on a row's place.
    """
    from support.hardware_arithmetic import hardware_arithmetic  # it imports triton, which reads the environment

    with nullcontext() if torch.cuda.is_available() else hardware_arithmetic():
        yield


@pytest.hookimpl(tryfirst=True)  # this must run before pytest itself selects by marker
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects the tests marked `gpu` or `browser` where there is no GPU or browser, and those marked `slow` unless
    the command line chooses tests by -m, -k or their ids; pytest's last lines say how many."""
    by_id = any("::" in argument for argument in config.args)
    missing: dict[str, set[str]] = {}
    for item in items:
        quick = item.get_closest_marker("fast")
        if quick:
            missing.setdefault(item.nodeid.partition("[")[0], set(quick.args)).discard(item.callspec.id)
            if item.callspec.id not in quick.args:
                item.add_marker("slow")
    wrong = [f"{test}: no case is called {', '.join(sorted(ids))}" for test, ids in missing.items() if ids]
    if wrong and not by_id:
        raise pytest.UsageError(*wrong)
    chosen = config.option.markexpr or config.option.keyword or by_id
    unable = [
        item
        for item in items
        if (item.get_closest_marker("gpu") and not torch.cuda.is_available())
        or (item.get_closest_marker("browser") and not any(map(shutil.which, BROWSERS)))
        or (item.get_closest_marker("slow") and not chosen)
    ]
    config.hook.pytest_deselected(items=unable)
    items[:] = [item for item in items if item not in set(unable)]
    if hasattr(config, "workeroutput"):  # one of several processes, whose last line nobody sees
        config.workeroutput["num_deselected"] = len(unable)


def pytest_collection_finish() -> None:
    """Hides the imported modules and the collected tests, which live to the end, from the garbage collector: many tests
    run it, and it would search them for half a second each time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Tells the main process how many tests its workers deselected; each of them collects all tests."""
    node.config.stash[NUM_DESELECTED] = getattr(node, "workeroutput", {}).get("num_deselected", 0)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if num_deselected := config.stash.get(NUM_DESELECTED, 0):
        terminalreporter.write_line(f"{num_deselected} deselected: slow tests, or tests that need a GPU or a browser")

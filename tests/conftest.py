"""Chooses the tests that run: a plain `pytest` runs the quick ones, `-m slow` runs the others."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads this when it is imported; kernels then run on the CPU, slowly

# tests/golden runs only if INTERNVL_RT_GOLDEN is set, tests/real only if the command line names it.
collect_ignore = ["real"] if "INTERNVL_RT_GOLDEN" in os.environ else ["real", "golden"]


@pytest.hookimpl(tryfirst=True)  # this must run before pytest itself selects by marker
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects the tests marked `gpu` where there is no GPU, and those marked `slow` unless the command line chooses
    tests by -m, -k or their ids; pytest's last line says how many."""
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
        or (item.get_closest_marker("slow") and not chosen)
    ]
    config.hook.pytest_deselected(items=unable)
    items[:] = [item for item in items if item not in set(unable)]

"""What a plain `pytest` collects, and its two lanes: what is quick, and with `-m slow` the rest."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: kernels run on the CPU, slowly

# tests/golden with INTERNVL_RT_GOLDEN set, tests/real only when it is named.
collect_ignore = ["real"] if "INTERNVL_RT_GOLDEN" in os.environ else ["real", "golden"]


@pytest.hookimpl(tryfirst=True)  # before pytest itself selects by marker
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

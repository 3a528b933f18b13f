"""What a plain `pytest` collects: tests/golden with INTERNVL_RT_GOLDEN set, tests/real only when it is named."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: kernels run on the CPU, slowly

collect_ignore = ["real"] if "INTERNVL_RT_GOLDEN" in os.environ else ["real", "golden"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects the tests marked `gpu` where there is no GPU; pytest's last line says how many."""
    if not torch.cuda.is_available():
        unable = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=unable)
        items[:] = [item for item in items if item not in unable]

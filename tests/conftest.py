"""What is collected: tests/golden with INTERNVL_RT_GOLDEN set, tests/real when it is named, `gpu` tests on a GPU."""

import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if collection_path == HERE / "golden" and "INTERNVL_RT_GOLDEN" not in os.environ:
        return True
    named = any(Path(argument).resolve().is_relative_to(HERE / "real") for argument in config.args)
    return True if collection_path == HERE / "real" and not named else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        unable = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=unable)
        items[:] = [item for item in items if item not in unable]

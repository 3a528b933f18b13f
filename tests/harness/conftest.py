"""Stands in for the harnesses where they are not installed: the few names of theirs that the adapters use."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

STAND_INS = {
    "lmms_eval": {
        "api/model.py": """
            class lmms:
                is_simple, rank = True, 0

                def __init__(self):
                    self.task_dict = {}
            """,
        "api/instance.py": """
            from dataclasses import dataclass

            @dataclass
            class GenerationResult:
                text: object
            """,
        "models/registry_v2.py": """
            from dataclasses import dataclass

            @dataclass
            class ModelManifest:
                model_id: str
                simple_class_path: str
                chat_class_path: str
            """,
    },
    "vlmeval": {
        "config.py": "supported_VLM = {}",
        "dataset/__init__.py": "DATASET_MODALITY = lambda name: 'VIDEO' if 'Video' in name else 'IMAGE'",
        "vlm/base.py": """
            class BaseModel:
                def generate(self, message, dataset=None):
                    return self.generate_inner(message, dataset)
            """,
        # It asks what the arguments say, as the real one does with a data set.
        "run.py": """
            import argparse
            from vlmeval.config import supported_VLM

            parser = argparse.ArgumentParser()
            parser.add_argument("--model", nargs="+")
            parser.add_argument("--data", nargs="+")
            args = parser.parse_args()
            for name in args.model:
                model = supported_VLM[name]()
                for picture in args.data:
                    message = [{"type": "image", "value": picture}, {"type": "text", "value": "Read the digits."}]
                    print(name, model.generate(message))
            """,
    },
}


def write(package: str, folder: Path) -> None:
    """Writes what stands in for a harness to a folder for sys.path."""
    for name, text in STAND_INS[package].items():
        path = folder / package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(line.removeprefix(" " * 12) for line in text.splitlines()))


@pytest.fixture
def write_stand_in() -> Callable[[str, Path], None]:
    return write


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports an adapter by name, with its harness or what stands in for it."""
    before = set(sys.modules)

    def load(name: str) -> ModuleType:
        harness = {"lmms_eval": "lmms_eval", "vlmevalkit": "vlmeval"}[name]
        if importlib.util.find_spec(harness) is None:
            write(harness, tmp_path / "stand_in")
            monkeypatch.syspath_prepend(tmp_path / "stand_in")
        return importlib.import_module(f"internvl_rt.harness.{name}")

    yield load
    for module in set(sys.modules) - before:
        if module.partition(".")[0] in STAND_INS or module.startswith("internvl_rt.harness."):
            del sys.modules[module]

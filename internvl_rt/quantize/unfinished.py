"""The folder in which a quantised checkpoint comes into being, and from which an interrupted run goes on.

It is a hidden neighbour of what it will be. `model/` in it becomes the result by one rename when it is whole, so that
nothing ever looks complete and is not. A file gets its name when it has been written, and `state.json` counts a layer
after its files, so a run may end between any two operations. A run locks the folder; the system unlocks it however the
run ends.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from internvl_rt.checkpoint.files import read_file
from internvl_rt.checkpoint.json_section import parse_object
from internvl_rt.checkpoint.tensor_file import read_header, write_file
from internvl_rt.errors import CheckpointError, RequestError, quoted

_STATE, _LOCK = "state.json", "lock"
_DIGESTS = {  # arguments that are digests, and what another one means
    "weights": "other weights, or another config.json",
    "calibration": "other pictures or questions, or another choice of comparing answers",
}


def place_of(out: str | Path) -> Path:
    """Returns the whole path of a result."""
    return Path(os.path.abspath(os.path.expanduser(out)))


def folder_of(out: Path) -> Path:
    """Returns where a result is while it is not finished."""
    return out.parent / f".{out.name}-unfinished"


@dataclass(slots=True)
class Unfinished:
    """What is known of a run.

    arguments: all that decides what is written; what a user knows best comes first
    done: what is known of each finished layer, in order
    """

    out: Path
    arguments: Mapping[str, Any]
    done: list[dict[str, Any]] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return folder_of(self.out)

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def find(self) -> None:
        """Looks for an earlier run. Raises RequestError if it had other arguments, or the result is there already."""
        if self.out.exists() or self.out.is_symlink():
            raise RequestError(f"{self.out} is there already; give a new name, or remove it")
        if not self.folder.exists():
            return
        file = self.folder / _STATE
        if not file.is_file():
            if any(file.name != _LOCK for file in self.folder.iterdir()) and not self.model.is_dir():
                raise RequestError(f"{self.folder} is there and not of this command; remove it")
            return
        remedy = f"remove {self.folder}"
        text = read_file(file, RequestError, remedy=remedy)
        state = parse_object(file, text, RequestError, remedy=remedy)
        before = state.get("arguments")
        if not isinstance(before, dict) or not isinstance(state.get("done"), list):
            raise RequestError(f"{file} is not of this command; {remedy}")
        for name in {**self.arguments, **before}:
            if before.get(name) != self.arguments.get(name):
                then, now = quoted(before.get(name)), quoted(self.arguments.get(name))
                raise RequestError(
                    f"{self.folder} was begun with {_DIGESTS.get(name, f'{name} {then}, now it is {now}')}; "
                    "repeat what was asked for then, or remove that folder"
                )
        for written in sorted(self.model.glob("*.safetensors")):
            try:
                read_header(written)
            except CheckpointError as error:
                raise RequestError(f"{written} of an earlier run is damaged; {remedy}") from error
        self.done = state["done"]

    def num_bytes(self) -> int:
        """Counts what an earlier run has written."""
        return sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())

    @contextmanager
    def begin(self) -> Iterator[None]:
        """Locks the folder within the context. Raises RequestError if another run is at work there, or as `find`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / _LOCK, "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RequestError(f"{self.out} is being written by another run; wait, or give a new name") from None
            self.find()  # again: another run may have gone on, and ended, before the folder was locked
            self.model.mkdir(exist_ok=True)
            self._write_state()
            yield

    def finish_layer(self, report: dict[str, Any]) -> None:
        """Counts a layer whose files are written."""
        self.done.append(report)
        self._write_state()

    def finish(self) -> None:
        """Makes the model the result."""
        self.model.rename(self.out)
        shutil.rmtree(self.folder)

    def _write_state(self) -> None:
        self.write_text(self.folder / _STATE, {"arguments": self.arguments, "done": self.done})

    def write_text(self, file: Path, values: Mapping[str, Any]) -> None:
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        self._write(file, lambda partial: partial.write_text(text, encoding="utf-8"))

    def write_tensors(self, file: Path, tensors: Mapping[str, Tensor]) -> None:
        """Writes tensors whose memory is contiguous; the largest numbers come first, so that all are aligned."""
        order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
        shapes = {name: tuple(tensors[name].shape) for name in order}
        dtypes = {name: tensors[name].dtype for name in order}
        self._write(file, lambda partial: write_file(partial, shapes, lambda name: tensors[name].cpu(), dtypes))

    def copy_tensors(self, file: Path, entries: Mapping[str, Any], read: Callable[[str], Tensor]) -> None:
        """Writes tensors of a checkpoint as they are, one in memory at a time."""
        order = sorted(entries, key=lambda name: -entries[name].dtype.itemsize)
        shapes, dtypes = ({name: getattr(entries[name], what) for name in order} for what in ("shape", "dtype"))
        self._write(file, lambda partial: write_file(partial, shapes, read, dtypes))

    def _write(self, file: Path, write: Callable[[Path], object]) -> None:
        partial = file.with_name(f"{file.name}.partial")
        write(partial)
        with partial.open("rb") as written:
            os.fsync(written.fileno())  # else a file could be counted that a loss of power empties
        partial.replace(file)

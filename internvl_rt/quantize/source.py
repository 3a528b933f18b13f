"""A dense checkpoint: any part of its weights is read when it is needed, and nothing of it is written."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from internvl_rt.checkpoint.config import ModelConfig, load_config
from internvl_rt.checkpoint.find import resolve_model
from internvl_rt.checkpoint.folder import open_checkpoint
from internvl_rt.errors import CheckpointError, RequestError, not_finite
from internvl_rt.model.dialects import find_dialect
from internvl_rt.model.internvl import ModelWeights, build_weights, map_weights
from internvl_rt.model.linear import AnyLinear, Linear
from internvl_rt.model.placement import Placement, plan_tensors
from internvl_rt.model.weights import check_tensors, plan_file, settle_tying

_SHIFTED = 20  # a digest of so many characters


class DenseSource:
    """A folder of either format, in any naming, whose headers have been checked."""

    def __init__(self, model: str | Path) -> None:
        """Raises CheckpointError or ConfigError, and RequestError if the checkpoint is quantised already."""
        self.folder = resolve_model(model)
        config = load_config(self.folder)
        if config.quantization is not None:
            raise RequestError(
                f"{self.folder} is quantised already ({config.quantization.method}); give the folder of the dense "
                "weights"
            )
        if config.decoder.experts is not None:
            raise RequestError(
                f"{self.folder} has experts, which this command does not quantise; load it with quantization='fp8' or "
                "'int8', or give the folder of a model without experts"
            )
        if config.flash is not None:
            raise RequestError(
                f"{self.folder} is an InternVL3.5-Flash, which this command does not quantise; load it with "
                "quantization='fp8' or 'int8', or give the folder of a model without flash_mode"
            )
        self.checkpoint = open_checkpoint(self.folder)
        entries = self.checkpoint.entries
        self.dialect = find_dialect(entries)
        self.config: ModelConfig = settle_tying(self.checkpoint, config, self.dialect)
        check_tensors(self.checkpoint, self.config, self.dialect, plan_file(self.config, self.dialect, None))
        self.plan = {name: one for name, one in plan_tensors(self.config, self.dialect).items() if name in entries}
        self._parts: dict[str, list[tuple[str, Placement]]] = {}
        for name, planned in self.plan.items():
            for place in planned.placements:
                self._parts.setdefault(place.parameter, []).append((name, place))

    def digest(self) -> str:
        """Returns a text that changes if the folder's weights or its configuration do."""
        files = sorted({entry.file for entry in self.checkpoint.entries.values()} | {self.folder / "config.json"})
        found = [(file.name, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
        return hashlib.blake2b(repr(found).encode()).hexdigest()[:_SHIFTED]

    def names_below(self, *prefixes: str) -> Iterator[str]:
        """Yields the planned tensors that belong to parameters whose path begins with one of the prefixes."""
        for name, planned in self.plan.items():
            if planned.placements[0].parameter.startswith(prefixes):
                yield name

    def shapes(self, dtype: torch.dtype = torch.float32) -> ModelWeights:
        """Returns all weights on the device "meta"."""
        return build_weights(self.config, dtype=dtype, device="meta")

    def read(self, *prefixes: str, dtype: torch.dtype = torch.float32, device: torch.device) -> ModelWeights:
        """Returns weights of which those whose path begins with a prefix are read; the others are on "meta".

        Raises CheckpointError for numbers that are not finite.
        """
        extremes: list[tuple[str, Tensor]] = []

        def fill(path: str, tensor: Tensor) -> Tensor:
            if not path.startswith(prefixes):
                return tensor
            filled = torch.empty_like(tensor, device=device)
            for name, place in self._parts[path]:
                rows = filled[place.start : place.stop]
                self.checkpoint.read_into(name, rows, place.rows, place.columns)
                extremes.append((name, torch.stack(rows.aminmax())))
            return filled

        def fill_linear(path: str, linear: AnyLinear) -> AnyLinear:
            assert isinstance(linear, Linear)
            if f"{path}.weight_NK" not in self._parts:  # the tied lm_head
                return linear
            bias_N = None if linear.bias_N is None else fill(f"{path}.bias_N", linear.bias_N)
            return Linear(fill(f"{path}.weight_NK", linear.weight_NK), bias_N)

        weights = map_weights(self.shapes(dtype), fill, fill_linear)
        broken = [name for name, pair in extremes if not pair.isfinite().all()]
        if broken:
            self._refuse(broken[0], dtype)
        return weights

    def read_tensor(self, name: str) -> Tensor:
        """Returns a tensor as it is stored. Raises CheckpointError for numbers that are not finite."""
        entry = self.checkpoint.entries[name]
        out = torch.empty(entry.shape, dtype=entry.dtype)
        self.checkpoint.read_into(name, out)
        if not torch.stack(out.aminmax()).isfinite().all():
            self._refuse(name, entry.dtype)
        return out

    def _refuse(self, name: str, dtype: torch.dtype) -> NoReturn:
        problem = not_finite(dtype, "download the weights again")
        raise CheckpointError(f"{self.folder}: {name}: numbers are {problem}")

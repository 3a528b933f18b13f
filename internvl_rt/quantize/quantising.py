"""`quantise`: writes a compressed-tensors checkpoint of a dense one, layer by layer, and goes on where it was."""

import math
import shutil
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from internvl_rt.checkpoint.config import load_config
from internvl_rt.checkpoint.folder import Checkpoint, open_checkpoint
from internvl_rt.checkpoint.json_section import read_json
from internvl_rt.checkpoint.tensor_file import read_header
from internvl_rt.engine.loading import choose_device
from internvl_rt.engine.options import EngineOptions
from internvl_rt.errors import CheckpointError, RequestError
from internvl_rt.model.decoder import DecoderLayer
from internvl_rt.model.stored_linear import FLOATS
from internvl_rt.model.vision import VisionLayer
from internvl_rt.model.weights import check_tensors, plan_file
from internvl_rt.quantize.agreement import Agreement, compare_answers
from internvl_rt.quantize.calibration import (
    CalibrationPrompt,
    LayerRunner,
    chosen_rows,
    digest_of,
    embed_prompts,
    prepare_prompts,
)
from internvl_rt.quantize.layer import relative_error, round_layer, rounded_layer, run_and_record, search_layer
from internvl_rt.quantize.layer_file import stored_dtype, tensors_of
from internvl_rt.quantize.options import GROUPS, QuantiseOptions
from internvl_rt.quantize.questions import read_questions
from internvl_rt.quantize.rounding import round_fp8
from internvl_rt.quantize.section import build_section, parse_section
from internvl_rt.quantize.source import DenseSource
from internvl_rt.quantize.unfinished import Unfinished, place_of
from internvl_rt.terminal import say

_SHARD_BYTES = 5 << 30
_MAX_SMALL_BYTES = 64 << 20
_SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*")
_VISION_LINEARS = ("qkv", "proj", "fc1", "fc2")


@dataclass(frozen=True, slots=True)
class LayerError:
    """How far a rounded decoder layer is from the dense one, relative to what it adds to a token (mean over tokens).

    nearest: without a search. searched: as it was written; None where nothing is searched.
    """

    nearest: float
    searched: float | None


@dataclass(frozen=True, slots=True)
class Quantised:
    """What `quantise` has written.

    layers: errors of the decoder's layers; empty: they were not measured
    agreement: of greedy answers with the dense model; a text: why they were not compared; None: not asked for
    """

    folder: Path
    num_bytes: int
    dense_bytes: int
    layers: tuple[LayerError, ...]
    agreement: Agreement | str | None


def quantise(
    model: str | Path,
    out: str | Path,
    scheme: Literal["fp8", "w4a16"],
    *,
    calibration: str | Path | None = None,
    group_size: int | None = None,
    asymmetric: bool = False,
    vision: bool = False,
    compare: bool = True,
    device: str = "auto",
    on_written: Callable[[Quantised], None] | None = None,
) -> Quantised:
    """Writes the folder `out`, whole or not at all; called again with the same arguments it goes on where it ended.

    model: a folder, a hub id or "tiny": dense weights of either format, whose names the result keeps.
    scheme, group_size, asymmetric, vision: as `QuantiseOptions` explains them.
    calibration: a folder of pictures with questions (docs/quantisation.md); None: the sample pictures of the package.
    compare: whether greedy answers are compared with the dense model's, and with "fp8" the errors of layers.
    on_written: called with the result, which has no `agreement` yet, before answers are compared.

    It takes the memory of one decoder layer in float32, and before of the vision tower; "fp8" without `compare` needs
    no pictures and less. Raises RequestError, CheckpointError, ConfigError or MediaError before work starts, and
    CheckpointError later for numbers that are not finite.
    """
    options = QuantiseOptions(scheme=scheme, group_size=group_size, asymmetric=asymmetric, vision=vision)
    runs_prompts = options.runs_prompts(compare, calibration)
    target = choose_device(EngineOptions(device=device).device)
    questions = read_questions(None if calibration is None else Path(calibration)) if runs_prompts else []
    source = DenseSource(model)
    section = build_section(options, source.dialect)
    job = _Job(source, options, section, target, prepare_prompts(source, questions))
    out = place_of(out)
    arguments = {
        **asdict(options),
        "group_size": options.group if options.scheme == "w4a16" else None,
        "model": str(source.folder.resolve()),
        "weights": source.digest(),
        "calibration": digest_of(job.prompts),
    }
    unfinished = Unfinished(out, arguments)
    unfinished.find()
    job.check_room(unfinished)
    with unfinished.begin():
        job.write(unfinished)
        unfinished.finish()
    checkpoint = open_checkpoint(out)
    written = Quantised(
        folder=out,
        num_bytes=sum(entry.num_bytes for entry in checkpoint.entries.values()),
        dense_bytes=sum(entry.num_bytes for entry in source.checkpoint.entries.values()),
        layers=tuple(LayerError(one["nearest"], one["searched"]) for one in unfinished.done if "nearest" in one),
        agreement=None,
    )
    if on_written is not None:
        on_written(written)
    return replace(written, agreement=compare_answers(source.folder, out, questions, device) if compare else None)


class _Job:
    """The layers that are to be written, and how. Each layer becomes a file of its own."""

    def __init__(
        self,
        source: DenseSource,
        options: QuantiseOptions,
        section: Mapping[str, Any],
        device: torch.device,
        prompts: Items[CalibrationPrompt],
    ) -> None:
        """prompts: none: layers are rounded unseen. Raises RequestError for a width that the group does not divide."""
        self.source, self.options, self.device, self.prompts = source, options, device, prompts
        self._section = section
        config = source.config
        towers = {"vision": config.vision.num_layers} if options.vision else {}
        towers["decoder"] = config.decoder.num_layers
        self._layers = [f"{tower}.layers.{index}." for tower, count in towers.items() for index in range(count)]
        if options.scheme == "w4a16":
            self._check_widths()
        self._plan = plan_file(config, source.dialect, parse_section(section))
        in_layers = {name for prefix in self._layers for name in source.names_below(prefix)}
        self._rest = self._split({name: e for name, e in source.checkpoint.entries.items() if name not in in_layers})
        self._row_ids, self._is_visual_R = chosen_rows(prompts)

    def _check_widths(self) -> None:
        for name in self.source.names_below("decoder.layers."):
            shape, path = self.source.plan[name].shape, self.source.plan[name].placements[0].parameter
            is_odd = self.options.asymmetric and shape[0] % 8 != 0
            if path.endswith("weight_NK") and (shape[1] % self.options.group or is_odd):
                smaller = [group for group in GROUPS if shape[1] % group == 0 and not is_odd]
                remedy = f"choose group_size {' or '.join(map(str, smaller))}, or 'fp8'" if smaller else "choose 'fp8'"
                raise RequestError(
                    f"{name} is {shape[0]} x {shape[1]}, but 4-bit numbers need a multiple of the group's "
                    f"{self.options.group} columns, and of 8 rows where there are zero points; {remedy}"
                )

    def _split(self, entries: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Splits what is copied into files of at most 5 GiB, of one tensor at least."""
        files: list[dict[str, Any]] = [{}]
        for name, entry in entries.items():
            if files[-1] and sum(one.num_bytes for one in files[-1].values()) + entry.num_bytes > _SHARD_BYTES:
                files.append({})
            files[-1][name] = entry
        return files

    def check_room(self, unfinished: Unfinished) -> None:
        """Raises CheckpointError if the disk cannot hold what will be written."""
        entries, num_bytes = self.source.checkpoint.entries, 0
        for name, stored in self._plan.tensors.items():
            is_dense = stored.dtypes == FLOATS
            if is_dense and name in entries:
                num_bytes += entries[name].num_bytes
            else:
                num_bytes += math.prod(stored.shapes[0]) * (4 if is_dense else stored.dtypes[0].itemsize)
        width = self.source.config.decoder.hidden_size
        num_bytes += 2 * sum(map(len, self.prompts)) * width * 4 + _MAX_SMALL_BYTES
        parent = unfinished.out.parent
        try:
            parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise RequestError(f"{parent} is no folder; give OUT a place in one") from None
        free = shutil.disk_usage(parent).free + unfinished.num_bytes()
        if free < num_bytes:
            raise CheckpointError(f"{parent} has {free:,} bytes free, but this takes {num_bytes:,}; make room")

    def write(self, unfinished: Unfinished) -> None:
        """Writes all layers that an earlier run has not written, and then the other files."""
        total, num_done = len(self._layers) + len(self._rest), len(unfinished.done)
        files = [unfinished.model / f"model-{n:05}-of-{total:05}.safetensors" for n in range(1, total + 1)]
        work = list(zip(self._layers, files, strict=False))[num_done:]
        how: dict[str, Any] = {"initial": num_done, "total": len(self._layers), "unit": "layer", "disable": None}
        with tqdm(work, "quantise", **how) as bar:
            states, runner = self._begin_states(unfinished), LayerRunner(self.source, self.prompts, self.device)
            for prefix, file in bar:
                if prefix.startswith("vision."):
                    tensors, report = self._round_vision_layer(prefix), {"layer": prefix}
                else:
                    tensors, report, states = self._round_decoder_layer(prefix, runner, states)
                    self._keep_states(unfinished, states, len(unfinished.done) + 1)
                unfinished.write_tensors(file, tensors)
                unfinished.finish_layer(report)
                error = report.get("nearest") if report.get("searched") is None else report["searched"]
                text = "" if error is None else f"error {error:.2%}"
                bar.set_postfix_str(text)
                if bar.disable:  # stderr is no terminal
                    say(f"quantise: layer {len(unfinished.done)} of {len(self._layers)} {text}".rstrip())
        for file, entries in zip(files[len(self._layers) :], self._rest, strict=True):
            unfinished.copy_tensors(file, entries, self.source.read_tensor)
        self._write_others(unfinished, files)

    def _round_decoder_layer(
        self, prefix: str, runner: LayerRunner, states: list[Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Any], list[Tensor]]:
        """Returns what is written of a layer, its report, and the states behind the dense layer."""
        source, options = self.source, self.options
        index = int(prefix.split(".")[2])
        layer: DecoderLayer = source.read(prefix, device=self.device).decoder.layers[index]
        dtype, report = stored_dtype(source, prefix), dict[str, Any](layer=prefix)
        written, rounded = layer, round_layer(layer, options, dtype)
        if self.prompts:
            with torch.inference_mode():
                right, inputs = run_and_record(runner, layer, states, self._row_ids)

                def error() -> float:
                    found = runner.run(rounded_layer(written, rounded, options), states)
                    return relative_error(self.prompts, states, right, found)

                report |= {"nearest": error(), "searched": None}
                if options.scheme == "w4a16":
                    is_visual_R = torch.from_numpy(self._is_visual_R).to(self.device)
                    written, rounded = search_layer(layer, inputs, is_visual_R, source.config.decoder, options, dtype)
                    report["searched"] = error()
            states = right
        return tensors_of(source, prefix, written, rounded), report, states

    def _round_vision_layer(self, prefix: str) -> dict[str, Tensor]:
        source = self.source
        layer: VisionLayer = source.read(prefix, device=self.device).vision.layers[int(prefix.split(".")[2])]
        dtype = stored_dtype(source, prefix)
        rounded = {name: round_fp8(getattr(layer, name).weight_NK, dtype) for name in _VISION_LINEARS}
        return tensors_of(source, prefix, layer, rounded)

    def _begin_states(self, unfinished: Unfinished) -> list[Tensor]:
        """Returns what enters the first decoder layer that is not written."""
        done = len(unfinished.done)
        if not self.prompts or done == len(self._layers):
            return []
        if not any(one["layer"].startswith("decoder.") for one in unfinished.done):
            return embed_prompts(self.source, self.prompts, self.device)
        file = _states_file(unfinished, done)
        kept = Checkpoint(unfinished.folder, read_header(file))
        states = []
        for index in range(len(self.prompts)):
            states.append(torch.empty(kept.entries[str(index)].shape, device=self.device))
            kept.read_into(str(index), states[-1])
        return states

    def _keep_states(self, unfinished: Unfinished, states: Items[Tensor], done: int) -> None:
        """Writes what enters the next layer, for a run that goes on, and drops what entered this one."""
        if not self.prompts:
            return
        unfinished.write_tensors(
            _states_file(unfinished, done), {str(index): state for index, state in enumerate(states)}
        )
        _states_file(unfinished, done - 2).unlink(missing_ok=True)

    def _write_others(self, unfinished: Unfinished, files: Items[Path]) -> None:
        """Writes the index, config.json and copies of the small files, and checks what will be the result."""
        headers = {file: read_header(file) for file in files}
        sizes = {name: entry.num_bytes for header in headers.values() for name, entry in header.items()}
        weight_map = {name: file.name for file, header in headers.items() for name in header}
        folder = unfinished.model
        for pattern in _SMALL_FILES:
            for file in self.source.folder.glob(pattern):
                if file.is_file() and file.stat().st_size <= _MAX_SMALL_BYTES and not file.name.endswith(".index.json"):
                    shutil.copyfile(file, folder / file.name)
        values = read_json(self.source.folder / "config.json").values
        unfinished.write_text(folder / "config.json", {**values, "quantization_config": self._section})
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        unfinished.write_text(folder / "model.safetensors.index.json", index)
        config = replace(self.source.config, quantization=load_config(folder).quantization)
        check_tensors(open_checkpoint(folder), config, self.source.dialect, self._plan)


def _states_file(unfinished: Unfinished, done: int) -> Path:
    return unfinished.folder / f"states-{done}.safetensors"

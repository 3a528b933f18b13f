"""Sets a device's constants from a file of results, and says how far predictions are from what was measured.

Rates and node times are read from the roofline's rows. The other constants are set together, by least squares of the
logarithm of predicted over measured time, over three kinds of rows: kernels alone (cold, in a graph); decode steps, and
the kernels of a profiled step; prompts. Each kind has the same weight. An error above HUBER counts linearly, so a
few rows that the model does not describe change little. A constant on which hardly any row depends keeps its value.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import numpy as np
from launch_model import Device, predict
from step_plans import Operation, Step, decode_step, planned, prompt_step

from internvl_rt.bench.document import DocumentError, rows_of
from internvl_rt.bench.kernel_cases import engine_products
from internvl_rt.kernels._contract import Case, KernelSpec
from internvl_rt.kernels.decode_attention import SPEC as DECODE_ATTENTION
from internvl_rt.kernels.embed_tokens import SPEC as EMBED_TOKENS
from internvl_rt.kernels.gemm_epilogue import SPEC as GEMM_EPILOGUE
from internvl_rt.kernels.gemv import SPEC as GEMV
from internvl_rt.kernels.gemv_qkv import SPEC as GEMV_QKV
from internvl_rt.kernels.prefill_attention import SPEC as PREFILL_ATTENTION
from internvl_rt.kernels.qkv_rope_kv import SPEC as QKV_ROPE_KV
from internvl_rt.kernels.rms_norm import SPEC as RMS_NORM
from internvl_rt.kernels.swiglu import SPEC as SWIGLU

SPECS = (DECODE_ATTENTION, EMBED_TOKENS, GEMV, GEMV_QKV, PREFILL_ATTENTION, QKV_ROPE_KV, RMS_NORM, SWIGLU)
READ = {  # constants that are rows of the roofline: name and unit of the row
    "read_gb_s": ("read", "gb_s"),
    "product_tflops": ("product/bfloat16", "tflops"),
    "node_us": ("graph_node", "median_us"),
    "node_pdl_us": ("graph_node_pdl", "median_us"),
    "graph_start_us": ("single_node", "median_us"),
    "eager_us": ("launch", "median_us"),
    "eager_triton_us": ("triton_launch", "median_us"),
}
FITTED = (
    "latency_us", "input_us", "cores_tflops", "cores_us", "cores_program_us", "matrix_us", "matrix_program_us",
    "exchange_us", "part_us", "attention_us", "softmax_g_s", "key_block_us", "cublas_us", "cublas_share",
    "host_step_us", "host_prompt_us",
)  # fmt: skip
HUBER = 0.1  # of the logarithm
LEAST = 0.15  # how much the logarithms must change, all rows together, when a constant changes by its size
HOLD = 0.05  # how much the square of the logarithm by which a constant leaves its guess counts beside squared errors
NUDGE, MOST_STEP, LEAST_STEP, ROUNDS = 0.01, 0.3, 1e-5, 60
KINDS = ("kernel", "step", "prompt")

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class Observation:
    name: str
    kind: str  # one of KINDS
    measured_us: float
    predict_us: Callable[[Device], float]

    def log_error(self, device: Device) -> float:
        return float(np.log(self.predict_us(device) / self.measured_us))


def operation_us(operation: Operation, device: Device) -> float:
    return sum(sum(predict(work, device).values()) for work in operation.works)


def decode_us(step: Step, pdl: bool, device: Device) -> float:
    """The host prepares a step while the device works on the one before, so the longer of both counts."""
    return max(step.gpu_us(device, pdl=pdl), step.host_us(device))


def prompt_us(step: Step, device: Device) -> float:
    """One prompt alone: the device waits until the host has prepared it."""
    return device.host_prompt_us + step.gpu_us(device)


def part_us(step: Step, kernel: str, pdl: bool, device: Device) -> float:
    """The time of all launches of one kernel in a step."""
    works = [(op.times, work) for op in step.operations for work in op.works if work.kernel == kernel]
    return sum(times * sum(predict(work, device, pdl=pdl).values()) for times, work in works)


def observations(document: Mapping[str, Any], without: Sequence[str] = ()) -> list[Observation]:
    """What a file of results measured that the model describes. without: patterns of names to leave out."""
    found = [*_kernels(document), *_steps(document), *_prompts(document)]
    return [each for each in found if not any(fnmatchcase(each.name, pattern) for pattern in without)]


def observations_of(documents: Mapping[str, Mapping[str, Any]], without: Sequence[str]) -> list[Observation]:
    """The same of several files by name; of rows with one name that of the last file counts."""
    found: dict[str, Observation] = {}
    for document in documents.values():
        found |= {each.name: each for each in observations(document, without)}
    return list(found.values())


def _kernels(document: Mapping[str, Any]) -> Iterator[Observation]:
    cases: dict[str, tuple[KernelSpec, Case]] = {
        f"{spec.name}/{case.name}/bfloat16": (spec, case) for spec in SPECS for case in spec.model_cases
    }
    products = {f"gemm_epilogue/{case.name}/bfloat16": case for case in engine_products() if "tiles" not in case.name}
    for row in rows_of(document, "kernels"):
        name, baseline = str(row.get("name")), row.get("baseline")
        if "median_us" not in row:
            continue
        if name in products:
            operation = planned(GEMM_EPILOGUE, dict(products[name].sizes), name)
            # torch adds a residual in place in the engine, but not in this bench, where the product alone is nearer
            wanted = "cublas alone" if not operation.launches else None
        elif name in cases:
            operation, wanted = planned(cases[name][0], dict(cases[name][1].sizes), name), None
        else:
            continue
        if baseline == wanted:
            yield Observation(name, "kernel", row["median_us"], partial(operation_us, operation))


def _steps(document: Mapping[str, Any]) -> Iterator[Observation]:
    for row in rows_of(document, "decode"):
        found = re.fullmatch(r"decode/([^/]+)/(\d+)x(\d+)(-[^/]*)?/bfloat16", str(row.get("name")))
        if found and "median_us" in row:
            step = decode_step(found[1], int(found[2]), int(found[3]))
            how = row.get("programmatic_launch", True)
            yield Observation(row["name"], "step", row["median_us"], partial(decode_us, step, how))
    for row in rows_of(document, "step_kernels"):
        if row["in"] not in ("step_1b", "step_1b_without_pdl"):
            continue
        step, pdl = decode_step("InternVL3-1B", 1, 2048), row["in"] == "step_1b"
        works = [work for op in step.operations for work in op.works]
        if row["name"] in {work.kernel for work in works if work.pdl}:  # the others stand at the ends of a step
            name = f"{row['in']}/{row['name']}"
            yield Observation(name, "step", row["step_us"], partial(part_us, step, row["name"], pdl))


def _prompts(document: Mapping[str, Any]) -> Iterator[Observation]:
    for row in rows_of(document, "prefill"):
        found = re.fullmatch(r"prefill/([^/]+)/(\d+)_tokens/bfloat16", str(row.get("name")))
        if found and "prefill_median_us" in row:
            step = prompt_step(found[1], int(found[2]))
            yield Observation(row["name"], "prompt", row["prefill_median_us"], partial(prompt_us, step))


def read_roofline(device: Device, documents: Mapping[str, Mapping[str, Any]]) -> Device:
    """Returns the device with the constants that are rows of the roofline. The last file counts."""
    rows = {row.get("name"): row for document in documents.values() for row in rows_of(document, "roofline")}
    values = {key: rows[name][unit] for key, (name, unit) in READ.items() if unit in rows.get(name, {})}
    return replace(device, **values, sources={**device.sources, **dict.fromkeys(values, "read: roofline")})


def fit(device: Device, found: Sequence[Observation], hold: float = HOLD) -> tuple[Device, list[str]]:
    """Returns the device with fitted constants, and the names of those that the observations do not determine.

    Gauss and Newton's method on the logarithms of the constants, from the guesses on. Every step must lessen the sum of
    squares, or it is halved. hold: how much it counts that a constant leaves its guess; see HOLD.
    """
    if not found:
        raise DocumentError("expected rows of kernels, decode steps or prompts, got none that the model describes")
    kinds = Counter(each.kind for each in found)
    share = np.array([len(found) / len(kinds) / kinds[each.kind] for each in found])
    guessed = replace(device, **{name: device.guesses[name] for name in FITTED})
    slope_of_all = _slopes(guessed, FITTED, found)
    sizes = dict(zip(FITTED, np.linalg.norm(slope_of_all, axis=0).tolist(), strict=True))
    names = [name for name in FITTED if sizes[name] >= LEAST]
    undetermined = [name for name in FITTED if sizes[name] < LEAST]
    fitted = replace(guessed, **{name: getattr(device, name) for name in undetermined})
    guess = np.log([getattr(guessed, name) for name in names])

    def loss(candidate: Device) -> float:
        size, moved = np.abs(_errors(candidate, found)), _logs(candidate, names) - guess
        squares = np.where(size < HUBER, size**2, HUBER * (2 * size - HUBER))
        return float((share * squares).sum() + hold * (moved**2).sum())

    for _ in range(ROUNDS if names else 0):
        error, slope, logs = _errors(fitted, found), _slopes(fitted, names, found), _logs(fitted, names)
        weight = share * np.minimum(1.0, HUBER / np.maximum(np.abs(error), 1e-12))
        curvature = (slope.T * weight) @ slope + hold * np.eye(len(names))
        pull = slope.T @ (weight * error) + hold * (logs - guess)
        step = -np.linalg.solve(curvature, pull).clip(-MOST_STEP, MOST_STEP)
        while np.abs(step).max() > LEAST_STEP and loss(_at(fitted, names, logs + step)) >= loss(fitted):
            step = step / 2
        if np.abs(step).max() <= LEAST_STEP:
            break
        fitted = _at(fitted, names, logs + step)
    sources = {**device.sources, **dict.fromkeys(names, "fitted")}
    return replace(fitted, sources=sources), undetermined


def _errors(device: Device, found: Sequence[Observation]) -> Array:
    return np.array([each.log_error(device) for each in found])


def _logs(device: Device, names: Sequence[str]) -> Array:
    return np.log([getattr(device, name) for name in names])


def _at(device: Device, names: Sequence[str], logs: Array) -> Device:
    return replace(device, **dict(zip(names, np.exp(logs).tolist(), strict=True)))


def _slopes(device: Device, names: Sequence[str], found: Sequence[Observation]) -> Array:
    """How the logarithm of each observation's prediction changes with that of each constant."""
    logs, before = _logs(device, names), _errors(device, found)
    nudged = [_errors(_at(device, names, logs + NUDGE * unit), found) for unit in np.eye(len(names))]
    return np.stack([(after - before) / NUDGE for after in nudged], axis=1)


def summary(device: Device, found: Sequence[Observation]) -> list[tuple[str, int, float, float, str]]:
    """For each kind: its name, how many, the median error, the worst ratio of predicted to measured, and of what."""
    lines = []
    for kind in KINDS:
        logs = [(each.log_error(device), each.name) for each in found if each.kind == kind]
        if logs:
            worst, name = max(logs, key=lambda pair: abs(pair[0]))
            median = float(np.exp(np.median([abs(log) for log, _ in logs]))) - 1
            lines.append((kind, len(logs), median, float(np.exp(worst)), name))
    return lines

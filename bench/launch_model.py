"""One model of what a launch costs: constants of a device by name, and `predict`, which is all the arithmetic.

    time = boundary + first load + the longest of (bytes over the device's rate, bytes of the busiest multiprocessor,
           arithmetic) + start and end + changes of programs + exchange and sum of partial results

The constants of each device are in bench/device_costs.json, each with where it comes from: the data sheet, a guess
("assumed"), or files of results (bench/launch_fit.py).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

COSTS = Path(__file__).with_name("device_costs.json")
NUM_SMS = 132  # multiprocessors of an H100 and of an H200
# The most bytes of weights that idle programs of attention bring to L2, which is two halves of 25 MB.
PREFETCHED_BYTES = 20e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What a device costs. The end of a name is its unit: gb_s is 1e9 bytes a second, g_s 1e9 a second."""

    name: str
    fitted_to: Mapping[str, list[str]]  # "files" of bench/results, and "without": patterns of rows that were left out
    sources: Mapping[str, str]  # where each constant is from
    guesses: Mapping[str, float]  # where a fit starts, of the constants that are fitted
    sheet_gb_s: float  # memory bandwidth of the data sheet; floors are computed from it
    sheet_tflops: float  # dense bfloat16 of the data sheet, for floors
    read_gb_s: float  # rate at which a large tensor is read
    product_tflops: float  # rate of a large bfloat16 product
    node_us: float  # from one small kernel of a graph to the next
    node_pdl_us: float  # the same with programmatic dependent launch
    graph_start_us: float  # a graph of one small kernel between two events: how a replay begins
    eager_us: float  # host's time for a launch of torch
    eager_triton_us: float  # host's time for a launch of Triton
    latency_us: float  # first load from device memory
    input_us: float  # first load of what the previous kernel wrote, or of an index that the next load waits for
    sm_gb_s: float  # the most that one multiprocessor takes from L2
    l2_gb_s: float  # the most that all of them take from L2, for weights that were brought there
    cores_tflops: float  # products of one or two rows, on CUDA cores
    cores_us: float  # start, reduction and store of such a product
    cores_program_us: float  # change from the programs that a multiprocessor runs at once to the next as many, there
    matrix_us: float  # start, reduction and store of a product on matrix units
    matrix_program_us: float  # the same there
    exchange_us: float  # partial results to memory, a counter, and partial results back
    part_us: float  # adding one partial result of split attention
    attention_us: float  # start and end of decode attention: scores, softmax, sum and store of a first block of keys
    softmax_g_s: float  # exponentials of attention with what surrounds them
    key_block_us: float  # 64 keys in one program of prefill attention, one block after the other
    cublas_us: float  # start and end of a product of cuBLAS
    cublas_share: float  # of the device's rates, that cuBLAS reaches
    draw_us: float  # the second kernel of a plain draw
    host_step_us: float  # host's time for a decode step of one sequence
    host_sequence_us: float  # host's time for each further sequence
    host_prompt_us: float  # host's time for a step with a prompt until its layers run
    replay_us: float  # host's time for the launch of a graph
    early_trigger_saves_us: float  # of a boundary, if the next launch is triggered first (experiment)


CONSTANTS = tuple(each.name for each in fields(Device) if each.type is float)


def load_devices(path: Path = COSTS) -> dict[str, Device]:
    """All devices of the file by name."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    return {name: _device(name, entry["fitted_to"], entry["costs"]) for name, entry in stored.items()}


def _device(name: str, fitted_to: Mapping[str, list[str]], costs: Mapping[str, Mapping[str, Any]]) -> Device:
    constants = {key: each["value"] for key, each in costs.items()}
    sources = {key: each["from"] for key, each in costs.items()}
    guesses = {key: each["guess"] for key, each in costs.items() if "guess" in each}
    return Device(name=name, fitted_to=fitted_to, sources=sources, guesses=guesses, **constants)


def save_devices(devices: Mapping[str, Device], path: Path = COSTS) -> None:
    """Writes a line for each constant, with four digits."""
    entries = []
    for name, device in devices.items():
        costs = []
        for key in CONSTANTS:
            cost: dict[str, Any] = {"value": float(f"{getattr(device, key):.4g}"), "from": device.sources[key]}
            cost |= {"guess": device.guesses[key]} if key in device.guesses else {}
            costs.append(f"   {json.dumps(key)}: {json.dumps(cost)}")
        head = f' {json.dumps(name)}: {{\n  "fitted_to": {json.dumps(device.fitted_to)},\n  "costs": {{\n'
        entries.append(head + ",\n".join(costs) + "\n  }\n }")
    path.write_text("{\n" + ",\n".join(entries) + "\n}\n", encoding="utf-8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a launch does, as far as its time depends on it."""

    kernel: str
    bytes: float
    flops: float = 0.0
    programs: int = 1  # with something to do
    rounds: int = 1  # programs (of a persistent kernel: blocks) that the busiest multiprocessor takes in all
    resident: int = 1  # programs that a multiprocessor runs at once
    in_flight: float = math.inf  # bytes that a program has on their way
    unit: str = ""  # "cores", "matrix", "attention", "cublas": whose start and end it has; "": none to speak of
    pdl: bool = False  # may start before the previous kernel has ended
    weights_first: bool = False  # then it also loads its first weights before that
    looks_up: bool = False  # its first load waits for an index (which it reads before that end, too)
    looks_up_late: bool = False  # its first load waits for an index that it reads after that end
    exchanges: bool = False  # programs leave partial results for the last one
    parts: int = 0  # results that the last one adds up one after the other
    exponentials: float = 0.0
    key_blocks: int = 0  # that a program of prefill attention works on one after the other
    draws: bool = False


def predict(
    work: Work, device: Device, *, pdl: bool = True, early: bool = False, in_l2: float = 0.0
) -> dict[str, float]:
    """Predicts the microseconds of a launch in a graph, by what they are spent on.

    pdl: whether programmatic dependent launch is on. early: whether the next launch is triggered first.
    in_l2: bytes that were brought to L2 before.
    """
    pdl = pdl and work.pdl
    boundary = device.node_pdl_us - early * device.early_trigger_saves_us if pdl else device.node_us
    first = device.input_us if pdl and work.weights_first else device.latency_us
    first += device.input_us if work.looks_up_late or (work.looks_up and not pdl) else 0.0
    stream = (work.bytes - in_l2) / (1e3 * device.read_gb_s) + in_l2 / (1e3 * device.l2_gb_s)
    busiest = busiest_us(work, device)
    arithmetic = arithmetic_us(work, device)
    longest = max(stream, busiest, arithmetic)
    ends, per_program = {
        "cores": (device.cores_us, device.cores_program_us),
        "matrix": (device.matrix_us, device.matrix_program_us),
        "attention": (device.attention_us, 0.0),
        "cublas": (device.cublas_us + longest / device.cublas_share - longest, 0.0),
    }.get(work.unit, (0.0, 0.0))
    return {
        "boundary": boundary,
        "first load": first,
        "bytes": stream,
        "busiest multiprocessor": max(stream, busiest) - stream,
        "arithmetic": longest - max(stream, busiest) + work.draws * device.draw_us,
        "start and end": ends,
        "change of programs": -(-work.rounds // work.resident) * per_program,
        "exchange": work.exchanges * device.exchange_us,
        "sum of parts": work.parts * device.part_us,
    }


def busiest_us(work: Work, device: Device) -> float:
    """The time of the multiprocessor that has most programs; by Little's law it takes its bytes in flight a latency."""
    if work.unit == "cublas" or not work.bytes:
        return 0.0
    on_busiest = -(-work.programs // NUM_SMS)
    its_bytes = on_busiest * work.bytes / work.programs
    flying = min(its_bytes, min(work.resident, on_busiest) * work.in_flight)
    most = 1e3 * device.sm_gb_s
    return flying / most + (its_bytes - flying) / min(most, flying / device.latency_us)


def arithmetic_us(work: Work, device: Device) -> float:
    if work.unit == "cores":
        return work.flops / (1e6 * device.cores_tflops)
    busy = min(1.0, work.programs / NUM_SMS) if work.key_blocks else 1.0
    products = work.flops / (1e6 * device.product_tflops) + work.exponentials / (1e3 * device.softmax_g_s)
    return max(products / busy, work.key_blocks * device.key_block_us)

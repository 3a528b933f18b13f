"""`internvl-rt bench roofline` measures the most that a device can do, with which other benches compare their numbers.

Bandwidths count bytes read and bytes written. A copy's rate is that of the faster of a memcpy and an element-wise
kernel; its size counts source and target, so that a kernel finds its roof by the bytes that it moves. Product rates are
those of torch's library in large square products of random numbers; float32 is true float32, not TF32; float8 uses the
hardware's fast accumulation. On CUDA everything starts with L2 emptied, except the products and the gaps between
launches.

A CPU has no graphs and no matrix units for float8; it has none of these figures.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from internvl_rt.bench.record import print_document
from internvl_rt.bench.timing import Timing, time_variants
from internvl_rt.engine.loading import choose_device
from internvl_rt.kernels._probes import EXP2_BLOCK, EXP2_FIXED_POINT, EXP2_STEPS, exp2_kernel, node_kernel

MIB = 2**20
MAX_SETS = 64  # the most buffers that a small copy goes through
LAUNCHES = 500  # calls in a row; a stream takes twice as many before the host has to wait
FEW_NODES, MANY_NODES = 100, 900
NEEDED = {"copy_gb_s", "read_gb_s", "tflops"}  # a roofline must have these
UNITS = {"_gb_s": "gb_s", "_us": "median_us", "_g_per_s": "g_per_s"}  # the field of a row by the ending of its name


@dataclass(frozen=True, slots=True)
class Sizes:
    copy_mib: tuple[int, ...]  # bytes read and written
    rotated_mib: int  # memory that small copies go through in a sample
    read_mib: int
    product: int  # the side of the square matrices
    float32_product: int
    exp2_rounds: int  # rounds of EXP2_STEPS each
    budget_s: float  # seconds of each measurement


SIZES = {  # by kind of device and `quick`
    ("cuda", False): Sizes((1, 4, 16, 64, 256, 1024, 4096), 256, 1024, 8192, 4096, 256, 0.5),
    ("cuda", True): Sizes((1, 16, 256, 1024), 256, 1024, 8192, 4096, 256, 0.2),
    ("cpu", False): Sizes((1, 16, 256), 256, 256, 1024, 1024, 64, 0.5),
    ("cpu", True): Sizes((1, 4), 4, 4, 128, 128, 1, 0.02),
}


def measure_roofline(device: torch.device, *, quick: bool) -> dict[str, Any]:
    """Returns roofs by name. A roof that the device does not have, or whose measurement failed (on stderr), is absent.

    copy_gb_s          by str(bytes read and written)
    read_gb_s          the faster of a sum and a product of a matrix and a vector
    tflops             by dtype's name: float32, bfloat16, float16, and float8_e4m3fn from compute capability 8.9
    launch_us          from one small torch operation to the next, launched eagerly in a row; on the CPU, one call
    triton_launch_us   the same for a Triton kernel
    graph_node_us      from one small kernel to the next in a graph
    graph_node_pdl_us  the same with programmatic dependent launch, from compute capability 9.0
    single_node_us     between two events around a graph of one small kernel; a time near it is hardly the kernel's own
    exp2_g_per_s       exponentials, in billions
    """
    sizes = SIZES[device.type, quick]
    measures: dict[str, Callable[[], object]] = {
        "copy_gb_s": partial(_copy_rates, device, sizes),
        "read_gb_s": partial(_read_rate, device, sizes),
        "tflops": partial(_product_rates, device, sizes),
        "exp2_g_per_s": partial(_exp2_rate, device, sizes),
        "launch_us": partial(_launch_us, torch.ones(1, device=device), device, sizes),
    }
    if device.type == "cuda":
        node = _node(device, pdl=False)
        measures["triton_launch_us"] = partial(_in_a_row, node, device, sizes)
        measures["single_node_us"] = partial(_single_node_us, node, device, sizes)
        measures["graph_node_us"] = partial(_graph_node_us, node, device, sizes)
        if torch.cuda.get_device_capability(device) >= (9, 0):
            measures["graph_node_pdl_us"] = partial(_graph_node_us, _node(device, pdl=True), device, sizes)
    found = {}
    for name, measure in measures.items():
        try:
            found[name] = measure()
        except Exception as error:  # of any library; one roof that fails must not take the others with it
            if name in NEEDED:
                raise
            print(f"{name}: not measured: {error}", file=sys.stderr)
    return found


def _copy_rates(device: torch.device, sizes: Sizes) -> dict[str, float]:
    variants: dict[str, Sequence[Callable[[], object]]] = {}
    all_moved = [n * MIB for n in sizes.copy_mib]
    for moved in all_moved:
        num_sets = min(MAX_SETS, max(1, sizes.rotated_mib * MIB // moved))
        sources = [torch.rand(moved // 8, device=device) for _ in range(num_sets)]
        pairs = [(source, torch.empty_like(source)) for source in sources]
        variants[f"memcpy/{moved}"] = [partial(target.copy_, source) for source, target in pairs]
        variants[f"kernel/{moved}"] = [partial(torch.neg, source, out=target) for source, target in pairs]
    timings = time_variants(variants, device, budget_s=2 * sizes.budget_s)
    return {
        str(moved): moved / 1e3 / min(timings[f"{how}/{moved}"].median_us for how in ("memcpy", "kernel"))
        for moved in all_moved
    }


def _read_rate(device: torch.device, sizes: Sizes) -> float:
    matrix = torch.rand(sizes.read_mib * MIB // 8192, 4096, device=device).to(torch.bfloat16)
    vector = torch.rand(4096, device=device).to(torch.bfloat16)
    words = matrix.view(torch.int32)  # torch sums integers without converting them
    variants = {"sum": partial(torch.sum, words, dtype=torch.int32), "product": partial(torch.mv, matrix, vector)}
    timings = time_variants(variants, device, budget_s=sizes.budget_s)
    return sizes.read_mib * MIB / 1e3 / min(timing.median_us for timing in timings.values())


def _product_rates(device: torch.device, sizes: Sizes) -> dict[str, float]:
    variants: dict[str, Callable[[], object]] = {}
    sides: dict[str, int] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        sides[name] = side = sizes.float32_product if dtype == torch.float32 else sizes.product
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        variants[name] = partial(torch.matmul, a, b, out=torch.empty_like(a))
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        product = _float8_product(device, sizes.product)
        try:
            product()
        except RuntimeError as error:
            print(f"float8_e4m3fn: not measured: {error}", file=sys.stderr)
        else:
            sides["float8_e4m3fn"], variants["float8_e4m3fn"] = sizes.product, product
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        timings = time_variants(variants, device, budget_s=2 * sizes.budget_s, cold=False)
    finally:
        torch.set_float32_matmul_precision(precision)
    return {name: 2 * sides[name] ** 3 / 1e6 / timing.median_us for name, timing in timings.items()}


def _float8_product(device: torch.device, side: int) -> Callable[[], object]:
    a, b = (torch.randn(side, side, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)
    return partial(torch._scaled_mm, a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)


def _exp2_rate(device: torch.device, sizes: Sizes) -> float:
    num_steps = sizes.exp2_rounds * EXP2_STEPS
    if device.type == "cpu":
        values = torch.rand(sizes.exp2_rounds * 2**14)
        timing = _time(partial(torch.exp2, values, out=torch.empty_like(values)), device, sizes)
        return values.numel() / 1e3 / timing.median_us
    num_programs = 8 * torch.cuda.get_device_properties(device).multi_processor_count  # 8 warps a scheduler
    values = torch.rand(num_programs * EXP2_BLOCK, device=device)
    launch = partial(exp2_kernel[(num_programs,)], values, sizes.exp2_rounds, EXP2_STEPS, EXP2_BLOCK, num_warps=4)
    timing = _time(launch, device, sizes)
    worst = (values - EXP2_FIXED_POINT).abs().max().item()
    assert worst < 1e-4, f"the kernel that counts exponentials is wrong by {worst}"
    return values.numel() * num_steps / 1e3 / timing.median_us


def _node(device: torch.device, *, pdl: bool) -> Callable[[], object]:
    options = {"launch_pdl": True} if pdl else {}
    return partial(node_kernel[(1,)], torch.ones(1, device=device), PDL=pdl, num_warps=1, **options)


def _single_node_us(node: Callable[[], object], device: torch.device, sizes: Sizes) -> float:
    return time_variants({"node": node}, device, budget_s=sizes.budget_s)["node"].median_us


def _graph_node_us(node: Callable[[], object], device: torch.device, sizes: Sizes) -> float:
    graphs = {num_nodes: [node] * num_nodes for num_nodes in (FEW_NODES, MANY_NODES)}
    timings = time_variants({str(n): nodes for n, nodes in graphs.items()}, device, budget_s=sizes.budget_s, cold=False)
    if not all(timing.graphed for timing in timings.values()):
        raise RuntimeError("expected graphs of it, got none")
    few_us, many_us = (n * timings[str(n)].median_us for n in graphs)
    return (many_us - few_us) / (MANY_NODES - FEW_NODES)


def _launch_us(counter: torch.Tensor, device: torch.device, sizes: Sizes) -> float:
    call = partial(counter.add_, 1.0)
    return _in_a_row(call, device, sizes) if device.type == "cuda" else _time(call, device, sizes).median_us


def _in_a_row(call: Callable[[], object], device: torch.device, sizes: Sizes) -> float:
    """Microseconds per call by the host's clock, including the wait for the last call to end."""

    def row() -> None:
        for _ in range(LAUNCHES):
            call()
        torch.cuda.synchronize(device)

    return _time(row, torch.device("cpu"), sizes).median_us / LAUNCHES


def _time(call: Callable[[], object], device: torch.device, sizes: Sizes) -> Timing:
    return time_variants({"": call}, device, budget_s=sizes.budget_s, cold=False)[""]


def rows_of_roofline(roof: Mapping[str, Any]) -> list[dict[str, str | float]]:
    """Flat rows: `copy/<bytes>`, `product/<dtype>`, and the other roofs by their names without the unit."""
    rows: list[dict[str, str | float]] = []
    for name, value in roof.items():
        if name == "copy_gb_s":
            rows += [{"name": f"copy/{moved}", "bytes": int(moved), "gb_s": rate} for moved, rate in value.items()]
        elif name == "tflops":
            rows += [{"name": f"product/{dtype}", "dtype": dtype, "tflops": rate} for dtype, rate in value.items()]
        else:
            suffix, unit = next((suffix, unit) for suffix, unit in UNITS.items() if name.endswith(suffix))
            rows.append({"name": name.removesuffix(suffix), unit: value})
    return rows


def run(args: argparse.Namespace) -> int:
    """Takes the arguments of `internvl-rt bench roofline`. Raises InternVLError for a device that is not there."""
    device = choose_device(args.device)
    roof = measure_roofline(device, quick=args.quick)
    rows = rows_of_roofline(roof)
    for moved, rate in roof.pop("copy_gb_s").items():
        print(f"copy of {int(moved) / MIB:7.0f} MiB, read and written {rate:10.1f} GB/s")
    for dtype, rate in roof.pop("tflops").items():
        print(f"product in {dtype:<31} {rate:10.3f} TFLOP/s")
    for name, value in roof.items():
        print(f"{name:<42} {value:10.3f}")
    print_document("roofline", rows, device, args.json)
    return 0

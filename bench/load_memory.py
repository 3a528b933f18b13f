"""Measures the peak of host memory while a checkpoint is loaded; the bound is the weights plus the largest tensor.

    python bench/load_memory.py [--model InternVL3-1B] [--dtype bfloat16 float32]

It writes a random checkpoint of the model's shape to a temporary folder (or takes `--folder`) and loads it in a fresh
process for each dtype. The peak is VmHWM during loading less VmRSS before it, so mapped files count and only Linux will
do. The last line is JSON; the exit code is 1 if a bound is broken.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from internvl_rt.checkpoint.config import KNOWN_MODELS, load_config
from internvl_rt.checkpoint.folder import open_checkpoint
from internvl_rt.model.internvl import named_parameters
from internvl_rt.model.random_checkpoint import write_random_checkpoint
from internvl_rt.model.weights import load_weights


def measure(folder: Path, dtype: torch.dtype) -> dict[str, float]:
    """Loads `folder` in this process; returns seconds and bytes."""
    config, checkpoint = load_config(folder), open_checkpoint(folder)
    before = _memory_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
    start = time.perf_counter()
    weights = load_weights(checkpoint, config, dtype=dtype, device="cpu")
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "peak_bytes": _memory_bytes("VmHWM") - before,
        "weight_bytes": sum(tensor.nbytes for tensor in named_parameters(weights).values()),
        "largest_tensor_bytes": max(entry.num_bytes for entry in checkpoint.entries.values()),
    }


def _memory_bytes(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match, field
    return int(match[1]) * 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=KNOWN_MODELS, default="InternVL3-1B")
    parser.add_argument("--folder", type=Path, help="an existing checkpoint instead of a random one")
    parser.add_argument("--dtype", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16", "float32"])
    parser.add_argument("--measure", action="store_true", help="load --folder in this process and print JSON")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.folder, getattr(torch, args.dtype[0]))))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch) / args.model
        if args.folder is None:
            write_random_checkpoint(args.model, folder)
        results = {dtype: _measure_apart(folder, dtype) for dtype in args.dtype}
    for dtype, result in results.items():
        bound = result["weight_bytes"] + result["largest_tensor_bytes"]
        result["within_bound"] = result["peak_bytes"] <= bound
        print(
            f"{dtype}: peak {result['peak_bytes'] / 1e6:,.0f} MB, bound {bound / 1e6:,.0f} MB (weights "
            f"{result['weight_bytes'] / 1e6:,.0f} + largest tensor {result['largest_tensor_bytes'] / 1e6:,.0f}), "
            f"{result['seconds']:.1f} s"
        )
    print(json.dumps({"model": args.model if args.folder is None else str(args.folder), **results}))
    return 0 if all(result["within_bound"] for result in results.values()) else 1


def _measure_apart(folder: Path, dtype: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", "--folder", str(folder), "--dtype", dtype]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    result: dict[str, float] = json.loads(output.stdout)
    return result


if __name__ == "__main__":
    sys.exit(main())

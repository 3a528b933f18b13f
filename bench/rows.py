"""Measures what the class rows add to the products of InternViT-300M: 1,025 rows a tile against 1,024 patch rows.

    python bench/rows.py [--budget-s 10] [--device cpu]

cuBLAS multiplies in bfloat16, without an epilogue, for 1 and 13 tiles: all rows as a layer has them ("1025"), the patch
rows alone ("1024"), and all rows in two products ("1024+1"). If 1,025 rows start another wave of blocks, the two
products are faster. The last line is a document of part "kernels", with rows such as product_rows/fc1_1025/bfloat16.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from options import device, seconds
from torch import Tensor

from internvl_rt.bench.kernel_cases import MAX_SETS, ROTATED_BYTES, dtype_name
from internvl_rt.bench.record import result_document
from internvl_rt.bench.timing import time_variants

LAYER = {"qkv": (3072, 1024), "out": (1024, 1024), "fc1": (4096, 1024), "fc2": (1024, 4096)}  # N, K
TILES, PATCHES = (1, 13), 1024
SMALL = ({"out": (64, 64)}, (1,), 64)  # settings for a CPU, to see that it runs
BUDGET_S = 0.05  # seconds of a variant's samples


def multiply(x_RK: Tensor, weight_NK: Tensor, out_RN: Tensor, splits: tuple[slice, ...]) -> None:
    for rows in splits:
        torch.mm(x_RK[rows], weight_NK.t(), out=out_RN[rows])


def measure(name: str, n: int, k: int, tiles: int, patches: int, device: torch.device) -> list[dict[str, Any]]:
    """Returns a row for each way to multiply."""
    dtype = torch.bfloat16
    num_patch_rows, num_rows = tiles * patches, tiles * (patches + 1)
    touched = dtype.itemsize * (num_rows * (n + k) + n * k)
    num_sets = min(MAX_SETS, -(-ROTATED_BYTES // touched)) if device.type == "cuda" else 1

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    sets = [(random(num_rows, k), random(n, k), random(num_rows, n)) for _ in range(num_sets)]
    patch_rows, class_rows = slice(num_patch_rows), slice(num_patch_rows, num_rows)
    ways = {
        f"{num_rows}": (slice(num_rows),),
        f"{num_patch_rows}": (patch_rows,),
        f"{num_patch_rows}+{tiles}": (patch_rows, class_rows),
    }
    variants: dict[str, list[Callable[[], object]]] = {
        way: [partial(multiply, *each, splits) for each in sets] for way, splits in ways.items()
    }
    rows = []
    for way, timing in time_variants(variants, device, budget_s=BUDGET_S * len(variants)).items():
        rows_of_way = sum(map(int, way.split("+")))
        flops, moved = 2 * rows_of_way * n * k, dtype.itemsize * (rows_of_way * (n + k) + n * k)
        row = {"name": f"product_rows/{name}_{way}/{dtype_name(dtype)}", "baseline": "cublas alone"}
        row |= {"median_us": timing.median_us, "low_us": timing.low_us, "high_us": timing.high_us}
        row |= {"graphed": timing.graphed, "tflops": flops / timing.median_us / 1e6, "flops": flops, "bytes": moved}
        rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget-s", type=seconds, default=10, help="for everything (default: %(default)s)")
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    end = time.monotonic() + args.budget_s
    layer, all_tiles, patches = (LAYER, TILES, PATCHES) if args.device.type == "cuda" else SMALL
    rows: list[dict[str, Any]] = []
    left_out = []
    with torch.inference_mode():
        for tiles in all_tiles:
            for name, (n, k) in layer.items():
                if time.monotonic() >= end:
                    left_out.append(f"{name}, {tiles} tiles")
                    continue
                measured = measure(name, n, k, tiles, patches, args.device)
                rows += measured
                whole, alone, apart = (row["median_us"] for row in measured)
                print(
                    f"{name:<4} {tiles:>2} tiles: {whole:8.2f} us, patch rows alone {alone:8.2f} us,"
                    f" patch and class rows apart {apart:8.2f} us",
                    flush=True,
                )
    if left_out:
        print(f"left out, {len(left_out)}, for want of time: {'; '.join(left_out)}")
    print(json.dumps(result_document("kernels", rows, args.device) | {"left_out": left_out}, allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())

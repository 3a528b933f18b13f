"""Times the products of a token on a CPU with each kind of weight, and tells each kind's share of the dense time.

    OMP_NUM_THREADS=2 python bench/quantised_products.py [--model InternVL3-1B] [--rows 1 4 16] [--rounds 60]

All products of the language model are computed with random weights of its shape, lm_head dense as always, and nothing
between them. Kinds take turns, so that a machine whose speed drifts slows all of them. The last line is JSON: medians.
"""

import argparse
import json
import statistics
import time

import torch
from options import count, exit_with

from internvl_rt.checkpoint.config import DecoderConfig
from internvl_rt.checkpoint.find import find_config
from internvl_rt.errors import InternVLError
from internvl_rt.kernels._int4 import pack_int4
from internvl_rt.model.linear import AnyLinear, Linear, Linear4, quantise_to_8_bits
from internvl_rt.model.ops_cpu import cpu_ops

KINDS = ("bfloat16", "int8", "fp8", "4 bits (128)", "4 bits (32, zeros)")


def make(kind: str, n: int, k: int) -> AnyLinear:
    """Draws a weight of one kind, in the layout of a file; its values do not matter to the time."""
    if kind.startswith("4 bits"):
        group = 32 if "32" in kind else 128
        number_NK = torch.randint(0, 16, (n, k), dtype=torch.uint8)
        scale_NG = torch.full((n, -(-k // group)), 1e-3)
        zero_NG = torch.randint_like(scale_NG, 16, dtype=torch.uint8) if "zeros" in kind else None
        return Linear4(pack_int4(number_NK), scale_NG, zero_NG, None, k, group)
    dense = Linear(torch.randn(n, k, dtype=torch.bfloat16), None)
    if kind == "bfloat16":
        return dense
    return quantise_to_8_bits(dense, torch.int8 if kind == "int8" else torch.float8_e4m3fn)


def widths(decoder: DecoderConfig) -> list[tuple[int, int]]:
    """Returns outputs and inputs of the products of a layer."""
    width, mlp = decoder.hidden_size, decoder.intermediate_size
    heads = decoder.num_heads * decoder.head_dim
    qkv = heads + 2 * decoder.num_kv_heads * decoder.head_dim
    return [(qkv, width), (width, heads), (2 * mlp, width), (width, mlp)]


@torch.inference_mode()
def measure(decoder: DecoderConfig, num_rows: list[int], rounds: int) -> dict[int, dict[str, float]]:
    """Returns medians in seconds, of layers by kind and of lm_head, by the number of rows."""
    ops = cpu_ops(torch.device("cpu"), torch.bfloat16)
    layers = {
        kind: [ops.prepare_linear(make(kind, n, k)) for _ in range(decoder.num_layers) for n, k in widths(decoder)]
        for kind in KINDS
    }
    layers["lm_head"] = [ops.prepare_linear(make("bfloat16", decoder.vocab_size, decoder.hidden_size))]
    found: dict[int, dict[str, float]] = {}
    for rows in num_rows:
        times: dict[str, list[float]] = {kind: [] for kind in layers}
        for _ in range(rounds):
            for kind, linears in layers.items():
                inputs = [torch.randn(rows, linear.num_inputs, dtype=torch.bfloat16) for linear in linears]
                start = time.perf_counter()
                for x, linear in zip(inputs, linears, strict=True):
                    ops.product(x, linear, None)
                times[kind].append(time.perf_counter() - start)
        found[rows] = {kind: statistics.median(seconds) for kind, seconds in times.items()}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="InternVL3-1B", help="a name, a folder, or tiny")
    parser.add_argument("--rows", nargs="+", type=count, default=[1, 4, 16])
    parser.add_argument("--rounds", type=count, default=60)
    args = parser.parse_args()
    try:
        decoder = find_config(args.model)[0].decoder
    except InternVLError as error:
        parser.error(str(error))
    found = measure(decoder, args.rows, args.rounds)
    for rows, seconds in found.items():
        head, dense = seconds["lm_head"], seconds["bfloat16"]
        print(f"{rows} rows, {torch.get_num_threads()} threads; lm_head {1e3 * head:.1f} ms")
        for kind in KINDS:
            layers, share = seconds[kind], (seconds[kind] + head) / (dense + head)
            print(f"  {kind:<20} {1e3 * layers:7.1f} ms, {layers / dense:.2f} of bfloat16; with lm_head {share:.2f}")
    print(json.dumps({"model": args.model, "threads": torch.get_num_threads(), "seconds": found}))
    return 0


if __name__ == "__main__":
    exit_with(main)

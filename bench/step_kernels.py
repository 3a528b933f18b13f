"""Measures which kernels a decode step has, how long each runs inside the step's graph, and how long nothing runs.

    python bench/step_kernels.py [MODEL] [--batch 1] [--context 2048] [--steps 20] [--no-programmatic-launch]
                                 [--experiment early_trigger]...

The times are from the device's own profiler (CUPTI, through torch). With programmatic dependent launch a kernel may
start before the previous one ends; then `gap us` is negative. Durations and gaps add up to the step.
"""

import argparse
import json
import sys
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from options import count
from torch.profiler import ProfilerActivity, profile

from internvl_rt import Engine, SamplingParams
from internvl_rt.bench.arguments import add_experiments
from internvl_rt.bench.prompts import Prompter
from internvl_rt.bench.record import result_document

Kernel = tuple[str, float, float]  # name, start, end in microseconds


def profile_steps(engine: Engine, batch: int, context: int, num_steps: int) -> list[Kernel]:
    """Returns the kernels of `num_steps` decode steps, in order."""
    prompter, loop = Prompter(engine, 0), engine.loop
    params = SamplingParams(max_tokens=num_steps + 64, ignore_eos=True)
    requests = [engine.new_request(prompter.prompt(context), params) for _ in range(batch)]
    for request in requests:
        loop.submit(request)
    while not all(request.first_token_s for request in requests):
        loop.advance(requests[-1])
    for _ in range(8):
        loop.advance(requests[-1])
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(num_steps):
            loop.advance(requests[-1])
        torch.cuda.synchronize()
    for request in requests:
        loop.cancel(request)
    events = [event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [(event.name, event.time_range.start, event.time_range.end) for event in events]


def rows_of_kernels(kernels: list[Kernel], num_steps: int) -> list[dict[str, Any]]:
    """A row for each kernel by name, those that take most of a step first; then a row for the step as a whole."""
    in_order = sorted(kernels, key=lambda kernel: kernel[1])
    durations, gaps = defaultdict(list), defaultdict(list)
    for (_, _, before), (name, start, end) in pairwise(in_order):
        durations[name].append(end - start)
        gaps[name].append(start - before)
    rows = []
    for name in sorted(durations, key=lambda name: -sum(durations[name])):
        row: dict[str, Any] = {"name": name[:80], "a_step": round(len(durations[name]) / num_steps, 2)}
        row |= {"median_us": median(durations[name]), "gap_us": median(gaps[name])}
        rows.append(row | {"step_us": (sum(durations[name]) + sum(gaps[name])) / num_steps})
    whole = (in_order[-1][2] - in_order[0][1]) / num_steps
    return [*rows, {"name": "step", "a_step": 1.0, "median_us": whole, "step_us": whole}]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="random:InternVL3-1B")
    parser.add_argument("--batch", type=count, default=1)
    parser.add_argument("--context", type=count, default=2048)
    parser.add_argument("--steps", type=count, default=20)
    parser.add_argument("--no-programmatic-launch", action="store_true")
    add_experiments(parser, "each an option of the engine")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the last line's document there too")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("expected a machine with a CUDA device, found none: kernels of a step run on one alone")
    options: dict[str, Any] = {"max_num_seqs": args.batch, "max_model_len": args.context + args.steps + 128}
    options["experiments"] = args.experiments
    if args.no_programmatic_launch:
        options["programmatic_launch"] = False
    with Engine.from_pretrained(args.model, prefix_cache=False, **options) as engine:
        rows = rows_of_kernels(profile_steps(engine, args.batch, args.context, args.steps), args.steps)
    for row in rows:
        print("  ".join(f"{key} {value:9.2f}" if key != "name" else f"{value:<80}" for key, value in row.items()))
    document = result_document("step_kernels", rows, torch.device("cuda"))
    if args.json:
        args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())

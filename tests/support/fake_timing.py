"""Runs the benches' timer on the stand-in for CUDA.

    python tests/support/fake_timing.py

Prints one JSON object: the timings of calls that can be captured in a graph, and of calls that cannot.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from internvl_rt.bench.timing import time_variants
from support.fake_cuda import use_fake_cuda
from support.fake_device import EVENT_US, LAUNCH_US, MACHINE, READ_MB_S

BYTES = 1 << 20


def measure(device: torch.device) -> dict[str, Any]:
    default = MACHINE.stream
    x, y, z = (torch.zeros(BYTES // 4, device=device) for _ in range(3))
    calls = [partial(torch.neg, x, out=x), partial(torch.add, y, z, out=y)]  # they use one block and two blocks
    cold = time_variants({"both": calls}, device, budget_s=1e-3)["both"]
    warm = time_variants({"both": calls}, device, budget_s=1e-3, cold=False)["both"]

    eager: list[str] = []
    before: list[float] = []

    def note_and_call() -> None:
        eager.append("call")
        calls[0]()

    def prepare() -> None:
        eager.clear()
        before[:] = [MACHINE.num_replays, float(x.inner[0])]  # type: ignore[attr-defined]

    time_variants({"call": note_and_call}, device, budget_s=1e-3, before_last={"call": prepare})
    last = {"replays": MACHINE.num_replays - before[0], "eager_calls": len(eager)}

    variants = {
        "reads": lambda: x[0].item(),  # torch's sync debug mode notices this wait
        "waits": lambda: torch.cuda.current_stream().synchronize(),  # torch's sync debug mode misses this wait
        "runs": calls[0],
    }
    found = time_variants(variants, device, budget_s=1e-3)
    return {
        "cold": [cold.low_us, cold.median_us, cold.high_us, cold.graphed, cold.sm_clock_mhz],
        "warm": [warm.low_us, warm.median_us, warm.high_us, warm.graphed],
        "event_us": EVENT_US,
        "launch_us": LAUNCH_US,
        "block_us": BYTES / READ_MB_S,
        "last": last,
        "graphed": {name: each.graphed for name, each in found.items()},
        "left_open": [str(pool) for pool in MACHINE.open_pools],
        "as_before": MACHINE.stream is default and MACHINE.sync_debug_mode == 0,
    }


if __name__ == "__main__":
    with use_fake_cuda():
        print(json.dumps(measure(torch.device("cuda", 0))))

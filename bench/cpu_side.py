"""One side of bench/compare_cpu.py: loads a runtime in a process of its own, then answers each line on stdin with JSON.

    python bench/cpu_side.py RUNTIME DTYPE FOLDER

compare_cpu.py starts it, a peer's side with the Python that has the peer. The prompts, and the weights of each runtime,
are in FOLDER. All runtimes do the same, `generate`; what is measured is made from its times.
"""

import json
import os
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from cpu_runtimes import RUNTIMES, Inputs, Runtime


def measure(runtime: Runtime, inputs: Inputs, *, samples: int, steps: int) -> dict[str, Any]:
    """Returns seconds of first tokens and steps, and the greedy tokens of every prompt by its name."""
    found: dict[str, Any] = {"tokens": {}}
    for name, ids, picture in (("picture", inputs.picture_ids, True), ("text", inputs.long_ids, False)):
        answers = [runtime.generate([ids], inputs.tokens, picture=picture)]
        answers += [runtime.generate([ids], 1, picture=picture) for _ in range(samples - 1)]
        found[f"first_{name}_s"] = [answer.times_s[0] for answer in answers]
        found["tokens"][name] = answers[0].token_ids[0]
    for rows in inputs.rows:
        answer = runtime.generate(inputs.text_ids[:rows], 1 + steps, picture=False)
        found[f"per_token_{rows}_s"] = [end - start for start, end in pairwise(answer.times_s)]
        found["tokens"] |= {f"{number} of {rows}": ids for number, ids in enumerate(answer.token_ids)}
    return found | {"peak_bytes": peak_bytes()}


def peak_bytes() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def main() -> None:
    name, dtype, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a runtime prints must not get between the answers
    inputs = Inputs(**json.loads((folder / "inputs.json").read_text()))
    start = time.perf_counter()
    runtime = RUNTIMES[name](folder, inputs, dtype)
    loaded = {"load_s": time.perf_counter() - start, "loaded_bytes": peak_bytes(), "threads": runtime.threads}
    loaded |= {"version": runtime.version, "dtype": runtime.dtype}
    print(json.dumps(loaded), file=channel, flush=True)
    measure(runtime, inputs, samples=1, steps=1)  # a warm-up
    for _ in sys.stdin:
        print(
            json.dumps(measure(runtime, inputs, samples=inputs.samples, steps=inputs.steps)), file=channel, flush=True
        )


if __name__ == "__main__":
    main()

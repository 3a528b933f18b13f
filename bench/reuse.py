"""Measures what a second question about a picture costs, and what three more answers to a question cost.

    python bench/reuse.py [--model InternVL3-1B] [--tiles 3] [--rounds 3]

It uses random weights of the model's shape (written to a temporary folder) or, for `--model tiny`, the checkpoint in
the package. Each round takes new pictures. Prints the least times of all rounds; the last line is JSON. The exit code
is 1 if a goal is missed: `--goal` for the second question, which must be faster, `--fork-goal` for four answers.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from options import count

from internvl_rt import Engine, SamplingParams
from internvl_rt.checkpoint.config import KNOWN_MODELS
from internvl_rt.model.random_checkpoint import write_random_checkpoint


def ask(picture: np.ndarray, question: str) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def measure(engine: Engine, num_tiles: int, rounds: int) -> dict[str, float]:
    """Returns seconds, each the least of all rounds, and how much the second question found in the caches."""
    side = engine.config.vision.image_size
    columns = max(num_tiles - 1, 1)  # the thumbnail is one more tile
    times: dict[str, list[float]] = {"first_s": [], "second_s": [], "one_answer_s": [], "four_answers_s": []}
    one, four = SamplingParams(max_tokens=1), SamplingParams(max_tokens=1, n=4, temperature=1.0)
    figures: dict[str, float] = {}
    for number in range(rounds + 1):
        rng = np.random.default_rng(number)
        pictures = rng.integers(0, 256, (3, side, columns * side, 3), dtype=np.uint8)
        first = engine.chat(ask(pictures[0], "What is in the picture?"), one)
        before = engine.stats()["encoded_tiles"]
        second = engine.chat(ask(pictures[0], "Is there any text in it, and what does it say?"), one)
        figures = {
            "prompt_tokens": second.usage.prompt_tokens,
            "cached_tokens": second.usage.cached_tokens,
            "tiles_encoded_again": engine.stats()["encoded_tiles"] - before,
        }
        single = engine.chat(ask(pictures[1], "What is in the picture?"), one)
        several = engine.chat(ask(pictures[2], "What is in the picture?"), four)
        if number > 0:  # the first round warms up
            times["first_s"].append(first.timings.first_token_s)
            times["second_s"].append(second.timings.first_token_s)
            times["one_answer_s"].append(single.timings.total_s)
            times["four_answers_s"].append(several.timings.total_s)
    return {name: min(values) for name, values in times.items()} | figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*KNOWN_MODELS, "tiny"], default="InternVL3-1B")
    parser.add_argument("--tiles", type=count, default=3, help="of the picture, thumbnail included")
    parser.add_argument("--rounds", type=count, default=3)
    parser.add_argument("--goal", type=float, default=5.0, help="least ratio of first to second")
    parser.add_argument("--fork-goal", type=float, default=1.5, help="ratio of four answers to one is to be below")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model: str | Path = arguments.model
        if model != "tiny":
            model = Path(scratch) / "model"
            write_random_checkpoint(arguments.model, model, seed=0)
        with Engine.from_pretrained(model, max_model_len=8192, max_num_seqs=8) as engine:
            result = measure(engine, arguments.tiles, arguments.rounds)
            result |= {"device": str(engine.device), "dtype": str(engine.model.dtype).removeprefix("torch.")}
    speedup = result["first_s"] / result["second_s"]
    fork = result["four_answers_s"] / result["one_answer_s"]
    print(f"{arguments.model} on {result['device']}, {result['dtype']}, {result['prompt_tokens']} prompt tokens")
    print(f"time to first token: first question {result['first_s']:.3f} s, second {result['second_s']:.3f} s")
    print(
        f"{speedup:.1f} times faster ({result['cached_tokens']} tokens from the cache, "
        f"{result['tiles_encoded_again']} tiles encoded again); goal {arguments.goal:g}"
    )
    print(f"first tokens of four answers: {fork:.2f} times one answer's; goal below {arguments.fork_goal:g}")
    print(json.dumps({"model": arguments.model, **result, "speedup": speedup, "fork_ratio": fork}))
    return int(speedup < arguments.goal or fork >= arguments.fork_goal)


if __name__ == "__main__":
    sys.exit(main())

"""Runs any number of the driver's operations, chosen by a plain random generator.

    python tests/paged_kv_cache/soak.py --steps 2000000 --seed 1

Every episode has a new cache of another shape. A failure names its episode; --episode runs one episode alone.
"""

import argparse
import random
import sys
import time
from collections import Counter
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from paged_kv_cache.driver import OPERATIONS, Driver, perform

STEPS_PER_EPISODE = 250


class RandomDraw:
    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed).random

    def integer(self, low: int, high: int) -> int:
        return low + int(self.random() * (high - low + 1))


def run_episode(name: str, num_steps: int = STEPS_PER_EPISODE) -> Counter[str]:
    """Runs one episode; raises AssertionError, RuntimeError or ValueError with the calls that led to the failure."""
    draw = RandomDraw(name)
    driver = Driver(draw)
    operation = "start"
    try:
        for _ in range(num_steps):
            operation = OPERATIONS[draw.integer(0, len(OPERATIONS) - 1)]
            perform(driver, operation)
    except Exception as error:
        error.add_note(f"{driver.history()}\nin {operation} of episode {name}: {error!r}")
        raise
    return driver.model.counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--episode", type=int, help="run only this episode of the seed")
    arguments = parser.parse_args()
    if arguments.episode is not None:
        print(dict(run_episode(f"{arguments.seed}/{arguments.episode}")))
        return 0
    started = shown = time.monotonic()
    counts: Counter[str] = Counter()
    num_steps = 0
    for episode in count():
        if num_steps >= arguments.steps:
            break
        try:
            counts += run_episode(f"{arguments.seed}/{episode}")
        except Exception:
            print(f"FAILED: python {sys.argv[0]} --seed {arguments.seed} --episode {episode}")
            raise
        num_steps += STEPS_PER_EPISODE
        now = time.monotonic()
        if now - shown > 10:
            print(f"{num_steps} steps, {num_steps / (now - started):.0f} steps/s", flush=True)
            shown = now
    rate = num_steps / (time.monotonic() - started)
    print(f"passed: {num_steps} steps in {episode} episodes, seed {arguments.seed}, {rate:.0f} steps/s, {dict(counts)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Runs any number of random requests under random faults: no leak, no wrong answer, no caller that hangs.

    python tests/soak_engine.py --requests 10000 --seed 1

Every round has a new engine with other options. A failure names its round; --round runs one round alone.
"""

import argparse
import faulthandler
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from internvl_rt import Engine
from support.load import (
    Kind,
    build_broken_kind,
    build_kinds,
    check_nothing_is_left,
    expected_answers,
    faults,
    run_load,
    tiny_pool_bytes,
)

REQUESTS_PER_ROUND = 250
HANGS_AFTER_S = 120  # a round takes some ten seconds


def draw_options(rng: random.Random, block_bytes: int) -> dict[str, Any]:
    return {
        "block_size": 16,
        "max_model_len": 640,
        "kv_cache_bytes": rng.choice([42, 60, 120, 400]) * block_bytes,
        "max_num_seqs": rng.choice([4, 8, 16]),
        "max_tokens_per_step": rng.choice([20, 64, 8192]),
        "prefix_cache": rng.random() < 0.7,
        "visual_cache_bytes": rng.choice([0, 200_000, 1 << 28]),
        "num_draft_tokens": rng.choice([0, 0, 2, 5]),
    }


def run_round(name: str, kinds: list[Kind], expected: list[Any], block_bytes: int, num_requests: int) -> str:
    """Runs one round and returns a line about it; raises AssertionError with what is wrong."""
    rng = random.Random(name)
    options = draw_options(rng, block_bytes)
    num_threads = threading.active_count()
    faulthandler.dump_traceback_later(HANGS_AFTER_S, exit=True)
    with Engine.from_pretrained("tiny", device="cpu", dtype="float32", **options) as engine:
        engine.loop.run_ahead = rng.random() < 0.5
        with faults(engine) as arm_fault:
            seed = rng.randrange(1 << 30)
            outcome = run_load(engine, kinds, expected, num_requests=num_requests, seed=seed, arm_fault=arm_fault)
        check_nothing_is_left(engine)
        stats = engine.stats()
    faulthandler.cancel_dump_traceback_later()
    assert not outcome.wrong, f"{options}: {outcome.wrong[0]}"
    ended = outcome.finished + outcome.cancelled + outcome.refused + outcome.faulted
    assert ended == num_requests, f"{options}: {ended} of {num_requests} requests ended"
    assert threading.active_count() == num_threads, f"{options}: a thread is left"
    return (
        f"{outcome.finished} right, {outcome.cancelled} cancelled, {outcome.refused} refused, {outcome.faulted} ended "
        f"by faults, {stats['preemptions']} preemptions, {stats['prefix_hit_tokens']} tokens from prefixes"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--round", type=int, help="run only this round of the seed")
    arguments = parser.parse_args()
    kinds = [*build_kinds(40, arguments.seed), build_broken_kind()]
    expected = expected_answers(kinds)
    block_bytes = tiny_pool_bytes(1)
    num_rounds = -(-arguments.requests // REQUESTS_PER_ROUND)
    started = time.monotonic()
    for number in range(num_rounds) if arguments.round is None else [arguments.round]:
        name = f"{arguments.seed}/{number}"
        try:
            report = run_round(name, kinds, expected, block_bytes, REQUESTS_PER_ROUND)
        except Exception as error:
            error.add_note(f"in round {name}: python {__file__} --seed {arguments.seed} --round {number}")
            raise
        print(f"{time.monotonic() - started:6.0f} s, round {name}: {report}", flush=True)
    print(f"passed: {num_rounds * REQUESTS_PER_ROUND} requests, no leak, no wrong answer, nobody left waiting")
    return 0


if __name__ == "__main__":
    sys.exit(main())

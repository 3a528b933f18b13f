"""Simulates how often a pool of replicas finds prompts in its caches, by the way of routing and the number of replicas.

    python bench/routing.py [--replicas 1 2 4] [--seed 1]

The choice is the code of `internvl_rt.serve_ray.choice`; replicas and their caches are simulated. docs/scaling.md shows
the table and says what is assumed. The same seed gives the same table.
"""

import argparse
import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random

from internvl_rt.serve_ray.choice import advantages, draw_two, prefer

REPLICAS = (1, 2, 4, 8, 16, 64, 256, 1000)
REQUESTS_PER_REPLICA_S = 2.0
SPAN_S, WARM_UP_S = 240.0, 120.0  # hits are counted from the end of the warm-up on
CACHE_TOKENS = 200_000  # of one replica
SYSTEM_TOKENS, PICTURE_TOKENS, TURN_TOKENS, ANSWER_TOKENS = 64, 3_328, 64, 128  # a picture of 13 tiles
MEAN_TURNS = 4  # questions about one picture
PAUSE_S = 15.0  # mean between an answer and the next question
SHARED, NUM_SHARED, ZIPF = 0.3, 2_000, 1.0  # the share of conversations about one of so many pictures; its exponent
FIXED_S, PREFILL_TOKENS_S, TOKEN_S = 0.05, 20_000.0, 0.012  # what a request takes
LOAD_SHARE, MAX_IMBALANCE = 1 / 8, 16  # the defaults of the application

Prefix = tuple[object, ...]  # names of its parts from the first to the last: system message, picture, turns
Choose = Callable[["Pool", list[Prefix]], int]


@dataclass
class Cache:
    """Keeps prefixes in so many tokens, and forgets those that were used longest ago."""

    tokens: OrderedDict[Prefix, int] = field(default_factory=OrderedDict)
    used: int = 0

    def take(self, prefixes: list[Prefix]) -> tuple[int, list[Prefix]]:
        """Returns how many tokens of a prompt are there, and the prefixes that were forgotten for the others."""
        found, is_there = 0, True
        for prefix in prefixes:
            is_there = is_there and prefix in self.tokens
            found += size_of(prefix) if is_there else 0
        for prefix in reversed(prefixes):  # so that the beginning is forgotten last
            if prefix not in self.tokens:
                self.tokens[prefix] = size_of(prefix)
                self.used += size_of(prefix)
            self.tokens.move_to_end(prefix)
        forgotten = []
        while self.used > CACHE_TOKENS:
            prefix, size = self.tokens.popitem(last=False)
            self.used -= size
            forgotten.append(prefix)
        return found, forgotten


def size_of(prefix: Prefix) -> int:
    """Returns the tokens of the last part of a prefix."""
    return (SYSTEM_TOKENS, PICTURE_TOKENS)[len(prefix) - 1] if len(prefix) < 3 else TURN_TOKENS + ANSWER_TOKENS


def num_tokens(prefixes: list[Prefix]) -> int:
    """Returns the tokens of a prompt, its last question included."""
    return sum(map(size_of, prefixes)) + TURN_TOKENS


class Pool:
    """Replicas, what each has to do, and which of them hold a prefix."""

    def __init__(self, number: int, draw: Random) -> None:
        self.caches = [Cache() for _ in range(number)]
        self.requests = dict.fromkeys(range(number), 0)
        self.names = list(range(number))
        self.holders: dict[Prefix, set[int]] = {}
        self.draw, self.num_chosen = draw, 0

    def cached(self, prefixes: list[Prefix]) -> dict[int, int]:
        """Returns how many tokens of a prompt the replicas hold that hold its first part."""
        tokens: dict[int, int] = {}
        left = self.holders.get(prefixes[0], set())
        for prefix in prefixes:
            left = left & self.holders.get(prefix, set()) if prefix is not prefixes[0] else left
            for replica in left:
                tokens[replica] = tokens.get(replica, 0) + size_of(prefix)
        if len(tokens) < len(self.names):
            tokens |= {next(replica for replica in self.names if replica not in tokens): 0}
        return tokens

    def answer(self, replica: int, prefixes: list[Prefix]) -> int:
        """Lets a replica hold a prompt; returns how many of its tokens it held before."""
        found, forgotten = self.caches[replica].take(prefixes)
        for prefix in prefixes:
            self.holders.setdefault(prefix, set()).add(replica)
        for prefix in forgotten:
            self.holders[prefix].discard(replica)
            if not self.holders[prefix]:
                del self.holders[prefix]
        return found


def by_turns(pool: Pool, _: list[Prefix]) -> int:
    pool.num_chosen += 1
    return pool.num_chosen % len(pool.names)


def by_load(pool: Pool, _: list[Prefix]) -> int:
    """Power of two choices."""
    return min(draw_two(pool.names, pool.draw), key=pool.requests.__getitem__)


def by_cache(pool: Pool, prefixes: list[Prefix]) -> int:
    advantage = advantages(pool.cached(prefixes), num_tokens(prefixes))
    preferred = prefer(advantage, pool.requests, load_share=LOAD_SHARE, max_imbalance=MAX_IMBALANCE, draw=pool.draw)
    return by_load(pool, prefixes) if preferred is None else preferred


def trace(number: int, draw: Random) -> Iterator[tuple[float, list[Prefix]]]:
    """Yields the time and the prefixes of each request, in order of time."""
    weights = [1 / (rank + 1) ** ZIPF for rank in range(NUM_SHARED)]
    shared = iter(draw.choices(range(NUM_SHARED), weights, k=int(number * SPAN_S * REQUESTS_PER_REPLICA_S)))
    waiting: list[
        tuple[float, int, int, object]
    ] = []  # the time of a question, its conversation, its turn, its picture
    next_s, num_conversations = 0.0, 0
    while True:
        while not waiting or next_s <= waiting[0][0]:
            num_conversations += 1
            picture = ("shared", next(shared)) if draw.random() < SHARED else num_conversations
            heapq.heappush(waiting, (next_s, num_conversations, 0, picture))
            next_s += draw.expovariate(number * REQUESTS_PER_REPLICA_S / MEAN_TURNS)
        time_s, conversation, turn, picture = heapq.heappop(waiting)
        if time_s >= SPAN_S:
            return
        parts = ["system", picture, *((conversation, past) for past in range(turn))]
        yield time_s, [tuple(parts[: end + 1]) for end in range(len(parts))]
        if draw.random() < 1 - 1 / MEAN_TURNS:
            pause_s = ANSWER_TOKENS * TOKEN_S + draw.expovariate(1 / PAUSE_S)
            heapq.heappush(waiting, (time_s + pause_s, conversation, turn + 1, picture))


@dataclass(frozen=True)
class Result:
    """What came of a trace. hit_rate: of tokens. imbalance: the most requests of a replica by the mean, on average."""

    hit_rate: float
    imbalance: float
    prefill_tokens: float  # computed for a request


def simulate(number: int, choose: Choose, seed: int) -> Result:
    """Routes a trace to so many replicas."""
    pool, ends = Pool(number, Random(seed)), list[tuple[float, int]]()
    hits = tokens = count = samples = 0
    imbalance = 0.0
    for time_s, prefixes in trace(number, Random(seed + 1)):
        while ends and ends[0][0] <= time_s:
            pool.requests[heapq.heappop(ends)[1]] -= 1
        replica = choose(pool, prefixes)
        total = num_tokens(prefixes)
        found = pool.answer(replica, prefixes)
        taken_s = FIXED_S + (total - found) / PREFILL_TOKENS_S + ANSWER_TOKENS * TOKEN_S
        pool.requests[replica] += 1
        heapq.heappush(ends, (time_s + taken_s, replica))
        if time_s >= WARM_UP_S:
            hits, tokens, count = hits + found, tokens + total, count + 1
            if count % (10 * number) == 0:
                imbalance += max(pool.requests.values()) * number / max(1, len(ends))
                samples += 1
    return Result(hits / tokens, imbalance / max(1, samples), (tokens - hits) / count)


def row(number: int, seed: int) -> str:
    """Returns a line of the table: hit rates, what is computed, and how uneven the load is."""
    turns, load, cache = (simulate(number, choose, seed) for choose in (by_turns, by_load, by_cache))
    rates = f"{turns.hit_rate:.1%} | {load.hit_rate:.1%} | {cache.hit_rate:.1%}".replace("%", " %")
    times = turns.prefill_tokens / cache.prefill_tokens
    return f"| {number:,} | {rates} | {times:.1f} | {load.imbalance:.1f} | {cache.imbalance:.1f} |"


HEAD = """| replicas | by turns | by load | by cache | fewer tokens computed | unevenness by load | by cache |
|---:|---:|---:|---:|---:|---:|---:|"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--replicas", type=int, nargs="+", default=REPLICAS, help="how many replicas; a row for each")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    print(HEAD)
    for number in args.replicas:
        print(row(number, args.seed), flush=True)


if __name__ == "__main__":
    main()

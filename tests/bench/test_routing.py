"""The simulation of routing gives the table of docs/scaling.md, and what it is there to show."""

import importlib.util
import re
import sys
from pathlib import Path
from random import Random
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def routing() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_routing", ROOT / "bench" / "routing.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "number", [1, 2, 4, pytest.param(16, marks=pytest.mark.slow), pytest.param(256, marks=pytest.mark.slow)]
)
def test_the_page_shows_what_the_simulation_prints(routing: ModuleType, number: int) -> None:
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert routing.HEAD in page
    assert re.findall(rf"^\| {number} \| [\d.]+ % .*$", page, re.MULTILINE) == [routing.row(number, seed=1)]


def test_by_cache_twice_as_much_is_found_as_by_turns_and_the_load_stays_even(routing: ModuleType) -> None:
    cache, turns = (routing.simulate(8, choose, seed=3) for choose in (routing.by_cache, routing.by_turns))
    assert cache.hit_rate > 2 * turns.hit_rate
    assert cache.prefill_tokens < turns.prefill_tokens / 2
    assert cache.imbalance < 2.5


def test_a_cache_forgets_what_was_used_longest_ago_and_the_end_of_a_prefix_first(
    routing: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing, "CACHE_TOKENS", 64 + 2 * 3328)
    cache = routing.Cache()
    one, two, three = ([("system",), ("system", name)] for name in "abc")
    assert cache.take(one) == (0, [])
    assert cache.take(two) == (64, [])
    assert cache.take(one) == (64 + 3328, [])
    assert cache.take(three) == (64, [("system", "b")])
    assert cache.take(two) == (64, [("system", "a")])


def test_a_trace_is_in_order_and_the_same_for_one_seed(routing: ModuleType) -> None:
    one, two = (list(routing.trace(2, Random(5))) for _ in range(2))
    assert one == two
    times = [time_s for time_s, _ in one]
    assert times == sorted(times)
    assert len(one) == pytest.approx(2 * routing.REQUESTS_PER_REPLICA_S * routing.SPAN_S, rel=0.25)
    assert max(len(prefixes) for _, prefixes in one) > 4

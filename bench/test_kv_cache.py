"""Measures the bookkeeping of the KV cache from Python, beside two other managers that do the same job.

    pytest bench/test_kv_cache.py --benchmark-only

Needs pytest-benchmark. vLLM has rows if it can be imported; its Python files on PYTHONPATH are enough.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from kv_cache_peers import BLOCK_SIZE, MANAGERS, Manager, Ours, Prompt

BATCH = 256
CONTEXT = 2_048
PROMPT_LENGTH = 3_392  # 13 tiles of 256 tokens, and 64 tokens of text
SEQ_IDS = list(range(BATCH))


def text_prompt(length: int, first_id: int) -> Prompt:
    token_ids = np.full(length, 7, np.int32)
    token_ids[0] = first_id  # so that it shares no block with another prompt
    return Prompt(token_ids)


def picture_prompt(first_id: int) -> Prompt:
    digests = [bytes([tile]) * 32 for tile in range(13)]
    pictures = tuple((32 + 256 * tile, 256, digest) for tile, digest in enumerate(digests))
    return Prompt(text_prompt(PROMPT_LENGTH, first_id).token_ids, pictures)


class Batch:
    """256 sequences of about 2,048 tokens. In an ordinary step one sequence in 64 is at the end of its block, in a
    border step all are."""

    def __init__(self, manager: Manager, *, border: bool) -> None:
        self.manager, self.border = manager, border
        self.next_id = 100
        self.steps_left = 0
        self.running = False

    def restart_when_due(self) -> None:
        self.steps_left -= 1
        if self.steps_left > 0:
            return
        self.steps_left = 1 if self.border else BLOCK_SIZE
        for seq_id in SEQ_IDS:
            if self.running:
                self.manager.release(seq_id)
            length = CONTEXT if self.border else CONTEXT - BLOCK_SIZE + seq_id % BLOCK_SIZE
            self.next_id += 1
            prompt = text_prompt(length, self.next_id)
            self.manager.prepare(seq_id, prompt)
            self.manager.prefill(seq_id, prompt)
        self.manager.start_batch(SEQ_IDS)
        self.running = True


@pytest.fixture(params=MANAGERS)
def manager(request: pytest.FixtureRequest) -> Manager:
    return MANAGERS[request.param]()


@pytest.fixture
def ours() -> Ours:
    return Ours()


def measure(benchmark: Any, group: str, run: Callable[[], object], prepare: Callable[[], None], rounds: int) -> None:
    benchmark.group = group
    benchmark.pedantic(run, setup=prepare, rounds=rounds, warmup_rounds=2)


@pytest.mark.parametrize("border", [False, True], ids=["some", "all"])
def test_append_256(benchmark: Any, manager: Manager, border: bool) -> None:
    batch = Batch(manager, border=border)
    pending = [False]

    def prepare() -> None:
        if pending[0]:
            manager.finish()
        batch.restart_when_due()
        pending[0] = True

    measure(benchmark, f"append_256{'_border' * border}", manager.append, prepare, 20 if border else 256)


@pytest.mark.parametrize("border", [False, True], ids=["some", "all"])
def test_decode_step_256(benchmark: Any, manager: Manager, border: bool) -> None:
    """A manager hands out slots, records sampled ids and digests full blocks; ours also fills the step's buffers."""
    batch = Batch(manager, border=border)

    def step() -> None:
        manager.append()
        manager.finish()

    measure(benchmark, f"decode_step_256{'_border' * border}", step, batch.restart_when_due, 20 if border else 256)


def test_fill_step_256(benchmark: Any, ours: Ours) -> None:
    batch = Batch(ours, border=False)

    def prepare() -> None:
        batch.restart_when_due()
        ours.append()

    measure(benchmark, "fill_step_256", ours.fill_batch, prepare, 256)


class Arrivals:
    """Prompts with 13 pictures, one at a time; a warm prompt is the same again, cached except for its last block."""

    def __init__(self, manager: Manager, *, warm: bool) -> None:
        self.manager, self.warm = manager, warm
        self.prompt = picture_prompt(0)
        manager.prepare(0, self.prompt)
        manager.prefill(0, self.prompt)
        self.next_id = 0
        self.num_cached = 0

    def prepare(self) -> None:
        self.manager.release(0)
        if not self.warm:
            self.next_id += 1
            self.prompt = picture_prompt(self.next_id)
        self.manager.prepare(0, self.prompt)

    def prefill(self) -> None:
        self.num_cached = self.manager.prefill(0, self.prompt)


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_admit_3392(benchmark: Any, ours: Ours, warm: bool) -> None:
    arrivals = Arrivals(ours, warm=warm)
    group = f"admit_3392_{'warm' if warm else 'cold'}"
    measure(benchmark, group, lambda: ours.admit(0, arrivals.prompt), arrivals.prepare, 500)


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_prefill_3392(benchmark: Any, manager: Manager, warm: bool) -> None:
    """A manager looks a prompt up, gives it blocks for all tokens, and publishes its full blocks to other sequences."""
    arrivals = Arrivals(manager, warm=warm)
    group = f"prefill_3392_{'warm' if warm else 'cold'}"
    measure(benchmark, group, arrivals.prefill, arrivals.prepare, 50)
    assert (arrivals.num_cached >= PROMPT_LENGTH - BLOCK_SIZE) if warm else arrivals.num_cached == 0


def test_release_4096(benchmark: Any, manager: Manager) -> None:
    next_id = [0]

    def prepare() -> None:
        next_id[0] += 1
        prompt = text_prompt(4_096, next_id[0])
        manager.prepare(0, prompt)
        manager.prefill(0, prompt)

    measure(benchmark, "release_4096", lambda: manager.release(0), prepare, 200)


@pytest.mark.parametrize("name", MANAGERS)
def test_construct_65536(benchmark: Any, name: str) -> None:
    measure(benchmark, "construct_65536", MANAGERS[name], lambda: None, 5)

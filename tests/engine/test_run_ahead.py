"""On a stand-in for CUDA, nothing between two launches waits for the device, and all its work is in order."""

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from internvl_rt.model.ops_triton import EXPERIMENTS
from support.fake_driver import fake_environment

SCRIPT = Path(__file__).parents[1] / "support" / "fake_serving.py"
EARLY = {"gemv_kernel", "gemv_qkv_kernel", "decode_attention_kernel"}  # may start before the previous kernel ends
Found = dict[str, Any]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return fake_environment(tmp_path_factory.mktemp("driver"))


def serve(environment: dict[str, str], mistake: str = "", **options: object) -> Found:
    command = [sys.executable, str(SCRIPT), json.dumps(options), *filter(None, [mistake])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found: Found = json.loads(done.stdout.splitlines()[-1])
    return found


def waits_in(found: Found) -> set[str]:
    """Returns the kinds of waiting that would keep a step from being launched while the previous step runs.

    With several ranks, those of rank 0, and of one that follows its orders.
    """
    return {wait for wait in found["waits"] if wait.rpartition(", ")[2] in ("launch", "between launches", "follow")}


WAYS: dict[str, dict[str, object]] = {
    "all on": {},
    "no early launch": {"programmatic_launch": False},
    "no graphs": {"cuda_graphs": False},
    "all captured": {"capture_all": True},
    "experiments": {"cuda_graphs": False, "experiments": EXPERIMENTS},
    "experiments in graphs": {"experiments": EXPERIMENTS},
    "two ranks": {"tensor_parallel_size": 2},
    "two ranks, no graphs": {"tensor_parallel_size": 2, "cuda_graphs": False},
}


@pytest.fixture(scope="module")
def served(environment: dict[str, str]) -> Callable[[str], Found]:
    """A function that serves requests in one of WAYS and returns what was found; it runs each way only once."""
    return cache(lambda way: serve(environment, **WAYS[way]))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_no_launch_of_a_step_waits_for_the_one_before_it(served: Callable[[str], Found], way: str) -> None:
    found = served(way)
    assert not waits_in(found)
    assert found["steps"]["launches"] > found["steps"]["ahead"] > 0.7 * found["steps"]["launches"]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_streams_are_in_order_and_no_memory_is_given_back_too_early(served: Callable[[str], Found], way: str) -> None:
    """The engine's caller changes its own stream; with all on, a second engine is built while the first one serves."""
    assert not served(way)["races"]


@pytest.mark.slow
def test_another_rank_launches_what_rank_0_does_but_for_cutting_pictures_and_drawing(
    served: Callable[[str], Found],
) -> None:
    for way in ("two ranks", "two ranks, no graphs"):
        found = served(way)
        assert found["followed"]["orders"] > found["steps"]["launches"]
        assert found["followed"]["replays"] == found["replays"]
    ours, theirs = found["launches"], found["followed"]["launches"]
    alone = {"_resize_columns_kernel", "_resize_lines_kernel", "row_peaks_kernel", "draw_kernel"}
    assert {kernel: ours[kernel] for kernel in ours if kernel not in alone} == theirs


@pytest.mark.slow
def test_no_layer_of_a_step_is_launched_outside_of_a_graph(served: Callable[[str], Found]) -> None:
    found = served("all captured")
    assert found["steps"]["mixed"] > 5
    assert found["launches"], "pictures are resized, some draws have lists of tokens"
    layers = {"decode_attention_kernel", "prefill_attention_kernel", "gemv_qkv_kernel", "_qkv_rope_kv_kernel"}
    assert not (layers | {"_embed_tokens_kernel", "_swiglu_kernel"}) & set(found["launches"])


@pytest.mark.slow
def test_the_switches_are_what_the_kernels_are_launched_with(served: Callable[[str], Found]) -> None:
    assert set(served("no graphs")["early"]) == EARLY
    assert not served("no early launch")["early"]
    replays = {way: served(way)["replays"] for way in WAYS}
    assert replays["experiments"] == replays["no graphs"] == 0
    assert 0 < replays["all on"] == replays["all captured"] == replays["no early launch"]
    assert set(served("no graphs")["launches"]) >= EARLY
    found = served("experiments")
    attention = [f"decode_attention_kernel: {name}" for name in ("PREFETCH_KEYS", "next_weight", "later_weight")]
    assert set(found["on"]) == {*(f"{kernel}: EARLY" for kernel in EARLY), *attention}
    assert all(found["on"][f"{kernel}: EARLY"] == found["launches"][kernel] for kernel in EARLY)
    assert not served("no graphs")["on"]
    assert not served("no early launch")["on"]


@pytest.mark.slow
def test_mistakes_are_noticed(environment: dict[str, str]) -> None:
    """Each run has one planted mistake, and reports that mistake by its name."""
    waiting = {
        "copies from pageable memory": "a copy to the device, launch",
        "results copied to pageable memory": "a copy from the device, launch",
    }
    unordered = {
        "no stream of its own": "in no order",
        "pictures not waited for": "written by stream 1, in no order",
        "results handed over in no order": "written by stream 2, in no order",
        "weights taken in no order": "written by stream 0, in no order",
        "memory used elsewhere forgotten": "given back, used by stream",
    }
    with ThreadPoolExecutor(2) as pool:
        options = [{"cuda_graphs": mistake != "no stream of its own"} for mistake in (*waiting, *unordered)]
        run = pool.map(lambda mistake, more: serve(environment, mistake, **more), (*waiting, *unordered), options)
        found = dict(zip((*waiting, *unordered), run, strict=True))
    for mistake, wait in waiting.items():
        assert waits_in(found[mistake]) == {wait}
    for mistake, race in unordered.items():
        assert any(race in each for each in found[mistake]["races"]), mistake

"""A step on a CPU takes the cores that are free, and gives torch's number of threads back."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from internvl_rt import Engine, SamplingParams
from internvl_rt.steps.cpu_threads import INTERVAL_S, CpuThreads, Load, count_cores

CORES = 8


@pytest.fixture(autouse=True)
def eight_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(CORES)
    yield
    torch.set_num_threads(before)


def threads_beside(*others: float, own: float = 0.0) -> CpuThreads:
    """Makes threads that see, in each second, so many cores taken by others. The first look, at the start, is done."""
    loads = [Load(0, 0, 0)]
    for count in others:
        last = loads[-1]
        loads.append(Load(last.at_s + 1, last.busy_s + count + own, last.own_s + own))
    reads = iter(loads)
    threads = CpuThreads(read_load=lambda: next(reads), num_cores=CORES)
    assert threads.choose(CORES) == CORES
    return threads


@pytest.mark.parametrize(
    ("others", "expected"), [(0, 8), (0.4, 8), (0.6, 7), (1, 7), (3.2, 5), (7.9, 1), (8, 1), (9.5, 1), (-0.3, 8)]
)
def test_a_step_takes_the_cores_that_others_leave(others: float, expected: int) -> None:
    assert threads_beside(others, own=5).choose(CORES) == expected


def test_the_cores_are_taken_again_when_others_leave_them() -> None:
    threads = threads_beside(7, 7, 0)
    assert [threads.choose(CORES) for _ in range(3)] == [1, 1, 8]


def test_never_more_threads_than_torch_would_take() -> None:
    assert threads_beside(0).choose(3) == 3
    assert CpuThreads(read_load=lambda: None, num_cores=CORES).choose(1) == 1


def test_a_given_number_of_threads_is_taken_whatever_the_load() -> None:
    threads = CpuThreads(5, read_load=lambda: Load(0, 0, 0), num_cores=2)
    with threads.use():
        assert torch.get_num_threads() == 5
    assert torch.get_num_threads() == CORES


def test_engines_of_one_process_share_the_free_cores() -> None:
    one, other = (CpuThreads(read_load=lambda: None, num_cores=CORES) for _ in range(2))
    with one.use():
        assert torch.get_num_threads() == 8
        with other.use():
            assert torch.get_num_threads() == 4
        with one.use():
            assert torch.get_num_threads() == 8
    assert torch.get_num_threads() == 8


def test_the_number_of_threads_is_given_back_after_an_error() -> None:
    threads = threads_beside(6)
    with suppress(ZeroDivisionError), threads.use():
        assert torch.get_num_threads() == 2
        raise ZeroDivisionError
    assert torch.get_num_threads() == CORES
    assert not CpuThreads._computing


def test_the_load_is_looked_at_a_few_times_a_second() -> None:
    looks = []

    def read_load() -> Load:
        looks.append(0)
        return Load(time.perf_counter(), 0, 0)

    threads, start = CpuThreads(read_load=read_load, num_cores=CORES), time.perf_counter()
    while time.perf_counter() - start < 3 * INTERVAL_S:
        threads.choose(CORES)
    assert 2 <= len(looks) <= 4


def test_without_a_known_load_all_cores_are_free() -> None:
    threads = CpuThreads(read_load=lambda: None, num_cores=CORES)
    assert [threads.choose(CORES) for _ in range(2)] == [CORES] * 2


def test_siblings_are_one_core_and_a_quota_is_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 4})
    for cpu in range(5):
        topology = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{cpu // 2 * 2}-{cpu // 2 * 2 + 1}\n")
    assert count_cores(tmp_path) == 3
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    for text, expected in (("max 100000\n", 3), ("150000 100000\n", 1.5), ("900000 100000\n", 3)):
        (group / "cpu.max").write_text(text)
        assert count_cores(tmp_path) == expected
    assert count_cores(tmp_path / "nothing") == 4


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the load is read from /proc")
def test_a_program_that_keeps_a_core_busy_is_seen() -> None:
    threads = CpuThreads(num_cores=CORES)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as program:
        try:
            threads.choose(CORES)
            time.sleep(2 * INTERVAL_S)
            threads.choose(CORES)
        finally:
            program.kill()
    assert threads._free < CORES - 0.3  # a core if the machine has one more; less if others want it too


def test_an_engine_computes_with_the_threads_that_it_was_given() -> None:
    seen = []
    options = {"device": "cpu", "num_threads": 3, "max_model_len": 256}
    with Engine.from_pretrained("tiny", **options) as engine:
        sample = engine.model.ops.sample
        object.__setattr__(
            engine.model.ops, "sample", lambda *args: (seen.append(torch.get_num_threads()), sample(*args))
        )
        engine.chat([{"role": "user", "content": "Read the digits."}], SamplingParams(max_tokens=2, ignore_eos=True))
    assert seen == [3, 3]
    assert torch.get_num_threads() == CORES

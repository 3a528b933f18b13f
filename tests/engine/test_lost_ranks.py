"""A rank that is killed, at any moment: callers have an error at once, and nothing is left of the engine."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from internvl_rt import AsyncEngine, EngineDeadError, RequestError, SamplingParams, StepError
from internvl_rt.checkpoint.folder import Checkpoint
from internvl_rt.engine import loading
from internvl_rt.engine.children import Children
from internvl_rt.engine.children import _Processes as Processes
from internvl_rt.engine.rank_group import RankGroup
from internvl_rt.engine.ranks import FirstRank
from internvl_rt.steps.runner import Runner
from support.calls import ask, load
from support.load import SAMPLES
from support.rank_processes import folders, is_running, open_ports, processes_of, wait_until

SIZE, PATIENCE_S = 3, 5.0
LONG = SamplingParams(max_tokens=400, ignore_eos=True)
PICTURE = ask("Read the digits.", str(SAMPLES[0]))


class Killer:
    """Kills ranks when a function is called for the `number`th time."""

    def __init__(self) -> None:
        self.killed_s: float | None = None
        self.victims = 1

    def kill(self) -> None:
        processes = processes_of()
        assert len(processes) >= self.victims
        for process in random.Random(0).sample(processes, self.victims):
            os.kill(process, signal.SIGKILL)
        self.killed_s = time.perf_counter()

    def arm(self, patch: pytest.MonkeyPatch, owner: Any, name: str, number: int = 1, *, after: bool = False) -> None:
        original, calls = getattr(owner, name), [0]

        def call(*args: Any, **options: Any) -> Any:
            calls[0] += 1
            if calls[0] == number and not after:
                self.kill()
            result = original(*args, **options)
            if calls[0] == number and after:
                self.kill()
            return result

        patch.setattr(owner, name, call)


def slowly(patch: pytest.MonkeyPatch) -> None:
    """Makes rank 0 load for more than ten seconds."""
    original = Checkpoint.read_into

    def read_into(*args: Any) -> None:
        time.sleep(0.1)
        original(*args)

    patch.setattr(Checkpoint, "read_into", read_into)


MOMENTS: dict[str, tuple[Any, str, int, bool]] = {
    "the first is started": (Processes, "_start", 1, True),
    "all are started": (Children, "tell", 1, False),
    "they have their facts": (Children, "tell", 1, True),
    "ranks look for each other": (FirstRank, "_meet", 1, False),
    "ranks have met": (FirstRank, "_meet", 1, True),
    "the first tensor is read": (Checkpoint, "read_into", 1, False),
    "the 20th tensor is read": (Checkpoint, "read_into", 20, True),
    "weights are loaded": (loading, "_agree", 1, False),
    "memory is planned": (loading, "_agree", 1, True),
    "tiles are ordered": (FirstRank, "order", 1, False),
    "tiles are sent": (RankGroup, "share", 1, False),
    "tiles are encoded": (RankGroup, "gather", 1, False),
    "the prompt is ordered": (FirstRank, "order", 2, True),
    "visual tokens are sent": (RankGroup, "share", 2, False),
    "the first sum": (RankGroup, "add", 1, False),
    "the last sum of the prompt": (RankGroup, "add", 8, True),
    "the first logits": (RankGroup, "gather", 2, True),
    "the first token is drawn": (RankGroup, "share", 3, False),
    "a decode step is ordered": (FirstRank, "order", 9, False),
    "a sum of a decode step": (RankGroup, "add", 101, False),
    "the tokens of a step": (RankGroup, "share", 30, True),
    "a step is collected": (Runner, "collect", 20, False),
}
QUICK = {"the first sum", "a decode step is ordered"}


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = folders(), open_ports(), processes_of()
    yield
    wait_until(lambda: (folders(), open_ports(), processes_of()) == before)


@pytest.mark.parametrize("victims", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "moment", [each if each in QUICK else pytest.param(each, marks=pytest.mark.slow) for each in MOMENTS]
)
def test_a_caller_has_an_error_at_once(moment: str, victims: int, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, number, after = MOMENTS[moment]
    if moment == "the first is started":
        victims = 1
    killer = Killer()
    killer.victims = victims
    if owner is Checkpoint:
        slowly(monkeypatch)
    killer.arm(monkeypatch, owner, name, number, after=after)
    lost = pytest.raises(EngineDeadError, match=r"rank [12] of this engine has ended")
    with lost, load(tensor_parallel_size=SIZE) as engine:
        engine.chat(PICTURE, LONG)
    assert killer.killed_s is not None
    assert time.perf_counter() - killer.killed_s < PATIENCE_S


def test_an_idle_engine_whose_rank_is_killed_refuses_requests() -> None:
    with load(tensor_parallel_size=2) as engine:
        engine.chat(PICTURE)
        os.kill(processes_of()[-1], signal.SIGKILL)
        wait_until(lambda: not processes_of())
        for call in (lambda: engine.chat(PICTURE), lambda: engine.encode_images([str(SAMPLES[0])]), engine.loop.check):
            with pytest.raises(EngineDeadError, match=r"rank 1 of this engine has ended.*load the model again"):
                call()


def test_every_request_of_an_async_engine_ends_when_a_rank_is_killed() -> None:
    async def ask_all() -> list[Any]:
        async with AsyncEngine(load(tensor_parallel_size=2, max_num_seqs=2)) as engine:
            calls = [asyncio.ensure_future(engine.chat(PICTURE, LONG)) for _ in range(6)]  # four of them wait
            await asyncio.sleep(0.5)
            start_s = time.perf_counter()
            os.kill(processes_of()[-1], signal.SIGKILL)
            errors = await asyncio.gather(*calls, return_exceptions=True)
            assert time.perf_counter() - start_s < PATIENCE_S
            with pytest.raises(EngineDeadError):
                engine.check()
            return errors

    errors = asyncio.run(ask_all())
    assert [type(error) for error in errors] == [EngineDeadError] * 6
    assert {"rank 1" in str(error) for error in errors} == {True}


def test_a_rank_that_is_killed_while_the_engine_is_closed_disturbs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    killer = Killer()
    killer.arm(monkeypatch, Children, "close")
    with load(tensor_parallel_size=SIZE) as engine:
        engine.chat(PICTURE)
    assert killer.killed_s is not None


def test_an_interrupt_ends_an_answer_and_not_the_ranks() -> None:
    with load(tensor_parallel_size=2) as engine:
        expected = engine.chat(PICTURE).text
        for delay_s in (0.05, 0.1, 0.2):
            timer = threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGINT))
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                engine.chat(PICTURE, SamplingParams(max_tokens=3000, ignore_eos=True))
            timer.join()
            assert engine.chat(PICTURE).text == expected
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_failure_of_rank_0_in_the_middle_of_a_step_ends_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no memory on rank 0")

    with load(tensor_parallel_size=2) as engine:
        monkeypatch.setattr(engine.model, "logits", fail)
        with pytest.raises(
            EngineDeadError, match="rank 0 of this engine has failed: 'MemoryError: no memory on rank 0'"
        ):
            engine.chat(PICTURE)


def test_a_step_that_fails_before_its_order_ends_its_requests_and_leaves_ranks_in_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The prompt's last block is copied for the second answer, also after the failure: all ranks copy it."""
    messages, params = ask("Read the digits."), SamplingParams(n=2, max_tokens=8, temperature=1.0, seed=1)
    with load(tensor_parallel_size=2) as engine:
        expected = [choice.token_ids for choice in engine.chat(messages, params).choices]
        original, calls = Runner._compute, []

        def fail_second(self: Runner, step: Any) -> Any:
            calls.append(step)
            if len(calls) == 2:
                raise RuntimeError("before the order")
            return original(self, step)

        monkeypatch.setattr(Runner, "_compute", fail_second)
        with pytest.raises(StepError, match="before the order"):
            engine.chat(messages, params)
        with pytest.raises(RequestError, match="several parts"):
            engine.model.logits(torch.zeros(1, engine.config.decoder.hidden_size))
        assert [choice.token_ids for choice in engine.chat(messages, params).choices] == expected


def test_a_picture_that_fails_before_a_step_ends_its_own_request_alone() -> None:
    with load(tensor_parallel_size=2) as engine:
        with pytest.raises(ValueError, match=r"picture|image"):
            engine.chat(ask("Read", b"no picture"))
        assert engine.chat(PICTURE).text


PROGRAM = """
import os, signal, sys, time
from internvl_rt import Engine, SamplingParams
engine = Engine.from_pretrained("tiny", device="cpu", dtype="float32", tensor_parallel_size=3)
params = SamplingParams(max_tokens=3000, ignore_eos=True)
def ask(): return engine.stream([{"role": "user", "content": "Hello"}], params)
{work}
"""
ENDINGS = {
    "it returns": ("print('loaded', flush=True); next(ask())", None),
    "it raises": ("print('loaded', flush=True); next(ask()); raise SystemExit(3)", None),
    "it is killed": ("print('loaded', flush=True); list(ask())", signal.SIGKILL),
    "it is terminated": ("print('loaded', flush=True); list(ask())", signal.SIGTERM),
    "it is interrupted": ("print('loaded', flush=True); list(ask())", signal.SIGINT),
    "it is killed, and a fork of it lives on": (
        "child = os.fork()\nif child == 0: time.sleep(20); os._exit(0)\n"
        "print('loaded', child, flush=True); list(ask())",
        signal.SIGKILL,
    ),
}


@pytest.mark.fast("it is interrupted")
@pytest.mark.parametrize("ending", ENDINGS)
def test_ranks_end_with_the_program_however_that_ends(ending: str) -> None:
    work, number = ENDINGS[ending]
    code = PROGRAM.replace("{work}", work)
    program = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert program.stdout is not None
    said = program.stdout.readline().split()
    ranks = processes_of(program.pid)
    ranks = [rank for rank in ranks if str(rank) not in said]
    if number is not None:
        assert len(ranks) == 2
        time.sleep(0.3)
        program.send_signal(number)
    program.wait(10)
    wait_until(lambda: not any(map(is_running, ranks)), 2.0)
    assert not folders(program.pid)
    for child in said[1:]:
        os.kill(int(child), signal.SIGKILL)
    program.stdout.close()

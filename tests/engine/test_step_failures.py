"""What interrupts or ends a step: other callers get their exact answers or an error, and the engine works on."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from internvl_rt import RequestError, SamplingParams, StepError
from internvl_rt.engine import in_flight, loop
from internvl_rt.engine.in_flight import InFlight
from internvl_rt.engine.loop import StepLoop
from internvl_rt.engine.request import Answer, Request
from internvl_rt.model.internvl import InternVL
from internvl_rt.steps import runner as runner_module
from internvl_rt.steps.kv_cache import KVCache
from internvl_rt.steps.runner import Runner
from internvl_rt.steps.scheduler import Scheduler
from internvl_rt.steps.step import StepArrays
from internvl_rt.steps.visual_cache import VisualCache
from support.calls import ask, attempt, check_idle, finish, ids, load, outcomes, submit

PACKAGE = Path(__file__).parents[2] / "internvl_rt"
SAMPLE = PACKAGE / "tiny" / "samples" / "4719.png"
PARAMS = SamplingParams(max_tokens=4, ignore_eos=True)
CALLS = [
    (ask("Read the digits.", SAMPLE), PARAMS),
    (ask("What is it?"), replace(PARAMS, max_tokens=12)),
    (ask("Say it again."), replace(PARAMS, max_tokens=7, n=2, temperature=0.8, seed=3, stop=["never"])),
    (ask("Count, please. " * 8), replace(PARAMS, max_tokens=20, logprobs=1)),
]
BOUNDARIES = [  # functions that a step calls, and which of their calls fails
    (StepLoop, "_end_cancelled", 2),
    (StepLoop, "_launch", 2),
    (StepLoop, "_collect", 2),
    (loop, "plan_step", 2),
    (Scheduler, "schedule", 2),
    (Scheduler, "_append", 2),
    (Scheduler, "_admit", 2),
    (Scheduler, "_prefills", 1),
    (Scheduler, "_place_siblings", 1),
    (Scheduler, "launched", 2),
    (Scheduler, "_fork", 1),
    (Scheduler, "publish", 2),
    (Scheduler, "remove", 2),
    (KVCache, "admit", 2),
    (KVCache, "append", 2),
    (KVCache, "copy_blocks", 2),
    (KVCache, "publish", 2),
    (KVCache, "end_step", 2),
    (StepArrays, "fill", 2),
    (runner_module, "lay_out", 2),
    (runner_module, "read_drawn", 2),
    (VisualCache, "hold", 2),
    (VisualCache, "get", 1),
    (VisualCache, "put", 1),
    (Runner, "load_pictures", 1),
    (Runner, "launch", 2),
    (Runner, "_encode_pictures", 2),
    (Runner, "_compute", 2),
    (Runner, "_draw", 2),
    (Runner, "collect", 2),
    (InternVL, "encode_tiles", 1),
    (InternVL, "run_step", 2),
    (InternVL, "logits", 2),
    (InFlight, "end_late", 2),
    (InFlight, "collect", 2),
    (InFlight, "_charge", 2),
    (InFlight, "_collect_each", 2),
    (InFlight, "_join", 2),
    (InFlight, "_charge_together", 2),
    (InFlight, "_accept", 2),
    (InFlight, "_finish", 2),
    (InFlight, "_release", 2),
    (InFlight, "_forget", 2),
    (in_flight, "build_reply", 2),
    (Answer, "read", 2),
    (Request, "end", 2),
]


def boundary_id(boundary):
    owner, name, _ = boundary
    return f"{owner.__name__}.{name}" if sum(name == other for _, other, _ in BOUNDARIES) > 1 else name


@pytest.fixture(scope="module")
def engine():
    with load(max_num_seqs=8, block_size=16, visual_cache_bytes=1 << 20) as engine:
        yield engine


@pytest.fixture(scope="module")
def expected(engine):
    return [ids(engine.chat(*call)) for call in CALLS]


def empty_caches(engine):
    engine.cache.blocks.reset()
    engine.visual_cache._entries.clear()
    engine.visual_cache.num_bytes = 0


def check(engine, found, expected):
    """Each must have its answer or an error of its own, and nothing may be held."""
    for one, right in zip(found, expected, strict=True):
        assert one == right or isinstance(one, StepError | KeyboardInterrupt | MemoryError), (one, right)
    errors = [one for one in found if isinstance(one, BaseException)]
    assert len(set(map(id, errors))) == len(errors)
    assert all(str(error).isprintable() for error in errors)
    check_idle(engine)


@pytest.mark.fast(
    *(
        f"{boundary}-KeyboardInterrupt-after"
        for boundary in ("plan_step", "schedule", "_admit", "launched", "remove", "InFlight.collect", "_forget", "end")
    )
)
@pytest.mark.parametrize("is_before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize(("owner", "name", "number"), BOUNDARIES, ids=map(boundary_id, BOUNDARIES))
def test_an_error_at_any_boundary_of_a_step_makes_no_answer_wrong(
    engine, expected, monkeypatch, owner, name, number, error, is_before
):
    original, calls = getattr(owner, name), []

    def fail_once(*args, **keywords):
        calls.append(name)
        if len(calls) != number:
            return original(*args, **keywords)
        if not is_before:
            original(*args, **keywords)
        raise error

    empty_caches(engine)
    with monkeypatch.context() as patch:
        patch.setattr(engine.loop, "run_ahead", is_before == (error is MemoryError))
        patch.setattr(owner, name, fail_once)
        found = outcomes(engine, CALLS)
    check(engine, found, expected)
    assert len(calls) >= number
    assert any(isinstance(one, error | StepError) for one in found)
    assert outcomes(engine, CALLS) == expected
    check_idle(engine)


LINES_OF = ("engine/loop.py", "engine/in_flight.py", "engine/request.py", "steps/scheduler.py", "steps/kv_cache.py")
LINES_OF += ("steps/step.py", "steps/runner.py", "steps/sequence.py")
# The functions that take and give back a lock: a trace is called at lines between a lock and what makes sure that it
# is given back (of a `with`, its own line at its end and a `pass` in it), where Python runs no signal handler.
NOT_IN = ("_in_turn", "_locked", "_end_cancelled_unless_busy")


class InterruptAt:
    """A function for `sys.settrace` that raises an error before line number `number` that runs."""

    def __init__(self, number, error):
        self.number, self.error, self.num_lines = number, error, 0

    def __call__(self, frame, event, _):
        code = frame.f_code
        return self.at_line if code.co_filename.endswith(LINES_OF) and code.co_name not in NOT_IN else None

    def at_line(self, frame, event, _):
        self.num_lines += event == "line"
        if event == "line" and self.num_lines == self.number:
            sys.settrace(None)
            raise self.error
        return self.at_line


@pytest.mark.slow
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("run_ahead", [False, True])
def test_an_error_at_any_line_of_a_step_makes_no_answer_wrong(engine, expected, monkeypatch, run_ahead, error):
    monkeypatch.setattr(engine.loop, "run_ahead", run_ahead)

    def run(number):
        interrupt = InterruptAt(number, error)
        empty_caches(engine)
        requests = [submit(engine, *call) for call in CALLS]
        before = sys.gettrace()
        sys.settrace(interrupt)
        try:
            found = finish(engine, requests)
        finally:
            sys.settrace(before)
        check(engine, found, expected)
        return interrupt.num_lines

    num_lines = run(-1)
    assert num_lines > 5000
    for number in np.random.default_rng(0).integers(1, num_lines, 40):
        run(number)
    assert outcomes(engine, CALLS) == expected


@pytest.mark.parametrize("is_before", [True, False])
@pytest.mark.parametrize(("owner", "name"), [(InFlight, "add"), (Scheduler, "add")])
def test_a_call_that_is_interrupted_while_it_begins_leaves_no_request_behind(
    engine, expected, monkeypatch, owner, name, is_before
):
    original = getattr(owner, name)

    def interrupt(*args):
        if not is_before:
            original(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupt)
        for call in (engine.chat, lambda *args: list(engine.stream(*args))):
            assert isinstance(attempt(call, *CALLS[1]), KeyboardInterrupt)
    check_idle(engine)
    assert outcomes(engine, CALLS) == expected


def test_an_engine_that_is_interrupted_while_it_closes_leaves_nobody_waiting(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with load() as engine:
        requests = [submit(engine, *call) for call in CALLS]
        engine.loop.advance(requests[0])
        with monkeypatch.context() as patch:
            patch.setattr(Scheduler, "remove", interrupt)
            assert isinstance(attempt(engine.close), KeyboardInterrupt)
        assert all(isinstance(one, StepError | RequestError) for one in finish(engine, requests))
        check_idle(engine)


def test_a_cancellation_that_is_interrupted_makes_no_answer_wrong(engine, expected, monkeypatch):
    original = Scheduler.remove

    def interrupt(*args):
        original(*args)
        raise KeyboardInterrupt

    requests = [submit(engine, *call) for call in CALLS]
    engine.loop.advance(requests[1])
    with monkeypatch.context() as patch:
        patch.setattr(Scheduler, "remove", interrupt)
        assert isinstance(attempt(engine.loop.cancel, requests[0]), KeyboardInterrupt)
    check(engine, finish(engine, requests), expected)
    assert outcomes(engine, CALLS) == expected


def fail(*_):
    raise RuntimeError("device fault")


def test_a_second_interrupt_while_the_first_is_dealt_with_does_no_more_harm(engine, expected, monkeypatch):
    original, calls = engine.runner.fail, []

    def fail_again():
        calls.append(original())
        if len(calls) <= 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.loop, "_launch", fail)
        patch.setattr(engine.runner, "fail", fail_again)
        errors = outcomes(engine, CALLS)
    assert [type(error) for error in errors] == [KeyboardInterrupt, *[StepError] * 3]
    assert len(calls) == 3
    check_idle(engine)
    assert outcomes(engine, CALLS) == expected

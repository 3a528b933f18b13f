"""What interrupts or ends a step: other callers get their exact answers or an error, and the engine works on."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from internvl_rt import EngineDeadError, InternVLError, MediaError, SamplingParams, StepError
from internvl_rt.engine import in_flight, loop
from internvl_rt.engine.in_flight import InFlight
from internvl_rt.engine.loop import StepLoop
from internvl_rt.engine.request import Answer, Request
from internvl_rt.inputs.image import OpenImage
from internvl_rt.model.internvl import InternVL
from internvl_rt.steps import runner as runner_module
from internvl_rt.steps import step as step_module
from internvl_rt.steps.kv_cache import KVCache
from internvl_rt.steps.runner import Runner
from internvl_rt.steps.scheduler import Scheduler
from internvl_rt.steps.visual_cache import VisualCache
from support.calls import ask, check_idle, load

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
    (Scheduler, "_prefills", 2),
    (Scheduler, "_place_siblings", 2),
    (Scheduler, "launched", 2),
    (Scheduler, "_fork", 1),
    (Scheduler, "publish", 2),
    (Scheduler, "remove", 2),
    (Scheduler, "_pass_place_on", 2),
    (KVCache, "admit", 2),
    (KVCache, "append", 2),
    (KVCache, "copy_blocks", 2),
    (KVCache, "publish", 2),
    (KVCache, "end_step", 2),
    (step_module, "fill_step", 2),
    (runner_module, "build_step", 2),
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
    with load(max_num_seqs=4, block_size=16, visual_cache_bytes=1 << 20) as engine:
        yield engine


@pytest.fixture(scope="module")
def expected(engine):
    return [ids(engine.chat(*call)) for call in CALLS]


def ids(reply):
    return [choice.token_ids for choice in reply.choices]


def attempt(call, *args):
    """Returns a call's result, or its error."""
    try:
        return call(*args)
    except (InternVLError, KeyboardInterrupt, MemoryError, OddInterrupt) as error:
        return error


def submit(engine, messages, params):
    request = engine.new_request(engine.prepare(messages), params)
    engine.loop.submit(request)
    return request


def advance(engine, request):
    """Runs a step as a caller does; returns the ids of a request that is done, or None."""
    try:
        engine.loop.advance(request)
    except BaseException:
        engine.loop.cancel(request)
        raise
    return ids(request.reply) if request.done else None


def outcomes(engine, calls):
    """Asks all at once and lets them take turns in running steps. Returns the ids or the error of each."""
    return finish(engine, [attempt(submit, engine, *call) for call in calls])


def finish(engine, requests):
    found = list(requests)
    while running := [(index, each) for index, each in enumerate(found) if isinstance(each, Request)]:
        for index, request in running:
            if (result := attempt(advance, engine, request)) is not None:
                found[index] = result
    return found


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
        f"{boundary}-KeyboardInterrupt-after-False"
        for boundary in ("plan_step", "schedule", "_admit", "launched", "remove", "InFlight.collect", "_forget", "end")
    )
)
@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("is_before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize(("owner", "name", "number"), BOUNDARIES, ids=map(boundary_id, BOUNDARIES))
def test_an_error_at_any_boundary_of_a_step_makes_no_answer_wrong(
    engine, expected, monkeypatch, owner, name, number, error, is_before, run_ahead
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
        patch.setattr(engine.loop, "run_ahead", run_ahead)
        patch.setattr(owner, name, fail_once)
        found = outcomes(engine, CALLS)
    check(engine, found, expected)
    assert len(calls) >= number
    assert any(isinstance(one, error | StepError) for one in found)
    assert outcomes(engine, CALLS) == expected
    check_idle(engine)


def test_each_request_of_a_failed_step_gets_an_error_of_its_own_without_the_texts_of_others(engine, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr(engine.model, "run_step", fail)
    errors = outcomes(engine, [(ask(f"secret {index}"), PARAMS) for index in range(3)])
    assert len(set(map(id, errors))) == 3
    for index, error in enumerate(errors):
        assert type(error) is StepError
        assert "memory ran out in a step, by OutOfMemoryError('CUDA out of memory" in str(error)
        assert "lower max_num_seqs, max_tokens_per_step" in str(error)
        assert str(error).isprintable()
        assert type(error.__cause__) is torch.OutOfMemoryError
        assert not frames_of(error.__cause__)
        assert error.__context__ is None
        for frame in frames_of(error):
            texts = repr([value for name, value in frame.f_locals.items() if name in ("request", "prepared", "self")])
            assert not any(f"secret {other}" in texts for other in range(3) if other != index)
            assert "chunks" not in frame.f_locals
    check_idle(engine)


def frames_of(error):
    frames, at = [], error.__traceback__
    while at is not None:
        frames.append(at.tb_frame)
        at = at.tb_next
    return frames[1:] if frames and frames[0].f_code is attempt.__code__ else frames


class OddInterrupt(BaseException):
    """An interrupt that cannot be copied, as its class takes other arguments than it keeps."""

    def __init__(self, one, other):
        super().__init__()


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt(), OddInterrupt(1, 2)])
def test_an_interrupt_reaches_its_own_caller_as_it_is_and_the_others_without_frames(engine, monkeypatch, interrupt):
    def fail(*_):
        raise interrupt

    monkeypatch.setattr(engine.model, "run_step", fail)
    first, *others = outcomes(engine, [(ask("Hello"), PARAMS)] * 3)
    assert first is interrupt
    assert fail.__code__ in [frame.f_code for frame in frames_of(interrupt)]
    for error in others:
        assert type(error) is StepError
        assert f"interrupted by {type(interrupt).__name__}" in str(error)
        assert error.__cause__ is not interrupt
        assert not frames_of(error.__cause__)
    check_idle(engine)


def fail(*_):
    raise RuntimeError("device fault")


def test_an_engine_that_cannot_be_mended_is_dead_and_leaves_nobody_waiting(monkeypatch):
    def fail_again(*_):
        raise RuntimeError("the device is lost")

    with load() as engine:
        monkeypatch.setattr(engine.loop, "_launch", fail)
        monkeypatch.setattr(engine.runner, "fail", fail_again)
        errors = outcomes(engine, [(ask("Hello"), PARAMS)] * 3)
        later = attempt(engine.chat, ask("Hello"))
    assert [type(error) for error in errors] == [StepError] * 3
    assert isinstance(later, EngineDeadError)
    assert "the device is lost" in str(later)
    assert not frames_of(later.__cause__)


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


def test_a_fault_while_pictures_are_encoded_is_one_line(engine, monkeypatch):
    def fail(_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    empty_caches(engine)
    monkeypatch.setattr(engine.model, "encode_tiles", fail)
    error = attempt(engine.encode_images, [SAMPLE])
    assert isinstance(error, StepError)
    assert str(error).isprintable()
    check_idle(engine)


@pytest.mark.parametrize("number", [1, 4])
def test_a_picture_that_breaks_in_a_step_ends_its_own_request_alone(expected, monkeypatch, number):
    """It was in the KV cache when its request was made, and had left it when the step began."""
    with load(block_size=16, visual_cache_bytes=0) as engine:
        engine.chat(*CALLS[0])
        requests = [submit(engine, *call) for call in CALLS[:number]]
        engine.cache.blocks.reset()

        def fail(_):
            raise MediaError("the picture is broken")

        monkeypatch.setattr(OpenImage, "tiles", fail)
        found = finish(engine, requests)
        assert isinstance(found[0], MediaError)
        assert not frames_of(found[0].__cause__ or found[0])[3:], "no frame of the step"
        assert found[1:] == expected[1:number]
        check_idle(engine)


def test_visual_tokens_that_a_request_found_are_there_when_it_runs(monkeypatch):
    """Others that push them out of the cache meanwhile cause no decoding in a step."""
    pictures = [np.random.default_rng(seed).integers(0, 256, (60, 60, 3), dtype=np.uint8) for seed in range(6)]
    with load(prefix_cache=False, visual_cache_bytes=1) as engine:
        size = engine.encode_images(pictures[:1])[0].nbytes
    with load(prefix_cache=False, visual_cache_bytes=2 * size) as engine:
        expected = engine.chat(ask("What?", pictures[0]), PARAMS).token_ids
        stream = engine.stream(ask("What?", pictures[0]), PARAMS)
        for picture in pictures[1:]:
            engine.chat(ask("What?", picture), PARAMS)
        assert len(engine.visual_cache._entries) == 2
        num_encoded_tiles = engine.stats()["encoded_tiles"]

        def fail(_):
            raise AssertionError("a picture was decoded")

        monkeypatch.setattr(OpenImage, "tiles", fail)
        assert list(stream)[-1].reply.token_ids == expected
        del stream
        assert engine.stats()["encoded_tiles"] == num_encoded_tiles
        assert not engine.visual_cache._held, "they go with their request"

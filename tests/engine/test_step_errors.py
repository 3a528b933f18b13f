"""Each request of a failed step gets an error of its own, and a picture that fails ends its own request alone."""

from pathlib import Path

import numpy as np
import pytest
import torch

from internvl_rt import EngineDeadError, MediaError, SamplingParams, StepError
from internvl_rt.inputs.image import OpenImage
from internvl_rt.steps.uploads import Uploads
from support.calls import ask, attempt, check_idle, finish, load, outcomes, submit

SAMPLE = Path(__file__).parents[2] / "internvl_rt" / "tiny" / "samples" / "4719.png"
PARAMS = SamplingParams(max_tokens=4, ignore_eos=True)
OWN_FRAMES = {"attempt", "advance", "_in_turn", "_advance", "poll"}  # of the caller that an error is raised in


@pytest.fixture
def engine():
    with load(block_size=16, visual_cache_bytes=0) as engine:
        yield engine


def test_each_request_of_a_failed_step_gets_an_error_of_its_own_without_the_texts_of_others(engine, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr(engine.model, "run_step", fail)
    errors = outcomes(engine, [(ask(f"secret {index}"), PARAMS) for index in range(3)])
    assert len(set(map(id, errors))) == 3
    for error in errors:
        assert type(error) is StepError
        assert "memory ran out, by OutOfMemoryError('CUDA out of memory" in str(error)
        assert "lower max_num_seqs, max_tokens_per_step" in str(error)
        assert str(error).isprintable()
        assert type(error.__cause__) is torch.OutOfMemoryError
        assert not frames_of(error.__cause__)
        assert error.__context__ is None
        assert names_of(error) == OWN_FRAMES
    check_idle(engine)


def names_of(error):
    return {frame.f_code.co_name for frame in frames_of(error)}


def frames_of(error):
    frames, at = [], error.__traceback__
    while at is not None:
        frames.append(at.tb_frame)
        at = at.tb_next
    return frames


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


def test_an_engine_that_cannot_be_mended_is_dead_and_leaves_nobody_waiting(engine, monkeypatch):
    def fail(*_):
        raise RuntimeError("device fault")

    def fail_again(*_):
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(engine.loop, "_launch", fail)
    monkeypatch.setattr(engine.runner, "fail", fail_again)
    errors = outcomes(engine, [(ask("Hello"), PARAMS)] * 3)
    later = attempt(engine.chat, ask("Hello"))
    assert [type(error) for error in errors] == [StepError] * 3
    assert isinstance(later, EngineDeadError)
    assert "the device is lost" in str(later)
    assert not frames_of(later.__cause__)


def test_a_fault_while_pictures_are_encoded_is_one_line(engine, monkeypatch):
    def fail(_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr(engine.model, "encode_tiles", fail)
    error = attempt(engine.encode_images, [SAMPLE])
    assert isinstance(error, StepError)
    assert str(error).isprintable()
    check_idle(engine)


@pytest.mark.parametrize("num_others", [0, 3])
def test_a_picture_that_breaks_in_a_step_ends_its_own_request_alone(engine, monkeypatch, num_others):
    """It was in the KV cache when its request was made, and had left it when the step began."""
    others = [(ask(f"Question {index}"), PARAMS) for index in range(num_others)]
    expected = outcomes(engine, others)
    read_digits = ask("Read the digits.", SAMPLE), PARAMS
    engine.chat(*read_digits)
    requests = [submit(engine, *call) for call in (read_digits, *others)]
    engine.cache.blocks.reset()

    def fail(_):
        raise MediaError("the picture is broken") from RuntimeError("scan 3")

    monkeypatch.setattr(OpenImage, "tiles", fail)
    broken, *found = finish(engine, requests)
    assert isinstance(broken, MediaError)
    assert names_of(broken) == OWN_FRAMES
    assert not frames_of(broken.__cause__)
    assert found == expected
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


def test_a_picture_for_which_there_is_no_memory_fails_its_own_call_alone(monkeypatch):
    picture = np.zeros((60, 60, 3), np.uint8)
    with load() as engine:
        expected = engine.chat(ask("What?", picture), PARAMS).token_ids

        def fail(*_):
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

        with monkeypatch.context() as patched:
            patched.setattr(Uploads, "_send", fail)
            for call in (
                lambda: engine.chat(ask("What?", 255 - picture), PARAMS),
                lambda: engine.encode_images([picture + 100]),  # one that is not held already
            ):
                with pytest.raises(StepError, match="memory ran out, by OutOfMemoryError"):
                    call()
        assert engine.chat(ask("What?", picture), PARAMS).token_ids == expected
        check_idle(engine)

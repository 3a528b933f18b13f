"""Two engines run at the same time in one process on one device, and each answers as it does alone."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor

from internvl_rt import Engine, SamplingParams
from internvl_rt.model import ops_triton
from internvl_rt.model.linear import Linear, Norm
from internvl_rt.model.ops_triton import triton_ops
from internvl_rt.steps.runner import Runner

PARAMS = [
    SamplingParams(max_tokens=24, ignore_eos=True),
    SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.8, top_p=0.9, seed=1, logprobs=1),
    SamplingParams(max_tokens=8, ignore_eos=True, temperature=1.0, repetition_penalty=1.2, n=2, seed=2),
]


def options(device: str) -> dict[str, object]:
    """Returns options of an engine that keeps nothing between requests and so computes the same bits each time."""
    room = {"max_num_seqs": 4, "max_model_len": 1024, "kv_cache_bytes": 64 << 20}
    return {"device": device, "prefix_cache": False, "visual_cache_bytes": 0, **room}


def conversations() -> list[list[dict[str, object]]]:
    picture = np.random.default_rng(0).integers(0, 256, (300, 200, 3), dtype=np.uint8)
    contents = ["Hello", [{"type": "image", "image": picture}, {"type": "text", "text": "Read the digits."}], "a " * 90]
    return [[{"role": "user", "content": content}] for content in contents]


def ask(engine: Engine) -> list[list[int]]:
    """Asks one question after the other, so that every batch has one size, and returns all answers' tokens."""
    found = []
    for messages, params in zip(conversations(), PARAMS, strict=True):
        reply = engine.chat(messages, params)
        found += [choice.token_ids for choice in reply.choices]
    return found


class Asker(threading.Thread):
    """Asks an engine again and again, on the thread's own stream, until `stopped` is set."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine, self.answers, self.error = engine, list[list[list[int]]](), list[BaseException]()
        self.stopped = threading.Event()

    def run(self) -> None:
        on_gpu = self.engine.device.type == "cuda"
        with torch.cuda.stream(torch.cuda.Stream()) if on_gpu else nullcontext():
            try:
                while not self.stopped.is_set() or not self.answers:
                    self.answers.append(ask(self.engine))
            except BaseException as error:
                self.error.append(error)


@contextmanager
def asking(engine: Engine) -> Iterator[Asker]:
    asker = Asker(engine)
    asker.start()
    try:
        yield asker
    finally:
        asker.stopped.set()
        asker.join()


def check_two(device: str) -> None:
    with Engine.from_pretrained("tiny", **options(device)) as alone:
        expected = ask(alone)
        assert ask(alone) == expected
    with (
        Engine.from_pretrained("tiny", **options(device)) as first,
        asking(first) as asker,
        Engine.from_pretrained("tiny", **options(device)) as second,
    ):
        found = [ask(second) for _ in range(3)]
    assert not asker.error
    assert found == [expected] * 3
    assert asker.answers == [expected] * len(asker.answers)


def test_two_engines_answer_at_the_same_time_as_each_does_alone() -> None:
    check_two("cpu")


@pytest.mark.gpu
def test_two_engines_on_one_gpu_answer_as_each_does_alone_and_one_is_built_while_the_other_serves() -> None:
    check_two("cuda")


@pytest.mark.gpu
def test_no_launch_of_a_step_waits_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch raises an error where it would wait: in copies from pageable memory, and where the host needs a value."""
    launch = Runner.launch

    def strict_launch(self: Runner, step: object) -> object:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(self, step)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with Engine.from_pretrained("tiny", **options("cuda")) as engine:
        expected = ask(engine)
        monkeypatch.setattr(Runner, "launch", strict_launch)
        engine.cache.blocks.reset()
        assert ask(engine) == expected
        batch = conversations() * 3
        assert len(engine.generate(batch, [SamplingParams(max_tokens=5, prompt_logprobs=1)] * len(batch))) == len(batch)


@pytest.mark.gpu
def test_visual_tokens_that_leave_are_in_order_with_the_callers_stream() -> None:
    pictures = [np.random.default_rng(n).integers(0, 256, (900, 900, 3), dtype=np.uint8) for n in range(3)]
    with Engine.from_pretrained("tiny", **options("cuda")) as engine:
        expected = [visual_XD.sum() for visual_XD in engine.encode_images(pictures, cache_salt="first")]
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            for salt in "abc":
                sums = [visual_XD.sum() for visual_XD in engine.encode_images(pictures, cache_salt=salt)]
                assert torch.equal(torch.stack(sums), torch.stack(expected))


def test_tables_of_kernels_share_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[object] = []

    def note(x: Tensor, *args: object, workspace: object, **kwargs: object) -> Tensor:
        used.append(workspace)
        return x

    monkeypatch.setattr(ops_triton, "gemv", note)
    monkeypatch.setattr(ops_triton, "build_gemv_workspace", lambda device: object())
    x, norm, linear = torch.zeros(1, 8), Norm(torch.ones(8), None, 1e-6), Linear(torch.zeros(8, 8), None)
    tables = triton_ops(x.device), triton_ops(x.device)
    for table in (*tables, *tables):
        table.linear(x, linear, norm=norm)
    assert used[:2] == used[2:]
    assert used[0] is not used[1]

"""Steps from graphs on several ranks: each step is one order, and every rank replays the same graphs for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import internvl_rt
from internvl_rt import SamplingParams
from internvl_rt.errors import StepError
from internvl_rt.steps.orders import Capturing, Copies, Encoding, Order, Pass, Replays
from support.calls import ask, check_idle, load
from support.rank_threads import RankThreads

SAMPLE = str(Path(internvl_rt.__file__).parent / "tiny" / "samples" / "4719.png")
WIDE = np.random.default_rng(0).integers(0, 256, (60, 230, 3), dtype=np.uint8)  # is cut into several tiles
LIMITS = {"max_num_seqs": 4, "max_model_len": 256, "max_tokens_per_step": 64}
QUESTIONS = [ask("Hello"), ask("Read the digits."), ask("And what of a question that is longer than a step?" * 2)]
PARAMS = [SamplingParams(max_tokens=number, ignore_eos=True) for number in (9, 4, 7)]


@contextmanager
def ranks(size: int, *, everything: bool = False) -> Iterator[RankThreads]:
    made = RankThreads(size, **LIMITS)
    with made.engine:
        made.capture(**LIMITS, everything=everything)
        made.replayed()
        made.lead.orders.clear()
        yield made
        check_idle(made.engine)
        made.lead.check()


@pytest.fixture(scope="module")
def one():
    with load(backend="torch", **LIMITS) as engine:
        yield engine


def run_steps(made: RankThreads, questions: list[Any], params: list[SamplingParams]) -> list[tuple[list[Order], Any]]:
    """Answers the questions together; returns the orders of each step, and what each rank has replayed for them."""
    engine = made.engine
    for question, each in zip(questions, params, strict=True):
        engine.loop.submit(engine.new_request(engine.prepare(question), each))
    steps = []
    while engine.loop.step():
        steps.append((list(made.lead.orders), made.replayed()))
        made.lead.orders.clear()
    return [step for step in steps if step[0]]


def rows(key: tuple[int, ...]) -> int:
    """Returns how many rows a graph computes: the decodes of (decodes,), the draws of (0, draws), or all tokens."""
    return key[-1] if len(key) < 3 else key[0] + key[2]


@pytest.mark.parametrize("size", [2, 3])
@torch.inference_mode()
def test_each_step_is_one_order_and_each_rank_replays_the_graphs_that_it_names(size: int) -> None:
    with ranks(size) as made:
        steps = run_steps(made, QUESTIONS, PARAMS)
    kinds = []
    for given, replayed in steps:
        (order,) = given
        assert isinstance(order, Replays)
        assert replayed == [[rows(key) for key in order.keys]] * size
        kinds.append([len(key) for key in order.keys])
    assert all(kind in ([1], [3], [3, 2]) for kind in kinds), "a decode step, or layers and perhaps a head"
    assert kinds[-4:] == [[1]] * 4
    assert [3, 2] in kinds
    assert any(order.keys[0][0] for (order,), _ in steps if len(order.keys) == 2), "sequences decode beside a chunk"


@pytest.mark.parametrize("everything", [False, True])
@torch.inference_mode()
def test_all_ranks_capture_the_same_graphs_in_the_same_order(everything: bool) -> None:
    with ranks(3, everything=everything) as made:
        first, *others = (list(executor.step_graphs._replays) for executor in made.executors)
        assert first == others[0] == others[1]
        rows_captured = [recorder.captured for recorder in made.recorders]
        assert rows_captured[0] == rows_captured[1] == rows_captured[2]
        run_steps(made, QUESTIONS, PARAMS)
        made.lead.wait()
        later, *others = (list(executor.step_graphs._replays) for executor in made.executors)
        assert later == others[0] == others[1]
        assert later[: len(first)] == first
        assert (len(later) > len(first)) is not everything, "some are captured when a step first needs them"


KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.5, "seed": 3},
    "several answers": {"temperature": 1.5, "seed": 3, "n": 2},
    "probabilities": {"logprobs": 2, "prompt_logprobs": 1},
    "penalties": {"repetition_penalty": 1.3, "min_tokens": 3},
    "a grammar": {"regex": "[a-f]{4}"},
}


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_the_tokens_are_those_of_one_rank(one, kind: str) -> None:
    questions = [*QUESTIONS, ask("Read the digits.", SAMPLE), ask("And these?", WIDE)]
    params = SamplingParams(max_tokens=8, ignore_eos=True, **KINDS[kind])
    expected = one.generate(questions, params)
    with ranks(2) as made:
        replies = made.engine.generate(questions, params)
        orders = made.lead.orders
        for ours, theirs in zip(replies, expected, strict=True):
            assert [choice.token_ids for choice in ours.choices] == [choice.token_ids for choice in theirs.choices]
    assert {type(order) for order in orders} - {Copies} == {Replays, Encoding}
    assert any(isinstance(order, Copies) for order in orders) == (kind == "several answers")
    drawn_by_rank_0 = sum(order.drawing.num_draws for order in orders if isinstance(order, Replays))
    assert (drawn_by_rank_0 == 0) == (kind in ("greedy", "sampled"))


@torch.inference_mode()
def test_a_picture_is_one_more_order_and_its_visual_tokens_are_shared_once() -> None:
    with ranks(2) as made:
        steps = run_steps(made, [ask("Read.", WIDE)], [SamplingParams(max_tokens=3, ignore_eos=True)])
        meeting = made.lead._meeting.seen
    (encoding, prompt), *decodes = (given for given, _ in steps)
    assert isinstance(encoding, Encoding)
    assert encoding.num_tiles > 2
    assert isinstance(prompt, Replays)
    assert prompt.drawing.num_visual == 4 * encoding.num_tiles
    assert [[len(key) for order in given for key in order.keys] for given in decodes] == [[1]] * 2
    shares = [shape for name, shape in meeting if name == "share" and len(shape) == 2]
    assert shares == [(4 * encoding.num_tiles, 128)]


@torch.inference_mode()
def test_a_step_that_is_too_large_for_graphs_is_one_order_too(one) -> None:
    questions, params = [QUESTIONS[2]] * 2, SamplingParams(max_tokens=3, ignore_eos=True)
    expected = one.generate(questions, params)
    made = RankThreads(2, **LIMITS)
    with made.engine:
        made.capture(max_num_seqs=1, max_model_len=256, max_tokens_per_step=64)
        (capturing,) = made.lead.orders
        assert isinstance(capturing, Capturing)
        replies = made.engine.generate(questions, params)
        assert {type(order) for order in made.lead.orders[1:]} == {Pass, Replays}
    assert [reply.token_ids for reply in replies] == [reply.token_ids for reply in expected]


@torch.inference_mode()
def test_an_error_of_another_rank_is_raised_on_rank_0() -> None:
    made = RankThreads(2, **LIMITS)

    def fail(*_: object) -> None:
        raise ValueError("rank 1 has a fault")

    made.executors[1].run_pass = fail
    with made.engine:
        with pytest.raises(StepError, match="BrokenBarrierError"):  # rank 0 notices that they do not meet
            made.engine.chat(QUESTIONS[0], PARAMS[0])
        with pytest.raises(ValueError, match="rank 1 has a fault"):
            made.lead.check()

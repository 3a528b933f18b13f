"""A request that ends leaves nothing behind, however it ends."""

import gc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from internvl_rt import SamplingParams
from internvl_rt.inputs.picture import Picture
from internvl_rt.steps.runner import Runner
from internvl_rt.steps.scheduler import Scheduler
from internvl_rt.steps.sequence import Sequence
from support.calls import ask, load

SAMPLE = Path(__file__).parents[2] / "internvl_rt" / "tiny" / "samples" / "4719.png"
GREEDY = SamplingParams(max_tokens=8, ignore_eos=True)
DRAWN = replace(GREEDY, temperature=0.8, top_k=5, seed=11)


@pytest.mark.parametrize(("owner", "name"), [(Runner, "encode"), (Scheduler, "schedule")])
def test_a_stream_may_be_closed_in_the_middle_of_another_call(owner, name, monkeypatch):
    """The garbage collector closes a stream that nobody refers to, in whatever call the thread is in."""
    with load(max_num_seqs=2) as engine:
        expected = engine.chat(ask("Hello"), GREEDY).token_ids
        forgotten = [engine.stream(ask("Hello"), replace(GREEDY, max_tokens=100))]
        next(forgotten[0])

        original = getattr(owner, name)

        def close_in_the_middle(*args, **keywords):
            result = original(*args, **keywords)
            while forgotten:
                forgotten.pop().close()
            return result

        monkeypatch.setattr(owner, name, close_in_the_middle)

        def use():
            engine.encode_images([SAMPLE])
            return engine.chat(ask("Hello"), GREEDY).token_ids

        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(use).result(timeout=60) == expected
        assert not forgotten
        assert engine.stats()["requests_cancelled"] == 1
        assert engine.stats()["kv_blocks_used"] == 0


def test_an_ended_request_leaves_nothing_behind():
    def alive():
        gc.collect()
        return {id(each): each for each in gc.get_objects() if type(each) in (Sequence, Picture)}

    with load() as engine:
        others = alive()  # of other tests; they are held, so that no new object gets the id of one
        engine.chat(ask("Read the digits.", SAMPLE), replace(DRAWN, n=2))
        assert alive().keys() <= others.keys()


@pytest.mark.parametrize("n", [1, 3])
def test_the_stop_string_that_ended_an_answer_may_be_part_of_its_text(n):
    params = SamplingParams(max_tokens=60, temperature=1.0, seed=1, ignore_eos=True, n=n)
    with load() as engine:
        stop = engine.chat(ask("Hello"), params).text[4:7]
        stopped = engine.chat(ask("Hello"), replace(params, stop=stop))
        included = engine.chat(ask("Hello"), replace(params, stop=stop, include_stop=True))
        pieces = list(engine.stream(ask("Hello"), replace(params, stop=stop, include_stop=True)))
    assert stopped.finish_reason == included.finish_reason == "stop"
    for index, (without, choice) in enumerate(zip(stopped.choices, included.choices, strict=True)):
        assert choice.token_ids == without.token_ids
        assert choice.text == without.text + stop * (choice.finish_reason == "stop")
        assert "".join(piece.text for piece in pieces if piece.choice == index) == choice.text

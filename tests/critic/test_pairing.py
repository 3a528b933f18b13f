"""A model and its critic on one device share what both leave of its memory; on two, each has its own."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from internvl_rt import RequestError
from internvl_rt.critic import load_with_critic, pairing
from internvl_rt.engine import memory as memory_module
from internvl_rt.engine.loading import plan_parts
from internvl_rt.engine.memory import RESERVE, split_cache
from internvl_rt.engine.options import EngineOptions
from support.calls import ask

SAMPLES = Path(__file__).parents[2] / "internvl_rt" / "tiny" / "samples"
CPU, GIB = torch.device("cpu"), 1 << 30


def bytes_that_leave(left, *plans):
    """Returns how many bytes must be free, so that so many are left for caches beside the models of these plans."""
    weight_bytes = sum(plan.weight_bytes for plan in plans)
    return weight_bytes + (sum(plan.fixed_bytes for plan in plans) - weight_bytes + left) / (1 - RESERVE)


@pytest.fixture
def free(monkeypatch):
    return lambda num_bytes: monkeypatch.setattr(memory_module, "free_host_bytes", lambda: int(num_bytes))


def test_both_caches_hold_as_many_tokens_in_what_the_models_leave(free):
    small = plan_parts("tiny", EngineOptions(device="cpu", dtype="float32"))
    large = replace(small, block_bytes=4 * small.block_bytes, weight_bytes=3 * small.weight_bytes)
    free(bytes_that_leave(6_000_000, small, large))
    one, other = split_cache((small, large), (False, False), CPU)
    assert other == pytest.approx(4 * one, abs=8)
    assert 5_900_000 < one + other <= 6_000_000
    free(1 << 60)
    both = [small.cache_bytes, large.cache_bytes]
    assert split_cache((small, large), (False, False), CPU) == both, "neither needs more than alone"


def test_what_one_cache_does_not_need_is_the_other_one_s(free):
    plan = plan_parts("tiny", EngineOptions(device="cpu"))
    few = replace(plan, num_blocks=4)
    free(bytes_that_leave(40_000_000, few, plan))
    assert split_cache((few, plan), (False, False), CPU)[0] == few.cache_bytes
    assert sum(split_cache((few, plan), (False, False), CPU)) == pytest.approx(40_000_000, abs=8)
    given = replace(plan, num_blocks=100)
    assert split_cache((given, plan), (True, False), CPU)[0] == given.cache_bytes
    assert sum(split_cache((given, plan), (True, False), CPU)) == pytest.approx(40_000_000, abs=8)
    with pytest.raises(RequestError, match="or lower kv_cache_bytes"):
        split_cache((replace(plan, num_blocks=10_000), plan), (True, False), CPU)


def test_models_that_do_not_fit_together_are_refused_before_one_is_loaded(free, monkeypatch):
    plan = plan_parts("tiny", EngineOptions(device="cpu"))
    free(plan.fixed_bytes * 1.9)
    monkeypatch.setattr(pairing, "load_parts", None)
    with pytest.raises(RequestError, match="put each on a device of its own, choose smaller ones"):
        load_with_critic("tiny", "tiny", options={"device": "cpu"}, critic_options={"device": "cpu"})


def test_a_pair_on_one_device_runs_in_its_shares(free):
    options = {"device": "cpu", "max_num_seqs": 8}
    plan = plan_parts("tiny", EngineOptions(**options))
    free(bytes_that_leave(4_000_000, plan, plan))
    engine, critic = load_with_critic("tiny", "tiny", options=options, critic_options=options)
    with engine, critic:
        caches = engine.memory.cache_bytes, critic.engine.memory.cache_bytes
        assert 1_800_000 < caches[0] == caches[1] <= 2_000_000
        asked = ask("Read the digits.", SAMPLES / "4719.png")
        ranking = engine.best_of(asked, 4, critic=critic)
        assert ranking.text == "4719"
        assert ranking.best.judgement.steps == ("4719",)


def test_a_share_that_holds_no_whole_sequence_is_refused_before_a_model_is_loaded(free, monkeypatch):
    options = {"device": "cpu"}, {"device": "cpu", "max_model_len": 4096}
    free(bytes_that_leave(1_000_000, *(plan_parts("tiny", EngineOptions(**each)) for each in options)))
    monkeypatch.setattr(pairing, "load_parts", None)
    with pytest.raises(RequestError, match="one sequence needs"):
        load_with_critic("tiny", "tiny", options=options[0], critic_options=options[1])


def test_a_cache_that_is_given_is_kept(free):
    free(8 * GIB)
    options = {"device": "cpu", "kv_cache_bytes": 1 << 20}
    engine, critic = load_with_critic("tiny", "tiny", options=options, critic_options={"device": "cpu"})
    with engine, critic:
        assert engine.memory.cache_bytes <= 1 << 20 < critic.engine.memory.cache_bytes


class Chosen(Exception):
    """Ends a load, with the devices that it was for."""


@pytest.mark.parametrize(
    ("num_gpus", "options", "critic_options", "devices"),
    [
        (2, {}, {}, ("cuda:0", "cuda:1")),
        (2, {"device": "cuda:1"}, {"device": "cuda:0"}, ("cuda:1", "cuda:0")),
        (2, {"device": "cuda:1"}, {}, ("cuda:1", "auto")),
        (1, {}, {}, ("auto", "auto")),
    ],
)
def test_the_critic_takes_a_second_gpu_if_nobody_says_otherwise(
    monkeypatch, num_gpus, options, critic_options, devices
):
    planned = []

    def plan(_, given):
        planned.append(given.device)
        if len(planned) == 2:
            raise Chosen

    def load(_, given):
        raise Chosen(given.device)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setattr(pairing, "plan_parts", plan)
    monkeypatch.setattr(pairing, "load_parts", load)
    with pytest.raises(Chosen) as chosen:
        load_with_critic("tiny", "tiny", options=options, critic_options=critic_options)
    if devices in (("cuda:0", "cuda:1"), ("cuda:1", "cuda:0"), ("cuda:1", "auto")):
        assert (chosen.value.args, planned) == ((devices[0],), []), "two devices share nothing"
    else:
        assert planned == list(devices), "one device is shared"


def test_a_critic_that_cannot_be_loaded_leaves_no_model_behind(tmp_path):
    with pytest.raises(ValueError, match=r"no such folder|does not exist"):
        load_with_critic("tiny", tmp_path / "missing", options={"device": "cpu"}, critic_options={"device": "cpu"})
    with pytest.raises(TypeError):
        load_with_critic("tiny", "tiny", options={"devise": "cpu"})

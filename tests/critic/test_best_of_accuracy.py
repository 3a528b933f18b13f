"""Best of 8 answers about pictures that no training has seen is right more often than one answer is."""

import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from internvl_rt import SamplingParams
from internvl_rt.critic import VisualPRM
from internvl_rt.engine.voting import MajorityVote
from support.calls import load
from support.digits import Exercise, build_messages, draw_reading, load_glyphs, measure_accuracy

TRAIN = Path(__file__).parents[1] / "train_tiny_critic.py"
WILD = SamplingParams(max_tokens=12, temperature=1.8)  # about three of four answers are right
WILDER = replace(WILD, temperature=2.2)  # about one of three; in a few cases, none of 8
N = 8
SEEDS = range(3)


@dataclass(frozen=True)
class Shares:
    """Shares of right answers to the same questions, of the same 8 answers to each."""

    greedy: float
    single: float  # of all answers
    best: dict[str, float]  # of those that each critic prefers
    present: float  # of questions with any right answer

    def gain(self, critic: str) -> float:
        """Returns how much of what can be gained over a single answer the critic gains."""
        return (self.best[critic] - self.single) / (self.present - self.single)


@pytest.fixture(scope="module")
def engine():
    with load(dtype="float32") as engine:
        yield engine


@pytest.fixture(scope="module")
def visual_prm(tmp_path_factory):
    folder, start_s = tmp_path_factory.mktemp("critic"), time.perf_counter()
    done = subprocess.run([sys.executable, TRAIN, "--out", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(f"{done.stdout}The critic was trained and measured in {time.perf_counter() - start_s:.0f} s.")
    with VisualPRM.from_pretrained(folder, device="cpu", dtype="float32") as critic:
        yield critic


def draw_readings(seed, number):
    rng, glyphs = np.random.default_rng([11, seed]), load_glyphs(held_out=True)
    return [draw_reading(rng, glyphs, 3 + place % 4, "read") for place in range(number)]


def measure(engine, exercises: list[Exercise], wild: SamplingParams, seed: int, **critics) -> Shares:
    """Ranks the same answers by each critic; `truth` is one that knows the right answer."""
    best = dict.fromkeys((*critics, "truth"), 0.0)
    singles, present = [], []
    for number, exercise in enumerate(exercises):
        messages, (digits,) = build_messages(exercise), exercise.numbers
        params = replace(wild, seed=1000 * seed + number)
        texts = [choice.text for choice in engine.chat(messages, replace(params, n=N)).choices]
        singles.append(np.mean([text == digits for text in texts]))
        present.append(digits in texts)
        for name, critic in (*critics.items(), ("truth", lambda _, text, digits=digits: float(text == digits))):
            ranking = engine.best_of(messages, N, critic=critic, params=params)
            assert sorted(each.text for each in ranking.answers) == sorted(texts)
            best[name] += (ranking.text == digits) / len(exercises)
    return Shares(measure_accuracy(engine, exercises), float(np.mean(singles)), best, float(np.mean(present)))


def test_a_critic_that_knows_the_truth_finds_every_right_answer(engine):
    shares = measure(engine, draw_readings(0, 16), WILDER, 0)
    assert shares.best["truth"] == pytest.approx(shares.present)
    assert 0.2 < shares.single < 0.5 < shares.present < 1


@pytest.mark.slow
def test_a_trained_critic_and_a_vote_are_right_more_often_than_one_answer(engine, visual_prm, capsys):
    def likelihood(messages, text):
        return engine.score(messages, [text], include_end=True)[0].total

    critics = {"VisualPRM": visual_prm, "vote": MajorityVote(), "likelihood": likelihood}
    measured = [measure(engine, draw_readings(seed, 120), WILD, seed, **critics) for seed in SEEDS]
    with capsys.disabled():
        print("\n| seed | greedy | one answer | " + " | ".join(measured[0].best) + " |")
        for seed, shares in zip(SEEDS, measured, strict=True):
            figures = (shares.greedy, shares.single, *shares.best.values())
            print(f"| {seed} | " + " | ".join(f"{figure:.1%}" for figure in figures) + " |")
    for shares in measured:
        assert 0.6 < shares.single < 0.85
        assert shares.gain("VisualPRM") > 0.6
        assert shares.gain("vote") > 0.6

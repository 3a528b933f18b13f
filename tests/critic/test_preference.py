"""The MPO loss is that of the official trainer, to the last step of its running mean, and refuses what is no step."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from internvl_rt import RequestError, SamplingParams
from internvl_rt.critic.preference import (
    MpoWeights,
    Pair,
    Shift,
    mpo_loss,
    preference_loss,
    response_logprobs,
    score_pairs,
)
from support.calls import ask, check_idle, load

BETA, SMOOTHING = 0.3, 0.1
WEIGHTS = MpoWeights(preference=0.5, quality=0.7, generation=1.5)
NAMES = ("policy_chosen_B", "policy_rejected_B", "reference_chosen_B", "reference_rejected_B")


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def draw(num_pairs, seed=0, dtype=torch.float64):
    """Returns four vectors and the mean cross entropy; the policy has moved a little from the reference."""
    generator = torch.Generator().manual_seed(seed)
    reference = [-50 * torch.rand(num_pairs, generator=generator, dtype=torch.float64) - 5 for _ in range(2)]
    policy = [each + 2 * torch.randn(num_pairs, generator=generator, dtype=torch.float64) for each in reference]
    nll = torch.rand((), generator=generator, dtype=torch.float64)
    return [each.to(dtype) for each in (*policy, *reference, nll)]


def rewards_by_hand(vectors):
    chosen, rejected, base_chosen, base_rejected = (each.tolist() for each in vectors[:4])
    good = [BETA * (policy - reference) for policy, reference in zip(chosen, base_chosen, strict=True)]
    bad = [BETA * (policy - reference) for policy, reference in zip(rejected, base_rejected, strict=True)]
    return good, bad


def test_the_loss_is_the_formula_written_out():
    vectors = draw(5)
    good, bad = rewards_by_hand(vectors)
    mean = sum(good + bad) / 10
    shift = (3 * 0.25 + mean) / 4
    preference = [
        -(1 - SMOOTHING) * log_sigmoid(a - b) - SMOOTHING * log_sigmoid(b - a) for a, b in zip(good, bad, strict=True)
    ]
    quality = [-log_sigmoid(a - shift) - log_sigmoid(shift - b) for a, b in zip(good, bad, strict=True)]
    total = 0.5 * sum(preference) / 5 + 0.7 * sum(quality) / 5 + 1.5 * vectors[4].item()

    loss = mpo_loss(*vectors, shift=Shift(0.25, 3), beta=BETA, label_smoothing=SMOOTHING, weights=WEIGHTS)
    assert loss.preference_B.tolist() == pytest.approx(preference, abs=1e-12)
    assert loss.quality_B.tolist() == pytest.approx(quality, abs=1e-6)  # the shift passes through float32
    assert loss.generation.item() == vectors[4].item()
    assert loss.total.item() == pytest.approx(total, abs=1e-6)
    assert (loss.shift.mean, loss.shift.count) == (pytest.approx(shift, abs=1e-6), 4)
    assert loss.chosen_reward_B.tolist() == pytest.approx(good)
    assert loss.rejected_reward_B.tolist() == pytest.approx(bad)


def test_the_gradient_is_the_formula_s_and_none_flows_through_the_shift_or_the_reference():
    vectors = [each.requires_grad_() for each in draw(4, seed=1)]
    loss = mpo_loss(*vectors, shift=Shift(-0.5, 2), beta=BETA, label_smoothing=SMOOTHING, weights=WEIGHTS)
    loss.total.backward()
    (good, bad), shift = rewards_by_hand(vectors), loss.shift.mean
    margins = [a - b for a, b in zip(good, bad, strict=True)]
    pull = [0.5 * BETA * ((1 - SMOOTHING) * sigmoid(-m) - SMOOTHING * sigmoid(m)) / 4 for m in margins]
    chosen = [-p - 0.7 * BETA * sigmoid(shift - a) / 4 for p, a in zip(pull, good, strict=True)]
    rejected = [p + 0.7 * BETA * sigmoid(b - shift) / 4 for p, b in zip(pull, bad, strict=True)]
    assert vectors[0].grad.tolist() == pytest.approx(chosen, abs=1e-12)
    assert vectors[1].grad.tolist() == pytest.approx(rejected, abs=1e-12)
    assert vectors[2].grad is vectors[3].grad is None
    assert vectors[4].grad.item() == 1.5
    assert not loss.chosen_reward_B.requires_grad
    assert not loss.rejected_reward_B.requires_grad


def test_each_step_counts_once_whatever_its_number_of_pairs():
    shift, means = Shift(), []
    for step, num_pairs in enumerate((1, 7, 2)):
        vectors = draw(num_pairs, seed=step)
        shift = mpo_loss(*vectors, shift=shift, beta=BETA).shift
        good, bad = rewards_by_hand(vectors)
        means.append(sum(good + bad) / (2 * num_pairs))
    assert shift.count == 3
    assert shift.mean == pytest.approx(sum(means) / 3, abs=1e-6)


def test_the_running_mean_passes_through_float32():
    first = Shift().fold(torch.tensor(0.1, dtype=torch.float64))
    assert first == Shift(torch.tensor(0.1).item(), 1)
    assert first.mean != 0.1


def test_a_step_changes_no_argument():
    vectors, shift = draw(3), Shift(1.0, 1)
    copies = [each.clone() for each in vectors]
    mpo_loss(*vectors, shift=shift)
    assert all(map(torch.equal, vectors, copies))
    assert shift == Shift(1.0, 1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_the_loss_keeps_the_floating_point_type(dtype, tolerance):
    vectors = draw(6, dtype=dtype)
    loss, exact = (mpo_loss(*each, shift=Shift()) for each in (vectors, [each.double() for each in vectors]))
    assert {loss.total.dtype, loss.preference_B.dtype, loss.quality_B.dtype} == {dtype}
    assert loss.total.item() == pytest.approx(exact.total.item(), abs=tolerance)


def test_far_rewards_give_no_infinity():
    far = torch.tensor([3000.0, -3000.0])
    loss = mpo_loss(far - 3000, -far - 3000, far * 0 - 3000, far * 0 - 3000, torch.tensor(1.0), shift=Shift(), beta=1)
    assert loss.preference_B.tolist() == [0, 6000]
    assert loss.quality_B.tolist() == [0, 6000]


def test_a_smoothed_loss_of_no_margin_is_the_same_for_all_smoothing():
    zero_B = torch.zeros(1)
    assert preference_loss(zero_B, label_smoothing=0.5).item() == pytest.approx(math.log(2))
    assert preference_loss(zero_B).item() == pytest.approx(math.log(2))


BAD = {
    "no pairs": ({name: torch.zeros(0) for name in NAMES}, r"policy_chosen_B: expected at least one pair"),
    "lengths": ({"reference_chosen_B": torch.zeros(2)}, r"reference_chosen_B: expected 3 log-.*, got 2"),
    "integers": ({"policy_rejected_B": torch.zeros(3).long()}, r"policy_rejected_B: .*floating point.*got int64 \[3\]"),
    "a list": ({"policy_chosen_B": [1.0, 2.0, 3.0]}, r"policy_chosen_B: .*got \[1.0, 2.0, 3.0\]"),
    "two dimensions": ({"policy_chosen_B": torch.zeros(3, 1)}, r"policy_chosen_B: .*got float32 \[3, 1\]"),
    "NaN": ({"policy_rejected_B": torch.tensor([0.0, 0, math.nan])}, r"policy_rejected_B\[2\]: .*finite.*got nan"),
    "infinity": ({"reference_rejected_B": torch.tensor([0.0, -math.inf, 0])}, r"reference_rejected_B\[1\]: .*got -inf"),
    "nll of NaN": ({"nll": torch.tensor(math.nan)}, r"nll: expected a finite number, got nan"),
    "nll of each": ({"nll": torch.zeros(3)}, r"nll: expected .*no dimension, got float32 \[3\]"),
    "nll in Python": ({"nll": 0.5}, r"nll: expected .* got 0.5"),
    "beta": ({"beta": 0}, r"beta must be a number above 0 and at most 100, got 0"),
    "beta of NaN": ({"beta": math.nan}, r"beta must be .*, got nan"),
    "smoothing": ({"label_smoothing": 0.6}, r"label_smoothing must be a number from 0 to 0.5, got 0.6"),
    "shift": ({"shift": (0.0, 0)}, r"shift must be of type Shift, got \(0.0, 0\)"),
    "weights": ({"weights": (1, 1, 1)}, r"weights must be of type MpoWeights"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_step_is_refused_before_anything_is_computed(case, monkeypatch):
    changes, message = BAD[case]
    given = dict.fromkeys(NAMES, torch.zeros(3)) | {"nll": torch.tensor(0.5), "shift": Shift()} | changes
    monkeypatch.setattr(Shift, "fold", None)
    with pytest.raises(RequestError, match=f"^{message}"):
        mpo_loss(**given)


@pytest.mark.parametrize("values", [{"quality": -0.1}, {"generation": math.inf}, {"preference": "1"}])
def test_weights_are_numbers_that_are_not_negative(values):
    with pytest.raises(RequestError, match="must be a number from 0 to 1000"):
        MpoWeights(**values)


@pytest.mark.parametrize("values", [(math.nan, 1), (0.0, -1), (0.0, 1.5)])
def test_a_shift_that_is_none_is_refused(values):
    with pytest.raises(RequestError, match="must be"):
        Shift(*values)


def answers(dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    logits_BTV = torch.randn(3, 6, 11, generator=generator, dtype=torch.float64).to(dtype)
    labels_BT = torch.randint(0, 11, (3, 6), generator=generator)
    labels_BT[0, :3], labels_BT[1, 4:], labels_BT[2, 1:] = -100, -100, -100
    return logits_BTV, labels_BT


def test_an_answer_s_log_probability_is_the_sum_over_its_labels_each_predicted_one_token_before():
    logits_BTV, labels_BT = answers()
    logprob_BTV = logits_BTV.log_softmax(-1)
    rows = [
        [logprob_BTV[row, t - 1, labels_BT[row, t]].item() for t in range(1, 6) if labels_BT[row, t] >= 0]
        for row in range(3)
    ]
    logprob_B, nll = response_logprobs(logits_BTV, labels_BT)
    assert [len(row) for row in rows] == [3, 3, 0]
    assert logprob_B.tolist() == pytest.approx([sum(row) for row in rows])
    assert nll.item() == pytest.approx(-sum(map(sum, rows)) / 6)


def test_gradients_of_log_probabilities_reach_the_logits_that_predict_a_label_alone():
    logits_BTV, labels_BT = answers()
    logits_BTV.requires_grad_()
    logprob_B, nll = response_logprobs(logits_BTV, labels_BT)
    (logprob_B.sum() + 6 * nll).backward()  # the second is the negative of the first
    assert logits_BTV.grad.abs().max() < 1e-12
    response_logprobs(logits_BTV, labels_BT)[0].sum().backward()
    assert (logits_BTV.grad.abs().sum(-1) > 1e-9).tolist() == [
        [False, False, True, True, True, False],
        [True, True, True, False, False, False],
        [False] * 6,
    ]


BAD_LABELS = {
    "an id beyond the vocabulary": (lambda x, y: (x, y.clamp(min=11)), r"labels_BT: expected ids from 0 to 10"),
    "a negative id": (lambda x, y: (x, y.clamp(max=-1)), r"labels_BT: expected ids"),
    "no label": (lambda x, y: (x, y * 0 - 100), r"labels_BT: expected a label after the first column"),
    "another shape": (lambda x, y: (x, y[:, 1:]), r"labels_BT: expected an integer tensor \[3, 6\].*int64 \[3, 5\]"),
    "labels of floats": (lambda x, y: (x, y.float()), r"labels_BT: expected an integer tensor .*float32 \[3, 6\]"),
    "logits of integers": (lambda x, y: (x.long(), y), r"logits_BTV: expected a floating point tensor"),
    "logits of one row": (lambda x, y: (x[0], y[0]), r"logits_BTV: .*got float64 \[6, 11\]"),
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_labels_that_fit_no_logits_are_refused(case):
    change, message = BAD_LABELS[case]
    with pytest.raises(RequestError, match=f"^{message}"):
        response_logprobs(*change(*answers()))


@pytest.fixture(scope="module")
def engine():
    return load(kv_cache_bytes=1 << 24)


PAIRS = [Pair(ask("Read the digits."), "4719", "4 7 1 9 is wrong"), Pair(ask("How many?"), "two", "two")]


class Recorder:
    """Stands for another engine, which it asks; counts the calls."""

    def __init__(self, engine):
        self.engine, self.calls = engine, []

    def score_batch(self, batch, **options):
        self.calls.append((batch, options))
        return self.engine.score_batch(batch, **options)


def test_scores_of_pairs_are_those_of_their_answers_with_the_end_token(engine):
    scores = score_pairs(engine, engine, PAIRS)
    for index, pair in enumerate(PAIRS):
        chosen, rejected = engine.score(pair.messages, [pair.chosen, pair.rejected], include_end=True)
        assert scores.policy_chosen_B[index].item() == pytest.approx(chosen.total, abs=1e-3)
        assert scores.policy_rejected_B[index].item() == pytest.approx(rejected.total, abs=1e-3)
        assert chosen.tokens[-1].token_id == engine.tokenizer.token_id("<|im_end|>")
        assert scores.chosen_tokens_B[index] == len(engine.tokenizer.encode(pair.chosen)) + 1
        assert scores.rejected_tokens_B[index] == len(engine.tokenizer.encode(pair.rejected)) + 1
    assert scores.policy_chosen_B.dtype == scores.nll.dtype == torch.float64
    assert scores.nll.item() == pytest.approx(
        -scores.policy_chosen_B.sum().item() / scores.chosen_tokens_B.sum().item()
    )
    check_idle(engine)


def test_a_policy_that_is_the_reference_has_the_loss_of_a_coin(engine):
    scores = score_pairs(engine, engine, PAIRS)
    vectors = [getattr(scores, name) for name in NAMES]
    loss = mpo_loss(*vectors, scores.nll, shift=Shift())
    assert loss.preference_B.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-3)
    assert loss.quality_B.tolist() == pytest.approx([2 * math.log(2)] * 2, abs=1e-3)
    assert loss.total.item() == pytest.approx(1.2 * math.log(2) + scores.nll.item(), abs=1e-3)


def test_without_a_policy_only_the_reference_is_asked(engine):
    reference = Recorder(engine)
    scores = score_pairs(None, reference, PAIRS)
    assert scores.policy_chosen_B is scores.policy_rejected_B is scores.nll is None
    assert scores.reference_chosen_B.tolist() == pytest.approx(
        score_pairs(engine, engine, PAIRS).policy_chosen_B.tolist(), abs=1e-3
    )
    ((batch, options),) = reference.calls
    assert options == {"include_end": True, "progress": False}
    assert batch == [(pair.messages, (pair.chosen, pair.rejected)) for pair in PAIRS]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], r"pairs: expected at least one, got none"),
        (PAIRS[0], r"pairs: expected a list of pairs"),
        ([PAIRS[0], ("a", "b")], r"pairs\[1\]: expected a Pair, got \('a', 'b'\)"),
    ],
)
def test_what_is_no_list_of_pairs_is_refused_before_a_model_is_asked(engine, pairs, message):
    policy = reference = Recorder(engine)
    with pytest.raises(RequestError, match=f"^{message}"):
        score_pairs(policy, reference, pairs)
    assert not reference.calls


@pytest.mark.parametrize(("field", "value"), [("chosen", ""), ("rejected", ""), ("rejected", None)])
def test_a_pair_without_two_answers_is_refused(field, value):
    with pytest.raises(RequestError, match=f"^{field} must be a string of 1 to"):
        Pair(**{"messages": ask("Hello"), "chosen": "a", "rejected": "b", field: value})


def test_scoring_pairs_leaves_the_engine_as_it_was(engine):
    before = engine.chat(ask("Read the digits."), SamplingParams(max_tokens=4)).token_ids
    score_pairs(None, engine, PAIRS)
    assert engine.chat(ask("Read the digits."), SamplingParams(max_tokens=4)).token_ids == before


if "INTERNVL_RT_GOLDEN" in os.environ:
    FILES = sorted(Path(os.environ["INTERNVL_RT_GOLDEN"]).glob("*/mpo.json"))
    TOLERANCE = 1e-6  # the official running mean passes through float32

    def tensors(case, names):
        return [torch.tensor(case[name], dtype=torch.float64) for name in names]

    def test_golden_losses_are_found():
        assert FILES

    @pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)
    def test_steps_of_the_official_trainer(file):
        golden = json.loads(file.read_text())
        for sequence in golden["sequences"]:
            shift = Shift()
            for step in sequence["steps"]:
                given = tensors(step, [name[:-2] for name in NAMES] + ["nll"])
                loss = mpo_loss(*given, shift=shift, beta=golden["beta"])
                shift = loss.shift
                assert loss.total.item() == pytest.approx(step["total"], abs=TOLERANCE)
                assert loss.preference_B.tolist() == pytest.approx(step["dpo"], abs=TOLERANCE)
                assert loss.quality_B.tolist() == pytest.approx(step["bco"], abs=TOLERANCE)
                assert shift.mean == pytest.approx(step["running_mean_used"], abs=1e-9)
                assert loss.chosen_reward_B.mean().item() == pytest.approx(step["metrics"]["rewards/chosen"])
                assert loss.rejected_reward_B.mean().item() == pytest.approx(step["metrics"]["rewards/rejected"])

    @pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)
    def test_a_step_of_the_official_trainer_from_logits_and_labels(file):
        for case in json.loads(file.read_text())["end_to_end"]:
            policy, reference = tensors(case, ("policy_logits", "reference_logits"))
            chosen, rejected = (torch.tensor(case[name]) for name in ("chosen_labels", "rejected_labels"))
            num_pairs = case["batch"]
            policy_chosen_B, nll = response_logprobs(policy[:num_pairs], chosen)
            policy_rejected_B, _ = response_logprobs(policy[num_pairs:], rejected)
            reference_chosen_B, _ = response_logprobs(reference[:num_pairs], chosen)
            reference_rejected_B, _ = response_logprobs(reference[num_pairs:], rejected)
            vectors = policy_chosen_B, policy_rejected_B, reference_chosen_B, reference_rejected_B
            for name, vector_B in zip(NAMES, vectors, strict=True):
                assert vector_B.tolist() == pytest.approx(case[f"{name[:-2]}_logps"], abs=1e-9)
            assert nll.item() == pytest.approx(case["nll"], abs=1e-9)
            loss = mpo_loss(*vectors, nll, shift=Shift())
            assert loss.total.item() == pytest.approx(case["total"], abs=TOLERANCE)
            assert loss.shift.mean == pytest.approx(case["running_mean_used"], abs=1e-9)


def test_models_of_two_tokenizers_are_not_compared(monkeypatch):
    with load(kv_cache_bytes=1 << 22) as engine, load(kv_cache_bytes=1 << 22) as other:
        spelled = {**other.tokenizer.token_bytes, 5: b"another"}
        monkeypatch.setattr(other, "tokenizer", replace(other.tokenizer, token_bytes=spelled))
        monkeypatch.setattr(engine, "score_batch", None)
        with pytest.raises(RequestError, match="expected models of one tokenizer"):
            score_pairs(engine, other, PAIRS)


def test_sums_of_half_precision_are_computed_in_single():
    generator = torch.Generator().manual_seed(0)
    logits_BTV = (5 * torch.randn(1, 1000, 50, generator=generator)).bfloat16()
    labels_BT = torch.randint(0, 50, (1, 1000), generator=generator)
    found, nll = response_logprobs(logits_BTV, labels_BT)
    expected, expected_nll = response_logprobs(logits_BTV.double(), labels_BT)
    assert found.dtype == nll.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert nll.item() == pytest.approx(expected_nll.item(), rel=1e-6)

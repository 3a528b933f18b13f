"""Mixed Preference Optimization (MPO), the last stage of InternVL3's training: its loss, and what it is computed from.

The model learns from pairs of a chosen and a rejected answer to one question. The loss has three terms: which answer is
better (preference), how good each one is by itself (quality), and how the chosen one is written (generation). Sources:
trainer_dpo.py of InternVL (`get_batch_loss_metrics`), and `dpo_loss` and `RunningMoments` of trl 0.10.1, which it is
pinned to. The "bco_pair" of later versions of trl has no running mean of rewards, and is another loss.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from internvl_rt.engine.engine import Engine
from internvl_rt.engine.reply import Score
from internvl_rt.errors import RequestError, check_list, quoted
from internvl_rt.inputs.prepare import PromptSource
from internvl_rt.values import Flag, Integer, Number, Text, read, read_fields

IGNORED = -100  # the label of a token that is no part of an answer
ANSWER = Text(1, 1 << 20)
_BETA, _SMOOTHING, _WEIGHT = Number(0, 100, above=True), Number(0, 0.5), Number(0, 1000)


@dataclass(frozen=True, slots=True)
class MpoWeights:
    """What each term of the loss is multiplied by, from 0 to 1000; the official scripts' numbers by default."""

    preference: float = 0.8
    quality: float = 0.2
    generation: float = 1.0

    def __post_init__(self) -> None:
        read_fields(self, {"preference": _WEIGHT, "quality": _WEIGHT, "generation": _WEIGHT})


OFFICIAL_WEIGHTS = MpoWeights()


@dataclass(frozen=True, slots=True)
class Shift:
    """The mean reward of all steps so far, which the quality term compares rewards with; training starts with Shift().

    mean: of the steps' mean rewards; each step counts once, whatever its number of pairs. count: of the steps.
    """

    mean: float = 0.0
    count: int = 0

    def __post_init__(self) -> None:
        read_fields(self, {"mean": Number(-1e9, 1e9), "count": Integer(0)})

    def fold(self, step_mean: Tensor) -> "Shift":
        """Returns the shift with one more step in it, of which a tensor with one number is the mean reward.

        Waits for the tensor's device. As in trl, the step's distance from the mean is computed in float32.
        """
        distance = step_mean.detach().float() - self.mean
        return Shift(self.mean + (distance / (self.count + 1)).item(), self.count + 1)


@dataclass(frozen=True, slots=True, eq=False)
class MpoLoss:
    """The loss of one step and its parts. Gradients flow from `total`, the terms, and through none of the others."""

    total: Tensor  # scalar: the mean over pairs of the weighted terms
    preference_B: Tensor
    quality_B: Tensor
    generation: Tensor  # scalar, of all pairs together
    shift: Shift  # with this step in it; the next step needs it
    chosen_reward_B: Tensor
    rejected_reward_B: Tensor


def mpo_loss(
    policy_chosen_B: Tensor,
    policy_rejected_B: Tensor,
    reference_chosen_B: Tensor,
    reference_rejected_B: Tensor,
    nll: Tensor,
    *,
    shift: Shift,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    weights: MpoWeights = OFFICIAL_WEIGHTS,
) -> MpoLoss:
    """Computes the MPO loss of the pairs of one training step.

    policy_chosen_B, policy_rejected_B: log-probabilities of whole answers, summed over tokens, by the model in
        training, in any floating point type and on any device. `response_logprobs` computes them from logits.
    reference_chosen_B, reference_rejected_B: the same by the model that training began with. They may be on another
        device, and get no gradient.
    nll: scalar, the mean cross entropy of all tokens of the chosen answers.
    shift: that of the step before, or Shift(). This step is folded in before its loss is computed.
    beta: above 0, at most 100; how much a log-probability that has changed is worth.
    label_smoothing: 0 to 0.5, the share of pairs that are thought to be the wrong way round.

    Waits for the device, whose numbers it checks. Where several processes share a step, the official trainer folds in
    the mean over all of them: call the terms and `Shift.fold` there, as this function does. Raises RequestError for
    vectors that are empty, differ in length, or hold NaN or infinity, before anything is computed.
    """
    vectors = {
        "policy_chosen_B": policy_chosen_B,
        "policy_rejected_B": policy_rejected_B,
        "reference_chosen_B": reference_chosen_B,
        "reference_rejected_B": reference_rejected_B,
    }
    _check_vectors(vectors)
    _check_scalar("nll", nll)
    for name, value, kind in (("shift", shift, Shift), ("weights", weights, MpoWeights)):
        if not isinstance(value, kind):
            raise RequestError(f"{name} must be of type {kind.__name__}, got {quoted(value)}")
    beta = read("beta", beta, _BETA)
    label_smoothing = read("label_smoothing", label_smoothing, _SMOOTHING)
    device = policy_chosen_B.device
    policy_rejected_B, nll = policy_rejected_B.to(device), nll.to(device)
    reference_chosen_B = reference_chosen_B.detach().to(device)
    reference_rejected_B = reference_rejected_B.detach().to(device)

    chosen_reward_B = beta * (policy_chosen_B - reference_chosen_B)
    rejected_reward_B = beta * (policy_rejected_B - reference_rejected_B)
    shift = shift.fold(torch.cat((chosen_reward_B, rejected_reward_B)).mean())
    # (policy - policy) - (reference - reference), as trl has it: the rewards' difference would round differently
    margin_B = (policy_chosen_B - policy_rejected_B) - (reference_chosen_B - reference_rejected_B)
    preference_B = preference_loss(margin_B, beta=beta, label_smoothing=label_smoothing)
    quality_B = quality_loss(chosen_reward_B, rejected_reward_B, shift)
    terms_B = preference_B * weights.preference + quality_B * weights.quality + nll * weights.generation
    return MpoLoss(
        total=terms_B.mean(),
        preference_B=preference_B,
        quality_B=quality_B,
        generation=nll,
        shift=shift,
        chosen_reward_B=chosen_reward_B.detach(),
        rejected_reward_B=rejected_reward_B.detach(),
    )


def preference_loss(margin_B: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """Computes the loss [B] of Direct Preference Optimization (DPO): -log sigmoid(beta margin), smoothed.

    margin_B: by how much more the policy than the reference prefers the chosen answers, as differences of summed
    log-probabilities. Arguments are not checked.
    """
    right_B, wrong_B = F.logsigmoid(beta * margin_B), F.logsigmoid(-beta * margin_B)
    return -right_B * (1 - label_smoothing) - wrong_B * label_smoothing


def quality_loss(chosen_reward_B: Tensor, rejected_reward_B: Tensor, shift: Shift) -> Tensor:
    """Computes the loss [B] of Binary Classifier Optimization (BCO): chosen above the shift, rejected below.

    chosen_reward_B, rejected_reward_B: beta times the difference of the policy's and the reference's summed
    log-probabilities. shift: with this step in it. Arguments are not checked.
    """
    return -F.logsigmoid(chosen_reward_B - shift.mean) - F.logsigmoid(-(rejected_reward_B - shift.mean))


def response_logprobs(logits_BTV: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the summed log-probability of each row's answer, and the mean cross entropy of all answers' tokens.

    logits_BTV: floating point; those at a token predict the next one. labels_BT: integers, the ids of the tokens of
    answers, and -100 for all others, those of the prompt and padding. The first column is predicted by nothing.

    Returns logprob_B and the scalar nll, in the type of the logits, or float32 for 16 bits, in which a sum of a long
    answer would have three digits. Gradients flow. Raises RequestError for shapes that
    do not match, labels outside of the vocabulary, and where nothing is labelled, so that there is no mean.
    """
    if not isinstance(logits_BTV, Tensor) or logits_BTV.ndim != 3 or not logits_BTV.is_floating_point():
        raise RequestError(f"logits_BTV: expected a floating point tensor [B, T, V], got {_shown(logits_BTV)}")
    if not isinstance(labels_BT, Tensor) or labels_BT.is_floating_point() or labels_BT.shape != logits_BTV.shape[:2]:
        want = list(logits_BTV.shape[:2])
        raise RequestError(f"labels_BT: expected an integer tensor {want}, as the logits, got {_shown(labels_BT)}")
    num_tokens = logits_BTV.shape[2]
    # Labels move and not logits, which are large: a slice of these would be copied.
    target_BT = F.pad(labels_BT[:, 1:].long(), (0, 1), value=IGNORED)
    is_labelled_BT = target_BT != IGNORED
    if bool((((target_BT < 0) | (target_BT >= num_tokens)) & is_labelled_BT).any()):
        raise RequestError(
            f"labels_BT: expected ids from 0 to {num_tokens - 1}, or {IGNORED}, got others; correct them"
        )
    if not bool(is_labelled_BT.any()):
        raise RequestError(f"labels_BT: expected a label after the first column, got only {IGNORED}; label the answers")
    logits_BTV = logits_BTV.float() if logits_BTV.dtype.itemsize < 4 else logits_BTV
    loss_N = F.cross_entropy(logits_BTV.flatten(0, 1), target_BT.flatten(), reduction="none", ignore_index=IGNORED)
    loss_BT = loss_N.view(target_BT.shape)
    return -loss_BT.sum(-1), loss_BT.sum() / is_labelled_BT.sum()


@dataclass(frozen=True, slots=True)
class Pair:
    """A question with a better and a worse answer. Equal answers are allowed, as in the official data.

    messages: the conversation up to the answer, as `Engine.chat` takes it. Raises RequestError for an empty answer.
    """

    messages: PromptSource
    chosen: str
    rejected: str

    def __post_init__(self) -> None:
        read_fields(self, {"chosen": ANSWER, "rejected": ANSWER})


@dataclass(frozen=True, slots=True, eq=False)
class PairScores:
    """What `mpo_loss` needs of some pairs, on the CPU. Log-probabilities are summed over an answer's tokens.

    They are float64: a long answer's sum has four digits before the point, and float32 would leave few after it for the
    differences that the loss is made of. What belongs to the policy is None if no policy was given.
    """

    reference_chosen_B: Tensor
    reference_rejected_B: Tensor
    chosen_tokens_B: Tensor  # int64, the end token included
    rejected_tokens_B: Tensor
    policy_chosen_B: Tensor | None
    policy_rejected_B: Tensor | None
    nll: Tensor | None  # scalar: the policy's mean cross entropy of all tokens of the chosen answers


def score_pairs(engine: Engine | None, reference: Engine, pairs: Items[Pair], *, progress: bool = False) -> PairScores:
    """Computes how likely two models find the answers of some pairs.

    engine: the model that is judged, the policy; None: only the reference's numbers are wanted, which do not change
        while a model is trained and can be computed before. reference: the model that training begins with.
    progress: shows a bar on stderr for each model.

    An answer's end token counts, as in the official labels, which leave out only the line break after it
    (preprocess_internvl2_5 in dataset.py). Raises RequestError or MediaError.
    """
    check_list("pairs", pairs, "pairs")
    read("progress", progress, Flag())
    if not pairs:
        raise RequestError("pairs: expected at least one, got none; give the pairs to be scored")
    for index, pair in enumerate(pairs):
        if not isinstance(pair, Pair):
            raise RequestError(f"pairs[{index}]: expected a Pair, got {quoted(pair)}; make one of it")
    if engine is not None and engine.tokenizer.token_bytes != reference.tokenizer.token_bytes:
        raise RequestError(
            "engine and reference: expected models of one tokenizer, since log-probabilities of other tokens do not "
            "compare; take the model that training began with as the reference"
        )
    batch = [(pair.messages, (pair.chosen, pair.rejected)) for pair in pairs]
    judged = None if engine is None else engine.score_batch(batch, include_end=True, progress=progress)
    scores = reference.score_batch(batch, include_end=True, progress=progress)
    chosen_tokens_B, rejected_tokens_B = (_num_tokens(scores, answer) for answer in (0, 1))
    policy_chosen_B = None if judged is None else _totals(judged, 0)
    return PairScores(
        reference_chosen_B=_totals(scores, 0),
        reference_rejected_B=_totals(scores, 1),
        chosen_tokens_B=chosen_tokens_B,
        rejected_tokens_B=rejected_tokens_B,
        policy_chosen_B=policy_chosen_B,
        policy_rejected_B=None if judged is None else _totals(judged, 1),
        nll=None if policy_chosen_B is None else -policy_chosen_B.sum() / chosen_tokens_B.sum(),
    )


def _totals(scores: Items[Items[Score]], answer: int) -> Tensor:
    return torch.tensor([each[answer].total for each in scores], dtype=torch.float64)


def _num_tokens(scores: Items[Items[Score]], answer: int) -> Tensor:
    return torch.tensor([len(each[answer].logprobs) for each in scores], dtype=torch.int64)


def _check_vectors(vectors: Mapping[str, Tensor]) -> None:
    first = next(iter(vectors.values()))
    for name, vector_B in vectors.items():
        if not isinstance(vector_B, Tensor) or vector_B.ndim != 1 or not vector_B.is_floating_point():
            raise RequestError(f"{name}: expected a floating point tensor [B], got {_shown(vector_B)}; convert it")
        if len(vector_B) != len(first):
            raise RequestError(
                f"{name}: expected {len(first)} log-probabilities, as in policy_chosen_B, got {len(vector_B)}; give "
                "one for each pair"
            )
        if not len(vector_B):
            raise RequestError(f"{name}: expected at least one pair, got none; leave out the step")
    for name, vector_B in vectors.items():
        if not bool((finite_B := vector_B.detach().isfinite()).all()):
            index = int((~finite_B).nonzero()[0])
            raise RequestError(
                f"{name}[{index}]: expected a finite log-probability, got {vector_B[index].item()}; leave out the "
                "pair, or find out where the model overflows"
            )


def _check_scalar(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point():
        raise RequestError(
            f"{name}: expected a floating point tensor with one number and no dimension, got {_shown(value)}"
        )
    if not bool(value.detach().isfinite()):
        raise RequestError(f"{name}: expected a finite number, got {value.item()}; find out where the model overflows")


def _shown(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return quoted(value)

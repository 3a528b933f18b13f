"""Over several steps, loss and gradients are those of trl 0.10.1, which the official trainer is pinned to.

It needs a transformers of its time, which is installed in an environment of its own that takes torch from this one.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from internvl_rt.critic.preference import IGNORED, MpoWeights, Shift, mpo_loss, response_logprobs
from support.environments import make_environment

pytestmark = pytest.mark.slow

PACKAGES = ("trl==0.10.1", "transformers==4.45.2", "accelerate", "datasets==5.0.1")
OTHERS = ("datasets", "huggingface_hub", "tokenizers", "transformers")  # of the time of that trl
TOLERANCE = 1e-6

# Adds up the losses as `get_batch_loss_metrics` of InternVL's trainer_dpo.py does, with trl's own functions.
PROGRAM = """
import json, sys
from types import SimpleNamespace
import torch
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.utils import RunningMoments

given = json.load(sys.stdin)
results = []
for run in given["runs"]:
    dtype = getattr(torch, run["dtype"])
    accelerator = SimpleNamespace(device="cpu", use_distributed=False)
    trainer = SimpleNamespace(
        accelerator=accelerator, running=RunningMoments(accelerator), beta=run["beta"],
        label_smoothing=run["label_smoothing"], reference_free=False, f_divergence_type="reverse_kl",
        f_divergence_params=None,
    )
    for step in run["steps"]:
        *vectors, nll = [torch.tensor(each, dtype=dtype) for each in step]
        policy = [each.requires_grad_() for each in vectors[:2]]
        losses = 0
        for kind, weight in zip(("sigmoid", "bco_pair"), run["weights"]):
            trainer.loss_type = kind
            term, chosen, rejected = DPOTrainer.dpo_loss(trainer, *vectors)
            losses = losses + term * weight
        total = (losses + nll * run["weights"][2]).mean()
        total.backward()
        results.append({
            "total": total.item(), "mean": trainer.running.mean, "gradients": [each.grad.tolist() for each in policy],
            "chosen": chosen.tolist(), "rejected": rejected.tolist(),
        })
logits, labels = torch.tensor(given["logits"], dtype=torch.float64), torch.tensor(given["labels"])
logps, _ = DPOTrainer.get_batch_logps(logits, labels)
nll = torch.nn.CrossEntropyLoss()(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
print(json.dumps({"steps": results, "logps": logps.tolist(), "nll": nll.item()}))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with trl."""
    return make_environment(tmp_path_factory.mktemp("trl") / "environment", PACKAGES, others=OTHERS)


def run(command: list[str], given: str = "") -> str:
    private = {"PYTHONPATH", "VIRTUAL_ENV", "COVERAGE_PROCESS_START"}
    environment = {name: value for name, value in os.environ.items() if name not in private}
    done = subprocess.run(command, input=given, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def draw_step(generator: torch.Generator, spread: float) -> list[torch.Tensor]:
    num_pairs = int(torch.randint(1, 9, (), generator=generator))
    reference = [-100 * torch.rand(num_pairs, generator=generator) - 5 for _ in range(2)]
    policy = [each + spread * torch.randn(num_pairs, generator=generator) for each in reference]
    return [*policy, *reference, torch.rand((), generator=generator)]


def test_loss_gradients_and_running_mean_are_those_of_trl(python: Path) -> None:
    generator = torch.Generator().manual_seed(7)
    runs = []
    for dtype in (torch.float64, torch.float32):
        for spread, beta, smoothing, weights in [
            (1.0, 0.1, 0.0, (0.8, 0.2, 1.0)),
            (30.0, 0.1, 0.0, (0.8, 0.2, 1.0)),
            (3.0, 0.5, 0.2, (0.3, 0.6, 0.1)),
        ]:
            steps = [[each.to(dtype) for each in draw_step(generator, spread)] for _ in range(8)]
            runs.append((dtype, beta, smoothing, weights, steps))
    logits_BTV = torch.randn(5, 9, 13, generator=generator, dtype=torch.float64)
    labels_BT = torch.randint(0, 13, (5, 9), generator=generator)
    labels_BT[torch.rand(5, 9, generator=generator) < 0.4] = IGNORED
    given = {
        "runs": [
            {
                "dtype": str(dtype).removeprefix("torch."),
                "beta": beta,
                "label_smoothing": smoothing,
                "weights": weights,
                "steps": [[each.tolist() for each in step] for step in steps],
            }
            for dtype, beta, smoothing, weights, steps in runs
        ],
        "logits": logits_BTV.tolist(),
        "labels": labels_BT.tolist(),
    }
    expected = json.loads(run([str(python), "-c", PROGRAM], json.dumps(given)).splitlines()[-1])

    results = iter(expected["steps"])
    for dtype, beta, smoothing, weights, steps in runs:
        shift = Shift()
        relative = 0 if dtype == torch.float64 else TOLERANCE
        for step in steps:
            policy = [each.requires_grad_() for each in step[:2]]
            loss = mpo_loss(*step, shift=shift, beta=beta, label_smoothing=smoothing, weights=MpoWeights(*weights))
            loss.total.backward()
            shift, want = loss.shift, next(results)
            assert loss.total.item() == pytest.approx(want["total"], abs=TOLERANCE, rel=relative)
            assert shift.mean == want["mean"]
            for vector_B, gradient_B in zip(policy, want["gradients"], strict=True):
                assert vector_B.grad is not None
                assert vector_B.grad.tolist() == pytest.approx(gradient_B, abs=TOLERANCE)
            assert loss.chosen_reward_B.tolist() == pytest.approx(want["chosen"], abs=TOLERANCE)
            assert loss.rejected_reward_B.tolist() == pytest.approx(want["rejected"], abs=TOLERANCE)
    assert next(results, None) is None

    logprob_B, nll = response_logprobs(logits_BTV, labels_BT)
    assert logprob_B.tolist() == pytest.approx(expected["logps"], abs=1e-12)
    assert nll.item() == pytest.approx(expected["nll"], abs=1e-12)

"""Optimises the tiny checkpoint in its training: Muon for matrices, Adam for the rest, on two threads."""

import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from internvl_rt.model.linear import Linear

MATRIX_RATE, MATRIX_DECAY, OTHER_RATE = 0.02, 0.05, 2e-3
WARMUP_STEPS, COOLDOWN = 30, 0.6  # COOLDOWN: the learning rate falls during the last 60 % of a stage's steps


class Trainer:
    """Updates the matrices by Muon and the rest by Adam; up to two threads share each batch.

    The threads' gradients are added in a fixed order, so that a seed gives the same run on the same machine.
    """

    def __init__(
        self,
        named: dict[str, Tensor],
        rounded: dict[str, Tensor],
        head: Linear,
        num_steps: int,
        *,
        vision_rate: float,
        decoder_rate: float,
        last_share: float,
        num_threads: int,
    ) -> None:
        """`rounded`: the parameters `named` in the dtype that the model computes in; each step writes them anew.

        vision_rate, decoder_rate: factors of the learning rates; last_share: what of them is left in the last step
        """
        assert head.bias_N is not None
        ends = [head.weight_NK, head.bias_N]
        self._parameters, self._rounded = [*named.values(), *ends], [*(rounded[path] for path in named), *ends]
        is_table = re.compile("embedding|position|lm_head").search
        decoder = {path: tensor for path, tensor in named.items() if path.startswith("decoder.")}
        vision = {path: tensor for path, tensor in named.items() if path not in decoder}
        matrices, others = [], []
        for part, factor in ((vision, vision_rate), (decoder, decoder_rate)):
            by_muon = {path: tensor for path, tensor in part.items() if tensor.ndim == 2 and not is_table(path)}
            matrices.append({"params": list(by_muon.values()), "factor": factor})
            others.append(
                {"params": [tensor for path, tensor in part.items() if path not in by_muon], "factor": factor}
            )
        others[0]["params"] += [head.weight_NK, head.bias_N]
        for parameter in self._rounded:
            parameter.requires_grad_()
        self._optimisers = [
            (MATRIX_RATE, torch.optim.Muon(matrices, weight_decay=MATRIX_DECAY)),
            (OTHER_RATE, torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0)),
        ]
        self._num_steps, self._last_share, self._number = num_steps, last_share, 0
        self._threads = ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,))
        self._losses, self._start_s = np.zeros(0), time.perf_counter()

    def step(self, measure: Callable[[int], tuple[Tensor, ...]]) -> None:
        """Lowers the sum of all losses; `measure(0)` and `measure(1)` return those of the two halves of a batch."""

        def half(index: int) -> tuple[list[float], tuple[Tensor, ...]]:
            losses = measure(index)
            return [loss.item() for loss in losses], torch.autograd.grad(sum(losses), self._rounded)

        (losses1, gradients1), (losses2, gradients2) = self._threads.map(half, (0, 1))
        for parameter, one, two in zip(self._parameters, gradients1, gradients2, strict=True):
            parameter.grad = (one.float() + two) / 2
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        left = min(1, (1 - self._number / self._num_steps) / COOLDOWN)
        share = min((self._number + 1) / WARMUP_STEPS, self._last_share + (1 - self._last_share) * left)
        for rate, optimiser in self._optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate * share * group["factor"]
            optimiser.step()
        with torch.no_grad():
            for rounded, parameter in zip(self._rounded, self._parameters, strict=True):
                rounded.copy_(parameter)
        self._number += 1
        losses = (np.array(losses1) + losses2) / 2
        self._losses = self._losses + 0.04 * (losses - self._losses) if len(self._losses) else losses
        if self._number % 50 == 0:
            shown = ", ".join(f"{loss:.4f}" for loss in self._losses)
            print(f"step {self._number}: losses {shown}, {time.perf_counter() - self._start_s:.0f} s", flush=True)

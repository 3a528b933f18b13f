"""Trains a model with experts from the checkpoint in the package, in less than two minutes on two cores.

    .venv/bin/python tests/train_tiny_experts.py --out /tmp/tiny-experts

It shows that routing works end to end. Its language model is a small Qwen3-MoE, whose layers have 8 experts, of which a
token goes through two. Two experts begin as the halves of the MLP that they take the place of, each pair as other ones,
and are chosen together. The vision tower and the projector stay as they are; everything else goes on learning, as
`train_tiny.py` says.
"""

import argparse
import json
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import internvl_rt
from internvl_rt.checkpoint.config import ModelConfig, load_config
from internvl_rt.checkpoint.folder import open_checkpoint
from internvl_rt.inputs.position import STRIDES, build_positions
from internvl_rt.model.dialects import DIALECTS
from internvl_rt.model.internvl import InternVL, ModelWeights, build_weights, named_parameters
from internvl_rt.model.linear import Experts, GatedMlp, Linear
from internvl_rt.model.ops import TORCH
from internvl_rt.model.weights import load_weights, save_weights
from support.optimiser import Trainer
from train_tiny import DTYPE, SEED, DenseOps, Example, Lesson, draw_batches, draw_example, keep_freed_memory, run_padded

DENSE = Path(internvl_rt.__file__).parent / "tiny"
NUM_EXPERTS, NUM_CHOSEN = 8, 2
LESSON = Lesson(range(30_000, 36_000), 0.85, (0.3, 0.25, 0.45, 0.0), 0, 0, 330, 32, 0.12)
BALANCE = 0.02  # weight of the loss that keeps the experts equally busy (Switch Transformer, arXiv 2101.03961)


def write_config(folder: Path) -> ModelConfig:
    """Writes all files but the weights: those of the package, with another language model."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in DENSE.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copy(file, folder)
    values = json.loads((DENSE / "config.json").read_text())
    decoder = values["llm_config"]
    decoder |= {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "head_dim": 32}
    decoder |= {"num_experts": NUM_EXPERTS, "num_experts_per_tok": NUM_CHOSEN, "norm_topk_prob": True}
    decoder["moe_intermediate_size"] = decoder["intermediate_size"] // 2
    (folder / "config.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return load_config(folder)


@torch.no_grad()
def split_mlps(weights: ModelWeights, dense: ModelWeights, config: ModelConfig) -> None:
    """Fills the weights of a model with experts from one without."""
    generator = torch.Generator().manual_seed(SEED)
    ours, theirs = named_parameters(weights), named_parameters(dense)
    for path, parameter in ours.items():
        if path in theirs:
            parameter.copy_(theirs[path])
        elif path.endswith("_norm.weight_D"):
            parameter.fill_(1.1 if path.endswith("q_norm.weight_D") else 1.6)  # the dense model's heads are so long
    for layer, from_layer in zip(weights.decoder.layers, dense.decoder.layers, strict=True):
        experts, mlp = layer.mlp, from_layer.mlp
        assert isinstance(experts, Experts)
        assert isinstance(mlp, GatedMlp)
        pairs_XD = 0.1 * torch.randn(NUM_EXPERTS // 2, experts.router.num_inputs, generator=generator)
        experts.router.weight_NK.copy_(pairs_XD.repeat_interleave(2, 0))
        experts.router.weight_NK.add_(0.002 * torch.randn(experts.router.weight_NK.shape, generator=generator))
        gate_NK, up_NK = mlp.gate_up.dense(torch.float32).chunk(2)
        for pair in range(NUM_EXPERTS // 2):
            halves = torch.randperm(len(gate_NK), generator=generator).chunk(2)
            for index, half in enumerate(halves, start=2 * pair):
                expert = experts.expert(index)
                expert.gate_up.weight_NK.copy_(torch.cat((gate_NK[half], up_NK[half])))  # type: ignore[union-attr]
                expert.down.weight_NK.copy_(2 * mlp.down.dense(torch.float32)[:, half])  # type: ignore[union-attr]


class BalancedOps(DenseOps):
    """Operations that note how evenly each layer's experts are chosen."""

    def mix_experts(self, x_TD: Tensor, experts: Experts, residual_TD: Tensor | None = None) -> Tensor:
        odds_TX = self.linear(x_TD, experts.router).float().softmax(1)
        chosen_TX = torch.zeros_like(odds_TX).scatter_(1, odds_TX.topk(experts.num_chosen, 1).indices, 1.0)
        self.uneven.append(len(odds_TX[0]) * (chosen_TX.mean(0) * odds_TX.mean(0)).sum() / experts.num_chosen)
        return super().mix_experts(x_TD, experts, residual_TD)

    @property
    def uneven(self) -> list[Tensor]:
        """Of each layer 1 where experts are equally busy, more otherwise; the reader empties it."""
        found: list[Tensor] = vars(self).setdefault("_uneven", [])
        return found


def measure_loss(
    weights: ModelWeights, config: ModelConfig, batch: list[Example], visual: list[Tensor], strides: list[list[int]]
) -> tuple[Tensor, Tensor]:
    """Returns the mean cross entropy of the answers' tokens, and how unevenly experts are chosen."""
    ops = BalancedOps(**vars(TORCH))  # of its own, since two threads share a batch
    model = InternVL(config, weights, ops)
    token_ids, spans = [example.token_ids for example in batch], [example.spans for example in batch]
    positions = [
        build_positions(len(example.token_ids), example.spans, stride)[0]
        for example, stride in zip(batch, strides, strict=True)
    ]
    x_TD, seq_len = run_padded(model, token_ids, spans, positions, torch.cat(visual))
    rows = [np.arange(start, stop) + row * seq_len for row, each in enumerate(batch) for start, stop in each.answers]
    targets = [each.token_ids[start:stop] for each in batch for start, stop in each.answers]
    logits = model.logits(x_TD[torch.from_numpy(np.concatenate(rows)) - 1]).float()
    answer_loss = F.cross_entropy(logits, torch.from_numpy(np.concatenate(targets)))
    return answer_loss, BALANCE * torch.stack(ops.uneven).mean()


def train(named: dict[str, Tensor], weights: ModelWeights, config: ModelConfig, examples: list[Example]) -> None:
    """Trains the language model. The parameters `named` are float32; the model's are these, rounded."""
    with torch.no_grad():
        tower = InternVL(config, weights, TORCH)
        tiles = torch.from_numpy(np.concatenate([example.tiles for example in examples]))
        visual_IMD = torch.cat([tower.encode_tiles(part) for part in tiles.split(256)])
    counts = [len(example.tiles) for example in examples]
    visual = {id(one): part.flatten(0, 1) for one, part in zip(examples, visual_IMD.split(counts), strict=True)}
    rng = np.random.default_rng([SEED, LESSON.exercises.start])
    decoder = {path: tensor for path, tensor in named.items() if path.startswith("decoder.")}
    ends = torch.zeros(1, 1), torch.zeros(1)  # of the head with which a vision tower learns
    rates = {"vision_rate": 0.0, "decoder_rate": LESSON.rate, "last_share": 0.0}
    how: dict[str, Any] = {"num_steps": LESSON.whole_steps, "num_threads": 2, **rates}
    trainer = Trainer(decoder, named_parameters(weights), Linear(*ends), **how)
    for batch in draw_batches(rng, examples, LESSON):
        halves = [batch[0::2], batch[1::2]]
        strides = [[rng.choice(STRIDES, len(example.spans)).tolist() for example in half] for half in halves]

        def measure(index: int, halves: Any = halves, strides: Any = strides) -> tuple[Tensor, ...]:
            half = halves[index]
            losses = measure_loss(weights, config, half, [visual[id(each)] for each in half], strides[index])
            return (*losses, 0 * torch.stack([tensor.sum() for tensor in ends]).sum())

        trainer.step(measure)


def main(folder: Path) -> None:
    start_s = time.perf_counter()
    keep_freed_memory()
    config = write_config(folder)
    draw = partial(draw_example, lesson=LESSON, config=config, tokenizer_folder=folder)
    with ProcessPoolExecutor(2) as processes:
        examples = list(processes.map(draw, LESSON.exercises, chunksize=100))
    print(f"examples: {time.perf_counter() - start_s:.0f} s", flush=True)
    dense = load_weights(open_checkpoint(DENSE), load_config(DENSE), dtype=torch.float32, device="cpu")
    weights, rounded = (build_weights(config, dtype=dtype, device="cpu") for dtype in (torch.float32, DTYPE))
    split_mlps(weights, dense, config)
    named = named_parameters(weights)
    for path, parameter in named_parameters(rounded).items():
        parameter.copy_(named[path])
    train(named, rounded, config, examples)
    for parameter in named_parameters(rounded).values():
        parameter.requires_grad_(False)
    save_weights(rounded, config, folder, dialect=DIALECTS["original"])
    print(f"trained in {time.perf_counter() - start_s:.0f} s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Trains a tiny model with experts.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    main(parser.parse_args().out)

"""Measures how far a 16-bit model on the kernels is from the same weights in float32 on the references."""

import torch
from torch import Tensor

from internvl_rt.model.internvl import InternVL, build_weights, named_parameters
from internvl_rt.model.ops import TORCH
from support.forward import all_logits


def in_float32(model: InternVL) -> InternVL:
    """Returns a model with the same weights in float32, computed with the reference operations."""
    weights = build_weights(model.config, dtype=torch.float32, device=model.device)
    for wide, narrow in zip(named_parameters(weights).values(), named_parameters(model.weights).values(), strict=True):
        wide.copy_(narrow)
    return InternVL(model.config, weights, TORCH)


@torch.inference_mode()
def layer_errors(model: InternVL, reference: InternVL, tiles: Tensor) -> list[float]:
    """Returns ||y - ref|| / ||ref|| for each vision layer, where both models get the reference's input of that layer.

    The residual stream is part of y and ref.
    """
    weights = reference.weights.vision
    x_RE = TORCH.embed_tiles(tiles, weights.patch, weights.class_E, weights.position_UE)
    errors = []
    for index in range(model.config.vision.num_layers):
        y_RE = _run_layer(model, index, x_RE.to(model.dtype), len(tiles)).float()
        ref_RE = _run_layer(reference, index, x_RE.to(model.dtype).float(), len(tiles))
        errors.append(float((y_RE - ref_RE).norm() / ref_RE.norm()))
        x_RE = ref_RE
    return errors


def _run_layer(model: InternVL, index: int, x_RE: Tensor, num_tiles: int) -> Tensor:
    ops, layer = model.ops, model.weights.vision.layers[index]
    x_RE = x_RE.clone()  # the kernels may write into it
    qkv_RK = ops.linear(ops.norm(x_RE, layer.norm1), layer.qkv)
    y_RE = ops.attend_tiles(qkv_RK, num_tiles, model.config.vision.head_dim, layer.q_norm, layer.k_norm)
    x_RE, n_RE = ops.linear_residual_norm(y_RE, layer.proj, x_RE, layer.scale1_E, layer.norm2)
    y_RF = ops.linear(n_RE, layer.fc1, activation="gelu")
    x_RE, _ = ops.linear_residual_norm(y_RF, layer.fc2, x_RE, layer.scale2_E, None)
    return x_RE


@torch.inference_mode()
def tower_cosine(model: InternVL, reference: InternVL, tiles: Tensor) -> float:
    """Returns the cosine similarity of the two models' visual tokens, all tiles flattened into one vector."""
    y, ref = model.encode_tiles(tiles).float().flatten(), reference.encode_tiles(tiles).flatten()
    return float(torch.nn.functional.cosine_similarity(y, ref, dim=0))


@torch.inference_mode()
def logits_of(model: InternVL, token_ids: list[int]) -> Tensor:
    """Returns the float32 logits [T, V] at every token of a text."""
    context_id = model.config.decoder.vocab_size  # no token has this id, as the text has no pictures
    return all_logits(model, token_ids, None, context_id=context_id, block_size=64).float()


def rms_error(logits_TV: Tensor, reference_TV: Tensor) -> float:
    return float((logits_TV - reference_TV).square().mean().sqrt())


def top1_agreement(logits_TV: Tensor, reference_TV: Tensor, margin: float) -> tuple[float, int]:
    """Returns the share of equal best tokens where the reference's leads by `margin`, and how many tokens those are."""
    best = reference_TV.topk(2, dim=-1)
    sure = best.values[:, 0] - best.values[:, 1] > margin
    return float((logits_TV.argmax(-1) == best.indices[:, 0])[sure].float().mean()), int(sure.sum())

"""How far a model in 16 bits on the kernels is from the same weights in float32 on the references."""

import torch
from torch import Tensor

from internvl_rt.model.internvl import InternVL, build_weights, named_parameters
from internvl_rt.model.ops import TORCH
from support.forward import all_logits


def in_float32(model: InternVL) -> InternVL:
    """The same weights, widened, on the references."""
    weights = build_weights(model.config, dtype=torch.float32, device=model.device)
    for wide, narrow in zip(named_parameters(weights).values(), named_parameters(model.weights).values(), strict=True):
        wide.copy_(narrow)
    return InternVL(model.config, weights, TORCH)


@torch.inference_mode()
def layer_errors(model: InternVL, reference: InternVL, tiles: Tensor) -> list[float]:
    """||y - ref|| / ||ref|| of each vision layer alone, on what the layers before it give in the reference.

    The residual that both carry through is part of y and ref.
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
    """Of the visual tokens of all tiles, as one vector."""
    y, ref = model.encode_tiles(tiles).float().flatten(), reference.encode_tiles(tiles).flatten()
    return float(torch.nn.functional.cosine_similarity(y, ref, dim=0))


@torch.inference_mode()
def logits_of(model: InternVL, token_ids: list[int]) -> Tensor:
    """float32 logits [T, V] behind every token of a text."""
    context_id = model.config.decoder.vocab_size  # no token: there are no pictures
    return all_logits(model, token_ids, None, context_id=context_id, block_size=64).float()


def rms_error(logits_TV: Tensor, reference_TV: Tensor) -> float:
    return float((logits_TV - reference_TV).square().mean().sqrt())


def top1_agreement(logits_TV: Tensor, reference_TV: Tensor, margin: float) -> tuple[float, int]:
    """Share of the tokens whose likeliest next one is the reference's, where that leads by the margin; and how many."""
    best = reference_TV.topk(2, dim=-1)
    sure = best.values[:, 0] - best.values[:, 1] > margin
    return float((logits_TV.argmax(-1) == best.indices[:, 0])[sure].float().mean()), int(sure.sum())

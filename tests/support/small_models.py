"""Builds whole models of a few thousand random weights: both kinds of ViT, every layout of a decoder."""

from dataclasses import replace

import torch

from internvl_rt.checkpoint.config import DecoderConfig, ExpertsConfig, ModelConfig, VisionConfig, Yarn
from internvl_rt.model.internvl import InternVL, build_weights, named_parameters
from internvl_rt.model.ops import TORCH

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

VIT_300M = VisionConfig(
    hidden_size=64,
    num_layers=3,
    num_heads=4,
    intermediate_size=96,
    image_size=56,
    patch_size=14,
    norm="layer_norm",
    norm_eps=1e-6,
    qkv_bias=True,
    qk_norm=False,
)
VIT_6B = replace(VIT_300M, hidden_size=96, num_heads=3, norm="rms_norm", qkv_bias=False, qk_norm=True)
QWEN2 = DecoderConfig(
    hidden_size=64,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=96,
    vocab_size=48,
    norm_eps=1e-6,
    rope_theta=1e6,
    max_position=512,
    qkv_bias=True,
    qk_norm=False,
    tie_embeddings=False,
)
QWEN3 = replace(QWEN2, qkv_bias=False, qk_norm=True, num_heads=6, head_dim=32, num_kv_heads=1)
EXPERTS = replace(QWEN3, intermediate_size=64, experts=ExpertsConfig(num_experts=5, num_chosen=2, renormalises=True))
GPT_OSS = replace(
    QWEN2,
    intermediate_size=64,
    experts=ExpertsConfig(num_experts=5, num_chosen=2, renormalises=True, gate="clamped", biases=True),
    o_bias=True,
    sinks=True,
    windows=(6,),
    yarn=Yarn(factor=4.0, original=128, beta_fast=32.0, beta_slow=1.0, truncates=False, scale=1.2),
)
INTERNLM2 = replace(QWEN2, qkv_bias=False, head_dim=32, num_heads=2)


def build_model(vision: VisionConfig = VIT_300M, decoder: DecoderConfig = QWEN2, unshuffle: str = "v2") -> InternVL:
    config = ModelConfig(
        vision=vision,
        decoder=decoder,
        format="original",
        downsample=2,
        unshuffle=unshuffle,
        min_tiles=1,
        max_tiles=12,
        thumbnail=True,
        system_message=None,
        dtype="float32",
    )
    weights = build_weights(config, dtype=torch.float32, device=DEVICE)
    generator = torch.Generator().manual_seed(0)
    for parameter in named_parameters(weights).values():
        scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1.0
        parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return InternVL(config, weights, TORCH)

"""Emulates the products of few rows and those in FP8 (see emulated.py)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from internvl_rt.kernels._gemv_plan import choose_8bit_plan, choose_gemv_plan
from internvl_rt.kernels._int4 import unpack_int4
from internvl_rt.kernels._launch import Target
from internvl_rt.kernels.gemv_4bit import choose_gemv_4bit_plan
from support.emulated_arithmetic import fused_multiply_add, product, rounded, rounded_to_tf32

TARGET = Target(90, 132, interpreted=True)


def gemm_fp8(
    numbers_RK: Tensor,
    scale_R: Tensor,
    weight_NK: Tensor,
    scale_NG: Tensor,
    bias_N: Tensor | None,
    dtype: torch.dtype,
    residual_RN: Tensor | None,
    plan: Any,
) -> list[Tensor]:
    x, weight, k = numbers_RK.float(), weight_NK.float(), weight_NK.shape[1]
    y, width = torch.zeros(len(x), len(weight)), k if scale_NG.shape[1] == 1 else 128
    for scale, start in zip(scale_NG.T, range(0, k, width), strict=True):
        part = slice(start, start + width)
        y = y + x[:, part] @ weight[:, part].T * scale
    y = y * scale_R[:, None]
    for added in (bias_N, residual_RN):
        y = y if added is None else y + added.float()
    return [y.to(dtype)]


def few_rows(x_RK: Tensor, weight_NK: Tensor, norm_weight_K: Tensor | None, eps: float, plan: Any) -> Tensor:
    """Returns the float32 sums of gemv and gemv_qkv; for matrix units it first rounds x times the norm's weight."""
    dtype = x_RK.dtype
    plan = plan or choose_gemv_plan(len(x_RK), *weight_NK.shape, dtype, TARGET)
    x = x_RK.float()
    if norm_weight_K is None:
        return product(x, weight_NK, dtype)
    a = x * norm_weight_K.float()
    if plan.matrix and dtype != torch.float32:
        a = rounded_to_tf32(a) if dtype == torch.float16 else rounded(a, dtype)
    rstd = 1 / (x.square().sum(-1, keepdim=True) / x.shape[1] + eps).sqrt()
    return product(a, weight_NK, dtype) * rstd


def gemv(
    x_RK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    norm_weight_K: Tensor | None,
    eps: float,
    activation: str,
    residual_RN: Tensor | None,
    plan: Any,
    early_trigger: bool = False,  # changes no bit
) -> list[Tensor]:
    y = few_rows(x_RK, weight_NK, norm_weight_K, eps, plan)
    return _epilogue(y, bias_N, activation, residual_RN, x_RK.dtype)


def _epilogue(
    y: Tensor, bias_N: Tensor | None, activation: str, residual_RN: Tensor | None, dtype: torch.dtype
) -> list[Tensor]:
    if bias_N is not None:
        y = y + bias_N.float()
    if activation == "swiglu":
        gate, up = y.chunk(2, dim=-1)
        y = gate / (1 + (-gate).exp()) * up
    if residual_RN is not None:
        y = y + residual_RN.float()
    return [y.to(dtype)]


def gemv_8bit(
    x_RK: Tensor,
    weight_NK: Tensor,
    scale_NG: Tensor,
    bias_N: Tensor | None,
    norm_weight_K: Tensor | None,
    eps: float,
    activation: str,
    residual_RN: Tensor | None,
    plan: Any,
    early_trigger: bool = False,  # changes no bit
) -> list[Tensor]:
    """Multiplies each sum, or the sums of 128 columns each, by a scale."""
    dtype, (rows, k), normed = x_RK.dtype, x_RK.shape, norm_weight_K is not None
    plan = plan or choose_8bit_plan(rows, *weight_NK.shape, dtype, TARGET, normed=normed)
    x = x_RK.float()
    a = x * norm_weight_K.float() if norm_weight_K is not None else x
    if normed and plan.matrix and dtype != torch.float32:
        a = rounded_to_tf32(a) if dtype == torch.float16 else rounded(a, dtype)
    numbers, width = weight_NK.float(), k if scale_NG.shape[1] == 1 else 128
    y = torch.zeros(rows, len(numbers))
    for scale, start in zip(scale_NG.T, range(0, k, width), strict=True):
        part = slice(start, start + width)
        y = y + product(a[:, part], numbers[:, part], dtype) * scale
    if normed:
        y = y * (1 / (x.square().sum(-1, keepdim=True) / k + eps).sqrt())
    return _epilogue(y, bias_N, activation, residual_RN, dtype)


def gemv_4bit(
    x_RK: Tensor,
    words_NW: Tensor,
    scale_NG: Tensor,
    zero_NG: Tensor | None,
    bias_N: Tensor | None,
    norm_weight_K: Tensor | None,
    eps: float,
    group: int,
    activation: str,
    residual_RN: Tensor | None,
    plan: Any,
    early_trigger: bool = False,  # changes no bit
) -> list[Tensor]:
    """Takes the offset of 128 off after the sum on the CUDA cores, and off each number on matrix units."""
    dtype, (rows, k), (n, groups) = x_RK.dtype, x_RK.shape, scale_NG.shape
    normed = norm_weight_K is not None
    plan = plan or choose_gemv_4bit_plan(rows, n, k, dtype, TARGET, normed=normed)
    x, left = x_RK.float(), groups * group - k
    a = x * norm_weight_K.float() if norm_weight_K is not None else x
    if normed and plan.matrix and dtype != torch.float32:
        a = rounded_to_tf32(a) if dtype == torch.float16 else rounded(a, dtype)
    a_RGC = F.pad(a, (0, left)).view(rows, groups, group)
    numbers_NGC = F.pad(unpack_int4(words_NW, k).float(), (0, left)).view(n, groups, group)
    zero_NG = torch.full_like(scale_NG, 8).float() if zero_NG is None else zero_NG.float()
    if plan.matrix:
        weight_NGC = numbers_NGC - zero_NG[..., None]
        sums_GRN = product(a_RGC.transpose(0, 1), weight_NGC.transpose(0, 1), dtype)
        y = (sums_GRN * scale_NG.float().mT[:, None]).sum(0)
    else:
        products, total = torch.zeros(rows, n, groups, 16), torch.zeros(rows, 1, groups, 16)
        for first in range(0, group, 16):
            a_plane = a_RGC[:, None, :, first : first + 16]
            products = fused_multiply_add(a_plane, numbers_NGC[None, :, :, first : first + 16] + 128, products)
            total = total + a_plane
        four, total = (each.unflatten(-1, (4, 4)).sum(-1) for each in (products, total))
        four = fused_multiply_add(-(128 + zero_NG)[None, ..., None], total, four)
        y = (four * scale_NG.float()[None, ..., None]).sum((2, 3))
    if normed:
        y = y * (1 / (x.square().sum(-1, keepdim=True) / k + eps).sqrt())
    return _epilogue(y, bias_N, activation, residual_RN, dtype)

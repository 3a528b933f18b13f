"""Searches what makes a 4-bit product differ least: a factor of each input channel, and a range of each group.

The factors are those of AWQ (arXiv 2306.00978): s = mean |x| ^ alpha, by which columns of the weight are multiplied
before they are rounded, and which the part in front divides its outputs by; alpha is the best of a grid. Then the range
of each group is cut, by what the errors of its columns together do to the output, not by each alone.

Text tokens and visual ones count equally, however many there are of each, because a prompt has a hundred times more of
the latter (MBQ, arXiv 2412.19509, weighs the two by gradients). Of one kind all tokens count equally, whatever the size
of their activations: errors are relative to a token's own output.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from internvl_rt.quantize.rounding import Rounded, round_int4, row_parts

NUM_ALPHAS = 21  # from 0, which leaves the weight as it is, to 1
RATIOS = (16 / 15, 1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.75, 0.7, 0.65)  # of a group's range; the first one holds it all
_LEAST = 0.01  # of a channel's mean, relative to that of all: one that is silent here may not be so elsewhere

Round = Callable[[Tensor], Rounded]


def weigh_rows(x_RK: Tensor, weight_NK: Tensor, is_visual_R: Tensor) -> Tensor:
    """Returns the inputs of a product, multiplied so that the squared errors of its outputs may be added up."""
    size_R = torch.zeros(len(x_RK), device=x_RK.device)
    for rows in row_parts(weight_NK):
        size_R += (x_RK @ weight_NK[rows].t()).square().sum(1)
    count_R = torch.where(is_visual_R, is_visual_R.sum(), (~is_visual_R).sum())
    factor_R = (size_R * count_R).rsqrt()
    return x_RK * factor_R.masked_fill_(~factor_R.isfinite(), 0.0)[:, None]


def search_factors(x_RK: Tensor, weight_NK: Tensor, round_weight: Round, repeats: int = 1, head: int = 1) -> Tensor:
    """Returns the factors s_K of the columns of a weight.

    x_RK: weighed inputs
    repeats, head: the columns are groups of `repeats` heads of `head` columns; heads of a group share their factors
    """
    mean_K = x_RK.abs().mean(0)
    shared = mean_K.view(-1, repeats, head).mean(1, keepdim=True)
    mean_K = shared.expand(-1, repeats, head).reshape(-1)
    mean_K = (mean_K / mean_K.mean().clamp(min=1e-30)).clamp_(min=_LEAST)
    best, least = torch.ones_like(mean_K), torch.inf
    for alpha in torch.linspace(0, 1, NUM_ALPHAS).tolist():
        s_K = mean_K**alpha
        s_K /= (s_K.max() * s_K.min()).sqrt()
        error = 0.0
        for rows in row_parts(weight_NK):
            part = weight_NK[rows]
            difference = round_weight(part * s_K).dense() / s_K - part
            error += float((x_RK @ difference.t()).square().sum())
        if error < least:
            best, least = s_K, error
    return best


def search_ranges(x_RK: Tensor, weight_NK: Tensor, group: int, *, asymmetric: bool, dtype: torch.dtype) -> Tensor:
    """Returns by what the range of each group is multiplied, float32 [N, G].

    x_RK: weighed inputs, as the weight multiplies them
    """
    x_GRg = x_RK.view(len(x_RK), -1, group).transpose(0, 1)
    products_Ggg = x_GRg.transpose(1, 2) @ x_GRg
    best_NG = torch.ones(len(weight_NK), weight_NK.shape[1] // group, device=weight_NK.device)
    for rows in row_parts(weight_NK):
        part = weight_NK[rows]
        least_nG = torch.full_like(best_NG[rows], torch.inf)
        for ratio in RATIOS:
            if asymmetric and ratio > 1:
                continue
            ratio_nG = torch.full_like(least_nG, ratio)
            rounded = round_int4(part, group, asymmetric=asymmetric, dtype=dtype, ratio_NG=ratio_nG)
            error_Gng = (rounded.dense() - part).view(len(part), -1, group).transpose(0, 1)
            error_nG = ((error_Gng @ products_Ggg) * error_Gng).sum(2).t()
            best_NG[rows] = torch.where(error_nG < least_nG, ratio_nG, best_NG[rows])
            least_nG = torch.minimum(least_nG, error_nG)
    return best_NG

"""One decoder layer: what its products are given, how they are rounded, and how far its outputs then are off."""

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from internvl_rt.checkpoint.config import DecoderConfig
from internvl_rt.model.decoder import DecoderLayer
from internvl_rt.model.linear import AnyLinear, GatedMlp, Linear, Linear8, Norm
from internvl_rt.model.ops import TORCH, Ops
from internvl_rt.quantize.calibration import CalibrationPrompt, LayerRunner
from internvl_rt.quantize.options import QuantiseOptions
from internvl_rt.quantize.rounding import Rounded, round_fp8, round_int4
from internvl_rt.quantize.search import search_factors, search_ranges, weigh_rows

LINEARS = ("qkv", "o", "mlp.gate_up", "mlp.down")


def linears_of(layer: DecoderLayer) -> dict[str, AnyLinear]:
    """Returns the linears of a layer by their path in it."""
    mlp = layer.mlp
    assert isinstance(mlp, GatedMlp), "models with experts are refused"
    return dict(zip(LINEARS, (layer.qkv, layer.o, mlp.gate_up, mlp.down), strict=True))


def with_linears(layer: DecoderLayer, linears: Mapping[str, AnyLinear]) -> DecoderLayer:
    """Returns a layer with other linears, given by their path in it."""
    mlp = GatedMlp(linears["mlp.gate_up"], linears["mlp.down"])
    return replace(layer, qkv=linears["qkv"], o=linears["o"], mlp=mlp)


@dataclass(frozen=True, eq=False, kw_only=True)
class RecordingOps(Ops):
    """Plain operations that show what each product is given, behind its norm."""

    record: Callable[[AnyLinear, Tensor], None]

    def product(self, x: Tensor, linear: AnyLinear, bias_N: Tensor | None, **after: Any) -> Tensor:
        self.record(linear, x)
        return super().product(x, linear, bias_N, **after)


def run_and_record(
    runner: LayerRunner, layer: DecoderLayer, states: Items[Tensor], rows: Items[np.ndarray]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Returns what the layer makes of the prompts, and by the path of its linears their inputs of some tokens.

    rows: indices of these tokens in each prompt
    """
    names = {id(linear): name for name, linear in linears_of(layer).items()}
    seen: dict[str, list[Tensor]] = {name: [] for name in LINEARS}

    def record(linear: AnyLinear, x: Tensor) -> None:
        found = seen[names[id(linear)]]
        found.append(x[torch.from_numpy(rows[len(found)]).to(x.device)])

    out = runner.run(layer, states, RecordingOps(**vars(TORCH), record=record))
    return out, {name: torch.cat(found) for name, found in seen.items()}


def round_layer(layer: DecoderLayer, options: QuantiseOptions, dtype: torch.dtype) -> dict[str, Rounded]:
    """Rounds the linears of a layer to nearest. dtype: of the scales."""
    return {name: _round(linear.dense(torch.float32), options, dtype) for name, linear in linears_of(layer).items()}


def _round(weight_NK: Tensor, options: QuantiseOptions, dtype: torch.dtype, ratio_NG: Tensor | None = None) -> Rounded:
    if options.scheme == "fp8":
        return round_fp8(weight_NK, dtype)
    return round_int4(weight_NK, options.group, asymmetric=options.asymmetric, dtype=dtype, ratio_NG=ratio_NG)


def search_layer(
    layer: DecoderLayer,
    inputs: dict[str, Tensor],
    is_visual_R: Tensor,
    config: DecoderConfig,
    options: QuantiseOptions,
    dtype: torch.dtype,
) -> tuple[DecoderLayer, dict[str, Rounded]]:
    """Returns an equal layer, whose channels are scaled so that it is rounded with less error, and its linears rounded.

    inputs: of the linears, of some tokens; is_visual_R says which of these are visual. dtype: of the file
    """
    linears = linears_of(layer)
    weights = {name: linear.dense(torch.float32) for name, linear in linears.items()}
    weighed = {name: weigh_rows(inputs[name], weights[name], is_visual_R) for name in LINEARS}

    def search(name: str, repeats: int = 1, head: int = 1) -> Tensor:
        return search_factors(weighed[name], weights[name], lambda part: _round(part, options, dtype), repeats, head)

    norm1, qkv_K = _divide_norm(layer.norm1, search("qkv"), dtype)
    norm2, gate_up_K = _divide_norm(layer.norm2, search("mlp.gate_up"), dtype)
    o_K = search("o", config.num_heads // config.num_kv_heads, config.head_dim)
    down_K = search("mlp.down")
    factors = {"qkv": qkv_K, "o": o_K, "mlp.gate_up": gate_up_K, "mlp.down": down_K}
    # The values' rows, of one head where several query heads share it, and the rows of up.
    v_rows = o_K.view(config.num_kv_heads, -1, config.head_dim)[:, 0].reshape(-1)
    scaled = {name: Linear(weights[name] * factor_K, linears[name].bias_N) for name, factor_K in factors.items()}
    scaled["qkv"] = _divide_last_rows(scaled["qkv"], v_rows, dtype)
    scaled["mlp.gate_up"] = _divide_last_rows(scaled["mlp.gate_up"], down_K, dtype)
    rounded = {}
    for name, linear in scaled.items():
        x_RK = weighed[name] / factors[name]
        how = {"asymmetric": options.asymmetric, "dtype": dtype}
        ratio_NG = search_ranges(x_RK, linear.weight_NK, options.group, **how)  # type: ignore[arg-type]
        rounded[name] = _round(linear.weight_NK, options, dtype, ratio_NG)
    return with_linears(replace(layer, norm1=norm1, norm2=norm2), scaled), rounded


def _divide_norm(norm: Norm, factor_K: Tensor, dtype: torch.dtype) -> tuple[Norm, Tensor]:
    """Returns the norm divided by factors, as it is stored, and the factors by which it is then exactly divided."""
    weight_K = (norm.weight_D / factor_K).to(dtype).float()
    exact_K = norm.weight_D / weight_K
    usable = exact_K.isfinite() & (exact_K > 0)
    return replace(norm, weight_D=weight_K.where(usable, norm.weight_D)), exact_K.where(usable, 1.0)


def _divide_last_rows(linear: Linear, factor_M: Tensor, dtype: torch.dtype) -> Linear:
    """Divides the last rows of a linear, and of its bias, which is rounded as it is stored."""
    weight_NK, bias_N, first = linear.weight_NK, linear.bias_N, linear.num_outputs - len(factor_M)
    weight_NK[first:] /= factor_M[:, None]
    if bias_N is not None:
        bias_N = torch.cat((bias_N[:first], (bias_N[first:] / factor_M).to(dtype).float()))
    return Linear(weight_NK, bias_N)


def rounded_layer(layer: DecoderLayer, rounded: dict[str, Rounded], options: QuantiseOptions) -> DecoderLayer:
    """Returns the layer with its linears as an engine multiplies them."""

    def linear(name: str, dense: AnyLinear) -> AnyLinear:
        given, bias_N = rounded[name], dense.bias_N
        if options.scheme == "fp8":
            return Linear8(given.numbers_NK, given.scale_NG.float(), bias_N, "token")
        return Linear(given.dense(), bias_N)

    return with_linears(layer, {name: linear(name, dense) for name, dense in linears_of(layer).items()})


def relative_error(
    prompts: Items[CalibrationPrompt], states: Items[Tensor], right: Items[Tensor], found: Items[Tensor]
) -> float:
    """Returns how far what a layer adds to a token is from what it should add, relative to that.

    It is the mean over text tokens and the mean over visual ones, in equal parts. states: what entered the layer
    """
    errors, is_visual = [], []
    for prompt, x_TD, right_TD, found_TD in zip(prompts, states, right, found, strict=True):
        errors.append((found_TD - right_TD).norm(dim=1) / (right_TD - x_TD).norm(dim=1).clamp(min=1e-30))
        is_visual.append(torch.from_numpy(prompt.is_visual_T))
    error_T, is_visual_T = torch.cat(errors).cpu(), torch.cat(is_visual)
    kinds = [error_T[kind] for kind in (is_visual_T, ~is_visual_T) if kind.any()]
    return float(torch.stack([kind.mean() for kind in kinds]).mean())

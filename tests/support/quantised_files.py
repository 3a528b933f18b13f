"""Writes small checkpoints quantised in every layout, bit by bit from the formats' descriptions, with what they mean.

Nothing here uses the loader: numbers are drawn, packed by loops over Python integers, and multiplied out in float32.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from internvl_rt.checkpoint.config import ModelConfig
from internvl_rt.checkpoint.json_section import Section
from internvl_rt.checkpoint.quantization import Quantization, read_quantization
from internvl_rt.model.dialects import DIALECTS
from internvl_rt.model.placement import plan_tensors

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column, of eight, whose number is in nibble i of a word


class Written(NamedTuple):
    """A module's tensors by the last part of their names, and what they multiply out to."""

    tensors: dict[str, Tensor]
    dense_NK: Tensor


def words(values: list[int], bits: int) -> int:
    """Packs numbers into one int32, the first in the lowest bits."""
    word = sum(value << (bits * index) for index, value in enumerate(values))
    return word - (1 << 32) if word >= 1 << 31 else word


def pack_rows(q: Tensor, bits: int = 4) -> Tensor:
    """Packs numbers that follow each other in a row."""
    per = 32 // bits
    rows = [[words(row[start : start + per], bits) for start in range(0, len(row), per)] for row in q.tolist()]
    return torch.tensor(rows, dtype=torch.int32)


def pack_columns(q: Tensor) -> Tensor:
    return pack_rows(q.t()).t().contiguous()


def pack_awq(q: Tensor) -> Tensor:
    """Packs the columns of [K, N] eight to a word, in AWQ's order."""
    order = torch.tensor([8 * word + column for word in range(q.shape[1] // 8) for column in AWQ_ORDER])
    return pack_rows(q[:, order])


def _scales(n: int, groups: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.rand(n, groups) / 64 + 1 / 128).to(dtype)


def _spread(per_group: Tensor, size: int, k: int) -> Tensor:
    return per_group.float().repeat_interleave(size, 1)[:, :k]


def fp8(
    rows: int | None, columns: int | None, name: str = "weight_scale", static: bool = False
) -> Callable[..., Written]:
    """rows, columns: that share a scale; None: all."""

    def write(n: int, k: int) -> Written:
        numbers = torch.randn(n, k).mul(40).clamp(-448, 448).to(torch.float8_e4m3fn)
        scale = _scales(1 if rows is None else -(-n // rows), 1 if columns is None else -(-k // columns))
        wide = scale.float().repeat_interleave(rows or n, 0)[:n].repeat_interleave(columns or k, 1)[:, :k]
        tensors = {"weight": numbers, name: scale.view(1) if rows is None else scale}
        if static:
            tensors["input_scale"] = torch.rand(1) / 16 + 1 / 64
        return Written(tensors, numbers.float() * wide)

    return write


def int8(n: int, k: int) -> Written:
    numbers, scale = torch.randint(-127, 128, (n, k), dtype=torch.int8), _scales(n, 1)
    return Written({"weight": numbers, "weight_scale": scale}, numbers.float() * scale.float())


def packed(bits: int, group: int | None, symmetric: bool = True) -> Callable[..., Written]:
    def write(n: int, k: int) -> Written:
        half, size = 1 << (bits - 1), group or k
        q = torch.randint(0, 2 * half, (n, k))
        scale = _scales(n, -(-k // size))
        zero = torch.full_like(scale, half) if symmetric else torch.randint(0, 2 * half, scale.shape)
        tensors = {"weight_packed": pack_rows(q, bits), "weight_scale": scale, "weight_shape": torch.tensor([n, k])}
        if not symmetric:
            tensors["weight_zero_point"] = pack_columns(zero)
        return Written(tensors, (q - _spread(zero, size, k)) * _spread(scale, size, k))

    return write


def awq(group: int) -> Callable[..., Written]:
    def write(n: int, k: int) -> Written:
        q, zero = torch.randint(0, 16, (n, k)), torch.randint(0, 16, (n, k // group))
        scale = _scales(n, k // group, torch.float16)
        tensors = {"qweight": pack_awq(q.t()), "qzeros": pack_awq(zero.t()), "scales": scale.t().contiguous()}
        return Written(tensors, (q - _spread(zero, group, k)) * _spread(scale, group, k))

    return write


def gptq(group: int, first: int) -> Callable[..., Written]:
    """first: 1 in version 1, in which 0x11111111 is subtracted from each word of zeros; 0 in version 2."""

    def write(n: int, k: int) -> Written:
        q, zero = torch.randint(0, 16, (n, k)), torch.randint(0, 16, (n, k // group))
        scale = _scales(n, k // group, torch.float16)
        order = torch.arange(k, dtype=torch.int32) // group
        stored = pack_rows(zero.t()) - 0x11111111 * first  # it wraps around
        tensors = {"qweight": pack_columns(q.t()), "qzeros": stored, "scales": scale.t().contiguous(), "g_idx": order}
        return Written(tensors, (q - _spread(zero, group, k)) * _spread(scale, group, k))

    return write


def compressed(form: str, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None = None, **more: Any) -> Any:
    group = {"targets": ["Linear"], "weights": {"symmetric": True, "dynamic": False, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**group, "input_activations": inputs, "output_activations": None}},
        "ignore": ["re:.*lm_head", "re:vision_model.*", "re:mlp1.*"],
        **more,
    }


TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
STATIC = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
FLOAT8, INT4 = {"num_bits": 8, "type": "float"}, {"num_bits": 4, "type": "int"}
INT8_CHANNEL = {"num_bits": 8, "type": "int", "strategy": "channel"}
FLOAT8_TENSOR = FLOAT8 | {"strategy": "tensor"}
_AWQ = {"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm", "modules_to_not_convert": None}
_GPTQ = {"quant_method": "gptq", "bits": 4, "desc_act": False, "sym": False}

LAYOUTS: dict[str, tuple[Callable[..., Written], dict[str, Any]]] = {
    "fp8 channel": (fp8(1, None), compressed("float-quantized", FLOAT8 | {"strategy": "channel"}, TOKEN)),
    "fp8 tensor": (fp8(None, None), compressed("float-quantized", FLOAT8_TENSOR, None)),
    "fp8 static": (
        fp8(None, None, static=True),
        compressed("float-quantized", FLOAT8_TENSOR, STATIC),
    ),
    "fp8 block": (
        fp8(128, 128),
        compressed("float-quantized", FLOAT8 | {"strategy": "block", "block_structure": [128, 128]}, TOKEN),
    ),
    "fp8 of transformers": (
        fp8(128, 128, "weight_scale_inv"),
        {
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
            "activation_scheme": "dynamic",
            "modules_to_not_convert": ["vision_model", "mlp1", "lm_head"],
        },
    ),
    "int8 channel": (int8, compressed("int-quantized", INT8_CHANNEL)),
    "int8 packed": (
        packed(8, None),
        compressed("pack-quantized", INT8_CHANNEL),
    ),
    "int4 group 32": (packed(4, 32), compressed("pack-quantized", INT4 | {"strategy": "group", "group_size": 32})),
    "int4 asymmetric": (
        packed(4, 32, symmetric=False),
        compressed("pack-quantized", INT4 | {"strategy": "group", "group_size": 32, "symmetric": False}),
    ),
    "int4 channel": (packed(4, None), compressed("pack-quantized", INT4 | {"strategy": "channel"})),
    "awq": (awq(32), {**_AWQ, "group_size": 32}),
    "gptq": (gptq(32, first=1), {**_GPTQ, "group_size": 32}),
    "gptq_v2": (gptq(32, first=0), {**_GPTQ, "group_size": 32, "checkpoint_format": "gptq_v2"}),
}


def quantization_of(config: Mapping[str, Any]) -> Quantization:
    found = read_quantization(Section(Path("config.json"), "", {"quantization_config": config}))
    assert found is not None
    return found


def write_quantised(
    folder: Path, config: ModelConfig, layout: str, dialect: str = "original", seed: int = 0
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Writes model.safetensors. Returns its tensors, and what those of a dense checkpoint would be, in float32."""
    write, _ = LAYOUTS[layout]
    torch.manual_seed(seed)
    stored, dense = dict[str, Tensor](), dict[str, Tensor]()
    for name, planned in plan_tensors(config, DIALECTS[dialect]).items():
        path = planned.placements[0].parameter
        if path.startswith("decoder.layers.") and path.endswith("weight_NK") and ".router." not in path:
            module = name.removesuffix(".weight")
            written = write(*planned.shape)
            stored |= {f"{module}.{last}": tensor for last, tensor in written.tensors.items()}
            dense[name] = written.dense_NK
        else:
            stored[name] = (torch.randn(planned.shape) / 8).to(torch.bfloat16)
            dense[name] = stored[name].float()
    save_file(stored, folder / "model.safetensors")
    return stored, dense

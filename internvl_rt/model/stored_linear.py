"""How the linears of quantised checkpoints lie in files, and how they become `Linear8` and `Linear4`.

A module of a file (`self_attn.q_proj`) has several tensors: numbers, scales, perhaps zeros. `stored_tensors` lists them
for each layout of `checkpoint/quantization.py`, `check_module` looks at the small ones before memory is taken, and
`read_part` turns them into the rows of a linear. 4-bit numbers lie eight to a word, low bits first, unless it says
otherwise below. Sources: compressed_tensors/compressors, AutoAWQ's awq/utils/packing_utils.py, GPTQModel's
nn_modules/qlinear.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from internvl_rt.checkpoint.folder import Checkpoint
from internvl_rt.checkpoint.quantization import Scheme
from internvl_rt.checkpoint.tensor_file import TensorEntry, read_chunks
from internvl_rt.kernels._int4 import pack_int4
from internvl_rt.model.linear import (
    BLOCK,
    E4M3_MAX,
    INT8_MAX,
    AnyLinear,
    Linear,
    Linear4,
    Linear8,
    quantise_to_8_bits,
)

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
LAST_NAMES = (  # of tensors that only quantised linears have
    *("weight_scale", "weight_scale_inv", "weight_packed", "weight_shape", "weight_zero_point", "input_scale"),
    "input_zero_point",
    *("qweight", "qzeros", "scales", "g_idx", "weight_g_idx", "weight_global_scale", "k_scale", "v_scale"),
)
MAX_SCALE = 1e30  # larger ones make weights that are not finite; a smaller static scale makes inputs so
_AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # the column that is in each nibble of a word, of eight columns


class StoredTensor(NamedTuple):
    """What a tensor of a file must be: one of some shapes, the usual one first, and one of some dtypes."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    is_optional: bool = False


class Part(NamedTuple):
    """Rows of a `Linear8` or `Linear4`, as their fields: a module of a file, or some of its rows."""

    numbers: Tensor
    scale_NG: Tensor
    zero_NG: Tensor | None = None
    input_scale_1: Tensor | None = None


def num_groups(scheme: Scheme, num_inputs: int) -> int:
    return 1 if scheme.group is None else -(-num_inputs // scheme.group)


def fits(scheme: Scheme, num_outputs: int, num_inputs: int) -> bool:
    """Says whether a weight of this shape can be stored so: groups and words of 4-bit numbers must be whole."""
    if scheme.bits == 8:
        return scheme.layout != "packed" or num_inputs % 4 == 0
    packs_rows_alone = scheme.layout == "packed" and scheme.symmetric
    return num_inputs % (scheme.group or 8) == 0 and num_inputs % 8 == 0 and (packs_rows_alone or num_outputs % 8 == 0)


def quantise_shapes(linear: Linear, scheme: Scheme) -> AnyLinear:
    """Returns a linear of the scheme's kind on the device "meta", for a dense one there."""
    n, k = linear.weight_NK.shape

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    if scheme.bits == 8:
        numbers = empty(n, k, dtype=torch.float8_e4m3fn if scheme.is_float else torch.int8)
        scale = empty(n, num_groups(scheme, k), dtype=torch.float32)
        static = empty(1, dtype=torch.float32) if scheme.inputs == "static" else None
        return Linear8(numbers, scale, linear.bias_N, scheme.inputs, static)
    group = scheme.group or BLOCK
    groups = -(-k // group)
    zeros = None if scheme.symmetric else empty(n, groups, dtype=torch.uint8)
    words = empty(n, 16 * -(-k // BLOCK), dtype=torch.int32)
    return Linear4(words, empty(n, groups, dtype=torch.float16), zeros, linear.bias_N, k, group)


def stored_tensors(scheme: Scheme, num_outputs: int, num_inputs: int) -> dict[str, StoredTensor]:
    """Returns the tensors of a module by the last part of their names."""
    n, k, groups = num_outputs, num_inputs, num_groups(scheme, num_inputs)
    int32 = (torch.int32,)
    match scheme.layout:
        case "cast":
            return {"weight": StoredTensor(((n, k),), FLOATS)}
        case "awq":
            return {
                "qweight": StoredTensor(((k, n // 8),), int32),
                "qzeros": StoredTensor(((groups, n // 8),), int32),
                "scales": StoredTensor(((groups, n),), FLOATS),
            }
        case "gptq" | "gptq_v2":
            return {
                "qweight": StoredTensor(((k // 8, n),), int32),
                "qzeros": StoredTensor(((groups, n // 8),), int32),
                "scales": StoredTensor(((groups, n),), FLOATS),
                "g_idx": StoredTensor(((k,),), int32, is_optional=not scheme.is_reordered),
            }
    shapes: tuple[tuple[int, ...], ...] = ((n, groups), *([(n,)] if groups == 1 else []))
    if scheme.block_rows is None:
        shapes = ((1,), (), (1, 1))
    elif scheme.block_rows > 1:
        shapes = ((-(-n // scheme.block_rows), groups),)
    stored = {scheme.scale_name: StoredTensor(shapes, FLOATS)}
    if scheme.layout == "compressed":
        stored["weight"] = StoredTensor(((n, k),), (torch.float8_e4m3fn if scheme.is_float else torch.int8,))
    else:
        stored["weight_packed"] = StoredTensor(((n, k * scheme.bits // 32),), int32)
        stored["weight_shape"] = StoredTensor(((2,),), (torch.int64, torch.int32))
    if not scheme.symmetric:
        stored["weight_zero_point"] = StoredTensor(((n // 8, groups),), int32)
    if scheme.inputs == "static":
        stored["input_scale"] = StoredTensor(((1,), ()), FLOATS)
    return stored


def check_module(checkpoint: Checkpoint, module: str, scheme: Scheme, num_outputs: int, num_inputs: int) -> str | None:
    """Returns what is wrong with the content of a module's small tensors, if anything is."""
    for last in stored_tensors(scheme, num_outputs, num_inputs):
        name = f"{module}.{last}"
        if last == "input_scale":
            if problem := check_scales(checkpoint, [name]):
                return problem
        elif last in (scheme.scale_name, "scales"):
            if scheme.block_rows is None and (problem := check_scales(checkpoint, [name])):
                return problem
            if not all((part.abs() < MAX_SCALE).all() for part in _numbers(checkpoint.entries[name])):
                return f"{name} holds a number that is not finite, or beyond {MAX_SCALE:.0e}"
        elif last == "qzeros" and scheme.symmetric:
            eights = -0x77777778 if scheme.layout == "gptq_v2" else 0x77777777
            if not all((part == eights).all() for part in _numbers(checkpoint.entries[name])):
                return f"{name} holds other zero points than 8, which is what sym and the format in config.json mean"
        elif last == "weight_shape":
            shape = _whole(checkpoint, name, "cpu").tolist()
            if shape != [num_outputs, num_inputs]:
                return f"{name} holds {shape}, expected {[num_outputs, num_inputs]}"
        elif last == "g_idx" and name in checkpoint.entries:
            order = torch.arange(num_inputs, dtype=torch.int32) // (scheme.group or num_inputs)
            if not torch.equal(_whole(checkpoint, name, "cpu"), order):
                return f"{name} orders columns by activation (desc_act), which is not supported"
    return None


def check_scales(checkpoint: Checkpoint, names: Iterable[str]) -> str | None:
    """Returns which of the tensors, of one number each, holds none that a static scale can be."""
    numbers = ((name, read_number(checkpoint, name)) for name in names)
    bad = next((f"{name} is {number}" for name, number in numbers if not 1 / MAX_SCALE < number < MAX_SCALE), None)
    return None if bad is None else f"{bad}, expected a positive number"


def read_number(checkpoint: Checkpoint, name: str) -> float:
    return float(_whole(checkpoint, name, "cpu"))


def read_part(
    checkpoint: Checkpoint, module: str, scheme: Scheme, num_outputs: int, num_inputs: int, device: torch.device
) -> Part:
    """Reads a module, in the layout of `Linear8` or `Linear4`."""
    n, k = num_outputs, num_inputs

    def read(last: str) -> Tensor:
        return _whole(checkpoint, f"{module}.{last}", device)

    if scheme.layout == "awq":
        order = torch.tensor(_AWQ_COLUMNS, device=device).argsort()
        q_NK = _nibbles(read("qweight"))[:, :, order].reshape(k, n).t()
        zero_NG = _nibbles(read("qzeros"))[:, :, order].reshape(-1, n).t()
        return _part_of_4_bits(q_NK, read("scales").t(), zero_NG, scheme)
    if scheme.layout in ("gptq", "gptq_v2"):
        q_NK = _nibbles(read("qweight")).transpose(1, 2).reshape(k, n).t()
        if scheme.symmetric:
            return _part_of_4_bits(q_NK, read("scales").t(), None, scheme)
        # Version 1 stores one less, subtracted from the whole word: a zero of 0 borrows from the next one.
        words = read("qzeros") + (0x11111111 if scheme.layout == "gptq" else 0)
        return _part_of_4_bits(q_NK, read("scales").t(), _nibbles(words).reshape(-1, n).t(), scheme)
    scale = read(scheme.scale_name)
    if scheme.bits == 4:
        zeros = None if scheme.symmetric else _nibbles(read("weight_zero_point")).transpose(1, 2).reshape(n, -1)
        return _part_of_4_bits(_nibbles(read("weight_packed")).reshape(n, k), scale.view(n, -1), zeros, scheme)
    scale = scale.float()
    if scheme.block_rows is None:
        scale_NG = scale.view(1, 1).expand(n, 1)
    elif scheme.block_rows > 1:
        scale_NG = scale.repeat_interleave(scheme.block_rows, 0)[:n]
    else:
        scale_NG = scale.view(n, -1)
    numbers = read("weight") if scheme.layout == "compressed" else _signed_bytes(read("weight_packed"))
    static = read("input_scale").float().view(1) if scheme.inputs == "static" else None
    return Part(numbers, scale_NG, input_scale_1=static)


def largest_of(part: Part, dtype: torch.dtype) -> Tensor:
    """Returns on the device the largest weight that a part's scales allow, in `dtype`; NaN if an FP8 number is NaN.

    All FP8 numbers that are not finite are NaN, and have the same bits but for the sign.
    """
    is_float, is_int8 = part.numbers.dtype == torch.float8_e4m3fn, part.numbers.dtype == torch.int8
    largest = part.scale_NG.float().abs().amax() * (E4M3_MAX if is_float else INT8_MAX if is_int8 else 15.0)
    if is_float:
        largest.masked_fill_(((part.numbers.view(torch.uint8) & 0x7F) == 0x7F).any(), torch.nan)
    return largest.to(dtype)


def join_parts(linear: AnyLinear, parts: Iterator[tuple[Part, list[tuple[slice, slice]]]]) -> AnyLinear:
    """Builds a linear of `linear`'s kind and shape, without a bias, from parts read one after another.

    Beside each part are pairs of rows: of the linear, and of the part, which fill them. Inputs are rounded by the
    largest of the parts' static scales.
    """
    made: dict[str, Tensor] = {}
    static: Tensor | None = None
    for part, rows in parts:
        tensors = {"numbers": part.numbers, "scale": part.scale_NG, "zero": part.zero_NG}
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            if name not in made:
                made[name] = tensor.new_empty((linear.num_outputs, tensor.shape[1]))
            if made[name].dtype != tensor.dtype:  # scales of 4-bit parts in several dtypes
                made[name], tensor = made[name].float(), tensor.float()
            for ours, theirs in rows:
                _bits(made[name])[ours] = _bits(tensor)[theirs]
        if part.input_scale_1 is not None:
            static = part.input_scale_1 if static is None else torch.maximum(static, part.input_scale_1)
    if isinstance(linear, Linear8):
        return Linear8(made["numbers"], made["scale"], None, linear.inputs, static)
    assert isinstance(linear, Linear4)
    how = linear.num_inputs, linear.group
    return Linear4(made["numbers"], made["scale"], made.get("zero"), None, *how)


def cast_linear(linear: Linear, scheme: Scheme) -> AnyLinear:
    """Quantises a dense linear, as a scheme with the layout "cast" says."""
    numbers = torch.float8_e4m3fn if scheme.is_float else torch.int8
    return quantise_to_8_bits(linear, numbers, scheme.inputs)


def _part_of_4_bits(q_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, scheme: Scheme) -> Part:
    if scheme.group is None:  # one scale a row: the same for each group of 128
        repeats = -(-q_NK.shape[1] // BLOCK)
        scale_NG, zero_NG = scale_NG.repeat(1, repeats), None if zero_NG is None else zero_NG.repeat(1, repeats)
    return Part(pack_int4(q_NK.contiguous()), scale_NG.contiguous(), zero_NG)


def _nibbles(words: Tensor) -> Tensor:
    """Returns the eight 4-bit numbers of each word, low bits first, as uint8 [..., 8]."""
    shifts = torch.arange(0, 8, 4, device=words.device, dtype=torch.uint8)
    by_byte = words.contiguous().view(torch.uint8).view(*words.shape, 4)  # little-endian, as every supported machine is
    return (by_byte[..., None] >> shifts).bitwise_and_(15).flatten(-2)


def _signed_bytes(words_NW: Tensor) -> Tensor:
    """Returns the four 8-bit numbers of each word, stored plus 128, as int8 [N, 4 W]."""
    return (words_NW.view(torch.uint8) ^ 128).view(torch.int8)


def _bits(tensor: Tensor) -> Tensor:
    """Returns FP8 numbers as bytes: some devices cannot copy them by index."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def _whole(checkpoint: Checkpoint, name: str, device: torch.device | str) -> Tensor:
    entry = checkpoint.entries[name]
    out = torch.empty(entry.shape, dtype=entry.dtype, device=device)
    checkpoint.read_into(name, out)
    return out


def _numbers(entry: TensorEntry) -> Iterator[Tensor]:
    for chunk in read_chunks(entry):
        yield torch.frombuffer(bytearray(chunk), dtype=entry.dtype)

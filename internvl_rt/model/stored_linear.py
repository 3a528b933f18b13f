"""How the linears of quantised checkpoints lie in files, and how they become `Linear8` and `Linear4`.

A module of a file (`self_attn.q_proj`) has several tensors: numbers, scales, perhaps zeros. `stored_tensors` lists them
for each layout of `checkpoint/quantization.py`, `check_module` looks at the small ones before memory is taken, and
`read_part` turns them into a part of a linear. 4-bit numbers lie eight to a word, low bits first, unless it says
otherwise below. Sources: compressed_tensors/compressors, AutoAWQ's awq/utils/packing_utils.py, GPTQModel's
nn_modules/qlinear.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Literal, NamedTuple

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
    SMALLEST_GROUP,
    AnyLinear,
    Linear,
    Linear4,
    Linear8,
    group_from,
    quantise_to_8_bits,
    take_groups,
)

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
LAST_NAMES = (  # of tensors that only quantised linears have
    *("weight_scale", "weight_scale_inv", "weight_packed", "weight_shape", "weight_zero_point", "input_scale"),
    "input_zero_point",
    *("qweight", "qzeros", "scales", "g_idx", "weight_g_idx", "weight_global_scale", "k_scale", "v_scale"),
)
MAX_SCALE = 1e30  # larger ones make weights that are not finite; a smaller static scale makes inputs so
_AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # the column that is in each nibble of a word, of eight columns


Axis = tuple[Literal["N", "K"], int]  # rows or columns of a module, and how many of them share an element of a tensor


class StoredTensor(NamedTuple):
    """What a tensor of a file must be: one of some shapes, the usual one first, and one of some dtypes.

    axes: of each dimension; (): the tensor is of the whole module
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    is_optional: bool = False
    axes: tuple[Axis, ...] = ()


class Part(NamedTuple):
    """Rows of a `Linear8` or `Linear4`, as their fields: a module of a file, or a part of it."""

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


def column_unit(scheme: Scheme) -> int:
    """Returns the number whose multiples are the columns at which a weight stored so can be cut."""
    if scheme.bits == 4:
        return SMALLEST_GROUP
    if scheme.group is not None:
        return BLOCK
    return 4 if scheme.layout == "packed" else 1


def quantise_shapes(linear: Linear, scheme: Scheme, first_column: int = 0) -> AnyLinear:
    """Returns a linear of the scheme's kind on the device "meta", for a dense one there.

    first_column: of a shard, in the whole
    """
    n, k = linear.weight_NK.shape

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    if scheme.bits == 8:
        numbers = empty(n, k, dtype=torch.float8_e4m3fn if scheme.is_float else torch.int8)
        scale = empty(n, num_groups(scheme, k), dtype=torch.float32)
        static = empty(1, dtype=torch.float32) if scheme.inputs == "static" else None
        return Linear8(numbers, scale, linear.bias_N, scheme.inputs, static)
    group = BLOCK if scheme.group is None else group_from(scheme.group, first_column)
    groups = -(-k // group)
    zeros = None if scheme.symmetric else empty(n, groups, dtype=torch.uint8)
    words = empty(n, 16 * -(-k // BLOCK), dtype=torch.int32)
    return Linear4(words, empty(n, groups, dtype=torch.float16), zeros, linear.bias_N, k, group)


def stored_tensors(scheme: Scheme, num_outputs: int, num_inputs: int) -> dict[str, StoredTensor]:
    """Returns the tensors of a module by the last part of their names."""
    sizes, group = {"N": num_outputs, "K": num_inputs}, scheme.group or num_inputs

    def tensor(*axes: Axis, dtypes: tuple[torch.dtype, ...] = (torch.int32,)) -> StoredTensor:
        return StoredTensor((tuple(-(-sizes[axis] // per) for axis, per in axes),), dtypes, axes=axes)

    match scheme.layout:
        case "cast":
            return {"weight": tensor(("N", 1), ("K", 1), dtypes=FLOATS)}
        case "awq":
            return {
                "qweight": tensor(("K", 1), ("N", 8)),
                "qzeros": tensor(("K", group), ("N", 8)),
                "scales": tensor(("K", group), ("N", 1), dtypes=FLOATS),
            }
        case "gptq" | "gptq_v2":
            return {
                "qweight": tensor(("K", 8), ("N", 1)),
                "qzeros": tensor(("K", group), ("N", 8)),
                "scales": tensor(("K", group), ("N", 1), dtypes=FLOATS),
                "g_idx": tensor(("K", 1))._replace(is_optional=not scheme.is_reordered),
            }
    if scheme.block_rows is None:
        scale = StoredTensor(((1,), (), (1, 1)), FLOATS)
    else:
        scale = tensor(("N", scheme.block_rows), ("K", group), dtypes=FLOATS)
        if scheme.block_rows == 1 and num_groups(scheme, num_inputs) == 1:
            scale = scale._replace(shapes=(*scale.shapes, (num_outputs,)))
    stored = {scheme.scale_name: scale}
    if scheme.layout == "compressed":
        stored["weight"] = tensor(("N", 1), ("K", 1), dtypes=(torch.float8_e4m3fn if scheme.is_float else torch.int8,))
    else:
        stored["weight_packed"] = tensor(("N", 1), ("K", 32 // scheme.bits))
        stored["weight_shape"] = StoredTensor(((2,),), (torch.int64, torch.int32))
    if not scheme.symmetric:
        stored["weight_zero_point"] = tensor(("N", 8), ("K", group))
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
    checkpoint: Checkpoint,
    module: str,
    scheme: Scheme,
    num_outputs: int,
    num_inputs: int,
    device: torch.device,
    rows: slice = slice(None),
    columns: slice = slice(None),
) -> Part:
    """Reads rows and columns of a module, and nothing else of its tensors, in the layout of `Linear8` or `Linear4`.

    num_outputs, num_inputs: of the whole module. columns: they begin and end at multiples of `column_unit`.
    """
    stored = stored_tensors(scheme, num_outputs, num_inputs)
    part = {"N": range(num_outputs)[rows], "K": range(num_inputs)[columns]}
    n, k = len(part["N"]), len(part["K"])

    def read(last: str) -> Tensor:
        """Reads the elements that hold something of the part."""
        name, axes = f"{module}.{last}", stored[last].axes
        if not axes:
            return _whole(checkpoint, name, device)
        held = [slice(part[axis].start // per, -(-part[axis].stop // per)) for axis, per in axes]
        entry = checkpoint.entries[name]
        held = held[: len(entry.shape)]  # scales of whole rows may be a vector
        out = torch.empty([one.stop - one.start for one in held], dtype=entry.dtype, device=device)
        checkpoint.read_into(name, out, *(held if len(held) == 2 else (slice(None), *held)))
        return out

    def take_rows(held_NX: Tensor, per: int) -> Tensor:
        """Takes the part's rows of those that were read, which begin at a multiple of `per`."""
        return held_NX[part["N"].start % per :][:n]

    def part_of_4_bits(q_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor | None) -> Part:
        if scheme.group is None:  # one scale a row: the same for each group of 128
            repeats = -(-k // BLOCK)
            scale_NG, zero_NG = scale_NG.repeat(1, repeats), None if zero_NG is None else zero_NG.repeat(1, repeats)
        else:
            start = part["K"].start % scheme.group
            groups = scheme.group, start, start + k
            scale_NG = take_groups(scale_NG, *groups)
            zero_NG = None if zero_NG is None else take_groups(zero_NG, *groups)
        return Part(pack_int4(q_NK.contiguous()), scale_NG.contiguous(), zero_NG)

    if scheme.layout == "awq":
        order = torch.tensor(_AWQ_COLUMNS, device=device).argsort()
        q_NK = take_rows(_nibbles(read("qweight"))[:, :, order].flatten(1).t(), 8)
        zero_NG = take_rows(_nibbles(read("qzeros"))[:, :, order].flatten(1).t(), 8)
        return part_of_4_bits(q_NK, read("scales").t(), zero_NG)
    if scheme.layout in ("gptq", "gptq_v2"):
        q_NK = _nibbles(read("qweight")).transpose(1, 2).flatten(0, 1).t()
        if scheme.symmetric:
            return part_of_4_bits(q_NK, read("scales").t(), None)
        # Version 1 stores one less, subtracted from the whole word: a zero of 0 borrows from the next one.
        words = read("qzeros") + (0x11111111 if scheme.layout == "gptq" else 0)
        return part_of_4_bits(q_NK, read("scales").t(), take_rows(_nibbles(words).flatten(1).t(), 8))
    scale = read(scheme.scale_name)
    if scheme.bits == 4:
        zeros = None
        if not scheme.symmetric:
            zeros = take_rows(_nibbles(read("weight_zero_point")).transpose(1, 2).flatten(0, 1), 8)
        return part_of_4_bits(_nibbles(read("weight_packed")).flatten(1), scale.view(n, -1), zeros)
    scale = scale.float()
    if scheme.block_rows is None:
        scale_NG = scale.view(1, 1).expand(n, 1)
    elif scheme.block_rows > 1:
        scale_NG = take_rows(scale.repeat_interleave(scheme.block_rows, 0), scheme.block_rows)
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
        return replace(linear, weight_NK=made["numbers"], scale_NG=made["scale"], bias_N=None, input_scale_1=static)
    assert isinstance(linear, Linear4)
    return replace(linear, words_NW=made["numbers"], scale_NG=made["scale"], zero_NG=made.get("zero"), bias_N=None)


def cast_linear(linear: Linear, scheme: Scheme, agree: Callable[[Tensor], Tensor] | None = None) -> AnyLinear:
    """Quantises a dense linear, as a scheme with the layout "cast" says. agree: see `quantise_to_8_bits`."""
    numbers = torch.float8_e4m3fn if scheme.is_float else torch.int8
    return quantise_to_8_bits(linear, numbers, scheme.inputs, agree)


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
        yield torch.frombuffer(chunk, dtype=entry.dtype)

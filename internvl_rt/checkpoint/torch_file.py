"""One file of `torch.save` that holds a dict of tensors: its header is read without unpickling anything.

Format (torch/serialization.py): a zip archive of stored entries under one folder. `data.pkl` is a pickle, which is a
program: it says with which calls the dict is made. `data/<key>` are the bytes of one storage, in which tensors lie.

A pickle may name any function of any module, and unpickling it calls that function. So the program is only followed
here, by a machine that knows the few operations and names that a dict of tensors needs: it imports nothing, calls
nothing, and refuses all else by name. What it finds is where each tensor lies in the file, and tensors are read from
there like those of a safetensors file.
"""

import io
import math
import pickletools
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from internvl_rt.checkpoint.files import MAX_FILE_BYTES, open_file
from internvl_rt.checkpoint.stored_zip import Extent, damaged, read_entries
from internvl_rt.checkpoint.tensor_file import TensorEntry
from internvl_rt.errors import CheckpointError, quoted

_STORAGES: dict[str, torch.dtype | None] = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.storage.UntypedStorage": None,  # of dtypes newer than the classes above, which the tensor names
}
_NEWER_DTYPES = {"torch.float8_e4m3fn": torch.float8_e4m3fn, "torch.float8_e5m2": torch.float8_e5m2}
_DICT, _PARAMETER = "collections.OrderedDict", "torch._utils._rebuild_parameter"
_TENSOR, _NEWER_TENSOR = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"
_NAMES = frozenset({_DICT, _PARAMETER, _TENSOR, _NEWER_TENSOR, *_STORAGES, *_NEWER_DTYPES})

_OLD_START = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # a pickle of the number with which older files begin
_MAX_OPERATIONS = 1 << 20  # a tensor takes 32 of them; a file of the largest models has 3,000 tensors
_MAX_DIMENSIONS, _MAX_NAME = 8, 1000
_MARK = object()  # where a group of values begins on the stack


@dataclass(frozen=True, slots=True, repr=False)
class _Name:
    """One of `_NAMES`, as a value of the program."""

    name: str

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True, repr=False)
class _Storage:
    dtype: torch.dtype | None
    key: str
    num_elements: int

    def __repr__(self) -> str:
        return "a storage"


@dataclass(frozen=True, slots=True, repr=False)
class _Tensor:
    """A tensor as the program describes it; nothing of it but the types of the first three has been checked."""

    storage: _Storage
    offset: int
    dtype: torch.dtype
    shape: tuple[object, ...]
    strides: tuple[object, ...]

    def __repr__(self) -> str:
        return "a tensor"  # never its shape, which may be nested without end


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Returns the tensors by name, in file order; several may share their bytes.

    Raises CheckpointError for a malformed or truncated file, and for one that holds anything but tensors.
    """
    with open_file(file, CheckpointError) as stream:
        if stream.read(len(_OLD_START)) == _OLD_START:
            raise CheckpointError(f"{file} is of torch's format before 1.6, which is not read; {_rewrite(file)}")
        extents = read_entries(file, stream)
        folder = next(iter(extents), "").partition("/")[0]
        program = _read_entry(file, stream, extents, f"{folder}/data.pkl")
        order = f"{folder}/byteorder"  # older files have none
        if order in extents and (found := _read_entry(file, stream, extents, order)) != b"little":
            raise CheckpointError(f"{file}: byteorder is {quoted(found)}, expected b'little'; {_rewrite(file)}")
    state = _Machine(file).run(program)
    if type(state) is not dict:
        raise _foreign(file, quoted(state))
    entries = {name: _locate(file, name, value, extents, folder) for name, value in state.items()}
    return dict(sorted(entries.items(), key=lambda item: item[1].offset_bytes))


def _read_entry(file: Path, stream: io.BufferedReader, extents: Mapping[str, Extent], name: str) -> bytes:
    extent = extents.get(name)
    if extent is None or extent.num_bytes > MAX_FILE_BYTES:
        found = "is missing" if extent is None else f"has {extent.num_bytes:,} bytes"
        raise damaged(file, f"{quoted(name)} {found}, expected it with at most {MAX_FILE_BYTES:,} bytes")
    stream.seek(extent.offset_bytes)
    return stream.read(extent.num_bytes)


def _locate(file: Path, name: str, value: object, extents: Mapping[str, Extent], folder: str) -> TensorEntry:
    """Returns where a tensor lies. Raises CheckpointError if it is none, or not one block inside its storage."""
    if not name.isprintable() or len(name) > _MAX_NAME:
        raise damaged(file, f"a tensor is named {quoted(name)}, expected at most {_MAX_NAME:,} printable characters")
    if not isinstance(value, _Tensor):
        raise CheckpointError(
            f"{file}: {quoted(name)} is {quoted(value)}, expected nothing but tensors; use another checkpoint"
        )
    shape = tuple(size for size in value.shape if type(size) is int and size >= 0)
    strides = tuple(stride for stride in value.strides if type(stride) is int)
    rank = len(value.shape)
    if rank > _MAX_DIMENSIONS or not rank == len(shape) == len(strides) == len(value.strides):
        raise damaged(
            file,
            f"{quoted(name)} has the shape {quoted(value.shape)} and strides {quoted(value.strides)}, expected two "
            f"tuples of at most {_MAX_DIMENSIONS} sizes",
        )
    storage, num_elements, itemsize = value.storage, math.prod(shape), value.dtype.itemsize
    key = f"{folder}/data/{storage.key}"
    extent = extents.get(key)
    num_bytes = storage.num_elements * (1 if storage.dtype is None else itemsize)
    if extent is None or extent.num_bytes != num_bytes:
        found = "are missing" if extent is None else f"are {extent.num_bytes:,}"
        raise damaged(file, f"the bytes of {quoted(name)}, {quoted(key)}, {found}, expected {num_bytes:,}")
    end = (value.offset + num_elements) * itemsize
    if value.offset < 0 or end > num_bytes:
        raise damaged(
            file,
            f"{quoted(name)} lies at {value.offset:,} in {quoted(key)} with {num_elements:,} elements, which has "
            f"{num_bytes // itemsize:,}",
        )
    plain = [math.prod(shape[at + 1 :]) for at in range(rank)]
    if num_elements and any(
        size > 1 and stride != step for size, stride, step in zip(shape, strides, plain, strict=True)
    ):
        raise CheckpointError(
            f"{file}: {quoted(name)} of shape {shape} has the strides {quoted(strides)}, expected {tuple(plain)}; "
            f"{_rewrite(file)}"
        )
    return TensorEntry(file, value.dtype, shape, extent.offset_bytes + value.offset * itemsize)


def _rewrite(file: Path) -> str:
    """Says with which command a file is written anew, by a torch that unpickles nothing but tensors."""
    saved = 'torch.save({n: t.contiguous() for n, t in torch.load(f, "cpu", weights_only=True).items()}, f)'
    return f"rewrite it with: python -c 'import sys, torch; f = sys.argv[1]; {saved}' {shlex.quote(str(file))}"


def _foreign(file: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{file} holds {what}, which a file of weights does not need; it was not run, use another checkpoint"
    )


class _Machine:
    """Follows the program of a pickle: a stack of values, and a memo of those that are used again."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.stack: list[object] = []
        self.memo: dict[object, object] = {}

    def run(self, program: bytes) -> object:
        """Returns what the program makes. Raises CheckpointError at the first operation that is not known."""
        try:
            for number, (operation, argument, place) in enumerate(pickletools.genops(program)):
                if number == _MAX_OPERATIONS:
                    raise damaged(self.file, f"data.pkl has more than {_MAX_OPERATIONS:,} operations")
                self._step(operation.name, argument)
                if operation.name == "STOP" and (len(self.stack), place) != (1, len(program) - 1):
                    raise ValueError("it makes more than one value")
            return self.stack[0]
        except CheckpointError:
            raise
        # an unknown byte, a cut number or text, an empty stack, no memo; Warning: where Python turns them into errors
        except (ValueError, LookupError, Warning) as error:
            raise damaged(self.file, f"data.pkl cannot be followed: {quoted(str(error))}") from error

    def _step(self, name: str, argument: object) -> None:
        stack, memo = self.stack, self.memo
        match name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "LONG1" if type(argument) is int and argument.bit_length() > 62:
                raise _foreign(self.file, f"a number of {argument.bit_length():,} bits")
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1":
                stack.append(argument)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "MARK":
                stack.append(_MARK)
            case "TUPLE":
                stack.append(tuple(self._pop_group()))
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._pop(int(name[-1]))))
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM":
                self._set_items(self._pop(2))
            case "SETITEMS":
                self._set_items(self._pop_group())
            case "GLOBAL" | "STACK_GLOBAL":
                module, attribute = str(argument).split(" ", 1) if name == "GLOBAL" else self._pop(2)
                stack.append(self._name(module, attribute))
            case "BINPERSID":
                stack.append(self._storage(*self._pop(1)))
            case "REDUCE":
                stack.append(self._call(*self._pop(2)))
            case "BUILD":
                self._set_attributes(*self._pop(1))
            case _:
                raise _foreign(self.file, f"the pickle operation {name}")

    def _pop(self, count: int) -> list[object]:
        if len(self.stack) < count:
            raise LookupError("the stack is empty")
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def _pop_group(self) -> list[object]:
        values: list[object] = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def _set_items(self, items: list[object]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise _foreign(self.file, f"items of {quoted(target)}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str:
                raise _foreign(self.file, f"the key {quoted(key)}")
            if key in target:
                raise damaged(self.file, f"{quoted(key)} is there twice")
            target[key] = value

    def _set_attributes(self, state: object) -> None:
        """Ignores the attribute that `Module.state_dict` gives its result: versions of the classes of modules."""
        if type(self.stack[-1]) is not dict or type(state) is not dict or not state.keys() <= {"_metadata"}:
            raise _foreign(self.file, f"the attributes {quoted(state)}")

    def _name(self, module: object, attribute: object) -> _Name:
        name = f"{module}.{attribute}" if type(module) is type(attribute) is str else ""
        if name not in _NAMES:
            raise _foreign(self.file, quoted(name or (module, attribute)))
        return _Name(name)

    def _storage(self, described: object) -> _Storage:
        match described:
            case ("storage", _Name(name), str(key), str(), int(num_elements)) if (
                name in _STORAGES and num_elements >= 0
            ):
                return _Storage(_STORAGES[name], key, num_elements)
        raise _foreign(self.file, f"the storage {quoted(described)}")

    def _call(self, called: object, arguments: object) -> object:
        """Returns what one of the four known calls stands for."""
        match called, arguments:
            case _Name("collections.OrderedDict"), ():
                return {}
            case _Name("torch._utils._rebuild_parameter"), (_Tensor() as tensor, bool(), dict()):
                return tensor
            case (
                _Name("torch._utils._rebuild_tensor_v2"),
                (_Storage() as storage, int(offset), tuple(shape), tuple(strides), bool(), dict(), *flags),
            ) if storage.dtype is not None and flags in ([], [None], [{}]):
                return _Tensor(storage, offset, storage.dtype, shape, strides)
            case (
                _Name("torch._utils._rebuild_tensor_v3"),
                (_Storage() as storage, int(offset), tuple(shape), tuple(strides), bool(), dict(), _Name(name), *flags),
            ) if storage.dtype is None and name in _NEWER_DTYPES and flags in ([], [None], [{}]):
                return _Tensor(storage, offset, _NEWER_DTYPES[name], shape, strides)
        raise _foreign(self.file, f"a call of {quoted(called)} with {quoted(arguments)}")

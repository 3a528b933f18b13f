"""A file of `torch.save` is read bit for bit without unpickling it, or refused."""

import io
import os
import re
import shlex
import subprocess
import sys
import zipfile
from collections import OrderedDict
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internvl_rt.checkpoint import tensor_file, torch_file
from internvl_rt.checkpoint.folder import open_checkpoint
from internvl_rt.errors import CheckpointError
from support.torch_files import state, storage, tensor, write_program, write_zip

DTYPES = list(tensor_file._DTYPES.values())


def save(folder, value, **options):
    torch.save(value, folder / "pytorch_model.bin", **options)


def read(checkpoint, name):
    """Reads a whole tensor as it is stored."""
    entry = checkpoint.entries[name]
    out = torch.empty(entry.shape, dtype=entry.dtype)
    checkpoint.read_into(name, out)
    return out


def assert_same(folder, tensors):
    checkpoint = open_checkpoint(folder)
    assert checkpoint.entries.keys() == tensors.keys()
    for key, stored in tensors.items():
        found = read(checkpoint, key)
        assert (found.dtype, found.shape) == (stored.dtype, stored.shape), key
        assert torch.equal(found.view(-1).view(torch.uint8), stored.reshape(-1).view(torch.uint8)), key


@pytest.mark.parametrize("options", [{}, {"pickle_protocol": 4}, {"_disable_byteorder_record": True}], ids=str)
@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_tensors_of_every_dtype_are_read_bit_for_bit(tmp_path, options, kind):
    generator = torch.Generator().manual_seed(1)
    tensors = {
        str(dtype): torch.randint(0, 2, (3, 2 * dtype.itemsize), dtype=torch.uint8, generator=generator).view(dtype)
        for dtype in DTYPES
    }
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "parameter": torch.nn.Parameter(torch.ones(2))}
    save(tmp_path, kind(tensors), **options)
    assert_same(tmp_path, {key: stored.detach() for key, stored in tensors.items()})


def test_the_dtypes_are_those_of_safetensors_files():
    known = {*torch_file._STORAGES.values(), *torch_file._NEWER_DTYPES.values()} - {None}
    assert known == set(DTYPES)


def test_the_state_of_a_module_is_read_with_tied_weights_and_views(tmp_path):
    module = torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5)).half()
    module[1].weight = module[0].weight
    tensors = module.state_dict()
    assert tensors._metadata
    long = torch.arange(24.0).view(6, 4)
    tensors |= {"rows": long[2:4], "row": long[5:, :], "one": torch.ones(3, 1).as_strided((3, 1, 1), (1, 7, 9))}
    tensors["none"] = torch.zeros(4, 0, 3).transpose(0, 2)
    save(tmp_path, tensors)
    assert_same(tmp_path, tensors)
    entries = open_checkpoint(tmp_path).entries
    assert entries["0.weight"].offset_bytes == entries["1.weight"].offset_bytes
    assert entries["row"].offset_bytes == entries["rows"].offset_bytes + 3 * 16
    offsets = [entry.offset_bytes for entry in entries.values()]
    assert offsets == sorted(offsets)


def test_a_part_of_a_tensor_is_read_by_rows_and_columns(tmp_path):
    stored = torch.randn(3, 4, 5)
    save(tmp_path, {"before": torch.ones(7), "x": stored})
    out = torch.empty(5, 3, dtype=torch.bfloat16)
    open_checkpoint(tmp_path).read_into("x", out, slice(3, 8), slice(2, 5))
    assert torch.equal(out, stored.view(12, 5)[3:8, 2:5].bfloat16())


def test_a_file_that_another_program_packed_is_read(tmp_path):
    save(tmp_path, {"x": torch.arange(5)})
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin") as packed:
        contents = {name: packed.read(name) for name in packed.namelist()}
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as packed:
        for name, content in contents.items():
            packed.writestr(name, content)
    assert_same(tmp_path, {"x": torch.arange(5)})


def test_files_made_by_hand_are_read(tmp_path):
    write_program(tmp_path, state(("x", tensor())), **{"m/version": b"3"})
    entry = open_checkpoint(tmp_path).entries["x"]
    assert (entry.dtype, entry.shape) == (torch.float32, (2, 3))
    assert torch.equal(torch.load(tmp_path / "pytorch_model.bin")["x"], torch.zeros(2, 3))  # torch takes them too


def test_a_file_beyond_4_gib_is_read(tmp_path):
    """The file is sparse: torch makes the same records, which was compared with a real one."""
    large = (1 << 32) + (1 << 20)
    program = state(
        ("large", tensor(storage("0", "ByteStorage", large), 0, (1 << 12, large >> 12), (large >> 12, 1))),
        ("end", tensor(storage("0", "ByteStorage", large), large - 3, (3,), (1,))),
        ("after", tensor(storage("1", "HalfStorage", 2), 0, (2,), (1,))),
    )
    entries = [("m/data.pkl", b"\x80\x02" + program + b"."), ("m/data/0", large), ("m/data/1", b"\0\x3c\0\x40")]
    write_zip(tmp_path / "pytorch_model.bin", entries)
    with (tmp_path / "pytorch_model.bin").open("r+b") as stream:
        stream.seek(open_checkpoint(tmp_path).entries["end"].offset_bytes)
        stream.write(b"\1\2\3")
    checkpoint = open_checkpoint(tmp_path)
    assert read(checkpoint, "end").tolist() == [1, 2, 3]
    assert read(checkpoint, "after").tolist() == [1, 2]
    assert checkpoint.entries["after"].offset_bytes > 1 << 32
    row = torch.empty(1, large >> 12, dtype=torch.uint8)
    checkpoint.read_into("large", row[0], slice(4095, 4096))
    assert row[0, -3:].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("value", "options", "problem"),
    [
        ({"x": torch.arange(6.0), "y": torch.ones(3, 2).t()}, {}, "'y' of shape (2, 3) has the strides (1, 2)"),
        (
            {"x": torch.arange(6.0), "y": torch.ones(2, 3)},
            {"_use_new_zipfile_serialization": False},
            "is of torch's format before 1.6",
        ),
    ],
    ids=["not contiguous", "old format"],
)
def test_the_command_in_a_refusal_makes_a_file_that_is_read(tmp_path, value, options, problem):
    folder = tmp_path / "it's; a folder"
    folder.mkdir()
    save(folder, value, **options)
    with pytest.raises(CheckpointError, match=re.escape(problem)) as caught:
        open_checkpoint(folder)
    _, *arguments = shlex.split(str(caught.value).partition("rewrite it with: ")[2])
    subprocess.run([sys.executable, *arguments], check=True)
    assert_same(folder, {name: tensor.contiguous() for name, tensor in value.items()})


def test_a_file_that_shrinks_after_it_was_opened_is_refused(tmp_path):
    save(tmp_path, {"x": torch.ones(100)})
    checkpoint = open_checkpoint(tmp_path)
    os.truncate(tmp_path / "pytorch_model.bin", checkpoint.entries["x"].offset_bytes + 399)
    with pytest.raises(CheckpointError, match="became shorter"):
        read(checkpoint, "x")


def saved():
    file = io.BytesIO()
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).state_dict(), file)
    return file.getvalue()


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), min_size=1, max_size=6))
def test_any_bytes_are_either_read_or_refused_with_a_checkpoint_error(tmp_path_factory, changes):
    folder = tmp_path_factory.mktemp("fuzz")
    data = bytearray(saved())
    for place, value in changes:
        data[place % len(data)] = value
    (folder / "pytorch_model.bin").write_bytes(data)
    with suppress(CheckpointError):
        checkpoint = open_checkpoint(folder)
        for tensor_name in checkpoint.entries:
            read(checkpoint, tensor_name)

"""A safetensors file is read bit for bit, and refused if it is damaged in any way."""

import json
import os
import re
import tracemalloc
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from internvl_rt.checkpoint import tensor_file
from internvl_rt.checkpoint.folder import open_checkpoint
from internvl_rt.errors import CheckpointError

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b.weight": torch.arange(10).to(torch.bfloat16).view(2, 5),
    "c": torch.tensor([7], dtype=torch.int64),
    "scalar": torch.tensor(2.5, dtype=torch.float16),
    "empty": torch.zeros(0, 3),
}


def write_raw(file, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def read(checkpoint, name):
    """Reads a whole tensor as it is stored."""
    entry = checkpoint.entries[name]
    out = torch.empty(entry.shape, dtype=entry.dtype)
    checkpoint.read_into(name, out)
    return out


def refusal(folder):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert "\n" not in message
    return message


def test_files_of_the_safetensors_library_are_read_bit_for_bit(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.entries.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert checkpoint.entries[name].dtype == tensor.dtype
        assert torch.equal(read(checkpoint, name), tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_bytes", [1, 60, 1 << 24])
@pytest.mark.parametrize("rows", [slice(None), slice(3, 8), slice(11, 12), slice(4, 4)])
@pytest.mark.parametrize("columns", [slice(None), slice(2, 5), slice(4, 5)])
def test_a_part_of_a_tensor_is_read_by_rows_and_columns(tmp_path, monkeypatch, dtype, chunk_bytes, rows, columns):
    monkeypatch.setattr("internvl_rt.checkpoint.tensor_file._CHUNK_BYTES", chunk_bytes)
    stored = torch.randn(3, 4, 5)  # three experts of four rows are read as a matrix of twelve rows
    save_file({"before": torch.ones(7), "x": stored}, tmp_path / "model.safetensors")
    expected = stored.view(12, 5)[rows, columns].to(dtype)
    out = torch.full((2, *expected.shape), 5.0, dtype=dtype)
    open_checkpoint(tmp_path).read_into("x", out[0], rows, columns)
    assert torch.equal(out[0], expected)
    assert torch.equal(out[1], torch.full_like(expected, 5.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_other_bytes_are_read_than_those_of_a_part(tmp_path, monkeypatch, dtype):
    save_file({"x": torch.ones(12, 5)}, tmp_path / "model.safetensors")
    checkpoint, read_at, spans = open_checkpoint(tmp_path), tensor_file._read_at, []
    first = checkpoint.entries["x"].offset_bytes

    def note(entry, file, offset, memory):
        spans.append((offset - first, len(memory)))
        read_at(entry, file, offset, memory)

    monkeypatch.setattr(tensor_file, "_read_at", note)
    checkpoint.read_into("x", torch.empty(2, 3, dtype=dtype), slice(4, 6), slice(1, 4))
    checkpoint.read_into("x", torch.empty(2, 5, dtype=dtype), slice(4, 6))
    assert spans == [(4 * 20 + 4, 12), (5 * 20 + 4, 12), (4 * 20, 40)]


def test_a_file_that_shrinks_after_it_was_opened_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"x": torch.ones(100)}, file)
    checkpoint = open_checkpoint(tmp_path)
    os.truncate(file, file.stat().st_size - 4)
    with pytest.raises(CheckpointError, match="became shorter"):
        read(checkpoint, "x")
    save_file({"x": torch.ones(10, 10)}, file)
    checkpoint = open_checkpoint(tmp_path)
    os.truncate(file, file.stat().st_size - 4)
    checkpoint.read_into("x", torch.empty(10, 9), columns=slice(0, 9))
    with pytest.raises(CheckpointError, match="became shorter"):
        checkpoint.read_into("x", torch.empty(10, 2), columns=slice(8, 10))


@pytest.mark.parametrize("keep", [0, 7, 8, 30, -1, -60])
def test_a_truncated_file_is_refused(tmp_path, keep):
    file = tmp_path / "model.safetensors"
    save_file(TENSORS, file)
    os.truncate(file, keep if keep >= 0 else file.stat().st_size + keep)
    assert "is damaged" in refusal(tmp_path)


def test_a_file_with_bytes_after_its_tensors_is_refused(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    with (tmp_path / "model.safetensors").open("ab") as stream:
        stream.write(b"\0")
    assert "file not fully covered" in refusal(tmp_path)


@pytest.mark.parametrize("length", [2**64 - 1, 2**40, 200_000_001, (1 << 24) + 1])
def test_a_header_length_beyond_the_file_or_the_limit_is_refused_before_memory_is_taken(tmp_path, length):
    file = tmp_path / "model.safetensors"
    write_raw(file, b"{}", length=length)
    os.truncate(file, 300_000_000)  # a sparse file so large that only the limit refuses 200,000,001 bytes
    tracemalloc.start()
    message = refusal(tmp_path)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "header too large" in message
    assert peak_bytes < 1_000_000


def entry(begin, end, dtype="F32", shape=(2,)):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


TWICE = b'{"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "\\u0078": %s}'


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        (b"", "is damaged: .*invalid JSON"),
        (b"{", "is damaged: .*invalid JSON"),
        (b"\xff{}", "is damaged: .*invalid UTF-8"),
        (b"[" * 100_000, "is damaged: .*invalid JSON"),
        (b"[]", "is damaged: .*invalid JSON"),
        (b'{"x": 1, "x": 2}', "is damaged: .*invalid type: integer `1`"),
        (TWICE % json.dumps(entry(0, 16, shape=(4,))).encode(), "is not JSON: 'x' is there twice"),
        (TWICE % json.dumps(entry(0, 16, "F16", (8,))).encode(), "is not JSON: 'x' is there twice"),
        ({"x": 5}, "is damaged: .*invalid type: integer `5`"),
        ({"x": {"dtype": "F32", "shape": [2]}}, "is damaged: .*missing field `data_offsets`"),
        ({"x": entry(0, 16, dtype="F5")}, "is damaged: .*unknown variant `F5`"),
        ({"x": entry(0, 16, dtype="F4")}, "is damaged: .*invalid shape"),
        ({"x": entry(0, 16, dtype="F4", shape=(32,))}, "'x' is described by"),
        ({"x": entry(0, 16, dtype="C64")}, "'x' is described by"),
        ({"x": entry(0, 16, dtype=["F32"])}, "is damaged: .*invalid type: sequence"),
        ({"x": entry(0, 16, shape=(3,))}, "is damaged: .*invalid shape"),
        ({"x": entry(0, 16, shape=(-2, -2))}, "is damaged: .*invalid value: integer `-2`"),
        ({"x": entry(0, 16, shape=(True, 4))}, "is damaged: .*invalid type: boolean"),
        ({"x": entry(0, 16, shape=(4.0,))}, "is damaged: .*invalid type: floating point"),
        ({"x": entry(0, 16, shape="4")}, "is damaged: .*invalid type: string"),
        ({"x": entry(0, 16, shape=(2**62, 2**62, 0))}, "is damaged: .*overflow"),
        ({"x": entry(0, 16, shape=(1,) * 8 + (4,))}, "'x' is described by .* at most 8 dimensions"),
        ({"x": entry(16, 8)}, "is damaged: .*invalid offset for tensor `x`"),
        ({"x": entry(-8, 0)}, "is damaged: .*invalid value: integer `-8`"),
        ({"x\ny": entry(0, 16, shape=(4,))}, r"'x\\ny' is described by .* a printable name"),
        ({"x\ny": entry(8, 16)}, r"is damaged: .*invalid offset for tensor `x\\ny`"),
        ({"x" * 5000: entry(8, 16)}, "is damaged: .*invalid offset for tensor `xxx"),
        ({"x" * 5000: entry(0, 16, dtype="C64")}, "'xxx.* is described by"),
        ({"x": entry(0, 8), "y": entry(4, 12)}, "is damaged: .*invalid offset for tensor `y`"),
        ({"x": entry(0, 8), "y": entry(0, 8)}, "is damaged: .*invalid offset for tensor `[xy]`"),
        ({"x": entry(8, 16)}, "is damaged: .*invalid offset for tensor `x`"),
        ({"x": entry(0, 8), "y": entry(8, 16), "z": entry(16, 24)}, "is damaged: .*file not fully covered"),
        ({"x": entry(0, 8)}, "is damaged: .*file not fully covered"),
        ({"\x1b[2J" * 300_000: entry(0, 16, shape=(4,))}, r"'\\x1b\[2J.* is described by .* a printable name"),
        (b'{"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, %s]}}' % (b"9" * 5000), "is damaged"),
    ],
)
def test_a_malformed_header_is_refused(tmp_path, header, problem):
    write_raw(tmp_path / "model.safetensors", header, data=b"\0" * 16)
    message = refusal(tmp_path)
    assert re.search(problem, message)
    assert len(message) < 600 + len(str(tmp_path))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=6))
def test_any_bytes_are_either_read_or_refused_with_a_checkpoint_error(tmp_path_factory, changes):
    folder = tmp_path_factory.mktemp("fuzz")
    save_file(TENSORS, folder / "model.safetensors")
    data = bytearray((folder / "model.safetensors").read_bytes())
    for place, value in changes:
        data[place % len(data)] = value
    (folder / "model.safetensors").write_bytes(data)
    with suppress(CheckpointError):
        checkpoint = open_checkpoint(folder)
        for name in checkpoint.entries:
            read(checkpoint, name)

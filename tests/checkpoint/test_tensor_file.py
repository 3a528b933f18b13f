"""Single safetensors files: read bit for bit, and refused where they are damaged, whatever the damage."""

import json
import os
import tracemalloc
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

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
        assert checkpoint.tensor(name).dtype == tensor.dtype
        assert torch.equal(checkpoint.tensor(name), tensor)


def test_a_file_that_shrinks_after_it_was_opened_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"x": torch.ones(100)}, file)
    checkpoint = open_checkpoint(tmp_path)
    os.truncate(file, file.stat().st_size - 4)
    with pytest.raises(CheckpointError, match="became shorter"):
        checkpoint.tensor("x")


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
    assert "too long" in refusal(tmp_path)


@pytest.mark.parametrize("length", [2**64 - 1, 2**40, 200_000_001])
def test_a_header_length_beyond_the_file_or_the_limit_is_refused_before_memory_is_taken(tmp_path, length):
    file = tmp_path / "model.safetensors"
    write_raw(file, b"{}", length=length)
    os.truncate(file, 300_000_000)  # sparse: the limit has to refuse the last length
    tracemalloc.start()
    message = refusal(tmp_path)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert f"header should take {length:,} bytes" in message
    assert peak_bytes < 1_000_000


def entry(begin, end, dtype="F32", shape=(2,)):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        (b"", "JSON is malformed"),
        (b"{", "JSON is malformed"),
        (b"\xff{}", "JSON is malformed"),
        (b"[" * 100_000, "JSON is malformed"),
        (b"[]", "not an object"),
        (b'{"x": 1, "x": 2}', "'x' is there twice"),
        ({"x": 5}, "'x' is described by 5"),
        ({"x": {"dtype": "F32", "shape": [2]}}, "'x' is described by"),
        ({"x": entry(0, 16, dtype="F4")}, "'x' is described by"),
        ({"x": entry(0, 16, dtype=["F32"])}, "'x' is described by"),
        ({"x": entry(0, 16, shape=(3,))}, "'x' is described by"),
        ({"x": entry(0, 16, shape=(-2, -2))}, "'x' is described by"),
        ({"x": entry(0, 16, shape=(True, 4))}, "'x' is described by"),
        ({"x": entry(0, 16, shape=(4.0,))}, "'x' is described by"),
        ({"x": entry(0, 16, shape="4")}, "'x' is described by"),
        ({"x": entry(0, 16, shape=(1,) * 9)}, "'x' is described by"),
        ({"x": entry(16, 8)}, "'x' is described by"),
        ({"x": entry(-8, 0)}, "'x' is described by"),
        ({"x\ny": entry(0, 16, shape=(4,))}, r"'x\ny' is described by"),
        ({"x": entry(0, 8), "y": entry(4, 12)}, "'y' starts at byte"),
        ({"x": entry(0, 8), "y": entry(0, 8)}, "'y' starts at byte"),
        ({"x": entry(8, 16)}, "'x' starts at byte"),
        ({"x": entry(0, 8), "y": entry(8, 16), "z": entry(16, 24)}, "truncated"),
        ({"x": entry(0, 8)}, "too long"),
    ],
)
def test_a_malformed_header_is_refused(tmp_path, header, problem):
    write_raw(tmp_path / "model.safetensors", header, data=b"\0" * 16)
    message = refusal(tmp_path)
    assert problem in message
    assert len(message) < 400 + len(str(tmp_path))


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
            checkpoint.tensor(name)

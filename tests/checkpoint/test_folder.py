"""The tensors of a checkpoint folder are read and written in one file or in shards."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from internvl_rt.checkpoint.folder import open_checkpoint, write_tensors
from internvl_rt.errors import CheckpointError

ONE = {"x": torch.ones(2), "y": torch.ones(3)}
TWO = {"z": torch.ones(4)}


def refusal(folder):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("max_shard_bytes", "num_files"), [(10**9, 1), (48, 2), (47, 3), (1, 4)])
def test_written_files_are_read_by_the_safetensors_library_and_by_this_package(tmp_path, max_shard_bytes, num_files):
    tensors = {f"layer.{n}": torch.randn(n, 3).to(torch.bfloat16) for n in (4, 5, 2, 1)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    write_tensors(tmp_path, shapes, tensors.__getitem__, dtype=torch.bfloat16, max_shard_bytes=max_shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == num_files
    assert (tmp_path / "model.safetensors.index.json").exists() == (num_files > 1)
    theirs = {name: tensor for file in files for name, tensor in load_file(file).items()}
    ours = open_checkpoint(tmp_path)
    assert theirs.keys() == ours.entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(theirs[name], tensor)
        read = torch.empty_like(tensor)
        ours.read_into(name, read)
        assert torch.equal(read, tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reading_into_a_tensor_converts_across_the_borders_of_the_buffer(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr("internvl_rt.checkpoint.tensor_file._CHUNK_BYTES", 28)
    stored = torch.randn(3, 11)
    save_file({"x": stored}, tmp_path / "model.safetensors")
    out = torch.full((2, 33), 5.0, dtype=dtype)
    open_checkpoint(tmp_path).read_into("x", out[1])
    assert torch.equal(out[1], stored.flatten().to(dtype))
    assert torch.equal(out[0], torch.full((33,), 5.0, dtype=dtype))


def test_tensors_are_compared_bit_for_bit_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("internvl_rt.checkpoint.tensor_file._CHUNK_BYTES", 8)
    ones, other = torch.ones(7), torch.ones(7)
    other[6] = 2
    tensors = {"a": ones, "b": ones.clone(), "c": other, "d": ones[None].clone(), "e": ones.double()}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert [name for name in "abcde" if checkpoint.same_bytes("a", name)] == ["a", "b"]


def test_files_behind_links_as_in_the_hub_cache_are_read(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save_file(ONE, tmp_path / "blobs" / "0123abcd")
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/0123abcd")
    assert open_checkpoint(tmp_path / "snapshot").entries.keys() == ONE.keys()


def write_shards(folder, shards, weight_map=None):
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    if weight_map is None:
        weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_missing_shards_are_all_named(tmp_path):
    write_shards(tmp_path, {f"{n}.safetensors": {f"x{n}": torch.ones(2)} for n in range(4)})
    (tmp_path / "1.safetensors").unlink()
    (tmp_path / "3.safetensors").unlink()
    assert "2 of 4 files are missing: 1.safetensors, 3.safetensors" in refusal(tmp_path)


def test_a_tensor_that_two_shards_hold_is_refused(tmp_path):
    write_shards(tmp_path, {"1.safetensors": ONE, "2.safetensors": {**TWO, "y": torch.ones(3)}})
    assert "'y' is in both 1.safetensors and 2.safetensors" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "problem"),
    [
        (
            {"x": "1", "y": "2", "z": "2"},
            "'y' should be in 2.safetensors but is in 1.safetensors; download both again, or correct that line",
        ),
        (
            {"x": "1", "z": "2"},
            "'y' should be in none of them but is in 1.safetensors; download both again, or add it to the weight_map",
        ),
        (
            {"x": "1", "y": "1", "z": "2", "w": "1"},
            "'w' should be in 1.safetensors but is in none of them; download both again, or delete that line",
        ),
        ({"x": "1", "y": "../1", "z": "2"}, "expected a weight_map"),
        ({"x": "1", "y": "/etc/1", "z": "2"}, "expected a weight_map"),
    ],
)
def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path, weight_map, problem):
    named = {name: f"{file}.safetensors" for name, file in weight_map.items()}
    write_shards(tmp_path, {"1.safetensors": ONE, "2.safetensors": TWO}, named)
    assert problem in refusal(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"x": 1}}', '{"weight_map": {"x": "1", "x": "1"}}']
)
def test_a_malformed_index_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refusal(tmp_path)


def test_a_damaged_shard_is_named(tmp_path):
    write_shards(tmp_path, {"1.safetensors": ONE, "2.safetensors": TWO})
    os.truncate(tmp_path / "2.safetensors", 20)
    assert "2.safetensors is damaged" in refusal(tmp_path)


def test_torch_files_are_read_in_one_file_or_in_shards(tmp_path):
    torch.save({**ONE, **TWO}, tmp_path / "pytorch_model.bin")
    assert open_checkpoint(tmp_path).entries.keys() == {"x", "y", "z"}
    (tmp_path / "pytorch_model.bin").unlink()
    for number, tensors in enumerate((ONE, TWO), 1):
        torch.save(tensors, tmp_path / f"pytorch_model-0000{number}-of-00002.bin")
    weight_map = {name: f"pytorch_model-0000{1 if name in ONE else 2}-of-00002.bin" for name in "xyz"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = open_checkpoint(tmp_path)
    for name, tensor in (ONE | TWO).items():
        read = torch.empty_like(tensor)
        checkpoint.read_into(name, read)
        assert torch.equal(read, tensor)
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    assert "1 of 2 files are missing: pytorch_model-00002-of-00002.bin" in refusal(tmp_path)


def test_torch_files_beside_safetensors_are_not_looked_at(tmp_path):
    save_file(ONE, tmp_path / "model.safetensors")
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
        (tmp_path / name).write_bytes(b"\x80damaged")
    assert open_checkpoint(tmp_path).entries.keys() == ONE.keys()
    (tmp_path / "model.safetensors").unlink()
    write_shards(tmp_path, {"1.safetensors": ONE, "2.safetensors": TWO})
    assert open_checkpoint(tmp_path).entries.keys() == {"x", "y", "z"}


def test_an_index_names_files_of_its_own_kind(tmp_path):
    save_file(ONE, tmp_path / "1.safetensors")
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"x": "1.safetensors"}}')
    assert "expected a weight_map of tensor names to .bin files" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model-00001-of-00002.bin", "1.safetensors", "consolidated.00.pth", "x.pt"])
def test_files_that_no_index_names_are_named(tmp_path, name):
    (tmp_path / name).touch()
    assert f"pytorch_model.bin.index.json, but {name}; download it again" in refusal(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path):
    names = "model.safetensors, model.safetensors.index.json, pytorch_model.bin, pytorch_model.bin.index.json"
    assert f"holds none of {names}; download it again" in refusal(tmp_path)

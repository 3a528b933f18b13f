"""Checkpoint folders are found on disk or on the hub, and are read and written in one file or in shards."""

import json
import os
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub
from safetensors.torch import load_file, save_file

from internvl_rt.checkpoint.config import KNOWN_MODELS, load_config
from internvl_rt.checkpoint.folder import find_config, open_checkpoint, resolve_model, write_tensors
from internvl_rt.errors import CheckpointError, ConfigError

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
        ({"x": "1", "y": "2", "z": "2"}, "'y' should be in 2.safetensors but is in 1.safetensors"),
        ({"x": "1", "z": "2"}, "'y' should be in none of them but is in 1.safetensors"),
        ({"x": "1", "y": "1", "z": "2", "w": "1"}, "'w' should be in 1.safetensors but is in none of them"),
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


def test_other_formats_are_refused_by_name(tmp_path):
    (tmp_path / "pytorch_model-00001-of-00002.bin").touch()
    assert "pytorch_model-00001-of-00002.bin cannot be read safely" in refusal(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path):
    assert "holds neither model.safetensors nor model.safetensors.index.json" in refusal(tmp_path)


@pytest.fixture
def no_network(monkeypatch):
    def fail(*_args, **_kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)


@pytest.mark.usefixtures("no_network")
def test_what_is_on_disk_never_touches_the_network(tmp_path, monkeypatch):
    folder = tmp_path / "OpenGVLab" / "InternVL3-1B"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(KNOWN_MODELS["InternVL3-2B"].read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("OpenGVLab/InternVL3-1B") == Path("OpenGVLab/InternVL3-1B")  # a folder, not a hub id
    assert resolve_model("~/OpenGVLab/InternVL3-1B") == folder
    assert resolve_model(folder) == folder
    config, name = find_config("OpenGVLab/InternVL3-1B")
    assert (config, name) == (load_config(KNOWN_MODELS["InternVL3-2B"]), "InternVL3-1B")


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    "model", ["nothing", "./a/b", "/a/b", "~/a/b", "a/b/c", "", "../a", Path("a/b"), "a b/c", "a/b\n", "\0"]
)
def test_what_can_only_be_a_path_and_is_not_there_is_refused(tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"no such folder; give .* a hub id such as OpenGVLab/"):
        resolve_model(model)


@pytest.mark.usefixtures("no_network")
def test_a_known_name_without_its_owner_leads_to_the_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="OpenGVLab/InternVL3-8B"):
        resolve_model("InternVL3-8B")


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_the_configuration_of_a_known_name_is_in_the_package(name):
    assert find_config(name) == (load_config(KNOWN_MODELS[name]), name)


def test_a_file_or_a_folder_without_config_is_no_model(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file, expected the folder"):
        resolve_model(tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        resolve_model(tmp_path)
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        find_config(tmp_path)


def test_a_revision_of_a_folder_on_disk_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="revision 'v2' was given"):
        resolve_model(tmp_path, revision="v2")


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Makes a hub cache that holds one model, and sets offline mode."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository, commit = tmp_path / "models--OpenGVLab--InternVL3-1B", "0123456789" * 4
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "config").write_text(KNOWN_MODELS["InternVL3-1B"].read_text())
    (snapshot / "config.json").symlink_to("../../blobs/config")
    return snapshot


def test_a_cached_model_is_found_offline(cached):
    assert resolve_model("OpenGVLab/InternVL3-1B").samefile(cached)
    assert resolve_model("OpenGVLab/InternVL3-1B", revision=cached.name).samefile(cached)
    assert find_config("OpenGVLab/InternVL3-1B")[1] == "OpenGVLab/InternVL3-1B"


@pytest.mark.usefixtures("cached")
def test_a_model_that_is_not_cached_is_refused_offline_in_one_line():
    with pytest.raises(CheckpointError, match=r"OpenGVLab/InternVL3-2B is not in the cache.*HF_HUB_OFFLINE") as caught:
        resolve_model("OpenGVLab/InternVL3-2B")
    assert "\n" not in str(caught.value)


def test_only_the_files_that_are_read_are_downloaded(tmp_path, monkeypatch):
    calls = []

    def download(hub_id, *, revision, allow_patterns):
        calls.append((hub_id, revision, allow_patterns))
        (tmp_path / "config.json").write_text(KNOWN_MODELS["InternVL3-1B"].read_text())
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("org/name", revision="abc") == tmp_path
    assert find_config("org/name")[1] == "org/name"
    assert calls == [
        ("org/name", "abc", ["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors"]),
        ("org/name", None, ["*config.json", "chat_template.*"]),
    ]


def hub_error(kind):
    error = kind.__new__(kind)  # its constructor needs a whole HTTP response
    error.args = ("it did not work\nRequest ID: 7",)
    return error


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (hub_error(hub.GatedRepoError), "is gated; accept its terms"),
        (hub_error(hub.RepositoryNotFoundError), "is not on the hub, or private"),
        (hub_error(hub.RevisionNotFoundError), "at revision v9 is not on the hub; leave the revision out"),
        (hub_error(hub.LocalEntryNotFoundError), "is not in the cache, or only in part"),
        (hub_error(hub.HFValidationError), "is neither a folder nor a hub id"),
        (hub_error(hub.HfHubHTTPError), "could not be downloaded: it did not work; run again"),
        (hub_error(hub.HTTPError), "could not be downloaded: it did not work; run again"),
        (OSError(28, "No space left on device"), r"could not be downloaded: .*No space left on device"),
        (RuntimeError("Data processing error: stopped"), "could not be downloaded: Data processing error: stopped"),
        (RuntimeError(), "could not be downloaded: RuntimeError"),
    ],
)
def test_each_failure_to_download_is_one_line_with_a_remedy(monkeypatch, error, problem):
    def download(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError, match=problem) as caught:
        resolve_model("org/name", revision="v9")
    assert "\n" not in str(caught.value)
    assert "org/name" in str(caught.value)

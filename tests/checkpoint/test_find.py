"""A model is found by its name on disk or on the hub, and what is wrong with a name is told in one line."""

import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors as hub

from internvl_rt.checkpoint.config import KNOWN_MODELS, load_config
from internvl_rt.checkpoint.find import find_config, resolve_model
from internvl_rt.errors import CheckpointError, ConfigError


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
        if "*.safetensors" in allow_patterns:
            (tmp_path / "model-00001-of-00002.safetensors").touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_config("org/name")[1] == "org/name"
    assert resolve_model("org/name", revision="abc") == tmp_path
    assert calls == [
        ("org/name", None, ["*config.json", "chat_template.*"]),
        ("org/name", "abc", ["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors"]),
    ]


def test_torch_files_are_downloaded_from_a_repository_without_safetensors(tmp_path, monkeypatch):
    repository = (
        "config.json", "vit/model.safetensors", "pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin",
        "inputs_stats.pth", "training_args.bin", "modeling_internvl_chat.py",
    )  # fmt: skip

    def download(hub_id, *, revision, allow_patterns):
        assert (hub_id, revision) == ("org/name", "abc")
        for name in repository:
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                (tmp_path / name).parent.mkdir(exist_ok=True)
                (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("org/name", revision="abc") == tmp_path
    found = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert found == set(repository[:4])


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


def test_a_folder_of_a_lora_adapter_says_how_to_merge_it(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds a LoRA adapter and no model; merge it .*merge_and_unload"):
        resolve_model(tmp_path)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    "model",
    ["a" * 10_000_000, "a/" * 1_000_000, "\x1b[2J\n", "\ud800", "random:" + "\n\x1b" * 1000, "~x/y"],
    ids=["10 MB", "deep", "escape codes", "surrogate", "random", "somebody's home"],
)
def test_a_hostile_name_is_refused_at_once_in_one_short_printable_line(model):
    start_s = time.perf_counter()
    for find in (resolve_model, find_config):
        with pytest.raises((CheckpointError, ConfigError)) as caught:
            find(model)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 1000
    assert time.perf_counter() - start_s < 1


@pytest.mark.parametrize("model", [None, 5, b"tiny", ["tiny"]])
def test_a_name_that_is_no_text_is_refused(model):
    with pytest.raises(CheckpointError, match="expected a path or a hub id"):
        resolve_model(model)


def test_a_name_is_resolved_without_torch():
    code = "import sys, internvl_rt.checkpoint.find as f; f.find_config('tiny'); print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"

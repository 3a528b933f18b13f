"""Only regular files of a bounded size are read whole; nothing in a folder makes a reader wait or take all memory."""

import os
import tracemalloc
from pathlib import Path

import pytest

from internvl_rt.checkpoint.config import load_config
from internvl_rt.checkpoint.files import MAX_FILE_BYTES, MAX_TOKENIZER_BYTES, open_file, read_file
from internvl_rt.checkpoint.folder import open_checkpoint
from internvl_rt.errors import CheckpointError, ConfigError, InternVLError
from internvl_rt.inputs.tokenizer import load_tokenizer
from support import tiny_files

READERS = {  # of each file, a function of the folder that reads it
    "config.json": load_config,
    "tokenizer.json": load_tokenizer,
    "vocab.json": load_tokenizer,
    "merges.txt": load_tokenizer,
    "tokenizer_config.json": load_tokenizer,
    "added_tokens.json": load_tokenizer,
    "special_tokens_map.json": load_tokenizer,
    "model.safetensors": open_checkpoint,
    "model.safetensors.index.json": open_checkpoint,
    "pytorch_model.bin": open_checkpoint,
    "pytorch_model.bin.index.json": open_checkpoint,
}
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # of which only the header is read


@pytest.fixture
def folder(tmp_path):
    tiny_files.write_files(tmp_path)
    return tmp_path


def refusal(read, *arguments):
    with pytest.raises(InternVLError) as caught:
        read(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def put(kind, file):
    file.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to({"device": "/dev/zero", "broken link": "nowhere", "loop": file.name}[kind])


PROBLEMS = {
    "pipe": "is not a regular file but a device, a pipe or a socket",
    "device": "is not a regular file but a device, a pipe or a socket",
    "folder": "is not a regular file but a folder",
    "broken link": "does not exist (it is a link to what is not there)",
    "loop": "cannot be opened: Too many levels of symbolic links",
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", PROBLEMS)
def test_what_is_no_regular_file_is_refused_without_waiting_for_it(folder, name, kind):
    put(kind, folder / name)
    message = refusal(READERS[name], folder)
    assert name in message
    assert PROBLEMS[kind] in message


@pytest.mark.parametrize("name", [name for name in READERS if name not in WEIGHTS])
def test_a_file_that_is_too_large_is_refused_before_it_is_read(folder, name):
    most = MAX_TOKENIZER_BYTES if name == "tokenizer.json" else MAX_FILE_BYTES
    (folder / name).touch()
    os.truncate(folder / name, most + 1)  # a sparse file
    tracemalloc.start()
    message = refusal(READERS[name], folder)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert f"{name} has {most + 1:,} bytes or more, expected at most {most:,}" in message
    assert peak_bytes < 8 << 20


def test_a_file_whose_size_the_system_does_not_say_is_read_up_to_the_limit():
    """Files in /proc are regular ones of size 0."""
    file = Path("/proc/self/status")
    assert b"VmRSS" in read_file(file, CheckpointError)
    assert "expected at most 10" in refusal(lambda: read_file(file, CheckpointError, max_bytes=10))


def test_the_content_is_returned_as_it_is(tmp_path):
    (tmp_path / "file").write_bytes(b"\xff\0\n" * 100)
    assert read_file(tmp_path / "file", ConfigError, max_bytes=300) == b"\xff\0\n" * 100


@pytest.mark.parametrize("kind", PROBLEMS)
def test_a_refused_file_leaves_no_descriptor_open(tmp_path, kind):
    put(kind, tmp_path / "file")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        refusal(open_file, tmp_path / "file", CheckpointError)
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_the_system_cannot_read_is_refused_in_its_words():
    with open_file("/proc/self/mem", CheckpointError) as stream:  # nothing is mapped at the address 0
        for read in (lambda: stream.read(1), stream.read, lambda: stream.readinto(bytearray(1))):
            assert refusal(read) == "/proc/self/mem cannot be read: Input/output error; download it again"
        assert "cannot be read: Invalid argument" in refusal(stream.seek, 0, os.SEEK_END)


def test_a_name_that_no_file_can_have_is_refused():
    assert "does not exist" in refusal(open_file, "a\0b", CheckpointError)
    assert "cannot be opened: File name too long" in refusal(open_file, "a" * 5000, CheckpointError)

import base64
import io
import os
import tempfile
import time
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest

from internvl_rt.errors import MediaError
from internvl_rt.inputs.media import open_media

DATA = bytes(range(256)) * 3 + b"\xfb\xff\xfe?"
LIMIT = 1 << 20


def read(source: Any, max_bytes: int = LIMIT) -> bytes:
    stream, _ = open_media(source, "image", max_bytes)
    with stream:
        return stream.read()


def refusal(source: Any, max_bytes: int = LIMIT) -> str:
    with pytest.raises(MediaError) as caught:
        open_media(source, "image", max_bytes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_kind_of_source_gives_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    sources = [DATA, bytearray(DATA), memoryview(DATA), memoryview(DATA[::-1])[::-1], path, str(path), io.BytesIO(DATA)]
    for source in sources:
        assert read(source) == DATA


def test_file_objects_are_read_from_their_start_and_keep_their_position(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    with zipfile.ZipFile(tmp_path / "archive", "w") as archive:
        archive.write(path, "file")
    with (
        path.open("rb") as buffered,
        path.open("rb", buffering=0) as raw,
        tempfile.SpooledTemporaryFile() as spooled,
        zipfile.ZipFile(tmp_path / "archive") as archive,
        archive.open("file") as member,
    ):
        spooled.write(DATA)
        for file in (buffered, raw, spooled, member, io.BytesIO(DATA)):
            file.seek(7)
            assert read(file) == DATA
            assert file.tell() == 7
            assert not file.closed


def test_a_pipe_is_read_to_its_end() -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as pipe:
        os.write(writer, DATA)
        os.close(writer)
        assert read(pipe) == DATA


def test_base64_of_both_alphabets_with_and_without_padding_is_read() -> None:
    for length in range(len(DATA) - 5, len(DATA)):
        for encoded in (base64.b64encode(DATA[:length]), base64.urlsafe_b64encode(DATA[:length])):
            for text in (encoded.decode(), encoded.decode().rstrip("=")):
                assert read(f"data:image/png;base64,{text}") == DATA[:length]


def test_what_is_wrong_with_a_data_url_is_said() -> None:
    good = base64.b64encode(DATA).decode()
    assert r"found '\n' at character 76 of the data" in refusal(f"data:;base64,{good[:76]}\n{good[76:]}")
    assert "found '=' at character 4" in refusal(f"data:;base64,AAAA=AAA{good}")
    assert "found '%' at character 0" in refusal("data:;base64,%20")
    assert "5 characters cannot be whole bytes" in refusal("data:;base64,AAAAA==")
    assert "must have the form data:<type>;base64,<data>, got 'data:text/plain'" in refusal("data:text/plain,abc")
    assert "is empty" in refusal("data:;base64,===")
    assert "found '=' at character 4" in refusal("data:;base64,AAAA=====")


def test_a_data_url_of_padding_alone_is_refused_at_once() -> None:
    url = "data:;base64," + "=" * 50_000_000
    start_s = time.process_time()
    assert "found '=' at character 0" in refusal(url, 1 << 30)
    assert time.process_time() - start_s < 0.2  # character by character it takes 2 s


def test_a_long_data_url_is_decoded_in_windows() -> None:
    data = bytes(range(251)) * 80_000
    url = f"data:;base64,{base64.b64encode(data).decode()}"
    tracemalloc.start()
    try:
        with open_media(url, "image", 1 << 30)[0] as stream:
            peak = tracemalloc.get_traced_memory()[1]
            assert stream.read() == data
    finally:
        tracemalloc.stop()
    assert peak < 2.5 * len(data)  # the windows, and what they are joined to
    assert "found '*' at character 20000003 of the data" in refusal(f"data:;base64,{'A' * 20_000_003}*", 1 << 30)
    assert "20000001 characters cannot be whole bytes" in refusal(f"data:;base64,{'A' * 20_000_001}", 1 << 30)


def test_sizes_are_checked_before_bytes_are_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(1 << 40)

    class Unread(io.BytesIO):
        def read(self, *_: Any) -> bytes:
            raise AssertionError("its size is known already")

    expected = "has more than 9 bytes: make it smaller, or raise max_image_bytes"
    assert expected in refusal(bytes(10), 9)
    assert expected in refusal(path, 9)
    assert expected in refusal(Unread(bytes(10)), 9)
    assert expected in refusal("data:;base64," + "*" * 14, 9)  # its characters are not looked at
    with pytest.raises(MediaError, match="raise max_video_bytes"):
        open_media(bytes(10), "video", 9)
    assert len(read(bytes(9), 9)) == 9


def test_file_objects_that_cannot_be_read_are_refused_with_what_to_do(tmp_path: Path) -> None:
    class Broken:
        def read(self, size: int) -> bytes:
            raise KeyError("no")

    class Endless:
        def read(self, size: int) -> bytes:
            return b"x" * 7

    closed = io.BytesIO(DATA)
    closed.close()
    assert "image file object (BytesIO) is closed: pass an open file" in refusal(closed)
    assert "cannot be read (KeyError)" in refusal(Broken())
    assert "has more than 20 bytes" in refusal(Endless(), 20)
    assert "gives str instead of bytes: open it in binary mode ('rb')" in refusal(io.StringIO("text"))
    assert "is empty" in refusal(io.BytesIO())


def test_files_that_the_system_cannot_read_are_refused_in_its_words() -> None:
    expected = "image '/proc/self/maps' cannot be read: Invalid argument; check its path, or pass its bytes"
    assert refusal("/proc/self/maps") == expected  # a regular file whose end cannot be found


def test_a_pipe_that_takes_the_place_of_a_file_is_refused_without_waiting_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(os.path, "isfile", lambda path: True)  # it was a file a moment ago
    assert "is not a regular file but a device, a pipe or a socket" in refusal(tmp_path / "pipe")


def test_bytes_and_paths_that_give_nothing_are_refused() -> None:
    class Number:
        def __fspath__(self) -> int:
            return 5

    class Broken:
        def __fspath__(self) -> str:
            raise KeyError("no")

    released = memoryview(DATA)
    released.release()
    assert "image bytes: the memoryview was released" in refusal(released)
    assert "image path: Number gives no path (TypeError); pass a string or a Path" in refusal(Number())
    assert "image path: Broken gives no path (KeyError)" in refusal(Broken())

"""A zip archive is read only if its entries are stored as they are and all its records agree; no size takes memory."""

import pickle
import re
import struct
import tracemalloc
import zipfile

import pytest
import torch

from support.torch_files import read_refusal, state, tensor, write_zip

PICKLE, DATA = "m/data.pkl", "m/data/0"
SMALL = [(PICKLE, b"\x80\x02" + state(("x", tensor())) + b"."), (DATA, bytes(24))]


@pytest.mark.parametrize(
    ("record", "fields", "problem"),
    [
        (("listed", DATA), {"method": 8}, "'m/data/0' is compressed or encrypted"),
        (("listed", DATA), {"flags": 0x809}, "'m/data/0' is compressed or encrypted"),
        (("listed", DATA), {"flags": 0x848}, "'m/data/0' is compressed or encrypted"),
        (("listed", DATA), {"packed": 23}, "'m/data/0' is compressed or encrypted"),
        (("listed", DATA), {"packed": 1 << 20, "size": 1 << 20}, "'m/data/0' reaches beyond the entries"),
        (
            ("listed", PICKLE),
            {"packed": len(SMALL[0][1]) + 9, "size": len(SMALL[0][1]) + 9},
            "'m/data/0' begins inside another entry",
        ),
        (("listed", PICKLE), {"packed": 400, "size": 400}, "'m/data.pkl' reaches beyond the entries"),
        (("listed", DATA), {"header": 0}, "begins inside another entry"),
        (("listed", DATA), {"header": 1}, "begins inside another entry"),
        (("listed", DATA), {"header": 1 << 31}, r"no b'PK\\x03\\x04' of a zip archive at byte 2,147,483,648"),
        (("listed", DATA), {"header": 0xFFFF_FFFF}, "the sizes of 'm/data/0' are not in its zip64 field"),
        (("listed", DATA), {"packed": 0xFFFF_FFFF, "size": 0xFFFF_FFFF}, "are not in its zip64 field"),
        (("listed", DATA), {"disk": 1}, "a wrong line, of 'm/data/0'"),
        (("listed", DATA), {"sign": b"PK\1\3"}, "a wrong line, of 'm/data/0'"),
        (("listed", DATA), {"name_len": 7}, "another length than it says"),
        (("listed", DATA), {"name_len": 0xFFFF}, "another length than it says"),
        (("listed", PICKLE), {"extra_len": 5}, "its directory of entries"),
        (("listed", DATA), {"comment_len": 1}, "another length than it says"),
        (("local", DATA), {"method": 8}, "the header of 'm/data/0' does not agree"),
        (("local", DATA), {"flags": 0}, "the header of 'm/data/0' does not agree"),
        (("local", DATA), {"size": 23}, "the header of 'm/data/0' does not agree"),
        (("local", DATA), {"packed": 25}, "the header of 'm/data/0' does not agree"),
        (("local", DATA), {"name_len": 7}, "the header of 'm/data/0' does not agree"),
        (("local", DATA), {"extra_len": 1}, "'m/data/0' reaches beyond the entries"),
        (("local", DATA), {"sign": b"PK\3\5"}, "of a zip archive at byte"),
        (("end", ""), {"comment_len": 1}, "is not that of an archive in one file"),
        (("end", ""), {"disk": 1}, "is not that of an archive in one file"),
        (("end", ""), {"here": 1}, "is not that of an archive in one file"),
        (("end", ""), {"here": 1, "count": 1}, "the two ends of its directory of entries do not agree"),
        (("end", ""), {"begin": 0}, "the two ends of its directory of entries do not agree"),
        (("end", ""), {"sign": b"PK\5\7"}, r"no b'PK\\x05\\x06' of a zip archive at byte"),
        (("end_64", ""), {"rest": 45}, "is not that of an archive in one file"),
        (("end_64", ""), {"here": 1}, "do not agree"),
        (("end_64", ""), {"here": 1 << 60, "count": 1 << 60}, "do not agree"),
        (("end_64", ""), {"length": 1 << 60}, "do not agree"),
        (("end_64", ""), {"sign": b"PK\6\5"}, r"no b'PK\\x06\\x06' of a zip archive at byte"),
        (("locator", ""), {"end": 1 << 63}, r"no b'PK\\x06\\x06' of a zip archive at byte 9,223,372,036,854,775,808"),
        (("locator", ""), {"disks": 2}, "is not that of an archive in one file"),
    ],
)
def test_an_archive_whose_records_do_not_agree_is_refused(tmp_path, record, fields, problem):
    write_zip(tmp_path / "pytorch_model.bin", SMALL, {record: fields})
    assert re.search(f"is damaged: .*{problem}.*; download it again", read_refusal(tmp_path))


@pytest.mark.parametrize(
    "extra", [b"", b"\1", b"\1\0\4\0abcd", b"\1\0\x10\0abcd", b"\2\0\xff\xff", b"\2\0\0\0" * 10_000]
)
def test_a_zip64_field_without_the_sizes_is_refused(tmp_path, extra):
    fields = {"packed": 0xFFFF_FFFF, "size": 0xFFFF_FFFF, "extra_len": len(extra)}
    write_zip(tmp_path / "pytorch_model.bin", SMALL, {("listed", DATA): fields, ("extra", DATA): extra})
    assert "the sizes of 'm/data/0' are not in its zip64 field" in read_refusal(tmp_path)


def test_an_entry_that_is_there_twice_is_refused(tmp_path):
    write_zip(tmp_path / "pytorch_model.bin", [*SMALL, SMALL[1]])
    assert "is damaged: 'm/data/0' is there twice" in read_refusal(tmp_path)


@pytest.mark.parametrize(("count", "problem"), [(1, "has another length than it says"), (3, "is cut short")])
def test_a_directory_of_more_or_fewer_entries_is_refused(tmp_path, count, problem):
    counts = {"here": count, "count": count}
    write_zip(tmp_path / "pytorch_model.bin", SMALL, {("end", ""): counts, ("end_64", ""): counts})
    assert f"its directory of entries {problem}" in read_refusal(tmp_path)


@pytest.mark.parametrize("begin", [0, 1 << 30])
def test_a_directory_that_is_not_at_the_end_is_refused(tmp_path, begin):
    write_zip(tmp_path / "pytorch_model.bin", SMALL, {("end", ""): {"begin": begin}, ("end_64", ""): {"begin": begin}})
    assert "its directory of entries does not end where it says" in read_refusal(tmp_path)


def test_a_name_that_is_no_text_is_refused(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    write_zip(file, SMALL)
    file.write_bytes(file.read_bytes().replace(b"m/data/0", b"m/data/\xff"))
    assert "a wrong line, of 'm/data/\ufffd'" in read_refusal(tmp_path)


def test_a_second_end_inside_an_entry_is_refused(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    write_zip(file, [*SMALL, ("m/end", b"?" * 56)])
    data = file.read_bytes()
    at, end = data.index(b"?" * 56), data.index(b"PK\6\6")
    changed = data[:at] + data[end : end + 56] + data[at + 56 :]
    file.write_bytes(changed.replace(struct.pack("<IQ", 0, end), struct.pack("<IQ", 0, at)))
    assert "its end is not that of an archive in one file" in read_refusal(tmp_path)


def test_an_archive_without_a_pickle_is_refused(tmp_path):
    for entries in ([], SMALL[1:], [("m/version", b"3"), ("n/data.pkl", SMALL[0][1])]):
        write_zip(tmp_path / "pytorch_model.bin", entries)
        assert re.search("is damaged: '.*/data.pkl' is missing", read_refusal(tmp_path))


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compressed_archive_is_refused(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w", method) as packed:
        packed.writestr(PICKLE, SMALL[0][1])
        packed.writestr(DATA, bytes(1 << 24))
    assert "'m/data.pkl' is compressed or encrypted" in read_refusal(tmp_path)


def test_large_headers_are_refused_before_memory_is_taken(tmp_path):
    many = [(f"m/{at}", b"") for at in range((1 << 16) + 1)]
    long = [*SMALL, *((f"{at}".ljust(60_000, "x"), b"") for at in range(300))]
    too_large = {
        "expected it with at most 16,777,216 bytes": [(PICKLE, 300_000_000)],
        "65,537 entries": many,
        "302 entries, listed in 18,0": long,
    }
    for problem, entries in too_large.items():
        write_zip(tmp_path / "pytorch_model.bin", entries)
        tracemalloc.start()
        message = read_refusal(tmp_path)
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert problem in message
        assert peak_bytes < 1_000_000


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    torch.save({"x": torch.ones(3), "y": torch.ones(2, dtype=torch.int64)}, file)
    whole = file.read_bytes()
    for keep in range(len(whole)):
        file.write_bytes(whole[:keep])
        assert "is damaged" in read_refusal(tmp_path)
    file.write_bytes(whole + b"\0")
    assert "is damaged" in read_refusal(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n", pickle.dumps({"x": 1})],
)
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    assert "is damaged: no b'PK" in read_refusal(tmp_path)

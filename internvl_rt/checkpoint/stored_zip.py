"""A zip archive whose entries are stored as they are: where the bytes of each one lie in the file.

Format: APPNOTE.TXT of PKWARE, sections 4.3 to 4.5, with zip64 for files beyond 4 GiB. Only what `torch.save` and other
plain writers make is accepted: nothing compressed or encrypted, no comment, one directory at the very end, which agrees
with the header before each entry, and entries that do not reach into one another. The standard library's zipfile takes
a directory of any size into memory, and does not tell where the bytes of an entry begin.
"""

import io
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from internvl_rt.checkpoint.files import MAX_FILE_BYTES
from internvl_rt.errors import CheckpointError, quoted

_END, _END_64, _LOCATOR_64 = struct.Struct("<4s4H2IH"), struct.Struct("<4sQ2H2I4Q"), struct.Struct("<4sIQI")
_LISTED, _LOCAL = struct.Struct("<4s6H3I5H2I"), struct.Struct("<4s5H3I2H")
_SIGNATURES = {_END: b"PK\5\6", _END_64: b"PK\6\6", _LOCATOR_64: b"PK\6\7", _LISTED: b"PK\1\2", _LOCAL: b"PK\3\4"}
_IN_ZIP64 = 0xFFFF_FFFF  # stands for a number that an extra field of 64 bits holds
_STREAMED, _UTF8 = 1 << 3, 1 << 11  # flags: the sizes follow the data; the name is UTF-8. All others are refused
_MAX_ENTRIES = 1 << 16  # a file of the largest models has about 3,000


@dataclass(frozen=True, slots=True)
class Extent:
    """Where the bytes of one entry lie in the file."""

    offset_bytes: int
    num_bytes: int


def damaged(file: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"{file} is damaged: {problem}; download it again")


def read_entries(file: Path, stream: io.BufferedReader) -> dict[str, Extent]:
    """Returns the entries of an archive by name, in the order of its directory.

    Reads the directory, of at most 16 MiB, and the header before each entry. Raises CheckpointError for any other file.
    """
    count, begin, end = _find_directory(file, stream)
    if count > _MAX_ENTRIES or end - begin > MAX_FILE_BYTES:
        raise damaged(
            file,
            f"{count:,} entries, listed in {end - begin:,} bytes, expected {_MAX_ENTRIES:,} and {MAX_FILE_BYTES:,}",
        )
    stream.seek(begin)
    directory = stream.read(end - begin)
    listed: dict[str, tuple[int, int, bytes, int]] = {}
    place = 0
    for _ in range(count):
        if place + _LISTED.size > len(directory):
            raise damaged(file, "its directory of entries is cut short")
        signature, _, _, flags, method, _, _, _, packed, size, name_len, extra_len, comment_len, disk, _, _, header = (
            _LISTED.unpack_from(directory, place)
        )
        after_name = place + _LISTED.size + name_len
        raw_name, extra = directory[place + _LISTED.size : after_name], directory[after_name : after_name + extra_len]
        place = after_name + extra_len + comment_len
        name = raw_name.decode(errors="replace")
        size, packed, header = _widened(file, name, extra, (size, packed, header))
        if signature != _SIGNATURES[_LISTED] or disk or "\ufffd" in name:
            raise damaged(file, f"its directory of entries has a wrong line, of {quoted(name)}")
        if method or size != packed or flags & ~(_STREAMED | _UTF8):
            raise damaged(file, f"{quoted(name)} is compressed or encrypted, expected it stored as it is")
        if name in listed:
            raise damaged(file, f"{quoted(name)} is there twice")
        listed[name] = header, size, raw_name, flags
    if place != len(directory):
        raise damaged(file, "its directory of entries has another length than it says")
    offsets, free = {}, 0
    for name, (header, size, raw_name, flags) in sorted(listed.items(), key=lambda item: item[1][0]):
        if header < free:
            raise damaged(file, f"{quoted(name)} begins inside another entry")
        offsets[name] = _find_data(file, stream, header, size, raw_name, flags)
        free = offsets[name] + size
        if free > begin:
            raise damaged(file, f"{quoted(name)} reaches beyond the entries")
    return {name: Extent(offsets[name], size) for name, (_, size, _, _) in listed.items()}


def _find_directory(file: Path, stream: io.BufferedReader) -> tuple[int, int, int]:
    """Returns how many entries the directory lists, and where it begins and ends."""
    end = os.fstat(stream.fileno()).st_size - _END.size
    disk, first_disk, here, count, length, begin, comment_len = _read(file, stream, end, _END)
    if disk or first_disk or here != count or comment_len:
        raise damaged(file, "its end is not that of an archive in one file")
    try:
        locator_disk, end_64, num_disks = _read(file, stream, end - _LOCATOR_64.size, _LOCATOR_64)
    except CheckpointError:
        pass  # a small archive has none
    else:
        end -= _LOCATOR_64.size + _END_64.size
        rest, _, _, disk, first_disk, here, *wide = _read(file, stream, end_64, _END_64)
        pairs = zip((count, length, begin), wide, (0xFFFF, _IN_ZIP64, _IN_ZIP64), strict=True)
        if end_64 != end or rest != _END_64.size - 12 or locator_disk or disk or first_disk or num_disks > 1:
            raise damaged(file, "its end is not that of an archive in one file")
        if here != wide[0] or any(narrow not in (number, full) for narrow, number, full in pairs):
            raise damaged(file, "the two ends of its directory of entries do not agree")
        count, length, begin = wide
    if begin + length != end:
        raise damaged(file, "its directory of entries does not end where it says")
    return count, begin, end


def _find_data(file: Path, stream: io.BufferedReader, at: int, size: int, raw_name: bytes, flags: int) -> int:
    """Returns where the bytes of an entry begin, whose header at `at` has to say what the directory says."""
    _, own_flags, method, _, _, _, *sizes, name_len, extra_len = _read(file, stream, at, _LOCAL)
    known = {size, _IN_ZIP64, 0} if flags & _STREAMED else {size, _IN_ZIP64}
    if own_flags != flags or method or not known.issuperset(sizes) or stream.read(name_len) != raw_name:
        raise damaged(file, f"the header of {quoted(raw_name.decode())} does not agree with the directory of entries")
    return at + _LOCAL.size + name_len + extra_len


def _widened(file: Path, name: str, extra: bytes, numbers: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the numbers of an entry, each that does not fit 32 bits from its extra field of zip64."""
    wide = sum(number == _IN_ZIP64 for number in numbers)
    at = 0
    while wide:
        kind, length = struct.unpack_from("<2H", extra, at) if at + 4 <= len(extra) else (1, 0)
        at += 4
        if kind == 1:
            if at + length > len(extra) or length < 8 * wide:
                raise damaged(file, f"the sizes of {quoted(name)} are not in its zip64 field")
            found = iter(struct.unpack_from(f"<{wide}Q", extra, at))
            return tuple(next(found) if number == _IN_ZIP64 else number for number in numbers)
        at += length
    return numbers


def _read(file: Path, stream: io.BufferedReader, at: int, layout: struct.Struct) -> tuple[int, ...]:
    """Returns the numbers of a record of the archive, after its signature. Raises CheckpointError if none is there."""
    signature = _SIGNATURES[layout]
    content = b""
    if 0 <= at < 1 << 62:
        stream.seek(at)
        content = stream.read(layout.size)
    if len(content) < layout.size or not content.startswith(signature):
        raise damaged(file, f"no {quoted(signature)} of a zip archive at byte {at:,}")
    return layout.unpack(content)[1:]

"""Refuses an MP4 whose header makes FFmpeg take much more memory than the file has bytes.

FFmpeg keeps 74 bytes for each sample (a frame, or a piece of sound) that the header announces, and a table for samples
of one size announces millions in a few bytes. The tables are found here by their names, wherever they stand in the
header, since FFmpeg is lenient about that.
"""

import os
import re
from collections.abc import Iterator
from typing import BinaryIO

from internvl_rt.errors import MediaError

MAX_SAMPLES = 5_000_000  # 370 MB of index; an hour of frames at 60 a second and of AAC has 400,000

# What a file begins with, as far as FFmpeg's reader of MP4 and MOV may have it.
_FIRST = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp", b"uuid", b"junk", b"pict", b"sidx")
_MAX_BOXES = 100_000  # at the top level; an hour in fragments of a second has 10,000
_MAX_BOX_BYTES = 1 << 28  # of any but those that hold the samples; an hour's tables take 5 MB
_TABLE = re.compile(rb"stsz|stz2|trun")
_OF_SOUND = {b"soun", b"alis", b"url ", b"mdir"}  # handlers in a track of sound


def is_mp4(stream: BinaryIO, name: str) -> bool:
    """Returns whether a file begins as an MP4 or MOV does. Raises MediaError if one announces too many samples."""
    stream.seek(4)
    if stream.read(4) not in _FIRST:
        return False
    if sum(_count_samples(kind, content) for kind, content in _parts(stream, name)) > MAX_SAMPLES:
        raise MediaError(
            f"{name} announces more than {MAX_SAMPLES} frames and pieces of sound: cut it, or convert it to Matroska"
        )
    return True


def _parts(stream: BinaryIO, name: str) -> Iterator[tuple[bytes, bytes]]:
    """Yields kind and bytes of each box that may describe samples: those of the header one by one."""
    position, end = 0, stream.seek(0, os.SEEK_END)
    for _ in range(_MAX_BOXES):
        stream.seek(position)
        kind, start, size = _box(stream.read(16), end - position)
        if not size:
            return
        if kind != b"mdat":
            if size > _MAX_BOX_BYTES:
                raise MediaError(f"{name} has a header of more than {_MAX_BOX_BYTES} bytes: convert it to MP4 anew")
            stream.seek(position)
            content = stream.read(size)
            if b"cmov" in content:
                raise MediaError(f"{name} has a compressed header, which is not read: convert it to MP4")
            yield from _children(content, start) if kind == b"moov" else [(kind, content)]
        position += size
    raise MediaError(f"{name} is made of more than {_MAX_BOXES} parts: convert it to MP4 without fragments")


def _children(content: bytes, position: int) -> Iterator[tuple[bytes, bytes]]:
    while True:
        kind, _, size = _box(content[position : position + 16], len(content) - position)
        if not size:
            return
        yield kind, content[position : position + size]
        position += size


def _box(head: bytes, most: int) -> tuple[bytes, int, int]:
    """Returns kind, size of the head and size of a box, which is at most `most`; 0 where FFmpeg reads no further."""
    size, start = int.from_bytes(head[:4]), 8
    if size == 1:
        size, start = int.from_bytes(head[8:]), 16
    size = min(size or most, most)
    return head[4:8], start, size if size >= start else 0


def _count_samples(kind: bytes, content: bytes) -> int:
    is_plain = kind == b"trak" and _is_plain_sound(content)  # FFmpeg makes blocks of its samples
    return sum(_count(content, table) for table in _TABLE.finditer(content) if table[0] == b"trun" or not is_plain)


def _count(content: bytes, table: re.Match[bytes]) -> int:
    start = table.start() + (8 if table[0] == b"trun" else 12)
    if content[max(0, table.start() - 4) : table.start()] == b"\0\0\0\1":  # a size of 64 bits follows the name
        start += 8
    return int.from_bytes(content[start : start + 4])


def _is_plain_sound(track: bytes) -> bool:
    """Returns whether a track is of sound that is not compressed: each sample lasts one unit of time."""
    handlers = {track[match.start() + 12 : match.start() + 16] for match in re.finditer(b"hdlr", track)}
    durations = [track[match.start() + 8 : match.start() + 20] for match in re.finditer(b"stts", track)]
    is_one = len(durations) == 1 and durations[0][:4] == durations[0][8:] == bytes([0, 0, 0, 1])
    return is_one and b"soun" in handlers and handlers <= _OF_SOUND

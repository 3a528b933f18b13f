"""Estimates how long the scans of JPEGs take to decode, from their markers, alone or as the strips of a TIFF.

A progressive JPEG has about 10 scans; the standard lets it have thousands, each over all pixels, of some hundred bytes.
"""

import re
import struct
from collections import Counter

from internvl_rt.errors import MediaError

WINDOW = 1 << 20  # bytes; a search holds the interpreter lock, so a long file is searched in windows

_SCAN_S = 1e-9  # for a pixel of each component in a scan, beyond what its bytes take
_ARITHMETIC_SCAN_S = 20e-9  # arithmetic coding spends no bytes on what it can predict

_MAX_SEGMENTS = 10_000  # of a JPEG; 10 MB of metadata take 160, each scan takes 1 to 5
_MAX_METADATA_BYTES = 1 << 24  # before a JPEG's first scan; Pillow joins EXIF segments in quadratic time
_MAX_STRIPS = 1 << 19  # of a TIFF, or tiles
_MAX_STRIP_SEGMENTS = 1 << 19  # of all of them

_SOI = b"\xff\xd8"
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")  # those of no segment and stuffed bytes are left out
_FRAME_CODES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
_INTEGERS = {1: "B", 3: "H", 4: "I", 6: "B", 8: "H", 9: "I", 16: "Q", 17: "Q"}  # types of a TIFF's tags


def jpeg_seconds(content: bytes, name: str, start: int = 0) -> float:
    """Returns what all scans of the JPEG at `start` take; 0 if there is none.

    Raises MediaError for too many segments.
    """
    return _walk(content, start, name)[0] if content.startswith(_SOI, start) else 0.0


def tiff_seconds(content: bytes, directory: int, name: str) -> float:
    """Returns what all scans of the JPEGs take that are a TIFF's strips or tiles.

    directory: where the picture's tags begin. Raises MediaError for too many segments, or strips that overlap.
    """
    seconds, num_segments, num_bytes = 0.0, 0, 0
    for start, times in Counter(_strip_offsets(content, directory, name)).items():
        if content.startswith(_SOI, start):
            taken_s, end, taken_segments = _walk(content, start, name)
            seconds += taken_s * times
            num_segments, num_bytes = num_segments + taken_segments, num_bytes + end - start
            if num_segments > _MAX_STRIP_SEGMENTS or num_bytes > 8 * len(content):
                raise MediaError(
                    f"{name} has strips that are made of more than {_MAX_STRIP_SEGMENTS} JPEG segments, or overlap: "
                    "save it anew, for example as PNG"
                )
    return seconds


def _walk(content: bytes, start: int, name: str) -> tuple[float, int, int]:
    """Returns what the scans of the JPEG at `start` take, where it ends, and how many segments it has."""
    position, seconds, num_pixels, component_s, has_scan = start + 2, 0.0, 0, _SCAN_S, False
    for num_segments in range(_MAX_SEGMENTS):
        found = _next_marker(content, position)
        if found is None or found[0] in (_SOI, b"\xff\xd9"):
            return seconds, found.end() if found else len(content), num_segments
        after, code = found.end(), content[found.end() - 1]
        position = after + max(2, int.from_bytes(content[after : after + 2]))
        if code in _FRAME_CODES:
            height, width = content[after + 3 : after + 5], content[after + 5 : after + 7]
            num_pixels = max(num_pixels, int.from_bytes(height) * int.from_bytes(width))
            if code > 0xC8:
                component_s = _ARITHMETIC_SCAN_S
        if code == 0xDA:
            has_scan = True
            seconds += component_s * num_pixels * max([1, *content[after + 2 : after + 3]])  # the byte may be missing
        elif not has_scan and position - start > _MAX_METADATA_BYTES:
            raise MediaError(
                f"{name} has more than {_MAX_METADATA_BYTES} bytes of metadata: save it anew without metadata"
            )
    raise MediaError(f"{name} is made of more than {_MAX_SEGMENTS} segments: save it anew as PNG or baseline JPEG")


def _next_marker(content: bytes, position: int) -> re.Match[bytes] | None:
    for start in range(position, len(content), WINDOW):
        if found := _MARKER.search(content, start, start + WINDOW + 1):  # a marker may begin at the window's end
            return found
    return None


def _strip_offsets(content: bytes, directory: int, name: str) -> list[int]:
    """Returns where the strips and tiles of a TIFF begin, as libtiff reads its tags: the first of a kind counts.

    Pillow reads the last. Raises struct.error for a damaged file.
    """
    order = "<" if content.startswith(b"II") else ">"
    is_big = content[2:4] in (b"+\0", b"\0+")
    count_format, size_format, entry_bytes, value_bytes = ("Q", "Q", 20, 8) if is_big else ("H", "I", 12, 4)
    (num_tags,) = struct.unpack_from(order + count_format, content, directory)
    first = directory + struct.calcsize(order + count_format)
    offsets: dict[int, list[int]] = {}
    for entry in range(first, first + num_tags * entry_bytes, entry_bytes):
        tag, kind, count = struct.unpack_from(f"{order}HH{size_format}", content, entry)
        if tag in (273, 324) and tag not in offsets and kind in _INTEGERS:
            if count > _MAX_STRIPS:
                raise MediaError(f"{name} is made of more than {_MAX_STRIPS} strips: save it anew, for example as PNG")
            numbers = f"{order}{count}{_INTEGERS[kind]}"
            position = entry + entry_bytes - value_bytes
            if struct.calcsize(numbers) > value_bytes:
                (position,) = struct.unpack_from(order + size_format, content, position)
            offsets[tag] = list(struct.unpack_from(numbers, content, position))
    return [offset for each in offsets.values() for offset in each]

"""Pictures of noise as PNG files, as many as are asked for, none of which a cache knows.

Noise takes long to compress, so the pixels of one size are compressed once, and a comment in the file tells one picture
from another. What stands before the rest of a file is a multiple of three bytes, as the text of base64 needs it: the
texts of both can then be put together too, and the long one is made once.
"""

import struct
import zlib
from dataclasses import dataclass

import numpy as np

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_LEVELS = 16  # of each channel: noise that fills them compresses about as well as a photograph


@dataclass(frozen=True, slots=True)
class Png:
    """A picture, and how many tiles it has, without the thumbnail."""

    num_tiles: int
    header: bytes
    rest: bytes  # of the file: the compressed pixels, and the end

    def beginning(self, number: int) -> bytes:
        """Returns what makes a file of its own together with `rest`. number: below 2**64."""
        return self.header + _chunk(b"tEXt", b"Comment\0%016x" % number)

    def file(self, number: int) -> bytes:
        return self.beginning(number) + self.rest


def noise_png(width: int, height: int, num_tiles: int, rng: np.random.Generator) -> Png:
    pixels = rng.integers(0, _LEVELS, (height, width, 3), dtype=np.uint8) * (255 // (_LEVELS - 1))
    return encode_png(pixels, num_tiles)


def encode_png(pixels: np.ndarray, num_tiles: int) -> Png:
    """Encodes uint8 RGB [h, w, 3]."""
    height, width = pixels.shape[:2]
    lines = np.zeros((height, 1 + 3 * width), np.uint8)  # the first byte of a line, 0, says that it is not filtered
    lines[:, 1:] = pixels.reshape(height, -1)
    header = _SIGNATURE + _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return Png(num_tiles, header, _chunk(b"IDAT", zlib.compress(lines.tobytes(), 1)) + _chunk(b"IEND", b""))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

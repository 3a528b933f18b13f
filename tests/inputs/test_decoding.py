"""What decoding a picture takes is bounded before it begins: a file of a few kilobytes can hold minutes of work."""

import io
import struct
import threading
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from internvl_rt.errors import MediaError
from internvl_rt.inputs.decoding import open_encoded
from internvl_rt.inputs.image import open_image
from internvl_rt.inputs.tiles import ImageOptions

MOST_S = 2.0  # of processor time; unbounded, each of the files below takes 10 s to hours


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def refusal(content: bytes, **limits: Any) -> str:
    """Returns the one line with which a picture is refused, in little time."""
    start_s = time.process_time()
    with pytest.raises(MediaError) as caught:
        open_image(content, ImageOptions(**limits)).decode()
    assert time.process_time() - start_s < MOST_S
    assert "\n" not in str(caught.value)
    return str(caught.value)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks: bytes, width: int = 8, height: int = 8) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"".join((b"\x89PNG\r\n\x1a\n", header, *chunks, png_chunk(b"IEND", b"")))


def jpeg_scans(repeats: int, size: tuple[int, int], mode: str = "RGB") -> bytes:
    """Returns a progressive JPEG of smooth areas whose last scan is repeated."""
    data = encode(Image.new(mode, size), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * repeats + data[-2:]


def tiff(*tags: tuple[int, int, int, int], data: bytes = b"") -> bytes:
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4) + data


def gif(*blocks: bytes) -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0x80, 0, 0) + bytes(6) + b"".join(blocks)


def rle_bmp(data: bytes, width: int, height: int) -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(data), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + len(data), 0, 0, 1078) + info + bytes(1024) + data


def test_a_jpeg_whose_scan_is_repeated_is_refused_by_the_time_that_it_takes() -> None:
    text = refusal(jpeg_scans(500, (7000, 7000)))
    assert "s to decode; at most 5 s are allowed: save it anew as PNG or baseline JPEG" in text
    assert "raise max_decode_s" in text
    small = jpeg_scans(500, (300, 200))
    assert open_image(small, ImageOptions()).decode().size == (300, 200)  # 500 scans are no harm by themselves
    assert "at most 0.01 s" in refusal(small, max_decode_s=0.01)


def jpeg_tiff(jpeg: bytes, size: tuple[int, int], rows: int, *more: tuple[int, int, int, int]) -> bytes:
    """Returns a gray TIFF, all strips of which are one JPEG."""
    return strips_tiff(jpeg, size, rows, [0] * -(-size[1] // rows), *more)


def strips_tiff(
    data: bytes, size: tuple[int, int], rows: int, offsets: list[int], *more: tuple[int, int, int, int]
) -> bytes:
    tags = [(256, 4, 1, size[0]), (257, 4, 1, size[1]), (258, 3, 1, 8), (259, 3, 1, 7), (262, 3, 1, 1), (277, 3, 1, 1)]
    begin, count = 8 + 2 + 12 * (len(tags) + 3 + len(more)) + 4, len(offsets)
    end = begin + len(data)
    strips = [(273, 4, count, end if count > 1 else begin), (278, 4, 1, rows)]
    strips.append((279, 4, count, end + 4 * count if count > 1 else len(data)))
    numbers = struct.pack(f"<{2 * count}I", *[begin + offset for offset in offsets], *[len(data)] * count)
    return tiff(*tags, *strips, *more, data=data + numbers)


def test_a_jpeg_in_a_tiff_is_charged_for_its_scans() -> None:
    whole = jpeg_scans(89, (7000, 7000), "L")
    assert "s to decode; at most 5 s" in refusal(jpeg_tiff(whole, (7000, 7000), 7000))
    strip = jpeg_scans(89, (7000, 70), "L")
    assert "s to decode; at most 5 s" in refusal(jpeg_tiff(strip, (7000, 7000), 70))
    tall = jpeg_tiff(whole, (7000, 10), 10)  # libtiff takes a last strip that is too tall, and decodes it whole
    assert "s to decode; at most 4 s" in refusal(tall, max_decode_s=4)
    twice = jpeg_tiff(whole, (7000, 7000), 7000, (273, 4, 1, 8))  # libtiff reads the first, Pillow the last
    assert "s to decode; at most 5 s" in refusal(twice)
    small = jpeg_tiff(jpeg_scans(89, (300, 20), "L"), (300, 200), 20)
    assert open_image(small, ImageOptions()).decode().size == (300, 200)
    assert "at most 0.005 s" in refusal(small, max_decode_s=0.005)


@pytest.mark.parametrize(
    ("unit", "count", "expected"),
    [
        (b"", 600_000, "more than 524288 strips"),
        (b"\xff\xd8\xff\xfe\0\4", 9000, "more than 524288 JPEG segments"),  # each is in a comment of the one before
        (b"\xff\xd8\xff\xfe\xff\xfc" + bytes(65528), 200, "or overlap"),
    ],
)
def test_strips_that_keep_the_search_for_scans_busy_are_refused(unit: bytes, count: int, expected: str) -> None:
    offsets = [index * len(unit) for index in range(count)]
    assert expected in refusal(strips_tiff(unit * count, (8, 8), 8, offsets))


@pytest.mark.slow
def test_a_tiff_of_64_megapixels_in_jpeg_strips_is_not_refused() -> None:
    content = encode(Image.new("RGB", (8000, 8000)), "TIFF", compression="jpeg")
    assert open_image(content, ImageOptions()).layout.num_tiles > 1


def test_the_frame_of_an_mpo_is_charged_for_its_own_scans() -> None:
    first = Image.new("RGB", (300, 200))
    content = encode(first, "MPO", save_all=True, append_images=[first])
    second = content.rindex(b"\xff\xd8")
    many = content[:second] + jpeg_scans(500, (300, 200))
    open_encoded(many, "image", ImageOptions(max_decode_s=0.01))
    with pytest.raises(MediaError, match=r"at most 0\.01 s"):
        open_encoded(many, "image", ImageOptions(max_decode_s=0.01), frame=1)


@pytest.mark.slow
def test_a_progressive_jpeg_of_64_megapixels_is_not_refused() -> None:
    content = encode(Image.new("RGB", (8000, 8000)), "JPEG", progressive=True, subsampling=0)
    assert open_image(content, ImageOptions()).layout.num_tiles > 1


SMALL = encode(Image.new("RGB", (8, 8)), "JPEG")
EXIF = b"\xff\xe1\xff\xffExif\0\0" + bytes(65535 - 8)
METADATA = b"x\0\0" + zlib.compress(bytes(1_000_000), 9)
SQUARE = ((256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 1, 8), (262, 3, 1, 1))


@pytest.mark.filterwarnings("ignore:Tag data larger than file")
@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: SMALL[:2] + b"\xff" * 20_000_000 + SMALL[2:], "bytes of metadata: save it anew"),
        (lambda: SMALL[:2] + b"\xff\xfe\0\2" * 2_000_000 + SMALL[2:], "more than 10000 segments: save it anew"),
        (lambda: SMALL[:2] + EXIF * 300 + SMALL[2:], "bytes of metadata: save it anew"),
        (lambda: png(png_chunk(b"iCCP", METADATA) * 5000), "more than 100 compressed chunks"),
        (lambda: png(png_chunk(b"IDAT", b"x"), png_chunk(b"iCCP", METADATA) * 5000), "more than 100 compressed chunks"),
        (lambda: png(png_chunk(b"tEXt", b"x\0y") * 500_000), "more than 20000 small pieces"),
        (lambda: png(png_chunk(b"IDAT", b"") * 500_000), "more than 500000 small pieces"),
        (lambda: gif(b"!\xfe" + b"\1a" * 5_000_000), "more than 20000 small pieces"),
        (lambda: rle_bmp(b"\1\7" * 8_000_000, 4000, 2000), "more than 500000 small pieces"),
        (lambda: tiff(*SQUARE, *((1000 + i, 1, 9_000_000, 8) for i in range(30_000)), data=bytes(9_000_000)), "pieces"),
        (lambda: tiff(*SQUARE, (259, 3, 1, 8), (322, 4, 1, 1 << 31), (323, 4, 1, 1 << 31), (324, 4, 1, 8)), "tiles"),
        (lambda: tiff(*SQUARE, (259, 3, 1, 8), (322, 4, 1, 30_000), (323, 4, 1, 30_000), (324, 4, 1, 8)), "tiles"),
        (lambda: gif(b"," + struct.pack("<HHHHB", 60_000, 60_000, 9, 9, 0) + b"\2\1\0\0;"), "more pixels than"),
    ],
)  # fmt: skip
def test_files_that_keep_a_parser_busy_are_refused(build: Callable[[], bytes], expected: str) -> None:
    assert expected in refusal(build())


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_other_threads_run_while_a_long_file_is_searched(kind: str) -> None:
    content = encode(Image.new("RGB", (8, 8)), kind)
    content = content[:-2] + bytes(1 << 27) + content[-2:]

    def longest_share() -> float:
        """Returns the longest time for which another thread did not run, as a share of the whole."""
        stopped, waits = threading.Event(), [0.0]

        def watch() -> None:
            while not stopped.is_set():
                start_s = time.perf_counter()
                time.sleep(0.001)
                waits.append(time.perf_counter() - start_s)

        watcher = threading.Thread(target=watch)
        watcher.start()
        start_s = time.perf_counter()
        open_encoded(content, "image", ImageOptions())
        took_s = time.perf_counter() - start_s
        stopped.set()
        watcher.join()
        return max(waits) / took_s

    # A search of the whole file at once takes a third of the time or more. On a busy machine one try may wait as long.
    assert min(longest_share() for _ in range(5)) < 0.2


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF"])
def test_thousands_of_frames_cost_as_much_as_the_first(kind: str) -> None:
    size, count = (16, 16), 200 if kind == "AVIF" else 1000
    frames = [Image.new("RGB", size, (level % 256, level // 16, 99)) for level in range(count)]
    content = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    start_s = time.process_time()
    assert open_image(content, ImageOptions()).decode().size == size
    assert time.process_time() - start_s < 0.3


def test_memory_for_decoding_is_estimated_from_the_header() -> None:
    rgb = Image.fromarray(np.zeros((1000, 1000, 3), np.uint8))
    taken = {"WEBP": 18, "PNG": 7}  # bytes a pixel
    for kind, per_pixel in taken.items():
        content = encode(rgb, kind)
        open_image(content, ImageOptions(max_decode_bytes=per_pixel * 1_000_000)).decode()
        text = refusal(content, max_decode_bytes=per_pixel * 1_000_000 - 1)
        assert "MiB to decode" in text
        assert "raise max_decode_bytes" in text


def test_an_upright_tiff_is_turned_once() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encode(Image.new("RGB", (600, 100)), "TIFF", exif=exif)
    for option in ("ignore", "apply"):
        opened = open_image(content, ImageOptions(exif=option, image_size=28))
        columns, rows = opened.layout.columns, opened.layout.rows
        assert opened.decode().size == (100, 600)
        assert rows > columns

"""An MP4 of a few bytes whose header announces millions of samples is refused before FFmpeg takes memory for them."""

import io
import struct
import time

import av
import numpy as np
import pytest

from internvl_rt.errors import MediaError
from internvl_rt.inputs.mp4 import MAX_SAMPLES, is_mp4
from internvl_rt.inputs.video import load_video

MANY = 50_000_000  # FFmpeg takes 3.7 GB for the index


def clip(container="mp4", sound_s=0, **options):
    file = io.BytesIO()
    with av.open(file, "w", format=container, options=options) as output:
        video = output.add_stream("mpeg4", rate=10)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        sound = output.add_stream("pcm_s16le", rate=48000, layout="mono") if sound_s else None
        for level in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 10 * level, np.uint8), format="rgb24")
            output.mux(video.encode(frame))
        output.mux(video.encode())
        for second in range(sound_s):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 48000), np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.pts = 48000, 48000 * second
            output.mux(sound.encode(frame))
    return bytearray(file.getvalue())


FRAGMENTED = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}


def claiming(data, table, at, number=MANY):
    start = data.rindex(table)
    struct.pack_into(">I", data, start + at, number)
    return data


def of_one_size():
    """Makes a table of sizes of a few bytes, as for samples that all have one size."""
    data = claiming(claiming(claiming(clip(), b"stsz", 12), b"stts", 12), b"stsc", 16)
    struct.pack_into(">I", data, data.index(b"stsz") + 8, 8)
    return data


def boxed(kind, content):
    return struct.pack(">I4s", 8 + len(content), kind) + bytes(content)


@pytest.mark.parametrize(
    "data",
    [
        of_one_size(),
        boxed(b"ftyp", b"isom") + of_one_size(),
        boxed(b"free", of_one_size()),  # wherever the table stands
        claiming(clip(**FRAGMENTED), b"trun", 8),
        boxed(b"ftyp", b"isom") + struct.pack(">I4sQIII", 1, b"stsz", 28, 0, 8, MANY),  # a size of 64 bits
        claiming(claiming(clip(), b"stsz", 12), b"stts", 16, number=1),  # the duration of plain sound
    ],
)
def test_millions_of_samples_in_a_few_bytes_are_refused_at_once(data):
    start_s = time.perf_counter()
    with pytest.raises(MediaError, match=f"announces more than {MAX_SAMPLES} frames and pieces of sound: cut it"):
        load_video(bytes(data))
    assert time.perf_counter() - start_s < 0.5


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (boxed(b"ftyp", b"isom") + boxed(b"moov", boxed(b"cmov", bytes(100))), "has a compressed header"),
        (boxed(b"free", b"") * 100_001, "is made of more than 100000 parts"),
        (boxed(b"qqqq", bytes(8)) + clip(), "is broken or not a video"),  # FFmpeg alone would read it
    ],
)
def test_other_headers_that_cannot_be_bounded_are_refused(data, message):
    with pytest.raises(MediaError, match=message):
        load_video(bytes(data))


@pytest.mark.parametrize("options", [{}, FRAGMENTED, {"container": "mov"}, {"container": "mov", "sound_s": 110}])
def test_videos_as_cameras_and_programs_make_them_are_read(options):
    data = clip(**options)
    assert is_mp4(io.BytesIO(data), "video")
    assert len(load_video(bytes(data), num_segments=4)) == 4


def test_plain_sound_may_have_any_number_of_samples():
    assert MAX_SAMPLES < 48000 * 110
    data = clip("mov", sound_s=2)
    assert len(load_video(bytes(claiming(data, b"stsz", 12)), num_segments=4)) == 4


def test_other_containers_are_left_alone():
    for container in ("matroska", "avi"):
        data = clip(container)
        assert not is_mp4(io.BytesIO(data), "video")
        assert len(load_video(bytes(data), num_segments=4)) == 4

import io
import math
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from internvl_rt.errors import MediaError, RequestError
from internvl_rt.inputs.video import VideoLimits, choose_frame_indices, count_frames, load_video

SIZE = (64, 48)


def clip(
    num_frames: int = 20, container: str = "mp4", codec: str = "mpeg4", rate: int = 10, rotation: int = 0
) -> bytes:
    """Makes a video whose frame k is gray of level 10 k, with the upper left quarter black."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        for index in range(num_frames):
            array = np.full((SIZE[1], SIZE[0], 3), 10 * index, np.uint8)
            array[: SIZE[1] // 2, : SIZE[0] // 2] = 0
            output.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        output.mux(stream.encode())
    data = bytearray(file.getvalue())
    if rotation:  # degrees counterclockwise; the matrix stands in the header of the track
        sine, cosine = round(math.sin(math.radians(rotation))), round(math.cos(math.radians(rotation)))
        matrix = cosine << 16, -sine << 16, 0, sine << 16, cosine << 16, 0, 0, 0, 1 << 30
        struct.pack_into(">9i", data, data.index(b"tkhd") + 44, *matrix)
    return bytes(data)


def levels(source: str | Path | bytes, **arguments: Any) -> list[int]:
    """Returns the indices of the loaded frames, which it reads from their gray levels."""
    frames = load_video(source, **arguments)
    assert {(frame.mode, frame.size) for frame in frames} == {("RGB", SIZE)}
    return [round(np.asarray(frame)[-8:, -8:].mean() / 10) for frame in frames]


def refusal(source: Any, **arguments: Any) -> str:
    """Returns the error message, of one line, with which `source` is refused."""
    with pytest.raises(MediaError) as caught:
        load_video(source, **arguments)
    text = str(caught.value)
    assert "\n" not in text
    assert " object at " not in text
    return text


def audio() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as output:
        stream = output.add_stream("pcm_s16le", rate=8000, layout="mono")
        assert isinstance(stream, av.AudioStream)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        output.mux([*stream.encode(frame), *stream.encode()])
    return file.getvalue()


# Choice of frames


def test_frames_are_the_middles_of_equal_spans() -> None:
    assert choose_frame_indices(81, 25.0, 8) == [5, 15, 25, 35, 45, 55, 65, 75]
    assert len(choose_frame_indices(300, 30.0)) == 32


def test_the_last_index_counted_is_one_less_than_the_frames() -> None:
    assert choose_frame_indices(101, 50.0, 1) == [50]
    assert choose_frame_indices(1, 30.0, 3) == [0, 0, 0]


def test_halves_are_rounded_to_even_and_sums_truncated() -> None:
    # Spans of 2.5 frames begin at 0, 2.5 -> 2, 5 and 7.5 -> 8; their middles are 1.25 further.
    assert choose_frame_indices(11, 10.0, 4) == [1, 3, 6, 9]
    # The bounds are at the frames 12.5 -> 12 and 37.5 -> 38.
    assert choose_frame_indices(1000, 25.0, 2, (0.5, 1.5)) == [18, 31]


def test_a_bound_is_cut_to_the_video() -> None:
    assert choose_frame_indices(90, 30.0, 2, (2.0, 10.0)) == [67, 81]
    assert choose_frame_indices(90, 30.0, 2, (-5.0, 1.0)) == [7, 22]


@given(st.integers(1, 5000), st.integers(1, 64), st.sampled_from([1.0, 23.976, 30.0, 60.0]))
def test_chosen_frames_exist_and_do_not_go_back(num_frames: int, num_segments: int, fps: float) -> None:
    indices = choose_frame_indices(num_frames, fps, num_segments)
    assert len(indices) == num_segments
    assert indices == sorted(indices)
    assert set(indices) <= set(range(num_frames))


# Reading


@pytest.mark.parametrize(
    ("container", "codec"), [("mp4", "mpeg4"), ("mp4", "libx264"), ("matroska", "mpeg4"), ("webm", "libvpx")]
)
def test_chosen_frames_come_back_in_order(container: str, codec: str, tmp_path: Path) -> None:
    data = clip(container=container, codec=codec)
    path = tmp_path / "clip"
    path.write_bytes(data)
    for source in (data, path, str(path)):
        assert levels(source, num_segments=5) == [1, 5, 9, 12, 16] == choose_frame_indices(20, 10.0, 5)


def test_more_segments_than_frames_repeat_frames_without_holding_copies() -> None:
    data = clip(num_frames=3)
    assert levels(data, num_segments=8) == choose_frame_indices(3, 10.0, 8)
    assert len({id(frame) for frame in load_video(data)}) == 3


def test_a_bound_limits_the_frames_and_the_decoding() -> None:
    data = clip()
    limits = VideoLimits(max_video_frames=11)
    assert levels(data, num_segments=2, bound=(0.5, 1.0), limits=limits) == [6, 8]
    assert levels(data, num_segments=3, bound=(0.0, 0.0)) == [0, 0, 0]
    assert levels(data, num_segments=1, bound=(1.9, 99.0)) == [19]


@pytest.mark.parametrize("claimed", [21, 19, 1, 0, 40_000])
def test_frames_are_counted_and_not_taken_from_the_header(claimed: int) -> None:
    data = bytearray(clip(container="avi"))
    struct.pack_into("<I", data, data.index(b"avih") + 8 + 16, claimed)
    struct.pack_into("<I", data, data.index(b"strh") + 8 + 32, claimed)
    with av.open(io.BytesIO(data)) as container:
        assert container.streams.video[0].frames == claimed
    assert levels(bytes(data), num_segments=5) == [1, 5, 9, 12, 16]


def test_frames_are_turned_as_the_container_asks() -> None:
    for rotation, black in ((90, (-1, 0)), (-90, (0, -1)), (180, (-1, -1))):
        (frame,) = load_video(clip(rotation=rotation, num_frames=20), num_segments=1)
        assert frame.size == (SIZE if rotation == 180 else SIZE[::-1])
        array = np.asarray(frame)
        assert array[black].max() < 20
        assert np.sort([array[y, x, 0] for y in (0, -1) for x in (0, -1)])[1] > 60


def test_metadata_that_is_not_utf_8_does_no_harm() -> None:
    data = clip(container="avi")
    assert data.count(b"Lavf") == 1
    assert levels(data.replace(b"Lavf", b"\xff\xfe\xc3("), num_segments=1) == [9]


def test_videos_are_read_with_the_open_of_pyav_19(monkeypatch: pytest.MonkeyPatch) -> None:
    data, av_open = clip(), av.open

    def open_of_19(file: Any, mode: str, *, options: dict[str, str]) -> Any:
        return av_open(file, mode, options=options)

    monkeypatch.setattr(av, "open", open_of_19)
    assert levels(data, num_segments=5) == [1, 5, 9, 12, 16]


# Frames that are given


def test_frames_may_be_given_as_a_list_or_as_an_array(tmp_path: Path) -> None:
    frames = np.arange(6 * 4 * 5 * 3, dtype=np.uint8).reshape(6, 4, 5, 3)
    (tmp_path / "frame.png").write_bytes(b"")
    for video in (frames, torch.from_numpy(frames), list(frames), tuple(map(Image.fromarray, frames))):
        assert np.array_equal(np.stack([np.asarray(frame) for frame in load_video(video)]), frames)
        chosen = load_video(video, num_segments=2)
        assert np.array_equal(np.asarray(chosen[1]), frames[choose_frame_indices(6, 1.0, 2)[1]])
    assert load_video([tmp_path / "frame.png"]) == [tmp_path / "frame.png"]  # read when it is opened


def test_a_file_object_is_read_as_a_video() -> None:
    file = io.BytesIO(clip())
    file.seek(5)
    assert levels(file, num_segments=5) == [1, 5, 9, 12, 16]
    assert file.tell() == 5
    assert levels(bytearray(file.getvalue()), num_segments=1) == [9]


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (3, r"got int: convert it"),
        (np.zeros((4, 5, 3), np.uint8), r"got ndarray uint8 \[4, 5, 3\]"),
        (np.zeros((2, 4, 5, 3)), r"got ndarray float64 \[2, 4, 5, 3\]"),
        (Image.new("RGB", (4, 5)), "got Image: convert it, or use an image part for a picture"),
        (np.array(5), "got ndarray: convert it"),
        (np.array(5, np.uint8), "got ndarray: convert it"),
        (torch.tensor(5), "got Tensor: convert it"),
        (np.zeros((2, 4, 5, 3), np.int8), r"got ndarray int8 \[2, 4, 5, 3\]"),
        (torch.zeros(2, 4, 5, 3, dtype=torch.uint8).to_sparse(), "got Tensor: convert it"),
        (torch.nested.nested_tensor([torch.zeros(4, 5, 3)], layout=torch.jagged), "got NestedTensor: convert it"),
        (type("Shaped", (), {"shape": (2, 4, 5, 3)})(), "got Shaped: convert it"),
        (type("Shaped", (), {"shape": 5, "dtype": "uint8"})(), "got Shaped: convert it"),
        (type("Shaped", (), {"shape": None, "__len__": lambda self: 1})(), "got Shaped: convert it"),
        ([], "a list without frames: give at least one"),
        (np.zeros((0, 4, 5, 3), np.uint8), "a list without frames: give at least one"),
    ],
)
def test_what_is_no_video_is_refused_by_its_type(source: Any, problem: str) -> None:
    for use in (load_video, lambda source: count_frames(source, None)):
        with pytest.raises(MediaError, match=problem):
            use(source)


def test_frames_of_any_form_are_counted_before_they_are_read() -> None:
    frames = np.zeros((6, 4, 5, 3), np.uint8)
    for video in (frames, torch.from_numpy(frames), list(frames)):
        assert (count_frames(video, None), count_frames(video, 2)) == (6, 2)
    for video in ("no such file", b"", io.BytesIO()):
        assert (count_frames(video, None), count_frames(video, 2)) == (32, 2)


def test_a_frame_of_any_form_is_left_to_what_opens_it() -> None:
    frames = [
        type("Shaped", (), {"shape": 5})(),
        3,
        None,
        torch.nested.nested_tensor([torch.zeros(4, 5)], layout=torch.jagged),
        np.array(1),
    ]
    assert load_video(frames) == frames


def test_frames_beyond_the_limits_are_refused_before_they_are_copied() -> None:
    shared = np.broadcast_to(np.zeros(3, np.uint8), (1000, 5000, 5000, 3))  # 75 GB, but all pixels share 3 bytes
    for video in (shared, [Image.new("RGB", (400, 400))] * 2000, list(shared[:20])):
        with pytest.raises(MediaError, match="give fewer, or raise max_video_pixels"):
            load_video(video)
    with pytest.raises(MediaError, match="give fewer, or raise max_video_frames"):
        load_video(np.zeros((3, 4, 5, 3), np.uint8), limits=VideoLimits(max_video_frames=2))
    with pytest.raises(RequestError, match="bound, in seconds"):
        load_video(np.zeros((3, 4, 5, 3), np.uint8), bound=(0.0, 1.0))


# Refusals


def test_damaged_and_foreign_files_are_refused_in_one_line(tmp_path: Path) -> None:
    data = clip()
    text = tmp_path / "text.mp4"
    text.write_text("not a video" * 100)
    assert "text.mp4' is broken or not a video" in refusal(text)
    assert "is broken or not a video" in refusal(data[: len(data) // 2])
    assert f"video bytes ({len(data) // 4} bytes)" in refusal(data[: len(data) // 4])
    assert "is empty" in refusal(b"")
    assert "does not exist" in refusal(tmp_path / "missing.mp4")
    assert "is not a regular file" in refusal(tmp_path)
    assert "has no video stream" in refusal(audio())
    assert "download it" in refusal("https://host/clip.mp4")


def test_playlists_that_name_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "clip.ts").write_bytes(clip(container="mpegts", codec="mpeg2video", rate=25))
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nclip.ts\n#EXT-X-ENDLIST\n")
    (tmp_path / "list.txt").write_text("ffconcat version 1.0\nfile clip.ts\n")
    for name in ("list.m3u8", "list.txt"):
        with av.open(str(tmp_path / name)):
            pass  # PyAV by itself opens the list
        assert "is broken or not a video" in refusal(tmp_path / name)


def test_decoders_off_the_list_are_refused() -> None:
    assert "holds jpeg2000" in refusal(clip(codec="jpeg2000"))


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (VideoLimits(max_video_frames=19), "announces 20 frames, at most 19"),
        (VideoLimits(max_frame_pixels=64 * 48 - 1), "is 64x48; at most 3071 pixels"),
        (VideoLimits(max_video_pixels=4 * 64 * 48 - 1), "hold over 12287 pixels"),
        (VideoLimits(max_decoded_video_pixels=20 * 64 * 48 - 1), "more than 61439 pixels in the frames up to its end"),
    ],
)
def test_limits_are_kept(limits: VideoLimits, expected: str) -> None:
    data = clip()
    assert expected in refusal(data, num_segments=4, limits=limits)
    enough = VideoLimits(20, 64 * 48, len(data), 4 * 64 * 48, 20 * 64 * 48)
    assert len(load_video(data, num_segments=4, limits=enough)) == 4


@pytest.mark.parametrize("values", [{"max_video_frames": 0}, {"max_video_bytes": 1.0}, {"max_video_pixels": True}])
def test_limits_out_of_range_are_refused_by_the_name_of_the_option(values: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"max_video_.* must be an integer from 1 to"):
        VideoLimits(**values)


def test_frames_beyond_the_limit_are_refused_although_the_header_hides_them() -> None:
    data = bytearray(clip(container="avi"))
    struct.pack_into("<I", data, data.index(b"strh") + 8 + 32, 5)
    assert "has more than 19 frames" in refusal(bytes(data), num_segments=1, limits=VideoLimits(max_video_frames=19))
    limits = VideoLimits(max_decoded_video_pixels=19 * 64 * 48)
    assert "raise max_decoded_video_pixels" in refusal(bytes(data), num_segments=1, limits=limits)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_segments": 0},
        {"num_segments": 1 << 40},
        {"bound": (1.0, 0.5)},
        {"bound": (0.0, math.inf)},
        {"bound": (math.nan, 1.0)},
        {"bound": (0, 10**400)},
        {"bound": (0, 1e308)},
        {"bound": (0, 200_000)},
        {"bound": "01"},
        {"bound": ()},
        {"bound": 0},
        {"bound": (2.5, 3.0)},
        {"bound": (-3.0, -1.0)},
    ],
)
def test_requests_that_select_nothing_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(arguments))):
        load_video(clip(), **arguments)


class EndedError(Exception):
    pass


def ending_after(number: int) -> tuple[list[int], Callable[[], None]]:
    """Returns a list that grows with each call of the function, which raises after some calls."""
    calls: list[int] = []

    def proceed() -> None:
        calls.append(len(calls))
        if len(calls) > number:
            raise EndedError

    return calls, proceed


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_reading_ends_between_two_frames_when_nobody_waits_any_more(codec: str) -> None:
    data, made = clip(codec=codec), list[Any]()
    assert len(load_video(data, num_segments=4, proceed=lambda: None)) == 4
    for number in (0, 5, 19):
        calls, proceed = ending_after(number)
        with pytest.raises(EndedError):
            load_video(data, num_segments=20, make=made.append, proceed=proceed)
        assert len(calls) == number + 1
    calls, proceed = ending_after(3)
    made.clear()
    with pytest.raises(EndedError):
        load_video([np.zeros((4, 5, 3), np.uint8)] * 12, make=made.append, proceed=proceed)
    assert len(made) == 3


def test_packets_that_give_no_frame_count_as_work() -> None:
    data = bytearray(clip(container="webm", codec="libvpx"))
    with av.open(io.BytesIO(data)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    for packet in packets[1:]:
        data[data.index(packet)] &= ~0x10  # VP8's flag that a frame is shown
    calls, proceed = ending_after(1000)
    limits = VideoLimits(max_decoded_video_pixels=19 * 64 * 48)
    assert "raise max_decoded_video_pixels" in refusal(bytes(data), bound=(0, 0.1), limits=limits, proceed=proceed)
    assert len(calls) == 20


def test_missing_pyav_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    data = clip()
    monkeypatch.setitem(sys.modules, "av", None)
    assert "pip install 'internvl-rt[video]'" in refusal(data)


def test_ffmpeg_writes_nothing_on_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    data = bytearray(clip(codec="libx264"))
    damaged = data.index(b"mdat") + 100
    data[damaged : damaged + 400] = bytes(range(200)) * 2
    capfd.readouterr()  # drop the encoder's own output
    assert len(load_video(bytes(data))) == 32  # the decoder conceals the damage
    refusal(bytes(data[: len(data) // 2]))
    assert capfd.readouterr().err == ""

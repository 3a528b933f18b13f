"""Reads videos as RGB frames: the official choice of frames, from a stream whose frames are counted.

Only this module imports PyAV (`av`), when a video is read.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from internvl_rt.errors import MediaError, RequestError, TranslateErrors
from internvl_rt.inputs.foreign import adopted
from internvl_rt.inputs.image import ImageSource
from internvl_rt.inputs.media import MediaSource, is_media_source, open_media
from internvl_rt.inputs.mp4 import is_mp4
from internvl_rt.inputs.proceed import Proceed, go_on
from internvl_rt.values import Integer, Kind, OrNone, Seconds, read, read_fields

if TYPE_CHECKING:
    import torch
    from av import CodecContext, VideoFrame, VideoStream
    from av.container import InputContainer

# Playlists (HLS, DASH, concat), which open further files and URLs, and rarely used decoders are left out for safety.
_OTHER_CONTAINERS = "matroska,webm,avi,mpegts,mpeg,flv,ogg,gif"
_CONTAINERS = f"mov,mp4,{_OTHER_CONTAINERS}"
_DECODERS = "h264,hevc,libdav1d,vp8,vp9,mpeg4,mpeg2video,mpeg1video,h263,flv,theora,mjpeg,prores,gif"

DEFAULT_NUM_FRAMES = 32  # as in the model cards
_WHOLE = (-100_000.0, 100_000.0)  # seconds; the official code's values for no bound
BOUND = Seconds(_WHOLE[1])

_TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


@dataclass(frozen=True, slots=True)
class VideoLimits:
    """The limits beyond which `load_video` refuses a video. Raises RequestError for a bad value."""

    max_video_frames: int = 108_000  # frames decoded up to the end, or the end of the bound: an hour at 30 per second
    max_frame_pixels: int = 1 << 25  # pixels of one frame: 8K has 33.2 million
    max_video_bytes: int = 1 << 32  # encoded; a file is not read into memory
    max_video_pixels: int = 1 << 28  # pixels of all returned frames: 32 in 4K
    max_decoded_video_pixels: int = 1 << 38  # of the frames decoded up to the same end: 132,000 in 1080p

    def __post_init__(self) -> None:
        read_fields(self, LIMIT_KINDS)


LIMIT_KINDS: dict[str, Kind] = dict.fromkeys(VideoLimits.__dataclass_fields__, Integer(1, 1 << 40))


def choose_frame_indices(
    num_frames: int, fps: float, num_segments: int = DEFAULT_NUM_FRAMES, bound: tuple[float, float] | None = None
) -> list[int]:
    """Returns the middle frame of each of `num_segments` equal spans (official `get_index`).

    num_frames: frames in the video, at least 1; the last index is num_frames - 1.
    fps: frames per second.
    num_segments: length of the result, at least 1; short videos repeat frames.
    bound: start and end in seconds, as `BOUND` reads them. A start beyond the end of the video gives indices beyond it.
    """
    start_s, end_s = bound or _WHOLE
    start = max(0, round(start_s * fps))
    end = min(round(end_s * fps), num_frames - 1)
    span = (end - start) / num_segments
    return [int(start + span / 2 + round(span * segment)) for segment in range(num_segments)]


def load_video(
    source: "MediaSource | Sequence[ImageSource] | npt.NDArray[np.uint8] | torch.Tensor",
    *,
    make: "Callable[[ImageSource], Any]" = lambda frame: frame,
    num_segments: int | None = None,
    bound: tuple[float, float] | None = None,
    limits: VideoLimits | None = None,
    proceed: Proceed = go_on,
) -> list[Any]:
    """Reads the frames that `choose_frame_indices` picks, upright, and returns what `make` makes of each, in order.

    The decoded stream decides how many frames there are: the number in the header only decides whether decoding once is
    enough. A frame is held until something is made of it, and an index that occurs twice gives the same object. Frames
    are turned as the container asks, pixels that are not square stay as they are.

    source: path, `data:` URL, encoded bytes or binary file object; or the frames themselves, as a list of pictures or a
        uint8 array or tensor [frames, height, width, 3], which `make` gets as they are.
    make: gets a PIL image of mode RGB; by default that is returned.
    num_segments: number of frames, at least 1; None is DEFAULT_NUM_FRAMES, or all frames if these were given.
    bound: start and end in seconds; by default the whole video.
    proceed: called before each frame is decoded or made something of; it may raise, which ends the reading.

    Raises MediaError if the video cannot be read, is beyond the limits, or PyAV is not installed; RequestError if
    `num_segments` or `bound` is invalid, or `bound` lies outside the video.
    """
    limits = limits or VideoLimits()
    num_segments = read("num_segments", num_segments, OrNone(Integer(1, limits.max_video_frames)))
    bound = read("bound", bound, OrNone(BOUND))
    if not is_media_source(source):
        if bound:
            raise RequestError("bound, in seconds, was given with a list of frames: choose the frames, or give a file")
        return [make(frame) for frame in _given_frames(source, num_segments, limits, proceed)]
    stream, name = open_media(source, "video", limits.max_video_bytes)
    with stream:
        with _ffmpeg_errors(name), _open_track(stream, name, limits) as (container, track):
            rate = track.average_rate or track.guessed_rate
            if not rate:
                raise MediaError(f"{name} has no frame rate: convert it to MP4")
            fps = float(rate)
            num_frames = track.frames or round((container.duration or 0) / 1e6 * fps)
            frame_pixels = track.width * track.height
        needed = max(1, round((bound or _WHOLE)[1] * fps) + 1)  # later frames cannot change the choice
        expected = min(max(1, num_frames), needed)
        if expected > limits.max_video_frames:
            raise MediaError(
                f"{name} announces {expected} frames, at most {limits.max_video_frames} are decoded: cut it, or "
                "raise max_video_frames"
            )
        if expected * frame_pixels > limits.max_decoded_video_pixels:
            raise _too_many_pixels(name, limits)
        for _ in range(2):
            chosen = choose_frame_indices(expected, fps, num_segments or DEFAULT_NUM_FRAMES, bound)
            num_frames, made = _decode(stream, name, set(chosen), needed, limits, make, proceed)
            if num_frames == expected:
                break
            expected = num_frames
    if not made.keys() >= set(chosen):
        raise RequestError(f"bound {bound} is outside of {name}, which lasts {num_frames / fps:.3f} s")
    return [made[index] for index in chosen]


def count_frames(source: Any, num_segments: int | None) -> int:
    """Returns how many frames `load_video` gives at most, known before anything is read.

    Raises MediaError for what is no video.
    """
    if is_media_source(source):
        return num_segments or DEFAULT_NUM_FRAMES
    return num_segments or len(_check_frames(source))


def _check_frames(source: Any) -> Any:
    """Returns a video that was given as a list, array or tensor of frames. Raises MediaError for anything else."""
    source = adopted(source)
    shape = _shape(source)
    is_array = len(shape) == 4 and shape[3] == 3 and str(source.dtype) in ("uint8", "torch.uint8")
    if not is_array and not isinstance(source, list | tuple):
        found = f"{type(source).__name__} {source.dtype} {list(shape)}" if shape else type(source).__name__
        raise MediaError(
            "a video must be a path, a data: URL, bytes, a binary file object, a list of frames (as for an image), or "
            f"a uint8 array [frames, height, width, 3], got {found}: convert it, or use an image part for a picture"
        )
    if not len(source):
        raise MediaError("the video is a list without frames: give at least one")
    return source


def _shape(given: Any) -> tuple[int, ...]:
    """Returns the shape of an array or a dense tensor; () for anything else."""
    torch = sys.modules.get("torch")  # a tensor can only be given by a program that has imported torch
    if not isinstance(given, np.ndarray) and (
        torch is None or not isinstance(given, torch.Tensor) or given.is_nested or given.layout != torch.strided
    ):
        return ()
    return tuple(given.shape)


def _given_frames(
    source: Any, num_segments: int | None, limits: VideoLimits, proceed: Proceed
) -> Iterator[ImageSource]:
    """Chooses from frames that were given as a list, array or tensor. Raises MediaError."""
    source = _check_frames(source)
    num_frames = len(source)
    chosen = range(num_frames) if num_segments is None else choose_frame_indices(num_frames, 1.0, num_segments)
    if len(chosen) > limits.max_video_frames:
        raise MediaError(
            f"the video has {num_frames} frames, at most {limits.max_video_frames} are read: give fewer, or raise "
            "max_video_frames"
        )
    frames = [source[index] for index in chosen]
    num_pixels = sum(map(_num_pixels, frames))
    if num_pixels > limits.max_video_pixels:
        raise MediaError(
            f"the frames of the video hold {num_pixels} pixels, at most {limits.max_video_pixels} are allowed: make "
            "them smaller, give fewer, or raise max_video_pixels"
        )
    for frame in frames:
        proceed()
        yield frame


def _num_pixels(frame: Any) -> int:
    """Returns the pixels of a picture whose size is known; that of an encoded one is checked when it is opened."""
    if isinstance(frame, Image.Image):
        return frame.width * frame.height
    shape = _shape(frame)
    return shape[0] * shape[1] if len(shape) == 3 else 0


def _decode(
    stream: BinaryIO,
    name: str,
    chosen: set[int],
    needed: int,
    limits: VideoLimits,
    make: "Callable[[ImageSource], Any]",
    proceed: Proceed,
) -> tuple[int, dict[int, Any]]:
    """Decodes at most `needed` frames; returns their number and what is made of the chosen ones among them."""
    num_frames, num_pixels, made = 0, 0, {}
    with _ffmpeg_errors(name), _open_track(stream, name, limits) as (container, track):
        for frame in _frames(container, track, name, limits, proceed):
            if num_frames in chosen:
                num_pixels += frame.width * frame.height
                if num_pixels > limits.max_video_pixels:
                    raise MediaError(
                        f"{name}: the chosen frames hold over {limits.max_video_pixels} pixels: make it smaller, take "
                        "fewer frames, or raise max_video_pixels"
                    )
                made[num_frames] = make(_to_image(frame))
            num_frames += 1
            if num_frames > limits.max_video_frames:
                raise MediaError(
                    f"{name} has more than {limits.max_video_frames} frames: cut it, or raise max_video_frames"
                )
            if num_frames == needed:
                break
    if not num_frames:
        raise MediaError(f"{name} has a video stream without frames: convert it to MP4")
    return num_frames, made


def _frames(
    container: "InputContainer", track: "VideoStream", name: str, limits: VideoLimits, proceed: Proceed
) -> Iterator["VideoFrame"]:
    """Decodes packet by packet. Each counts as a frame, since a decoder may work on packets that give none."""
    num_pixels = 0
    for packet in container.demux(track):
        proceed()
        num_pixels += track.width * track.height if packet.size else 0  # the last packet is empty
        if num_pixels > limits.max_decoded_video_pixels:
            raise _too_many_pixels(name, limits)
        yield from packet.decode()


def _too_many_pixels(name: str, limits: VideoLimits) -> MediaError:
    return MediaError(
        f"{name} has more than {limits.max_decoded_video_pixels} pixels in the frames up to its end, or that of its "
        "bound: cut it, make it smaller, or raise max_decoded_video_pixels"
    )


def _to_image(frame: "VideoFrame") -> Image.Image:
    image = Image.fromarray(frame.to_ndarray(format="rgb24"))
    turn = _TURNS.get(frame.rotation % 360)  # degrees counterclockwise, like Pillow's; 180 may come as -180
    return image if turn is None else image.transpose(turn)


def _open_container(
    av_open: "Callable[..., InputContainer]", stream: BinaryIO, options: dict[str, str]
) -> "InputContainer":
    """Opens a container whose metadata may hold bytes that are not UTF-8, which PyAV replaces by itself from 19 on."""
    try:
        return av_open(stream, "r", options=options, metadata_errors="replace")
    except TypeError:  # PyAV 19 has no such argument, and has read nothing yet
        return av_open(stream, "r", options=options)


def _ffmpeg_errors(name: str) -> TranslateErrors:
    def translate(error: BaseException) -> MediaError | None:
        import av

        if not isinstance(error, av.FFmpegError):
            return None
        return MediaError(
            f"{name} is broken or not a video in one of {_CONTAINERS} ({type(error).__name__}): convert it to MP4"
        )

    return TranslateErrors(translate)


@contextmanager
def _open_track(stream: BinaryIO, name: str, limits: VideoLimits) -> Iterator[tuple["InputContainer", "VideoStream"]]:
    """Opens the container and its main video stream, to be decoded from the first frame. Raises MediaError."""
    try:
        import av
    except ImportError as error:
        raise MediaError("reading videos needs PyAV: pip install 'internvl-rt[video]'") from error
    containers = _CONTAINERS if is_mp4(stream, name) else _OTHER_CONTAINERS
    stream.seek(0)
    options = {
        "format_whitelist": containers,
        "codec_whitelist": _DECODERS,
        # Stops frames that grow during decoding; FFmpeg counts their padding, hence the slack.
        "max_pixels": str(2 * limits.max_frame_pixels + (1 << 16)),
    }
    with _open_container(av.open, stream, options) as container:
        track = container.streams.best("video")
        if not isinstance(track, av.VideoStream):
            raise MediaError(f"{name} has no video stream: give a video, or an image part for a picture")
        context: CodecContext | None = track.codec_context  # None if FFmpeg has no decoder
        if context is None or context.codec.name not in _DECODERS.split(","):
            codec = context.codec.name if context else "an unknown codec"
            raise MediaError(f"{name} holds {codec}, which is not among {_DECODERS}: convert it to H.264")
        if track.width * track.height > limits.max_frame_pixels:
            raise MediaError(
                f"{name} is {track.width}x{track.height}; at most {limits.max_frame_pixels} pixels are allowed: make "
                "it smaller, or raise max_frame_pixels"
            )
        context.options = options  # the options of `open` only reach the decoders that probe the file
        track.thread_type = "AUTO"
        yield container, track

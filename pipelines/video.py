"""All codec code: opening and probing videos, and the stored clips."""

import io
import itertools
import math
import platform
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import av
import cv2
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from av.video.stream import VideoStream

GOP = 16
PORTABLE_ASM = ":asm=SSE2" if platform.machine() in ("x86_64", "AMD64") else ""
"""x264's newer code paths are not the same bit for bit: AVX-512 gave other bytes in 64 of 2,400 encodings of the same
frames (core 165), AVX2 and SSE4.2 steady ones that differ from plain C's. SSE2 equals C, and costs 12% of encoding."""
QUICK = ":subme=0:me=dia:weightp=0:ref=2"
"""A bit over half of veryfast's time to encode, for about the same bytes and PSNR (tests/benchmarks/bench_clips.py)."""
JPEG = {"qmin": "2", "qmax": "2"}
RAW, RAW_HEAD = b"LWRZ", struct.Struct("<4s4I")
SCALING = Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.BITEXACT  # the same on every machine
BLACK = np.array([16, 128, 128], np.uint8)[:, None, None]
Source = Path | str | IO[bytes]


class VideoError(ValueError):
    """A file that can't be used, with the short reason that goes to the ledger."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Probe:
    """What a file says about itself, before any frame is decoded."""

    codec: str
    width_px: int
    height_px: int
    rotation: int
    fps: float
    duration_s: float


def open_video(path: Source) -> tuple[InputContainer, VideoStream]:
    """Opens the first real video stream (cover pictures are not one), decoding in one thread.

    Raises:
        VideoError: not a video (`unreadable`), or no moving pictures in it (`no_video`).
    """
    try:
        container = av.open(path, mode="r", metadata_errors="ignore")
    except (FFmpegError, OSError, ValueError) as error:
        raise VideoError("unreadable", plain(error)) from error
    cover = av.stream.Disposition.attached_pic
    streams = [s for s in container.streams.video if not s.disposition & cover]
    if not streams:
        container.close()
        raise VideoError("no_video", "the file has no video stream")
    stream = streams[0]
    if stream.codec_context.name in ("ansi", "bintext", "xbin", "idf"):
        container.close()
        raise VideoError("unreadable", f"text, not video ({stream.codec_context.name})")
    stream.thread_type = "NONE"
    stream.codec_context.thread_count = 1
    return container, stream


def probe(path: Source) -> Probe:
    """Reads the headers.

    Raises:
        VideoError: see `open_video`.
    """
    container, stream = open_video(path)
    with container:
        return headers(container, stream)


def headers(container: InputContainer, stream: VideoStream) -> Probe:
    """What an open file says about itself."""
    context = stream.codec_context
    duration = container.duration / 1e6 if container.duration else 0.0
    if not duration and stream.duration and stream.time_base:
        duration = float(stream.duration * stream.time_base)
    rate = float(stream.average_rate or 0)
    return Probe(context.name, context.width, context.height, 0, rate, duration)


def plain(error: BaseException) -> str:
    """What went wrong, on one line."""
    text = (error.strerror if isinstance(error, FFmpegError | OSError) else None) or str(error)
    return text.split("; last error log")[0].replace("\n", " ")[:200]


# -- stored clips ------------------------------------------------------------------------------------------------


# BT.601, limited range, as players assume for small pictures. Done here and not by swscale: it is the same bit for bit
# on every machine and twice as fast.
_TO_YUV = np.array([[65.481, 128.553, 24.966], [-37.797, -74.203, 112.0], [112.0, -93.786, -18.214]]) / 255
_OFFSET = np.array([[16.0], [128.0], [128.0]])
_RGB_TO_YUV = np.hstack([_TO_YUV, _OFFSET])
_YUV_TO_RGB = np.hstack([np.linalg.inv(_TO_YUV), -np.linalg.inv(_TO_YUV) @ _OFFSET])
_GREY = np.clip(np.rint((np.arange(256) - 16.0) * 255 / 219), 0, 255).astype(np.uint8)


def colours(planes: np.ndarray) -> np.ndarray:
    """Planes uint8 (3, H, W) as a picture in red, green and blue (H, W, 3)."""
    return cv2.transform(cv2.merge([*planes]), _YUV_TO_RGB)


def split_planes(picture: np.ndarray) -> np.ndarray:
    """A picture uint8 (H, W, 3) in red, green and blue as planes (3, H, W)."""
    return np.stack(cv2.split(cv2.transform(picture, _RGB_TO_YUV)))


def brightness(planes: np.ndarray) -> np.ndarray:
    """Luma of planes uint8 (T, 3, H, W) in full range 0..255: uint8 (T, H, W)."""
    return cv2.LUT(planes[:, 0].reshape(len(planes), -1), _GREY).reshape(len(planes), *planes.shape[2:])


def encode_clip(frames: np.ndarray, *, fps: int = 10, codec: str = "h264_444", crf: int = 15) -> bytes:
    """Frames uint8 (T, H, W, 3) to a stored clip, see `encode_planes`."""
    return encode_planes(np.stack([split_planes(f) for f in frames]), fps=fps, codec=codec, crf=crf)


def encode_planes(planes: np.ndarray, *, fps: int, codec: str, crf: int) -> bytes:
    """Planes uint8 (T, 3, H, W) to a stored clip.

    `h264_444` and `h264_420` are mp4 files of x264, with a key frame every 16 and no B-frames, for cheap windows;
    `jpeg444` is an mp4 of JPEG pictures; `raw_zstd` is lossless and our own: a head, then the planes, compressed.
    """
    if codec == "raw_zstd":
        from pyarrow import compress

        return RAW_HEAD.pack(RAW, *planes.shape) + compress(planes.tobytes(), codec="zstd", asbytes=True)
    target = io.BytesIO()
    frames = (VideoFrame.from_ndarray(p, format="yuv444p") for p in planes)
    if codec == "h264_444":
        _encode(target, frames, fps, "yuv444p", crf, GOP)
        return target.getvalue()
    pixels, ranged = {"h264_420": ("yuv420p", ColorRange.MPEG), "jpeg444": ("yuvj444p", ColorRange.JPEG)}[codec]
    scaler = VideoReformatter()
    frames = (
        scaler.reformat(
            f, format=pixels, interpolation=SCALING, threads=1, src_color_range=ColorRange.MPEG, dst_color_range=ranged
        )
        for f in frames
    )
    _encode(target, frames, fps, pixels, crf, 1 if codec == "jpeg444" else GOP)
    return target.getvalue()


def write_video(path: Path, frames: Iterable[np.ndarray], fps: int, *, crf: int = 18) -> None:
    """Writes frames uint8 (H, W, 3) as an ordinary H.264 mp4 (4:2:0), as players expect it."""
    with path.open("wb") as file:
        _encode(file, _converted(frames), fps, "yuv420p", crf, 250)


def _converted(frames: Iterable[np.ndarray]) -> Iterator[VideoFrame]:
    """4:2:0 pictures; the same array again (a game slower than the video) is converted once."""
    shown: np.ndarray | None = None
    picture = VideoFrame(2, 2)
    for frame in frames:
        if frame is not shown:
            shown = frame
            rgb = VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture = rgb.reformat(format="yuv420p")
        yield picture


def _encode(target: IO[bytes], pictures: Iterable[VideoFrame], fps: int, pixels: str, crf: int, gop: int) -> None:
    """An mp4 of x264, or of JPEG pictures where each stands alone."""
    frames = iter(pictures)
    first = next(frames)
    x264 = f"keyint={gop}:min-keyint={min(gop, 16)}:open-gop=0:bframes=0:threads=1{PORTABLE_ASM}"
    options = {"crf": str(crf), "preset": "superfast", "x264-params": x264}
    if gop == GOP:
        options |= {"preset": "veryfast", "x264-params": x264 + ":scenecut=0" + QUICK}
    with av.open(target, mode="w", format="mp4") as container:
        kind, options = ("mjpeg", JPEG) if gop == 1 else ("libx264", options)
        stream: Any = container.add_stream(kind, rate=Fraction(fps), options=options)
        stream.width, stream.height, stream.pix_fmt = first.width, first.height, pixels
        stream.thread_type = "NONE"
        for number, frame in enumerate(itertools.chain([first], frames)):
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def decode_clip(data: bytes, start: int = 0, count: int | None = None) -> np.ndarray:
    """Frames of a stored clip of any codec, uint8 (T, H, W, 3), from `start`; seeks to the key frame before it.

    Raises:
        VideoError: the bytes are no clip, or it has fewer frames.
    """
    if data[: len(RAW)] == RAW:
        return _decode_raw(data, start, count)
    container, stream = open_video(io.BytesIO(data))
    with container:
        stop = _stop(start, count, stream.frames)
        if not stream.average_rate or not stream.time_base:
            raise VideoError("unreadable", "a clip without a rate")
        ticks = float(1 / (stream.average_rate * stream.time_base))
        if start >= GOP:
            container.seek(int(start * ticks), stream=stream, backward=True)
        out: list[np.ndarray] = []
        scaler = VideoReformatter()
        for frame in container.decode(stream):
            if frame.pts is not None and round(frame.pts / ticks) >= start:
                out.append(_rgb(frame, scaler))
            if len(out) == stop - start:
                break
    if len(out) != stop - start:
        raise VideoError("damaged", f"a clip gave {len(out)} of {stop - start} frames")
    return np.stack(out)


def _stop(start: int, count: int | None, total: int) -> int:
    stop = total if count is None else start + count
    if not 0 <= start < stop <= total:
        raise VideoError("out_of_range", f"frames {start}..{stop} of a clip with {total}")
    return stop


def _decode_raw(data: bytes, start: int, count: int | None) -> np.ndarray:
    from pyarrow import ArrowException, decompress

    try:
        _, *shape = RAW_HEAD.unpack_from(data)
        whole = decompress(memoryview(data)[RAW_HEAD.size :], math.prod(shape), codec="zstd", asbytes=True)
        planes = np.frombuffer(whole, np.uint8).reshape(shape)
    except (struct.error, OSError, ArrowException, ValueError) as error:
        raise VideoError("damaged", plain(error)) from error
    return np.stack([colours(p) for p in planes[start : _stop(start, count, len(planes))]])


def _rgb(frame: VideoFrame, scaler: VideoReformatter) -> np.ndarray:
    if frame.format.name != "yuv444p":
        return scaler.reformat(frame, format="rgb24", interpolation=SCALING, threads=1).to_ndarray()
    rows = [np.frombuffer(memoryview(p), np.uint8).reshape(p.height, -1)[:, : p.width] for p in frame.planes]
    return cv2.transform(cv2.merge(rows), _YUV_TO_RGB)


def strip(frames: list[np.ndarray], quality: int = 70) -> bytes:
    """A contact strip: frames (H, W, 3) side by side as one JPEG."""
    if not frames:
        return b""
    ok, data = cv2.imencode(".jpg", np.hstack(frames)[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    return data.tobytes() if ok else b""

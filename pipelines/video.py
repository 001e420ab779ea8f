"""All codec code: probing, sampling by timestamp, and the stored clips."""

import io
import itertools
import math
import platform
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import IO, Any, Literal

import av
import cv2
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation
from av.video.stream import VideoStream

TOLERANCE_S = 0.001  # Matroska keeps milliseconds
GOP = 16
PORTABLE_ASM = ":asm=SSE2" if platform.machine() in ("x86_64", "AMD64") else ""
"""x264's newer code paths are not the same bit for bit: AVX-512 gave other bytes in 64 of 2,400 encodings of the same
frames (core 165), AVX2 and SSE4.2 steady ones that differ from plain C's. SSE2 equals C, and costs 12% of encoding."""
Source = Path | str | IO[bytes]
Aspect = Literal["pad", "crop", "stretch"]


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


@dataclass
class Slot:
    """One sampled frame: what was on screen at `index / fps` seconds."""

    index: int
    frame: np.ndarray
    held: bool
    gap_s: float


@dataclass
class Tally:
    """Counts of what the decoder met; grows while slots are drawn."""

    frames: int = 0
    corrupt: int = 0
    stopped: str = ""
    cuts_s: list[float] = field(default_factory=list)


def open_video(path: Source) -> tuple[InputContainer, VideoStream]:
    """Opens the first real video stream (cover pictures are not one), decoding in one thread.

    Raises:
        VideoError: not a video (`unreadable`), or no moving pictures in it (`no_video`).
    """
    try:
        container = av.open(path, mode="r", metadata_errors="ignore")
    except (FFmpegError, OSError, ValueError) as error:
        raise VideoError("unreadable", _plain(error)) from error
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
        return _probe(container, stream)


def _probe(container: InputContainer, stream: VideoStream) -> Probe:
    context = stream.codec_context
    duration = container.duration / 1e6 if container.duration else 0.0
    if not duration and stream.duration and stream.time_base:
        duration = float(stream.duration * stream.time_base)
    rate = float(stream.average_rate or 0)
    return Probe(context.name, context.width, context.height, 0, rate, duration)


def _plain(error: BaseException) -> str:
    text = (error.strerror if isinstance(error, FFmpegError | OSError) else None) or str(error)
    return text.split("; last error log")[0].replace("\n", " ")[:200]


# -- sampling ----------------------------------------------------------------------------------------------------


class Sampler:
    """Shows a source video at a fixed rate and size.

    Slot k is the last frame with a time of at most `first + k / fps`: by timestamps, holding the frame on screen, so
    that variable rates come out right (`average_rate` lies on them). Cuts are looked for at the source's own rate.

    Attributes:
        tally: what was met so far.
        probe: the file's headers; `rotation` is known once a frame is decoded.
    """

    def __init__(self, path: Source, *, fps: int, width_px: int, height_px: int, aspect: Aspect) -> None:
        self.container, self.stream = open_video(path)
        self.probe = _probe(self.container, self.stream)
        self.fps, self.width_px, self.height_px, self.aspect = fps, width_px, height_px, aspect
        self.tally = Tally()
        self._cuts = CutDetector()

    def slots(self) -> Iterator[Slot]:
        """Every slot in order; closes the file at the end.

        Raises:
            VideoError: nothing at all could be decoded (`undecodable`).
        """
        with self.container:
            index = 0
            for frame, start_s, end_s in self._spans():
                last = self.slot_of(end_s)
                if last <= index:
                    continue
                picture = self._picture(frame)
                for k in range(index, last):
                    yield Slot(k, picture, held=k > index, gap_s=end_s - start_s)
                index = last
        if not self.tally.frames:
            raise VideoError("undecodable", self.tally.stopped or "no frame could be decoded")

    def slot_of(self, time_s: float) -> int:
        """The first slot that shows what appears at a time."""
        return math.ceil((time_s - TOLERANCE_S) * self.fps)

    def _spans(self) -> Iterator[tuple[VideoFrame, float, float]]:
        """Each frame with the seconds, from the first frame's time, that it appears and disappears at."""
        before: VideoFrame | None = None
        first = start_s = 0.0
        for frame in self._frames():
            time_s = float(frame.pts * frame.time_base) if frame.pts is not None and frame.time_base else None
            if before is None:
                first = time_s or 0.0
            else:
                now_s = time_s - first if time_s is not None else start_s + self._frame_s()
                if now_s <= start_s:
                    continue
                yield before, start_s, now_s
                start_s = now_s
            if self._cuts.seen(frame):
                self.tally.cuts_s.append(round(start_s, 4))
            before = frame
        if before is not None:
            yield before, start_s, start_s + self._frame_s()

    def _frame_s(self) -> float:
        return 1.0 / self.probe.fps if self.probe.fps else 1.0 / self.fps

    def _frames(self) -> Iterator[VideoFrame]:
        """Frames in order of presentation; damage is counted, and ends a file only when the demuxer gives up."""
        try:
            for packet in self.container.demux(self.stream):
                try:
                    frames = packet.decode()
                except FFmpegError as error:
                    if isinstance(error, MemoryError):
                        raise
                    self.tally.corrupt += 1
                    self.tally.stopped = _plain(error)
                    continue
                for frame in frames:
                    self.tally.frames += 1
                    self.tally.corrupt += frame.is_corrupt or bool(packet.is_corrupt)
                    yield frame
        except FFmpegError as error:
            self.tally.stopped = _plain(error)

    def _picture(self, frame: VideoFrame) -> np.ndarray:
        """Scaled by area, turned by the display matrix, padded or cropped: uint8 (H, W, 3)."""
        turns = (round(frame.rotation / 90)) % 4
        high, wide = (frame.width, frame.height) if turns % 2 else (frame.height, frame.width)
        height, width = self._inner(high, wide)
        stored = (height, width) if turns % 2 == 0 else (width, height)
        small = frame.reformat(width=stored[1], height=stored[0], format="rgb24", interpolation=Interpolation.AREA)
        return fit(np.rot90(small.to_ndarray(), turns), self.height_px, self.width_px)

    def _inner(self, high: int, wide: int) -> tuple[int, int]:
        if self.aspect == "stretch":
            return self.height_px, self.width_px
        choose = min if self.aspect == "pad" else max
        factor = choose(self.height_px / high, self.width_px / wide)
        return max(2, round(high * factor)), max(2, round(wide * factor))


def fit(picture: np.ndarray, height_px: int, width_px: int) -> np.ndarray:
    """Centres a picture (H, W, 3) on a canvas: black bars where it is smaller, cut where it is larger."""
    high, wide = picture.shape[:2]
    if (high, wide) == (height_px, width_px):
        return np.ascontiguousarray(picture)
    top, left = max(0, (high - height_px) // 2), max(0, (wide - width_px) // 2)
    picture = picture[top : top + height_px, left : left + width_px]
    canvas = np.zeros((height_px, width_px, 3), np.uint8)
    y, x = (height_px - picture.shape[0]) // 2, (width_px - picture.shape[1]) // 2
    canvas[y : y + picture.shape[0], x : x + picture.shape[1]] = picture
    return canvas


class CutDetector:
    """Finds jumps of the whole picture at the source's rate, on a coarse grid of the luma plane (no conversion).

    A cut is a mean difference of at least `floor` levels that is also `ratio` times the largest of the last few
    changes, so that steady fast scrolling is none. Two in a row are motion, not cuts.
    """

    def __init__(self, floor: float = 20.0, ratio: float = 2.5, memory: int = 8) -> None:
        self.floor, self.ratio = floor, ratio
        self._before: np.ndarray | None = None
        self._recent: deque[float] = deque(maxlen=memory)
        self._was_cut = False

    def seen(self, frame: VideoFrame) -> bool:
        """Takes the next source frame; true if a cut lies before it."""
        grid = luma_grid(frame)
        before, self._before = self._before, grid
        if before is None or before.shape != grid.shape:
            return before is not None
        change = float(np.abs(grid - before).mean())
        if change == 0.0:  # a repeated frame says nothing of the motion
            return False
        jump = change >= max(self.floor, self.ratio * max(self._recent, default=change))
        cut = jump and not self._was_cut
        if not cut:
            self._recent.append(change)
        self._was_cut = cut
        return cut


def luma_grid(frame: VideoFrame, points: int = 24) -> np.ndarray:
    """About points x points samples of brightness, float32 0..255, straight from the first plane."""
    plane = frame.planes[0]
    deep = frame.format.components[0].bits > 8
    wide = np.frombuffer(memoryview(plane), np.uint16 if deep else np.uint8).reshape(plane.height, -1)
    step_y, step_x = max(1, plane.height // points), max(1, plane.width // points)
    grid = wide[step_y // 2 :: step_y, step_x // 2 : plane.width : step_x].astype(np.float32)
    return grid / (1 << (frame.format.components[0].bits - 8)) if deep else grid


# -- stored clips ------------------------------------------------------------------------------------------------


# BT.601, limited range, as players assume for small pictures. Done here and not by swscale: it is the same bit for bit
# on every machine and twice as fast.
_TO_YUV = np.array([[65.481, 128.553, 24.966], [-37.797, -74.203, 112.0], [112.0, -93.786, -18.214]]) / 255
_OFFSET = np.array([[16.0], [128.0], [128.0]])
_RGB_TO_YUV = np.hstack([_TO_YUV, _OFFSET])
_YUV_TO_RGB = np.hstack([np.linalg.inv(_TO_YUV), -np.linalg.inv(_TO_YUV) @ _OFFSET])


def encode_clip(frames: np.ndarray, *, fps: int = 10, codec: str = "h264_444", crf: int = 15) -> bytes:
    """Frames uint8 (T, H, W, 3) to an mp4: x264, a key frame every 16, no B-frames, so that windows are cheap."""
    target = io.BytesIO()
    if codec == "h264_444":
        planes = (np.moveaxis(cv2.transform(f, _RGB_TO_YUV), 2, 0) for f in frames)
        pictures = (VideoFrame.from_ndarray(np.ascontiguousarray(p, np.uint8), format="yuv444p") for p in planes)
    else:
        pictures = (VideoFrame.from_ndarray(f, format="rgb24") for f in frames)
    _encode(target, pictures, fps, "yuv444p" if codec == "h264_444" else "yuv420p", crf, GOP)
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
    frames = iter(pictures)
    first = next(frames)
    x264 = f"keyint={gop}:min-keyint={min(gop, 16)}:open-gop=0:bframes=0:threads=1"
    preset = "veryfast" if gop == GOP else "superfast"
    x264 += PORTABLE_ASM
    options = {"crf": str(crf), "preset": preset, "x264-params": x264 + (":scenecut=0" if gop == GOP else "")}
    with av.open(target, mode="w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=Fraction(fps), options=options)
        stream.width, stream.height, stream.pix_fmt = first.width, first.height, pixels
        stream.thread_type = "NONE"
        for number, frame in enumerate(itertools.chain([first], frames)):
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def decode_clip(data: bytes, start: int = 0, count: int | None = None) -> np.ndarray:
    """Frames of a stored clip, uint8 (T, H, W, 3), from `start`; seeks to the key frame before it.

    Raises:
        VideoError: the bytes are no clip, or it has fewer frames.
    """
    container, stream = open_video(io.BytesIO(data))
    with container:
        total = stream.frames
        stop = total if count is None else start + count
        if not 0 <= start < stop <= total:
            raise VideoError("out_of_range", f"frames {start}..{stop} of a clip with {total}")
        rate, base = stream.average_rate, stream.time_base
        if rate is None or base is None:
            raise VideoError("unreadable", "a clip without a rate")
        if start >= GOP:
            container.seek(int(start / rate / base), stream=stream, backward=True)
        out: list[np.ndarray] = []
        for frame in container.decode(stream):
            index = round(frame.pts * base * rate) if frame.pts is not None else -1
            if index >= start:
                out.append(_rgb(frame))
            if len(out) == stop - start:
                break
    if len(out) != stop - start:
        raise VideoError("damaged", f"a clip gave {len(out)} of {stop - start} frames")
    return np.stack(out)


def _rgb(frame: VideoFrame) -> np.ndarray:
    if frame.format.name != "yuv444p":
        return frame.to_ndarray(format="rgb24")
    return cv2.transform(np.ascontiguousarray(np.moveaxis(frame.to_ndarray(), 0, 2)), _YUV_TO_RGB)


def strip(frames: list[np.ndarray], quality: int = 70) -> bytes:
    """A contact strip: frames (H, W, 3) side by side as one JPEG."""
    if not frames:
        return b""
    ok, data = cv2.imencode(".jpg", np.hstack(frames)[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    return data.tobytes() if ok else b""

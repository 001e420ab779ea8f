"""A source video as clips show it: sampled by timestamp with hold, scaled, turned, cropped; cuts found on the way."""

import contextlib
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from av.error import FFmpegError
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from pipelines.video import BLACK, SCALING, Source, VideoError, colours, headers, open_video, plain

TOLERANCE_S = 0.001001  # Matroska keeps milliseconds; the rest is for sums of floats
SEEK_BACK_S = (1.0, 20.0, 200.0)
BAR_PICTURES, BAR_LEVEL, BAR_LIT_SHARE = 4, 24, 0.01
Aspect = Literal["pad", "crop", "stretch"]


@dataclass
class Slot:
    """One sampled frame: what was on screen at `index / fps` seconds.

    `planes` are what a clip stores, uint8 (3, H, W): luma and both chromas in full size, BT.601, limited range.
    """

    index: int
    planes: np.ndarray
    held: bool
    gap_s: float

    @property
    def frame(self) -> np.ndarray:
        """The picture in colours, uint8 (H, W, 3)."""
        return colours(self.planes)


@dataclass
class Tally:
    """Counts of what the decoder met; grows while slots are drawn."""

    frames: int = 0
    corrupt: int = 0
    stopped: str = ""
    cuts_s: list[float] = field(default_factory=list)


class Sampler:
    """Shows a source video at a fixed rate and size.

    Slot k is the last frame with a time of at most `first + k / fps`: by timestamps, holding the frame on screen, so
    that variable rates come out right (`average_rate` lies on them). Cuts are looked for at the source's own rate,
    from each `begin_clip` on, so that what is said of a clip does not depend on where decoding began.

    Attributes:
        tally: what was met so far.
        probe: the file's headers.
        bars_px: rows above and below, and columns left and right, that are cut off before scaling.
        shape: width of the shown picture (turned, without bars) for each pixel of its height.
    """

    def __init__(
        self,
        path: Source,
        *,
        fps: int,
        width_px: int,
        height_px: int,
        aspect: Aspect,
        bars_px: tuple[int, int] = (0, 0),
    ) -> None:
        self.container, self.stream = open_video(path)
        self.probe = headers(self.container, self.stream)
        self.fps, self.width_px, self.height_px, self.aspect, self.bars_px = fps, width_px, height_px, aspect, bars_px
        self.shape = 0.0
        self.tally = Tally()
        self._before_clip = Tally()
        self._cuts = CutDetector()
        self._scaler = VideoReformatter()  # one for all frames: making it costs more than using it
        self._tick_s = float(self.stream.time_base or 0)
        self._origin_s = 0.0

    def slots(self, first: int = 0) -> Iterator[Slot]:
        """Every slot in order from `first` on, the same whether those before were drawn; closes the file at the end.

        Raises:
            VideoError: nothing at all could be decoded (`undecodable`).
        """
        index: int | None = None
        with self.container:
            for frame, start_s, end_s in self._spans(first):
                index = self.slot_of(start_s) if index is None else index
                last = self.slot_of(end_s)
                if self._cuts.seen(frame):
                    self.tally.cuts_s.append(round(start_s, 4))
                if index < first:
                    self.begin_clip()
                if last > max(index, first):
                    picture = self._picture(frame)
                    for k in range(max(index, first), last):
                        yield Slot(k, picture, held=k > index, gap_s=end_s - start_s)
                index = max(index, last)
        if not self.tally.frames:
            raise VideoError("undecodable", self.tally.stopped or "no frame could be decoded")

    def begin_clip(self) -> None:
        """Forgets cuts and damage met so far, for what is said of the clip that begins with the next slot."""
        self._cuts.restart()
        self.tally.cuts_s.clear()
        self._before_clip = replace(self.tally)

    def clip_corrupt_share(self) -> float:
        """Share of source frames that were damaged or lost since the clip began."""
        return corrupt_share(self.tally, self._before_clip)

    def slot_of(self, time_s: float) -> int:
        """The first slot that shows what appears at a time."""
        return math.ceil((time_s - TOLERANCE_S) * self.fps)

    def _spans(self, first: int) -> Iterator[tuple[VideoFrame, float, float]]:
        """Each frame with the seconds, from the file's first frame, that it appears and disappears at."""
        before: VideoFrame | None = None
        start_s = 0.0
        for frame in self._frames_for(first):
            time_s = self._time_s(frame)
            if before is None:
                start_s = time_s or 0.0
            else:
                now_s = time_s if time_s is not None else start_s + self._frame_s()
                if now_s <= start_s:
                    continue
                yield before, start_s, now_s
                start_s = now_s
            before = frame
        if before is not None:
            yield before, start_s, start_s + self._frame_s()

    def _time_s(self, frame: VideoFrame) -> float | None:
        return frame.pts * self._tick_s - self._origin_s if frame.pts is not None and self._tick_s else None

    def _frame_s(self) -> float:
        return 1.0 / self.probe.fps if self.probe.fps else 1.0 / self.fps

    def _frames_for(self, first: int) -> Iterator[VideoFrame]:
        """All frames from one on that is shown before slot `first`; from the file's first where it can't be sought."""
        frames = self._frames()
        head = next(frames, None)
        if head is None:
            return
        self._origin_s = self._time_s(head) or 0.0
        found = self._sought(first, head)
        if found is not None:
            head, frames, self.tally = found, self._frames(), Tally(frames=1)
        yield head
        yield from frames

    def _sought(self, first: int, head: VideoFrame) -> VideoFrame | None:
        """A frame that shows well before a slot, and the file is there; None if the file stands at its head."""
        if first == 0 or self._time_s(head) is None:
            return None
        for back_s in SEEK_BACK_S:
            time_s = first / self.fps - back_s
            if time_s <= 0:
                break
            with contextlib.suppress(FFmpegError):
                self.container.seek(int((time_s + self._origin_s) / self._tick_s), stream=self.stream)
                found = next(self._frames(), None)
                shown_s = self._time_s(found) if found is not None else None
                if shown_s is not None and 0 <= shown_s <= time_s + TOLERANCE_S:
                    return found
        self.container.close()
        self.container, self.stream = open_video(self.container.name)
        return next(self._frames(), None)

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
                    self.tally.stopped = plain(error)
                    continue
                for frame in frames:
                    self.tally.frames += 1
                    self.tally.corrupt += frame.is_corrupt or packet.is_corrupt
                    yield frame
        except FFmpegError as error:
            self.tally.stopped = plain(error)

    def _picture(self, frame: VideoFrame) -> np.ndarray:
        """Scaled by area, turned by the display matrix, without bars, padded or cropped: planes (3, H, W)."""
        turned = round(frame.rotation / 90) % 2 == 1
        same = (frame.width, frame.height) == (self.probe.width_px, self.probe.height_px)
        bar_y, bar_x = self.bars_px if same else (0, 0)
        high, wide = frame.height - 2 * bar_y, frame.width - 2 * bar_x
        self.shape = high / wide if turned else wide / high
        inner = self._inner(wide, high)[::-1] if turned else self._inner(high, wide)
        small = self._scaler.reformat(
            frame,
            width=round(inner[1] * frame.width / wide),
            height=round(inner[0] * frame.height / high),
            format="yuv444p",
            interpolation=SCALING,
            threads=1,
            dst_colorspace=Colorspace.ITU601,
            dst_color_range=ColorRange.MPEG,
        )
        planes = fit(small.to_ndarray(), *inner)
        return fit(np.rot90(planes, round(frame.rotation / 90), axes=(1, 2)), self.height_px, self.width_px)

    def _inner(self, high: int, wide: int) -> tuple[int, int]:
        if self.aspect == "stretch":
            return self.height_px, self.width_px
        choose = min if self.aspect == "pad" else max
        factor = choose(self.height_px / high, self.width_px / wide)
        return max(2, round(high * factor)), max(2, round(wide * factor))


def corrupt_share(now: Tally, before: Tally) -> float:
    """Share of source frames that were damaged or lost since an earlier tally."""
    return min(1.0, (now.corrupt - before.corrupt) / max(1, now.frames - before.frames))


def find_bars(path: Path) -> tuple[int, int]:
    """Black bars of a whole video, from pictures all over it: rows above (as many below), columns left (as right).

    Fewer than `BAR_PICTURES` different pictures, or bars on one side only, are not enough to cut anything off.
    """
    container, stream = open_video(path)
    lit: dict[int, np.ndarray] = {}
    with container, contextlib.suppress(FFmpegError):
        length = stream.duration or int((container.duration or 0) / 1e6 / float(stream.time_base or 1))
        for n in range(2 * BAR_PICTURES):
            container.seek((stream.start_time or 0) + length * (2 * n + 1) // (4 * BAR_PICTURES), stream=stream)
            frame = next(container.decode(stream), None)
            if frame is not None and frame.pts is not None:
                lit[frame.pts] = frame.to_ndarray(format="gray") > BAR_LEVEL
    if len(lit) < BAR_PICTURES or len({picture.shape for picture in lit.values()}) > 1:
        return 0, 0
    pictures = np.stack([*lit.values()])
    return _bar(pictures.mean(axis=2).max(axis=0)), _bar(pictures.mean(axis=1).max(axis=0))


def _bar(lit: np.ndarray) -> int:
    """Length of the dark ends of a profile (n,) of lit shares; 0 if it is hardly any, or nearly all."""
    inside = np.flatnonzero(lit > BAR_LIT_SHARE)
    bar = min(int(inside[0]), len(lit) - 1 - int(inside[-1])) if len(inside) else 0
    return bar if len(lit) / 50 <= bar <= len(lit) * 0.4 else 0


def fit(planes: np.ndarray, height_px: int, width_px: int) -> np.ndarray:
    """Centres planes (3, H, W) on a canvas: black bars where they are smaller, cut where they are larger."""
    high, wide = planes.shape[1:]
    if (high, wide) == (height_px, width_px):
        return np.ascontiguousarray(planes)
    top, left = max(0, (high - height_px) // 2), max(0, (wide - width_px) // 2)
    planes = planes[:, top : top + height_px, left : left + width_px]
    canvas = np.empty((3, height_px, width_px), np.uint8)
    canvas[:] = BLACK
    y, x = (height_px - planes.shape[1]) // 2, (width_px - planes.shape[2]) // 2
    canvas[:, y : y + planes.shape[1], x : x + planes.shape[2]] = planes
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
        self._was_cut = True  # what comes first is no cut

    def restart(self) -> None:
        """Forgets the motion so far, but not the frame seen last."""
        self._recent.clear()
        self._was_cut = False

    def seen(self, frame: VideoFrame) -> bool:
        """Takes the next source frame; true if a cut lies before it."""
        grid = luma_grid(frame)
        before, self._before = self._before, grid
        if before is None or before.shape != grid.shape:
            return before is not None
        change = cv2.mean(cv2.absdiff(grid, before))[0]
        if change == 0.0:  # a repeated frame says nothing of the motion
            return False
        jump = change >= max(self.floor, self.ratio * max(self._recent, default=0.0))
        cut = jump and not self._was_cut
        if not cut:
            self._recent.append(change)
        self._was_cut = cut
        return cut


def luma_grid(frame: VideoFrame, points: int = 24) -> np.ndarray:
    """About points x points samples of brightness, uint8, straight from the first plane."""
    plane = frame.planes[0]
    spare = frame.format.components[0].bits - 8
    wide = np.frombuffer(memoryview(plane), np.uint16 if spare > 0 else np.uint8).reshape(plane.height, -1)
    step_y, step_x = max(1, plane.height // points), max(1, plane.width // points)
    grid = wide[step_y // 2 :: step_y, step_x // 2 : plane.width : step_x]
    return (grid >> spare).astype(np.uint8) if spare > 0 else grid.copy()

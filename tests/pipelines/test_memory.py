"""What a worker and its decoding child take at most: the same for three minutes and for two hours of 1080p."""

import contextlib
import os
import threading
from fractions import Fraction
from pathlib import Path

import av
import cv2
import pytest

from pipelines.config import CurateConfig, FilterConfig, RulesConfig
from pipelines.curate import curate
from pipelines.video import write_video
from tests.pipelines.footage import scroll, sidecar

LIMIT_BYTES = 600e6
FPS = 5


def film(path, minutes):
    """A 1080p video: one minute of scrolling, then the same packets again and again."""
    one = path.with_name("minute.mkv")
    texture = cv2.resize(scroll(1)[0], (1920 + 60 * FPS * 4, 1080), interpolation=cv2.INTER_CUBIC)
    with open(one, "wb"):
        write_video(one, (texture[:, 4 * n : 4 * n + 1920] for n in range(60 * FPS)), FPS, crf=30)
    with av.open(str(one)) as source, av.open(str(path), "w") as target:
        stream = source.streams.video[0]
        packets = [p for p in source.demux(stream) if p.dts is not None]
        data = [(bytes(p), p.pts, p.dts, p.is_keyframe) for p in packets]
        copy = target.add_stream_from_template(stream)
        length = round(60 / stream.time_base)
        for minute in range(minutes):
            for content, pts, dts, key in data:
                packet = av.Packet(content)
                packet.stream, packet.time_base, packet.is_keyframe = copy, Fraction(stream.time_base), key
                packet.pts, packet.dts = pts + minute * length, dts + minute * length
                target.mux(packet)
    one.unlink()
    sidecar(path, duration=60.0 * minutes)


class Peaks(threading.Thread):
    """The largest resident size that each process of curation reported (VmHWM of proc(5)), by what it is."""

    def __init__(self):
        super().__init__(daemon=True)
        self.bytes = {}
        self.over = threading.Event()

    def run(self):
        while not self.over.wait(0.1):
            for entry in filter(str.isdigit, os.listdir("/proc")):
                with contextlib.suppress(OSError, StopIteration):
                    self.look(Path("/proc", entry))

    def look(self, process):
        command = (process / "cmdline").read_bytes().replace(b"\0", b" ")
        kind = "child" if b"pipelines.unit" in command else "worker" if b"UnitWorker" in command else ""
        if kind:
            line = next(li for li in (process / "status").read_text().splitlines() if li.startswith("VmHWM"))
            self.bytes[kind] = max(self.bytes.get(kind, 0), int(line.split()[1]) * 1024)


@pytest.mark.parametrize("minutes", [3, pytest.param(120, marks=pytest.mark.slow)])
def test_a_worker_with_its_child_stays_small(tmp_path, ray_cluster, minutes):
    raw = tmp_path / "raw"
    raw.mkdir()
    film(raw / "long.mp4", minutes)
    filters = FilterConfig(max_copied_share=1.0, max_static_share=1.0)
    config = CurateConfig(home=tmp_path, source=raw, workers=1, rules=RulesConfig(), filters=filters)
    peaks = Peaks()
    peaks.start()
    result = curate(config)
    peaks.over.set()
    peaks.join()
    print({kind: f"{size / 1e6:.0f} MB" for kind, size in peaks.bytes.items()})  # noqa: T201 - the figure of docs/decode.md
    assert result.clips == min(60, minutes) * 60 // 16  # the second hour shows the frames of the first
    assert set(peaks.bytes) == {"worker", "child"}
    assert sum(peaks.bytes.values()) < LIMIT_BYTES

"""Curation against bare decoding, side by side in one run.

    python tests/benchmarks/bench_curate.py [--videos 4] [--seconds 60]

CPU seconds per hour of 360p H.264, for: decode + scale to 160x90 at 10 FPS alone (libav's own filter graph, one
thread: what `ffmpeg -vf fps=10,scale=160:90:flags=area -f null` does); a plain loop over the same work that curation
does, without Ray; and the whole curation with every process of it counted. The ratios matter; the seconds are the
machine's. Kept "all" and "one in eight" are the two ends of the design's bound.
"""

import argparse
import json
import os
import tempfile
import threading
import time
from pathlib import Path

import av
import numpy as np

from infra.config import ClusterConfig
from pipelines.config import CurateConfig, FilterConfig, RecordConfig
from pipelines.curate import curate
from pipelines.gameplay import plan, play
from pipelines.unit import curate_video
from pipelines.video import write_video


def footage(folder: Path, count: int, seconds: float, kept_one_in: int) -> list[Path]:
    """360p gameplay; all but one in so many videos show a still screen for most of each clip."""
    settings = RecordConfig(home=folder, episodes=count, side_games=(), min_s=seconds, max_s=seconds)
    folder.mkdir(parents=True)
    paths = []
    for number, episode in enumerate(e for e in plan(settings) if e.kind == "play"):
        states, _ = play(settings, episode)
        if number % kept_one_in:
            states = np.concatenate([states[:16], np.repeat(states[16:17], len(states) - 16, axis=0)])
        path = folder / f"v{number}.mp4"
        screen = (
            np.pad(s.repeat(5, 0).repeat(10, 1), ((20, 20), (0, 0), (0, 0))) for s in np.repeat(states, 3, 0)[::2]
        )
        write_video(path, screen, 30)
        info = {"id": path.stem, "title": "2D platformer playthrough", "duration": seconds}
        path.with_name(f"{path.stem}.info.json").write_text(json.dumps(info))
        paths.append(path)
    return paths


def bare(paths: list[Path]) -> float:
    """CPU seconds of decoding and scaling alone."""
    began = time.process_time()
    for path in paths:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type, stream.codec_context.thread_count = "NONE", 1
            graph = av.filter.Graph()
            chain = [graph.add_buffer(template=stream), graph.add("fps", "10"), graph.add("scale", "160:90:flags=area")]
            chain += [graph.add("format", "rgb24"), graph.add("buffersink")]
            for left, right in zip(chain, chain[1:], strict=False):
                left.link_to(right)
            graph.configure()
            for frame in container.decode(stream):
                graph.push(frame)
                drain(graph)
    return time.process_time() - began


def drain(graph: av.filter.Graph) -> None:
    """Takes what is ready."""
    while True:
        try:
            graph.pull()
        except (BlockingIOError, EOFError):
            return


def plain(paths: list[Path], config: CurateConfig) -> tuple[float, float]:
    """CPU and wall seconds of the same work in one process, without Ray."""
    began, wall = time.process_time(), time.monotonic()
    for path in paths:
        curate_video({"path": str(path), "verdict": False, "peek": False, "have": []}, config, "bench")
    return time.process_time() - began, time.monotonic() - wall


class Meter(threading.Thread):
    """CPU seconds of this process and all that come from it, by what /proc said last of each."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.used: dict[int, float] = {}
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.1):
            self.look()

    def look(self) -> None:
        """Reads every process of the family once."""
        tick, parents, now = os.sysconf("SC_CLK_TCK"), {}, {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                except (FileNotFoundError, ProcessLookupError):
                    continue
                parents[int(entry.name)] = int(fields[1])
                now[int(entry.name)] = (int(fields[11]) + int(fields[12])) / tick
        family = {os.getpid()}
        for _ in range(8):
            family |= {child for child, parent in parents.items() if parent in family}
        self.used |= {pid: now[pid] for pid in family if pid in now}

    def stop(self) -> float:
        """Seconds in all."""
        self.over.set()
        self.join()
        self.look()
        return sum(self.used.values())


def whole(root: Path, source: Path, config: CurateConfig) -> tuple[float, float, int]:
    """CPU and wall seconds of `curate` inside a Ray that is up already, and the clips it kept."""
    from dataclasses import replace

    meter = Meter()
    meter.look()
    before = sum(meter.used.values())
    meter.start()
    wall = time.monotonic()
    result = curate(replace(config, source=source, home=root))
    return meter.stop() - before, time.monotonic() - wall, result.clips


def main() -> None:
    """Prints one table."""
    from infra.cluster import connect

    parser = argparse.ArgumentParser()
    parser.add_argument("--videos", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=64.0)
    options = parser.parse_args()
    config = CurateConfig(name="bench", workers=2, filters=FilterConfig(), cluster=ClusterConfig(cpus=2))
    with tempfile.TemporaryDirectory() as folder, connect(config.cluster):
        for kept_one_in in (1, 8):
            source = Path(folder) / f"raw{kept_one_in}"
            paths = footage(source, options.videos, options.seconds, kept_one_in)
            hours = len(paths) * options.seconds / 3600
            alone = bare(paths)
            loop, loop_wall = plain(paths, config)
            cpu, wall, clips = whole(Path(folder) / f"home{kept_one_in}", source, config)
            lines = {
                "bare decode+scale": (alone, 0.0),
                "plain loop": (loop, loop_wall),
                "curate (Ray included)": (cpu, wall),
            }
            os.write(1, f"one video in {kept_one_in} kept: {clips} clips, {hours:.3f} h of 640x360\n".encode())
            for name, (seconds, wall_s) in lines.items():
                line = (
                    f"  {name:22} {seconds / hours:7.0f} CPU s/h {seconds / alone:5.2f}x bare   {wall_s:6.1f} s wall\n"
                )
                os.write(1, line.encode())


if __name__ == "__main__":
    main()

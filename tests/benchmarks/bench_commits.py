"""Cost must not grow with what is done: late commits against early ones, and a finished manifest run again.

    python tests/benchmarks/bench_commits.py [--units 1000] [--videos 10000]

Commits are timed one unit at a time, at two local datasets in turns, a new one and one of many commits; medians of
twenty, a whole cycle of checkpoints. The manifest names tiny real videos that are curated for real; they are deleted
before the second run, so that whoever opens one fails.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from infra.config import ClusterConfig
from pipelines.config import CurateConfig, FilterConfig, RulesConfig
from pipelines.curate import curate
from pipelines.shards import CLIP_SCHEMA, VIDEO_SCHEMA, Unit, Writer
from pipelines.tables import write_shard
from pipelines.video import write_video

ROUNDS = 20


def commit_times(folder: Path, units: int) -> tuple[list[float], list[float]]:
    """Seconds of commits around the 10th of one dataset and of the last of `units` of another, in turns."""
    small, large = _grown(folder / "small", 4), _grown(folder / "large", units - ROUNDS)
    early: list[float] = []
    late: list[float] = []
    for number in range(ROUNDS):
        for writer, times in ((small, early), (large, late)):
            unit = _unit(writer.folder, f"last{number}")
            began = time.perf_counter()
            writer.commit([unit])
            times.append(time.perf_counter() - began)
    return early, late


def _grown(folder: Path, units: int) -> Writer:
    writer = Writer(folder, "bench")
    for number in range(units):
        writer.commit([_unit(folder, f"{number:06}")])
    return writer


def _unit(folder: Path, name: str) -> Unit:
    shared = {"unit_id": name, "video_id": name}
    clips, videos = folder / "clips" / f"{name}.parquet", folder / "videos" / f"{name}.parquet"
    write_shard(clips, [{**shared, "clip_id": name, "split": "train", "video": b"x" * 1000}], CLIP_SCHEMA)
    write_shard(videos, [{**shared, "uri": name, "outcome": "kept", "clips": 1, "dropped_clips": []}], VIDEO_SCHEMA)
    return Unit(name, clips, videos)


def tiny_videos(folder: Path, count: int) -> Path:
    """A manifest of videos of two seconds and a few kilobytes, all different."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        path = folder / f"v{number:05}.mp4"
        world = np.repeat(np.repeat(rng.integers(0, 256, (4, 16, 3), np.uint8), 8, 0), 8, 1)
        write_video(path, (world[:, 4 * t : 4 * t + 32] for t in range(20)), 10, crf=30)
        title = f"2D platformer playthrough {number}"
        rows.append({"uri": path.name, "size": path.stat().st_size, "duration": 2.0, "title": title})
    manifest = folder / "list.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest


def settings(home: Path, manifest: Path) -> CurateConfig:
    """Clips of two seconds, so that tiny videos are enough."""
    return CurateConfig(
        source=str(manifest),
        home=home,
        name="tiny",
        width_px=32,
        height_px=32,
        clip_frames=20,
        previews=0,
        rules=RulesConfig(min_duration_s=1.0),
        filters=FilterConfig(min_blur=0.0),
        cluster=ClusterConfig(cpus=2),
    )


def first_and_again(folder: Path, count: int) -> tuple[float, float, int]:
    """Seconds of a curation and of the same command once more with every video deleted, and the ledger's rows."""
    manifest = tiny_videos(folder / "raw", count)
    began = time.perf_counter()
    first = curate(settings(folder / "home", manifest))
    took = time.perf_counter() - began
    for path in manifest.parent.glob("*.mp4"):
        path.unlink()
    began = time.perf_counter()
    again = curate(settings(folder / "home", manifest))
    assert again.version == first.version
    return took, time.perf_counter() - began, sum(again.outcomes.values())


def main() -> None:
    """Prints both."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--units", type=int, default=1000)
    parser.add_argument("--videos", type=int, default=10_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        early, late = (1000 * statistics.median(t) for t in commit_times(Path(folder), options.units))
        line = f"commit: {early:.1f} ms the 10th, {late:.1f} ms the {options.units}th, {late / early:.2f}x\n"
        os.write(1, line.encode())
    if not options.videos:
        return
    with tempfile.TemporaryDirectory() as folder:
        took, again, rows = first_and_again(Path(folder), options.videos)
        os.write(1, f"{rows} videos: {took:.0f} s to curate, {again:.1f} s again with no video there\n".encode())


if __name__ == "__main__":
    main()

"""Stored clips: size, time and quality of each codec, and how fast training windows are read; half a minute.

    python tests/benchmarks/bench_clips.py

Sixteen clips of 160 pictures at 160x90, of four of procgen's games drawn large and scaled down. Times are CPU time of
one core, medians over clips. PSNR is against the pictures as they were sampled, in red, green and blue. Windows have 16
frames and go through the feed as training reads them: `single` takes one from a clip, `several` eight.
"""

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

from infra.config import Home
from pipelines import video
from pipelines.config import RecordConfig
from pipelines.feed import Source
from pipelines.gameplay import plan, play
from pipelines.shards import CLIP_SCHEMA, VIDEO_SCHEMA, Unit, Writer
from pipelines.tables import write_shard
from pipelines.train_config import FeedConfig

CODECS = ("h264_444", "h264_444 as plain veryfast", "h264_420", "jpeg444", "raw_zstd")


def footage() -> list[np.ndarray]:
    """Planes uint8 (160, 3, 90, 160) of each clip."""
    clips = []
    for game in ("coinrun", "jumper", "ninja", "climber"):
        settings = RecordConfig(game=game, episodes=1, side_games=(), min_s=64, max_s=64)
        states, _ = play(settings, replace(plan(settings)[0], seed=5))
        large = (cv2.resize(s, (640, 640), interpolation=cv2.INTER_CUBIC)[140:500] for s in states[::2])
        small = np.stack([video.split_planes(cv2.resize(s, (160, 90), interpolation=cv2.INTER_AREA)) for s in large])
        clips += [small[n : n + 160] for n in range(0, 640, 160)]
    return clips


def timed(action, items) -> tuple[float, list]:
    """Median milliseconds of CPU, and what came out."""
    spent, out = [], []
    for item in items:
        began = time.process_time()
        out.append(action(item))
        spent.append((time.process_time() - began) * 1e3)
    return statistics.median(spent), out


def encode(planes: np.ndarray, codec: str) -> bytes:
    """A clip by the name of a row."""
    quick, video.QUICK = video.QUICK, "" if codec.endswith("veryfast") else video.QUICK
    data = video.encode_planes(planes, fps=10, codec=codec.split()[0], crf=15)
    video.QUICK = quick
    return data


def compare(clips: list[np.ndarray]) -> None:
    """One row a codec."""
    say(f"{'codec':28}{'kB':>7}{'encode ms':>11}{'decode ms':>11}{'16 frames ms':>14}{'PSNR dB':>9}")
    starts = np.random.default_rng(0).integers(0, 145, len(clips))
    truth = [np.stack([video.colours(p) for p in clip]) for clip in clips]
    for codec in CODECS:
        encode_ms, data = timed(lambda clip, codec=codec: encode(clip, codec), clips)
        decode_ms, shown = timed(video.decode_clip, data)
        window_ms, _ = timed(lambda pair: video.decode_clip(pair[0], int(pair[1]), 16), zip(data, starts, strict=True))
        errors = [np.square(a.astype(np.float32) - b).mean() for a, b in zip(shown, truth, strict=True)]
        psnr = 10 * np.log10(255**2 / np.mean(errors)) if any(errors) else float("inf")
        size = statistics.median(len(d) for d in data) / 1e3
        say(f"{codec:28}{size:7.0f}{encode_ms:11.1f}{decode_ms:11.1f}{window_ms:14.2f}{psnr:9.1f}")


def read(folder: Path, clips: list[np.ndarray]) -> None:
    """Windows a second and core, as the feed hands them out."""
    home = Home(folder)
    root = home.ensure().datasets / "bench"
    bare = dict(
        unit_id="u", split="train", fps=10, n_frames=160, width_px=160, height_px=90, cut_frames=[], start_s=0.0
    )
    rows = [
        {
            **dict.fromkeys(CLIP_SCHEMA.names),
            **bare,
            "clip_id": f"c{n}",
            "video_id": "v",
            "video": encode(c, "h264_444"),
        }
        for n, c in enumerate(clips)
    ]
    kept = dict(video_id="v", unit_id="u", split="train", outcome="kept", clips=len(rows), dropped_clips=[])
    write_shard(root / "clips" / "u.parquet", rows, CLIP_SCHEMA)
    write_shard(root / "videos" / "u.parquet", [{**dict.fromkeys(VIDEO_SCHEMA.names), **kept}], VIDEO_SCHEMA)
    Writer(root).commit([Unit("u", root / "clips" / "u.parquet", root / "videos" / "u.parquet")])
    for name, per_clip in (("single", 1), ("several", 8)):
        feed = FeedConfig(windows_per_clip=per_clip, clips_per_group=8)
        source = Source(home=folder, dataset="bench@0", split="train", frames=16, seed=0, feed=feed)
        rates = []
        for _ in range(5):
            windows = source.open()
            began = time.process_time()
            for first in range(0, len(clips) * per_clip, 16):
                windows.batch(first, 16)
            rates.append(len(clips) * per_clip / (time.process_time() - began))
        say(f"windows of 16 frames, {name}: {statistics.median(rates):.0f} a second and core")


def say(text: str) -> None:
    """One line of the result."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    """Prints the table, then the rates."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    cv2.setNumThreads(1)
    clips = footage()
    compare(clips)
    with tempfile.TemporaryDirectory() as folder:
        read(Path(folder), clips)


if __name__ == "__main__":
    main()

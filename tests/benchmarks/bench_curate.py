"""Curation against bare decoding and against a plain loop, side by side in one run; about 4 minutes on two cores.

    python tests/benchmarks/bench_curate.py
    python tests/benchmarks/bench_curate.py --nodes

The footage is four of procgen's games at 640x360, 30 pictures a second, x264's medium preset: rounds of 64 s, strung
together in other orders to files of five minutes. Three things are done to the same files:

- `ffmpeg -threads 1 -i FILE -an -vf fps=10,scale=160:90:flags=area -f null -`, its own user and system time;
- `curate` with two workers in a Ray that is up, CPU time of every process of Ray and of this one. Its start (actors,
  imports, plan, commit, page) is measured on two short files and shown beside; the ratio is of what an hour more of
  video costs. Once every clip is kept, once one in eight (a higher `min_blur`; decoding stays the same);
- the same clips by a plain loop over PyAV in one process, as one would write it down.

The search for copies is off (the footage repeats itself).
"""

import argparse
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.cluster_utils import Cluster

from infra.cluster import connect, environment
from infra.config import ClusterConfig
from pipelines.config import CurateConfig, FilterConfig, RecordConfig
from pipelines.curate import curate
from pipelines.gameplay import plan, play

GAMES = ("coinrun", "jumper", "ninja", "climber")
ROUND_S = 64
ORDERS = ((0, 1, 2, 3, 1), (1, 3, 0, 2, 0), (2, 0, 3, 1, 3), (3, 2, 1, 0, 2))
ALL = FilterConfig(min_blur=0.0, max_static_share=1.0, max_cuts=1000, max_copied_share=1.0)


def say(text: str) -> None:
    """One line of the result."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


# -- footage -----------------------------------------------------------------------------------------------------


def film(path: Path, game: str, seed: int) -> Path:
    """64 s of a game, enlarged smoothly to 640x360."""
    settings = RecordConfig(game=game, episodes=1, side_games=(), min_s=ROUND_S, max_s=ROUND_S, steps_per_second=30)
    states, _ = play(settings, replace(plan(settings)[0], seed=seed))
    size = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "640x360", "-r", "30", "-i", "-"]
    x264 = ["-c:v", "libx264", "-preset", "medium", "-crf", "23", "-pix_fmt", "yuv420p", "-threads", "1"]
    with subprocess.Popen(["ffmpeg", "-v", "error", *size, *x264, str(path)], stdin=subprocess.PIPE) as ffmpeg:
        for state in states:
            large = cv2.resize(state, (640, 640), interpolation=cv2.INTER_CUBIC)[140:500]
            ffmpeg.stdin.write(large.tobytes())  # ty: ignore
        ffmpeg.stdin.close()
    return path


def footage(folder: Path) -> tuple[Path, Path]:
    """Folders with four long files and with two short ones."""
    with ThreadPoolExecutor(2) as pool:
        rounds = list(pool.map(lambda n: film(folder / f"round{n}.mp4", GAMES[n], n), range(len(GAMES))))
    for name, orders in (("long", ORDERS), ("short", ((0,), (1,)))):
        (folder / name).mkdir()
        for number, order in enumerate(orders):
            path = folder / name / f"v{number}.mp4"
            listed = folder / "list.txt"
            listed.write_text("".join(f"file '{rounds[n]}'\n" for n in order))
            joined = ["ffmpeg", "-v", "error", "-f", "concat", "-safe", "0", "-i", str(listed), "-c", "copy", str(path)]
            subprocess.run(joined, check=True)
            info = {"id": path.stem, "title": "2D platformer playthrough", "duration": len(order) * ROUND_S}
            path.with_name(f"{path.stem}.info.json").write_text(json.dumps(info))
    return folder / "long", folder / "short"


# -- what is measured --------------------------------------------------------------------------------------------


def bare(source: Path) -> float:
    """CPU seconds of ffmpeg's own decoding and scaling."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for path in sorted(source.glob("*.mp4")):
        chain = ["-an", "-vf", "fps=10,scale=160:90:flags=area", "-f", "null", "-"]
        subprocess.run(["ffmpeg", "-v", "error", "-threads", "1", "-i", str(path), *chain], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def plain(source: Path, target: Path) -> tuple[float, int]:
    """Wall seconds of a plain loop that samples, measures, finds cuts, encodes and writes; and its clips."""
    began, rows = time.monotonic(), []
    for path in sorted(source.glob("*.mp4")):
        clip, before, index = [], None, 0
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                grid = frame.to_ndarray()[: frame.height : 15, ::26].astype(np.float32)
                cut = before is not None and np.abs(grid - before).mean() > 20
                before = grid
                while frame.time >= index / 10 - 0.001:
                    small = frame.reformat(width=160, height=90, format="rgb24", interpolation="AREA")
                    clip.append(small.to_ndarray())
                    index += 1
                if len(clip) == 160:
                    rows.append({"video": encoded(clip), "cut": cut, **signals(np.stack(clip))})
                    clip = []
    pq.write_table(pa.Table.from_pylist(rows), target)
    return time.monotonic() - began, len(rows)


def signals(frames: np.ndarray) -> dict[str, float]:
    """The measures of a clip, straightforwardly."""
    grey = np.stack([cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in frames])
    change = np.abs(np.diff(grey.astype(np.int16), axis=0))
    return {
        "motion": float(change.mean()),
        "static_share": float(((change > 12).mean(axis=(1, 2)) < 0.002).mean()),
        "black_share": float((grey.std(axis=(1, 2)) < 6).mean()),
        "blur": float(np.median([cv2.Laplacian(g, cv2.CV_32F).var() for g in grey[::8]])),
    }


def encoded(frames: list[np.ndarray]) -> bytes:
    """A clip in H.264 4:4:4, as curation stores it."""
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as container:
        options = {"crf": "15", "preset": "veryfast", "x264-params": "keyint=16:bframes=0:threads=1"}
        stream = container.add_stream("libx264", rate=Fraction(10), options=options)
        stream.width, stream.height, stream.pix_fmt = 160, 90, "yuv444p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return target.getvalue()


class Meter(threading.Thread):
    """CPU seconds of this process and all that come from it, by what /proc said last of each; without its own."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.used: dict[int, float] = {}
        self.over = threading.Event()
        self.own = 0.0

    def run(self) -> None:
        """Looks until it is told to stop."""
        while not self.over.wait(0.2):
            self.look()
        self.own = time.thread_time()

    def look(self) -> None:
        """Reads every process of the family once."""
        tick, parents, now = os.sysconf("SC_CLK_TCK"), {}, {}
        for entry in filter(str.isdigit, os.listdir("/proc")):
            try:
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            parents[int(entry)] = int(fields[1])
            now[int(entry)] = (int(fields[11]) + int(fields[12])) / tick
        family = {os.getpid()}
        for _ in range(8):
            family |= {child for child, parent in parents.items() if parent in family}
        self.used |= {pid: now[pid] for pid in family if pid in now}

    def stop(self) -> float:
        """Seconds in all."""
        self.over.set()
        self.join()
        self.look()
        return sum(self.used.values()) - self.own


def whole(home: Path, source: Path, config: CurateConfig) -> tuple[float, float, int]:
    """CPU and wall seconds of `curate` inside a Ray that is up, and the clips it kept."""
    meter = Meter()
    meter.look()
    before = sum(meter.used.values())
    meter.start()
    began = time.monotonic()
    result = curate(replace(config, source=source, home=home))
    wall = time.monotonic() - began
    return meter.stop() - before, wall, result.clips


def one_in_eight(home: Path) -> FilterConfig:
    """Thresholds that keep the sharpest eighth of the clips that are there."""
    from pipelines.shards import open_dataset

    blur = open_dataset(home, "bench").clip_table(["blur"])["blur"].to_pylist()
    return replace(ALL, min_blur=float(np.quantile(blur, 7 / 8)))


# -- the table --------------------------------------------------------------------------------------------------


def side_by_side(folder: Path, rounds: int) -> None:
    """Prints CPU and wall time of the three."""
    long, short = footage(folder)
    hours = len(ORDERS) * len(ORDERS[0]) * ROUND_S / 3600
    more = hours - 2 * ROUND_S / 3600
    config = CurateConfig(name="bench", workers=2, unit_s=ROUND_S * 5, filters=ALL, cluster=ClusterConfig(cpus=2))
    wall_plain, clips_plain = plain(long, folder / "plain.parquet")
    say(f"{hours:.2f} h of 640x360 H.264, {len(ORDERS)} files; medians of {rounds}")
    say(f"plain loop: {wall_plain:.1f} s wall, {clips_plain} clips")
    alone: list[float] = []
    seen: dict[str, list[tuple[float, float, int, float]]] = {"all": [], "one in eight": []}
    with connect(config.cluster):
        whole(folder / "warm", short, config)
        filters = {"all": ALL, "one in eight": ALL}
        for turn in range(rounds):
            alone.append(bare(long) / hours)
            few, _, _ = whole(folder / f"short{turn}", short, config)
            for kept in seen:
                chosen = replace(config, filters=filters[kept])
                cpu, wall, clips = whole(folder / f"long-{kept}{turn}", long, chosen)
                seen[kept].append(((cpu - few) / more, wall, clips, few))
                filters["one in eight"] = one_in_eight(folder / "long-all0")
    listed = ", ".join(f"{a:.0f}" for a in alone)
    say(f"ffmpeg, decode and scale: {statistics.median(alone):.0f} CPU s an hour ({listed})")
    for kept, runs in seen.items():
        each = [cpu / ffmpeg for (cpu, *_), ffmpeg in zip(runs, alone, strict=True)]
        wall = statistics.median(run[1] for run in runs)
        say(
            f"curate, {kept} kept ({runs[0][2]} clips): {statistics.median(run[0] for run in runs):.0f} CPU s an hour, "
            f"{statistics.median(each):.2f}x ffmpeg ({', '.join(f'{e:.2f}' for e in each)})"
        )
        say(f"  {wall:.1f} s wall, start included: {wall_plain / wall:.2f}x the plain loop's speed")
    start = statistics.median(run[3] for run in seen["all"])
    say(f"start, and {2 * ROUND_S} s of video: {start:.1f} CPU s")


def scaling(folder: Path) -> None:
    """Prints wall times on one, two and four simulated nodes of one CPU each: raylets of their own on this machine."""
    long, _ = footage(folder)
    took: dict[int, float] = {}
    for count in (1, 2, 4):
        config = CurateConfig(name="bench", workers=count, unit_s=ROUND_S * 5, filters=ALL)
        os.environ.update(environment())
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        try:
            for _ in range(count - 1):
                cluster.add_node(num_cpus=1)
            ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
            cluster.wait_for_nodes()
            _, took[count], clips = whole(folder / f"nodes{count}", long, config)
            say(f"{count} nodes: {clips} clips, {took[count]:.1f} s, {took[1] / took[count]:.2f}x one node's speed")
        finally:
            ray.shutdown()
            cluster.shutdown()


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--nodes", action="store_true", help="instead: 1, 2 and 4 simulated nodes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.nodes:
            scaling(Path(folder))
        else:
            side_by_side(Path(folder), options.rounds)


if __name__ == "__main__":
    main()

"""How many copies of real gameplay are found, and what is taken for one: recall and precision by kind of copy.

    python tests/benchmarks/bench_copies.py

Procgen games, half of them single-screen ones, two levels of each; each level as it was and in five copies of it. All
of it goes through `curate`. The original is the largest, so a clip of a copy is found if it is dropped; levels of whose
original something is refused (a black scene) are not counted. Any clip is dropped wrongly if the clip that is named as
its original shows another level.
"""

import json
import logging
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np

from pipelines.config import CurateConfig, FilterConfig, RecordConfig, RulesConfig
from pipelines.curate import curate
from pipelines.dedup import read_pairs
from pipelines.gameplay import Episode, play
from pipelines.video import write_video

GAMES = ("coinrun", "jumper", "starpilot", "plunder", "leaper", "chaser")
SINGLE_SCREEN = GAMES[3:]
LEVELS, SECONDS, FPS = 2, 33, 30
KINDS = ("original", "re-encoded", "mirrored", "late", "brighter", "cropped")


def copies(states):
    """Each kind's frames and x264 quality."""
    at = np.arange(SECONDS * FPS) * 20 // FPS
    shown = states[at]
    large = [cv2.resize(s, (256, 256), interpolation=cv2.INTER_NEAREST) for s in shown]
    yield "original", [cv2.resize(s, (320, 320), interpolation=cv2.INTER_NEAREST) for s in shown], 18
    yield "re-encoded", [cv2.resize(s, (160, 160), interpolation=cv2.INTER_LINEAR) for s in shown], 32
    yield "mirrored", [f[:, ::-1] for f in large], 23
    yield "late", large[3 * FPS + 10 :], 26
    yield "brighter", [np.clip(f * 0.8 + 30, 0, 255).astype(np.uint8) for f in large], 23
    yield "cropped", [f[12:-12, 12:-12] for f in large], 23


def write(folder, game, level):
    """One level's videos and sidecars."""
    config = RecordConfig(restrict_themes=True, use_backgrounds=level % 2 == 0)
    states, _ = play(config, Episode("", "play", game, "", 100 + level, SECONDS, FPS, 1))
    for kind, frames, crf in copies(states):
        path = folder / f"{game}-{level}-{kind}.mp4"
        write_video(path, iter(frames), FPS, crf=crf)
        info = {"id": path.stem, "title": "platformer playthrough", "duration": len(frames) / FPS}
        path.with_name(f"{path.stem}.info.json").write_text(json.dumps(info))


def main():
    """Prints one line a kind."""
    logging.basicConfig(level=logging.WARNING)
    with tempfile.TemporaryDirectory() as root:
        raw = Path(root) / "raw"
        raw.mkdir()
        with ProcessPoolExecutor(2) as pool:
            list(pool.map(write, *zip(*((raw, g, level) for g in GAMES for level in range(LEVELS)), strict=True)))
        rules = RulesConfig(min_duration_s=1)
        config = CurateConfig(home=Path(root), source=raw, rules=rules, filters=FilterConfig(min_blur=0))
        result = curate(config)
        rows = result.dataset.video_table(["video_id", "windows"]).to_pylist()
        pairs = read_pairs(result.path)
    tell(rows, pairs)


def tell(rows, pairs):
    """Recall by kind of copy (single-screen games apart), precision over all, and how alike different levels were."""
    video_of = {w["clip_id"]: row["video_id"] for row in rows for w in row["windows"] if w["clip_id"]}
    whole = {row["video_id"] for row in rows if all(not w["reason"] for w in row["windows"])}
    found, all_of, wrong, dropped = Counter(), Counter(), 0, 0
    for row in rows:
        game, level, kind = row["video_id"].split("-", 2)
        group = "single-screen" if game in SINGLE_SCREEN else "scrolling"
        for window in row["windows"]:
            if window["reason"] == "copy":
                dropped += 1
                wrong += not video_of[window["copy_of"]].startswith(f"{game}-{level}-")
            counted = kind != "original" and f"{game}-{level}-original" in whole
            if window["reason"] in ("", "copy") and counted:
                all_of[kind, group] += 1
                found[kind, group] += window["reason"] == "copy"
    for kind in KINDS[1:]:
        said = (f"{g} {found[kind, g]}/{all_of[kind, g]}" for g in ("scrolling", "single-screen"))
        print(f"{kind:12} found: {', '.join(said)}")  # noqa: T201
    levels = {clip: "-".join(video.split("-")[:2]) for clip, video in video_of.items()}
    others = [p["agreement"] for p in pairs if levels[p["a"]] != levels[p["b"]]]
    print(f"different levels: {len(others)} pairs compared, the most alike {max(others, default=0):.2f}")  # noqa: T201
    print(f"precision    {1 - wrong / max(1, dropped):.3f} of {dropped} clips that were dropped as copies")  # noqa: T201


if __name__ == "__main__":
    main()

"""One video through curation in the foreground, without Ray: each decision with its numbers, and a picture.

    lampworks replay dQw4w9WgXcQ --source videos/

The video is decoded as a worker would decode it, in a child process with the same limits; nothing is written but the
picture, one row of frames a clip.
"""

import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from infra.config import Home, to_dict
from pipelines.config import CurateConfig
from pipelines.cutter import THUMBS, thumb
from pipelines.explain import find_video, history, rule_lines, window_line
from pipelines.fetch import FetchError, fetched
from pipelines.figures import Frames, png
from pipelines.manifest import scan
from pipelines.review_config import ReplayConfig
from pipelines.sources import Source, source_of
from pipelines.unit import Child
from pipelines.video import decode_clip

log = logging.getLogger(__name__)

NAME_PX = 150


def replay(config: ReplayConfig) -> str:
    """Every decision on one video, up to a stage.

    Raises:
        UserError: the source has no such video.
    """
    source = find_video(scan(source_of(config)), config.video)
    lines = [f"{source.uri} ({source.name})", *rule_lines(config, source)]
    if config.stage != "rules":
        lines += _decoded(config, source)
    if config.stage == "copies":
        lines += [f"dataset {config.name}:", *history(config, source.uri)]
    return "\n".join(lines)


def _decoded(config: ReplayConfig, source: Source) -> list[str]:
    """What decoding met, then each clip's signals beside their limits."""
    known = {field.name for field in fields(CurateConfig)}
    child = Child({name: value for name, value in to_dict(config).items() if name in known}, "replay")
    job: dict[str, Any] = {"verdict": False, "peek": False, "have": list[str]()}
    limit_s = config.timeout_s + config.timeout_factor * (source.metadata.duration_s or 0.0)
    try:
        with fetched(source.location, source.size_bytes, config.fetch) as got:
            result = child.run({**job, "path": str(got.path)}, limit_s)
            clips = {row["clip_id"]: row["video"] for row in result["rows"]}
    except FetchError as error:
        return [f"  fetch  {error.reason}: {error.detail}"]
    finally:
        child.stop()
    said = f"{result['outcome']} | stage {result['stage']} | {result['reason'] or 'no objection'} | {result['detail']}"
    windows = result.get("windows")
    if windows is None:
        return [f"  decode {said}"]
    facts = (
        f"  decode {result['source_codec']} {result['source_width_px']}x{result['source_height_px']} px at "
        f"{result['source_fps']:.4g} fps, {result['duration_s']:.1f} s in {result['seconds']:.1f} s of CPU, "
        f"damaged {result['corrupt_share']:.3g} ({config.filters.max_corrupt_share:g})"
    )
    if config.stage == "decode" or not windows:
        return [facts, f"  clips  {said}"]
    path = Home(config.home).ensure().reports / f"replay-{Path(source.name).name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(_sheet(windows, clips)))
    return [facts, f"  clips  {said}", *(window_line(w, config.filters) for w in windows), f"  picture {path}"]


def _sheet(windows: list[dict[str, Any]], clips: dict[str, bytes]) -> Frames:
    """One row a clip: its time and what became of it, then frames of it."""
    rows = [_row(f"{w['start_s']:.1f} s {w['reason'] or 'kept'}", _strip(w, clips)) for w in windows]
    wide = max(row.shape[1] for row in rows)
    return np.concatenate([np.pad(row, ((0, 2), (0, wide - row.shape[1]), (0, 0))) for row in rows])


def _strip(window: dict[str, Any], clips: dict[str, bytes]) -> Frames:
    if window["preview"]:
        return np.asarray(cv2.imdecode(np.frombuffer(window["preview"], np.uint8), cv2.IMREAD_COLOR_RGB), np.uint8)
    frames = decode_clip(clips[window["clip_id"]])
    return np.hstack([thumb(f) for f in frames[:: max(1, len(frames) // THUMBS)][:THUMBS]])


def _row(name: str, strip: Frames) -> Frames:
    label = np.zeros((strip.shape[0], NAME_PX, 3), np.uint8)
    cv2.putText(label, name, (4, strip.shape[0] // 2), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (255, 255, 255), 1, cv2.LINE_AA)
    return np.hstack([label, strip])

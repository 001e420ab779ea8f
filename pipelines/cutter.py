"""The slots of a video, cut into windows: each measured, judged, and encoded if it passes."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from pipelines.config import CurateConfig
from pipelines.filters import judge, measure, phash
from pipelines.sampling import Sampler, Tally, corrupt_share
from pipelines.video import brightness, colours, encode_planes, strip

THUMBS = 8
THUMB_PX = 48


@dataclass
class Cutter:
    """Cuts the slots of one video, or of one part of it, into windows, measures each, and encodes those that pass.

    Attributes:
        keep: takes each clip's row as soon as it is made.
    """

    config: CurateConfig
    job: dict[str, Any]
    digest: str
    keep: Callable[[dict[str, Any]], None]

    def run(self, sampler: Sampler) -> dict[str, Any]:
        """The ledger's fields."""
        size = self.config.clip_frames
        first, last = self.job.get("first_slot") or 0, self.job.get("last_slot")
        windows: list[dict[str, Any]] = []
        thumbs: list[np.ndarray] = []
        content = hashlib.sha256()
        buffer = np.empty((size, 3, self.config.height_px, self.config.width_px), np.uint8)
        held, gap_s, slots = 0, 0.0, 0
        for slot in sampler.slots(first):
            at = slot.index % size
            if at == 0:
                held, gap_s = 0, 0.0
            buffer[at] = slot.planes
            content.update(slot.planes.data)
            held, gap_s, slots = held + slot.held, max(gap_s, slot.gap_s), slots + 1
            if at in (0, size // 2):
                thumbs = _thinned([*thumbs, thumb(slot.frame)])
            if at == size - 1:
                facts = {"held_share": held / size, "max_gap_ms": round(gap_s * 1000)}
                windows.append(self._window(slot.index - at, buffer, facts, sampler))
                sampler.begin_clip()
            if slot.index == last:
                break
        return {
            **outcome_of(windows, slots / self.config.fps, sampler.tally.stopped),
            **_source(sampler),
            "frames_digest": content.hexdigest(),
            "duration_s": slots / self.config.fps,
            "corrupt_share": corrupt_share(sampler.tally, Tally()),
            "windows": windows,
            "preview": strip(_evenly(thumbs)),
        }

    def _window(self, first: int, planes: np.ndarray, facts: dict[str, Any], sampler: Sampler) -> dict[str, Any]:
        fps, size = self.config.fps, len(planes)
        cuts = {sampler.slot_of(c) - first for c in sampler.tally.cuts_s}
        luma = brightness(planes)
        signals = {
            **facts,
            **measure(luma),
            "corrupt_share": sampler.clip_corrupt_share(),
            "shape": sampler.shape,
            "cut_frames": sorted(c for c in cuts if 0 < c < size),
        }
        start_s = first / fps
        reason = judge(signals, self.config.filters)
        clip_id = hashlib.sha256(f"{self.digest}/{self.job['content']}/{first}".encode()).hexdigest()[:24]
        stored = clip_id in self.job["have"]
        window = {"start_s": start_s, "clip_id": clip_id, "reason": reason, "preview": None, **signals}
        if reason:
            window["clip_id"] = clip_id if stored else None
            window["preview"] = strip(_evenly([thumb(colours(p)) for p in planes[:: max(1, size // THUMBS)]]))
        elif not stored:
            facts = {"clip_id": clip_id, "start_s": start_s, **signals, **_source(sampler)}
            self.keep({**facts, **self._stored(planes), "phash": phash(luma, fps).tolist(),
                       "actions": _actions(Path(self.job["path"]), start_s, fps, size)})  # fmt: skip
        return window

    def _stored(self, planes: np.ndarray) -> dict[str, Any]:
        config = self.config
        return {
            "fps": config.fps,
            "n_frames": len(planes),
            "width_px": config.width_px,
            "height_px": config.height_px,
            "codec": config.codec,
            "video": encode_planes(planes, fps=config.fps, codec=config.codec, crf=config.crf),
        }


def _source(sampler: Sampler) -> dict[str, Any]:
    probe = sampler.probe
    return {
        "source_codec": probe.codec,
        "source_fps": probe.fps,
        "source_width_px": probe.width_px,
        "source_height_px": probe.height_px,
        "source_bars_px": list(sampler.bars_px),
    }


def outcome_of(windows: list[dict[str, Any]], seconds: float, stopped: str) -> dict[str, Any]:
    """A video's outcome, stage, reason and detail for the ledger, from its windows' reasons.

    Args:
        windows: with "reason" each.
        seconds: of video decoded.
        stopped: what ended decoding early, if anything did.
    """
    reasons = [w["reason"] for w in windows if w["reason"]]
    kept = len(windows) - len(reasons)
    if not windows:
        return {"outcome": "rejected", "stage": "cut", "reason": "too_short", "detail": f"{seconds:.1f} s decoded"}
    worst = max(sorted(set(reasons)), key=reasons.count, default="")
    detail = ", ".join(f"{r} {reasons.count(r)}" for r in sorted(set(reasons)))
    if not kept:
        return {"outcome": "rejected", "stage": "filter", "reason": worst, "detail": detail}
    if stopped:
        return {"outcome": "partial", "stage": "decode", "reason": worst or "damaged", "detail": stopped}
    return {"outcome": "partial" if reasons else "kept", "stage": "filter", "reason": worst, "detail": detail}


def _actions(video: Path, start_s: float, fps: int, count: int) -> list[int] | None:
    """The simulator's true action in force in each slot, where it left them beside the video."""
    path = video.with_suffix(".actions.npz")
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as data:
        times_s, action = data["times_s"], data["action"]
    at = np.searchsorted(times_s, start_s + np.arange(count) / fps + 1e-6, side="right") - 1
    return action[np.clip(at, 0, len(action) - 1)].astype(int).tolist()


def thumb(frame: np.ndarray) -> np.ndarray:
    """A frame (H, W, 3) scaled to the contact sheet's height."""
    width = max(1, round(frame.shape[1] * THUMB_PX / frame.shape[0]))
    return cv2.resize(frame, (width, THUMB_PX), interpolation=cv2.INTER_AREA)


def _thinned(items: list[np.ndarray]) -> list[np.ndarray]:
    """Every second of too many: what is shown of ten hours fits in memory."""
    return items[::2] if len(items) > 64 * THUMBS else items


def _evenly(items: list[np.ndarray]) -> list[np.ndarray]:
    if len(items) <= THUMBS:
        return items
    return [items[round(i)] for i in np.linspace(0, len(items) - 1, THUMBS)]

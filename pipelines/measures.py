"""What an evaluation holds, and what it measures on pictures and labels alone: visible motion, agreement, intervals."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from models.metrics import bootstrap, nmi, psnr
from pipelines import figures
from pipelines.config import EvaluateConfig

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

Pixels = NDArray[np.uint8]
LIVE_SHARE = 0.01
"""A latent code is live when at least this share of held-out transitions is given to it."""
MARGIN = 0.15
"""A shift must match this much (as a share of the difference) better than standing still does, to count as motion."""
SIDE_PX = 64
"""Pictures are averaged down to about this many pixels on their shorter side before shifts are searched."""
DIRECTIONS = ("up left", "up", "up right", "left", "still", "right", "down left", "down", "down right")
"""Names of `directions`' classes: where the picture's content goes."""


@dataclass(frozen=True, kw_only=True)
class Clips:
    """Held-out windows as the models see them."""

    frames: Pixels
    """(n, T, H, W, 3)"""
    true_actions: Ints | None
    """(n, T-1): what was pressed while frame t became frame t+1; None for footage without a record of it."""
    tokens: Ints
    """(n, T, N)"""
    latent: Ints
    """(n, T-1): the latent action model's reading of frame t -> t+1."""


@dataclass(kw_only=True)
class Findings:
    """What an evaluation writes down."""

    metrics: dict[str, float] = field(default_factory=dict)
    tables: dict[str, Any] = field(default_factory=dict)
    """Curves and counts behind the metrics, as plain JSON values."""
    pictures: dict[str, Pixels] = field(default_factory=dict)
    """File name (without .png) -> RGB picture."""
    charts: dict[str, str] = field(default_factory=dict)
    """File name (without .svg) -> SVG text."""

    def add_sheet(self, name: str, rows: dict[str, Pixels]) -> None:
        """A contact sheet of clips (n, T, H, W, 3): for each clip a row of each kind, the kinds' names in `tables`."""
        kinds = list(rows)
        clips = len(rows[kinds[0]])
        self.pictures[name] = figures.sheet([rows[kind][i] for i in range(clips) for kind in kinds])
        self.tables.setdefault("rows", {})[name] = kinds * clips


def in_batches(function: Any, values: NDArray[Any], config: EvaluateConfig) -> NDArray[Any]:
    """A model's function over the first dimension, `config.batch` at a time."""
    with torch.inference_mode():
        parts = [
            function(torch.from_numpy(values[i : i + config.batch]).to(config.device)).cpu().numpy()
            for i in range(0, len(values), config.batch)
        ]
    return np.concatenate(parts)


def frame_psnr(truth: Pixels, made: Pixels) -> Floats:
    """PSNR in dB of each frame (..., H, W, 3), at most 50 dB: (...,)."""
    pairs = ((torch.from_numpy(np.ascontiguousarray(part)) for part in pair) for pair in zip(made, truth, strict=True))
    return torch.stack([psnr(*pair) for pair in pairs]).numpy()


def agreement(a: Ints, b: Ints) -> float:
    """Normalised mutual information of two labelings of any one shape."""
    return nmi(torch.from_numpy(a.ravel()), torch.from_numpy(b.ravel()))


def interval(values: Floats, seed: int) -> dict[str, float]:
    """The mean of (clips,) paired differences and its 95% bootstrap interval: mean, low, high."""
    return dict(zip(("mean", "low", "high"), bootstrap(torch.from_numpy(values), 4000, seed), strict=True))


def live_codes(latent: Ints, count: int) -> Ints:
    """Codes with at least `LIVE_SHARE` of the held-out transitions."""
    used = np.bincount(latent.ravel(), minlength=count)
    return np.flatnonzero(used >= LIVE_SHARE * used.sum())


def visible_shifts(frames: Pixels) -> Ints:
    """How far the whole picture moves between consecutive frames: x_t+1[y + dy, x + dx] is about x_t[y, x].

    Exhaustive search over whole pixels of the grey pictures, by the mean absolute difference of the parts that
    overlap. Needs no training, knows nothing of the latent actions; of equal
    matches the smaller shift counts.

    Args:
        frames: (n, T, H, W, 3).

    Returns:
        (n, T-1, 2) shifts (dy, dx) in pixels; (0, 0) where none beats standing still by `MARGIN`.
    """
    grey, factor = _reduce(frames)
    reach = max(2, min(grey.shape[-2:]) // 6)
    old, new = grey[:, :-1], grey[:, 1:]
    still = np.abs(new - old).mean((-2, -1))
    best, shift = still * (1 - MARGIN), np.zeros((*still.shape, 2), np.int64)
    sides = range(-reach, reach + 1)
    for dy, dx in sorted(((y, x) for y in sides for x in sides), key=lambda s: s[0] ** 2 + s[1] ** 2):
        error = np.abs(_overlap(new, dy, dx) - _overlap(old, -dy, -dx)).mean((-2, -1))
        better = error < best
        best = np.where(better, error, best)
        shift[better] = (dy, dx)
    return shift * factor


def directions(shifts: Ints) -> Ints:
    """Shifts (..., 2) as one of 9 classes, `DIRECTIONS`."""
    return 4 + 3 * np.sign(shifts[..., 0]) + np.sign(shifts[..., 1])


def merge_rare(labels: Ints, classes: int) -> Ints:
    """The labels, all but the most frequent merged until `classes` remain: about the most that so few codes can say."""
    kinds, counts = np.unique(labels, return_counts=True)
    kept = kinds[np.argsort(-counts, kind="stable")][: classes - 1]
    return np.where(np.isin(labels, kept), labels, kinds.max() + 1) if len(kinds) > classes else labels


def by_chance(a: Ints, b: Ints, seed: int, draws: int = 20) -> float:
    """The agreement of shuffled pairs, on average: few samples agree a little by chance."""
    random = np.random.default_rng(seed)
    return float(np.mean([agreement(random.permutation(a.ravel()), b) for _ in range(draws)]))


def moving_half(frames: Pixels) -> NDArray[np.bool_]:
    """Which half of the clips (n, T, H, W, 3) has the larger mean difference between consecutive frames, (n,)."""
    change = np.array([np.abs(np.diff(clip.astype(np.int16), axis=0)).mean() for clip in frames])
    chosen = np.zeros(len(frames), np.bool_)
    chosen[np.argsort(-change, kind="stable")[: (len(frames) + 1) // 2]] = True
    return chosen


def _reduce(frames: Pixels) -> tuple[NDArray[np.float32], int]:
    """Grey pictures of about `SIDE_PX`, and the whole factor they were reduced by."""
    factor = max(1, round(min(frames.shape[2:4]) / SIDE_PX))
    height, width = (side // factor * factor for side in frames.shape[2:4])
    grey = np.stack([clip[:, :height, :width].mean(-1, dtype=np.float32) for clip in frames])
    blocks = grey.reshape(*grey.shape[:2], height // factor, factor, width // factor, factor)
    return blocks.mean((3, 5)), factor


def _overlap(pictures: NDArray[np.float32], dy: int, dx: int) -> NDArray[np.float32]:
    """The part of the pictures that a copy shifted by (dy, dx) covers."""
    height, width = pictures.shape[-2:]
    return pictures[..., max(dy, 0) : height + min(dy, 0), max(dx, 0) : width + min(dx, 0)]

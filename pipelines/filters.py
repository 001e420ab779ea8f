"""Why a video or clip is refused: rules on metadata, signals on frames, and a reason for every drop."""

import functools
import re
import tomllib
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from infra.config import UserError
from pipelines.config import FilterConfig, RulesConfig

RULES_FILE = Path(__file__).with_name("rules.toml")
CHANGED_LEVELS = 12  # a pixel counts as changed above it: compression noise stays below
CHANGED_SHARE = 0.002  # a frame counts as static if fewer pixels change
ORDER = (
    "corrupt",
    "too_few_frames",
    "gap",
    "portrait",
    "black",
    "slideshow",
    "static",
    "blur",
    "cuts",
    "quality",
    "copy",
)
"""The tests of a clip; of several that refuse it, the first is its reason."""
BLANK_CONTRAST = 6.0  # standard deviation of luma; mean luma is no test, good dark games have a mean of 13


@dataclass(frozen=True)
class Verdict:
    """A refusal: `reason` is a short word for the ledger, `detail` what decided it."""

    reason: str
    detail: str


# -- metadata ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metadata:
    """What a sidecar says; `side_px` is the shorter side, `problem` is set where there is none, or a broken one."""

    title: str = ""
    description: str = ""
    duration_s: float | None = None
    side_px: float | None = None
    uploader: str = ""
    webpage_url: str = ""
    problem: str = ""


class Rules:
    """The paper's title rule and a few bounds, as data.

    Raises:
        UserError: the rule file is missing, no TOML, or has unknown keys.
    """

    KEYS = ("title", "action", "negating")

    def __init__(self, config: RulesConfig) -> None:
        self.config = config
        words = _word_lists(config.file or RULES_FILE)
        self.patterns = {key: _pattern(tuple(words[key])) for key in self.KEYS}

    def decide(self, video: Metadata) -> Verdict | None:
        """The first rule that refuses a video, or None."""
        return next((verdict for _, verdict in self.explain(video) if verdict is not None), None)

    def explain(self, video: Metadata) -> list[tuple[str, Verdict | None]]:
        """Every rule in order with its verdict (`lampworks curate --explain`)."""
        if video.problem:
            verdict = Verdict("no_sidecar", video.problem) if self.config.require_sidecar else None
            return [("sidecar", verdict)]
        return [("sidecar", None), ("uploader", self._uploader(video)), *self._words(video), *self._bounds(video)]

    def _uploader(self, video: Metadata) -> Verdict | None:
        if video.uploader in self.config.blocked_uploaders:
            return Verdict("blocked_uploader", video.uploader)
        return None

    def _words(self, video: Metadata) -> list[tuple[str, Verdict | None]]:
        title = _folded(video.title)
        both = title + "\n" + _folded(video.description)
        bad = self.patterns["negating"].search(title)
        return [
            (
                "title",
                None if self.patterns["title"].search(title) else Verdict("title", f"no wanted game: {video.title!r}"),
            ),
            ("action", None if self.patterns["action"].search(both) else Verdict("no_action_word", video.title)),
            ("negating", Verdict("negating_word", bad.group(0)) if bad else None),
        ]

    def _bounds(self, video: Metadata) -> list[tuple[str, Verdict | None]]:
        """What a sidecar does not say refuses nothing."""
        config, seconds, side = self.config, video.duration_s, video.side_px
        return [
            (
                "min_duration",
                _outside("too_short", seconds, "s", seconds is not None and seconds < config.min_duration_s),
            ),
            (
                "max_duration",
                _outside("too_long", seconds, "s", seconds is not None and seconds > config.max_duration_s),
            ),
            ("min_side", _outside("too_small", side, "px", side is not None and side < config.min_side_px)),
            ("max_side", _outside("too_large", side, "px", side is not None and side > config.max_side_px)),
        ]


def _outside(reason: str, value: float | None, unit: str, refused: bool) -> Verdict | None:
    return Verdict(reason, f"{value} {unit}") if refused else None


def _word_lists(path: Path) -> dict[str, list[str]]:
    try:
        words = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"no rule file {path}: give another --rules.file, or leave it out") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no TOML: {error}") from error
    if sorted(words) != sorted(Rules.KEYS) or not all(_is_words(value) for value in words.values()):
        raise UserError(f"{path} has the keys {sorted(words)}: give lists of words for {', '.join(Rules.KEYS)}")
    return words


def _is_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) and word.strip() for word in value)


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'").split())


@functools.lru_cache(maxsize=16)
def _pattern(words: tuple[str, ...]) -> re.Pattern[str]:
    """Any of the words, whole; scripts without spaces (the CJK ones) match anywhere. An empty list matches nothing."""
    if not words:
        return re.compile(r"(?!)")
    return re.compile("|".join(_whole(re.escape(_folded(w)), w) for w in sorted(words, key=len, reverse=True)))


def _whole(escaped: str, word: str) -> str:
    spaced = all(ord(c) < 0x2E80 for c in word)
    return rf"(?<!\w){escaped}(?!\w)" if spaced else escaped


# -- signals -----------------------------------------------------------------------------------------------------


def measure(luma: np.ndarray) -> dict[str, float]:
    """Cheap signals of a clip (about 5 ms at 160x90), independent of any threshold that a user may set.

    Args:
        luma: uint8 (T, H, W), 0..255.
    Returns:
        motion (mean change in levels), static_share, black_share, contrast (median), blur (median variance of the
        Laplacian), letterbox (share of the picture in black bars).
    """
    flat = luma.reshape(len(luma), -1)
    change = cv2.absdiff(flat[1:], flat[:-1])
    moved = np.count_nonzero(change > CHANGED_LEVELS, axis=1) / flat.shape[1]
    contrast = np.array([cv2.meanStdDev(f)[1].item() for f in luma])
    sharpness = [cv2.meanStdDev(cv2.Laplacian(f, cv2.CV_16S))[1].item() ** 2 for f in luma[::8]]
    return {
        "motion": float(cv2.mean(change)[0]),
        "static_share": float((moved < CHANGED_SHARE).mean()),
        "black_share": float((contrast < BLANK_CONTRAST).mean()),
        "contrast": float(np.median(contrast)),
        "blur": float(np.median(sharpness)),
        "letterbox": _bars(luma.max(axis=0)),
    }


_BITS = 1 << np.arange(63, dtype=np.int64)
MIRRORED = int(_BITS[(np.arange(1, 64) % 8) % 2 == 1].sum())
"""The bits of a `phash` that turn over when the picture is mirrored: coefficients that are odd across."""


def phash(luma: np.ndarray, fps: int) -> np.ndarray:
    """A clip's pictures in 63 bits each, five a second (1.4 ms for 16 s of 160x90); copies differ in a few bits.

    The signs of the lowest 8x8 coefficients of a cosine transform, without the mean (Zauner 2010, with zero in the
    median's place, so that mirroring turns over known bits).

    Args:
        luma: uint8 (T, H, W).
        fps: of the frames.
    Returns:
        int64 (ceil(T / max(1, fps // 5)),).
    """
    shown = luma[:: max(1, fps // 5)].astype(np.float32)
    down, across = (_cosines(size) for size in shown.shape[1:])
    waves = down @ shown @ across.T
    return (waves.reshape(len(shown), 64)[:, 1:] > 0) @ _BITS


def _cosines(points: int) -> np.ndarray:
    """The eight lowest waves of a cosine transform, float32 (8, points)."""
    return np.cos(np.pi / points * np.outer(np.arange(8), np.arange(points) + 0.5)).astype(np.float32)


def _bars(brightest: np.ndarray) -> float:
    lit = brightest > 24
    rows, columns = np.flatnonzero(lit.any(axis=1)), np.flatnonzero(lit.any(axis=0))
    if not len(rows):
        return 1.0
    inside = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
    return float(1 - inside / brightest.size)


@dataclass(frozen=True)
class Decision:
    """One test of a clip: a signal's value beside its limit."""

    reason: str
    value: float
    limit: float
    refused: bool


def decisions(signals: dict[str, Any], config: FilterConfig) -> list[Decision]:
    """Every test that a clip's stored signals go through, in order; the first that refuses it is the reason."""
    still = signals["static_share"] > config.max_static_share
    at_most = {
        "corrupt": (signals["corrupt_share"], config.max_corrupt_share),
        "too_few_frames": (signals["held_share"], config.max_held_share),
        "gap": (signals["max_gap_ms"] / 1000, config.max_gap_s),
        "black": (signals["black_share"], config.max_black_share),
        "static": (signals["static_share"], config.max_static_share),
        "slideshow": (len(signals["cut_frames"]) if still else 0, config.max_slides),
        "cuts": (len(signals["cut_frames"]), config.max_cuts),
        "copy": (signals.get("copied_share") or 0.0, config.max_copied_share),
    }
    quality = signals.get("quality")  # a clip that no classifier has seen is not judged by it
    at_least = {
        "portrait": (signals.get("shape") or config.min_shape, config.min_shape),
        "blur": (signals["blur"], config.min_blur),
        "quality": (config.min_quality if quality is None else quality, config.min_quality),
    }
    found = [Decision(reason, value, limit, value > limit) for reason, (value, limit) in at_most.items()]
    found += [Decision(reason, value, limit, value < limit) for reason, (value, limit) in at_least.items()]
    return sorted(found, key=lambda decision: ORDER.index(decision.reason))


def judge(signals: dict[str, Any], config: FilterConfig) -> str:
    """The reason a clip is refused for, from its stored signals; empty if it is kept."""
    return next((decision.reason for decision in decisions(signals, config) if decision.refused), "")

"""The driver's view of a curation: one line whenever units finish or none does, and counters for Prometheus."""

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import ray
from ray.util import metrics

from pipelines.manifest import Plan

log = logging.getLogger(__name__)

QUIET_S = 30.0
"""After so long without a finished unit a line says what the run waits for."""
STAGES = ("fetch", "decode", "write")


def facts(videos: Iterable[dict[str, Any]], stage_s: dict[str, float], retries: int) -> str:
    """What a worker tells of a unit beyond its files, as JSON: it travels in one column.

    Args:
        videos: the unit's ledger rows.
        stage_s: seconds by `STAGES`.
        retries: of fetching.
    """
    rows = list(videos)
    return json.dumps(
        {
            "videos": Counter(f"{row['outcome']} {row['reason'] or ''}" for row in rows),
            "clips": sum(row["clips"] - len(row["dropped_clips"]) for row in rows),
            "windows": Counter(w["reason"] or "" for row in rows for w in row["windows"] or ()),
            "seconds": sum(row["duration_s"] or 0.0 for row in rows),
            "stage_s": stage_s,
            "retries": retries,
        }
    )


class Meter:
    """Counts finished units. As a context it also speaks when none finishes.

    The counters, with Ray's prefix `ray_` and suffix `_total`: `lampworks_curate_videos` by outcome and reason,
    `_clips`, `_windows_dropped` by reason, `_video_hours`, `_stage_seconds` by stage, `_fetch_retries`.
    """

    def __init__(self, plan: Plan, pending: list[str], unit_s: float) -> None:
        jobs = [job for unit in pending for job in plan.jobs(unit)]
        self.videos, self.unit_s = len(jobs), unit_s
        self.seconds = sum(job["ledger"]["duration_s"] or 0.0 for job in jobs if not job["verdict"])
        self.began = self.heard = time.monotonic()
        self.done: Counter[str] = Counter()
        self.stage_s: Counter[str] = Counter()
        self._over = threading.Event()
        self._speaker = threading.Thread(target=self._speak, daemon=True)
        self._counters = {
            name: metrics.Counter(f"lampworks_curate_{name}", text, tag_keys=tags)
            for name, text, tags in (
                ("videos", "Videos with a ledger row.", ("outcome", "reason")),
                ("clips", "Clips kept.", ()),
                ("windows_dropped", "Windows refused by what is seen.", ("reason",)),
                ("video_hours", "Hours of video decoded.", ()),
                ("stage_seconds", "Seconds that workers spent.", ("stage",)),
                ("fetch_retries", "Fetches tried again.", ()),
            )
        }

    def __enter__(self) -> "Meter":
        self._speaker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._speaker.join()

    def add(self, text: str) -> None:
        """Counts a finished unit, by its `facts`, and logs the line."""
        unit = json.loads(text)
        self.heard = time.monotonic()
        self.stage_s.update(unit["stage_s"])
        windows, videos = sum(unit["windows"].values()), sum(unit["videos"].values())
        self.done.update(videos=videos, clips=unit["clips"], windows=windows, seconds=unit["seconds"])
        self._count(unit)
        spent_s = self.heard - self.began
        rate = self.done["seconds"] / spent_s
        left_s = max(0.0, self.seconds - self.done["seconds"]) / rate if rate else float("nan")
        log.info(
            "curate | %d/%d videos | %.2f h | %d clips | kept %.0f%% | %.2f h/h | %.0f s left | %s",
            *(self.done["videos"], self.videos, self.done["seconds"] / 3600, self.done["clips"]),
            *(100 * self.done["clips"] / max(1, self.done["windows"]), rate, left_s, self._shares()),
        )

    def _count(self, unit: dict[str, Any]) -> None:
        for key, number in unit["videos"].items():
            outcome, _, reason = key.partition(" ")
            self._counters["videos"].inc(number, {"outcome": outcome, "reason": reason or "none"})
        for reason, number in unit["windows"].items():
            if reason:
                self._counters["windows_dropped"].inc(number, {"reason": reason})
        for stage, seconds in unit["stage_s"].items():
            if seconds:
                self._counters["stage_seconds"].inc(seconds, {"stage": stage})
        amounts = (
            ("clips", unit["clips"]),
            ("video_hours", unit["seconds"] / 3600),
            ("fetch_retries", unit["retries"]),
        )
        for name, amount in amounts:
            if amount:
                self._counters[name].inc(amount)

    def _shares(self) -> str:
        """Where the workers' time goes."""
        total = sum(self.stage_s.values()) or 1.0
        return ", ".join(f"{stage} {100 * self.stage_s[stage] / total:.0f}%" for stage in STAGES if self.stage_s[stage])

    def _speak(self) -> None:
        while not self._over.wait(QUIET_S / 3):
            quiet_s = time.monotonic() - self.heard
            if quiet_s > QUIET_S:
                log.info("curate | no unit finished for %.0f s | %s", quiet_s, self._why())

    def _why(self) -> str:
        total = ray.cluster_resources().get("CPU", 0.0)
        busy = total - ray.available_resources().get("CPU", 0.0)
        if busy < 1:
            return f"waits for workers to start: none of {total:.0f} CPUs is taken"
        shares = f" | so far {shares}" if (shares := self._shares()) else ""
        return f"{busy:.0f} of {total:.0f} CPUs are at work on units of up to {self.unit_s:.0f} s{shares}"

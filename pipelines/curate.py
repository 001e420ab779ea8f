"""Raw video to clip shards: the Ray Data graph, read top to bottom.

    lampworks curate --source videos/ --name platformers

A plan (a manifest with one row a new video, its verdict by metadata, and its work unit) is written once and never
changes; a unit's work is a pure function of it. Workers write a unit's two files; the driver alone commits them. What
is not committed does not exist, so a killed run is simply run again.
"""

import contextlib
import fcntl
import itertools
import json
import logging
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data
from deltalake.exceptions import CommitFailedError, DeltaError
from ray.data import ActorPoolStrategy, DataContext

from infra.artifact import resolve
from infra.cluster import connect
from infra.config import Home, UserError, digest, from_dict, to_dict
from pipelines.buckets import BucketPath, place
from pipelines.config import CurateConfig, FetchConfig
from pipelines.curation_report import report
from pipelines.explain import estimate, explain
from pipelines.fetch import FetchError, fetched
from pipelines.manifest import Plan, open_plan, plan_again
from pipelines.meter import STAGES, Meter, facts
from pipelines.revise import judge_again, settle
from pipelines.shards import (
    CLIP_SCHEMA,
    VIDEO_SCHEMA,
    Dataset,
    Unit,
    Writer,
    check_schema,
    dataset_folder,
    open_dataset,
    open_ledger,
)
from pipelines.sources import source_of
from pipelines.tables import delta_table, sweep, write_shard
from pipelines.unit import Child, dead_letter

log = logging.getLogger(__name__)

COMMIT_EVERY_S = 2.0


@dataclass(frozen=True)
class CurateResult:
    """What a curation left: the dataset, and how many videos ended how."""

    dataset: Dataset
    outcomes: dict[str, int]
    clips: int

    @property
    def version(self) -> int:
        """The dataset's version."""
        return self.dataset.version

    @property
    def reference(self) -> str:
        """`name@version`."""
        return self.dataset.reference

    @property
    def path(self) -> Path:
        """The dataset's folder."""
        return self.dataset.folder


def curate(config: CurateConfig) -> CurateResult:
    """Adds a source's new videos to a dataset; run twice, the second time does nothing.

    Raises:
        UserError: no such source, nothing in it, nothing passes, another run is at work, or the dataset was made with
            other settings.
    """
    home = Home(config.home).ensure()
    folder = dataset_folder(home, config.name, config.target)
    if config.quality:
        config = replace(config, quality=resolve(home, config.quality, kind="quality").reference)
    with _locked(home, folder), _plainly(folder):
        writer = Writer(folder, digest(_bearing(config)))
        for part in ("", "plans", "clips", "videos"):
            sweep(folder / part)
        check_schema(folder, delta_table(folder / "videos"))
        plan = open_plan(folder, source_of(config), config, writer.config_digest)
        _recover(writer, plan)
        incomplete = judge_again(writer, config.filters)
        if incomplete:
            judged = digest(to_dict(config.filters))
            plan = plan_again(folder, plan, incomplete, lambda _: judged)
        lost = _to_retry(folder, config.retry)
        if lost:
            plan = plan_again(folder, plan, dict.fromkeys(lost, []), lambda video: f"retry {lost[video]}")
        pending = _recover(writer, plan)
        if pending:
            with connect(config.cluster):
                _work(config, writer, plan, pending)
                settle(writer, plan, config)
        settle(writer, plan, config)  # what a killed run, other thresholds or another classifier left to do
    return _summary(home, folder)


def command(config: CurateConfig) -> CurateResult | str:
    """`lampworks curate`: with --dry-run or --explain it only says what would happen, or why it did."""
    if config.explain is not None:
        return explain(config, config.explain)
    return estimate(config) if config.dry_run else curate(config)


def _bearing(config: CurateConfig) -> dict[str, Any]:
    """The settings that a clip's bytes depend on."""
    names = ("width_px", "height_px", "fps", "clip_frames", "aspect", "crop_bars", "codec", "crf")
    return {name: getattr(config, name) for name in names}


@contextlib.contextmanager
def _locked(home: Home, folder: Path) -> Iterator[None]:
    """One run at a time on a dataset; the kernel drops the lock with the process.

    An object store has no such lock: runs of one home exclude each other, and of two homes' runs on one dataset the
    later commit of a unit fails (Delta's own check of concurrent transactions).
    """
    local = home.path / "locks" / digest(str(folder))[:16] if isinstance(folder, BucketPath) else folder
    with contextlib.ExitStack() as held:
        try:
            local.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context((local / ".lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another run is curating {folder}: wait for it, or choose another --name") from error
        except OSError as error:
            raise UserError(f"cannot write to {local} ({error.strerror}): choose another --home or --name") from error
        yield


@contextlib.contextmanager
def _plainly(folder: Path) -> Iterator[None]:
    """A disk that is full, a place that can't be written or reached, a rival: one sentence. Nothing committed is lost.

    Raises:
        UserError: instead of them.
    """
    try:
        yield
    except (OSError, DeltaError) as error:
        raise UserError(_stopped(folder, error)) from error


def _stopped(folder: Path, error: BaseException) -> str:
    if isinstance(error, CommitFailedError):
        return f"another run committed to {folder} meanwhile ({error}): run again when it has ended"
    words = re.sub(r"\x1b\[[0-9;]*m|\u21b3", "", str(error)).split()  # Delta draws its errors as trees, in colours
    said = " ".join(words)[:500] or type(error).__name__
    return f"stopped at {folder}: {said}; mend that and run again: it continues"


def _to_retry(folder: Path, reasons: tuple[str, ...]) -> dict[str, str]:
    """Dead letters to take once more: video id -> the unit that gave it up."""
    if not reasons or delta_table(folder / "videos") is None:
        return {}
    rows = open_ledger(folder, ["video_id", "unit_id", "outcome", "reason"])
    dead = [row for row in rows if row["outcome"] == "dead_letter" and row["reason"] in reasons]
    return {row["video_id"]: row["unit_id"] for row in dead}


def _unit(folder: Path, unit_id: str) -> Unit | None:
    """A unit whose work is done: its ledger file is written last and vouches for its clips."""
    clips, videos = folder / "clips" / f"{unit_id}.parquet", folder / "videos" / f"{unit_id}.parquet"
    return Unit(unit_id, clips if clips.exists() else None, videos) if videos.exists() else None


def _recover(writer: Writer, plan: Plan) -> list[str]:
    """Commits what a killed run had finished; returns the ids of the units that are still to do."""
    committed = writer.committed(plan.units)
    open_units = [u for u in plan.units if u not in committed]
    done = [unit for unit_id in open_units if (unit := _unit(writer.folder, unit_id))]
    if done:
        writer.commit(done, "recovered", plan.again)
    ready = {u.unit_id for u in done}
    return [u for u in open_units if u not in ready]


# -- the graph ---------------------------------------------------------------------------------------------------


def _work(config: CurateConfig, writer: Writer, plan: Plan, pending: list[str]) -> None:
    """Units flow through a pool of actors; small rows flow back, and finished units are committed in batches."""
    most = max(1, min(config.workers or int(ray.cluster_resources().get("CPU", 1)), len(pending)))
    pool = ActorPoolStrategy(
        min_size=min(config.min_workers or most, most),
        max_size=most,
        max_tasks_in_flight_per_actor=config.units_in_flight,
    )
    settings = {"config": to_dict(config), "folder": str(writer.folder), "digest": writer.config_digest}
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    context = DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    items = [{"unit_id": unit, "jobs": json.dumps(plan.jobs(unit))} for unit in pending]
    units = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        UnitWorker, fn_constructor_kwargs=settings, batch_size=1, compute=pool, num_cpus=1
    )
    if config.backpressure_ratio is not None:
        units.context.downstream_capacity_backpressure_ratio = config.backpressure_ratio
    waiting: list[Unit] = []
    committed = time.monotonic()
    with Meter(plan, pending, config.unit_s) as meter:
        try:
            for row in units.iter_rows():
                if row["stopped"]:
                    raise OSError(row["stopped"])
                unit = _unit(writer.folder, row["unit_id"])
                if unit is None:
                    raise RuntimeError(f"unit {row['unit_id']} reported done but left no file")
                waiting.append(unit)
                meter.add(row["facts"])
                if time.monotonic() - committed > COMMIT_EVERY_S:
                    writer.commit(waiting, "units", plan.again)
                    waiting.clear()
                    committed = time.monotonic()
        finally:
            if waiting:
                writer.commit(waiting, "units", plan.again)


class UnitWorker:
    """An actor that turns one work unit a call into a shard and its ledger rows."""

    def __init__(self, config: dict[str, Any], folder: str, digest: str) -> None:
        self.config, self.folder, self.digest = config, place(folder), digest
        self.fetch = from_dict(FetchConfig, config["fetch"])
        self.child = Child(config, digest)
        self.stage_s, self.retries = dict.fromkeys(STAGES, 0.0), 0
        self.held, self.held_for = contextlib.ExitStack(), ""  # the last part's file

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        """One unit: {"unit_id", "jobs"} in, {"unit_id", "facts", "stopped"} out; the last says why, if it did."""
        unit_id, facts, stopped = str(batch["unit_id"][0]), "", ""
        try:
            facts = self._unit(unit_id, json.loads(batch["jobs"][0]))
        except OSError as error:  # of this machine or the target, not of a video
            stopped = str(error)
        return {"unit_id": [unit_id], "facts": [facts], "stopped": [stopped]}

    def _unit(self, unit_id: str, jobs: list[dict[str, Any]]) -> str:
        """Writes a unit's files; returns its `facts`."""
        began = time.monotonic()
        self.stage_s, self.retries = dict.fromkeys(STAGES, 0.0), 0
        videos: list[dict[str, Any]] = []
        clips = self._clips(unit_id, jobs, videos)
        first = next(clips, None)  # a unit without clips has no file of them
        if first is not None:
            write_shard(self.folder / "clips" / f"{unit_id}.parquet", itertools.chain([first], clips), CLIP_SCHEMA)
        write_shard(self.folder / "videos" / f"{unit_id}.parquet", videos, VIDEO_SCHEMA)
        self.stage_s["write"] = time.monotonic() - began - sum(self.stage_s.values())
        return facts(videos, self.stage_s, self.retries)

    def _clips(
        self, unit_id: str, jobs: list[dict[str, Any]], videos: list[dict[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        """The clips of all videos, one at a time; the videos' ledger rows are appended on the way."""
        shared = {"unit_id": unit_id, "config_digest": self.digest}
        for job in jobs:
            result = self._result(job)
            rows = result.pop("rows", ())
            same = {k: job["ledger"][k] for k in ("video_id", "split", "title", "uploader", "webpage_url")}
            yield from ({**row, **shared, **same} for row in rows)
            dropped = [w["clip_id"] for w in result.get("windows", []) if w["reason"] and w["clip_id"]]
            stored = [w["clip_id"] for w in result.get("windows", []) if w["clip_id"]]
            ledger = {**dict.fromkeys(VIDEO_SCHEMA.names), **job["ledger"], **shared, **result, "clips": len(stored)}
            videos.append({**ledger, "dropped_clips": dropped})

    def _result(self, job: dict[str, Any]) -> dict[str, Any]:
        before_s = (job["first_slot"] or 0) / self.config["fps"]  # decoded too where a file has no index
        decoded_s = (job["ledger"]["duration_s"] or 0.0) + before_s
        limit_s = self.config["timeout_s"] + self.config["timeout_factor"] * decoded_s
        if job["verdict"]:
            return self._decoded(job, limit_s)
        part = job["first_slot"] is not None
        if job["path"] != self.held_for:
            self.held.close()
        try:
            with contextlib.ExitStack() as here:
                got = here.enter_context(fetched(job["path"], job["ledger"]["size_bytes"], self.fetch, shared=part))
                self.stage_s["fetch"] += got.seconds
                self.retries += got.retries
                result = self._decoded({**job, "path": str(got.path)}, limit_s)
                self.held.close()
                if part:  # the next part may come here too
                    self.held, self.held_for = here.pop_all(), job["path"]
                return result
        except FetchError as error:
            self.retries += error.retries
            return dead_letter("fetch", error.reason, error.detail)

    def _decoded(self, job: dict[str, Any], limit_s: float) -> dict[str, Any]:
        began = time.monotonic()
        result = self.child.run(job, limit_s)
        self.stage_s["decode"] += time.monotonic() - began
        return result


def _summary(home: Home, folder: Path) -> CurateResult:
    dataset = open_dataset(home, str(folder) if isinstance(folder, BucketPath) else folder.name)
    ledger = dataset.video_table(["outcome", "reason", "clips", "dropped_clips"]).to_pylist()
    outcomes = Counter(row["outcome"] for row in ledger)
    kept = [row for row in ledger if row["outcome"] in ("kept", "partial")]
    clips = sum(row["clips"] - len(row["dropped_clips"] or ()) for row in kept)
    report(home, dataset)
    log.info("curate | %s | %d clips | %s", dataset.reference, clips, dict(sorted(outcomes.items())))
    if not clips:
        reasons = Counter(row["reason"] for row in ledger)
        listed = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common(5))
        raise UserError(f"no clip of {len(ledger)} videos passed ({listed}): see `lampworks show {dataset.name}`")
    return CurateResult(dataset, dict(outcomes), clips)

"""What can be done to a dataset without decoding: judge clips again, settle what is kept of copies, forget footage.

lampworks forget platformers --uploader someone
"""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from infra.config import Home, from_dict, to_dict
from pipelines.config import CurateConfig, FilterConfig, ForgetConfig
from pipelines.cutter import outcome_of
from pipelines.dedup import copied, find_copies, mark_same_frames, read_pairs
from pipelines.filters import judge
from pipelines.manifest import PLAN_SCHEMA, Plan, planned
from pipelines.shards import CLIP_SCHEMA, KEPT, VIDEO_SCHEMA, Writer, open_dataset, open_ledger
from pipelines.tables import (
    DatasetError,
    delta_table,
    open_table,
    parquet,
    rewrite,
    table_files,
    write_shard,
    write_whole,
)

log = logging.getLogger(__name__)

JUDGED = "judged.json"


# -- other thresholds --------------------------------------------------------------------------------------------


def judge_again(writer: Writer, filters: FilterConfig) -> dict[str, list[str]]:
    """Applies thresholds to the stored signals of every decoded video; nothing is read but the ledger.

    A clip that is refused now is dropped from the dataset (its bytes stay, an older version has it); one that was
    dropped comes back.

    Returns:
        Videos with windows that pass now but were never encoded, with the ids of those clips that are: only these
        videos must be decoded once more.
    """
    if _mark(writer.folder).get("filters") == to_dict(filters) or delta_table(writer.folder / "videos") is None:
        return {}
    changes: dict[str, dict[str, Any]] = {}
    incomplete: dict[str, list[str]] = {}
    for row in _judged(writer.folder):
        _judge_video(row, filters, changes, incomplete)
    if changes:
        writer.amend(changes, "thresholds")
        log.info("curate | thresholds changed %d videos; %d must be decoded again", len(changes), len(incomplete))
    return incomplete


def _mark(folder: Path) -> dict[str, Any]:
    """By which thresholds and classifier the ledger stands judged, and at which version; a torn mark is none."""
    mark = folder / JUDGED
    try:
        return json.loads(mark.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def judged_by(folder: Path) -> FilterConfig:
    """The thresholds that a dataset stands judged by; the defaults where it was never curated."""
    return from_dict(FilterConfig, _mark(folder).get("filters", {}))


def _judged(folder: Path) -> list[dict[str, Any]]:
    """The ledger's rows that thresholds decide on."""
    columns = ["video_id", "outcome", "stage", "reason", "detail", "duration_s", "windows", "dropped_clips"]
    rows = open_ledger(folder, [*columns, "source_width_px", "source_height_px", "size_bytes"])
    open_to = (*KEPT, "rejected")
    return [row for row in rows if row["windows"] and (row["outcome"] in open_to or row["reason"] == "copy")]


def _judge_video(
    row: dict[str, Any], filters: FilterConfig, changes: dict[str, dict[str, Any]], incomplete: dict[str, list[str]]
) -> None:
    windows = [{**window} for window in row["windows"]]
    for window in windows:
        reason = judge(window, filters)
        if not reason and window["clip_id"] is None:
            incomplete[row["video_id"]] = [w["clip_id"] for w in windows if w["clip_id"]]
            continue  # not in the dataset yet, so its old reason stands
        window["reason"] = reason
    dropped = [w["clip_id"] for w in windows if w["reason"] and w["clip_id"]]
    stopped = row["detail"] if row["stage"] == "decode" else ""
    fresh = {**outcome_of(windows, row["duration_s"], stopped), "dropped_clips": dropped, "windows": windows}
    if fresh["outcome"] == "rejected" and fresh["reason"] == "copy":
        originals = sorted({w["copy_of"] for w in windows if w["reason"] == "copy"})
        fresh |= {"outcome": "duplicate", "stage": "copies", "detail": f"as {', '.join(originals)}"[:200]}
    if any(fresh[key] != row[key] for key in fresh):
        changes[row["video_id"]] = fresh


# -- the last word -----------------------------------------------------------------------------------------------


def settle(writer: Writer, plan: Plan, config: CurateConfig) -> None:
    """After all units are done: scores clips, finds copies among them, and judges each by what it is now known to be.

    Where nothing changed since the last time, nothing is read.
    """
    said = {"filters": to_dict(config.filters), "quality": config.quality}
    version = open_table(writer.folder / "videos").version()
    if _mark(writer.folder) == {**said, "version": version}:
        return
    mark_same_frames(writer, plan)
    scores = None
    if config.quality:
        from pipelines.quality import score

        scores = score(writer.folder, config)
    if config.filters.max_copied_share < 1:
        find_copies(writer.folder, config.cluster)
    version = settle_ledger(writer, config.filters, scores)
    write_whole(writer.folder / JUDGED, json.dumps({**said, "version": version}))


def settle_ledger(writer: Writer, filters: FilterConfig, scores: Mapping[str, float] | None) -> int:
    """Writes scores and shares of copies into the ledger's windows and judges them; a version if anything changes.

    Args:
        writer: of the dataset.
        filters: thresholds.
        scores: quality by clip id; None leaves those that are there.
    Returns:
        The dataset's version.
    """
    rows = _judged(writer.folder)
    fresh: list[dict[str, Any]] = [{**row, "windows": [_alone(w, scores) for w in row["windows"]]} for row in rows]
    shares = _shares(writer.folder, fresh, filters)
    changes: dict[str, dict[str, Any]] = {}
    for row, before in zip(fresh, rows, strict=True):
        for window in row["windows"]:
            share, original = shares.get(window["clip_id"] or "", (None, None))
            window |= {"copied_share": share and float(np.float32(share)), "copy_of": original}
        _judge_video(row, filters, changes, {})
        if row["video_id"] not in changes and row["windows"] != before["windows"]:
            changes[row["video_id"]] = {"windows": row["windows"]}
    if changes:
        log.info("curate | scores and copies changed %d videos", len(changes))
    return writer.amend(changes, "scores and copies")


def _alone(window: dict[str, Any], scores: Mapping[str, float] | None) -> dict[str, Any]:
    """A window with its score, as if nothing were a copy of anything."""
    scored = {} if scores is None else {"quality": scores.get(window["clip_id"] or "")}
    return {**window, "copied_share": None, "copy_of": None, **scored}


def _shares(folder: Path, rows: list[dict[str, Any]], filters: FilterConfig) -> dict[str, tuple[float, str]]:
    """Of clips that pass alone: how much of each is in better ones, and in which most (see `dedup.copied`)."""
    windows = [(row, window) for row in rows for window in row["windows"] if window["clip_id"]]
    videos = {window["clip_id"]: row["video_id"].partition("#")[0] for row, window in windows}
    ranks = {w["clip_id"]: (*_rank(row), w["start_s"]) for row, w in windows if not judge(w, filters)}
    pairs = read_pairs(folder)  # a copy of the very file has the same clips, which are none of one another
    return copied(ranks, [pair for pair in pairs if videos.get(pair["a"]) != videos.get(pair["b"])])


def _rank(row: dict[str, Any]) -> tuple[Any, ...]:
    """Which copy is better, lower first: the larger picture, the more bits a second, the smaller id."""
    pixels = (row["source_width_px"] or 0) * (row["source_height_px"] or 0)
    return -pixels, -(row["size_bytes"] or 0) / max(row["duration_s"] or 0.0, 1e-3), row["video_id"]


# -- takedown ----------------------------------------------------------------------------------------------------


def forget(config: ForgetConfig) -> str:
    """Removes footage from every table and file of a dataset, older versions, tokens and pages about it included.

    A ledger row stays, bare of pictures and texts, so that the next curation does not take the video again.

    Returns:
        A sentence that says what is gone.

    Raises:
        DatasetError: nothing in the dataset answers to it.
    """
    name = config.name
    dataset = open_dataset(Home(config.home), name)
    writer = Writer(dataset.folder)
    key, value = ("video_id", config.video) if config.video else ("uploader", config.uploader)
    gone = _videos_with(dataset.folder / "videos", key, value)
    if not gone:
        raise DatasetError(f"dataset {name!r} has no video with {key} {value!r}: see its ledger")
    clips = dataset.folder / "clips"
    held = _clips_of(clips, gone)
    for table in sorted([*dataset.folder.glob("tokens-*"), *dataset.folder.glob("quality-*")]):
        _purge(table, lambda row: row["clip_id"] in held)
    _purge(clips, lambda row: row["video_id"] in gone)
    writer.amend({video: _tombstone() for video in gone}, "forgotten")
    returned = _return_copies(writer, gone)
    _delete_unreferenced(dataset.folder / "videos", lambda row: row["video_id"] in gone)
    _scrub_plans(dataset.folder / "plans", gone)
    for shown in [
        *Home(config.home).reports.glob(f"{dataset.name}@*.html"),
        *Home(config.home).reports.glob("replay-*"),
    ]:
        shown.unlink()
    log.info("forget | %s | %d videos | %d clips | %d other copies return", name, len(gone), len(held), returned)
    return f"{len(gone)} videos with {len(held)} clips are gone from {name}, older versions included"


def _videos_with(root: Path, key: str, value: str | None) -> set[str]:
    """Videos that any file answers for, those of older versions too: a killed request finds its footage again."""
    files = (parquet(p).read(columns=["video_id", key]).to_pylist() for p in root.glob("[!.]*.parquet"))
    return {
        row["video_id"] for file in files for row in file if value in (row[key], (row[key] or "").partition("#")[0])
    }


def _return_copies(writer: Writer, gone: set[str]) -> int:
    """Where the kept copy is forgotten, the next best one takes its place; returns how many videos come back.

    Byte-identical files were never decoded and stay away: they are what was asked to be forgotten.
    """
    names = {f"as {video}" for video in gone}
    rows = open_ledger(writer.folder, ["video_id", "outcome", "reason", "detail", "duration_s", "windows"])
    same = [row for row in rows if row["reason"] == "same_frames" and row["detail"] in names]
    writer.amend({row["video_id"]: outcome_of(row["windows"], row["duration_s"], "") for row in same}, "returned")
    mark_same_frames(writer, Plan(planned(writer.folder)))
    if mark := _mark(writer.folder):
        version = settle_ledger(writer, from_dict(FilterConfig, mark["filters"]), None)
        write_whole(writer.folder / JUDGED, json.dumps({**mark, "version": version}))
    after = {row["video_id"]: row["outcome"] for row in open_ledger(writer.folder, ["video_id", "outcome"])}
    return sum(row["outcome"] not in KEPT and after[row["video_id"]] in KEPT for row in rows)


def _tombstone() -> dict[str, Any]:
    bare = dict.fromkeys(VIDEO_SCHEMA.names)
    for name in ("uri", "video_id", "unit_id", "split", "size_bytes", "mtime_ns", "config_digest"):
        del bare[name]
    return {**bare, "outcome": "rejected", "stage": "request", "reason": "forgotten", "clips": 0, "dropped_clips": []}


def _clips_of(root: Path, gone: set[str]) -> set[str]:
    rows = (parquet(p).read(columns=["clip_id", "video_id"]).to_pylist() for p in root.glob("[!.]*.parquet"))
    return {row["clip_id"] for file in rows for row in file if row["video_id"] in gone}


def _purge(root: Path, concerns: Callable[[dict[str, Any]], bool]) -> None:
    """Takes rows out of a table in a new version, then deletes every older file that held them."""
    table = delta_table(root)
    if table is None:
        return
    files = table_files(table, root)
    schema = parquet(files[0]).schema_arrow if files else CLIP_SCHEMA
    rewrite(root, table, schema, lambda row: None if concerns(row) else row, {"message": "forgotten"})
    _delete_unreferenced(root, concerns)


def _delete_unreferenced(root: Path, concerns: Callable[[dict[str, Any]], bool]) -> None:
    live = set(table_files(open_table(root), root))
    for path in sorted(root.glob("[!.]*.parquet")):
        key = [c for c in ("clip_id", "video_id") if c in parquet(path).schema_arrow.names]
        if path not in live and any(map(concerns, parquet(path).read(columns=key).to_pylist())):
            path.unlink()


def _scrub_plans(folder: Path, gone: set[str]) -> None:
    """Titles and names leave the manifests too; paths stay, so that nothing is planned again."""
    for path in sorted(folder.glob("*.parquet")):
        rows = parquet(path).read().to_pylist()
        texts = dict.fromkeys(("title", "uploader", "webpage_url", "detail"))
        write_shard(path, [{**r, **texts} if r["video_id"] in gone else r for r in rows], PLAN_SCHEMA)

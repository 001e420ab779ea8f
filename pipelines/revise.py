"""What can be done to a dataset without decoding: judge clips again by other thresholds, and forget footage.

lampworks forget platformers --uploader someone
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from infra.config import Home, digest, to_dict
from pipelines.config import FilterConfig, ForgetConfig
from pipelines.filters import judge
from pipelines.manifest import PLAN_SCHEMA
from pipelines.shards import CLIP_SCHEMA, KEPT, VIDEO_SCHEMA, Writer, open_dataset, open_ledger
from pipelines.tables import DatasetError, delta_table, open_table, rewrite, table_files, write_shard
from pipelines.unit import outcome_of

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
    mark = writer.folder / JUDGED
    wanted = digest(to_dict(filters))
    if mark.exists() and json.loads(mark.read_text(encoding="utf-8")) == wanted:
        return {}
    changes: dict[str, dict[str, Any]] = {}
    incomplete: dict[str, list[str]] = {}
    if delta_table(writer.folder / "videos") is not None:
        columns = ["video_id", "outcome", "stage", "reason", "detail", "duration_s", "windows", "dropped_clips"]
        for row in open_ledger(writer.folder, columns):
            if row["windows"] and row["outcome"] in (*KEPT, "rejected"):
                _judge_video(row, filters, changes, incomplete)
    if changes:
        writer.amend(changes, "thresholds")
        log.info("curate | thresholds changed %d videos; %d must be decoded again", len(changes), len(incomplete))
    return incomplete


def mark_judged(folder: Path, filters: FilterConfig) -> None:
    """Notes that the ledger stands judged by these thresholds, so that the next run need not read it."""
    (folder / JUDGED).write_text(json.dumps(digest(to_dict(filters))), encoding="utf-8")


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
    if any(fresh[key] != row[key] for key in fresh):
        changes[row["video_id"]] = fresh


# -- takedown ----------------------------------------------------------------------------------------------------


def forget(config: ForgetConfig) -> str:
    """Removes footage from every table and file of a dataset, older versions and tokens included.

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
    ledger = open_ledger(dataset.folder, ["video_id", "uploader", "outcome"])
    gone = {row["video_id"] for row in ledger if row[key] == value}
    if not gone:
        raise DatasetError(f"dataset {name!r} has no video with {key} {value!r}: see its ledger")
    clips = dataset.folder / "clips"
    held = _clips_of(clips, gone)
    for tokens in sorted(dataset.folder.glob("tokens-*")):
        _purge(tokens, lambda row: row["clip_id"] in held, lambda row: None)
    _purge(clips, lambda row: row["video_id"] in gone, lambda row: None)
    writer.amend({video: _tombstone() for video in gone}, "forgotten")
    _delete_unreferenced(dataset.folder / "videos", lambda row: row["video_id"] in gone)
    _scrub_plans(dataset.folder / "plans", gone)
    log.info("forget | %s | %d videos | %d clips", name, len(gone), len(held))
    return f"{len(gone)} videos with {len(held)} clips are gone from {name}, older versions included"


def _tombstone() -> dict[str, Any]:
    bare = dict.fromkeys(VIDEO_SCHEMA.names)
    for name in ("uri", "video_id", "unit_id", "split", "size_bytes", "mtime_ns", "config_digest"):
        del bare[name]
    return {**bare, "outcome": "rejected", "stage": "request", "reason": "forgotten", "clips": 0, "dropped_clips": []}


def _clips_of(root: Path, gone: set[str]) -> set[str]:
    rows = (pq.read_table(p, columns=["clip_id", "video_id"]).to_pylist() for p in root.glob("[!.]*.parquet"))
    return {row["clip_id"] for file in rows for row in file if row["video_id"] in gone}


def _purge(
    root: Path, concerns: Callable[[dict[str, Any]], bool], change: Callable[[dict[str, Any]], dict[str, Any] | None]
) -> None:
    """Takes rows out of a table in a new version, then deletes every older file that held them."""
    table = delta_table(root)
    if table is None:
        return
    files = table_files(table, root)
    schema = pq.read_schema(files[0]) if files else CLIP_SCHEMA
    rewrite(root, table, schema, lambda row: change(row) if concerns(row) else row, {"message": "forgotten"})
    _delete_unreferenced(root, concerns)


def _delete_unreferenced(root: Path, concerns: Callable[[dict[str, Any]], bool]) -> None:
    live = set(table_files(open_table(root), root))
    for path in sorted(root.glob("[!.]*.parquet")):
        key = [c for c in ("clip_id", "video_id") if c in pq.read_schema(path).names]
        if path not in live and any(map(concerns, pq.read_table(path, columns=key).to_pylist())):
            path.unlink()


def _scrub_plans(folder: Path, gone: set[str]) -> None:
    """Titles and names leave the manifests too; paths stay, so that nothing is planned again."""
    for path in sorted(folder.glob("*.parquet")):
        rows = pq.read_table(path).to_pylist()
        texts = dict.fromkeys(("title", "uploader", "webpage_url", "detail"))
        write_shard(path, [{**r, **texts} if r["video_id"] in gone else r for r in rows], PLAN_SCHEMA)

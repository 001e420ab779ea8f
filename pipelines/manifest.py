"""What there is to do: the source's videos, their sidecars, and a plan that never changes once written."""

import hashlib
import json
import logging
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from infra.config import digest
from pipelines.buckets import is_remote
from pipelines.config import CurateConfig
from pipelines.filters import Rules, Verdict
from pipelines.sources import Source, described, listed
from pipelines.tables import DatasetError, parquet, write_shard, write_whole
from pipelines.unit import file_digest

log = logging.getLogger(__name__)

UNIT_VIDEOS = 500
LEAST_UNITS = 16
LEAST_UNIT_S = 60.0
PLAN_SCHEMA = pa.schema(
    [
        ("unit_id", pa.string()),
        ("path", pa.string()),
        ("verdict", pa.bool_()),
        ("peek", pa.bool_()),
        ("first_slot", pa.int64()),
        ("last_slot", pa.int64()),
        ("again", pa.bool_()),
        ("have", pa.list_(pa.string())),
        ("uri", pa.string()),
        ("video_id", pa.string()),
        ("split", pa.string()),
        ("outcome", pa.string()),
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("size_bytes", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("etag", pa.string()),
        ("content_digest", pa.string()),
        ("duration_s", pa.float64()),
        ("title", pa.string()),
        ("uploader", pa.string()),
        ("webpage_url", pa.string()),
    ]
)
_FOR_WORKER = ("path", "verdict", "peek", "first_slot", "last_slot")
_OWN = (*_FOR_WORKER, "unit_id", "again", "have")


def scan(source: str) -> list[Source]:
    """Every video of a source with its metadata, sorted by uri.

    Raises:
        UserError: no such source, or no video in it.
    """
    return described(listed(source))


def split_of(video_id: str, holdout_share: float) -> str:
    """ "test" or "train" by a hash of the id: stable whatever else is in the dataset."""
    place = int(hashlib.sha256(f"split/{video_id}".encode()).hexdigest()[:12], 16) / 16**12
    return "test" if place < holdout_share else "train"


# -- the plan ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A fixed list of videos with their units. Several may lie open after kills; they are worked off together."""

    rows: list[dict[str, Any]]

    @cached_property
    def units(self) -> list[str]:
        """Unit ids in the order of work."""
        return list(dict.fromkeys(row["unit_id"] for row in self.rows))

    @cached_property
    def _by_unit(self) -> dict[str, list[dict[str, Any]]]:
        grouped: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in self.rows:
            grouped[row["unit_id"]].append(row)
        return grouped

    @cached_property
    def again(self) -> dict[str, str]:
        """Units that decode one video once more, with its id."""
        return {row["unit_id"]: row["video_id"] for row in self.rows if row["again"]}

    @property
    def video_ids(self) -> list[str]:
        """Every planned video, in the order of the plans."""
        return list(dict.fromkeys(row["video_id"] for row in self.rows))

    def jobs(self, unit_id: str) -> list[dict[str, Any]]:
        """What a worker needs for each video of a unit."""
        return [_job(row) for row in self._by_unit[unit_id]]


def _job(row: dict[str, Any]) -> dict[str, Any]:
    ledger = {k: v for k, v in row.items() if k not in _OWN}
    return {**{key: row.get(key) for key in _FOR_WORKER}, "have": row["have"] or [], "ledger": ledger}


def open_plan(folder: Path, source: str, config: CurateConfig, config_digest: str) -> Plan:
    """Everything planned so far, with a new plan for the source's new videos appended.

    Raises:
        UserError: nothing to curate, or the dataset was made with other settings.
    """
    _check_same(folder, config_digest)
    old = planned(folder)
    new = _unknown(listed(source), old)
    if not new:
        return Plan(old)
    log.info("curate | planned %d videos | %d known", len(new), len(old))
    return Plan([*old, *_added(folder, _planned(described(new), old, config, config_digest))])


def _unknown(sources: list[Source], old: list[dict[str, Any]]) -> list[Source]:
    """Those that were not planned yet. Another size or etag at a known uri is another video."""
    known: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in old:
        known[row["uri"]].append(row)

    def fits(source: Source, row: dict[str, Any]) -> bool:
        pairs = (source.size_bytes, row["size_bytes"]), (source.etag, row.get("etag"))
        return all(ours is None or theirs is None or ours == theirs for ours, theirs in pairs)

    return [s for s in sources if not any(fits(s, row) for row in known[s.uri])]


def new_rows(folder: Path, source: str, config: CurateConfig) -> list[dict[str, Any]]:
    """What the next plan would hold; nothing is written.

    Raises:
        UserError: no such source, or nothing in it.
    """
    old = planned(folder)
    return _planned(described(_unknown(listed(source), old)), old, config, "")


def planned(folder: Path) -> list[dict[str, Any]]:
    """The rows of every plan of a dataset, in order."""
    paths = sorted((folder / "plans").glob("*.parquet"))
    return [row for path in paths for row in parquet(path).read().to_pylist()]


def plan_again(folder: Path, plan: Plan, incomplete: dict[str, list[str]], reason: Callable[[str], str]) -> Plan:
    """Appends videos that must be decoded once more, one unit each.

    Args:
        folder: the dataset's.
        plan: what is planned so far.
        incomplete: by video id, the ids of its clips that are stored already.
        reason: what makes it necessary, by video id: planned once for each.
    """
    first = {row["video_id"]: row for row in reversed(plan.rows)}
    rows = [
        {**first[video], "unit_id": digest([reason(video), video])[:24], "again": True, "have": have}
        for video, have in incomplete.items()
    ]
    rows = [row for row in rows if row["unit_id"] not in plan.units]
    return Plan([*plan.rows, *_added(folder, rows)]) if rows else plan


def _added(folder: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    number = len(list((folder / "plans").glob("*.parquet")))
    write_shard(folder / "plans" / f"{number:06d}.parquet", rows, PLAN_SCHEMA)
    return rows


def _check_same(folder: Path, config_digest: str) -> None:
    mark = folder / "settings.json"
    if not mark.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(mark, json.dumps({"config_digest": config_digest}))
    made = json.loads(mark.read_text(encoding="utf-8"))["config_digest"]
    if made != config_digest:
        raise DatasetError(f"dataset {folder.name!r} holds clips of another size or codec: choose another --name")


def _planned(
    new: list[Source], old: list[dict[str, Any]], config: CurateConfig, config_digest: str
) -> list[dict[str, Any]]:
    rules = Rules(config.rules)
    rows = [_row(s, rules.decide(s.metadata), config) for s in new]
    _name_apart(rows, {row["video_id"] for row in old})
    for row in rows:
        row["split"] = split_of(row["video_id"], config.holdout_share)
    _mark_copies(rows, old)
    for row in [r for r in rows if r["verdict"] and not is_remote(r["path"])][: config.previews]:
        row["peek"] = True
    return _grouped([part for row in rows for part in _parts(row, config)], config, config_digest)


def _parts(row: dict[str, Any], config: CurateConfig) -> list[dict[str, Any]]:
    """A long video becomes several rows `<id>#<part>`, so that no unit holds a worker for hours.

    Parts are whole clips, so that together they are the video; the last ends with the file, whatever its sidecar said.
    """
    size = round(config.part_s * config.fps / config.clip_frames) * config.clip_frames
    slots = math.ceil((row["duration_s"] or 0.0) * config.fps)
    if slots <= size or row["verdict"]:
        return [row]
    firsts = range(0, slots, size)
    ends = [*((first - 1) for first in firsts[1:]), None]
    return [
        {
            **row,
            "video_id": f"{row['video_id']}#{number}",
            "first_slot": first,
            "last_slot": last,
            "duration_s": ((slots - 1 if last is None else last) + 1 - first) / config.fps,
        }
        for number, (first, last) in enumerate(zip(firsts, ends, strict=True))
    ]


def _row(source: Source, verdict: Verdict | None, config: CurateConfig) -> dict[str, Any]:
    row = dict.fromkeys(PLAN_SCHEMA.names)
    metadata = source.metadata
    row |= {"path": source.location, "uri": source.uri, "etag": source.etag, "video_id": source.name}
    row |= {
        "verdict": False,
        "peek": False,
        "again": False,
        "size_bytes": source.size_bytes,
        "mtime_ns": source.mtime_ns,
    }
    row |= {"duration_s": metadata.duration_s, "title": metadata.title, "uploader": metadata.uploader}
    row |= {"webpage_url": metadata.webpage_url}
    if verdict:
        _refuse(row, "rejected", "rules", verdict)
    return row


def _refuse(row: dict[str, Any], outcome: str, stage: str, verdict: Verdict) -> None:
    row |= {"verdict": True, "outcome": outcome, "stage": stage, "reason": verdict.reason, "detail": verdict.detail}


def _name_apart(rows: list[dict[str, Any]], taken: set[str]) -> None:
    """Two files of one id keep apart: what identifies the later one is hashed into its id."""
    for row in rows:
        if row["video_id"] in taken:
            identity = f"{row['uri']}/{row['size_bytes']}/{row['etag']}"
            row["video_id"] += "~" + hashlib.sha256(identity.encode()).hexdigest()[:8]
        taken.add(row["video_id"])


def _mark_copies(rows: list[dict[str, Any]], old: list[dict[str, Any]]) -> None:
    """Byte-identical files: only files of equal size are read. The first that the rules want is the original."""
    by_size: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in [*old, *rows]:
        if not row["verdict"] and row["size_bytes"]:
            by_size[row["size_bytes"]].append(row)
    fresh = {id(row) for row in rows}
    for group in (g for g in by_size.values() if len(g) > 1 and any(id(r) in fresh for r in g)):
        originals: dict[str, str] = {}
        for row in group:
            content = _content(row)
            if content in originals and id(row) in fresh:
                _refuse(row, "duplicate", "copies", Verdict("same_bytes", f"as {originals[content]}"))
                row["content_digest"] = None if content.startswith("etag ") else content
            originals.setdefault(content, row["video_id"])


def _content(row: dict[str, Any]) -> str:
    """What two files of the same bytes have in common; a file elsewhere is judged by its (strong) etag, not read."""
    if is_remote(row["path"]):
        etag = row.get("etag") or ""
        return f"etag {etag}" if etag and not etag.startswith("W/") else f"{row['uri']} {etag}"
    return file_digest(Path(row["path"])) if Path(row["path"]).exists() else row["uri"]


def _grouped(rows: list[dict[str, Any]], config: CurateConfig, config_digest: str) -> list[dict[str, Any]]:
    """Cuts the sorted list into units of about equal length; a unit's id is a hash of its videos and the settings."""
    lengths = [0.0 if row["verdict"] else row["duration_s"] or 60.0 for row in rows]
    unit_s = min(config.unit_s, max(LEAST_UNIT_S, sum(lengths) / LEAST_UNITS))
    groups: list[list[dict[str, Any]]] = [[]]
    spent = 0.0
    for row, seconds in zip(rows, lengths, strict=True):
        if groups[-1] and (spent + seconds > unit_s or len(groups[-1]) >= UNIT_VIDEOS):
            groups.append([])
            spent = 0.0
        groups[-1].append(row)
        spent += seconds
    for group in groups:
        unit_id = digest([config_digest, *sorted(row["video_id"] for row in group)])[:24]
        for row in group:
            row["unit_id"] = unit_id
    return rows

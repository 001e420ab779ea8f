"""Clip shards and the ledger of videos: their schemas, their atomic commits, their versions.

A dataset is a folder with two Delta tables over plain Parquet, `clips` (one row a clip, with its mp4 bytes) and
`videos` (one row a source video, with outcome and reason). A unit's clips are committed before its ledger rows, each
idempotently under the unit's id, and the ledger's commit names the clips' version it belongs to: so the ledger's commit
is the one moment at which a unit begins to exist, and a dataset's version is the ledger's version.
**The ledger is the keep list**: a clip belongs to a version if the ledger there keeps its video and does not drop it.
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable, Schema

from infra.config import Home
from pipelines.buckets import BucketPath, is_remote, place
from pipelines.tables import (
    CHECKPOINT_EVERY,
    DatasetError,
    append,
    delta_table,
    knows,
    open_table,
    parquet,
    placed,
    read_rows,
    rewrite,
    table_files,
)

KEPT = ("kept", "partial")
OUTCOMES = (*KEPT, "rejected", "duplicate", "dead_letter")

_SIGNALS = [
    ("held_share", pa.float32()),
    ("max_gap_ms", pa.int32()),
    ("corrupt_share", pa.float32()),
    ("motion", pa.float32()),
    ("static_share", pa.float32()),
    ("black_share", pa.float32()),
    ("contrast", pa.float32()),
    ("blur", pa.float32()),
    ("letterbox", pa.float32()),
    ("shape", pa.float32()),
    ("cut_frames", pa.list_(pa.int32())),
]
WINDOW = pa.struct(
    [
        ("start_s", pa.float64()),
        ("clip_id", pa.string()),
        ("reason", pa.string()),
        ("preview", pa.large_binary()),
        *_SIGNALS,
        ("quality", pa.float32()),
        ("copied_share", pa.float32()),
        ("copy_of", pa.string()),
    ]
)
SOURCE_FIELDS = [
    ("source_codec", pa.string()),
    ("source_fps", pa.float32()),
    ("source_width_px", pa.int32()),
    ("source_height_px", pa.int32()),
    ("source_bars_px", pa.list_(pa.int32())),
    ("title", pa.string()),
    ("uploader", pa.string()),
    ("webpage_url", pa.string()),
]
CLIP_SCHEMA = pa.schema(
    [
        ("clip_id", pa.string()),
        ("video_id", pa.string()),
        ("unit_id", pa.string()),
        ("split", pa.string()),
        ("start_s", pa.float64()),
        ("fps", pa.int32()),
        ("n_frames", pa.int32()),
        ("width_px", pa.int32()),
        ("height_px", pa.int32()),
        ("codec", pa.string()),
        ("video", pa.large_binary()),
        *_SIGNALS,
        ("phash", pa.list_(pa.int64())),
        *SOURCE_FIELDS,
        ("actions", pa.list_(pa.int16())),
        ("config_digest", pa.string()),
    ]
)
VIDEO_SCHEMA = pa.schema(
    [
        ("uri", pa.string()),
        ("video_id", pa.string()),
        ("unit_id", pa.string()),
        ("split", pa.string()),
        ("outcome", pa.string()),
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("clips", pa.int32()),
        ("dropped_clips", pa.list_(pa.string())),
        ("size_bytes", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("etag", pa.string()),
        ("content_digest", pa.string()),
        ("frames_digest", pa.string()),
        ("duration_s", pa.float64()),
        ("seconds", pa.float32()),
        ("corrupt_share", pa.float32()),
        ("windows", pa.list_(WINDOW)),
        *SOURCE_FIELDS,
        ("preview", pa.large_binary()),
        ("config_digest", pa.string()),
    ]
)


# -- writing -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """Two finished files that wait for their commit; the clips' file is None when nothing was kept."""

    unit_id: str
    clips: Path | None
    videos: Path


class Writer:
    """The one that commits to a dataset. Only one process may hold it (`curate` takes a lock)."""

    def __init__(self, folder: Path, config_digest: str = "") -> None:
        self.folder = folder
        self.config_digest = config_digest
        self._open: dict[str, DeltaTable] = {}

    def _table(self, name: str) -> DeltaTable | None:
        """A table as this writer left it. Opened anew after a checkpoint: an open one follows every older commit."""
        table = self._open.pop(name, None)
        if table is None or table.version() % CHECKPOINT_EVERY == 0:
            table = delta_table(self.folder / name)
        if table is not None:
            self._open[name] = table
        return table

    def committed(self, units: Iterable[str]) -> set[str]:
        """Which of the units exist. The log remembers a unit even when all of its rows are gone."""
        table = self._table("videos")
        return {unit for unit in units if knows(table, unit)}

    def commit(self, units: list[Unit], message: str = "units", again: Mapping[str, str] | None = None) -> int:
        """Commits finished units together; a unit that is there already is passed over.

        Args:
            units: what to add.
            message: why, for the list of versions.
            again: units that decode one video once more, with its id: their row replaces the older one.

        Returns:
            The dataset's version.
        """
        clips, videos = self._table("clips"), self._table("videos")
        new_clips = [u for u in units if u.clips is not None and not knows(clips, u.unit_id)]
        if clips is None or new_clips:
            files = [(u.unit_id, u.clips) for u in new_clips if u.clips is not None]
            clips_version = append(self.folder / "clips", CLIP_SCHEMA, clips, files, {"message": message})
        else:
            clips.update_incremental()  # footage may have been forgotten meanwhile
            clips_version = clips.version()
        new_videos = [(u.unit_id, u.videos) for u in units if not knows(videos, u.unit_id)]
        if not new_videos and videos is not None:
            return videos.version()
        facts = {"message": message, "clips_version": str(clips_version), "config_digest": self.config_digest}
        replaced = {again[unit] for unit, _ in new_videos if again and unit in again}
        return append(self.folder / "videos", VIDEO_SCHEMA, videos, new_videos, facts, replaced)

    def amend(self, changes: dict[str, dict[str, Any]], message: str) -> int:
        """Rewrites ledger rows in a new version; clips and the versions before stay as they are.

        Args:
            changes: new values by video id.
            message: why, for the list of versions.

        Returns:
            The dataset's version.
        """
        root = self.folder / "videos"
        self._open.clear()
        table = open_table(root)
        if not changes:
            return table.version()
        clips_version = open_table(self.folder / "clips").version()
        facts = {"message": message, "clips_version": str(clips_version), "config_digest": self.config_digest}

        def change(row: dict[str, Any]) -> dict[str, Any]:
            return {**row, **changes.get(row["video_id"], {})}

        return rewrite(root, table, VIDEO_SCHEMA, change, facts, set(changes))


# -- reading -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Version:
    """One version of a dataset as `lampworks show` lists it."""

    number: int
    created: str
    message: str
    config_digest: str


@dataclass(frozen=True)
class Dataset:
    """A dataset at one version; reads are repeatable whatever is committed meanwhile.

    Attributes:
        folder: `datasets/<name>` of the home.
        version: the ledger's Delta version.
        clips_version: the clips table's version that belongs to it.
    """

    folder: Path
    version: int
    clips_version: int

    @property
    def name(self) -> str:
        """The dataset's name."""
        return self.folder.name

    @property
    def reference(self) -> str:
        """`name@version`: what a training names as its parent."""
        return f"{self.folder if isinstance(self.folder, BucketPath) else self.name}@{self.version}"

    def video_table(self, columns: list[str] | None = None) -> pa.Table:
        """The ledger: one row a source video, sorted by its uri."""
        return read_rows(_files_at(self.folder / "videos", self.version), VIDEO_SCHEMA, columns, "uri")

    def clip_files(self) -> list[Path]:
        """The Parquet files of the clips table, sorted."""
        return _files_at(self.folder / "clips", self.clips_version)

    def clip_table(self, columns: list[str] | None = None, split: str | None = None) -> pa.Table:
        """Rows of the clips that belong to this version, sorted by clip id.

        Args:
            columns: which; all of them, mp4 bytes included, by default.
            split: "train", "test", or both.
        """
        wanted = columns or CLIP_SCHEMA.names
        table = read_rows(
            self.clip_files(), CLIP_SCHEMA, [*dict.fromkeys([*wanted, "clip_id", "video_id", "split"])], "clip_id"
        )
        return table.filter(self._belongs(split)).select(wanted)

    def index(self, split: str | None = None, *more: str) -> pa.Table:
        """Where every clip lies: clip_id, video_id, file, row_group, row, n_frames, cut_frames; sorted by clip id.

        `more` names further columns of the clips.
        """
        columns = ["clip_id", "video_id", "split", "n_frames", "cut_frames", *more]
        parts = [placed(path, columns) for path in self.clip_files()]
        if not parts:
            raise DatasetError(
                f"dataset {self.reference} has no clips: see its ledger with `lampworks show {self.name}`"
            )
        table = pa.concat_tables(parts).sort_by("clip_id")
        table = table.filter(self._belongs(split))
        return table.select(["clip_id", "video_id", "file", "row_group", "row", "n_frames", "cut_frames", *more])

    def read_clips(self, rows: pa.Table, column: str = "video") -> list[bytes]:
        """The stored mp4 bytes of index rows, in their order; one row group is read for each."""
        out: list[bytes] = []
        for row in rows.select(["file", "row_group", "row"]).to_pylist():
            file = parquet(self.folder / "clips" / row["file"])
            out.append(file.read_row_group(row["row_group"], columns=[column])[column][row["row"]].as_py())
        return out

    def _belongs(self, split: str | None) -> pc.Expression:
        kept, dropped = self._keep_list
        mask = pc.field("video_id").isin(pa.array(kept, pa.string()))
        mask &= ~pc.field("clip_id").isin(pa.array(dropped, pa.string()))
        return mask & (pc.field("split") == split) if split else mask

    @cached_property
    def _keep_list(self) -> tuple[list[str], list[str]]:
        ledger = self.video_table(["video_id", "outcome", "dropped_clips"]).to_pylist()
        kept = [row for row in ledger if row["outcome"] in KEPT]
        return [row["video_id"] for row in kept], [c for row in kept for c in row["dropped_clips"] or ()]


def dataset_folder(home: Home | Path, name: str, target: str | None = None) -> Path:
    """Where a dataset lies: in the home, or in a folder for datasets that may be an object store's."""
    if target is not None:
        return place(target) / name
    return (home if isinstance(home, Home) else Home(home)).datasets / name


def open_dataset(home: Home | Path, reference: str) -> Dataset:
    """Opens `name` (its newest version), `name@version`, or the same at `s3://bucket/folder/name`.

    Raises:
        DatasetError: no such dataset or version, or one with other columns.
    """
    where, _, number = reference.rpartition("@") if "@" in reference.rpartition("/")[2] else (reference, "", "")
    folder = place(where) if is_remote(where) else dataset_folder(home, where)
    newest = delta_table(folder / "videos") if where else None
    if newest is None:
        raise DatasetError(f"no dataset {where!r} in {folder.parent}: {_near(folder.parent, where)}")
    check_schema(folder, newest)
    version = newest.version() if not number else _number(reference, number, newest.version())
    return Dataset(folder, version, _clips_version(folder, version))


def check_schema(folder: Path, ledger: DeltaTable | None) -> None:
    """Refuses a dataset whose tables lack a column of ours, or hold it in another type.

    Raises:
        DatasetError: it was written by an older release.
    """
    for table, schema in ((ledger, VIDEO_SCHEMA), (delta_table(folder / "clips"), CLIP_SCHEMA)):
        ours = Schema.from_arrow(schema).fields
        there = table.schema().fields if table is not None else ours
        lacking = [field.name for field in ours if field not in there]
        if lacking:
            raise DatasetError(
                f"dataset {folder.name!r} was written by another release: its column {lacking[0]!r} is missing or "
                "differs; curate the videos under another --name, or use the release that wrote it"
            )


def open_ledger(folder: Path, columns: list[str]) -> list[dict[str, Any]]:
    """The newest ledger's rows, sorted by uri."""
    root = folder / "videos"
    return read_rows(table_files(open_table(root), root), VIDEO_SCHEMA, columns, "uri").to_pylist()


def versions(home: Home | Path, name: str) -> list[Version]:
    """Every version of a dataset, oldest first.

    Raises:
        DatasetError: no such dataset.
    """
    dataset = open_dataset(home, name)
    table = delta_table(dataset.folder / "videos")
    entries = table.history() if table is not None else []
    return sorted((_version(e) for e in entries), key=lambda v: v.number)


def _version(entry: dict[str, Any]) -> Version:
    created = datetime.fromtimestamp(entry["timestamp"] / 1000, UTC).isoformat(timespec="seconds")
    return Version(entry["version"], created, entry.get("message", ""), entry.get("config_digest", ""))


def _number(reference: str, number: str, newest: int) -> int:
    text = number.removeprefix("v")
    if not text.isdigit() or int(text) > newest:
        raise DatasetError(f"no version {reference}: the newest is {reference.partition('@')[0]}@{newest}")
    return int(text)


def _near(root: Path, name: str) -> str:
    known = sorted(p.name for p in root.glob("*") if (p / "videos").is_dir()) if root.is_dir() else []
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"there are {', '.join(known)}" if known else "make one with `lampworks curate`"


def _clips_version(folder: Path, version: int) -> int:
    """From the ledger commit's own entry in the log."""
    path = folder / "videos" / "_delta_log" / f"{version:020d}.json"
    for line in path.read_text(encoding="utf-8").splitlines():
        info = json.loads(line).get("commitInfo")
        if info and "clips_version" in info:
            return int(info["clips_version"])
    raise DatasetError(f"{path} names no clips version: it was not written by lampworks")


def _files_at(root: Path, version: int) -> list[Path]:
    return table_files(open_table(root, version), root)

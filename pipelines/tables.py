"""Versioned tables: plain Parquet files that appear whole, and commits that happen once.

The log is Delta's (the deltalake library), so DuckDB, Polars, Spark and Ray read the tables as they are. Files are
written first and committed later, with the ids of their units in the same commit: a unit that is there is not added
twice, whoever asks again.
"""

import itertools
import json
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable, Schema
from deltalake.exceptions import TableNotFoundError
from deltalake.transaction import (
    AddAction,
    CommitProperties,
    PostCommitHookProperties,
    RemoveAction,
    Transaction,
    create_table_with_add_actions,
)

from infra.config import UserError
from pipelines.buckets import BucketPath, delta_location

ROW_GROUP = 8
CHECKPOINT_EVERY = 20
KEEP_LOG = PostCommitHookProperties(create_checkpoint=False, cleanup_expired_logs=False)
"""The log is a dataset's versions: left to itself Delta deletes what is older than 30 days. Looking for that made late
commits twice as slow, too."""
DRAFT = ".part"
STALE_S = 3600.0
Change = Callable[[dict[str, Any]], dict[str, Any] | None]
"""The new row of an old one; None drops it."""
_UNCOMPRESSED = {"video", "preview", "windows.list.element.preview"}


class DatasetError(UserError):
    """A dataset, version or table that is not there or does not fit."""


def write_shard(path: Path, rows: Iterable[dict[str, Any]], schema: pa.Schema, row_group: int | None = None) -> None:
    """Writes rows as one Parquet file, on disk before it has its name: readers see all of it or nothing.

    Rows are taken as they come; no more than one row group of them is in memory.
    """
    if isinstance(path, BucketPath):
        with tempfile.TemporaryDirectory() as folder:
            draft = Path(folder) / path.name
            write_shard(draft, rows, schema, row_group)
            path.upload(draft)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{DRAFT}")
    try:
        _write_draft(draft, rows, schema, row_group or (ROW_GROUP if "video" in schema.names else 4096))
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Writes a small text file that a killed process leaves as it was, never half."""
    if isinstance(path, BucketPath):
        path.write_text(text)
        return
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{DRAFT}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def _write_draft(draft: Path, rows: Iterable[dict[str, Any]], schema: pa.Schema, row_group: int) -> None:
    compression = {name: "none" if name in _UNCOMPRESSED else "zstd" for name in _leaves(schema)}
    left = iter(rows)
    with pq.ParquetWriter(
        draft, schema, use_dictionary=False, compression=compression, data_page_size=1 << 16
    ) as writer:
        while group := list(itertools.islice(left, row_group)):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
    with draft.open("rb") as file:
        os.fsync(file.fileno())


def sweep(folder: Path) -> None:
    """Deletes what killed writers left half written, an hour ago and longer; object stores keep no such thing."""
    for path in () if isinstance(folder, BucketPath) else folder.glob(f".*{DRAFT}"):
        if path.stat().st_mtime < time.time() - STALE_S:
            path.unlink(missing_ok=True)


def _leaves(schema: pa.Schema) -> Iterable[str]:
    """Parquet's dotted names of the leaf columns."""
    for field in schema:
        yield from _leaf_names(field.name, field.type)


def _leaf_names(name: str, kind: pa.DataType) -> Iterable[str]:
    if pa.types.is_list(kind):
        yield from _leaf_names(f"{name}.list.element", kind.value_type)
    elif pa.types.is_struct(kind):
        for field in kind:
            yield from _leaf_names(f"{name}.{field.name}", field.type)
    else:
        yield name


def append(
    root: Path,
    schema: pa.Schema,
    table: DeltaTable | None,
    files: list[tuple[str, Path]],
    facts: dict[str, str],
    without: Collection[str] = (),
) -> int:
    """Commits finished files under `root`, each with the id of its unit; makes the table if it is None.

    Args:
        root: the table's folder.
        schema: of the files.
        table: the table at its newest version.
        files: (unit id, path) of each.
        facts: written into the commit.
        without: videos whose rows leave older files in the same commit.

    Returns:
        The table's version.
    """
    actions: list[AddAction | RemoveAction] = [_add(path) for _, path in files]
    marks = [Transaction(app_id=unit, version=1) for unit, _ in files]
    properties = CommitProperties(custom_metadata=facts, app_transactions=marks)
    if table is None:
        _create(root, schema, [_add(path) for _, path in files], properties)
        return 0
    if without:
        actions += _rewritten(root, table, schema, lambda row: None if row["video_id"] in without else row, without)
    table.create_write_transaction(
        actions,
        mode="append",
        schema=Schema.from_arrow(schema),
        commit_properties=properties,
        post_commithook_properties=KEEP_LOG,
    )
    table.update_incremental()
    if table.version() % CHECKPOINT_EVERY == 0:
        table.create_checkpoint()
    return table.version()


def _create(root: Path, schema: pa.Schema, actions: list[AddAction], properties: CommitProperties) -> None:
    root.mkdir(parents=True, exist_ok=True)
    uri, options = delta_location(root)
    create_table_with_add_actions(
        uri,
        Schema.from_arrow(schema),
        actions,
        mode="error",
        name=root.name,
        storage_options=options,
        commit_properties=properties,
        post_commithook_properties=KEEP_LOG,
    )


def knows(table: DeltaTable | None, unit_id: str) -> bool:
    """Whether a unit was committed to the table."""
    return table is not None and table.transaction_version(unit_id) is not None


def _add(path: Path) -> AddAction:
    facts = path.stat()
    with parquet(path) as file:
        stats = json.dumps({"numRecords": file.metadata.num_rows})
    return AddAction(path.name, facts.st_size, {}, int(facts.st_mtime * 1000), True, stats)


def _remove(path: Path) -> RemoveAction:
    now_ms = int(time.time() * 1000)
    return RemoveAction(path.name, True, now_ms, path.stat().st_size, {})


def delta_table(root: Path, version: int | None = None) -> DeltaTable | None:
    """The Delta table in a folder, or None when there is none."""
    uri, options = delta_location(root)
    try:
        return DeltaTable(uri, version=version, storage_options=options)
    except TableNotFoundError:
        return None


def _video_ids(path: Path) -> list[str]:
    return parquet(path).read(columns=["video_id"])["video_id"].to_pylist()


def _rewritten(
    root: Path, table: DeltaTable, schema: pa.Schema, change: Change, videos: Collection[str] | None = None
) -> list[AddAction | RemoveAction]:
    actions: list[AddAction | RemoveAction] = []
    for path in table_files(table, root):
        if videos is not None and set(videos).isdisjoint(_video_ids(path)):
            continue
        old = pq.read_table(_opened(path), schema=schema).to_pylist()
        new = [row for row in map(change, old) if row is not None]
        if new == old:
            continue
        actions.append(_remove(path))
        if new:
            target = root / f"{path.stem.partition('-')[0]}-{table.version() + 1}.parquet"
            write_shard(target, new, schema)
            actions.append(_add(target))
    return actions


def rewrite(
    root: Path,
    table: DeltaTable,
    schema: pa.Schema,
    change: Change,
    facts: dict[str, str],
    videos: Collection[str] | None = None,
) -> int:
    """Changes or drops rows in a new version; files without such rows, and the versions before, stay as they are.

    Args:
        root: the table's folder.
        table: the table at its newest version.
        schema: of the files.
        change: the new row of an old one; None drops it.
        facts: written into the commit.
        videos: ids of those whose rows change; files without any of them are not read. None reads all.

    Returns:
        The table's version.
    """
    actions = _rewritten(root, table, schema, change, videos)
    if not actions:
        return table.version()
    properties = CommitProperties(custom_metadata=facts)
    table.create_write_transaction(
        actions,
        mode="append",
        schema=Schema.from_arrow(schema),
        commit_properties=properties,
        post_commithook_properties=KEEP_LOG,
    )
    return table.version() + 1


def open_table(root: Path, version: int | None = None) -> DeltaTable:
    """The Delta table in a folder, at a version.

    Raises:
        DatasetError: there is none.
    """
    table = delta_table(root, version)
    if table is None:
        raise DatasetError(f"{root} is no Delta table")
    return table


def table_files(table: DeltaTable, root: Path) -> list[Path]:
    """The Parquet files of a Delta table, sorted."""
    return sorted(root / uri.rpartition("/")[2] for uri in table.file_uris())


def parquet(path: Path) -> pq.ParquetFile:
    """A Parquet file, here or in an object store."""
    return pq.ParquetFile(_opened(path), memory_map=not isinstance(path, BucketPath))


def _opened(path: Path) -> Any:
    """What pyarrow reads: a file object for what lies elsewhere."""
    return path.open() if isinstance(path, BucketPath) else path


def placed(path: Path, columns: list[str]) -> pa.Table:
    """Columns of one shard with the place of each row: file, row_group, row."""
    file = parquet(path)
    sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
    groups = [g for g, size in enumerate(sizes) for _ in range(size)]
    rows = [r for size in sizes for r in range(size)]
    table = file.read(columns=columns)
    table = table.append_column("file", pa.array([path.name] * len(rows), pa.string()))
    table = table.append_column("row_group", pa.array(groups, pa.int32()))
    return table.append_column("row", pa.array(rows, pa.int32()))


def read_rows(files: list[Path], schema: pa.Schema, columns: list[str] | None, key: str) -> pa.Table:
    """Columns of a table's files, sorted by one of them.

    Raises:
        DatasetError: no such column, or a file was deleted for a takedown request.
    """
    wanted = columns or schema.names
    needed = [*dict.fromkeys([*wanted, key])]
    unknown = [c for c in needed if c not in schema.names]
    if unknown:
        raise DatasetError(f"no column {unknown[0]!r}: there are {', '.join(schema.names)}")
    empty = pa.schema([schema.field(c) for c in needed]).empty_table()
    return pa.concat_tables([empty, *(_columns(f, needed) for f in files)]).sort_by(key).select(wanted)


def _columns(path: Path, columns: list[str]) -> pa.Table:
    try:
        return parquet(path).read(columns=columns).select(columns)
    except FileNotFoundError as error:
        raise DatasetError(
            f"{path} was removed on request: this version can't be read any more, name a newer one"
        ) from error

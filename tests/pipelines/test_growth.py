"""What is done costs nothing again; tests/benchmarks/bench_commits.py measures it at size."""

import logging

import pytest

from pipelines import shards, tables
from pipelines.curate import curate
from pipelines.shards import Writer, open_dataset
from pipelines.tables import CHECKPOINT_EVERY
from tests.benchmarks.bench_commits import settings, tiny_videos
from tests.pipelines.test_shards import unit


def test_a_finished_manifest_is_run_again_without_its_videos(tmp_path, ray_cluster, caplog):
    manifest = tiny_videos(tmp_path / "raw", 24)
    first = curate(settings(tmp_path / "home", manifest))
    assert first.outcomes["kept"] == 24
    files = {path: path.stat().st_mtime_ns for path in first.path.rglob("*") if path.is_file() and path.name != ".lock"}
    for path in manifest.parent.glob("*.mp4"):
        path.unlink()
    with caplog.at_level(logging.INFO):
        again = curate(settings(tmp_path / "home", manifest))
    assert (again.version, again.outcomes) == (first.version, first.outcomes)
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert not [line for line in caplog.messages if "planned" in line or "videos |" in line]


def test_a_commit_opens_no_table_between_checkpoints(home, monkeypatch):
    opened = []
    monkeypatch.setattr(shards, "delta_table", lambda *what: opened.append(what) or real(*what))
    folder = home.datasets / "d"
    writer = Writer(folder)
    for number in range(2 * CHECKPOINT_EVERY + 5):
        writer.commit([unit(folder, number, clips=1)])
    assert len(opened) <= 2 * (1 + 3)
    dataset = open_dataset(home, "d")
    assert dataset.version == dataset.clips_version == 2 * CHECKPOINT_EVERY + 4
    assert dataset.index().num_rows == 2 * CHECKPOINT_EVERY + 5


def test_a_change_of_one_video_reads_one_ledger_file(home, monkeypatch):
    folder = home.datasets / "d"
    writer = Writer(folder)
    writer.commit([unit(folder, number, clips=1) for number in range(9)])
    read = []
    monkeypatch.setattr(tables.pq, "read_table", lambda what, **rest: read.append(what.name) or whole(what, **rest))
    writer.amend({"v4": {"outcome": "duplicate"}}, "same frames")
    writer.commit([unit(folder, 90, clips=1, video="v7")], "again", {"u090": "v7"})
    assert read == ["u004.parquet", "u007.parquet"]
    rows = open_dataset(home, "d").video_table(["video_id", "unit_id", "outcome"]).to_pylist()
    assert sorted(row["video_id"] for row in rows) == [f"v{number}" for number in range(9)]
    assert {row["unit_id"] for row in rows if row["video_id"] == "v7"} == {"u090"}
    assert {row["outcome"] for row in rows if row["video_id"] == "v4"} == {"duplicate"}


real, whole = shards.delta_table, tables.pq.read_table


@pytest.mark.parametrize("table", ["clips", "videos"])
def test_no_version_is_ever_cleaned_away(home, table):
    """Delta deletes logs of 30 days ago where it may; a version is what a training names as its parent."""
    import os
    import time

    folder = home.datasets / "d"
    for number in range(CHECKPOINT_EVERY + 2):
        Writer(folder).commit([unit(folder, number, clips=1)])
        for path in (folder / table / "_delta_log").glob("*"):
            os.utime(path, (time.time() - 90 * 86400,) * 2)
    assert len(list((folder / table / "_delta_log").glob("0*.json"))) == CHECKPOINT_EVERY + 2
    assert open_dataset(home, "d@0").index().num_rows == 1

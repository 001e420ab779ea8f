"""The recipes of docs/data.md: a dataset's clips read by pyarrow, DuckDB and Hugging Face's datasets."""

import io

import numpy as np
import pytest

from pipelines.shards import Writer, open_dataset
from pipelines.tables import open_table
from pipelines.video import decode_clip
from tests.pipelines.clips import close, write_dataset


@pytest.fixture
def toys(home):
    """Clips of two units, of which one video is refused later, and one clip of another dropped."""
    made = write_dataset(home, unit="u0") | write_dataset(home, unit="u1")
    changes = {"u0v1": {"outcome": "rejected"}, "u1v2": {"outcome": "partial", "dropped_clips": ["u1c002"]}}
    Writer(home.datasets / "toys").amend(changes, "refused")
    for clip in ("u0c001", "u1c002"):
        made.pop(clip)
    return home.datasets / "toys", made


def test_our_own_reader(toys, home):
    table = open_dataset(home, "toys").clip_table(["clip_id", "video"])
    assert_same(dict(zip(table["clip_id"].to_pylist(), table["video"].to_pylist(), strict=True)), toys[1])


def test_pyarrow(toys):
    import pyarrow.compute as pc
    import pyarrow.dataset as ds
    from deltalake import DeltaTable

    folder, made = toys
    clips, videos = (ds.dataset(DeltaTable(str(folder / name)).file_uris()) for name in ("clips", "videos"))
    ledger = videos.to_table(["video_id", "dropped_clips"], filter=pc.field("outcome").isin(["kept", "partial"]))
    dropped = [clip for clips in ledger["dropped_clips"].to_pylist() for clip in clips or ()]
    keep = pc.field("video_id").isin(ledger["video_id"].to_pylist()) & ~pc.field("clip_id").isin(dropped)
    table = clips.to_table(["clip_id", "video"], filter=keep)
    assert_same(dict(zip(table["clip_id"].to_pylist(), table["video"].to_pylist(), strict=True)), made)


def test_duckdb(toys):
    import duckdb
    from deltalake import DeltaTable

    folder, made = toys
    clips, videos = (DeltaTable(str(folder / name)).file_uris() for name in ("clips", "videos"))
    rows = duckdb.execute(
        """
        select c.clip_id, c.video from read_parquet($clips) c join read_parquet($videos) v using (video_id)
        where v.outcome in ('kept', 'partial') and not list_contains(v.dropped_clips, c.clip_id)
        """,
        {"clips": clips, "videos": videos},
    ).fetchall()
    assert_same({clip: bytes(video) for clip, video in rows}, made)


def test_hugging_face(toys, tmp_path, monkeypatch, home):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    from deltalake import DeltaTable

    folder, made = toys
    kept = set(open_dataset(home, "toys").clip_table(["clip_id"])["clip_id"].to_pylist())
    files = DeltaTable(str(folder / "clips")).file_uris()
    stream = datasets.load_dataset(
        "parquet", data_files=files, split="train", streaming=True, columns=["clip_id", "video"]
    )
    assert_same({row["clip_id"]: row["video"] for row in stream if row["clip_id"] in kept}, made)


def test_any_decoder_reads_a_clip(toys, home):
    import av

    data = open_dataset(home, "toys").clip_table(["video"])["video"][0].as_py()
    with av.open(io.BytesIO(data)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert close(frames, decode_clip(data)) < 3


def assert_same(videos, made):
    assert videos.keys() == made.keys()
    assert all(close(decode_clip(videos[clip]), made[clip]) < 6 for clip in made)


def test_the_tables_files_are_those_of_the_newest_version(toys):
    folder, _ = toys
    table = open_table(folder / "videos")
    assert len(table.file_uris()) == 2 < len(list((folder / "videos").glob("*.parquet")))

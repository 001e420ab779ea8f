import os
import time

import pyarrow as pa
import pytest
from deltalake import DeltaTable
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from infra.config import Home
from pipelines.shards import CLIP_SCHEMA, VIDEO_SCHEMA, DatasetError, Unit, Writer, open_dataset, versions
from pipelines.tables import DRAFT, delta_table, rewrite, sweep, write_shard


def unit(folder, number, clips=3, outcome="kept", dropped=(), video=None):
    """The two files of a finished unit with one video."""
    name = f"u{number:03}"
    shared = {"unit_id": name, "video_id": video or f"v{number}"}
    rows = [
        {**shared, "clip_id": f"c{number}-{j}", "split": "test" if number % 4 == 0 else "train", "n_frames": 20}
        | {"video": f"bytes {number} {j}".encode(), "cut_frames": [j], "start_s": 2.0 * j}
        for j in range(clips)
    ]
    paths = folder / "clips" / f"{name}.parquet", folder / "videos" / f"{name}.parquet"
    if clips:
        write_shard(paths[0], rows, CLIP_SCHEMA)
    video = {**shared, "uri": f"{number:03}.mp4", "outcome": outcome, "clips": clips, "dropped_clips": list(dropped)}
    write_shard(paths[1], [video], VIDEO_SCHEMA)
    return Unit(name, paths[0] if clips else None, paths[1])


@pytest.fixture
def folder(home):
    return home.datasets / "d"


@pytest.fixture
def dataset(home, folder):
    writer = Writer(folder, "settings")
    writer.commit([unit(folder, 1, clips=20), unit(folder, 2, clips=0, outcome="rejected")])
    writer.commit([unit(folder, 3, outcome="duplicate"), unit(folder, 4, dropped=["c4-1"])])
    return open_dataset(home, "d")


def ids(table):
    return table["clip_id"].to_pylist()


def test_the_ledger_is_the_keep_list(dataset):
    assert ids(dataset.clip_table(["clip_id"])) == sorted([f"c1-{j}" for j in range(20)] + ["c4-0", "c4-2"])
    assert ids(dataset.index("test")) == ["c4-0", "c4-2"]
    assert len(ids(dataset.index("train"))) == 20
    assert dataset.video_table(["uri"])["uri"].to_pylist() == ["001.mp4", "002.mp4", "003.mp4", "004.mp4"]


def test_the_index_finds_every_clip_at_once(dataset):
    index = dataset.index().take([21, 0, 9, 9])
    assert dataset.read_clips(index) == [f"bytes {c.split('-')[0][1:]} {c.split('-')[1]}".encode() for c in ids(index)]
    assert max(dataset.index()["row_group"].to_pylist()) == 2  # small row groups keep a random clip cheap


def test_a_version_stays_what_it_was(home, folder, dataset):
    before = dataset.index()
    Writer(folder).commit([unit(folder, 5)])
    assert dataset.index() == before
    assert open_dataset(home, "d@0").video_table().num_rows == 2
    assert open_dataset(home, "d@v1").reference == "d@1" == dataset.reference
    listed = versions(home, "d")
    assert [v.number for v in listed] == [0, 1, 2]
    assert listed[0].config_digest == "settings"
    assert listed[0].created.endswith("+00:00")


def test_a_unit_is_committed_once(home, folder, dataset):
    again = [Unit(u, folder / "clips" / f"{u}.parquet", folder / "videos" / f"{u}.parquet") for u in ("u001", "u004")]
    assert Writer(folder).commit(again) == dataset.version
    assert open_dataset(home, "d").index() == dataset.index()
    assert Writer(folder).committed([f"u{n:03}" for n in range(9)]) == {"u001", "u002", "u003", "u004"}


def test_clips_without_their_ledger_do_not_exist_yet(home, folder, dataset):
    """A driver killed between the two commits: the next one finishes it, and no clip is there twice."""
    made = unit(folder, 6)
    real = made.videos.rename(made.videos.with_suffix(".later"))
    with pytest.raises(FileNotFoundError):
        Writer(folder).commit([made])
    assert open_dataset(home, "d").index() == dataset.index()
    real.rename(made.videos)
    Writer(folder).commit([made])
    assert ids(open_dataset(home, "d").index())[-3:] == ["c6-0", "c6-1", "c6-2"]


@given(batches=st.lists(st.lists(st.integers(0, 9), max_size=5), max_size=6))
@examples(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_order_of_commits_gives_each_unit_once(tmp_path_factory, batches):
    folder = Home(tmp_path_factory.mktemp("h")).datasets / "d"
    made = {n: unit(folder, n, clips=n % 3) for n in range(10)}
    for batch in [[0], *batches]:
        Writer(folder).commit([made[n] for n in dict.fromkeys(batch)])
    wanted = {0} | {n for batch in batches for n in batch}
    dataset = open_dataset(folder.parents[1], "d")
    assert sorted(dataset.video_table(["video_id"])["video_id"].to_pylist()) == sorted(f"v{n}" for n in wanted)
    clips = dataset.clip_table(["clip_id"]).num_rows
    assert clips == sum(n % 3 for n in wanted)


def test_rows_are_amended_in_a_new_version(home, folder, dataset):
    Writer(folder).amend({"v1": {"outcome": "duplicate", "reason": "same_frames"}}, "same frames")
    newest = open_dataset(home, "d")
    assert newest.version == dataset.version + 1
    assert ids(newest.index()) == ["c4-0", "c4-2"]
    assert len(dataset.index()) == 22
    assert versions(home, "d")[-1].message == "same frames"


def test_rows_can_be_dropped(folder, dataset):
    table = delta_table(folder / "clips")
    rewrite(folder / "clips", table, CLIP_SCHEMA, lambda row: None if row["video_id"] == "v1" else row, {})
    rows = DeltaTable(str(folder / "clips")).to_pyarrow_dataset().to_table(columns=["clip_id"])
    assert sorted(ids(rows)) == ["c3-0", "c3-1", "c3-2", "c4-0", "c4-1", "c4-2"]


def test_a_shard_appears_whole(folder):
    with pytest.raises((pa.ArrowInvalid, pa.ArrowTypeError)):
        write_shard(folder / "x.parquet", [{"fps": "ten"}], CLIP_SCHEMA)
    assert not list(folder.iterdir())


def test_what_killed_writers_left_is_swept_when_it_is_old(folder, dataset):
    for name, age_s in (("old", 7200), ("new", 60)):
        path = folder / "clips" / f".{name}.parquet.1234{DRAFT}"
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age_s,) * 2)
    sweep(folder / "clips")
    assert [p.name for p in (folder / "clips").glob(f".*{DRAFT}")] == [".new.parquet.1234.part"]
    assert len(dataset.index()) == 22


def test_other_engines_read_the_tables(folder, dataset):
    import duckdb

    path = folder / "clips" / "u001.parquet"
    query = f"select count(*), min(octet_length(video)), max(cut_frames[1]) from '{path}'"
    assert duckdb.sql(query).fetchall() == [(20, 9, 19)]


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("other", "no dataset 'other' in .*: there are d"),
        ("dd", "did you mean 'd'"),
        ("d@9", "no version d@9: the newest is d@1"),
        ("d@x", "no version d@x"),
        ("", "no dataset ''"),
    ],
)
def test_what_is_not_there_is_one_sentence(home, dataset, reference, said):
    with pytest.raises(DatasetError, match=said):
        open_dataset(home, reference)


def test_an_unknown_column_is_one_sentence(dataset):
    with pytest.raises(DatasetError, match="no column 'vido'"):
        dataset.clip_table(["vido"])

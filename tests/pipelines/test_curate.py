import numpy as np
import pytest

from infra.config import UserError
from pipelines.curate import curate
from pipelines.shards import KEPT, open_dataset, versions
from pipelines.video import decode_clip
from tests.pipelines.footage import EXPECTED, corpus, film, scroll, settings
from tests.pipelines.remote import Web

CLIP = 20


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module")
def curated(source, tmp_path_factory, ray_cluster):
    return curate(settings(tmp_path_factory.mktemp("home"), source))


def contents(dataset):
    """Everything that defines a dataset's clips, bytes included, by clip."""
    return {row["clip_id"]: row for row in dataset.clip_table().to_pylist()}


def ledger(dataset, *columns):
    table = dataset.video_table(["video_id", *columns])
    return {row["video_id"]: tuple(row[c] for c in columns) for row in table.to_pylist()}


def test_every_file_has_its_outcome_and_reason(curated):
    found = ledger(curated.dataset, "outcome", "reason")
    assert {k: found[k] for k in EXPECTED} == EXPECTED
    assert {k: v for k, v in found.items() if k not in EXPECTED} == {f"good{i}": ("kept", "") for i in (1, 2, 3)}


def test_refusals_are_explained_and_pictured(curated):
    rows = curated.dataset.video_table().to_pylist()
    refused = [r for r in rows if r["outcome"] not in KEPT]
    assert all(r["stage"] and r["reason"] and r["detail"] for r in refused)
    pictured = {r["video_id"] for r in rows if (r["preview"] or b"").startswith(b"\xff\xd8")}
    assert pictured == {r["video_id"] for r in rows} - {"text", "cut"}
    half = next(r for r in rows if r["video_id"] == "half")
    assert [bool(w["preview"]) for w in half["windows"]] == [bool(w["reason"]) for w in half["windows"]]


def test_clips_show_what_the_source_shows(curated):
    table = curated.dataset.clip_table(["video_id", "start_s", "video", "n_frames", "title", "unit_id"])
    rows = sorted((r for r in table.to_pylist() if r["video_id"] == "good1"), key=lambda r: r["start_s"])
    assert [r["start_s"] for r in rows] == [0.0, 2.0]
    frames = scroll(90, seed=1)[::2]
    for row in rows:
        first = int(row["start_s"] * 10)
        truth = frames[first : first + CLIP].reshape(CLIP, 32, 2, 32, 2, 3).mean(axis=(2, 4))
        shown = decode_clip(row["video"]).astype(float)
        error, late = ((shown - truth) ** 2).mean(), ((shown[:-1] - truth[1:]) ** 2).mean()
        assert error < 250 < 2000 < late  # glaring colours in 4:2:0 cost 26 dB; a frame too late costs far more
        assert row["n_frames"] == CLIP
        assert row["title"] == "good1 2D platformer playthrough"


def test_a_second_run_does_nothing(curated, source):
    before = sorted(p.stat().st_mtime_ns for p in curated.path.rglob("*.parquet"))
    again = curate(settings(curated.path.parents[1], source))
    assert again.version == curated.version
    assert sorted(p.stat().st_mtime_ns for p in curated.path.rglob("*.parquet")) == before


def test_new_videos_are_added_and_old_versions_stay(source, tmp_path, ray_cluster):
    raw = tmp_path / "raw"
    film(raw, "one", scroll(90, seed=1))
    film(raw, "zwei", scroll(90, seed=2))
    first = curate(settings(tmp_path, raw))
    film(raw, "drei \u00e4\u6f22", scroll(90, seed=3), id="three")
    second = curate(settings(tmp_path, raw))
    old, new = contents(open_dataset(tmp_path, first.dataset.reference)), contents(second.dataset)
    assert len(old) == 4
    assert len(new) == 6
    assert old.items() <= new.items()
    assert [v.number for v in versions(tmp_path, "small")] == list(range(second.version + 1))


def test_the_same_pictures_in_another_file_are_a_duplicate(tmp_path, ray_cluster):
    raw = tmp_path / "raw"
    film(raw, "b", scroll(90, seed=5))
    curate(settings(tmp_path, raw))
    path = film(raw, "a", scroll(90, seed=5))
    path.write_bytes(path.read_bytes() + b"\x00\x00\x00\x08free")  # other bytes, same pictures
    result = curate(settings(tmp_path, raw))
    assert ledger(result.dataset, "outcome", "reason", "detail") == {
        "a": ("duplicate", "same_frames", "as b"),
        "b": ("kept", "", ""),
    }
    assert set(result.dataset.clip_table(["video_id"])["video_id"].to_pylist()) == {"b"}


def test_parallelism_changes_nothing(curated, source, tmp_path):
    alone = curate(settings(tmp_path, source, workers=1))
    assert contents(alone.dataset) == contents(curated.dataset)


def test_a_long_video_is_the_work_of_several_units_with_a_ledger_row_each(tmp_path, ray_cluster):
    raw = tmp_path / "raw"
    film(raw, "long", np.concatenate([scroll(200, seed=n) for n in range(3)]))
    film(raw, "short", scroll(90, seed=9))
    whole = curate(settings(tmp_path / "whole", raw))
    pool = {"min_workers": 1, "units_in_flight": 1, "backpressure_ratio": 5.0}  # other ways give the same, too
    parts = curate(settings(tmp_path / "parts", raw, part_s=8.0, **pool))
    found = ledger(parts.dataset, "outcome", "duration_s", "clips", "unit_id")
    assert {k: v[:3] for k, v in found.items()} == {
        "long#0": ("kept", 8.0, 4), "long#1": ("kept", 8.0, 4), "long#2": ("kept", 8.0, 4), "long#3": ("kept", 6.0, 3),
        "short": ("kept", 4.5, 2),
    }  # fmt: skip
    assert len({row[3] for row in found.values()}) > 2
    apart = ("video_id", "unit_id")
    assert [without(row, apart) for row in contents(parts.dataset).values()] == [
        without(row, apart) for row in contents(whole.dataset).values()
    ]
    again = curate(settings(tmp_path / "parts", raw, part_s=10.0))  # what is planned stays as it was
    assert again.version == parts.version


def test_a_worker_fetches_the_parts_of_a_video_once(tmp_path, ray_cluster):
    film(tmp_path / "raw", "long", scroll(400, seed=1))
    with Web(tmp_path / "raw") as web:
        result = curate(settings(tmp_path / "far", f"{web.url}/long.mp4", part_s=8.0, workers=1))
        assert [name for how, name in web.asked if how == "GET" and name == "/long.mp4"] == ["/long.mp4"]
    assert result.outcomes == {"kept": 3}
    assert result.clips == 10


def without(row, names):
    return {k: v for k, v in row.items() if k not in names}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda raw: None, "no folder"),
        (lambda raw: raw.mkdir(), "no video in"),
        (lambda raw: film(raw, "x", scroll(40), title="nothing"), "no clip of 1 videos passed"),
    ],
)
def test_a_source_without_use_is_one_sentence(tmp_path, ray_cluster, make, said):
    make(tmp_path / "raw")
    with pytest.raises(UserError, match=said):
        curate(settings(tmp_path, tmp_path / "raw"))


def test_other_settings_for_the_same_dataset_are_refused(curated, source):
    with pytest.raises(UserError, match="another size or codec"):
        curate(settings(curated.path.parents[1], source, width_px=48))

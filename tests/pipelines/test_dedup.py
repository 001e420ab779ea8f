import dataclasses
import itertools
import shutil

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines import dedup
from pipelines.config import FilterConfig, ForgetConfig
from pipelines.curate import curate
from pipelines.dedup import (
    AGREEMENT,
    MOST_IN_BAND,
    alike,
    copied,
    find_copies,
    mark_same_frames,
    match,
    motion_of,
    read_pairs,
    shared_bands,
)
from pipelines.filters import MIRRORED, phash
from pipelines.manifest import Plan
from pipelines.revise import forget
from pipelines.shards import VIDEO_SCHEMA, Unit, Writer, open_ledger
from pipelines.tables import write_shard
from pipelines.video import write_video
from tests.pipelines.footage import arcade, scroll, settings, sidecar

LEDGER = {
    "z": ("kept", "one"),
    "a": ("kept", "one"),
    "m": ("partial", "one"),
    "other": ("kept", "two"),
    "refused": ("rejected", "one"),
    "unread": ("dead_letter", None),
    "broken": ("dead_letter", None),
}


@pytest.fixture
def writer(home):
    folder = home.datasets / "d"
    rows = [
        {"uri": v, "video_id": v, "unit_id": "u", "outcome": outcome, "frames_digest": frames}
        for v, (outcome, frames) in LEDGER.items()
    ]
    write_shard(folder / "videos" / "u.parquet", rows, VIDEO_SCHEMA)
    made = Writer(folder)
    made.commit([Unit("u", None, folder / "videos" / "u.parquet")])
    return made


def plan(*order):
    return Plan([{"video_id": v, "unit_id": "u", "again": False} for v in order])


def outcomes(writer):
    return {
        r["video_id"]: (r["outcome"], r["detail"])
        for r in open_ledger(writer.folder, ["video_id", "outcome", "detail"])
    }


def test_the_first_planned_stays_whatever_its_name(writer):
    assert mark_same_frames(writer, plan("z", "a", "m", "other", "refused", "unread", "broken")) == 2
    assert outcomes(writer) == {
        **{v: (outcome, None) for v, (outcome, _) in LEDGER.items()},
        "a": ("duplicate", "as z"),
        "m": ("duplicate", "as z"),
    }


def test_once_marked_there_is_nothing_left_to_mark(writer):
    order = plan("z", "a", "m", "other", "refused", "unread", "broken")
    mark_same_frames(writer, order)
    before = outcomes(writer)
    assert mark_same_frames(writer, order) == 0
    assert outcomes(writer) == before


# -- one clip beside another -------------------------------------------------------------------------------------


def luma(frames):
    return np.stack([cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in frames])


def test_a_mirrored_picture_has_known_bits_turned_over():
    frames = arcade(20, seed=3)
    plain, turned = (phash(luma(f), 10) for f in (frames, frames[:, :, ::-1]))
    assert len(plain) == 10
    assert np.bitwise_count(plain ^ turned ^ MIRRORED).max() <= 1


@pytest.mark.parametrize("late", [0, 30, -25])
def test_motion_agrees_at_the_right_moment(late):
    film = arcade(160, seed=1)
    a, b = motion_of(film[30:110]), motion_of(film[30 + late : 110 + late])
    offset, agreement = match(a, b)
    assert offset == -late
    assert agreement > 0.99


def test_another_play_of_the_same_screen_is_no_copy():
    one, other = arcade(80, seed=1), arcade(80, seed=2)
    assert alike(phash(luma(one), 10), phash(luma(other), 10))  # the pictures are, so only motion can tell
    assert match(motion_of(one), motion_of(other))[1] < AGREEMENT


def test_what_does_not_move_proves_nothing():
    still = np.repeat(arcade(8, seed=1)[:1], 80, axis=0)
    assert match(motion_of(still), motion_of(still)) == (0, 0.0)


def test_only_bands_that_few_share_make_pairs():
    clips = [0, 1, 2, *range(3, 4 + MOST_IN_BAND)]
    band = np.array([7] * 3 + [9] * (1 + MOST_IN_BAND))
    rows = {"band": band, "place": np.array(clips), "video": np.array([10, 11, 11, *clips[3:]])}
    found = shared_bands({**rows, "mirrored": np.zeros(len(clips), bool)})
    pairs = list(zip(found["place_a"].tolist(), found["place_b"].tolist(), strict=True))
    assert pairs == [(0, 1), (0, 2)]  # 1 and 2 are of one video; the band of all others says nothing


# -- the verdict -------------------------------------------------------------------------------------------------


def pair(a, b, offset=0, agreement=1.0):
    return {"a": a, "b": b, "mirrored": False, "offset": offset, "frames": 10, "agreement": agreement}


def test_a_late_copy_is_covered_by_the_clips_on_both_sides():
    ranks = {"best-0": (0, 0), "best-1": (0, 1), "late": (1, 0)}
    found = copied(ranks, [pair("best-0", "late", -6), pair("best-1", "late", 4)])
    assert found == {"late": (1.0, "best-1")}
    assert copied(ranks, [pair("best-0", "late", -6)]) == {"late": (pytest.approx(0.4), "best-0")}


def test_what_does_not_agree_or_does_not_pass_covers_nothing():
    ranks = {"a": (0,), "b": (1,)}
    assert copied(ranks, [pair("a", "b", agreement=AGREEMENT - 0.01), pair("b", "gone")]) == {}


@given(
    st.permutations("abcde"),
    st.lists(st.sampled_from([*itertools.combinations("abcde", 2)]), max_size=10),
    st.randoms(),
)
def test_the_best_of_a_group_stays_whatever_the_order(order, edges, draw):
    ranks = {clip: (place,) for place, clip in enumerate(order)}
    pairs = [pair(*edge) for edge in edges]
    found = copied(ranks, pairs)
    draw.shuffle(pairs)
    assert copied(ranks, pairs) == found
    assert all(ranks[original] < ranks[copy] for copy, (_, original) in found.items())
    assert set(found) == {max(edge, key=ranks.get) for edge in edges}  # so every group keeps its best, and only those


# -- a corpus ----------------------------------------------------------------------------------------------------


def upload(folder, name, frames, crf=20):
    folder.mkdir(parents=True, exist_ok=True)
    write_video(folder / f"{name}.mp4", iter(frames), 20, crf=crf)
    sidecar(folder / f"{name}.mp4", duration=len(frames) / 20, uploader=f"by {name}")


def scaled(frames, side):
    return np.stack([cv2.resize(f, (side, side), interpolation=cv2.INTER_LINEAR) for f in frames])


@pytest.fixture(scope="module")
def crawl(tmp_path_factory, ray_cluster):
    root = tmp_path_factory.mktemp("crawl")
    film, raw = arcade(330, seed=1), root / "raw"
    upload(raw, "original", scaled(film, 128))
    upload(raw, "small", scaled(film, 48), crf=30)
    upload(raw, "poor", film, crf=34)
    upload(raw, "mirror", film[:, :, ::-1])
    upload(raw, "late", film[60:])
    upload(raw, "level2", arcade(330, seed=2))
    upload(raw, "other", scroll(330, seed=5))
    config = settings(root, raw, width_px=64, height_px=64, clip_frames=80)
    return config, curate(config)


@pytest.fixture
def copy_of_crawl(crawl, tmp_path):
    """The curated crawl, to change."""
    config, _ = crawl
    shutil.copytree(config.home / "datasets", tmp_path / "datasets")
    shutil.copytree(config.source, tmp_path / "raw")
    return dataclasses.replace(config, home=tmp_path, source=tmp_path / "raw")


def ledger(result):
    columns = ["video_id", "outcome", "stage", "reason", "clips", "dropped_clips"]
    return {r["video_id"]: r for r in result.dataset.video_table(columns).to_pylist()}


def kept(result):
    return set(result.dataset.clip_table(["video_id"])["video_id"].to_pylist())


def test_copies_of_every_kind_are_found_and_the_best_is_kept(crawl):
    _, result = crawl
    found = ledger(result)
    assert kept(result) == {"original", "level2", "other"}
    for name in ("small", "poor", "mirror", "late"):
        assert (found[name]["outcome"], found[name]["stage"], found[name]["reason"]) == ("duplicate", "copies", "copy")
        assert found[name]["clips"] == len(found[name]["dropped_clips"]) > 0
    windows = {r["video_id"]: r["windows"] for r in result.dataset.video_table(["video_id", "windows"]).to_pylist()}
    originals = {w["clip_id"] for w in windows["original"]}
    assert {w["copy_of"] for w in windows["mirror"]} == originals
    assert [w["copied_share"] for w in windows["mirror"]] == [1.0, 1.0]
    assert all(p["mirrored"] == ("mirror" in who) for p, who in named(result) if p["agreement"] >= AGREEMENT)


def named(result):
    """Every compared pair, with the videos it is of."""
    names = {}
    for row in result.dataset.video_table(["video_id", "windows"]).to_pylist():
        names |= {w["clip_id"]: row["video_id"] for w in row["windows"]}
    return [(p, {names[p["a"]], names[p["b"]]}) for p in read_pairs(result.path)]


def test_a_second_run_compares_nothing(crawl):
    config, result = crawl
    files = sorted((p.name, p.stat().st_mtime_ns) for p in (result.path / "pairs").iterdir())
    assert curate(config).version == result.version
    assert find_copies(result.path, config.cluster) == 0
    assert sorted((p.name, p.stat().st_mtime_ns) for p in (result.path / "pairs").iterdir()) == files


def test_over_a_cluster_the_same_pairs_are_found(crawl, tmp_path, monkeypatch):
    config, result = crawl
    shutil.copytree(result.path / "clips", tmp_path / "clips")
    monkeypatch.setattr(dedup, "BUCKET_ROWS", 4000)
    monkeypatch.setattr(dedup, "PAIRS_HERE", 40)
    find_copies(tmp_path, config.cluster)
    assert read_pairs(tmp_path) == read_pairs(result.path)


def test_keeping_every_copy_is_a_threshold_and_decodes_nothing(crawl, copy_of_crawl):
    every = dataclasses.replace(copy_of_crawl, filters=FilterConfig(max_copied_share=1.0))
    files = {p.name for p in (every.home / "datasets" / "small" / "clips").iterdir()}
    assert kept(curate(every)) == {"original", "small", "poor", "mirror", "late", "level2", "other"}
    assert kept(curate(copy_of_crawl)) == kept(crawl[1])
    assert {p.name for p in (every.home / "datasets" / "small" / "clips").iterdir()} == files


def test_where_the_kept_copy_is_forgotten_the_next_best_returns(copy_of_crawl):
    forget(ForgetConfig(home=copy_of_crawl.home, name="small", video="original"))
    after = curate(copy_of_crawl)
    assert len(kept(after) & {"poor", "mirror"}) == 1  # of equal size, so the one with more bits a second
    assert kept(after) - {"poor", "mirror"} == {"level2", "other"}
    assert ledger(after)["original"]["reason"] == "forgotten"
    forget(ForgetConfig(home=copy_of_crawl.home, name="small", uploader="by mirror"))
    assert "poor" in kept(curate(copy_of_crawl))


def test_a_better_copy_that_comes_later_takes_the_place(crawl, copy_of_crawl):
    upload(copy_of_crawl.home / "raw", "better", scaled(arcade(330, seed=1), 256))
    result = curate(copy_of_crawl)
    assert kept(result) == {"better", "level2", "other"}
    assert set(ledger(result)) == {*ledger(crawl[1]), "better"}

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import ray
import torch
from hypothesis import given
from hypothesis import strategies as st

from infra.config import UserError
from models.checkpoint import load_model
from models.config import QualityConfig
from pipelines import quality
from pipelines.config import CurateConfig, FilterConfig
from pipelines.curate import curate
from pipelines.label import LABELS, Ballot
from pipelines.quality import GOOD, Labelled, Thumbs, curve, labelled, score, thumbnails
from pipelines.shards import open_dataset
from pipelines.train import command, train
from pipelines.train_config import FeedConfig, OptimizerConfig, TrainConfig
from pipelines.video import decode_clip
from tests.pipelines.footage import arcade, drama, film, scroll, settings
from tests.pipelines.test_train import die_at

MODEL = QualityConfig(frames=3, height_px=24, width_px=24, width=8, groups=4)
EVERY = FilterConfig(min_blur=0, max_copied_share=1.0)
VIDEOS = 12


@pytest.fixture(scope="module")
def rated(tmp_path_factory, ray_cluster):
    """A curated home of games and films, all but some of it rated: 5 for games, 1 for films, 3 for the undecided."""
    root = tmp_path_factory.mktemp("rated")
    for n in range(VIDEOS):
        film(root / "raw", f"game{n}", arcade(90, seed=n, screen=n) if n % 2 else scroll(90, seed=n))
        film(root / "raw", f"film{n}", drama(90, seed=n))
    config = settings(root, root / "raw", filters=EVERY)
    dataset = curate(config).dataset
    ballot = Ballot(dataset)
    for row in dataset.clip_table(["clip_id", "video_id"]).to_pylist():
        if row["video_id"] not in ("game0", "film0"):
            ballot.rate(row["clip_id"], 5 if row["video_id"].startswith("game") else 1)
    for row in dataset.clip_table(["clip_id", "video_id"]).to_pylist():
        if row["video_id"] in ("game1", "film1"):
            ballot.rate(row["clip_id"], 3)
    return config


def training(home, **changes):
    base = TrainConfig(home=home, stage="quality", dataset="small", quality=MODEL, steps=60, batch=12, micro_batch=12,
                       workers=0, log_every=20, picture_every=0, label_holdout=0.4, checkpoint_every=30,
                       optimizer=OptimizerConfig(lr=3e-3, final_lr=3e-4, warmup_steps=5))  # fmt: skip
    return dataclasses.replace(base, **changes)


@pytest.fixture(scope="module")
def classifier(rated):
    return train(training(rated.home))


def videos(result):
    return set(result.dataset.clip_table(["video_id"])["video_id"].to_pylist())


def games(count=VIDEOS):
    return {f"game{n}" for n in range(count)}


# -- learning ----------------------------------------------------------------------------------------------------


def test_it_tells_games_from_films_it_never_saw(classifier):
    assert classifier.kind == "quality"
    assert classifier.metrics["roc_auc"] > 0.95
    assert classifier.metrics["precision"] > 0.9
    assert classifier.metrics["recall"] > 0.9
    found = json.loads((classifier.path / "measures.json").read_text())
    assert found["counts"]["held_out"] >= 6
    hours = found["hours"]["hours"]
    assert hours[0] == pytest.approx(4 * VIDEOS * 2 / 3600)
    assert all(a >= b for a, b in zip(hours, hours[1:], strict=False))
    page = (classifier.path / "quality.html").read_text()
    assert "<script" not in page
    assert page.count("<svg") == 2
    assert {"precision.svg", "hours.svg", "model.safetensors", "config.json"} <= set(classifier.files)


def test_the_same_training_is_found_and_other_labels_are_another(rated, classifier):
    assert train(training(rated.home, log_every=7)).reference == classifier.reference
    dataset = open_dataset(rated.home, "small")
    one = next(clip for clip, stars in Ballot(dataset).stars.items() if stars == GOOD)
    Ballot(dataset).rate(one, 2)
    other = train(training(rated.home, steps=2))
    assert other.version == "v2"
    Ballot(dataset).rate(one, GOOD)


def test_continued_equals_uninterrupted(rated):
    whole, broken = (training(rated.home, name=name, steps=6, checkpoint_every=2) for name in ("whole", "broken"))
    one = train(whole)
    die_at(broken, 3)
    assert train(broken).files["model.safetensors"] == one.files["model.safetensors"]


@pytest.mark.slow
def test_ray_train_learns_the_same_in_two_workers(rated, classifier):
    made = train(training(rated.home, name="spread", workers=2, micro_batch=6))
    assert made.metrics["roc_auc"] > 0.95


def test_a_dry_run_reckons_with_the_network():
    said = command(TrainConfig(stage="quality", dry_run=True))
    assert "11.18 M parameters" in said


def test_held_out_videos_are_on_one_side_only(rated):
    dataset = open_dataset(rated.home, "small")
    video = {r["clip_id"]: r["video_id"] for r in dataset.clip_table(["clip_id", "video_id"]).to_pylist()}
    sides = labelled(dataset, 0.4)
    seen = {side: {video[clip] for clip, _ in rows} for side, rows in sides.items()}
    assert not seen["train"] & seen["test"]
    assert seen["train"] | seen["test"] == {f"{kind}{n}" for kind in ("game", "film") for n in range(2, VIDEOS)}


def test_a_pass_visits_every_clip_once_and_classes_weigh_the_same(rated):
    dataset = open_dataset(rated.home, "small")
    rows = labelled(dataset, 0.4)["train"]
    rows = [r for r in rows if r[1]][:3] + [r for r in rows if not r[1]][:6]
    source = Labelled(
        home=rated.home, dataset=dataset.reference, labels=tuple(rows), model=MODEL, seed=1, feed=FeedConfig()
    )
    thumbs = Thumbs(source)
    batch = thumbs.batch(9, 9)
    assert sorted(batch["label"].tolist()) == [0] * 6 + [1] * 3
    assert batch["weight"][batch["label"] == 1].sum() == pytest.approx(batch["weight"][batch["label"] == 0].sum())
    assert batch["weight"].mean() == pytest.approx(1)
    again = Thumbs(source).batch(9, 9)
    assert all((batch[name] == again[name]).all() for name in batch)
    shown = {frames.tobytes() for n in range(9) for frames in (thumbs.clip(n), thumbs.clip(n)[:, :, ::-1])}
    assert {frames.tobytes() for frames in batch["frames"]} <= shown


def test_too_few_labels_is_one_sentence(rated):
    with pytest.raises(UserError, match=r"clips rated 5 and .* are for test: rate more"):
        train(training(rated.home, label_holdout=0.01))


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=30))
def test_a_curve_is_what_counting_says(pairs):
    scores = np.array([s / 4 for s, _ in pairs])
    labels = np.array([int(good) for _, good in pairs])
    if len(set(labels.tolist())) < 2:
        return
    found = curve(scores, labels)
    points = found["curve"]
    for threshold, precision, recall in zip(*(points[k] for k in ("threshold", "precision", "recall")), strict=True):
        taken = scores >= threshold
        assert precision == pytest.approx(labels[taken].mean())
        assert recall == pytest.approx(labels[taken].sum() / labels.sum())
    beaten = [(g > b) + 0.5 * (g == b) for g in scores[labels == 1] for b in scores[labels == 0]]
    assert found["metrics"]["roc_auc"] == pytest.approx(np.mean(beaten))


def test_thumbnails_are_spread_over_the_clip():
    frames = np.arange(40, dtype=np.uint8)[:, None, None, None] * np.ones((1, 48, 48, 3), np.uint8)
    assert thumbnails(frames, MODEL)[:, 0, 0, 0].tolist() == [0, 20, 39]


# -- scoring -----------------------------------------------------------------------------------------------------


def test_curation_keeps_what_scores_well_and_a_threshold_decodes_nothing(rated, classifier):
    threshold = classifier.metrics["threshold"]
    wanted = dataclasses.replace(rated, quality="quality@v1", filters=dataclasses.replace(EVERY, min_quality=threshold))
    result = curate(wanted)
    assert len(videos(result) ^ games()) <= 2  # of 24, with the ones that were never rated
    ledger = result.dataset.video_table(["video_id", "reason", "windows"]).to_pylist()
    assert sum(row["reason"] == "quality" for row in ledger) >= VIDEOS - 2
    assert all(0 <= w["quality"] <= 1 for row in ledger for w in row["windows"])
    table = result.path / "quality-quality-v1"
    scored = sorted((p.name, p.stat().st_mtime_ns) for p in table.glob("*.parquet"))
    version = result.version
    assert curate(wanted).version == version
    loose = curate(dataclasses.replace(wanted, filters=EVERY))
    assert videos(loose) == games() | {f"film{n}" for n in range(VIDEOS)}
    assert sorted((p.name, p.stat().st_mtime_ns) for p in table.glob("*.parquet")) == scored


def test_a_new_classifier_scores_again_and_new_videos_are_scored(rated, classifier):
    train(training(rated.home, name="judge", seed=5, steps=2))
    result = curate(dataclasses.replace(rated, quality="judge"))
    assert (result.path / "quality-judge-v1").is_dir()
    film(rated.source, "zgame", arcade(90, seed=77, screen=50))
    more = curate(dataclasses.replace(rated, quality="judge"))
    ledger = {r["video_id"]: r["windows"] for r in more.dataset.video_table(["video_id", "windows"]).to_pylist()}
    assert all(w["quality"] is not None for windows in ledger.values() for w in windows)
    assert len(ledger["zgame"]) == 2


def test_without_a_classifier_a_threshold_is_one_sentence(rated):
    with pytest.raises(UserError, match="name a classifier with --quality"):
        CurateConfig(filters=FilterConfig(min_quality=0.5))
    with pytest.raises(UserError, match="no artifact 'nobody'"):
        curate(dataclasses.replace(rated, quality="nobody"))


SCORING = """
    import pathlib, sys
    from infra.config import ClusterConfig
    from pipelines import quality
    from pipelines.config import CurateConfig
    quality.CLIPS_PER_FILE = 4
    home, address = sys.argv[1:]
    here = ClusterConfig(address=address)
    config = CurateConfig(home=home, name="small", quality="quality@v1", workers=1, cluster=here)
    quality.score(pathlib.Path(home) / "datasets" / "small", config)
"""


def test_killed_while_scoring_and_run_again_it_scores_the_same(rated, classifier, tmp_path, monkeypatch):
    import shutil

    for name in ("datasets", "artifacts"):
        shutil.copytree(rated.home / name, tmp_path / name, ignore=shutil.ignore_patterns("quality-*"))
    folder = tmp_path / "datasets" / "small"
    target = folder / "quality-quality-v1"
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-c", textwrap.dedent(SCORING), str(tmp_path), address]
    driver = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while driver.poll() is None and len(list(target.glob("[!.]*.parquet"))) < 2:
        time.sleep(0.02)
    os.kill(driver.pid, signal.SIGKILL)
    assert driver.wait() == -signal.SIGKILL
    left = {p.name: p.stat().st_mtime_ns for p in target.glob("[!.]*.parquet")}
    assert left
    monkeypatch.setattr(quality, "CLIPS_PER_FILE", 4)
    config = CurateConfig(home=tmp_path, name="small", quality="quality@v1", workers=1)
    found = score(folder, config)
    assert {name: (target / name).stat().st_mtime_ns for name in left} == left
    assert len(found) >= 4 * VIDEOS
    net, clips = (
        load_model(classifier.path, kind="quality"),
        open_dataset(tmp_path, "small").clip_table(["clip_id", "video"]),
    )
    for row in clips.to_pylist():
        seen = thumbnails(decode_clip(row["video"]), MODEL)
        assert found[row["clip_id"]] == pytest.approx(net.score(torch.from_numpy(seen)[None]).item(), abs=1e-5)


def test_labels_lie_beside_the_dataset(rated):
    lines = (rated.home / "datasets" / "small" / LABELS).read_text().splitlines()
    assert len(lines) >= 4 * VIDEOS - 4
    assert set(json.loads(lines[0])) == {"clip_id", "stars"}

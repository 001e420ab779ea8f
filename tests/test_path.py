"""The whole path as a user runs it: the demo, killed, run again, run once more; then what it left behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest

from infra.artifact import lineage, resolve
from infra.config import Home, TrackingConfig
from infra.registry import Registry
from pipelines.shards import open_dataset

DEMO = [Path(sys.executable).parent / "lampworks", "demo", "--no-browser", "--size", "tiny", "--home"]


def run(home):
    start = time.monotonic()
    done = subprocess.run([*DEMO, str(home)], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr, time.monotonic() - start


def run_and_kill(home, at):
    """Starts the demo and kills it with all its processes once its log shows `at`."""
    with subprocess.Popen(
        [*DEMO, str(home)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        seen = ""
        for line in process.stdout:
            seen += line
            if at in line:
                os.killpg(process.pid, signal.SIGKILL)
                break
        process.wait(60)
    assert at in seen, seen
    return seen


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """A home in which the demo was killed while it trained, and then run to its end."""
    home = tmp_path_factory.mktemp("path") / "home"
    first = run_and_kill(home, at="] world:")
    second, _ = run(home)
    return Home(home), first, second


def references(text):
    """step -> what it made, from the log."""
    return dict(re.findall(r"\[\d/7\] (\w+): (\S+)[^|\n]* \| \d+ s", text))


def test_it_continues_where_it_was_killed(walked):
    _, first, second = walked
    made, again = references(first), references(second)
    assert set(made) == {"record", "curate", "tokenizer", "tokenize"}
    assert set(again) == {"record", "curate", "tokenizer", "tokenize", "world", "evaluate", "report"}
    assert {step: again[step] for step in made} == made


def test_it_says_what_it_will_do_and_ends_with_a_played_session(walked):
    home, _, output = walked
    assert str(home.path) in output
    steps, frames, film = re.search(r"played: (\d+) steps, (\d+) different frames, film (\S+)", output).groups()
    assert int(steps) == 20
    assert int(frames) > 1
    assert Path(film).stat().st_size > 1000
    assert "next:   lampworks serve world@v1" in output


def test_once_more_reuses_everything(walked):
    home, _, second = walked
    before = {p: p.stat().st_mtime_ns for p in home.artifacts.rglob("*") if p.is_file()}
    third, _ = run(home.path)
    assert references(third) == references(second)
    assert {p: p.stat().st_mtime_ns for p in home.artifacts.rglob("*") if p.is_file()} == before


def test_a_served_world_walks_back_to_its_videos(walked):
    home, _, _ = walked
    chain = {a.kind: a for a in lineage(home, "world")}
    assert set(chain) == {"world", "tokenizer"}
    dataset = open_dataset(home, chain["world"].parents["dataset"])
    assert chain["tokenizer"].parents["dataset"] == dataset.reference
    sources = {row["video_id"]: row["uri"] for row in dataset.video_table(["video_id", "uri"]).to_pylist()}
    used = set(dataset.clip_table(["video_id"])["video_id"].to_pylist())
    assert used
    assert all((home.raw / sources[video]).is_file() for video in used)


def test_every_source_file_has_its_outcome(walked):
    home, _, _ = walked
    rows = open_dataset(home, "platformers").video_table().to_pylist()
    videos = [p for p in home.raw.iterdir() if p.suffix in {".mp4", ".mkv", ".webm"}]
    assert len(rows) == len(videos)
    assert {row["outcome"] for row in rows} >= {"kept", "rejected", "duplicate", "dead_letter"}
    assert all(row["reason"] for row in rows if row["outcome"] != "kept")


def test_other_engines_read_the_tables(walked):
    home, _, _ = walked
    dataset = open_dataset(home, "platformers")
    files = [str(p) for p in dataset.clip_files()]
    counted = duckdb.sql(f"select count(*), min(n_frames), max(n_frames) from read_parquet({files})").fetchall()
    assert counted[0] == (sum(pq.ParquetFile(f).metadata.num_rows for f in files), 40, 40)


def test_ffprobe_reads_a_stored_clip(walked, tmp_path):
    home, _, _ = walked
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(open_dataset(home, "platformers").clip_table(["video"])["video"][0].as_py())
    wanted = "stream=codec_name,width,height,nb_frames,pix_fmt"
    words = ["ffprobe", "-v", "error", "-show_entries", wanted, "-of", "json", str(clip)]
    stream = json.loads(subprocess.run(words, capture_output=True, check=True).stdout)["streams"][0]
    assert (stream["codec_name"], stream["width"], stream["height"]) == ("h264", 32, 32)
    assert (stream["nb_frames"], stream["pix_fmt"]) == ("40", "yuv444p")


def test_the_world_is_registered_as_champion(walked):
    home, _, _ = walked
    assert Registry(TrackingConfig(), home).aliases("world") == {"champion": "world@v1"}


def test_tracking_holds_one_finished_run_a_training(walked):
    from mlflow import MlflowClient

    home, _, _ = walked
    client = MlflowClient(home.tracking_uri)
    experiment = client.get_experiment_by_name(TrackingConfig().experiment)
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 2
    assert {r.info.status for r in runs} == {"FINISHED"}
    for found in runs:
        losses = client.get_metric_history(found.info.run_id, "loss")
        steps = [m.step for m in losses]
        assert steps == sorted(set(steps)), "a step was logged twice"
        assert len(steps) > 1
        assert client.list_artifacts(found.info.run_id)


def test_the_report_and_the_measures_are_there(walked):
    home, _, output = walked
    report = Path(references(output)["report"])
    assert report.stat().st_size > 50_000
    assert 'src="http' not in report.read_text()
    metrics = resolve(home, "world-evaluation").metrics
    assert {"tokenizer_psnr_db", "actions_perplexity", "nmi_effect", "dpsnr_db"} <= set(metrics)


def test_show_prints_record_and_lineage(walked):
    home, _, _ = walked
    show = [DEMO[0], "show", "--home", str(home.path)]
    listed = subprocess.run(show, capture_output=True, text=True, check=True).stdout
    assert "platformers@" in listed
    assert "world@v1" in listed
    one = subprocess.run([*show[:2], "world", *show[2:]], capture_output=True, text=True, check=True).stdout
    assert "tokenizer@v1 from dataset platformers@" in one


@pytest.mark.parametrize("damage", ["model.safetensors", "artifact.json"])
def test_a_damaged_world_is_refused_in_one_sentence(walked, tmp_path, damage):
    home, _, _ = walked
    copy = tmp_path / "world"
    subprocess.run(["cp", "-r", resolve(home, "world").path, copy], check=True)
    target = next(copy.rglob(damage))
    data = bytearray(target.read_bytes())
    data[len(data) // 2] ^= 0xFF
    target.write_bytes(bytes(data))
    words = [DEMO[0], "evaluate", str(copy), "--home", str(home.path)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("lampworks: ")
    assert damage in done.stderr

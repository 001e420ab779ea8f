"""Bad input of a whole run: one sentence and a non-zero exit, or a clean stop that a rerun continues."""

import json

import pyarrow as pa
import pytest

import lampworks
from pipelines import tables
from pipelines.shards import VIDEO_SCHEMA
from tests.pipelines.footage import film, scroll
from tests.pipelines.remote import make_bucket, on_small_disk, s3_server
from tests.pipelines.test_manifest import touch
from tests.pipelines.test_shards import unit

NOWHERE = "s3://b/x?endpoint_override=127.0.0.1:9&scheme=http"


def refused(capsys, *words):
    """The one sentence on stderr of a command that ends with status 2."""
    with pytest.raises(SystemExit) as ended:
        lampworks.main(["curate", *map(str, words)])
    said = capsys.readouterr().err.strip()
    assert ended.value.code == 2
    assert said.startswith("lampworks: ")
    assert "\n" not in said
    return said


@pytest.fixture
def raw(tmp_path):
    touch(tmp_path / "raw", "v.mp4")
    return tmp_path / "raw"


def test_wrong_credentials(tmp_path, raw, capsys):
    with s3_server(INITIAL_NO_AUTH_ACTION_COUNT="1") as endpoint:
        uri, options = make_bucket(endpoint, "closed")
        said = refused(capsys, f"{uri}/raw{options}", "--home", tmp_path)
        assert "can't be listed" in said
        assert "INVALID_ACCESS_KEY_ID" in said or "403" in said or "ACCESS_DENIED" in said
        target = refused(capsys, raw, "--home", tmp_path, "--target", f"{uri}/sets{options}")
        assert "stopped at s3://closed/sets" in target


def test_an_endpoint_out_of_reach(tmp_path, raw, capsys):
    assert "can't be listed" in refused(capsys, NOWHERE, "--home", tmp_path)
    assert "stopped at s3://b/x" in refused(capsys, raw, "--home", tmp_path, "--target", NOWHERE)


def test_a_home_that_can_not_be_written(tmp_path, raw, capsys):
    assert "cannot write to /proc/lampworks" in refused(capsys, raw, "--home", "/proc/lampworks")
    (tmp_path / "home" / "datasets").mkdir(parents=True)
    (tmp_path / "home" / "datasets" / "platformers").write_text("a file")
    assert "cannot write to" in refused(capsys, raw, "--home", tmp_path / "home")


def test_words_and_keys_that_do_not_exist(tmp_path, raw, capsys):
    (tmp_path / "c.toml").write_text("[filters]\nmax_statik_share = 0.5\n")
    said = refused(capsys, raw, "--home", tmp_path, "--config", tmp_path / "c.toml")
    assert "did you mean filters.max_static_share?" in said
    with pytest.raises(SystemExit) as ended:
        lampworks.main(["curate", str(raw), "--widht-px", "64"])
    assert ended.value.code == 2
    assert "--width-px" in capsys.readouterr().err


@pytest.mark.parametrize(("rows", "said"), [([], "is empty"), ([{"path": "v.mp4"}], "has no column `uri`")])
def test_a_manifest_without_use(tmp_path, capsys, rows, said):
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert said in refused(capsys, tmp_path / "list.jsonl", "--home", tmp_path)


def test_a_dataset_of_another_release_and_of_other_settings(tmp_path, raw, capsys):
    folder = tmp_path / "datasets" / "old"
    made = unit(folder, 1)
    older = pa.schema([field for field in VIDEO_SCHEMA if field.name != "windows"])
    tables.write_shard(made.videos, [{"video_id": "v"}], older)
    tables.append(folder / "videos", older, None, [("u", made.videos)], {"clips_version": "0"})
    assert "written by another release" in refused(capsys, raw, "--home", tmp_path, "--name", "old")
    (tmp_path / "datasets" / "other").mkdir()
    (tmp_path / "datasets" / "other" / "settings.json").write_text('{"config_digest": "x"}')
    assert "choose another --name" in refused(capsys, raw, "--home", tmp_path, "--name", "other")


def test_a_full_disk_is_a_clean_stop_that_a_rerun_continues(tmp_path):
    """A real one, of 200 kB; with room enough the same command ends with what an undisturbed one gives."""
    for n in range(8):
        film(tmp_path / "raw", f"v{n}", scroll(90, seed=n))
    (tmp_path / "home").mkdir()
    script = f"""
from pathlib import Path
from infra.cluster import connect
from infra.config import ClusterConfig, UserError
from pipelines.curate import curate
from tests.pipelines.footage import settings
def run(home):
    return curate(settings(Path(home), Path({str(tmp_path / "raw")!r})))
with connect(ClusterConfig(cpus=4)):
    try:
        run({str(tmp_path / "home")!r})
        print("it fitted")
    except UserError as error:
        print("STOPPED", error)
    remount("50m")
    again, calm = run({str(tmp_path / "home")!r}), run({str(tmp_path / "calm")!r})
    print("SAME", again.dataset.clip_table() == calm.dataset.clip_table(), again.outcomes)
"""
    done = on_small_disk(tmp_path / "home", script, "200k")
    lines = done.stdout.splitlines()
    assert any(line.startswith("STOPPED stopped at") and "No space left" in line for line in lines), (
        done.stdout + done.stderr
    )
    assert "SAME True {'kept': 8}" in lines, done.stdout + done.stderr

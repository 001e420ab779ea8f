import pickle

import pyarrow as pa
import pytest
from deltalake import DeltaTable

from infra.config import UserError
from pipelines.buckets import BucketPath, delta_location, place
from pipelines.config import TokenizeConfig
from pipelines.curate import curate
from pipelines.shards import VIDEO_SCHEMA, DatasetError, open_dataset, versions
from pipelines.tables import write_shard
from pipelines.tokenize import tokenize
from pipelines.train import train
from tests.pipelines.clips import write_dataset
from tests.pipelines.footage import corpus, settings
from tests.pipelines.ranks import config
from tests.pipelines.remote import gcs_server, upload
from tests.pipelines.test_shards import unit

FAR = "s3://bucket/pre fix/\u00fc?endpoint_override=host:9000&scheme=http"


def test_a_path_knows_where_it_lies_in_any_process():
    path = place(FAR)
    assert str(path) == FAR
    assert path.uri == "s3://bucket/pre fix/\u00fc"
    assert str(path / "a.mp4") == FAR.replace("\u00fc", "\u00fc/a.mp4")
    assert pickle.loads(pickle.dumps(path)) == path == place(str(path))
    assert (path / "a.mp4").with_name("b").parent == path
    assert place("/here/\u00fc") == type(place("/"))("/here/\u00fc")


def test_anybodys_path_says_so():
    text = "gs://anonymous@bucket/a b?endpoint_override=host:9000&scheme=http"
    path = place(text)
    assert str(path) == text
    assert str(path / "c") == text.replace("a b", "a b/c")
    assert path.uri == "gs://bucket/a b"
    assert pickle.loads(pickle.dumps(path)) == path == place(str(path))


def test_google_is_read_like_a_folder(tmp_path, ray_cluster):
    raw = corpus(tmp_path / "raw")
    with gcs_server("crawl") as address:
        there = upload(raw, "gs://anonymous@crawl/2026/raw", f"?endpoint_override={address}&scheme=http")
        far = curate(settings(tmp_path / "far", there))
    near = curate(settings(tmp_path / "near", raw))
    columns = ["video_id", "outcome"]
    rows = [{row["video_id"]: row for row in made.dataset.video_table(columns).to_pylist()} for made in (far, near)]
    assert rows[0] == rows[1]
    clips = [made.dataset.clip_table(["clip_id", "video"]).sort_by("clip_id") for made in (far, near)]
    assert clips[0] == clips[1]


def test_no_local_file_is_made_or_read_for_it():
    with pytest.raises(TypeError, match="no local file"):
        place(FAR).rename("x")
    with pytest.raises(TypeError, match="written whole"):
        place(FAR).open("wb")


@pytest.mark.parametrize(("text", "said"), [("ftp://host/x", "no object store"), ("s3://", "names no bucket")])
def test_what_is_no_place_is_one_sentence(text, said):
    with pytest.raises(UserError, match=said):
        place(text)


def test_delta_finds_the_endpoint(monkeypatch):
    uri, options = delta_location(place(FAR))
    assert (uri, options["AWS_ENDPOINT_URL"]) == ("s3://bucket/pre%20fix/%C3%BC", "http://host:9000")
    assert options["AWS_ALLOW_HTTP"] == "true"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://other:1")
    assert delta_location(place("s3://b/x"))[1] == {"AWS_ALLOW_HTTP": "true"}
    assert delta_location(place("/x")) == ("/x", {})


def test_objects_are_read_and_written(bucket):
    uri, options = bucket
    path = place(f"{uri}/d/x y \u4e2d.txt{options}")
    assert not path.exists()
    with pytest.raises(FileNotFoundError):
        path.stat()
    path.write_text("z\u00fc")
    assert path.read_text() == "z\u00fc"
    assert path.stat().st_size == 3
    assert path.parent.is_dir()
    assert list(path.parent.glob("*.txt")) == [path]
    assert [p for p, _ in path.parent.walk()] == [path]
    path.unlink()
    path.unlink(missing_ok=True)
    assert not list(path.parent.glob("*"))


def test_the_environment_names_the_endpoint_too(bucket, monkeypatch):
    uri, options = bucket
    place(f"{uri}/x{options}").write_text("1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://" + options.partition("=")[2].partition("&")[0])
    assert place(f"{uri}/x").read_text() == "1"


def test_a_dataset_in_a_bucket_is_read_like_one_at_home(home, bucket):
    uri, options = bucket
    here = open_dataset(home, write_dataset(home) and "toys")
    folder = place(upload(here.folder, f"{uri}/sets/toys", options))
    there = open_dataset(home, f"{folder}@0")
    assert isinstance(there.folder, BucketPath)
    assert open_dataset(home, there.reference) == there
    assert [v.number for v in versions(home, str(folder))] == [0]
    assert there.index() == here.index()
    assert there.read_clips(there.index()) == here.read_clips(here.index())
    assert (
        DeltaTable(*delta_location(there.folder / "clips")[:1], storage_options=delta_location(folder)[1]).version()
        == 0
    )
    with pytest.raises(DatasetError, match="no dataset .*: there are toys"):
        open_dataset(home, f"{uri}/sets/nothing{options}")


def test_a_table_of_another_release_is_one_sentence(home):
    folder = home.datasets / "d"
    made = unit(folder, 1)
    older = pa.schema([field for field in VIDEO_SCHEMA if field.name != "windows"])
    write_shard(made.videos, [{"video_id": "v"}], older)
    from pipelines import tables

    tables.append(folder / "videos", older, None, [("u", made.videos)], {"clips_version": "0"})
    with pytest.raises(DatasetError, match="another release: its column 'windows' is missing"):
        open_dataset(home, "d")


def test_training_and_tokens_reach_into_a_bucket(tracked_home, bucket, ray_cluster):
    uri, options = bucket
    write_dataset(tracked_home)
    there = upload(tracked_home.datasets / "toys", f"{uri}/sets/toys", options)
    made = train(config(tracked_home, steps=2, dataset=there))
    assert made.parents["dataset"] == f"{there}@0"
    table = tokenize(TokenizeConfig(home=tracked_home.path, dataset=there))
    assert isinstance(table.folder, BucketPath)
    ids = open_dataset(tracked_home, there).index()["clip_id"].to_pylist()
    assert len(table.places.keys() & set(ids)) == len(ids) == 6

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.config import UserError
from pipelines.buckets import place
from pipelines.explain import estimate, explain
from pipelines.manifest import open_plan, scan
from pipelines.sources import described, listed
from tests.pipelines.footage import film, scroll, settings, sidecar
from tests.pipelines.remote import Web, upload
from tests.pipelines.test_manifest import touch

ROWS = [
    {"uri": "b.mp4", "id": "bee", "title": "B 2D platformer playthrough", "duration": 30, "uploader": "someone"},
    {"uri": "sub/\u4e2d.webm", "id": None, "title": None, "duration": None, "uploader": None},
]


def write(path, rows):
    """A manifest in the format that its suffix names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        lines = (json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows)
        path.write_text("".join(lines), encoding="utf-8")
    return path


def folder(root):
    for name in ("a.mp4", "sub/b.MKV", "\u4e2d\u6587 \u00fc.webm", ".hidden.mp4", "c.mp4.part", "notes.txt"):
        touch(root, name, name.encode())
    (root / "a.info.json").write_text("{")
    (root / "sub" / "b.info.json").unlink()
    return root


def facts(sources):
    return [(s.name, s.size_bytes, s.metadata.title, bool(s.metadata.problem)) for s in sources]


def test_a_bucket_is_listed_like_a_folder(tmp_path, bucket):
    here = folder(tmp_path / "raw")
    there = upload(here, f"{bucket[0]}/some/raw", bucket[1])
    found = scan(there)
    assert facts(found) == facts(scan(str(here)))
    assert [s.uri for s in found] == [f"{bucket[0]}/some/raw/{s.uri}" for s in scan(str(here))]
    assert {s.metadata.problem.split(" (")[0].split(":")[0] for s in found if s.metadata.problem} == {
        "a.info.json can't be read", "there is no b.info.json"
    }  # fmt: skip


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
def test_a_manifest_replaces_sidecars(tmp_path, suffix):
    touch(tmp_path, "b.mp4", b"12345")
    touch(tmp_path, "sub/\u4e2d.webm")
    first, second = scan(str(write(tmp_path / f"list.{suffix}", ROWS)))
    assert (first.uri, first.name, first.size_bytes) == ("b.mp4", "bee", 5)
    assert (first.metadata.title, first.metadata.duration_s) == ("B 2D platformer playthrough", 30.0)
    assert first.location == str(tmp_path / "b.mp4")
    assert (second.name, bool(second.metadata.title)) == ("\u4e2d", False)
    assert suffix == "csv" or second.metadata.problem == "the manifest has no title"


def test_a_manifest_without_titles_leaves_it_to_the_sidecars(tmp_path, bucket):
    touch(tmp_path / "raw", "x.mp4", title="X 2D platformer")
    touch(tmp_path / "raw", "y.mp4")
    (tmp_path / "raw" / "y.info.json").unlink()
    upload(tmp_path / "raw", f"{bucket[0]}/v", bucket[1])
    rows = [{"uri": f"{bucket[0]}/v/{name}.mp4{bucket[1]}", "size": 7, "etag": "e1"} for name in "xy"]
    first, second = scan(str(write(tmp_path / "list.jsonl", rows)))
    assert (first.metadata.title, first.size_bytes, first.etag) == ("X 2D platformer", 7, "e1")
    assert "there is no y.info.json" in second.metadata.problem


def test_manifests_lie_anywhere_and_name_files_beside_them(tmp_path, bucket):
    touch(tmp_path / "raw", "v 1.mp4")
    write(tmp_path / "raw" / "list.csv", [{"uri": "v 1.mp4"}])
    (there,) = scan(upload(tmp_path / "raw", f"{bucket[0]}/m", bucket[1]).replace("?", "/list.csv?"))
    assert there.uri == f"{bucket[0]}/m/v 1.mp4"
    with Web(tmp_path / "raw") as web:
        (served,) = scan(f"{web.url}/list.csv")
        (single,) = scan(f"{web.url}/v%201.mp4?token=a.b")
    assert served.uri == f"{web.url}/v%201.mp4"
    assert served.metadata.title == single.metadata.title == there.metadata.title == "v 1 2D platformer playthrough"
    assert (single.name, single.size_bytes, single.etag) == ("v 1", 1, '"1"')


def test_listing_reads_no_video_and_known_ones_not_even_by_their_sidecars(tmp_path):
    touch(tmp_path / "raw", "v.mp4", b"x" * 10)
    with Web(tmp_path / "raw") as web:
        source = str(write(tmp_path / "list.jsonl", [{"uri": f"{web.url}/v.mp4", "size": 10}]))
        for asked in ([("GET", "/v.info.json")], []):
            open_plan(tmp_path / "data", source, settings(tmp_path, source), "s")
            assert web.asked == asked
            web.asked.clear()


@pytest.mark.parametrize(("size", "etag", "videos"), [(10, "e", 1), (None, None, 1), (11, "e", 2), (10, "f", 2)])
def test_another_size_or_etag_is_another_video(tmp_path, size, etag, videos):
    config = settings(tmp_path, "x")
    base = {"uri": "s3://b/v.mp4", "size": 10, "etag": "e", "title": "2D platformer playthrough"}
    for row in (base, base | {"size": size, "etag": etag}):
        plan = open_plan(tmp_path / "data", str(write(tmp_path / "list.jsonl", [row])), config, "s")
    assert len(plan.rows) == len(set(plan.video_ids)) == videos
    assert all(row["reason"] in (None, "same_bytes") for row in plan.rows)


def test_equal_etags_are_copies(tmp_path):
    shared = {"size": 10, "title": "2D platformer playthrough"}
    rows = [{"uri": f"s3://b/{n}.mp4", "etag": e, **shared} for n, e in enumerate(["x", "x", "y", "W/z", "W/z", None])]
    config = settings(tmp_path, "x")
    plan = open_plan(tmp_path / "data", str(write(tmp_path / "list.jsonl", rows)), config, "s")
    assert [row["reason"] for row in plan.rows] == [None, "same_bytes", None, None, None, None]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("list.csv", "", "is empty"),
        ("list.csv", "uri\n", "is empty"),
        ("list.jsonl", "", "is empty"),
        ("list.csv", "path,size\nx.mp4,1\n", "has no column `uri` but path, size"),
        ("list.jsonl", '{"uri": "x.mp4"}\n{"uri": 5}\n', "row 2: `uri` is 5"),
        ("list.jsonl", "[1]\n", "every line should be a JSON object"),
        ("list.jsonl", "{\n", "is no jsonl file"),
        ("list.parquet", "PAR1", "is no parquet file"),
        ("none.csv", None, "can't be read"),
        ("list.csv", "uri\nftp://host/x.mp4\n", "no object store"),
    ],
)
def test_a_manifest_without_use_is_one_sentence(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=said) as caught:
        scan(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_source_out_of_reach_is_one_sentence(tmp_path, bucket, monkeypatch):
    monkeypatch.setattr("pipelines.fetch.FIRST_PAUSE_S", 0.001)
    for source, said in [
        ("s3://b/x?endpoint_override=127.0.0.1:9&scheme=http", "can't be listed: .*connect"),
        (f"s3://no-such-bucket/x{bucket[1]}", "can't be listed: .*NO_SUCH_BUCKET"),
        (f"{bucket[0]}/nothing{bucket[1]}", "can't be listed: .*does not exist"),
        ("http://127.0.0.1:9/v.mp4", "can't be reached: .*refused"),
        ("gopher://x/v", "no object store"),
    ]:
        with pytest.raises(UserError, match=said):
            listed(source)


def test_a_sidecar_that_can_not_be_had_now_stops_the_plan(tmp_path, monkeypatch):
    """No verdict is built on an outage: the next run shall read it."""
    monkeypatch.setattr("pipelines.fetch.FIRST_PAUSE_S", 0.001)
    touch(tmp_path, "v.mp4")
    with Web(tmp_path) as web:
        web.troubles["/v.info.json"] = [503] * 20
        with pytest.raises(UserError, match="run again later"):
            described(listed(f"{web.url}/v.mp4"))
        web.troubles["/v.info.json"] = [503]
        assert described(listed(f"{web.url}/v.mp4"))[0].metadata.title


@pytest.mark.parametrize(("duration", "size"), [("nan hours", "1"), ("nan", "1.0"), ("inf", 1), ("1e400", " 1 ")])
def test_duration_and_size_may_be_text(tmp_path, duration, size):
    sidecar(touch(tmp_path, "v.mp4"), duration=5)
    rows = [{"uri": "v.mp4", "title": "t", "duration": duration, "size": size}]
    (found,) = scan(str(write(tmp_path / "list.csv", rows)))
    assert (found.metadata.duration_s, found.size_bytes) == (None, 1)
    (found,) = scan(str(write(tmp_path / "list.jsonl", [rows[0] | {"size": "inf", "title": "a\u2028b"}])))
    assert (found.metadata.title, found.size_bytes) == ("a\u2028b", 1)


def test_a_look_at_a_bucket_reads_a_sample_and_writes_nothing(tmp_path, bucket):
    film(tmp_path / "raw", "v", scroll(90, seed=1))
    there = upload(tmp_path / "raw", f"{bucket[0]}/raw", bucket[1])
    config = settings(tmp_path / "home", there, target=f"{bucket[0]}/sets{bucket[1]}")
    said = estimate(config)
    assert "sampled      1 videos" in said
    assert "2 clips kept" in said
    assert "not curated yet" in explain(config, "v.mp4")
    assert {p.name for p, _ in place(bucket[0] + bucket[1]).walk()} == {"v.mp4", "v.info.json"}
    assert not (tmp_path / "home").exists()

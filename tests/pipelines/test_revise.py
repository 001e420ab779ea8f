import dataclasses
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from infra.config import UserError
from pipelines.buckets import place
from pipelines.config import FilterConfig, ForgetConfig
from pipelines.curate import curate
from pipelines.quality import SCORE_SCHEMA
from pipelines.revise import forget
from pipelines.shards import CLIP_SCHEMA, VIDEO_SCHEMA, Writer, open_dataset
from pipelines.tables import append, parquet, write_shard
from pipelines.tokenize import TOKEN_SCHEMA, TokenTable
from tests.pipelines.clips import write_dataset
from tests.pipelines.footage import film, scroll, settings


@pytest.fixture
def first(tmp_path, ray_cluster):
    for seed, name in enumerate("abcd"):
        film(tmp_path / "raw", name, scroll(90, seed=seed, cut_every=30 if name > "b" else 0), uploader=f"by {name}")
    return curate(settings(tmp_path, tmp_path / "raw"))


def again(tmp_path, **changes):
    config = settings(tmp_path, tmp_path / "raw")
    return curate(dataclasses.replace(config, filters=dataclasses.replace(FilterConfig(), **changes)))


def facts(result):
    table = result.dataset.video_table(["video_id", "outcome", "reason", "clips", "seconds"])
    return {row["video_id"]: row for row in table.to_pylist()}


def clips(result):
    return {row["clip_id"]: row["video"] for row in result.dataset.clip_table(["clip_id", "video"]).to_pylist()}


def test_other_thresholds_decode_nothing_again(tmp_path, first):
    before = {p.name for p in (first.path / "clips").glob("*.parquet")}
    for path in (tmp_path / "raw").glob("*.mp4"):
        path.write_bytes(b"gone")  # whoever decodes again would notice
    tight = again(tmp_path, max_cuts=0)
    assert tight.version > first.version
    assert facts(tight)["c"] | {"seconds": 0} == {
        "video_id": "c", "outcome": "rejected", "reason": "cuts", "clips": 2, "seconds": 0
    }  # fmt: skip
    assert {c: clips(first)[c] for c in clips(tight)} == clips(tight)
    assert len(clips(tight)) == 4
    back = again(tmp_path)
    assert clips(back) == clips(first)
    assert {p.name for p in (first.path / "clips").glob("*.parquet")} == before
    assert clips(dataclasses.replace(first, dataset=open_dataset(tmp_path, tight.dataset.reference))) == clips(tight)


def test_only_what_was_never_encoded_is_decoded_again(tmp_path, ray_cluster, first):
    strict = curate(
        dataclasses.replace(
            settings(tmp_path, tmp_path / "raw", name="strict"), filters=FilterConfig(max_cuts=0, min_blur=1.0)
        )
    )
    assert facts(strict)["c"]["outcome"] == "rejected"
    loose = curate(settings(tmp_path, tmp_path / "raw", name="strict", filters=FilterConfig(min_blur=1.0)))
    assert clips(loose) == clips(first)
    assert {k: v["outcome"] for k, v in facts(loose).items()} == dict.fromkeys("abcd", "kept")
    assert clips(dataclasses.replace(loose, dataset=open_dataset(tmp_path, strict.dataset.reference))) == clips(strict)
    once_more = curate(settings(tmp_path, tmp_path / "raw", name="strict", filters=FilterConfig(min_blur=1.0)))
    assert once_more.version == loose.version


@pytest.mark.parametrize("by", [{"video": "b"}, {"uploader": "by b"}])
def test_forgotten_footage_is_in_no_file(tmp_path, first, by):
    before = clips(first)
    lost = set(before) - clips_without(first, "b")
    secret = [before[c] for c in lost]
    assert len(secret) == 2
    assert "1 videos with 2 clips" in forget(ForgetConfig(home=tmp_path, name="small", **by))
    after = dataclasses.replace(first, dataset=open_dataset(tmp_path, "small"))
    assert clips(after) == {c: video for c, video in before.items() if c not in lost}
    with pytest.raises(UserError, match="removed on request"):
        clips(first)
    assert facts(after)["b"]["reason"] == "forgotten"
    assert not list((tmp_path / "reports").iterdir())
    for path in first.path.rglob("*.parquet"):
        content = path.read_bytes()
        assert not any(video in content for video in secret)
        assert b"by b" not in content
    assert curate(settings(tmp_path, tmp_path / "raw")).outcomes["rejected"] == 1


def clips_without(result, video_id):
    table = result.dataset.clip_table(["clip_id", "video_id"]).to_pylist()
    return {row["clip_id"] for row in table if row["video_id"] != video_id}


def test_forgetting_a_stranger_is_one_sentence(tmp_path, first):
    with pytest.raises(UserError, match="no video with video_id 'x'"):
        forget(ForgetConfig(home=tmp_path, name="small", video="x"))
    with pytest.raises(UserError, match="either"):
        ForgetConfig(home=tmp_path, name="small")


def test_the_same_frames_in_another_file_return_when_the_kept_one_is_forgotten(tmp_path, ray_cluster):
    for name in "ab":
        path = film(tmp_path / "raw", name, scroll(90, seed=5))
        path.write_bytes(path.read_bytes() + b"\x00\x00\x00\x08free" * "ab".index(name))
    before = curate(settings(tmp_path, tmp_path / "raw"))
    assert facts(before)["b"]["reason"] == "same_frames"
    forget(ForgetConfig(home=tmp_path, name="small", video="a"))
    after = curate(settings(tmp_path, tmp_path / "raw"))
    assert {k: v["outcome"] for k, v in facts(after).items()} == {"a": "rejected", "b": "kept"}
    assert len(clips(after)) == 2


# -- takedown without curation -----------------------------------------------------------------------------------


def with_tables(home):
    """A dataset with tokens and scores of every clip."""
    write_dataset(home, clips=4)
    folder = home.datasets / "toys"
    for name, schema, value in (
        ("tokens-t-v1", TOKEN_SCHEMA, {"n_frames": 1, "tokens_per_frame": 2, "tokens": b"abcd"}),
        ("quality-q-v1", SCORE_SCHEMA, {"quality": 0.5}),
    ):
        path = folder / name / "u0.parquet"
        write_shard(path, [{"clip_id": f"u0c00{n}", **value} for n in range(4)], schema)
        append(folder / name, schema, None, [("u0", path)], {})
    return folder


def clip_ids(folder):
    """By table, the clips that any file of it names, old files included."""
    files = {name: (folder / name).glob("*.parquet") for name in ("clips", "tokens-t-v1", "quality-q-v1")}
    return {n: {c for p in ps for c in pq.read_table(p)["clip_id"].to_pylist()} for n, ps in files.items()}


def test_tokens_and_scores_of_forgotten_clips_are_gone_too(home):
    folder = with_tables(home)
    assert set(map(len, clip_ids(folder).values())) == {4}
    forget(ForgetConfig(home=home.path, name="toys", video="u0v1"))
    left = {"u0c000", "u0c002", "u0c003"}
    assert clip_ids(folder) == dict.fromkeys(("clips", "tokens-t-v1", "quality-q-v1"), left)
    dataset = open_dataset(home, "toys")
    assert TokenTable.open(dataset, "t@v1").read("u0c002").tolist() == [[25185, 25699]]
    assert set(dataset.clip_table(["clip_id"])["clip_id"].to_pylist()) == left


def test_footage_in_a_bucket_is_forgotten_too(tmp_path, bucket):
    folder = place("".join(bucket)) / "toys"
    write_dataset(SimpleNamespace(datasets=folder.parent), clips=3)
    forget(ForgetConfig(home=tmp_path, name=str(folder), video="u0v1"))
    rows = open_dataset(tmp_path, str(folder)).clip_table(["clip_id"])["clip_id"].to_pylist()
    assert rows == ["u0c000", "u0c002"]
    for path in (folder / "clips").glob("*.parquet"):
        assert "u0c001" not in parquet(path).read(columns=["clip_id"])["clip_id"].to_pylist()


def test_every_part_of_a_long_video_is_forgotten(home):
    folder = with_tables(home)
    path = folder / "clips" / "u0.parquet"
    for table, schema in (("clips", CLIP_SCHEMA), ("videos", VIDEO_SCHEMA)):
        path = folder / table / "u0.parquet"
        rows = pq.read_table(path).to_pylist()
        write_shard(
            path,
            [{**r, "video_id": r["video_id"].replace("u0v1", "long#0").replace("u0v2", "long#1")} for r in rows],
            schema,
        )
    assert "2 videos with 2 clips" in forget(ForgetConfig(home=home.path, name="toys", video="long"))
    assert set(clip_ids(folder)["clips"]) == {"u0c000", "u0c003"}


def test_a_killed_request_is_asked_again(home, monkeypatch):
    folder = with_tables(home)
    Writer(folder).amend({"u0v1": {"uploader": "someone", "title": "a secret title"}}, "named")

    assert any(b"a secret title" in path.read_bytes() for path in folder.rglob("*.parquet"))

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("pipelines.revise._delete_unreferenced", killed)
        with pytest.raises(KeyboardInterrupt):
            forget(ForgetConfig(home=home.path, name="toys", uploader="someone"))
    with monkeypatch.context() as patched:
        patched.setattr("pipelines.revise._return_copies", killed)
        with pytest.raises(KeyboardInterrupt):
            forget(ForgetConfig(home=home.path, name="toys", uploader="someone"))
    assert "1 videos" in forget(ForgetConfig(home=home.path, name="toys", uploader="someone"))
    assert all("u0c001" not in ids for ids in clip_ids(folder).values())
    assert not any(b"a secret title" in path.read_bytes() for path in folder.rglob("*.parquet"))

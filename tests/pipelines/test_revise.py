import dataclasses

import pytest

from infra.config import UserError
from pipelines.config import FilterConfig, ForgetConfig
from pipelines.curate import curate
from pipelines.revise import forget
from pipelines.shards import open_dataset
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

"""Artifacts are written once, found again by identity, walked back, and refused when a file changed."""

import multiprocessing

import pytest

from infra.artifact import ArtifactError, find, lineage, publish, resolve, versions
from infra.config import Home


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path / "home").ensure()


@pytest.fixture
def weights(tmp_path):
    folder = tmp_path / "weights"
    (folder / "deep").mkdir(parents=True)
    (folder / "model.bin").write_bytes(b"weights")
    (folder / "deep" / "note.txt").write_text("x")
    return folder


def put(home, weights, name="tokenizer", kind="tokenizer", parents=None, identity="i"):
    return publish(
        home,
        name=name,
        kind=kind,
        source_dir=weights,
        config={"width": 8},
        parents=parents or {},
        metrics={"psnr": 30},
        identity=identity,
    )


def test_versions_count_up_and_the_newest_is_the_default(home, weights):
    assert [put(home, weights, identity=i).reference for i in "ab"] == ["tokenizer@v1", "tokenizer@v2"]
    assert resolve(home, "tokenizer").version == "v2"
    assert resolve(home, "tokenizer@v1").version == "v1"
    assert resolve(home, str(home.artifacts / "tokenizer" / "v1")).config == {"width": 8}


def test_the_same_identity_is_found_and_another_is_not(home, weights):
    first = put(home, weights, identity="same")
    assert find(home, name="tokenizer", identity="same") == first
    assert find(home, name="tokenizer", identity="other") is None
    assert find(home, name="world", identity="same") is None


def test_equal_files_have_equal_fingerprints(home, weights):
    first = put(home, weights, identity="a")
    assert put(home, weights, identity="b").fingerprint == first.fingerprint
    (weights / "model.bin").write_bytes(b"others")
    assert put(home, weights, identity="c").fingerprint != first.fingerprint


def test_a_changed_or_missing_file_is_refused(home, weights):
    artifact = put(home, weights)
    (artifact.path / "model.bin").write_bytes(b"tampered")
    with pytest.raises(ArtifactError, match=r"model\.bin.*differs"):
        resolve(home, "tokenizer")
    (artifact.path / "model.bin").unlink()
    with pytest.raises(ArtifactError, match="missing"):
        resolve(home, "tokenizer")


def test_wrong_names_say_what_there_is(home, weights):
    with pytest.raises(ArtifactError, match="none yet"):
        resolve(home, "tokenizer")
    put(home, weights)
    with pytest.raises(ArtifactError, match="did you mean tokenizer"):
        resolve(home, "tokeniser")
    with pytest.raises(ArtifactError, match="there are v1"):
        resolve(home, "tokenizer@v9")
    with pytest.raises(ArtifactError, match="is a tokenizer, a world is needed"):
        resolve(home, "tokenizer", kind="world")
    for name in ("../up", "", "UPPER", "a/b"):
        with pytest.raises(ArtifactError):
            put(home, weights, name=name)
        with pytest.raises(ArtifactError):
            resolve(home, name or "@")


def test_a_broken_record_is_one_clear_error(home, weights):
    (put(home, weights).path / "artifact.json").write_text("{")
    with pytest.raises(ArtifactError, match="can't be read"):
        resolve(home, str(home.artifacts / "tokenizer" / "v1"))


def test_lineage_walks_back_to_the_first_ancestor(home, weights):
    tokenizer = put(home, weights, parents={"dataset": "platformers@3"})
    world = put(
        home,
        weights,
        name="world",
        kind="world",
        parents={"dataset": "platformers@3", "tokenizer": tokenizer.reference},
    )
    walked = lineage(home, world.reference)
    assert [a.reference for a in walked] == ["world@v1", "tokenizer@v1"]
    assert walked[1].parents == {"dataset": "platformers@3"}


def _publish_many(path, weights, count):
    for index in range(count):
        put(Home(path), weights, identity=str(index))


def test_publishers_side_by_side_never_share_a_version(home, weights):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_publish_many, args=(home.path, weights, 8)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    found = versions(home, "tokenizer")
    assert [a.version for a in found] == [f"v{n}" for n in range(1, 25)]
    assert not list((home.artifacts / "tokenizer").glob(".new-*"))

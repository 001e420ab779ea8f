import shutil

import pytest

from infra.artifact import ArtifactError, publish
from infra.config import Home, TrackingConfig
from infra.registry import Registry, RegistryError, open_registry
from infra.tracking import Run
from lampworks import main


def published(home, folder, weights, send=True, name="toy"):
    """A world with these bytes as weights, published and registered as a training does it."""
    shutil.rmtree(folder / "made", ignore_errors=True)
    (folder / "made" / "tokenizer").mkdir(parents=True)
    (folder / "made" / "tokenizer" / "model.safetensors").write_bytes(weights)
    made = publish(
        home, name=name, kind="world", source_dir=folder / "made", config={}, parents={}, metrics={}, identity="x"
    )
    run = Run(TrackingConfig(), home, name=name, key=made.reference, folder=folder / "runs" / made.version)
    run.model(made.path, made.reference, made.fingerprint)
    run.close()
    return made


@pytest.fixture
def registry(tracked_home):
    return Registry(TrackingConfig(), tracked_home)


def test_the_first_version_is_champion_and_the_next_is_candidate(tracked_home, registry, tmp_path):
    assert registry.aliases("toy") == {}
    published(tracked_home, tmp_path, b"1")
    assert registry.aliases("toy") == {"champion": "toy@v1"}
    published(tracked_home, tmp_path, b"2")
    assert registry.aliases("toy") == {"champion": "toy@v1", "candidate": "toy@v2"}
    published(tracked_home, tmp_path, b"3")
    assert registry.aliases("toy") == {"champion": "toy@v1", "candidate": "toy@v3"}


def test_what_is_registered_again_stays_as_it_is(tracked_home, registry, tmp_path):
    made = published(tracked_home, tmp_path, b"1")
    run = Run(TrackingConfig(), tracked_home, name="toy", key="again", folder=tmp_path / "again")
    run.model(made.path, made.reference, made.fingerprint)
    run.close()
    assert registry.aliases("toy") == {"champion": "toy@v1"}


@pytest.mark.parametrize("said", ["toy@v2", "toy@2", "toy@candidate"])
def test_a_promoted_candidate_is_champion_and_no_candidate(tracked_home, registry, tmp_path, said):
    for weights in (b"1", b"2"):
        published(tracked_home, tmp_path, weights)
    assert registry.promote(said) == {"champion": "toy@v2"}
    assert registry.promote("toy@1", "candidate") == {"champion": "toy@v2", "candidate": "toy@v1"}


def test_an_unknown_version_and_a_registry_that_is_away_are_one_sentence(tracked_home, registry, tmp_path):
    published(tracked_home, tmp_path, b"1")
    with pytest.raises(RegistryError, match="toy@v7 is not in the registry .*: under toy there is toy@v1"):
        registry.promote("toy@7")
    away = Registry(TrackingConfig(uri="http://127.0.0.1:9"), tracked_home)
    with pytest.raises(RegistryError, match=r"127\.0\.0\.1:9 does not answer"):
        away.aliases("toy")


def test_another_machine_fetches_the_files_and_verifies_them(tracked_home, tmp_path):
    made = published(tracked_home, tmp_path, b"weights")
    server = TrackingConfig(uri=tracked_home.tracking_uri)
    elsewhere = Home(tmp_path / "elsewhere").ensure()
    fetched = Registry(server, elsewhere).fetch("toy@v1")
    assert fetched.path == elsewhere.artifacts / "toy" / "v1"
    assert (fetched.fingerprint, fetched.files) == (made.fingerprint, made.files)
    assert not [p for p in fetched.path.rglob("*") if p.suffix in {".pkl", ".pt", ".pickle"}]
    (fetched.path / "tokenizer" / "model.safetensors").write_bytes(b"others")
    with pytest.raises(ArtifactError, match="differs from what was published"):
        Registry(server, elsewhere).fetch("toy@v1")


def test_a_home_without_a_store_has_no_registry(home):
    assert open_registry(TrackingConfig(), home) is None


def test_the_command_registers_what_the_home_has_and_says_who_holds_what(tracked_home, tmp_path, capsys):
    published(tracked_home, tmp_path, b"1")
    (tmp_path / "more").mkdir()
    publish(
        tracked_home, name="toy", kind="world", source_dir=tmp_path / "more", config={}, parents={}, metrics={},
        identity="y",
    )  # fmt: skip
    main(["promote", "toy@2", "--home", str(tracked_home.path)])
    assert capsys.readouterr().out == "champion   toy@v2\n"
    main(["promote", "toy@1", "candidate", "--home", str(tracked_home.path)])
    assert capsys.readouterr().out == "candidate  toy@v1\nchampion   toy@v2\n"
    with pytest.raises(SystemExit):
        main(["promote", "toy", "--home", str(tracked_home.path)])
    assert "name a version, such as world@v3" in capsys.readouterr().err
